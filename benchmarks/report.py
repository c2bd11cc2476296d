"""`report`: the Markdown tables and SVG plots of the documentation, made from the result rows alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Row
from benchmarks.kernels import report as kernels
from benchmarks.networks import report as networks
from benchmarks.search import report as search
from hashengine.errors import invalid

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OUTPUT = ROOT / "build" / "benchmark-results"


@dataclass(frozen=True)
class Section:
    """One subject of the report.

    Attributes:
        files: lists the subject's result files in a folder.
        read: reads the newest row of each measurement from a file.
        tables: makes the Markdown tables of one machine.
        plot: plots all machines into a file; None if there is no plot.
    """

    files: Callable[[Path], list[Path]]
    read: Callable[[Path], list[Row]]
    tables: Callable[[list[Row]], str]
    plot: Callable[[Sequence[list[Row]], Path], None] | None = None


SECTIONS = {
    "search-cpu": Section(search.cpu_files, search.read, search.cpu_tables),
    "search-single-query": Section(search.single_query_files, search.read, search.single_query_tables),
    "search-gpu": Section(search.gpu_files, search.read, search.gpu_tables, search.plot_gpu),
    "search-mapped": Section(search.mapped_files, search.read, search.mapped_tables),
    "kernels": Section(kernels.files, kernels.read, kernels.tables, kernels.plot),
    "networks": Section(networks.files, networks.read, networks.tables),
}


def render(results: Path, output: Path) -> list[Path]:
    """Write `<section>.md` and, if the section has a plot, `<section>.svg` for each of `SECTIONS` that has results.

    Equal rows give equal files. The Markdown has no heading and no plot; the page that includes it adds both.

    Args:
        results: the folder of the JSON Lines files.
        output: the folder to write to.

    Returns:
        The files that were written.

    Raises:
        InputError: there are no results, or matplotlib is missing.
    """
    machines_of = {name: [section.read(file) for file in section.files(results)] for name, section in SECTIONS.items()}
    if not any(machines_of.values()):
        advice = "run 'python -m benchmarks kernels --output <folder>/kernels-<machine>.jsonl' first"
        raise invalid("report", "results", "a folder with results such as kernels-*.jsonl", repr(str(results)), advice)
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for name, machines in machines_of.items():
        if machines:
            file = output / f"{name}.md"
            file.write_text("\n\n".join(map(SECTIONS[name].tables, machines)) + "\n", encoding="utf-8")
            written.append(file)
            if (plot := SECTIONS[name].plot) is not None:
                written.append(output / f"{name}.svg")
                plot(machines, written[-1])
    return written
