"""A sweep: one training run for every combination of the options in a grid, and the table of the results."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hashengine import _progress, metrics
from hashengine._files import check_output, write_file
from hashengine._validation import check_device
from hashengine.errors import invalid
from hashengine.training import data
from hashengine.training.config import FitConfig, SweepConfig
from hashengine.training.loop import check_model_output, fit
from hashengine.training.runs import EVALUATION_FILE, RECORD_FILE, Run, RunTable, table

TABLE_FILES = ("table.md", "table.json")


def sweep(config: SweepConfig) -> RunTable:
    """Train one run for each combination of `config.grid` into a folder of its own, and write the table of results.

    Complete runs are kept; therefore an interrupted sweep continues after the last complete run. If `config.queries` is
    given, `evaluate` is called for each run that has not been evaluated with these queries. After each run, the table
    is written to table.md and table.json in `config.output`.

    Raises:
        InputError: an option of a run is invalid, two runs would share a folder, a folder of images is unusable, the
            output has foreign files, or the folder of a run contains a damaged run or a run with other options (all
            of these are found before the first run starts); or `fit` or `evaluate` raises it.
    """
    planned = list(plan(config))
    images = {options.images for options in planned}
    check_output("train sweep", config.output, outside=(*images, config.queries), is_folder=True)
    _check_table(config.output)
    unfinished = [options for options in planned if _finished(options) is None]
    for options in unfinished:
        check_model_output("train sweep", options)
    needed = {options.images for options in unfinished} | ({config.queries} if config.queries and unfinished else set())
    for folder in sorted(needed):
        data.list_classes(folder, "train sweep")  # a mistake in a folder is reported before the first run
    runs: list[Run] = []
    for number, options in enumerate(planned, start=1):
        run = _finished(options)
        if run is None:
            _progress.note(f"run {number} of {len(planned)}: {options.output}")
            run = fit(options)
        if config.queries is not None and not _is_evaluated(run, config.queries):
            evaluate(run, config.queries)
        runs.append(run)
        _write(config.output, table(runs))
    return table(runs)


def plan(config: SweepConfig) -> Iterator[FitConfig]:
    """The checked options of each run. The folder of a run is named after the run's values from the grid."""
    names = list(config.grid)
    planned: set[str] = set()
    for values in itertools.product(*config.grid.values()):
        chosen = dict(zip(names, values, strict=True))
        name = ",".join(f"{option}={_in_file_name(value)}" for option, value in chosen.items()) or "run"
        if name in planned:
            raise invalid("train sweep", "grid", "values that give each run a folder of its own", f"{name!r} twice")
        planned.add(name)
        options = FitConfig.checked("train sweep", **config.options | chosen | {"output": config.output / name})
        check_device("train sweep", options.device, auto=True)
        yield options


def evaluate(run: Run, queries: Path) -> dict[str, Any]:
    """Rank the training images of a run for each query, and write the mAP to evaluation.json.

    An image is relevant if it has the query's class. The network of the run encodes both the training images and the
    images in the folder `queries`.

    Raises:
        InputError: the folder of queries or of training images is unusable.
    """
    network = run.model().to(check_device("train sweep", run.options["device"], auto=True))
    channels, size = network.config.channels, network.config.image_size
    sides = []
    for folder in (queries, Path(run.options["images"])):
        images = data.read_into_memory(data.list_classes(folder, "train sweep"), channels, size)
        sides.append((network.encode(images.images), [images.classes[label] for label in images.labels.tolist()]))
    (query_codes, query_classes), (codes, classes) = sides
    number = {name: index for index, name in enumerate(sorted({*query_classes, *classes}))}
    query_labels, labels = (
        torch.tensor([number[name] for name in side], device="cpu") for side in (query_classes, classes)
    )
    counts = metrics.distance_counts(query_codes, codes, labels=(query_labels, labels))
    found = counts.mean_average_precision()
    if without_relevant := int((counts.relevant.sum(1) == 0).sum()):
        _progress.note(f"{without_relevant} of {len(query_codes)} queries have no relevant image and count as 0")
    record = {
        "version": 1,
        "source": str(queries.absolute()),
        "queries": len(query_codes),
        "without_relevant": without_relevant,
        "database": len(codes),
        "at": None,
        "mean_average_precision": {"expected": found.expected, "minimum": found.minimum, "maximum": found.maximum},
    }
    write_file(run.folder / EVALUATION_FILE, json.dumps(record, indent=2) + "\n")
    return record


def _is_evaluated(run: Run, queries: Path) -> bool:
    """Whether the run has an evaluation.json for the queries in this folder."""
    try:
        record = json.loads((run.folder / EVALUATION_FILE).read_text(encoding="utf-8-sig"))
        return bool(record["source"] == str(queries.absolute()))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _finished(config: FitConfig) -> Run | None:
    """The complete run in the folder of `config`; None if the folder has no training.json, which is written last."""
    if not (config.output / RECORD_FILE).is_file():
        return None
    run = Run.load(config.output)
    wanted, found = ({k: v for k, v in options.items() if k != "output"} for options in (config.record(), run.options))
    if wanted != found:
        differing = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
        actual = f"one with other {', '.join(differing)}"
        found_run = f"the run in {str(config.output)!r}"
        raise invalid("train sweep", found_run, "one with the options of this sweep", actual, "remove it")
    return run


def _in_file_name(value: Any) -> str:
    text = "-".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text.replace("/", "-")


def _write(folder: Path, results: RunTable) -> None:
    write_file(folder / TABLE_FILES[1], results.to_json())  # first: `_check_table` recognises an earlier table by it
    write_file(folder / TABLE_FILES[0], results.to_markdown())


def _check_table(folder: Path) -> None:
    """Refuse to replace files with the names of the table that no sweep wrote."""
    existing = [name for name in TABLE_FILES if (folder / name).exists()]
    try:
        is_own = not existing or "groups" in json.loads((folder / TABLE_FILES[1]).read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        is_own = False
    if not is_own:
        actual = f"{str(folder)!r}, which has another {existing[0]}"
        raise invalid("train sweep", "output", "a folder without foreign files", actual, "choose another folder")
