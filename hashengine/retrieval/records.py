"""The files that pass from one command to the next: what each holds, and how it is read and written.

=================  ==========  ====================================================================
file               written by  holds
=================  ==========  ====================================================================
CODES/codes.npy    encode      uint8 [N, bits/8], most significant bit first
CODES/items.csv    encode      an `Item` for each row of codes.npy
CODES/encode.json  encode      `EncodeRecord`
INDEX/codes/       index       a saved `hashengine.HammingIndex`; its ids are the rows of items.csv
INDEX/items.csv    index       an `Item` for each code
INDEX/index.json   index       `IndexRecord`
INDEX/model/       index       a copy of the model, so that the index can be moved on its own
results.json       search      `SearchResults`
evaluation.json    evaluate    `Evaluation`
report.json        report      `hashengine.retrieval.report.Report`
=================  ==========  ====================================================================

A file or folder is written beside its place and renamed into it, so that a failure leaves the old one whole.
"""

import csv
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ValidationError
from typing_extensions import Self

from hashengine.errors import InputError, input_error


class Item(NamedTuple):
    """One image: its row, its absolute path, and the name of its class folder ("" where it has none)."""

    id: int
    path: str
    label: str


class Record(BaseModel):
    """A JSON file with a fixed shape."""

    def write(self, path: Path) -> None:
        """Write to `path`, whole or not at all."""
        with replacing(path) as temporary:
            temporary.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path, argument: str, written_by: str) -> Self:
        """Read from `path`.

        Raises:
            InputError: the file is missing, or is not one that `written_by` writes; it names `argument`.
        """
        expected = f"{argument}: expected a file written by '{written_by}', got {path}"
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise InputError(f"{expected}, which does not exist") from None
        except IsADirectoryError:
            raise InputError(f"{expected}, which is a folder") from None
        except ValidationError as error:
            raise input_error(error, expected) from None


class Unreadable(BaseModel):
    """An image that was skipped, and why."""

    path: str
    reason: str


class EncodeRecord(Record):
    """How a folder of images became codes. `seconds` covers reading, decoding, the network and the packing."""

    bits: int
    bit_order: Literal["msb_first"] = "msb_first"
    count: int
    source: str
    model: str
    fingerprint: str
    """SHA-256 of the model's files: codes compare only where this is the same."""
    device: str
    seconds: float
    errors: list[Unreadable] = []


class IndexRecord(Record):
    """What an index was built from. `seconds` covers adding and saving, of all the builds so far."""

    bits: int
    fingerprint: str
    sources: list[EncodeRecord]
    seconds: float


class Hit(BaseModel):
    """A neighbour: `rank` counts from 1, `distance` is the number of differing bits, `id` the row of items.csv."""

    rank: int
    id: int
    distance: int
    path: str
    label: str


class QueryResult(BaseModel):
    """A query image and its nearest images, nearest first; equal distances in the order of their ids."""

    path: str
    label: str
    hits: list[Hit]


class SearchResults(Record):
    """What a search found. `seconds` is the search among the codes alone; `encode` tells of the queries' encoding."""

    index: str
    database: int
    bits: int
    k: int
    seconds: float
    queries_per_second: float
    encode: EncodeRecord
    queries: list[QueryResult]


class Band(BaseModel):
    """A measure whose value depends on the order among equal distances: its mean over all orders, worst and best."""

    expected: float
    minimum: float
    maximum: float


class Curve(BaseModel):
    """Precision and recall where everything within `radius` differing bits is retrieved, averaged over queries.

    `empty` is the share of queries with nothing within the radius; their precision counts as 0.
    """

    radius: list[int]
    precision: list[float]
    recall: list[float]
    empty: list[float]


class Evaluation(Record):
    """How well the ranking agrees with the labels; `at` is the depth of the mAP, null for the whole ranking."""

    index: str
    bits: int
    database: int
    queries: int
    classes: int
    at: int | None
    mean_average_precision: Band
    precision_at: dict[int, Band]
    recall_at: dict[int, Band]
    radius: int
    precision_within_radius: float
    precision_recall_curve: Curve
    seconds: float


def write_items(path: Path, items: Iterable[Item]) -> None:
    """Write `items` as CSV with the columns id, path, label."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Item._fields)
        writer.writerows(items)


def read_items(path: Path, argument: str) -> list[Item]:
    """Read what `write_items` wrote.

    Raises:
        InputError: the file is missing, or its ids are not 0, 1, 2, ...; it names `argument`.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            items = [Item(int(row[0]), row[1], row[2]) for row in rows]
    except FileNotFoundError:
        raise InputError(f"{argument}: expected {path}, which does not exist") from None
    except (ValueError, IndexError, csv.Error) as error:
        raise InputError(f"{argument}: expected rows of id,path,label in {path}, got {error}") from None
    if tuple(header) != Item._fields or any(item.id != row for row, item in enumerate(items)):
        raise InputError(f"{argument}: expected the columns id,path,label and ids counting from 0 in {path}")
    return items


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` for a file, renamed to it when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, marker: str, argument: str) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed to it when the block ends well.

    Args:
        marker: a file whose presence in an existing `path` says that it is an earlier output, to be replaced.

    Raises:
        InputError: `path` holds something else, which is left alone; it names `argument`.
    """
    path = path.resolve()
    is_output = (path / marker).is_file()
    if path.exists() and not is_output and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{argument}: expected a new folder or an earlier output with {marker} in it, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{uuid.uuid4().hex}") for _ in range(2))
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
