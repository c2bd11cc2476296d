"""Tables and a plot from the rows of `kernels`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.harness import Row, read_rows
from benchmarks.kernels.ops import FORWARD, FORWARD_BACKWARD
from benchmarks.tables import by, markdown_lines

REFERENCE_SHAPES = ([32, 64, 56, 56], [65536, 64])  # the tables compare calls at these shapes with a copy of x

_MEASUREMENT = ("op", "pass", "shape", "dtype", "layout")
_PLOTTED_OPS = ("simam", "triplet_attention")
_LINE_STYLES = {"copy": "k--", "fused": "o-", "compile": "-", "eager": ":"}

Line = tuple[str, str, str]  # of a table: op, pass, and the text of `dtype_and_layout`


def files(folder: Path) -> list[Path]:
    """The result files of `kernels`."""
    return sorted(folder.glob("kernels-*.jsonl"))


def read(file: Path) -> list[Row]:
    """The newest row of each measurement."""
    return read_rows(file, (*_MEASUREMENT, "cache"))


def as_in_a_network(rows: Iterable[Row]) -> list[Row]:
    """One row per measurement: the one with a warm cache, because successive calls in a network leave the cache warm.

    If the tensor is more than twice as large as the cache, the only row is one with a cold cache, which is taken.
    """
    chosen: dict[str, Row] = {}
    for row in rows:
        key = json.dumps([row[name] for name in _MEASUREMENT])
        if key not in chosen or row["cache"] == "warm":
            chosen[key] = row
    return list(chosen.values())


def dtype_and_layout(row: Row) -> str:
    """The dtype and the layout as text, such as "float32" or "bfloat16 channels_last"."""
    return row["dtype"] if row["layout"] == "contiguous" else f"{row['dtype']} {row['layout']}"


def geometric_means(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], dict[str, float]]:
    """The geometric mean of the speed-ups over each system, per (op, pass, dtype and layout, model x batch)."""
    speedups: dict[tuple[str, str, str, str], list[dict[str, float]]] = {}
    for row in as_in_a_network(rows):
        for model in row["models"]:
            speedups.setdefault((row["op"], row["pass"], dtype_and_layout(row), model), []).append(row["speedup"])
    return {
        key: {system: _geometric_mean(each[system] for each in found) for system in found[0]}
        for key, found in speedups.items()
    }


def _geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def machine_line(row: Row) -> str:
    """The machine, the versions and the commit of a row."""
    device = row.get("gpu") or f"{row['threads']} threads of {row['cpu']}, SIMD {row['simd_level']}"
    graphs = ", as CUDA graphs" if row.get("cuda_graphs") else ""
    return f"{device}{graphs}, torch {row['torch']}, commit {row['commit']}"


def tables(rows: list[Row]) -> str:
    """The tables of one machine, with a line per (op, pass, dtype and layout) and a column per model x batch."""
    means = geometric_means(rows)
    columns_of: dict[Line, tuple[str, ...]] = {}
    for *line, column in means:
        columns_of[tuple(line)] = (*columns_of.get(tuple(line), ()), column)
    parts = [
        f"{machine_line(rows[0])}. Each cell has the speed-up over eager torch / over `torch.compile`, as geometric "
        "means over the layer shapes. Copies: the time of a call at "
        f"{' or '.join(map(by, REFERENCE_SHAPES))} divided by the time of copying its input. In brackets, the floor: "
        "the smallest ratio that the memory traffic of the call allows:"
    ]
    for columns in dict.fromkeys(columns_of.values()):
        lines = []
        for line in (line for line, own_columns in columns_of.items() if own_columns == columns):
            op, direction, kind = line
            cells = (_speedups(means[op, direction, kind, column]) for column in columns)
            lines.append([f"`{op}` {direction}, {kind}", *cells, _reference_copies(rows, line)])
        parts.append(markdown_lines(["", *columns, "copies (floor)"], lines))
    parts.append(_slower_than_compiled(rows))
    return "\n\n".join(parts)


def _speedups(means: dict[str, float]) -> str:
    return " / ".join(f"{means[system]:.1f}" if system in means else "-" for system in ("eager", "compile"))


def _reference_copies(rows: list[Row], line: Line) -> str:
    for row in as_in_a_network(rows):
        if (row["op"], row["pass"], dtype_and_layout(row)) == line and row["shape"] in REFERENCE_SHAPES:
            copies = row["copies"]["fused"]
            return f"{copies:.1f} ({copies * row['percent_of_floor']['fused'] / 100:.1f})"
    return "-"


def _slower_than_compiled(rows: list[Row]) -> str:
    slower = [
        f"`{row['op']}` {row['pass']} {by(row['shape'])} {dtype_and_layout(row)} ({row['speedup']['compile']:.2f})"
        for row in as_in_a_network(rows)
        if row["speedup"].get("compile", 1) < 1
    ]
    return f"Slower than `torch.compile`: {', '.join(slower) or 'nowhere'}."


def plot(machines: Sequence[list[Row]], file: Path) -> None:
    """Plot rates against the tensor's size.

    The rate of a call is its floor in bytes divided by its time. The rate of a copy is the number of bytes that it
    moves divided by its time.
    """
    panels = [(rows, kind) for rows in machines for kind in dict.fromkeys(map(dtype_and_layout, rows))]
    lines = [(op, direction) for op in _PLOTTED_OPS for direction in (FORWARD, FORWARD_BACKWARD)]
    size = (3.2 * len(lines), 2.8 * len(panels))
    figure, grid = plots.new_figure(len(panels), len(lines), *size, sharex=True, sharey="row")
    for (rows, kind), axes in zip(panels, grid, strict=True):
        for (op, direction), axis in zip(lines, axes, strict=True):
            line = (op, direction, kind)
            found = [row for row in as_in_a_network(rows) if (row["op"], row["pass"], dtype_and_layout(row)) == line]
            _draw(axis, sorted(found, key=_tensor_bytes))
            axis.set_title(f"{op}, {direction}\n{kind}", fontsize=8)
        axes[0].set_ylabel(f"{rows[0].get('gpu') or rows[0]['cpu']}\nGB/s of the floor's bytes", fontsize=8)
    grid[0][0].legend(fontsize=8)
    for axis in grid[-1]:
        axis.set_xlabel("tensor, MB", fontsize=8)
    plots.save_svg(figure, file)


def _tensor_bytes(row: Row) -> int:
    return math.prod(row["shape"]) * (4 if row["dtype"] == "float32" else 2)


def _draw(axis: Any, rows: list[Row]) -> None:
    if not rows:
        return  # empty axes cannot be scaled logarithmically
    megabytes = [_tensor_bytes(row) / 1e6 for row in rows]
    for system, style in _LINE_STYLES.items():
        if all(system in row["seconds"] for row in rows):
            moved = [2 * _tensor_bytes(row) if system == "copy" else row["floor_bytes"] for row in rows]
            rates = [count / row["seconds"][system]["p50"] / 1e9 for count, row in zip(moved, rows, strict=True)]
            axis.plot(megabytes, rates, style, label=system, markersize=4)
    plots.set_log_scales(axis)
