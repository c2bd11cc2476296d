"""The op hamming_count and its reference are compared with the definition. Errors have one line."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from hashengine import ops
from hashengine.ops.hamming_count import _reference
from tests.helpers.hamming_levels import assert_same, counts_by_distance, make_codes, make_filter

BYTES = torch.zeros(5, 8, dtype=torch.uint8)
LABELS = torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize("count", [torch.ops.hashengine.hamming_count, _reference])
@pytest.mark.parametrize("own_filters", [None, False, True], ids=["no filter", "shared filter", "filter per query"])
def test_counts_with_labels_and_filters_equal_the_definition(count: Callable, own_filters: bool | None) -> None:
    rng = np.random.default_rng(5)
    codes, queries = make_codes("clustered", 900, 40, rng), make_codes("random", 6, 40, rng)
    q, c = torch.from_numpy(queries), torch.from_numpy(codes)
    filter = None if own_filters is None else make_filter(rng, 900, 6, 0.3, own_filters)
    bitmap = None if filter is None else ops.pack_filter(torch.from_numpy(filter))
    counts, relevant = count(q, c, filter=bitmap)
    assert relevant.shape == (6, 0)
    np.testing.assert_array_equal(counts, counts_by_distance(queries, codes, filter)[0])
    integers = [torch.from_numpy(rng.integers(0, 3, rows)) for rows in (6, 900)]
    got = count(q, c, filter=bitmap, query_labels=integers[0], code_labels=integers[1])
    is_relevant = (integers[0][:, None] == integers[1]).numpy()
    assert_same(got, counts_by_distance(queries, codes, filter, is_relevant))
    multi_hot = [torch.from_numpy(rng.random((rows, 70)) < 0.05) for rows in (6, 900)]
    got = count(q, c, filter=bitmap, query_labels=multi_hot[0], code_labels=multi_hot[1])
    is_relevant = (multi_hot[0][:, None] & multi_hot[1]).any(2).numpy()
    assert_same(got, counts_by_distance(queries, codes, filter, is_relevant))


@pytest.mark.parametrize("own_filters", [None, False, True], ids=["no filter", "shared filter", "filter per query"])
@pytest.mark.parametrize("rows", [70, 9_000, 70_000])  # the pairs of distances are counted from 67,600 codes on
@pytest.mark.parametrize("classes", [1, 2, 5, 60, 4096, 4097, 70_000])
def test_any_number_of_classes(classes: int, rows: int, own_filters: bool | None) -> None:
    """The classes of half of the queries are those of codes; the others are beyond them, or negative."""
    rng = np.random.default_rng(classes)
    codes, queries = make_codes("random", rows, 64, rng), make_codes("random", 6, 64, rng)
    labels = [rng.integers(0, classes, count) for count in (6, rows)]
    labels[1][-1] = classes - 1
    labels[0][:4] = [labels[1][0], classes - 1, classes, -1]
    filter = None if own_filters is None else make_filter(rng, rows, 6, 0.3, own_filters)
    bitmap = None if filter is None else ops.pack_filter(torch.from_numpy(filter))
    got = torch.ops.hashengine.hamming_count(
        *map(torch.from_numpy, (queries, codes)), bitmap, *map(torch.from_numpy, labels)
    )
    assert_same(got, counts_by_distance(queries, codes, filter, labels[0][:, None] == labels[1]))


def test_labels_are_a_pair_for_the_queries_and_the_codes() -> None:
    rng = np.random.default_rng(8)
    codes, queries = make_codes("clustered", 90, 16, rng), make_codes("random", 4, 16, rng)
    labels = tuple(torch.from_numpy(rng.integers(0, 3, rows)) for rows in (4, 90))
    got = ops.hamming_count(torch.from_numpy(queries), torch.from_numpy(codes), labels=labels)
    is_relevant = (labels[0][:, None] == labels[1]).numpy()
    assert_same(got, counts_by_distance(queries, codes, None, is_relevant))


def test_empty_codes_are_allowed_and_labels_without_a_column_are_not() -> None:
    codes = torch.zeros(3, 2, dtype=torch.uint8)
    assert ops.hamming_count(codes, codes[:0])[0].sum() == 0
    none = torch.zeros(3, 0, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"query_labels must be \[3\], or multi-hot .*, got \[3, 0\]"):
        ops.hamming_count(codes, codes, labels=(none, none))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS, "labels must be a pair"),
        (
            (LABELS.bool()[:, None], LABELS.bool()[:, None]),
            r"query_labels must be \[5\], or multi-hot with at least 2 columns, got \[5, 1\]; pass query_labels",
        ),
        ((LABELS, LABELS[:, None]), r"code_labels must be \[5\], .*; pass code_labels\[:, 0\] for classes"),
        ((LABELS, LABELS.int()), "int64"),
        ((LABELS, LABELS[:4]), r"int64 \[5\] "),
        ((LABELS, BYTES.bool()), "one kind"),
    ],
)
def test_errors_are_one_line(labels: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ops.hamming_count(BYTES, BYTES, labels=labels)
    assert str(caught.value).startswith("hamming_count: ")
    assert "\n" not in str(caught.value)
