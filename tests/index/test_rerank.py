"""The order of candidates by float scores."""

import re

import numpy as np
import pytest
import torch

import hashengine.index.rerank
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


@pytest.mark.parametrize("queries", [1, 2, 7])
@pytest.mark.parametrize("bits", [16, 64, 256])
def test_equal_candidates_have_equal_scores_at_every_place(bits, queries):
    rng = np.random.default_rng(bits)
    for k in (2, 3, 7, 10, 19, 33, 100):
        index, activations = HammingIndex(bits), rng.standard_normal((queries, bits)).astype(np.float32)
        index.add(np.full((k, bits // 8), 0xA5, np.uint8))
        ids = np.tile(np.arange(k), (queries, 1))
        scores, order = index.rerank(activations, ids)
        np.testing.assert_array_equal(order, ids)
        assert (scores == scores[:, :1]).all()
        vectors = np.tile(rng.standard_normal((1, bits)).astype(np.float32), (k, 1))
        np.testing.assert_array_equal(rerank_vectors(activations, vectors, ids)[1], ids)


def test_equal_candidates_of_a_block_with_one_query_have_equal_scores(monkeypatch):
    monkeypatch.setattr(hashengine.index.rerank, "_FLOATS_PER_BLOCK", 1)
    vectors = np.tile(np.random.default_rng(0).standard_normal((1, 256)).astype(np.float32), (500, 1))
    ids = np.tile(np.arange(500), (3, 1))
    np.testing.assert_array_equal(rerank_vectors(vectors[:3] + 1, vectors, ids)[1], ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_the_scores(dtype):
    vectors = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    index = HammingIndex(32)
    index.add(pack_bits(vectors))
    ids = torch.arange(50).expand(3, -1)
    calls = (lambda: index.rerank(vectors[:3], ids), lambda: rerank_vectors(vectors[:3].numpy(), vectors, ids))
    for call in calls:
        expected = call()
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(call(), expected, rtol=0, atol=0)


def test_ids_without_a_vector_are_refused():
    with pytest.raises(InputError, match="rerank_vectors: ids must be below 4, the number of vectors, got 4"):
        rerank_vectors(np.zeros((1, 3)), np.zeros((4, 3)), np.array([[4]]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_values_that_are_not_finite_in_float32_are_refused_on_both_sides(bad):
    queries, vectors = np.ones((1, 8)), np.ones((4, 8))
    ids = np.array([[0, -1, 1, 3]])
    index = HammingIndex(8)
    index.add(np.zeros((4, 1), np.uint8))
    vectors[2, 0] = bad  # no candidate: its row is not read
    assert rerank_vectors(queries, vectors, ids)[1].tolist() == [[0, 1, 3, -1]]
    vectors[3, 0] = bad
    with pytest.raises(InputError, match=f"^rerank_vectors: vectors must be .*, got {re.escape(str(bad))}"):
        rerank_vectors(queries, vectors, ids)
    with pytest.raises(InputError, match="^rerank_vectors: vectors must be finite in float32"):
        rerank_vectors(queries, torch.from_numpy(vectors), torch.from_numpy(ids))
    queries[0, 5] = bad
    with pytest.raises(InputError, match="^rerank_vectors: query_vectors must be finite in float32"):
        rerank_vectors(queries, np.ones((4, 8)), ids)
    with pytest.raises(InputError, match="^rerank: query_activations must be finite in float32"):
        index.rerank(queries, ids)


def test_products_that_are_not_finite_in_float32_are_refused():
    """Otherwise a NaN would be first, and -inf would be behind an id of -1."""
    large, ids = np.full((1, 8), 3e38), np.array([[-1, 0]])
    with pytest.raises(InputError, match="^rerank_vectors: the products of queries and candidates must be finite"):
        rerank_vectors(large, -large, ids)
    index = HammingIndex(8)
    index.add(np.zeros((1, 1), np.uint8))
    with pytest.raises(InputError, match="^rerank: the products of queries and candidates must be finite in float32"):
        index.rerank(large, ids)


@pytest.mark.parametrize("dtype", [np.int64, bool, np.uint8])
def test_vectors_that_are_not_floating_are_refused(dtype):
    with pytest.raises(InputError, match="^rerank_vectors: vectors must be float64, float32, float16 or bfloat16, got"):
        rerank_vectors(np.ones((1, 8)), np.ones((4, 8), dtype), np.array([[0]]))
    with pytest.raises(InputError, match="^rerank_vectors: query_vectors must be float64, float32, float16 or bfloat1"):
        rerank_vectors(np.ones((1, 8), dtype), np.ones((4, 8)), np.array([[0]]))
