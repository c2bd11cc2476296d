"""A sweep: one training run for every combination of the options in a grid, and the table of the results."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hashengine import _progress, metrics
from hashengine._files import check_output, locked, make_folder, read_file, write_file
from hashengine._validation import check_device
from hashengine.errors import invalid
from hashengine.models.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from hashengine.training import data
from hashengine.training.config import FitConfig, SweepConfig, override
from hashengine.training.loop import check_model_output, check_no_other_output, fit
from hashengine.training.runs import EVALUATION_FILE, RECORD_FILE, Run, RunTable, check_evaluation_file, table

TABLE_FILES = ("table.md", "table.json")


def sweep(config: SweepConfig) -> RunTable:
    """Train one run for each combination of `config.grid` into a folder of its own, and write the table of results.

    Complete runs are kept; therefore an interrupted sweep continues after the last complete run. If `config.queries` is
    given, `evaluate` is called for each run that has not been evaluated with these queries. Images that were moved or
    copied are the same ones. After each run, the table
    is written to table.md and table.json in `config.output`. A second sweep into the same folder waits for the first.

    The names and the sizes of the image files show whether a folder of images has changed since a run or an evaluation;
    this is not checked for a folder that has been removed since.

    Raises:
        InputError: an option of a run is invalid, two runs would share a folder, a folder of images is unusable, the
            output has foreign files, or the folder of a run contains a damaged run, a run with other options, or a run
            with other images (all of these are found before the first run starts); or `fit` or `evaluate` raises it.
    """
    SweepConfig.require(config)
    planned = list(plan(config))
    images = {options.images for options in planned}
    check_output("train sweep", config.output, outside=(*images, config.queries), is_folder=True)
    check_no_other_output("train sweep", config.output, "that of an earlier sweep")
    _check_table(config.output)
    queries = set() if config.queries is None else {config.queries}
    digests = {folder: _files_digest(folder) for folder in sorted(images | queries) if folder.is_dir()}
    finished = [_finished(options, digests) for options in planned]
    unfinished = [options for options, run in zip(planned, finished, strict=True) if run is None]
    for options in unfinished:
        check_model_output("train sweep", options)
    if config.queries is not None:
        for options in planned:
            check_evaluation_file("train sweep", options.output)
    if unfinished:  # a missing folder is reported here, before the first run
        for folder in sorted({options.images for options in unfinished} | queries):
            digests[folder] = digests.get(folder) or _files_digest(folder)
    runs: list[Run] = []
    make_folder(config.output)
    with locked(config.output, lambda: _progress.note(f"waiting for another sweep in {config.output}")):
        for number, options in enumerate(planned, start=1):
            run = _finished(options, digests)
            if run is None:
                _progress.note(f"run {number} of {len(planned)}: {options.output}")
                run = fit(options)
            if config.queries is not None and not _is_evaluated(run, config.queries, options.images, digests):
                evaluate(run, config.queries, options.images, options.device)
            runs.append(run)
            _write(config.output, table(runs))
    return table(runs)


def plan(config: SweepConfig) -> Iterator[FitConfig]:
    """The checked options of each run. The folder of a run is named after the run's values from the grid."""
    names = list(config.grid)
    planned: set[str] = set()
    checked: dict[str, str] = {}
    for values in itertools.product(*config.grid.values()):
        chosen = dict(zip(names, values, strict=True))
        name = ",".join(f"{option}={_in_file_name(value)}" for option, value in chosen.items()) or "run"
        if name in planned:
            raise invalid("train sweep", "grid", "values that give each run a folder of its own", f"{name!r} twice")
        planned.add(name)
        options = FitConfig.checked(
            "train sweep", **override(config.options, chosen | {"output": config.output / name})
        )
        device = str(check_device("train sweep", options.device, auto=True))
        same = {"output": "", "device": device, "images": os.path.realpath(options.images)}
        other = checked.setdefault(json.dumps(options.record() | same, sort_keys=True), name)
        if other != name:
            expected = "values that give each run options of its own"
            raise invalid("train sweep", "grid", expected, f"{other!r} and {name!r}, which are equal")
        yield options


def evaluate(run: Run, queries: Path, images: Path | None = None, device: str | None = None) -> dict[str, Any]:
    """Rank the training images of a run for each query, and write the mAP to evaluation.json.

    An image is relevant if it has the query's class. The network of the run encodes both the training images and the
    images in the folder `queries`.

    Args:
        run: the run.
        queries: a folder of class folders.
        images: the folder of the training images, if it is no longer where the run found it.
        device: where the network runs; by default that of the run.

    Raises:
        InputError: the folder of queries or of training images is unusable, or the run has another evaluation.json.
    """
    network = run.model().to(check_device("train sweep", device or run.options["device"], auto=True))
    channels, size = network.config.channels, network.config.image_size
    sides, digests = [], []
    for folder in (queries, images or Path(run.options["images"])):
        by_class = data.list_classes(folder, "train sweep")
        digests.append(data.files_digest(folder, itertools.chain(*by_class.values())))
        read = data.read_into_memory(by_class, channels, size)
        sides.append((network.encode(read.images), [read.classes[label] for label in read.labels.tolist()]))
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
        "files_sha256": digests,
        "fingerprint": run.record.get("fingerprint"),
        "queries": len(query_codes),
        "without_relevant": without_relevant,
        "database": len(codes),
        "at": None,
        "mean_average_precision": {"expected": found.expected, "minimum": found.minimum, "maximum": found.maximum},
    }
    check_evaluation_file("train sweep", run.folder)  # one may have appeared meanwhile
    write_file(run.folder / EVALUATION_FILE, json.dumps(record, indent=2) + "\n")
    return record


def _is_evaluated(run: Run, queries: Path, images: Path, digests: dict[Path, str]) -> bool:
    """Whether the run has an evaluation.json for the queries and the training images as they are now."""
    try:
        record = json.loads(read_file(run.folder / EVALUATION_FILE).decode("utf-8-sig"))
        of_queries, of_images = record["files_sha256"]
        has_queries = digests.get(queries) == of_queries
        if queries not in digests:  # the folder has been removed
            has_queries = record["source"] == str(queries.absolute())
        is_of_run = record["fingerprint"] == run.record.get("fingerprint")
        return bool(has_queries and digests.get(images, of_images) == of_images and is_of_run)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _files_digest(folder: Path) -> str:
    by_class = data.list_classes(folder, "train sweep")
    return data.files_digest(folder, itertools.chain(*by_class.values()))


def _finished(config: FitConfig, digests: dict[Path, str]) -> Run | None:
    """The complete run in the folder of `config`; None if it lacks the network, or training.json, the last file.

    Raises:
        InputError: it is a run with other options or other images. The device may be another one, and the same images
            may be in another folder.
    """
    if not all((config.output / name).is_file() for name in (RECORD_FILE, WEIGHTS_FILE, CONFIG_FILE)):
        return None
    run = Run.load(config.output)
    wanted, found = config.record(), run.options
    differing = {name for name in wanted | found if wanted.get(name) != found.get(name)} - {"output", "device"}
    trained_with, present = run.record.get("files_sha256"), digests.get(config.images)
    if present is not None and present == trained_with:
        differing -= {"images"}
    found_run = f"the run in {str(config.output)!r}"
    if differing:
        actual = f"one with other {', '.join(sorted(differing))}"
        raise invalid("train sweep", found_run, "one with the options of this sweep", actual, "remove it")
    if None not in (present, trained_with) and present != trained_with:
        actual = f"other files in {str(config.images)!r}"
        raise invalid("train sweep", "the images", f"those of {found_run}", actual, "remove the run")
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
        is_own = not existing or {"version", "groups"} <= dict(json.loads(read_file(folder / TABLE_FILES[1]))).keys()
    except PermissionError:
        raise
    except (OSError, ValueError, TypeError, RecursionError):
        is_own = False
    if not is_own:
        actual = f"{str(folder)!r}, which has another {existing[0]}"
        raise invalid("train sweep", "output", "a folder without foreign files", actual, "choose another folder")
