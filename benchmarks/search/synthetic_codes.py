"""Codes with independent bits, codes around centres, and copies of given codes with a few bits flipped."""

from typing import NamedTuple

import numpy as np

from tests.helpers.codes import rare_bits

_CLASSES = 10
_CENTRES = 1000
_CLUSTER_HALVINGS = 4  # a bit of a clustered code differs from the centre's bit with probability 2^-4
_COPY_HALVINGS = 6  # a bit of a copy differs from the original's bit with probability 2^-6


class Codes(NamedTuple):
    """A data set: codes uint8 [N, bits / 8], queries uint8 [Q, bits / 8], and their classes, int64 [N] and [Q]."""

    database: np.ndarray
    queries: np.ndarray
    labels: np.ndarray
    query_labels: np.ndarray


def draw_random(count: int, bits: int, rng: np.random.Generator) -> np.ndarray:
    """Codes with independent bits, uint8 [count, bits / 8]."""
    return rng.integers(0, 256, (count, bits // 8), dtype=np.uint8)


def draw_clustered(count: int, bits: int, rng: np.random.Generator) -> np.ndarray:
    """Codes around `_CENTRES` centres, uint8 [count, bits / 8]. Like learned codes, they have large groups of ties."""
    flips = draw_random(count, bits, rng)
    flips &= rare_bits(flips.shape, _CLUSTER_HALVINGS - 1, rng)
    centres = np.random.default_rng(0).integers(0, 256, (_CENTRES, bits // 8), dtype=np.uint8)
    return centres[rng.integers(0, _CENTRES, count)] ^ flips


def label_at_random(database: np.ndarray, queries: np.ndarray, rng: np.random.Generator) -> Codes:
    """The codes with random classes."""
    return Codes(database, queries, rng.integers(0, _CLASSES, len(database)), rng.integers(0, _CLASSES, len(queries)))


def queries_near_the_first(queries: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many codes as `queries`. Each bit differs from that of the first query with probability 1/16."""
    return queries[0] ^ (queries & rare_bits(queries.shape, _CLUSTER_HALVINGS - 1, rng))


def sort_by_distance(database: np.ndarray, query: np.ndarray, *, nearest_first: bool) -> np.ndarray:
    """The database, ordered by the distance from `query`.

    Tied codes keep their order if the nearest are first, and are in reverse order if the nearest are last.
    """
    order = np.unpackbits(database ^ query, axis=1).sum(1).argsort(kind="stable")
    return database[order if nearest_first else order[::-1]]


def tile(codes: np.ndarray, labels: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """`count` codes with their labels: the given ones once unchanged, then copies with a few random bits flipped."""
    source = np.arange(count) % len(codes)
    tiled = codes[source]
    copies = tiled[len(codes) :]
    copies ^= rare_bits(copies.shape, _COPY_HALVINGS, rng)
    return tiled, labels[source]
