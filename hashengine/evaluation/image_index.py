"""An index of images: their codes, paths and labels, and a copy of the model, which encodes queries."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hashengine import _progress
from hashengine._defaults import INDEX_MARKER, NEIGHBOURS
from hashengine._files import check_writable, locked, read_unchanged, replace_folder
from hashengine._text import counted
from hashengine._validation import check_integer, check_path
from hashengine.errors import InputError, invalid
from hashengine.evaluation.encode import CodesFolder, check_codes_folder, codes_digest
from hashengine.evaluation.records import (
    Hit,
    IndexRecord,
    Item,
    QueryResult,
    SearchResults,
    check_items,
    read_items,
    write_items,
)
from hashengine.index import HammingIndex, Searcher
from hashengine.index.folder import MANIFEST, open_folder
from hashengine.models.checkpoint import CONFIG_FILE, WEIGHTS_FILE, fingerprint


@dataclass
class ImageIndex:
    """The codes of images. The code with id i is that of the image `items[i]`.

    Attributes:
        folder: the index on disk; `hashengine.evaluation.records` describes it.
        hamming: the index of the codes.
        items: the images.
        record: what the index was built from.
    """

    folder: Path
    hamming: Searcher
    items: list[Item]
    record: IndexRecord

    @classmethod
    def build(
        cls, codes: CodesFolder, folder: str | os.PathLike[str], model: str | os.PathLike[str] | None = None
    ) -> ImageIndex:
        """Build an index of `codes` in `folder`, with a copy of the model; an earlier index there is replaced.

        Args:
            codes: the codes.
            folder: the folder of the index.
            model: the folder of the model, if it is no longer where `encode_folder` found it.

        Raises:
            InputError: `codes` is empty or inconsistent, its model is missing or has changed, or `folder` has contents
                other than an index.
        """
        folder = check_path("index", "output", folder)
        _check_some("index", codes, "codes")
        if model is None:
            model = codes.record.model
            if not Path(model, WEIGHTS_FILE).is_file():
                expected = f"where 'encode' found it, in {model!r}"
                raise invalid("index", "the model of the codes", expected, "no model there", "pass --model MODEL")
            if fingerprint(model, "index") != codes.record.fingerprint:
                expected = f"codes of the model in {model!r}"
                raise invalid("index", "codes", expected, "codes of an earlier version of it", "encode again")
        else:
            check_model(model, codes.record.fingerprint)
        start = time.perf_counter()
        earlier = _locked(folder) if (folder / "index.json").is_file() else nullcontext()
        with earlier, replace_folder(folder, marker=INDEX_MARKER, where="index") as temporary:
            (temporary / "model").mkdir()
            _copy_model(Path(model), temporary / "model")
            if fingerprint(temporary / "model", "index") != codes.record.fingerprint:
                actual = f"another one in {os.fspath(model)!r}, which was saved during this command"
                raise invalid("index", "the model of the codes", "the one that made them", actual, "encode again")
            hamming = HammingIndex(codes.record.bits)
            hamming.add(codes.codes)
            hamming.save(temporary / "codes")
            write_items(temporary / "items.csv", codes.items)
            IndexRecord(
                bits=codes.record.bits,
                fingerprint=codes.record.fingerprint,
                sources=[codes.described()],
                seconds=time.perf_counter() - start,
            ).write(temporary / "index.json")
        return cls.load(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], where: str = "ImageIndex.load") -> ImageIndex:
        """Open the index in `folder`. A build or an append at the same time is not mixed with the earlier index.

        Raises:
            InputError: there is no index (the error then names `where`), or it is damaged.
        """
        path = check_path(where, "index", folder)
        # A build replaces both files, and an append first index.json and then the manifest.
        return read_unchanged([path / "index.json", path / "codes" / MANIFEST], lambda: cls._read(path, where))

    @classmethod
    def _read(cls, folder: Path, where: str, mmap: bool = False) -> ImageIndex:
        _check_is_index(folder, where)
        record = IndexRecord.read(folder / "index.json", where, "index", "hashengine index")
        hamming = HammingIndex.load(folder / "codes", mmap=mmap)
        if record.bits != hamming.bits:
            expected = f"a folder with codes of {record.bits} bits, as {str(folder / 'index.json')!r} says"
            raise invalid(where, "index", expected, f"codes of {hamming.bits} bits", "build it again")
        if open_folder(folder / "codes").rows != len(hamming):  # some were removed
            raise _other_codes(folder, where)
        items = read_items(folder / "items.csv", where, "index")
        if len(items) < len(hamming):
            expected = f"a folder with {len(hamming)} images in {str(folder / 'items.csv')!r}"
            raise invalid(where, "index", expected, len(items))
        record.drop_unsaved(len(hamming))
        counted = sum(source.count for source in record.sources)
        if counted != len(hamming):
            expected = f"a folder whose index.json describes {len(hamming)} codes"
            raise invalid(where, "index", expected, counted, "build it again")
        check_items(items, record.sources, folder / "items.csv", where, "index")
        if not mmap:  # a mapped index is read to append to it, after it was loaded
            _check_codes(hamming, record, folder, where)
        return cls(folder, hamming, items[: len(hamming)], record)  # an interrupted append leaves further items

    @classmethod
    def append_to(cls, folder: str | os.PathLike[str], codes: CodesFolder) -> ImageIndex:
        """Load the index in `folder`, append `codes` and return it. No other append can come in between.

        Images that the index holds are not added again, as `append` describes. Therefore an interrupted command can be
        run again, and the codes of a folder that grew can be appended.

        Raises:
            InputError: for the reasons of `load` and `append`.
        """
        folder = check_path("index", "index", folder)
        _check_is_index(folder, "index")  # otherwise the lock would be created in another folder
        check_writable("index", "index", folder, (folder,))
        with _locked(folder):
            index = cls.load(folder, "index")
            index.check("index", codes, "codes")
            index._append(codes)
        return index

    def append(self, codes: CodesFolder) -> None:
        """Add `codes` after those in the index, and save. Appends from several processes or threads take turns.

        An image whose path and code the index holds is skipped. One whose path it holds with another code is refused.

        An index that another process or thread changed or built again after it was loaded is refused. After a failure,
        the old index is in memory, and the old or the new index is on disk.

        Raises:
            InputError: for the reasons of `check`, the folder no longer holds this index, or an image has changed.
        """
        self.check("index", codes, "codes")
        _check_is_index(self.folder, "index")  # otherwise the lock cannot be created
        check_writable("index", "index", self.folder, (self.folder,))
        with _locked(self.folder):
            self._append(codes)

    def _append(self, codes: CodesFolder) -> None:
        start = time.perf_counter()
        first = len(self.hamming)
        stored = self._read(self.folder, "index", mmap=True)
        if (stored.record.identity, stored.items) != (self.record.identity, self.items):
            expected = f"a folder with the {first} images that were loaded from it"
            actual = f"{len(stored.items)} images in {str(self.folder)!r}"
            if len(stored.items) == first:
                actual = f"other images or codes in {str(self.folder)!r}"
            raise invalid("index", "index", expected, actual, "load it again")
        hamming = HammingIndex.load(self.folder / "codes", mmap=True)
        given = len(codes.items)
        codes = self._new_codes(hamming, codes)
        added = len(codes.items)
        if added < given:
            there = f"{given - added} {'was' if given - added == 1 else 'were'} there already"
            _progress.note(f"{counted(added, 'image')} added, {there}: {self.folder}")
        if not added:
            return
        hamming.add(codes.codes)
        self._check_writable()
        items = [*self.items, *(Item(first + item.id, item.path, item.label) for item in codes.items)]
        write_items(self.folder / "items.csv", items)
        sources = [*self.record.sources, codes.described()]
        seconds = self.record.seconds + time.perf_counter() - start
        record = self.record.model_copy(update={"sources": sources, "seconds": seconds})
        record.write(self.folder / "index.json")
        hamming.save(self.folder / "codes")  # last, because `load` ignores items and sources without codes
        self.hamming, self.items, self.record = hamming, items, record

    def _check_writable(self) -> None:
        """Check, before the first write, that an append can write all of its files."""
        stored = open_folder(self.folder / "codes")
        lock = stored.path / "lock"  # a lock that can be read need not be writable
        locks = [lock] if lock.exists() and not os.access(lock, os.R_OK) else []
        check_writable("index", "index", self.folder, (self.folder, stored.path, *stored.files(), *locks))

    def _new_codes(self, hamming: HammingIndex, codes: CodesFolder) -> CodesFolder:
        """Those of `codes` whose images are not in the index, numbered from 0.

        Raises:
            InputError: the index holds an image with another code.
        """
        given = {item.path for item in codes.items}
        ids = [item.id for item in self.items if item.path in given]
        held: dict[str, set[bytes]] = {}
        for id, code in zip(ids, np.asarray(hamming.reconstruct(np.array(ids, np.int64))), strict=True):
            held.setdefault(self.items[id].path, set()).add(code.tobytes())
        rows = [row for row, item in enumerate(codes.items) if item.path not in held]
        for item, code in zip(codes.items, np.asarray(codes.codes), strict=True):
            if code.tobytes() not in held.get(item.path, {code.tobytes()}):
                expected = "codes of images that are new, or unchanged since they were indexed"
                actual = f"another code of {item.path!r}"
                raise invalid("index", "codes", expected, actual, "build the index again without --append")
        items = [codes.items[row]._replace(id=new) for new, row in enumerate(rows)]
        return CodesFolder(codes.codes[rows], items, codes.record)

    def check(self, where: str, codes: CodesFolder, argument: str) -> None:
        """Refuse codes that cannot be compared with those in the index.

        Raises:
            InputError: there are none, their parts do not belong together, or they have another number of bits or
                another model; the error names `where` and `argument`. Or `items` or `hamming` of the index were changed
                without the other.
        """
        if len(self.items) != len(self.hamming):
            expected = f"one with an item for each of its {len(self.hamming)} codes"
            raise invalid(where, "the index", expected, f"{len(self.items)} items", "load it again")
        _check_some(where, codes, argument)
        if codes.record.bits != self.record.bits:
            raise invalid(
                where,
                argument,
                f"codes of {self.record.bits} bits, like those of the index",
                f"{codes.record.bits} bits",
            )
        if codes.record.fingerprint != self.record.fingerprint:
            expected = f"codes of the index's model, {str(self.folder / 'model')!r}"
            actual = f"codes of another one, {codes.record.model!r}"
            raise invalid(where, argument, expected, actual, "distances between them mean nothing")

    def search(self, queries: CodesFolder, k: int | None = None) -> SearchResults:
        """The `k` nearest images of each query; by default 10, or all images if there are fewer.

        Raises:
            InputError: `k` is below 1 or above the number of images, or for the reasons of `check`.
        """
        self.check("search", queries, "query")
        k = self.neighbours(k)
        start = time.perf_counter()
        distances, ids = self.hamming.search(queries.codes, k)
        seconds = time.perf_counter() - start
        return SearchResults(
            index=str(self.folder.absolute()),
            identity=self.record.identity,
            database=len(self.items),
            bits=self.record.bits,
            k=k,
            seconds=seconds,
            queries_per_second=len(queries.items) / seconds,
            encode=queries.described(),
            queries=[
                QueryResult(path=query.path, label=query.label, hits=self._hits(row_distances, row_ids))
                for query, row_distances, row_ids in zip(queries.items, distances, ids, strict=True)
            ],
        )

    def neighbours(self, k: int | None) -> int:
        """The number of neighbours of a search: `k`, or by default 10, or all images if there are fewer.

        Raises:
            InputError: `k` is below 1 or above the number of images.
        """
        k = min(NEIGHBOURS, len(self.items)) if k is None else k
        return check_integer("search", "k", k, 1, len(self.items), "the number of images in the index")

    def _hits(self, distances: np.ndarray, ids: np.ndarray) -> list[Hit]:
        found = zip(distances.tolist(), ids.tolist(), strict=True)
        return [
            Hit(rank=rank, id=id, distance=distance, path=self.items[id].path, label=self.items[id].label)
            for rank, (distance, id) in enumerate(found, start=1)
        ]


def check_model(model: str | os.PathLike[str], expected: str) -> None:
    """Require that `model` is the folder of a model whose fingerprint is `expected`.

    Raises:
        InputError: it is another model or none.
    """
    if fingerprint(model, "index") != expected:
        raise invalid("index", "model", "the one that made the codes", f"another one in {os.fspath(model)!r}")


def _check_some(where: str, codes: CodesFolder, argument: str) -> None:
    check_codes_folder(where, argument, codes)
    if not codes.items:
        raise invalid(where, argument, "at least one code", "none")


def _copy_model(model: Path, target: Path) -> None:
    def copy() -> None:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(model / name, target / name)

    read_unchanged([model / CONFIG_FILE, model / WEIGHTS_FILE], copy)


def _check_codes(hamming: HammingIndex, record: IndexRecord, folder: Path, where: str) -> None:
    """Require that the codes of an index are those that its record describes, with the rows of items.csv as ids."""
    codes, ids = np.asarray(hamming.codes), np.asarray(hamming.ids)
    is_same, first = np.array_equal(ids, np.arange(len(codes))), 0
    for source in record.sources:
        is_same &= source.codes_sha256 in ("", codes_digest(codes[first : first + source.count]))
        first += source.count
    if not is_same:
        raise _other_codes(folder, where)


def _other_codes(folder: Path, where: str) -> InputError:
    expected = f"a folder whose {str(folder / 'codes')!r} has the codes that index.json describes"
    return invalid(where, "index", expected, "others, which were changed without the images", "build it again")


def _check_is_index(folder: Path, where: str) -> None:
    if not (folder / "index.json").is_file():
        raise invalid(where, "index", "a folder written by 'hashengine index'", repr(str(folder)))


def _locked(folder: Path) -> AbstractContextManager[None]:
    """Hold the lock that every change of the index in `folder` needs."""
    return locked(folder, lambda: _progress.note(f"waiting for another command that changes the index {folder}"))
