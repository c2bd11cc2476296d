"""An index of images: codes to search, the images behind them, and the model that encodes a query."""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hashengine.errors import InputError
from hashengine.index import HammingIndex
from hashengine.models.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from hashengine.retrieval.codes import CodesFolder, fingerprint
from hashengine.retrieval.records import (
    Hit,
    IndexRecord,
    Item,
    QueryResult,
    SearchResults,
    new_folder,
    read_items,
    write_items,
)


@dataclass
class ImageIndex:
    """A `HammingIndex` whose id i is the image `items[i]`.

    The folder on disk is described in `hashengine.retrieval.records`.
    """

    folder: Path
    hamming: HammingIndex
    items: list[Item]
    record: IndexRecord

    @classmethod
    def build(cls, codes: CodesFolder, folder: str | os.PathLike) -> "ImageIndex":
        """Index `codes` and save to `folder`, with a copy of the model; an earlier index there is replaced.

        Raises:
            InputError: the model of `codes` has gone or changed, or `folder` exists and is something else.
        """
        if not codes.items:
            raise InputError("codes: expected at least one code, got none")
        model = codes.record.model
        if fingerprint(model) != codes.record.fingerprint:
            raise InputError(f"codes: expected the model that made them in {model!r}, got a changed one: encode again")
        start = time.perf_counter()
        with new_folder(Path(folder), "index.json", "output") as temporary:
            (temporary / "model").mkdir()
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                shutil.copyfile(Path(model, name), temporary / "model" / name)
            hamming = HammingIndex(codes.record.bits)
            hamming.add(codes.codes)
            hamming.save(temporary / "codes")
            write_items(temporary / "items.csv", codes.items)
            IndexRecord(
                bits=codes.record.bits,
                fingerprint=codes.record.fingerprint,
                sources=[codes.record],
                seconds=time.perf_counter() - start,
            ).write(temporary / "index.json")
        return cls.load(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "ImageIndex":
        """Open the index in `folder`.

        Raises:
            InputError: there is none, or it is damaged.
        """
        folder = Path(folder)
        if not (folder / "index.json").is_file():
            raise InputError(f"index: expected an index written by 'hashengine index', got {str(folder)!r}")
        record = IndexRecord.read(folder / "index.json", "index", "hashengine index")
        hamming = HammingIndex.load(folder / "codes")
        items = read_items(folder / "items.csv", "index")
        if len(items) < len(hamming):
            raise InputError(
                f"index: expected {len(hamming)} images in {str(folder / 'items.csv')!r}, got {len(items)}"
            )
        # An append that was cut short leaves rows without codes: the codes say what is in the index.
        return cls(folder, hamming, items[: len(hamming)], record)

    def append(self, codes: CodesFolder) -> None:
        """Add `codes` behind those in the index, and save.

        Raises:
            InputError: they come from another model or have other bits.
        """
        self.check(codes, "codes")
        start = time.perf_counter()
        first = len(self.hamming)
        self.items += [Item(first + item.id, item.path, item.label) for item in codes.items]
        self.hamming.add(codes.codes)
        write_items(self.folder / "items.csv", self.items)
        self.hamming.save(self.folder / "codes")
        self.record.sources.append(codes.record)
        self.record.seconds += time.perf_counter() - start
        self.record.write(self.folder / "index.json")

    def check(self, codes: CodesFolder, argument: str) -> None:
        """Refuse, with an InputError that names `argument`, codes that cannot be compared with those in the index."""
        if codes.record.bits != self.record.bits:
            raise InputError(
                f"{argument}: expected codes of {self.record.bits} bits like the index, got {codes.record.bits} bits"
            )
        if codes.record.fingerprint != self.record.fingerprint:
            raise InputError(
                f"{argument}: expected codes of the index's model ({self.folder / 'model'}), got codes of "
                f"another one ({codes.record.model}): distances between them mean nothing"
            )

    def search(self, queries: CodesFolder, k: int) -> SearchResults:
        """The `k` nearest images of each query.

        Raises:
            InputError: `k` is below 1 or above the number of images, or the queries come from another model.
        """
        self.check(queries, "query")
        if not 1 <= k <= len(self.items):
            raise InputError(f"k: expected 1 to {len(self.items)}, the number of images in the index, got {k}")
        start = time.perf_counter()
        distances, ids = self.hamming.search(queries.codes, k)
        seconds = time.perf_counter() - start
        return SearchResults(
            index=str(self.folder.absolute()),
            database=len(self.items),
            bits=self.record.bits,
            k=k,
            seconds=seconds,
            queries_per_second=len(queries.items) / seconds,
            encode=queries.record,
            queries=[
                QueryResult(path=query.path, label=query.label, hits=self._hits(row_distances, row_ids))
                for query, row_distances, row_ids in zip(queries.items, distances, ids, strict=True)
            ],
        )

    def _hits(self, distances: np.ndarray, ids: np.ndarray) -> list[Hit]:
        found = zip(distances.tolist(), ids.tolist(), strict=True)
        return [
            Hit(rank=rank, id=id, distance=distance, path=self.items[id].path, label=self.items[id].label)
            for rank, (distance, id) in enumerate(found, start=1)
        ]
