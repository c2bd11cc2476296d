"""HammingKNN, compared with brute force and used by pytorch-metric-learning."""

import numpy as np
import pytest
import torch

from hashengine import HammingIndex, InputError
from hashengine.index import HammingKNN
from hashengine.ops import pack_bits
from tests.helpers.indexes import codes_of
from tests.helpers.toy_searcher import ToySearcher


def brute_force(query, reference, k, own):
    """Neighbours by (distance, position). If `own`, query i is row i of the reference and not its own neighbour."""
    bits = [np.unpackbits(np.asarray(codes), axis=1).astype(np.int64) for codes in (query, reference)]
    distances = (bits[0][:, None] != bits[1][None]).sum(2)
    order = distances.argsort(axis=1, kind="stable")
    if own:
        order = np.stack([row[row != i] for i, row in enumerate(order)])
    return np.take_along_axis(distances, order, 1)[:, :k], order[:, :k]


@pytest.mark.parametrize("kind", ["random", "duplicate"])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("k", [1, 10, 199])
def test_knn_equals_brute_force(k, own, kind):
    reference = torch.from_numpy(codes_of(200, 16))
    if kind == "duplicate":
        reference = reference[torch.arange(200) % 4]
    query = reference[:60] if own else torch.from_numpy(codes_of(60, 16, seed=1))
    distances, indices = HammingKNN()(query, k, reference, own)
    assert (distances.dtype, indices.dtype) == (torch.float32, torch.int64)
    expected_distances, expected_indices = brute_force(query, reference, k, own)
    np.testing.assert_array_equal(distances, expected_distances)
    np.testing.assert_array_equal(indices, expected_indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_knn_packs_activations(dtype):
    activations = torch.randn(80, 64, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    codes = pack_bits(activations.detach())
    expected = HammingKNN()(codes, 5, codes, True)
    for reference in (activations, codes, None):
        for result, want in zip(HammingKNN()(activations, 5, reference, True), expected, strict=True):
            assert not result.requires_grad
            torch.testing.assert_close(result, want)
    distances, indices = HammingKNN()(codes.numpy(), k=5, reference=codes.numpy(), ref_includes_query=True)
    np.testing.assert_array_equal(indices, expected[1])
    assert isinstance(distances, np.ndarray)


@pytest.mark.parametrize(
    ("query", "k", "reference", "own", "message"),
    [
        (torch.ones(4, 8), 4, None, False, r"k must be 1 to 3 \(the number of other references\), got 4"),
        (torch.ones(4, 8), 5, torch.ones(4, 8), False, r"k must be 1 to 4 \(the number of references\), got 5"),
        (
            torch.ones(4, 8),
            1,
            torch.ones(3, 8),
            True,
            "reference must be at least 4 rows, because it includes the queries, got 3 rows",
        ),
        (torch.ones(1, 8), 1, None, False, "reference must be at least 2 rows, got 1"),
        (torch.ones(4, 12), 1, None, False, "query must be .* multiple of 8, got"),
        (torch.ones(8), 1, None, False, "query must be .* multiple of 8, got"),
        (torch.ones(4, 8), 1, torch.ones(4, 16), False, r"reference must be \[rows, 1\], for 8 bits"),
        (torch.full((4, 8), torch.nan), 1, None, False, "query must be free of NaN"),
    ],
)
def test_invalid_arguments_raise_an_error_of_one_line(query, k, reference, own, message):
    with pytest.raises(InputError, match=message) as caught:
        HammingKNN()(query, k, reference, own)
    assert "\n" not in str(caught.value)


def test_integer_activations_are_refused():
    with pytest.raises(InputError, match="HammingKNN: query must be uint8, float64, .*, got int64"):
        HammingKNN()(torch.zeros(4, 8, dtype=torch.int64), 1)


def test_pytorch_metric_learning_can_use_knn():
    accuracy = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    labels = torch.arange(90) % 3
    activations = torch.nn.functional.one_hot(labels, 8) - 0.5  # one code per class
    calculator = accuracy.AccuracyCalculator(include=("precision_at_1", "r_precision"), knn_func=HammingKNN())
    assert calculator.get_accuracy(activations, labels) == {"precision_at_1": 1.0, "r_precision": 1.0}


@pytest.mark.parametrize("make", [HammingIndex, ToySearcher])
@pytest.mark.parametrize("own", [False, True])
def test_knn_of_a_searcher_equals_knn_of_its_codes(make, own):
    codes = torch.from_numpy(codes_of(50, 16))
    searcher = make(16)
    searcher.add(codes)
    found = HammingKNN()(codes[:9], 5, searcher, own)
    for result, expected in zip(found, HammingKNN()(codes[:9], 5, codes, own), strict=True):
        assert torch.equal(result, expected)
    with pytest.raises(InputError, match="HammingKNN: query must be of 16 bits, got 64 bits"):
        HammingKNN()(codes_of(3), 1, searcher)
