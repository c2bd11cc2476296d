"""What a search on a device is measured on: its case, the codes that lie there, and the oracle on the host."""

from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import gpu_peers
from benchmarks.codes import Data, make_codes
from benchmarks.systems import Oracle, Task
from hashengine import HammingIndex

MOST_QUERIES = 10_000  # drawn for whichever of the cases that share the codes


class Case(NamedTuple):
    codes: int
    bits: int
    queries: int
    k: int | None
    task: Task = Task.search
    data: Data = Data.random
    share: float = 1.0  # that the filter lets through

    def __str__(self) -> str:
        what = f"{self.task.value} of {self.codes:,} x {self.bits} bits, {self.queries:,} queries"
        what += "" if self.k is None else f", k = {self.k:,}"
        what += "" if self.task is not Task.filter else f", filter {self.share:.0%}"
        return what + ("" if self.data is Data.random else f", {self.data.value} data")


class Database:
    """Codes and queries on the device, and what is made of them once for all searches of them."""

    def __init__(self, case: Case, device: torch.device, images: Path | None = None):
        self.device, self.bits, self._data = device, case.bits, case.data
        queries = max(MOST_QUERIES, case.queries)
        if case.data is Data.random:  # drawn where they are used: the largest would take minutes on the way
            generator = torch.Generator(device).manual_seed(1)

            def draw(count: int) -> Tensor:
                shape = (count, case.bits // 8)
                return torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)

            self.codes, self.queries = draw(case.codes), draw(queries)
        else:
            made = make_codes(case.data, case.codes, queries, case.bits, images)
            self.codes, self.queries = (torch.from_numpy(part).to(device) for part in made[:2])

    def serves(self, case: Case) -> bool:
        same = (len(self.codes), self.bits, self._data) == (case.codes, case.bits, case.data)
        return same and case.queries <= len(self.queries)

    @cached_property
    def host(self) -> np.ndarray:
        return self.codes.cpu().numpy()

    @cached_property
    def index(self) -> HammingIndex:
        index = HammingIndex(self.bits, self.device)
        index.add(self.codes)
        return index

    @cached_property
    def faiss(self) -> gpu_peers.FaissGpu | None:
        return gpu_peers.add_to_faiss(self.host, self.device)

    @cached_property
    def product(self) -> gpu_peers.Product:
        return gpu_peers.Product(self.codes)

    @cached_property
    def labels(self) -> tuple[Tensor, Tensor]:
        """Of queries and codes, at random."""
        generator = torch.Generator(self.device).manual_seed(2)
        return tuple(
            torch.randint(0, 10, (len(codes),), device=self.device, generator=generator)
            for codes in (self.queries, self.codes)
        )

    @cached_property
    def oracle(self) -> "Oracle | _OwnOracle":
        return make_oracle(self.host, None)


class _OwnOracle:
    """This library's kernels of the CPU, where FAISS is not installed."""

    name = "hashengine on the CPU"

    def __init__(self, codes: np.ndarray, mask: np.ndarray | None):
        self._index, self._mask = HammingIndex(8 * codes.shape[1]), mask
        self._index.add(codes)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, ...]:
        return self._index.search(queries, k, filter=self._mask)

    def range_search(self, queries: np.ndarray, radius: int) -> tuple[np.ndarray, ...]:
        return self._index.range_search(queries, radius)


def make_oracle(codes: np.ndarray, mask: np.ndarray | None) -> Oracle | _OwnOracle:
    return (_OwnOracle if gpu_peers.faiss_version() is None else Oracle)(codes, mask)
