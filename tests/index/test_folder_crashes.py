"""The folder of an index if processes are killed during a save, have no disk space, or save at the same time."""

import os
import random
import resource
import shutil
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from hashengine import HammingIndex, InputError
from tests.helpers.children import in_child
from tests.helpers.indexes import assert_same_index, codes_of, index_of


def test_a_full_disk_leaves_the_old_index(tmp_path):
    """A limit on the size of a file stands in for a full disk."""
    old = index_of(1000)
    old.save(tmp_path)
    grown = HammingIndex.load(tmp_path)
    grown.add(codes_of(5000, seed=1))

    def save() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(OSError, match="File too large: '.*'$"):
            grown.save(tmp_path)

    assert os.waitpid(in_child(save), 0)[1] == 0
    assert_same_index(HammingIndex.load(tmp_path), old)
    grown.save(tmp_path)
    assert_same_index(HammingIndex.load(tmp_path), grown)


# writable: patterns of the files that can be written to.
@pytest.mark.parametrize("writable", [(), ("lock",), ("lock", "codes-*.bin"), ("codes-*.bin", "manifest.json")])
@pytest.mark.parametrize("grown", [False, True])
def test_a_read_only_folder_is_refused(writable, grown):
    """Root may write everywhere, so the child of a test that runs as root becomes the user `nobody`."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "index")
        old = index_of()
        old.save(path)
        new = HammingIndex.load(path) if grown else index_of(20)
        new.add(codes_of(5, seed=1))
        for file in path.iterdir():
            file.chmod(0o666 if any(map(file.match, writable)) else 0o444)
        Path(name).chmod(0o755)
        path.chmod(0o555)

        def save() -> None:
            if os.geteuid() == 0:
                os.setuid(65534)
            with pytest.raises(InputError, match=r"path must be a folder that can be written to, got .* \(.*denied\)$"):
                new.save(path)
            assert_same_index(HammingIndex.load(path), old)

        child = in_child(save)
        assert os.waitpid(child, 0)[1] == 0
        path.chmod(0o755)
        assert_same_index(HammingIndex.load(path), old)
        assert len(list(path.iterdir())) == 3


def test_new_files_of_an_index_have_the_permissions_of_those_that_they_replace(tmp_path):
    index = index_of()
    index.save(tmp_path)
    for file in tmp_path.iterdir():
        file.chmod(0o660)
    index.remove(np.array([0]))
    index.compact()
    index.save(tmp_path)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o660}
    assert {file.name.partition("-")[0] for file in tmp_path.iterdir()} == {"codes", "ids", "lock", "manifest.json"}


def state_of(step: int) -> tuple[np.ndarray, np.ndarray]:
    """The expected codes and ids after the calls of `advance` for the steps 1 to `step`."""
    ids = np.array([id for id in range(40 * (step + 1)) if id % 40 or id // 40 >= step], np.int64)
    codes = codes_of(4000)[ids]
    codes[ids == 1] = step % 256
    return codes, ids


def advance(index: HammingIndex, step: int) -> None:
    """Add, remove and update codes, in every third step also compact, so that saves append to files or replace them."""
    index.add(codes_of(4000)[40 * step : 40 * (step + 1)])
    index.remove(np.array([40 * (step - 1)]))
    index.update(np.array([1]), np.full((1, 8), step % 256, np.uint8))
    if step % 3 == 0:
        index.compact()


@pytest.mark.parametrize("kills", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_killed_save_leaves_the_last_state_or_the_next(tmp_path, kills):
    rng = random.Random(0)
    index = HammingIndex(64)
    index.add(codes_of(4000)[:40])
    index.update(np.array([1]), np.zeros((1, 8), np.uint8))
    index.save(tmp_path)
    cut_short = step = 0
    for _ in range(kills):
        read_end, write_end = os.pipe()

        def save(step: int = step, reports: int = write_end) -> None:
            index = HammingIndex.load(tmp_path)
            for next_step in range(step + 1, 90):
                advance(index, next_step)
                os.write(reports, b"s")  # "s": a save starts
                index.save(tmp_path)
                os.write(reports, b"d")  # "d": the save is done

        child = in_child(save)
        os.close(write_end)
        os.read(read_end, 1)
        time.sleep(rng.random() * 0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        reports = b"s" + os.read(read_end, 1 << 16)
        os.close(read_end)
        index = HammingIndex.load(tmp_path, mmap=rng.random() < 0.5)
        steps = (step + reports.count(b"d"), step + reports.count(b"s"))
        cut_short += steps[0] != steps[1]
        step = (int(index.ids.max()) + 1) // 40 - 1
        assert step in steps
        codes, ids = state_of(step)
        np.testing.assert_array_equal(index.ids, ids)
        np.testing.assert_array_equal(index.codes, codes)
        if step > 60:
            shutil.rmtree(tmp_path)
            index, step = HammingIndex(64), 0
            index.add(codes_of(4000)[:40])
            index.update(np.array([1]), np.zeros((1, 8), np.uint8))
            index.save(tmp_path)
    assert cut_short > kills // 4
    index.save(tmp_path)
    assert len(list(tmp_path.iterdir())) <= 5  # manifest, lock, codes, ids and live: files of killed saves are removed


def test_concurrent_saves_and_loads_see_complete_indexes(tmp_path):
    """Each save succeeds or is refused, and each load finds a complete index."""

    def save(writer: int) -> None:
        for step in range(40):
            index = index_of(20 + writer + 2 * step)
            try:
                index.save(tmp_path)
            except InputError as error:
                assert "a folder that is not in use" in str(error)

    index_of(20).save(tmp_path)
    children = [in_child(lambda writer=writer: save(writer)) for writer in range(2)]
    running = set(children)
    while running:
        index = HammingIndex.load(tmp_path, mmap=len(running) == 1)
        np.testing.assert_array_equal(index.codes, codes_of(len(index)))
        for child in list(running):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                assert status == 0
                running.remove(child)
    assert len(list(tmp_path.iterdir())) == 3
