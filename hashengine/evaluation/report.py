"""The report: one HTML page with queries, their nearest images, figures and timings. Viewing it needs no network."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import random
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import jinja2
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveInt

from hashengine import _environment, _progress
from hashengine._defaults import REPORT_ROWS, SEED
from hashengine._files import check_output, make_parent, read_file, write_file
from hashengine._text import printable
from hashengine._validation import check_integer, check_path
from hashengine.errors import InputError, invalid
from hashengine.evaluation.records import (
    Evaluation,
    IndexRecord,
    QueryResult,
    Record,
    SearchResults,
    labels_digest,
)
from hashengine.images import check_replaced_file, read_image
from hashengine.index.folder import open_folder

WORST_ROWS = 4  # rows in the grid of the queries with the most errors
THUMBNAIL_PIXELS = 160  # the longer side of a thumbnail, at most
PIXEL_ART_PIXELS = 64  # images with at most this many pixels per side are enlarged without smoothing


class TrainingRecord(Record):
    """The fields of training.json that the page shows or checks.

    Attributes:
        fingerprint: SHA-256 of the model's weights; "" in files of older versions.
    """

    fingerprint: str = ""
    images: PositiveInt
    images_per_second: NonNegativeFloat
    parameters: PositiveInt
    epochs: Annotated[list[dict[str, float]], Field(min_length=1)]
    seconds: NonNegativeFloat


class Timing(BaseModel):
    """A step, its time in seconds, and a detail such as its rate."""

    step: str
    seconds: float
    detail: str


class Report(Record):
    """The figures of the page, as the .json file next to the page stores them.

    Attributes:
        source: the folder or image of the queries.
        has_other_queries: whether the evaluation is that of other queries.
        seed: the seed with which the queries were drawn.
        drawn: the queries drawn at random.
        worst: the queries with the most hits of another class.
    """

    created: datetime
    bits: int
    database: int
    queries: int
    source: str = ""
    has_other_queries: bool = False
    evaluation: Evaluation | None
    timings: list[Timing]
    environment: dict[str, str]
    seed: int
    drawn: list[QueryResult]
    worst: list[QueryResult]


def write_report(
    output: str | os.PathLike[str],
    index: str | os.PathLike[str],
    results: str | os.PathLike[str],
    *,
    evaluation: str | os.PathLike[str] | None = None,
    training: str | os.PathLike[str] | None = None,
    rows: int = REPORT_ROWS,
    seed: int = SEED,
) -> Report:
    """Write the page to `output` (.html), and its figures next to it (.json).

    Args:
        output: the page.
        index: the folder that `hashengine index` wrote.
        results: the file that `hashengine search` wrote.
        evaluation: the file that `hashengine evaluate` wrote.
        training: the training.json that `hashengine train fit` wrote.
        rows: the number of queries in the picture grid. They are drawn from all classes in turn.
        seed: the seed for drawing them.

    Raises:
        InputError: a file is missing or damaged, the files do not belong together, or `output` would replace an input.
    """
    rows = check_integer("report", "queries", rows, 1)
    output = check_path("report", "output", output)
    if output.suffix != ".html":
        raise invalid("report", "output", "a name that ends in .html", repr(str(output)))
    figures = output.with_suffix(".json")
    index, results = check_path("report", "index", index), check_path("report", "results", results)
    for written in (output, figures):
        check_output("report", written, outside=(index, results, evaluation, training))
        check_replaced_file("report", written)
    if os.path.realpath(figures) == os.path.realpath(output):
        expected = "a name without a foreign .json beside it, and no link to it"
        raise invalid("report", "output", expected, repr(str(output)), "choose another name")
    if figures.exists() and not _is_report(figures):
        actual = f"{str(output)!r}, and {figures.name!r} there is another file"
        raise invalid("report", "output", "a name without a foreign .json beside it", actual, "choose another name")
    if not Path(index, "index.json").is_file():  # opening a pipe would wait
        raise invalid("report", "index", "a folder written by 'hashengine index'", repr(os.fspath(index)))
    indexed = IndexRecord.read(Path(index, "index.json"), "report", "index", "hashengine index")
    found = SearchResults.read(Path(results), "report", "results", "hashengine search")
    measured = Evaluation.read(Path(evaluation), "report", "evaluation", "hashengine evaluate") if evaluation else None
    trained = TrainingRecord.read(Path(training), "report", "training", "hashengine train fit") if training else None
    saved = open_folder(Path(index, "codes")).rows
    indexed.drop_unsaved(saved)
    if (counted := sum(source.count for source in indexed.sources)) != saved:
        expected = f"a folder whose index.json describes {saved} codes"
        raise invalid("report", "index", expected, counted, "build it again")
    if found.encode.fingerprint != indexed.fingerprint:
        raise _other_index("results", index, f"those of {found.index!r}, an index of another model")
    if trained is not None and trained.fingerprint not in ("", indexed.fingerprint):
        expected = f"the record of the model in {os.fspath(index)!r}"
        raise invalid("report", "training", expected, f"that of another model, {os.fspath(training or '')!r}")
    records: dict[str, SearchResults | Evaluation | None] = {"results": found, "evaluation": measured}
    for argument, record in records.items():
        if record is None:
            continue
        actual = f"those of {record.index!r}"
        if (record.bits, record.database) != (indexed.bits, saved):
            actual += f" with {record.database} codes of {record.bits} bits, not {saved} of {indexed.bits}"
            raise _other_index(argument, index, actual)
        if record.identity not in ("", indexed.identity):
            raise _other_index(argument, index, f"{actual}, which holds other codes")

    drawn = draw(found.queries, rows, seed)
    report = Report(
        created=datetime.now(timezone.utc).replace(microsecond=0),
        bits=found.bits,
        database=found.database,
        queries=len(found.queries),
        source=found.encode.source,
        has_other_queries=measured is not None and _has_other_queries(measured, found),
        evaluation=measured,
        timings=timings(indexed, found, measured, trained),
        environment=_environment.describe_machine(),
        seed=seed,
        drawn=drawn,
        worst=worst(found.queries, WORST_ROWS),
    )
    make_parent(output)
    write_file(output, render(report))
    report.write(figures)
    return report


def _pictures(report: Report) -> dict[str, Picture | None]:
    """The pictures of the page by path; None for those that cannot be read, such as files that were moved."""
    queries = (*report.drawn, *report.worst)
    paths = dict.fromkeys(path for query in queries for path in (query.path, *(hit.path for hit in query.hits)))
    pictures = {path: picture(path) for path in paths}
    if missing := [path for path in pictures if pictures[path] is None]:
        _progress.note(f"{len(missing)} of {len(pictures)} pictures cannot be read, such as {missing[0]}")
    return pictures


def _has_other_queries(measured: Evaluation, found: SearchResults) -> bool:
    """Whether an evaluation is known to be that of other queries than those of a search."""
    queries = found.encode
    if measured.codes_sha256 and queries.codes_sha256 and measured.codes_sha256 != queries.codes_sha256:
        return True
    if measured.labels_sha256 and queries.codes_sha256:
        labels = labels_digest(query.label for query in found.queries)
        return measured.labels_sha256 != labels
    return bool(measured.source) and (measured.source, measured.queries) != (queries.source, len(found.queries))


def _is_report(path: Path) -> bool:
    """Whether a file is one that `write_report` wrote beside an earlier page."""
    try:
        return {"drawn", "worst", "timings"} <= dict(json.loads(read_file(path))).keys()
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _other_index(argument: str, index: str | os.PathLike[str], actual: str) -> InputError:
    command, expected = {
        "results": ("search", f"from a search in {os.fspath(index)!r}"),
        "evaluation": ("evaluate", f"the figures of {os.fspath(index)!r}"),
    }[argument]
    return invalid("report", argument, expected, actual, f"run 'hashengine {command}' again")


def draw(queries: list[QueryResult], count: int, seed: int) -> list[QueryResult]:
    """Draw `count` queries at random from the classes in turn, and return them in the order of the classes."""
    by_label: dict[str, list[QueryResult]] = defaultdict(list)
    for query in queries:
        by_label[query.label].append(query)
    generator = random.Random(seed)
    labels = sorted(by_label)
    generator.shuffle(labels)
    for group in by_label.values():
        generator.shuffle(group)
    drawn: list[QueryResult] = []
    while len(drawn) < min(count, len(queries)):
        drawn += [by_label[label].pop() for label in labels if by_label[label]][: count - len(drawn)]
    return sorted(drawn, key=lambda query: query.label)


def worst(queries: list[QueryResult], count: int) -> list[QueryResult]:
    """The `count` queries with the most hits of another class; fewer if fewer queries have such a hit."""
    wrong = {id(query): sum(hit.label != query.label for hit in query.hits) for query in queries if query.label}
    mistaken = [query for query in queries if wrong.get(id(query))]
    return sorted(mistaken, key=lambda query: -wrong[id(query)])[:count]


def timings(
    index: IndexRecord, results: SearchResults, evaluation: Evaluation | None, training: TrainingRecord | None
) -> list[Timing]:
    """The time of each step that was run, in the order of the steps."""
    encoding = sum(source.seconds for source in index.sources)
    encoded = sum(source.count for source in index.sources)
    steps = []
    if training:
        epochs, rate = len(training.epochs), training.images_per_second
        detail = f"{epochs} epochs of {training.images:,} images, {rate:,.0f} images per second"
        steps.append(Timing(step="train", seconds=training.seconds, detail=detail))
    if encoding:
        detail = f"{encoded / encoding:,.0f} images per second"
        steps.append(Timing(step="encode the database", seconds=encoding, detail=detail))
    steps += [
        Timing(
            step="encode the queries",
            seconds=results.encode.seconds,
            detail=f"{results.encode.count / results.encode.seconds:,.0f} images per second",
        ),
        Timing(step="index", seconds=index.seconds, detail=f"{results.database:,} codes of {results.bits // 8} bytes"),
        Timing(
            step="search",
            seconds=results.seconds,
            detail=f"{results.queries_per_second:,.0f} queries per second, k = {results.k}",
        ),
    ]
    if evaluation:
        steps.append(Timing(step="evaluate", seconds=evaluation.seconds, detail=f"{evaluation.queries:,} rankings"))
    return steps


def render(report: Report) -> str:
    """The HTML page of `report`, which contains the images."""
    loader = jinja2.PackageLoader("hashengine.evaluation", "")
    templates = jinja2.Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,  # macros return a subclass of str
    )
    templates.filters["duration"] = duration
    return templates.get_template("report.html.j2").render(
        report=report,
        picture=_pictures(report).get,
        pixel_art=PIXEL_ART_PIXELS,
        curve=list(zip(*_curve(report.evaluation), strict=True)) if report.evaluation else [],
    )


def _curve(evaluation: Evaluation) -> tuple[list[int], list[float], list[float]]:
    curve = evaluation.precision_recall_curve
    return curve.radius, curve.recall, curve.precision


def duration(seconds: float) -> str:
    """A time in s, ms or µs, as text with about three digits."""
    for unit, scale in (("s", 1), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{_three_digits(seconds * scale)} {unit}"
    return f"{_three_digits(seconds * 1e6)} µs"


def _three_digits(value: float) -> str:
    digits = int(math.log10(min(max(value, 1), 1e3)))
    return f"{value:.{max(0, 2 - digits)}f}"


class Picture(BaseModel):
    """An image as a data URI, and the longer side of the original in pixels."""

    uri: str
    pixels: int


def picture(path: str) -> Picture | None:
    """The image in the file `path` as a thumbnail; None if it cannot be read."""
    try:
        image = read_image(path)
    except InputError:
        return None
    pixels = max(image.size)
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    # PNG keeps the exact pixels of small images. For a photograph, a PNG is much larger than a JPEG.
    kind = "png" if pixels <= PIXEL_ART_PIXELS else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=85)
    return Picture(uri=f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", pixels=pixels)
