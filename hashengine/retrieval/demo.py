"""The whole path on real images, run as the commands that a user would type."""

import multiprocessing
import runpy
import shlex
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from hashengine.errors import InputError
from hashengine.retrieval.report import Report, duration

MARKER = ".hashengine-demo"


def run_demo(data: str, output: Path, bits: int) -> int:
    """Run every step into `output`, starting over; return the exit code of the first that fails, else 0.

    Args:
        data: a name that `python -m training prepare` knows, or a folder of class folders.

    Raises:
        InputError: `output` holds something that no demo made, or holds `data`.
    """
    start_over(output, data)
    scripts = Path(sys.executable).parent
    if shutil.which("hashengine") != str(scripts / "hashengine"):
        print(f"Each step is a command to try yourself, after: source {shlex.quote(str(scripts / 'activate'))}")
    for command in commands(data, output, bits):
        print(f"\n$ {shlex.join(command)}", flush=True)
        code = run(command)
        if code:
            print(f"error: the step above ended with exit code {code}", file=sys.stderr)
            return code
    summarise(output)
    return 0


def start_over(output: Path, data: str) -> None:
    """Make `output` an empty folder that says it is a demo's; only such a folder is ever emptied."""
    if Path(data).is_dir() and Path(data).resolve().is_relative_to(output.resolve()):
        raise InputError(
            f"output: expected a folder without the data in it, got {str(output)!r}, which is emptied first"
        )
    if output.is_dir() and (output / MARKER).is_file():
        shutil.rmtree(output)
    elif output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"output: expected a new folder or an earlier demo's, got {str(output)!r}, which is neither")
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).write_text("Made by 'hashengine demo', which empties this folder when it starts over.\n")


def commands(data: str, output: Path, bits: int) -> list[list[str]]:
    """The steps, as a user would type them."""

    def hashengine(*arguments: str | Path) -> list[str]:
        return ["hashengine", *map(str, arguments)]

    def training(*arguments: str | Path) -> list[str]:
        return ["python", "-m", "training", *map(str, arguments)]

    images, model, index = output / "images", output / "model", output / "index"
    results, evaluation = output / "results.json", output / "evaluation.json"
    flip = [] if data in ("digits", "fashion-mnist") else ["--flip"]  # a mirrored photograph shows the same thing
    return [
        training("prepare", data, "--output", images),
        training("fit", "--images", images / "database", "--bits", str(bits), *flip, "--output", model),
        hashengine("encode", images / "database", "--model", model, "--output", output / "database"),
        hashengine("encode", images / "query", "--model", model, "--output", output / "query"),
        hashengine("index", output / "database", "--output", index),
        hashengine("search", index, output / "query", "-k", "10", "--output", results),
        hashengine("evaluate", index, output / "query", "--output", evaluation),
        hashengine("report", "--index", index, "--results", results, "--evaluation", evaluation,
                   "--training", model / "training.json", "--output", output / "report.html"),
    ]  # fmt: skip


def run(command: list[str]) -> int:
    """Run one step and return its exit code.

    The step runs in a fork of this process, which has torch loaded already; a process of its own would load it again,
    as each command does that is typed, which takes longer than most of these steps.
    """
    process = multiprocessing.get_context("fork").Process(target=_step, args=command)
    process.start()
    process.join()
    return process.exitcode


def _step(program: str, *arguments: str) -> None:
    module, arguments = (arguments[1], arguments[2:]) if program == "python" else (program, arguments)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def summarise(output: Path) -> None:
    """Print the figures of report.json."""
    report = Report.read(output / "report.json", "report", "hashengine report")
    evaluation = report.evaluation
    title = f"{report.queries:,} queries among {report.database:,} images, {report.bits} bits"
    table = Table("", Column(justify="right"), "", title=title, title_justify="left", show_header=False)
    measures = {"mAP": evaluation.mean_average_precision}
    measures |= {f"precision@{k}": band for k, band in evaluation.precision_at.items()}
    for name, band in measures.items():
        table.add_row(name, f"{band.expected:.4f}", f"{band.minimum:.4f} to {band.maximum:.4f} over tie orders")
    table.add_section()
    for timing in report.timings:
        table.add_row(timing.step, duration(timing.seconds), timing.detail)
    print()
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(f"\nLook at {output / 'report.html'}")
