"""From the kept rows of `hamming-gpu` to markdown tables and a plot of throughput: nothing there is typed by hand."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu_search import FAISS, GRAPH, HOST_TO_HOST, ONE_QUERY, OURS, PRODUCT, WHOLE_MAP, XOR
from benchmarks.systems import Task

_MEASUREMENT = ("task", "codes", "queries", "bits", "k", "data", "share", "cache")
_PEERS = (FAISS, FAISS + HOST_TO_HOST, PRODUCT, XOR)
_LINES = {OURS: "o-", FAISS: "s-", PRODUCT: "^-", XOR: "v-"}

Row = dict[str, Any]


def result_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("hamming-gpu-*.jsonl"))


def read_rows(file: Path) -> list[Row]:
    """The newest row of each measurement in a file that runs were appended to."""
    rows = {}
    for row in map(json.loads, file.read_text().splitlines()):
        rows[json.dumps([row.get(name) for name in _MEASUREMENT])] = row
    return list(rows.values())


def machine_line(rows: list[Row]) -> str:
    row = rows[-1]
    where = row.get("gpu") or row["cpu"]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return f"{where}, torch {row['torch']}, FAISS {row['faiss'] or 'missing'}, commit {commits}"


def markdown(rows: list[Row]) -> str:
    """The tables of one machine."""
    searches, waits = _searches(rows), [row for row in rows if row["task"] == "latency"]
    parts = [f"{machine_line(rows)}. Rates are medians of the rounds, ratios medians of the rounds' ratios:"]
    if searches:
        parts.append(_table(_search_columns(searches), searches))
    if waits:
        parts.append("Microseconds of single calls, p50 / p99:")
        parts.append(_latency_table(waits))
    for row in rows:
        if row["task"] == "build":
            rates = [f"{name} {rate / 1e6:,.0f} M codes/s" for name, rate in row["codes_per_s"].items()]
            parts.append(f"Adding {row['codes']:,} codes of {row['bits']} bits: {', '.join(rates)}.")
        elif row["task"] == "stream":
            parts.append(
                f"{row['codes']:,} codes of {row['bits']} bits in the host's memory, {row['queries']:,} queries: "
                f"{row['of_copy']:.0%} of the rate of copying them to the device."
            )
    return "\n\n".join(parts)


def _searches(rows: list[Row]) -> list[Row]:
    tasks = {task.value for task in Task}
    return [row for row in rows if row["task"] in tasks]


def _search_columns(rows: list[Row]) -> dict[str, Callable[[Row], str]]:
    """A column for each thing that some row knows."""
    own = {name: f"ms{name.removeprefix(OURS)}" for name in (OURS, GRAPH, OURS + HOST_TO_HOST, WHOLE_MAP)}
    columns: dict[str, Callable[[Row], str]] = {
        "task": _task,
        "codes": lambda row: f"{row['codes']:,}",
        "bits": lambda row: str(row["bits"]),
        "queries": lambda row: f"{row['queries']:,}",
        "k": lambda row: "all" if row["k"] is None else f"{row['k']:,}",
        "cache": lambda row: row["cache"],
        "G distances/s": lambda row: f"{row['distances_per_s'] / 1e9:,.1f}",
        "queries/s": lambda row: f"{row['queries_per_s']:,.0f}",
    }
    for name, title in own.items():
        if any(name in row["seconds"] for row in rows):
            columns[title] = lambda row, name=name: _milliseconds(row["seconds"].get(name))
    if any("limit" in row for row in rows):
        columns["of the bound"] = _share_of_bound
    for name in _PEERS:
        if any(name in row["times"] for row in rows):
            columns[f"x {name}"] = lambda row, name=name: _ratio(row["times"].get(name))
    if any(ONE_QUERY in row["seconds"] for row in rows):
        columns["x one query's time"] = lambda row: _ratio(row.get("times_one_query"), 2)
    columns["extra MB"] = lambda row: f"{row['extra_bytes'] / 1e6:,.0f}"
    return columns


def _task(row: Row) -> str:
    share = f" {row['share']:.0%}" if row["share"] < 1 else ""
    return row["task"] + share + ("" if row["data"] == "random" else f", {row['data']}")


def _share_of_bound(row: Row) -> str:
    return f"{row['of_bounds'][row['limit']]:.0%} of {row['limit']}" if "limit" in row else "-"


def _milliseconds(seconds: list[float] | None) -> str:
    return f"{1e3 * statistics.median(seconds):,.3f}" if seconds else "-"


def _ratio(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _table(columns: dict[str, Callable[[Row], str]], rows: list[Row]) -> str:
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[cell(row) for cell in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _latency_table(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["latency"]))

    def quantiles(row: Row, name: str) -> str:
        at = row["latency"].get(name)
        return "-" if at is None else f"{1e6 * at['p50']:,.1f} / {1e6 * at['p99']:,.1f}"

    columns: dict[str, Callable[[Row], str]] = {
        "queries": lambda row: str(row["queries"]),
        "codes": lambda row: f"{row['codes']:,} x {row['bits']}, k = {row['k']}",
    }
    return _table(columns | {name: lambda row, name=name: quantiles(row, name) for name in names}, rows)


def plot(machines: list[list[Row]], file: Path) -> None:
    """Distances a second against the size of the database and against the batch; the bound that limits is the roof."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "hashengine"  # the same rows draw the same file
    size = (10, 4.2 * len(machines))
    figure, grid = pyplot.subplots(len(machines), 2, figsize=size, squeeze=False, sharey="row", layout="constrained")
    for rows, axes in zip(machines, grid, strict=True):
        plain = [row for row in _searches(rows) if (_task(row), row["bits"], row["k"]) == ("search", 64, 10)]
        plain = list({(row["codes"], row["queries"]): row for row in plain}.values())  # cold, where both are there
        for axis, along, fixed in zip(axes, ("codes", "queries"), ("queries", "codes"), strict=True):
            _draw(axis, plain, along, fixed)
            axis.set_xlabel("codes in the database" if along == "codes" else "queries in the batch", fontsize=8)
        axes[0].set_ylabel(f"{rows[-1].get('gpu') or rows[-1]['cpu']}\n64 bits, k = 10: distances/s", fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def _draw(axis: Any, rows: list[Row], along: str, fixed: str) -> None:
    """A colour for each value of what is fixed, a marker for each system."""
    for colour, value in enumerate(sorted({row[fixed] for row in rows})):
        line = sorted((row for row in rows if row[fixed] == value), key=lambda row: row[along])
        for system, style in _LINES.items():
            found = [row for row in line if system in row["seconds"]]
            rates = [row["codes"] * row["queries"] / statistics.median(row["seconds"][system]) for row in found]
            if found:
                label = f"{system}, {value:,} {fixed}"
                axis.plot(
                    [row[along] for row in found], rates, style, color=f"C{colour % 10}", label=label, markersize=4
                )
        roofs = [row for row in line if "limit" in row]
        if roofs:
            bounds = [row["bounds"][row["limit"]] for row in roofs]
            axis.plot([row[along] for row in roofs], bounds, "_--", color=f"C{colour % 10}", alpha=0.5, markersize=8)
    if rows:
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.legend(fontsize=5, ncols=2)
    axis.grid(alpha=0.3)
