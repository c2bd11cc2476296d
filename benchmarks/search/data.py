"""The data sets of the search benchmarks: random codes, and codes that a network learned from images."""

import enum
from pathlib import Path

import numpy as np

from benchmarks.search import synthetic_codes
from benchmarks.search.synthetic_codes import Codes


class Data(str, enum.Enum):
    """How the codes are made.

    - `random`: independent bits.
    - `clustered`: copies of 1,000 centres with a few bits flipped. They have large groups of ties, as learned codes do.
    - `equal`: a single code repeated, so that all codes are tied.
    - `best_last`: all queries are near one code, and the codes nearest to it are at the end of the database. A search
      therefore tightens its bound until the end.
    - `best_first`: the same, but the nearest codes are at the start of the database.
    - `fashion_mnist`, `cifar10`: a small network learns the codes from these images. The codes have many ties.
    """

    random = "random"
    clustered = "clustered"
    equal = "equal"
    best_last = "best-last"
    best_first = "best-first"
    fashion_mnist = "fashion-mnist"
    cifar10 = "cifar10"

    @property
    def is_learned(self) -> bool:
        """Whether a network learns the codes from images, which are in an archive."""
        return self in (Data.fashion_mnist, Data.cifar10)


def can_make(data: Data, bits: int, images: Path | None) -> bool:
    """Whether `make_codes` can be called: learned codes need a folder of archives, or codes that are cached."""
    if not data.is_learned:
        return True
    from benchmarks.search import image_codes  # imports the training code and an image library

    return image_codes.is_available(data.value, bits, images)


def make_codes(data: Data, count: int, queries: int, bits: int, images: Path | None) -> Codes:
    """Make `count` database codes and `queries` queries; the same arguments give the same codes.

    Args:
        data: how the codes are made.
        count: the number of database codes.
        queries: the number of queries.
        bits: the length of a code.
        images: the folder of the image archives; only learned codes that are not cached need it.
    """
    rng = np.random.default_rng(1)
    if data.is_learned:
        from benchmarks.search import image_codes

        learned = image_codes.load(data.value, bits, images)
        database, labels = synthetic_codes.tile(learned.database, learned.labels, count, rng)
        order = rng.permutation(len(learned.queries))
        batch, query_labels = synthetic_codes.tile(learned.queries[order], learned.query_labels[order], queries, rng)
        return Codes(database, batch, labels, query_labels)
    draw = synthetic_codes.draw_clustered if data is Data.clustered else synthetic_codes.draw_random
    database, batch = draw(count, bits, rng), draw(queries, bits, rng)
    if data is Data.equal:
        database[:] = database[0]
    elif data in (Data.best_last, Data.best_first):
        batch = synthetic_codes.queries_near_the_first(batch, rng)
        database = synthetic_codes.sort_by_distance(database, batch[0], nearest_first=data is Data.best_first)
    return synthetic_codes.label_at_random(database, batch, rng)
