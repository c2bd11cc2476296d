"""The order of candidates by float scores."""

import numpy as np
import pytest
import torch

from hashengine import HammingIndex, InputError
from hashengine.index import rerank_vectors
from hashengine.ops import pack_bits


def test_rerank_orders_by_the_product_of_activations_and_bits():
    rng = np.random.default_rng(0)
    vectors, queries = rng.standard_normal((200, 32)).astype(np.float32), rng.standard_normal((6, 32))
    index = HammingIndex(32)
    index.add(pack_bits(torch.from_numpy(vectors)), np.arange(200) + 1000)
    _, ids = index.search(pack_bits(torch.from_numpy(queries)).numpy(), 20)
    ids[2, 15:] = -1
    scores, order = index.rerank(queries, ids)
    for row_scores, row_order, candidates, query in zip(scores, order, ids, queries, strict=True):
        known = candidates[candidates >= 0]
        expected = np.where(vectors[known - 1000] >= 0, 1.0, -1.0) @ query
        best = np.argsort(-expected, kind="stable")
        np.testing.assert_allclose(row_scores[: len(known)], expected[best], atol=1e-4)
        np.testing.assert_array_equal(row_order[: len(known)], known[best])
        assert (row_scores[len(known) :] == -np.inf).all() and (row_order[len(known) :] == -1).all()

    scores, order = rerank_vectors(queries, vectors, torch.from_numpy(ids - 1000).clamp(min=-1))
    assert isinstance(scores, torch.Tensor) and scores.dtype == torch.float32
    expected = np.take_along_axis(queries @ vectors.T.astype(float), order.numpy().clip(0), 1)
    np.testing.assert_allclose(scores[order >= 0], expected[order >= 0], atol=1e-4)
    assert (scores.diff() <= 0)[:2].all()  # the scores of the third query end with -inf, whose difference is NaN


def test_rerank_keeps_the_order_of_ties():
    index = HammingIndex(8)
    index.add(np.full((4, 1), 255, np.uint8))
    scores, ids = index.rerank(np.ones((1, 8)), np.array([[2, -1, 0, 3]]))
    assert ids.tolist() == [[2, 0, 3, -1]] and scores.tolist() == [[8, 8, 8, -np.inf]]
    assert index.rerank(np.ones((1, 8)), np.full((1, 2), -1))[1].tolist() == [[-1, -1]]
    assert index.rerank(np.ones((0, 8)), np.zeros((0, 3), np.int64))[0].shape == (0, 3)


def test_ids_without_a_vector_are_refused():
    with pytest.raises(InputError, match="rerank_vectors: ids must be below 4, the number of vectors, got 4"):
        rerank_vectors(np.zeros((1, 3)), np.zeros((4, 3)), np.array([[4]]))
