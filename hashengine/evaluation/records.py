"""The files that one command writes and another one reads: their contents, readers and writers.

=================  ==========  ====================================================================
file               written by  contents
=================  ==========  ====================================================================
CODES/codes.npy    encode      uint8 [N, bits/8], most significant bit first
CODES/items.csv    encode      an `Item` for each row of codes.npy
CODES/encode.json  encode      `EncodeRecord`
INDEX/codes/       index       a saved `hashengine.HammingIndex`; its ids are the rows of items.csv
INDEX/items.csv    index       an `Item` for each code
INDEX/index.json   index       `IndexRecord`
INDEX/lock         index       nothing; a command that changes the index locks it
INDEX/model/       index       a copy of the model, so that the index can be moved on its own
results.json       search      `SearchResults`
evaluation.json    evaluate    `Evaluation`
report.json        report      `hashengine.evaluation.report.Report`
=================  ==========  ====================================================================

Each file or folder is replaced atomically; therefore a failure leaves the previous one intact. An append to an index
replaces items.csv and index.json, and then saves codes/. Until that save is complete, the old index is what is loaded.
Only one append at a time can change an index.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from typing_extensions import Self

from hashengine._files import make_parent, read_file, write_file
from hashengine._text import counted, to_json
from hashengine.errors import InputError, brief, input_error, invalid


class Item(NamedTuple):
    """One image: its row, its absolute path, and the name of its class folder ("" if it has none)."""

    id: int
    path: str
    label: str


class Part(BaseModel):
    """Fixed fields, whose numbers are finite."""

    model_config = ConfigDict(allow_inf_nan=False)


class Record(Part):
    """A JSON file with fixed fields."""

    def write(self, path: Path) -> None:
        """Replace `path` atomically; its folder is created if it does not exist."""
        make_parent(path)
        write_file(path, to_json(self, indent=2) + "\n")

    @classmethod
    def read(cls, path: Path, where: str, argument: str, written_by: str) -> Self:
        """Read from `path`.

        Args:
            path: the file.
            where: the function or command to name in an error.
            argument: the argument of that function or command to name in an error.
            written_by: the command that writes such files.

        Raises:
            InputError: the file is missing, or is not one that `written_by` writes.
        """
        expected = f"a file written by '{written_by}'"
        try:
            # pydantic's parser refuses lone surrogates.
            return cls.model_validate(json.loads(path.read_bytes(), parse_int=_to_integer))
        except FileNotFoundError:
            raise invalid(where, argument, expected, f"{str(path)!r}, which does not exist") from None
        except IsADirectoryError:
            raise invalid(where, argument, expected, f"{str(path)!r}, which is a folder") from None
        except ValidationError as error:
            found = input_error(error, str(path))
            raise invalid(where, argument, expected, f"another one ({found})") from None
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
            raise invalid(where, argument, expected, f"{str(path)!r}, which is no JSON ({error})") from None


def _to_integer(digits: str) -> int:
    """An integer of a JSON file; without this limit, arithmetic with one of hundreds of digits overflows."""
    if len(digits) > 18:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


class Unreadable(Part):
    """An image, another file or a folder that was skipped because it cannot be read, with the reason."""

    path: str
    reason: str


class EncodeRecord(Record):
    """How a folder of images became codes.

    Attributes:
        fingerprint: SHA-256 of the model's weights; only codes with the same one are comparable.
        codes_sha256: SHA-256 of the codes; "" in files of older versions.
        items_sha256: SHA-256 of the paths and labels of the images; "" in files of older versions.
        seconds: the time to read and decode the images, run the network and pack the codes.
        errors: what could not be read.
        no_images: the paths of files that are no images, and of links to folders.
    """

    bits: int
    bit_order: Literal["msb_first"] = "msb_first"
    count: NonNegativeInt
    source: str
    model: str
    fingerprint: str
    codes_sha256: str = ""
    items_sha256: str = ""
    device: str
    seconds: PositiveFloat
    errors: list[Unreadable] = []
    no_images: list[str] = []

    def summary(self) -> str:
        """The counts and the rate in one line."""
        skipped = f", {len(self.errors)} skipped" if self.errors else ""
        rate = f"{self.count / self.seconds:.0f} per second"
        return f"{counted(self.count, 'image')}{skipped} to {self.bits}-bit codes in {self.seconds:.2f} s ({rate})"


class IndexRecord(Record):
    """What an index was built from.

    Attributes:
        seconds: the time of building the index and of all appends. It does not include saving codes/ in an append.
    """

    bits: int
    fingerprint: str
    sources: list[EncodeRecord]
    seconds: NonNegativeFloat

    def drop_unsaved(self, codes: int) -> None:
        """Remove the sources beyond `codes`, the number of saved codes: an interrupted append leaves such a source."""
        while self.sources and sum(source.count for source in self.sources) > codes:
            self.sources.pop()

    @property
    def identity(self) -> str:
        """SHA-256 of the codes, their images and their model; it stays when the index is moved or made again."""
        parts = [
            [source.source, source.count, source.fingerprint, source.codes_sha256]
            + ([source.items_sha256] if source.items_sha256 else [])
            for source in self.sources
        ]
        return hashlib.sha256(to_json(parts).encode()).hexdigest()


class Hit(Part):
    """A neighbour: `rank` counts from 1, `distance` is the number of differing bits, `id` is the row in items.csv."""

    rank: PositiveInt
    id: NonNegativeInt
    distance: NonNegativeInt
    path: str
    label: str


class QueryResult(Part):
    """A query image and its nearest images, ordered by distance, then by id."""

    path: str
    label: str
    hits: list[Hit]


class SearchResults(Record):
    """The results of a search.

    Attributes:
        identity: the identity of the index; "" in files of older versions.
        seconds: the time of the search alone, without encoding the queries.
        encode: how the queries were encoded.
    """

    index: str
    identity: str = ""
    database: PositiveInt
    bits: PositiveInt
    k: PositiveInt
    seconds: NonNegativeFloat
    queries_per_second: NonNegativeFloat
    encode: EncodeRecord
    queries: Annotated[list[QueryResult], Field(min_length=1)]

    def summary(self) -> str:
        """The counts and the rate in one line."""
        count = f"{len(self.queries):,} {'query' if len(self.queries) == 1 else 'queries'}"
        rate = f"{self.queries_per_second:,.0f} per second"
        time = f"{1000 * self.seconds:.2f} ms ({rate})"
        return f"{count} among {self.database:,} codes of {self.bits} bits, k = {self.k}, in {time}"


Share = Annotated[float, Field(ge=-1e-6, le=1 + 1e-6)]  # a measure from 0 to 1, with room for rounding


class Band(Part):
    """A measure that depends on the order of images at equal distances: its mean over all orders, and its range."""

    expected: Share
    minimum: Share
    maximum: Share


class Curve(Part):
    """Precision and recall of retrieving all items within a radius, for each radius, averaged over the queries.

    `empty` is the share of queries with no item within the radius; their precision counts as 0.
    """

    radius: Annotated[list[NonNegativeInt], Field(min_length=1)]
    precision: list[Share]
    recall: list[Share]
    empty: list[Share]

    @model_validator(mode="after")
    def _has_equal_lengths(self) -> Self:
        if len({len(values) for values in (self.radius, self.precision, self.recall, self.empty)}) > 1:
            raise ValueError("must be lists of one length")
        return self


class Evaluation(Record):
    """How well the ranking agrees with the labels.

    Attributes:
        identity: the identity of the index; "" in files of older versions.
        source: the folder of the query images; "" in files of older versions.
        codes_sha256: SHA-256 of the codes of the queries; "" in files of older versions.
        labels_sha256: SHA-256 of the labels of the queries; "" in files of older versions.
        at: the number of ranked images that the mAP covers; None: all.
        without_relevant: the number of queries whose class no image of the index has; their figures count as 0. None in
            files of older versions.
    """

    index: str
    identity: str = ""
    bits: PositiveInt
    database: PositiveInt
    queries: PositiveInt
    source: str = ""
    codes_sha256: str = ""
    labels_sha256: str = ""
    without_relevant: NonNegativeInt | None = None
    classes: PositiveInt
    at: PositiveInt | None
    mean_average_precision: Band
    precision_at: dict[int, Band]
    recall_at: dict[int, Band]
    radius: NonNegativeInt
    precision_within_radius: Share
    precision_recall_curve: Curve
    seconds: NonNegativeFloat

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """The main figures as a table: its header and its rows, as text."""
        bands = [("mAP" if self.at is None else f"mAP@{self.at}", self.mean_average_precision)]
        bands += [(f"precision@{k}", band) for k, band in self.precision_at.items()]
        bands += [(f"recall@{k}", band) for k, band in self.recall_at.items()]
        rows = [[name, *(f"{x:.4f}" for x in (band.expected, band.minimum, band.maximum))] for name, band in bands]
        rows.append([f"precision within radius {self.radius}", f"{self.precision_within_radius:.4f}", "", ""])
        return ["measure", "expected", "minimum", "maximum"], rows


def write_items(path: Path, items: Iterable[Item]) -> None:
    """Write `items` as CSV with the columns id, path, label. A name that is no UTF-8 keeps its bytes."""
    content = io.StringIO(newline="")
    writer = csv.writer(content)
    writer.writerow(Item._fields)
    writer.writerows(items)
    write_file(path, content.getvalue())


def items_digest(items: Iterable[Item]) -> str:
    """SHA-256 of the paths and labels of `items`."""
    return hashlib.sha256(to_json([[item.path, item.label] for item in items]).encode()).hexdigest()


def labels_digest(labels: Iterable[str]) -> str:
    """SHA-256 of labels."""
    return hashlib.sha256(to_json(list(labels)).encode()).hexdigest()


def check_items(items: list[Item], sources: Iterable[EncodeRecord], path: Path, where: str, argument: str) -> None:
    """Require that `items`, read from `path`, are those of `sources`, one source after the other.

    Raises:
        InputError: a path or a label is another one; the error names `where` and `argument`.
    """
    first = 0
    for source in sources:
        found = items[first : first + source.count]
        first += source.count
        if source.items_sha256 not in ("", items_digest(found)):
            expected = f"a folder whose {path.name} has the images that were encoded"
            actual = f"others in {str(path)!r}, which is damaged or was changed"
            raise invalid(where, argument, expected, actual, "encode the images again")


def read_items(path: Path, where: str, argument: str) -> list[Item]:
    """Read what `write_items` wrote, or what a spreadsheet made of it: a UTF-8 byte order mark is accepted.

    Raises:
        InputError: the file is missing or damaged, or its ids are not 0, 1, 2, ...; the error names `where` and
            `argument`.
    """
    expected = f"a folder whose {path.name} has the columns {','.join(Item._fields)} and ids counting from 0"
    try:
        text = read_file(path).decode("utf-8-sig", errors="surrogateescape")
        rows = csv.reader(io.StringIO(text, newline=""))
        header = next(rows, [])
        if tuple(header) != Item._fields:
            raise invalid(where, argument, expected, f"the columns {brief(header)} in {str(path)!r}")
        items = []
        for row in rows:
            if len(row) < len(Item._fields):
                actual = f"{len(row)} columns in line {rows.line_num} of {str(path)!r}"
                raise invalid(where, argument, expected, actual)
            items.append(Item(int(row[0]), row[1], row[2]))
    except FileNotFoundError:
        raise invalid(where, argument, expected, f"no file {str(path)!r}") from None
    except InputError:
        raise
    except (ValueError, csv.Error) as error:
        raise invalid(where, argument, expected, f"{error} in {str(path)!r}") from None
    if any(item.id != row for row, item in enumerate(items)):
        raise invalid(where, argument, expected, f"other ids in {str(path)!r}")
    return items
