"""The command demo."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hashengine import training
from hashengine._defaults import BITS, DATA_SETS
from hashengine._text import printable
from hashengine.cli._app import command, command_line

if TYPE_CHECKING:
    from hashengine.evaluation.report import Report

app = command_line("All steps of image search on real images.")


@command(app, before=training.let_waiting_threads_sleep)
def demo(
    data: Annotated[str, typer.Option(help=f"{', '.join(DATA_SETS)}, or a folder of class folders.")] = DATA_SETS[0],
    output: Annotated[
        Path, typer.Option("--output", "-o", readable=False, help="Folder for everything that the demo makes.")
    ] = Path("demo"),
    bits: Annotated[int, typer.Option(help="Length of a code.")] = BITS,
) -> None:
    """Train, encode, index, search, evaluate and report on real images, and print the command of each step."""
    from hashengine.evaluation import run_demo

    print_summary(run_demo(data, output, bits))
    print(f"\nOpen {printable(output / 'report.html')}")


def print_summary(report: Report) -> None:
    """Print the main figures and the timings of a report."""
    from rich.console import Console
    from rich.table import Column, Table

    from hashengine.evaluation.report import duration

    title = f"{report.queries:,} queries among {report.database:,} images, {report.bits} bits"
    table = Table("", Column(justify="right"), "", title=title, title_justify="left", show_header=False)
    if report.evaluation is not None:
        measures = {"mAP": report.evaluation.mean_average_precision}
        measures |= {f"precision@{k}": band for k, band in report.evaluation.precision_at.items()}
        for name, band in measures.items():
            limits = f"{band.minimum:.4f} to {band.maximum:.4f}, depending on the order of ties"
            table.add_row(name, f"{band.expected:.4f}", limits)
        table.add_section()
    for timing in report.timings:
        table.add_row(timing.step, duration(timing.seconds), timing.detail)
    print()
    Console(width=None if sys.stdout.isatty() else 120).print(table)
