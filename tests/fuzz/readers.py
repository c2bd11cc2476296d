"""The check of the fuzzer: any input either loads and is searched correctly, or raises an InputError of one line.

`python -m tests.fuzz` runs this check under AddressSanitizer; tests/fuzz/test_readers.py runs it without a sanitizer.
Under the sanitizer, each index is also searched with kernels that are compiled with it. They get a copy of the codes
that ends with the last code, so that the sanitizer detects a read beyond the codes. The native module is compiled
without the sanitizer. If an index maps more codes than its file contains, its searches read beyond the last page of the
file, and SIGBUS ends the process.
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

Search = Callable[[np.ndarray, np.ndarray, np.ndarray], None]  # called with queries, codes and a mask of live codes
Measure = Callable[[Callable[[], Any], int], Any]  # called with a function that reads files, and their size

_LONGEST_MESSAGE = 1000


def call_unmeasured(call: Callable[[], Any], size: int) -> Any:
    return call()


def check(data: bytes, folder: Path, search: Search | None = None, measure: Measure = call_unmeasured) -> None:
    """Read the files that `data` encodes, and check the result. An exception from this function means a defect.

    Args:
        data: an input of the fuzzer.
        folder: the folder for the files; it is emptied first.
        search: searches again with kernels that are compiled with sanitizers, and checks the answers. Default: does
            not search again.
        measure: calls a function, and fails if the call allocates too much memory for the size of the files that it
            reads. Default: only calls the function.
    """
    reader, flags, files = files_of(data)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, contents in files.items():
        (folder / name).write_bytes(contents)
    mmap, size = bool(flags & MMAP), sum(map(len, files.values()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python and numpy warn about odd headers
        try:
            if reader == "index":
                index = measure(lambda: HammingIndex.load(folder, mmap=mmap), size)
            else:
                bit_order = "lsb_first" if flags & LSB_FIRST and not mmap else "msb_first"
                file = folder / f"codes.{reader}"
                codes = measure(lambda: read_codes(file, bit_order=bit_order, mmap=mmap), size)
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
        if codes.shape[1] > 8192:  # too long for the codes of an index
            return
        index = HammingIndex(8 * codes.shape[1])
        index.add(codes)
    _check_index(index, search)
    _check_save(index, folder, mmap)


def _check_index(index: HammingIndex, search: Search | None) -> None:
    snapshot, ids = index._snapshot, index.ids
    codes = index.reconstruct(ids).numpy()
    assert len(index) == len(ids) == len(ids.unique()) and bool((ids >= 0).all())
    np.testing.assert_array_equal(codes, index.codes)
    queries = np.concatenate([codes[-1:], np.full((1, index.bits // 8), 0x5A, np.uint8)])
    if search is not None:
        search(queries, np.array(snapshot.codes[:]), snapshot.live_mask())
    for k in {1, len(index)} if len(index) else ():
        distances, positions = nearest(queries, codes, k)
        assert_same(index.search(queries, k), (distances, ids.numpy()[positions]))
    counts = index.count(queries)
    assert (counts.sum(axis=1) == len(index)).all()


def _check_save(index: HammingIndex, folder: Path, mmap: bool) -> None:
    """Check that a code can be added to the index, and that the index can then be saved and loaded again."""
    code = np.full((1, index.bits // 8), 0xA5, np.uint8)
    before = index.ids
    own_ids = index._snapshot.next_id is None
    index.add(code, np.setdiff1d(np.arange(len(before) + 1), before)[:1] if own_ids else None)
    index.save(folder)
    # If the first load mapped the codes, it did not check their checksum. A wrong checksum stays wrong when the save
    # appends to the file. Therefore the second load has to map the codes, too.
    again = HammingIndex.load(folder, mmap=mmap)
    assert torch.equal(again.codes, index.codes) and torch.equal(again.ids, index.ids)
    assert torch.equal(again.ids[:-1], before) and (again.codes[-1:].numpy() == code).all()
