"""HammingIndex: packed codes in memory, exact top-k over them, and a folder to keep them in."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hashengine.errors import InputError
from hashengine.index import storage
from hashengine.ops import hamming_topk

Array = Tensor | np.ndarray


class HammingIndex:
    """Exact nearest neighbours by Hamming distance over packed codes.

    Results are ordered by (distance, insertion position), for every k up to the number of codes.

    Args:
        bits: length of a code, a multiple of 8.

    Example:
        >>> index = HammingIndex(64)
        >>> index.add(codes)  # uint8 [N, 8], torch or numpy
        >>> distances, ids = index.search(queries, k=10)  # int32 and int64 [Q, 10]
    """

    def __init__(self, bits: int):
        if isinstance(bits, bool) or not isinstance(bits, int) or bits < 8 or bits % 8:
            raise InputError(f"HammingIndex: bits must be a positive multiple of 8, got {bits!r}")
        self.bits = bits
        self._codes = _GrowingRows(torch.empty((0, bits // 8), dtype=torch.uint8))
        self._ids: _GrowingRows | None = None
        self._saved: storage.Saved | None = None

    def __len__(self) -> int:
        return len(self._codes)

    def __repr__(self) -> str:
        return f"HammingIndex(bits={self.bits}, codes={len(self)})"

    @property
    def codes(self) -> Tensor:
        """The codes in insertion order, uint8 [N, bits / 8]: a view, not to be written to."""
        return self._codes.view()

    def add(self, codes: Array, ids: Array | None = None) -> None:
        """Append codes; either all of them are added with ids or none, and then a code's id is its position.

        Args:
            codes: uint8 [N, bits / 8], torch on any device or numpy; copied.
            ids: int64 [N], not negative, unique in the index.

        Raises:
            TypeError: a wrong dtype.
            InputError: a wrong shape, ids that are negative or taken, or ids for some codes only.
        """
        new_codes = self._checked_codes(codes, "codes")
        new_ids = None if ids is None else _checked_ids(ids, len(new_codes))
        if len(new_codes) == 0:
            return
        if len(self) and (new_ids is None) != (self._ids is None):
            has, came = ("positions", "ids") if self._ids is None else ("ids", "none")
            raise InputError(f"add: ids must come with all codes or with none; this index holds {has}, got {came}")
        if new_ids is not None:
            if self._ids is None:
                self._ids = _GrowingRows(torch.empty(0, dtype=torch.int64))
            taken = new_ids[torch.isin(new_ids, self._ids.view())]
            if len(taken):
                raise InputError(f"add: ids must be unique, got {int(taken[0])}, which the index holds already")
            self._ids.append(new_ids)
        self._codes.append(new_codes)

    def search(self, queries: Array, k: int) -> tuple[Array, Array]:
        """The k nearest codes of each query.

        Args:
            queries: uint8 [Q, bits / 8], torch or numpy.
            k: 1 to the number of codes.

        Returns:
            ``distances`` int32 [Q, k], ascending, and ``ids`` int64 [Q, k], in the queries' library, on their device.

        Raises:
            TypeError: a wrong dtype.
            InputError: a wrong shape, an empty index, or k out of range.
        """
        rows = self._checked_codes(queries, "queries")
        if len(self) == 0:
            raise InputError("search: the index is empty; add codes first")
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(self):
            raise InputError(f"search: k must be 1 to the number of codes ({len(self)}), got {k!r}")
        distances, ids = hamming_topk(rows, self.codes, k)
        if self._ids is not None:
            ids = self._ids.view()[ids]
        if isinstance(queries, np.ndarray):
            return distances.numpy(), ids.numpy()
        return distances.to(queries.device), ids.to(queries.device)

    def save(self, path: str | os.PathLike) -> None:
        """Write the index to a folder; into the folder it was last saved to or loaded from, only what is new.

        The folder holds the codes as they lie in memory, row after row in one file that is only ever appended to, and a
        manifest. Replacing the manifest is what commits: until then, and after any failure, the folder holds what it
        held before.
        """
        ids = None if self._ids is None else self._ids.view()
        self._saved = storage.save(Path(path), self.bits, self.codes, ids, self._saved)

    @classmethod
    def load(cls, path: str | os.PathLike) -> HammingIndex:
        """Read an index from the folder that :meth:`save` wrote.

        Raises:
            InputError: no index there, a version that this release does not know, or files that are damaged.
        """
        contents = storage.load(Path(path))
        index = cls(contents.bits)
        index._codes = _GrowingRows(contents.codes)
        index._ids = None if contents.ids is None else _GrowingRows(contents.ids)
        index._saved = contents.saved
        return index

    def _checked_codes(self, codes: Array, name: str) -> Tensor:
        """``codes`` as a tensor on the CPU."""
        if not isinstance(codes, (Tensor, np.ndarray)):
            raise TypeError(f"{name} must be a torch tensor or a numpy array of uint8, got {type(codes).__name__}")
        if codes.dtype not in (torch.uint8, np.uint8):
            raise TypeError(
                f"{name} must be packed codes of uint8, got {codes.dtype}; "
                "pack activations with hashengine.ops.pack_bits first"
            )
        if codes.ndim != 2 or codes.shape[1] != self.bits // 8:
            raise InputError(f"{name} must be [rows, {self.bits // 8}] for {self.bits} bits, got {list(codes.shape)}")
        return _as_tensor(codes)


def _as_tensor(array: Array) -> Tensor:
    if isinstance(array, np.ndarray):
        # torch takes neither negative strides nor read-only memory without complaint
        return torch.from_numpy(array if array.flags.writeable and array.flags.c_contiguous else array.copy())
    return array.detach().cpu()


def _checked_ids(ids: Array, count: int) -> Tensor:
    if not isinstance(ids, (Tensor, np.ndarray)) or ids.dtype not in (torch.int64, np.int64):
        raise TypeError(f"ids must be a torch tensor or a numpy array of int64, got {getattr(ids, 'dtype', type(ids))}")
    if tuple(ids.shape) != (count,):
        raise InputError(f"ids must be [{count}], one a code, got {list(ids.shape)}")
    tensor = _as_tensor(ids)
    if count and int(tensor.min()) < 0:
        raise InputError(f"ids must not be negative, got {int(tensor.min())}")
    values, counts = tensor.unique(return_counts=True)
    if len(values) != count:
        raise InputError(f"ids must be unique, got {int(values[counts > 1][0])} more than once")
    return tensor


class _GrowingRows:
    """Rows of a tensor with room to append; capacity doubles, so that adding N rows one by one copies O(N)."""

    def __init__(self, rows: Tensor):
        self._memory = rows
        self._count = len(rows)

    def __len__(self) -> int:
        return self._count

    def view(self) -> Tensor:
        return self._memory[: self._count]

    def append(self, rows: Tensor) -> None:
        needed = self._count + len(rows)
        if needed > len(self._memory):
            grown = self._memory.new_empty((max(needed, 2 * self._count), *self._memory.shape[1:]))
            grown[: self._count] = self.view()
            self._memory = grown
        self._memory[self._count : needed] = rows
        self._count = needed
