"""The codes that searches are measured on: drawn, in an order that is hard for a search, or of real images."""

import enum
from pathlib import Path
from typing import NamedTuple

import numpy as np

_CLASSES = 10
_LEARNED = ("fashion-mnist", "cifar10")


class Data(str, enum.Enum):
    random = "random"  # independent bits
    clustered = "clustered"  # 1,000 centres with a few bits flipped, as learned codes are: large groups of ties
    equal = "equal"  # one code again and again: all are tied
    best_last = "best-last"  # the queries' neighbours at the end: every bound learned on the way is beaten again
    best_first = "best-first"
    fashion_mnist = "fashion-mnist"  # the codes that a small network learned of images, tiled: larger groups still
    cifar10 = "cifar10"


class Codes(NamedTuple):
    """What is searched and what is sought, uint8 [N, bits / 8], and the classes of both, int64 [N]."""

    database: np.ndarray
    queries: np.ndarray
    labels: np.ndarray
    query_labels: np.ndarray


def make_codes(data: Data, count: int, queries: int, bits: int, images: Path) -> Codes:
    """The same for the same arguments; drawn codes get labels at random. ``images``: the folder of the archives."""
    rng = np.random.default_rng(1)
    if data.value in _LEARNED:
        from benchmarks import real_codes  # needs what trains a network and reads images

        learned = real_codes.learned(data.value, bits, images)
        database, labels = real_codes.tile(learned.database, learned.labels, count, rng)
        order = rng.permutation(len(learned.queries))
        batch, query_labels = real_codes.tile(learned.queries[order], learned.query_labels[order], queries, rng)
        return Codes(database, batch, labels, query_labels)
    database, batch = draw_codes(data, count, bits, rng), draw_codes(data, queries, bits, rng)
    if data is Data.equal:
        database[:] = database[0]
    elif data in (Data.best_last, Data.best_first):
        batch = batch[0] ^ (batch & rare_bits(batch.shape, 3, rng))  # around one code, by which the database is ordered
        order = np.unpackbits(database ^ batch[0], axis=1).sum(1).argsort(kind="stable")
        database = database[order if data is Data.best_first else order[::-1]]
    return Codes(database, batch, rng.integers(0, _CLASSES, count), rng.integers(0, _CLASSES, queries))


def draw_codes(data: Data, count: int, bits: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [count, bits / 8]."""
    codes = rng.integers(0, 256, (count, bits // 8), dtype=np.uint8)
    if data is Data.clustered:
        flips = codes & rare_bits(codes.shape, 3, rng)  # a bit flips with probability 1/16
        centres = np.random.default_rng(0).integers(0, 256, (1000, bits // 8), dtype=np.uint8)
        codes = centres[rng.integers(0, len(centres), count)] ^ flips
    return codes


def rare_bits(shape: tuple[int, ...], halvings: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 of which each bit is set with probability 2**-halvings: the conjunction of so many random bytes."""
    bits = rng.integers(0, 256, shape, dtype=np.uint8)
    for _ in range(halvings - 1):
        bits &= rng.integers(0, 256, shape, dtype=np.uint8)
    return bits
