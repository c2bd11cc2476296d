"""The codes of the GPU benchmarks, on the device, and the objects that all searches of these codes share."""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.search.cases import Case
from benchmarks.search.data import Data, make_codes
from benchmarks.search.oracle import Oracle, make_oracle
from benchmarks.search.torch_search import ProductSearch
from hashengine import HammingIndex
from tests.helpers.faiss_oracle import FaissGpu, make_faiss_gpu

_QUERIES = 10_000  # the largest number of queries of a case in the suite
_CLASSES = 10


class Database:
    """Codes and queries on a device. Indexes and copies of the codes are made on first use.

    Args:
        case: describes the codes; there are at least as many queries as the case has.
        device: the device of the codes and queries.
        images: the folder of the image archives; only learned codes that are not cached need it.
    """

    def __init__(self, case: Case, device: torch.device, images: Path | None = None):
        self.device, self.bits, self._data = device, case.bits, case.data
        queries = max(_QUERIES, case.queries)
        if case.data is Data.random:  # drawn on the device, because drawing on the CPU takes long
            generator = torch.Generator(device).manual_seed(1)

            def draw(count: int) -> Tensor:
                shape = (count, case.bits // 8)
                return torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)

            self.codes, self.queries = draw(case.codes), draw(queries)
        else:
            made = make_codes(case.data, case.codes, queries, case.bits, images)
            self.codes, self.queries = (torch.from_numpy(rows).to(device) for rows in (made.database, made.queries))

    def holds(self, case: Case) -> bool:
        """Whether the codes are those of `case` and the queries are enough for it."""
        same_codes = (len(self.codes), self.bits, self._data) == (case.codes, case.bits, case.data)
        return same_codes and case.queries <= len(self.queries)

    @cached_property
    def host_codes(self) -> np.ndarray:
        """The codes in host memory."""
        return self.codes.cpu().numpy()

    @cached_property
    def index(self) -> HammingIndex:
        """A HammingIndex on the device."""
        index = HammingIndex(self.bits, self.device)
        index.add(self.codes)
        return index

    @cached_property
    def faiss(self) -> FaissGpu | None:
        """FAISS's index on the device; None on the CPU, without FAISS, or if FAISS has no GPU support."""
        return make_faiss_gpu(self.host_codes, self.device)

    @cached_property
    def product(self) -> ProductSearch:
        """The search by matrix products."""
        return ProductSearch(self.codes)

    @cached_property
    def labels(self) -> tuple[Tensor, Tensor]:
        """Random labels: those of the queries, those of the codes."""
        generator = torch.Generator(self.device).manual_seed(2)
        return tuple(
            torch.randint(0, _CLASSES, (len(rows),), device=self.device, generator=generator)
            for rows in (self.queries, self.codes)
        )

    @cached_property
    def oracle(self) -> Oracle:
        """The oracle for searches without a filter."""
        return make_oracle(self.host_codes, None)
