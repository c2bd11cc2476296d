"""All steps of image search on real images: prepare, train, encode, index, search, evaluate, report.

Each step calls a function of the library. Before the step, a note shows the command that does the same.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hashengine import _progress
from hashengine._defaults import DATA_SETS
from hashengine._files import TEMPORARY_LOCK, Marker, check_output, locked, make_folder, write_file
from hashengine._text import counted
from hashengine._validation import check_path
from hashengine.errors import invalid
from hashengine.evaluation.encode import CodesFolder, encode_folder
from hashengine.evaluation.evaluate import evaluate
from hashengine.evaluation.image_index import ImageIndex
from hashengine.evaluation.report import Report, write_report

MARKER = Marker(".hashengine-demo")
# The images of these data sets are not mirrored in training, because all images of a class face the same way.
_WITHOUT_MIRRORING = ("digits", "fashion-mnist")


class Step(NamedTuple):
    """One step of the demo.

    Attributes:
        command: the command that a user would type.
        run: runs the step, and returns one line that describes the result.
    """

    command: list[str]
    run: Callable[[], str]


def run_demo(data: str, output: Path, bits: int) -> Report:
    """Run every step into `output`, which is emptied first.

    Args:
        data: a name that `hashengine.training.prepare` knows, or a folder of class folders.
        output: the folder for the data, the model, the codes, the index and the report.
        bits: length of a code.

    Raises:
        InputError: `output` is neither empty nor the folder of an earlier demo, `output` contains `data`, another demo
            is running there, or a step fails.
    """
    check_path("demo", "data", data)
    output = check_path("demo", "output", output)
    _check_output(output, data)
    _check_options(data, output, bits)
    make_folder(output.resolve())  # the target of a link

    def refuse() -> None:
        actual, advice = f"{str(output)!r}, which another demo uses", "wait for it, or choose another folder"
        raise invalid("demo", "output", "a folder that no other demo uses", actual, advice) from None

    with locked(output.resolve(), refuse, TEMPORARY_LOCK, keep=False):
        _empty(output)
        _run_steps(data, output, bits)
    return Report.read(output / "report.json", "demo", "report", "hashengine report")


def _run_steps(data: str, output: Path, bits: int) -> None:
    scripts = Path(sys.executable).parent
    if shutil.which("hashengine") != str(scripts / "hashengine") and (scripts / "activate").is_file():
        _progress.note(f"To try the commands below, type first: source {shlex.quote(str(scripts / 'activate'))}")
    for step in steps(data, output, bits):
        _progress.note(f"$ {shlex.join(step.command)}")
        _progress.note(step.run())


def _check_options(data: str, output: Path, bits: int) -> None:
    """Find mistakes before the folder of an earlier demo is emptied."""
    from hashengine.training.config import FitConfig
    from hashengine.training.data import list_classes
    from hashengine.training.datasets import check_folder

    if data not in DATA_SETS:
        list_classes(Path(data), "demo")
        check_folder(data)
    FitConfig.checked("demo", images=output, output=output, bits=bits)


def start_over(output: Path, data: str) -> None:
    """Create `output`, or empty it, and write the file of `MARKER` to it.

    Raises:
        InputError: `output` exists but is neither an empty folder nor one with this file, or it contains the folder
            `data`.
    """
    _check_output(output, data)
    make_folder(output.resolve())
    _empty(output)


def _empty(output: Path) -> None:
    output = output.resolve()  # the target of a link
    for path in output.iterdir():  # the marker stays, so that an interrupted demo can start over
        if path.name not in (MARKER.name, TEMPORARY_LOCK):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    write_file(output / MARKER.name, "Made by 'hashengine demo', which empties this folder when it starts over.\n")


def _check_output(output: Path, data: str) -> None:
    if data not in DATA_SETS and Path(data).is_dir() and Path(data).resolve().is_relative_to(output.resolve()):
        raise invalid(
            "demo", "output", "a folder that does not contain the data", f"{str(output)!r}, which is emptied first"
        )
    check_output("demo", output, is_folder=True, marker=MARKER)


def steps(data: str, output: Path, bits: int) -> list[Step]:
    """The steps, in their order."""
    data = f"./{data}" if data.startswith("-") else data  # so that the printed command does not read it as an option
    images, model, index = output / "images", output / "model", output / "index"
    results, evaluation, page = output / "results.json", output / "evaluation.json", output / "report.html"
    flip = data not in _WITHOUT_MIRRORING

    def prepare() -> str:
        from hashengine import training

        record = training.prepare(data, images)
        return f"{record['database']['images']:,} images in the database, {record['query']['images']:,} queries"

    def fit() -> str:
        from hashengine import training

        config = training.FitConfig(images=images / "database", output=model, bits=bits, flip=flip)
        record = training.fit(config).record
        rate = f"{record['images_per_second']:,.0f} images per second on {record['device']}"
        return f"{counted(len(record['epochs']), 'epoch')} in {record['seconds']:.1f} s, {rate}"

    def encode(side: str) -> Callable[[], str]:
        def run() -> str:
            codes = encode_folder(images / side, model)
            codes.save(output / side)
            return codes.record.summary()

        return run

    def build() -> str:
        built = ImageIndex.build(CodesFolder.load(output / "database"), index)
        return f"{counted(len(built.items), 'code')} in the index"

    def search() -> str:
        found = ImageIndex.load(index).search(CodesFolder.load(output / "query"))
        found.write(results)
        return found.summary()

    def measure() -> str:
        found = evaluate(ImageIndex.load(index), CodesFolder.load(output / "query"))
        found.write(evaluation)
        return f"mAP {found.mean_average_precision.expected:.4f}"

    def report() -> str:
        write_report(page, index, results, evaluation=evaluation, training=model / "training.json")
        return f"wrote {page} and {page.with_suffix('.json')}"

    return [
        _step(prepare, "train", "prepare", data, "--output", images),
        _step(fit, "train", "fit", "--images", images / "database", "--bits", bits, *["--flip"] * flip,
              "--output", model),
        _step(encode("database"), "encode", images / "database", "--model", model, "--output", output / "database"),
        _step(encode("query"), "encode", images / "query", "--model", model, "--output", output / "query"),
        _step(build, "index", output / "database", "--output", index),
        _step(search, "search", index, output / "query", "--output", results),
        _step(measure, "evaluate", index, output / "query", "--output", evaluation),
        _step(report, "report", "--index", index, "--results", results, "--evaluation", evaluation,
              "--training", model / "training.json", "--output", page),
    ]  # fmt: skip


def _step(run: Callable[[], str], *arguments: object) -> Step:
    return Step(["hashengine", *map(str, arguments)], run)
