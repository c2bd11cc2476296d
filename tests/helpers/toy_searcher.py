"""A minimal `Searcher`, computed by definition. It has only the methods on which metrics and HammingKNN may rely."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.helpers.indexes import as_numpy


class ToySearcher:
    """Ids are positions, and answers are tensors."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.codes = np.zeros((0, bits // 8), np.uint8)

    def __len__(self) -> int:
        return len(self.codes)

    def add(self, codes: np.ndarray | torch.Tensor) -> None:
        self.codes = np.concatenate([self.codes, as_numpy(codes)])

    def _distances(self, queries: np.ndarray | torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.unpackbits(as_numpy(queries)[:, None] ^ self.codes, axis=-1).sum(-1, dtype=np.int32))

    def search(self, queries: np.ndarray | torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        distances, ids = self._distances(queries).sort(dim=1, stable=True)
        return distances[:, :k], ids[:, :k]

    def range_search(self, queries: np.ndarray | torch.Tensor, radius: int) -> tuple[torch.Tensor, ...]:
        distances, ids = self._distances(queries).sort(dim=1, stable=True)
        within = distances <= radius
        lims = torch.cat([torch.zeros(1, dtype=torch.int64), within.sum(1).cumsum(0)])
        return lims, distances[within], ids[within]

    def count(self, queries: np.ndarray | torch.Tensor, *, labels: tuple[Any, Any] | None = None) -> Any:
        distances = self._distances(queries)
        counts = torch.stack([torch.bincount(row, minlength=self.bits + 1) for row in distances])
        if labels is None:
            return counts
        query_labels, code_labels = map(torch.as_tensor, labels)
        if query_labels.dim() == 1:
            relevant = query_labels[:, None] == code_labels
        else:
            relevant = query_labels.float() @ code_labels.float().T > 0
        rows = zip(distances, relevant, strict=True)
        return counts, torch.stack([torch.bincount(row[chosen], minlength=self.bits + 1) for row, chosen in rows])
