"""What must hold whatever files hold: they are what they say, and searches of it are right, or one clear line is told.

The check runs under AddressSanitizer: codes that were read end at the end of an allocation, so a read beyond them is
seen. A map has no such end; there a file that is too short would end the process with SIGBUS.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hashengine import HammingIndex, InputError
from hashengine.index import read_codes
from tests.fuzz.inputs import LSB_FIRST, MMAP, files_of
from tests.helpers.hamming_levels import assert_same, nearest

Search = Callable[[np.ndarray, np.ndarray, np.ndarray], None]  # queries, codes, which of them are live
Measured = Callable[[Callable[[], Any], int], Any]  # what to call, and the size of the files that it reads

_LONGEST_MESSAGE = 1000


def plainly(call: Callable[[], Any], size: int) -> Any:
    return call()


def check(data: bytes, folder: Path, search: Search | None = None, measured: Measured = plainly) -> None:
    """Read what `data` says; an AssertionError, or any other but an InputError, is a bug.

    Args:
        folder: where to put the files; it is emptied first.
        search: searches once more, under sanitizers.
        measured: makes the call, and complains where it takes more memory than files of that size should.
    """
    reader, flags, files = files_of(data)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, contents in files.items():
        (folder / name).write_bytes(contents)
    mmap, size = bool(flags & MMAP), sum(map(len, files.values()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's and numpy's, of odd headers
        try:
            if reader == "index":
                index = measured(lambda: HammingIndex.load(folder, mmap=mmap), size)
            else:
                bit_order = "lsb_first" if flags & LSB_FIRST and not mmap else "msb_first"
                file = folder / f"codes.{reader}"
                codes = measured(lambda: read_codes(file, bit_order=bit_order, mmap=mmap), size)
        except InputError as error:
            message = str(error)
            assert message.isprintable() and str(folder) in message, repr(message)
            assert len(message) <= len(str(folder)) + _LONGEST_MESSAGE, f"{len(message)} characters"
            return
    if reader != "index":
        stored = np.frombuffer(files[file.name], np.uint8)
        stored = stored[len(stored) - codes.size :].reshape(codes.shape)
        order = "little" if bit_order == "lsb_first" else "big"
        assert codes.dtype == np.uint8 and codes.ndim == 2 and codes.shape[1] > 0
        np.testing.assert_array_equal(codes, np.packbits(np.unpackbits(stored, axis=1, bitorder=order), axis=1))
        if codes.shape[1] > 8192:  # longer than an index takes
            return
        index = HammingIndex(8 * codes.shape[1])
        index.add(codes)
    _check_index(index, search)
    _check_save(index, folder, mmap)


def _check_index(index: HammingIndex, search: Search | None) -> None:
    state, ids = index._state, index.ids()
    codes = index.reconstruct(ids).numpy()
    assert len(index) == len(ids) == len(ids.unique()) and bool((ids >= 0).all())
    np.testing.assert_array_equal(codes, index.codes)
    queries = np.concatenate([codes[-1:], np.full((1, index.bits // 8), 0x5A, np.uint8)])
    if search is not None:
        search(queries, state.codes[:].numpy(), state.live_mask())
    for k in {1, len(index)} if len(index) else ():
        distances, positions = nearest(queries, codes, k)
        assert_same(index.search(queries, k), (distances, ids.numpy()[positions]))
    counts = index.count(queries)
    assert (counts.sum(axis=1) == len(index)).all()


def _check_save(index: HammingIndex, folder: Path, mmap: bool) -> None:
    """What was read can grow, be kept and be read again."""
    code = np.full((1, index.bits // 8), 0xA5, np.uint8)
    before = index.ids()
    own_ids = index._state.next_id is None
    index.add(code, np.setdiff1d(np.arange(len(before) + 1), before)[:1] if own_ids else None)
    index.save(folder)
    again = HammingIndex.load(folder, mmap=mmap)  # a map leaves wrong codes unseen once more
    assert torch.equal(again.codes, index.codes) and torch.equal(again.ids(), index.ids())
    assert torch.equal(again.ids()[:-1], before) and (again.codes[-1:].numpy() == code).all()
