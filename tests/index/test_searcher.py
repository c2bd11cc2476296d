"""The Searcher protocol: HammingIndex and a toy implementation give the same answers."""

import numpy as np
import pytest
import torch

from hashengine import HammingIndex
from hashengine.index import Searcher
from tests.helpers.indexes import codes_of
from tests.helpers.toy_searcher import ToySearcher


@pytest.fixture(params=[HammingIndex, ToySearcher])
def searcher(request) -> Searcher:
    searcher = request.param(16)
    searcher.add(codes_of(60, 16))
    return searcher


def test_both_classes_are_searchers(searcher):
    assert isinstance(searcher, Searcher)


@pytest.mark.parametrize("other", [codes_of(3), torch.zeros(2), None, [1]])
def test_other_objects_are_not_searchers(other):
    assert not isinstance(other, Searcher)


def test_every_method_gives_the_same_answer_as_hamming_index(searcher):
    queries, labels = torch.from_numpy(codes_of(4, 16, seed=1)), (torch.arange(4) % 3, torch.arange(60) % 3)
    expected = HammingIndex(16)
    expected.add(codes_of(60, 16))
    assert (searcher.bits, len(searcher)) == (16, 60)
    answers = [
        *searcher.search(queries, 7),
        *searcher.range_search(queries, 6),
        searcher.count(queries),
        *searcher.count(queries, labels=labels),
    ]
    expected_answers = [
        *expected.search(queries, 7),
        *expected.range_search(queries, 6),
        expected.count(queries),
        *expected.count(queries, labels=labels),
    ]
    for answer, wanted in zip(answers, expected_answers, strict=True):
        np.testing.assert_array_equal(answer, wanted)
