"""Random operations on an index, compared with arrays of its expected contents, and searches during writes."""

import numpy as np
import pytest
from hypothesis import settings

from hashengine import HammingIndex
from tests.helpers.index_operations import (
    MARKS,
    UNCHECKED,
    Operations,
    OperationsOnDevices,
    check_states_beside_a_writer,
    use_small_blocks,
)

Operations.TestCase.settings = settings(UNCHECKED, max_examples=250, stateful_step_count=30)
TestOperations = Operations.TestCase
OperationsOnDevices.TestCase.settings = settings(UNCHECKED, max_examples=120, stateful_step_count=30)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)


@pytest.mark.usefixtures("small_blocks")
class TestOperationsOnDevices(OperationsOnDevices.TestCase):
    pass


@pytest.mark.parametrize("mapped", [False, True])
def test_each_search_during_writes_sees_one_state(tmp_path, mapped):
    index = HammingIndex(16)
    index.add(MARKS)
    if mapped:
        index.save(tmp_path)
        index = HammingIndex.load(tmp_path, mmap=True)
    query = np.zeros((1, 2), np.uint8)

    def check_count():  # the writer adds and removes codes in batches of five
        assert index.count(query).sum() % 5 == len(MARKS) % 5

    check_states_beside_a_writer(index, query, steps=400, also=check_count)
