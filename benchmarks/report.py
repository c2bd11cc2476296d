"""From the kept results of `kernels` and `hamming-gpu` to the README's tables and plots: nothing is typed by hand."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import hamming_report
from benchmarks.cases import FORWARD, FORWARD_BACKWARD
from hashengine import InputError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLOT = ROOT / "docs" / "kernels.svg"
SEARCH_PLOT = ROOT / "docs" / "hamming-gpu.svg"
REFERENCE_SHAPES = ([32, 64, 56, 56], [65536, 64])  # for which the tables tell the copies that a call costs
_MEASUREMENT = ("op", "pass", "shape", "dtype", "layout")

Row = dict[str, Any]


def result_files(folder: Path = RESULTS) -> list[Path]:
    return sorted(folder.glob("kernels-*.jsonl"))


def read_rows(file: Path) -> list[Row]:
    """The newest row of each measurement in a file that runs were appended to."""
    rows = {}
    for row in map(json.loads, file.read_text().splitlines()):
        rows[json.dumps([row[name] for name in (*_MEASUREMENT, "cache")])] = row
    return list(rows.values())


def as_in_a_network(rows: Iterable[Row]) -> list[Row]:
    """One row of each measurement: the cache as successive calls leave it, warm but for tensors that it cannot hold."""
    chosen: dict[str, Row] = {}
    for row in rows:
        key = json.dumps([row[name] for name in _MEASUREMENT])
        if key not in chosen or row["cache"] == "warm":
            chosen[key] = row
    return list(chosen.values())


def kind(row: Row) -> str:
    return row["dtype"] if row["layout"] == "contiguous" else f"{row['dtype']} {row['layout']}"


def geometric_means(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], dict[str, float]]:
    """Of the speed-up over each system, for each (op, pass, kind, model x batch)."""
    speedups: dict[tuple[str, str, str, str], list[dict[str, float]]] = {}
    for row in as_in_a_network(rows):
        for model in row["models"]:
            speedups.setdefault((row["op"], row["pass"], kind(row), model), []).append(row["speedup"])
    return {
        key: {system: _geometric_mean(each[system] for each in found) for system in found[0]}
        for key, found in speedups.items()
    }


def _geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def machine_line(row: Row) -> str:
    where = row.get("gpu") or f"{row['threads']} threads of {row['cpu']}, SIMD {row['simd_level']}"
    graphs = ", as CUDA graphs" if row.get("cuda_graphs") else ""
    return f"{where}{graphs}, torch {row['torch']}, commit {row['commit']}"


def markdown(rows: list[Row]) -> str:
    """The tables of one machine: a line for each (op, pass, kind), a column for each model x batch."""
    means = geometric_means(rows)
    columns_of: dict[tuple[str, str, str], tuple[str, ...]] = {}
    for *line, column in means:
        columns_of[tuple(line)] = (*columns_of.get(tuple(line), ()), column)
    parts = [
        f"{machine_line(rows[0])}. Times eager / times `torch.compile`, geometric means over the layer shapes; copies: "
        f"the time beside copying x once, at {' and '.join(map(_by, REFERENCE_SHAPES))}, and the floor:"
    ]
    for columns in dict.fromkeys(columns_of.values()):
        table = [["", *columns, "copies (floor)"]]
        for line in (line for line, own in columns_of.items() if own == columns):
            op, direction, which = line
            cells = (_speedups(means[op, direction, which, column]) for column in columns)
            table.append([f"`{op}` {direction}, {which}", *cells, _reference_copies(rows, line)])
        parts.append(_markdown_table(table))
    parts.append(_slower_than_compiled(rows))
    return "\n\n".join(parts)


def _by(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def _speedups(means: Row) -> str:
    return " / ".join(f"{means[system]:.1f}" if system in means else "-" for system in ("eager", "compile"))


def _reference_copies(rows: list[Row], line: tuple[str, str, str]) -> str:
    for row in as_in_a_network(rows):
        if (row["op"], row["pass"], kind(row)) == line and row["shape"] in REFERENCE_SHAPES:
            copies = row["copies"]["fused"]
            return f"{copies:.1f} ({copies * row['percent_of_floor']['fused'] / 100:.1f})"
    return "-"


def _slower_than_compiled(rows: list[Row]) -> str:
    slower = [
        f"`{row['op']}` {row['pass']} {_by(row['shape'])} {kind(row)} ({row['speedup']['compile']:.2f})"
        for row in as_in_a_network(rows)
        if row["speedup"].get("compile", 1) < 1
    ]
    return f"Slower than `torch.compile`: {', '.join(slower) or 'nowhere'}."


def _markdown_table(table: list[list[str]]) -> str:
    head, *body = (f"| {' | '.join(cells)} |" for cells in table)
    return "\n".join([head, "|" + "---|" * len(table[0]), *body])


def plot(machines: list[list[Row]], file: Path) -> None:
    """Bytes that must be moved over the time taken, against the tensor's size; copying it is the roof."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "hashengine"  # the same rows draw the same file
    panels = [(rows, which) for rows in machines for which in dict.fromkeys(map(kind, rows))]
    lines = [(op, direction) for op in ("simam", "triplet_attention") for direction in (FORWARD, FORWARD_BACKWARD)]
    size = (3.6 * len(lines), 3.2 * len(panels))
    figure, grid = pyplot.subplots(len(panels), len(lines), figsize=size, squeeze=False, layout="constrained")
    for (rows, which), axes in zip(panels, grid, strict=True):
        for (op, direction), axis in zip(lines, axes, strict=True):
            found = [
                row for row in as_in_a_network(rows) if (row["op"], row["pass"], kind(row)) == (op, direction, which)
            ]
            _draw(axis, sorted(found, key=_tensor_bytes))
            axis.set_title(f"{op}, {direction}, {which}", fontsize=9)
        axes[0].set_ylabel(f"{rows[0].get('gpu') or rows[0]['cpu']}\nGB/s of the floor's bytes", fontsize=8)
    grid[0][0].legend(fontsize=8)
    for axis in grid[-1]:
        axis.set_xlabel("tensor, MB", fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def _tensor_bytes(row: Row) -> int:
    return math.prod(row["shape"]) * (4 if row["dtype"] == "float32" else 2)


def _draw(axis: Any, rows: list[Row]) -> None:
    if not rows:
        return  # axes of nothing have no logarithmic scale
    megabytes = [_tensor_bytes(row) / 1e6 for row in rows]
    for system, style in (("copy", "k--"), ("fused", "o-"), ("compile", "s-"), ("eager", "^-")):
        measured = [row for row in rows if system in row["seconds"]]
        if len(measured) == len(rows):
            moved = [2 * _tensor_bytes(row) if system == "copy" else row["floor_bytes"] for row in rows]
            rate = [count / row["seconds"][system]["p50"] / 1e9 for count, row in zip(moved, rows, strict=True)]
            axis.plot(megabytes, rate, style, label=system, markersize=4)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.xaxis.set_minor_formatter("")  # within a decade they would overlap
    axis.grid(alpha=0.3)


def run(folder: Path, plot_file: Path, search_plot_file: Path) -> None:
    """Print the README's tables of kernels, and those of searches on a GPU, and draw the plot of each."""
    kept = [
        ([read_rows(file) for file in result_files(folder)], markdown, plot, plot_file),
        (
            [hamming_report.read_rows(file) for file in hamming_report.result_files(folder)],
            hamming_report.markdown,
            hamming_report.plot,
            search_plot_file,
        ),
    ]
    if not any(machines for machines, *_ in kept):
        raise InputError(
            f"no kernels-*.jsonl in {folder}, nor hamming-gpu-*.jsonl; run 'python -m benchmarks kernels --output' "
            "into it first"
        )
    for machines, tables, draw, file in kept:
        if machines:
            print("\n\n".join(map(tables, machines)))
            try:
                draw(machines, file)
            except ImportError:
                raise InputError("the plot needs matplotlib: pip install 'hashengine[bench]'") from None
