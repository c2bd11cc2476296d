"""A page to look at: queries with their nearest images, the figures, the timings, in one file that needs no network."""

import base64
import io
import os
import platform
import random
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path

import jinja2
import numpy as np
import torch
from pydantic import BaseModel

import hashengine
from hashengine.errors import InputError
from hashengine.images import read_image
from hashengine.retrieval.records import Evaluation, IndexRecord, QueryResult, Record, SearchResults, replacing

WORST_ROWS = 4
THUMBNAIL_PIXELS = 160
PIXEL_ART_PIXELS = 64  # up to this size an image is enlarged by whole pixels, so that it shows what the network saw


class TrainingRecord(Record):
    """The fields of training.json that the page shows."""

    images: int
    images_per_second: float
    parameters: int
    epochs: list[dict[str, float]]
    seconds: float


class Timing(BaseModel):
    """A step, how long it took, and what that means per item."""

    step: str
    seconds: float
    detail: str


class Report(Record):
    """report.json: the page's figures. `drawn` are queries chosen by `seed`, `worst` those with the most wrong hits."""

    created: datetime
    bits: int
    database: int
    queries: int
    evaluation: Evaluation | None
    timings: list[Timing]
    environment: dict[str, str]
    seed: int
    drawn: list[QueryResult]
    worst: list[QueryResult]


def write_report(
    output: str | os.PathLike,
    index: str | os.PathLike,
    results: str | os.PathLike,
    *,
    evaluation: str | os.PathLike | None = None,
    training: str | os.PathLike | None = None,
    rows: int = 12,
    seed: int = 0,
) -> Report:
    """Write the page to `output` (.html) and its figures beside it (.json).

    Args:
        index, results, evaluation, training: what `hashengine index`, `search` and `evaluate` and
            `python -m training fit` wrote.
        rows: how many queries to draw for the picture grid, from all classes in turn.
        seed: of that draw.

    Raises:
        InputError: a file is missing or damaged, or they do not belong together.
    """
    if rows < 1:
        raise InputError(f"queries: expected at least 1 row for the picture grid, got {rows}")
    output = Path(output)
    if output.suffix != ".html":
        raise InputError(f"output: expected a name that ends in .html, got {str(output)!r}")
    indexed = IndexRecord.read(Path(index, "index.json"), "index", "hashengine index")
    found = SearchResults.read(Path(results), "results", "hashengine search")
    measured = Evaluation.read(Path(evaluation), "evaluation", "hashengine evaluate") if evaluation else None
    trained = TrainingRecord.read(Path(training), "training", "python -m training fit") if training else None
    if found.encode.fingerprint != indexed.fingerprint:
        raise InputError(f"results: expected those of a search in {os.fspath(index)!r}, got those of {found.index!r}")
    if measured and (measured.bits, measured.database) != (found.bits, found.database):
        raise InputError(
            f"evaluation: expected that of {found.database} codes of {found.bits} bits like the results, "
            f"got that of {measured.database} codes of {measured.bits} bits"
        )

    drawn = draw(found.queries, rows, seed)
    report = Report(
        created=datetime.now(timezone.utc).replace(microsecond=0),
        bits=found.bits,
        database=found.database,
        queries=len(found.queries),
        evaluation=measured,
        timings=timings(indexed, found, measured, trained),
        environment=environment(),
        seed=seed,
        drawn=drawn,
        worst=worst(found.queries, WORST_ROWS),
    )
    page = render(report)
    with replacing(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    report.write(output.with_suffix(".json"))
    return report


def draw(queries: list[QueryResult], count: int, seed: int) -> list[QueryResult]:
    """`count` queries at random, from the classes in turn, in the order of the classes."""
    by_label = defaultdict(list)
    for query in queries:
        by_label[query.label].append(query)
    generator = random.Random(seed)
    labels = sorted(by_label)
    for group in (labels, *by_label.values()):
        generator.shuffle(group)
    drawn = []
    while len(drawn) < min(count, len(queries)):
        drawn += [by_label[label].pop() for label in labels if by_label[label]][: count - len(drawn)]
    return sorted(drawn, key=lambda query: query.label)


def worst(queries: list[QueryResult], count: int) -> list[QueryResult]:
    """Up to `count` queries with the most hits of another class, none without one."""
    wrong = {id(query): sum(hit.label != query.label for hit in query.hits) for query in queries if query.label}
    mistaken = [query for query in queries if wrong.get(id(query))]
    return sorted(mistaken, key=lambda query: -wrong[id(query)])[:count]


def timings(
    index: IndexRecord, results: SearchResults, evaluation: Evaluation | None, training: TrainingRecord | None
) -> list[Timing]:
    """The steps in their order, those that were run."""
    encoding = sum(source.seconds for source in index.sources)
    encoded = sum(source.count for source in index.sources)
    steps = []
    if training:
        epochs, rate = len(training.epochs), training.images_per_second
        detail = f"{epochs} epochs of {training.images:,} images, {rate:,.0f} images a second"
        steps.append(Timing(step="train", seconds=training.seconds, detail=detail))
    steps += [
        Timing(step="encode the database", seconds=encoding, detail=f"{encoded / encoding:,.0f} images a second"),
        Timing(
            step="encode the queries",
            seconds=results.encode.seconds,
            detail=f"{results.encode.count / results.encode.seconds:,.0f} images a second",
        ),
        Timing(step="index", seconds=index.seconds, detail=f"{results.database:,} codes of {results.bits // 8} bytes"),
        Timing(
            step="search",
            seconds=results.seconds,
            detail=f"{results.queries_per_second:,.0f} queries a second, k = {results.k}",
        ),
    ]
    if evaluation:
        steps.append(Timing(step="evaluate", seconds=evaluation.seconds, detail=f"{evaluation.queries:,} rankings"))
    return steps


def environment() -> dict[str, str]:
    """The machine and the versions that the figures were made with."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": f"{_processor()}, {os.cpu_count()} threads",
        "GPU": ", ".join(gpus) or "none",
        "system": f"{platform.system()} {platform.machine()}",
        "hashengine": hashengine.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "Python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def render(report: Report) -> str:
    """The page of `report`, its images inlined."""
    loader = jinja2.PackageLoader("hashengine.retrieval", "")
    templates = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    templates.filters["duration"] = duration
    return templates.get_template("report.html.j2").render(
        report=report,
        picture=picture,
        pixel_art=PIXEL_ART_PIXELS,
        curve=list(zip(*_curve(report.evaluation), strict=True)) if report.evaluation else [],
    )


def _curve(evaluation: Evaluation) -> tuple[list[int], list[float], list[float]]:
    curve = evaluation.precision_recall_curve
    return curve.radius, curve.recall, curve.precision


def duration(seconds: float) -> str:
    """A time with three digits and the unit that suits it."""
    for unit, scale in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1 or unit == "µs":
            value = seconds * scale
            return f"{value:.{max(0, 2 - int(np.log10(max(value, 1))))}f} {unit}"


class Picture(BaseModel):
    """An image as a data URI, and the longer side of the original in pixels."""

    uri: str
    pixels: int


def picture(path: str) -> Picture | None:
    """The image in the file `path`, scaled down to a thumbnail where it is larger; None where it cannot be read."""
    try:
        image = read_image(path)
    except InputError:
        return None
    pixels = max(image.size)
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    # Small images are kept exact; photographs would be ten times larger as PNG.
    kind = "png" if pixels <= PIXEL_ART_PIXELS else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=85)
    return Picture(uri=f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", pixels=pixels)
