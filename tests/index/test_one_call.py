"""A small search takes one call of the native module. Its answers and errors are those of the other path."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from hashengine import HammingIndex, InputError, _native
from hashengine.index import execution
from hashengine.index.execution import topk_in_one_call
from tests.helpers.index_operations import UNCHECKED
from tests.helpers.indexes import as_numpy, codes_of, index_of

pytestmark = pytest.mark.skipif(not _native.available(), reason="the native module is not in use")


def search_in_many_steps(index: HammingIndex, queries, k, **options):
    """The search on the path that large searches take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "MAX_PAIRS_IN_ONE_CALL", 0)
        return index.search(queries, k, **options)


def calls_of(patch: pytest.MonkeyPatch) -> list[bool]:
    """A list that grows with each call of `topk_in_one_call`: whether it answered."""
    answered = []

    def recording(*args):
        answer = topk_in_one_call(*args)
        answered.append(answer is not None)
        return answer

    patch.setattr(execution, "topk_in_one_call", recording)
    return answered


@given(st.data())
@UNCHECKED
def test_one_call_gives_the_answer_of_the_other_path(data):
    bits = data.draw(st.sampled_from([8, 24, 32, 64, 72, 128, 256, 1024]))
    count = data.draw(st.integers(1, 300))
    index = index_of(count, bits=bits, ids=data.draw(st.booleans()))
    removed = data.draw(st.integers(0, count - 1))
    index.remove(index.ids[:removed].numpy())
    queries = codes_of(data.draw(st.integers(0, 9)), bits, seed=1)
    if data.draw(st.booleans()):
        queries = torch.from_numpy(queries)
    k, options = data.draw(st.integers(1, len(index))), {"num_threads": data.draw(st.sampled_from([None, 1, 2]))}
    with pytest.MonkeyPatch.context() as patch:
        answered = calls_of(patch)
        found = index.search(queries, k, **options)
        assert answered == [True]
    for mine, other in zip(found, search_in_many_steps(index, queries, k, **options), strict=True):
        assert type(mine) is type(other) and mine.dtype == other.dtype
        np.testing.assert_array_equal(as_numpy(mine), as_numpy(other))


def test_a_mapped_index_and_an_updated_index_are_searched_in_one_call(tmp_path, monkeypatch):
    index = index_of(100)
    index.save(tmp_path)
    mapped = HammingIndex.load(tmp_path, mmap=True)
    for searched in (index, mapped):
        searched.update(np.array([7]), codes_of(1, seed=5))
    answered = calls_of(monkeypatch)
    for searched in (index, mapped):
        distances, ids = searched.search(codes_of(1, seed=5), 1)
        assert (distances[0, 0], ids[0, 0]) == (0, 7)
    assert answered == [True, True]


@pytest.mark.parametrize(
    "queries",
    [
        codes_of(8)[::2],
        np.asfortranarray(codes_of(4)),
        torch.from_numpy(codes_of(8))[::2],
        np.ma.masked_array(codes_of(4)),
        codes_of(4).astype(np.int16),
        codes_of(4)[0],
        np.uint8(3),
        np.array(3, np.uint8),
        codes_of(4, bits=72),
        codes_of(4).tolist(),
        torch.from_numpy(codes_of(4)).to_sparse(),
        torch.from_numpy(codes_of(4)).float(),
    ],
)
def test_other_queries_are_answered_or_refused_as_on_the_other_path(queries):
    index = index_of(50)
    assert_same_outcome(lambda: index.search(queries, 3), lambda: search_in_many_steps(index, queries, 3))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_queries_are_refused():
    with pytest.raises(InputError, match="^search: queries must be a dense tensor, got a nested one"):
        index_of(50).search(torch.nested.nested_tensor([torch.from_numpy(codes_of(1)[0])]), 3)


@pytest.mark.parametrize("k", [0, -1, 51, 2**70, -(2**70), True, 3.0, "3", None, np.int64(3), torch.tensor(3)])
def test_every_k_is_answered_or_refused_as_on_the_other_path(k):
    index, queries = index_of(50), codes_of(2, seed=1)
    assert_same_outcome(lambda: index.search(queries, k), lambda: search_in_many_steps(index, queries, k))


@pytest.mark.parametrize("threads", [0, -1, 2**40, True, 1.0, "1", np.int64(1)])
def test_every_number_of_threads_is_answered_or_refused_as_on_the_other_path(threads):
    index, queries = index_of(50), codes_of(2, seed=1)
    assert_same_outcome(
        lambda: index.search(queries, 3, num_threads=threads),
        lambda: search_in_many_steps(index, queries, 3, num_threads=threads),
    )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("record", [lambda f, x: torch.jit.trace(f, (x,)), lambda f, x: make_fx(f)(x)])
def test_a_recorded_search_follows_its_queries(record):
    index, queries = index_of(50), torch.from_numpy(codes_of(6, seed=1))

    def search(queries: torch.Tensor) -> torch.Tensor:
        return index.search(queries, 4)[1]

    recorded = record(search, queries[:3])
    assert torch.equal(recorded(queries[3:]), search(queries[3:]))


def test_vmap_over_a_search_computes_each_query():
    index, queries = index_of(50), torch.from_numpy(codes_of(3, seed=1))
    found = torch.func.vmap(lambda query: index.search(query[None], 5)[1][0])(queries)
    assert torch.equal(found, index.search(queries, 5)[1])


def test_an_empty_index_is_refused():
    with pytest.raises(InputError, match="^search: the index must be one that holds codes"):
        HammingIndex(64).search(codes_of(1), 1)


@pytest.mark.parametrize("limit", ["MAX_PAIRS_IN_ONE_CALL", "MAX_RESULTS_IN_ONE_CALL"])
def test_a_search_above_a_limit_takes_the_other_path(monkeypatch, limit):
    index, queries, answered = index_of(50), codes_of(4, seed=1), calls_of(monkeypatch)
    size = {"MAX_PAIRS_IN_ONE_CALL": 4 * 50, "MAX_RESULTS_IN_ONE_CALL": 4 * 3}[limit]
    for most in (size, size - 1):
        monkeypatch.setattr(execution, limit, most)
        assert index.search(queries, 3)[0].shape == (4, 3)
    assert answered == [True, False]


@pytest.mark.parametrize("options", [{"filter": np.ones(50, bool)}, {"progress": lambda *done: None}])
def test_a_filter_or_a_report_of_progress_takes_the_other_path(monkeypatch, options):
    answered = calls_of(monkeypatch)
    index_of(50).search(codes_of(1, seed=1), 3, **options)
    assert answered == []


@pytest.mark.parametrize("placement", [{"device": ["cpu", "cpu"]}, {"device": "cpu", "streamed": True}])
def test_several_devices_and_streamed_codes_take_the_other_path(monkeypatch, placement):
    answered = calls_of(monkeypatch)
    index_of(50).to(**placement).search(codes_of(1, seed=1), 3)
    assert answered == []


def assert_same_outcome(one_call, many_steps) -> None:
    """Check that both calls return equal arrays, or raise equal errors."""
    outcomes = []
    for call in (one_call, many_steps):
        try:
            outcomes.append([as_numpy(part).tolist() for part in call()])
        except (InputError, OverflowError) as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    assert outcomes[0] == outcomes[1]


def test_queries_whose_negation_is_pending_are_searched():
    index, queries = index_of(50), torch.from_numpy(codes_of(4, seed=1))
    expected = index.search(-queries, 3)
    for found, right in zip(index.search(torch._neg_view(queries), 3), expected, strict=True):
        assert torch.equal(found, right)
