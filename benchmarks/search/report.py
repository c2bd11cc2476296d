"""Tables and a plot from the rows of `hamming`, `hamming-gpu` and `mapped`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.harness import Row, read_rows
from benchmarks.search.cases import Task
from benchmarks.search.row_names import (
    BARE_LOOP,
    FAISS,
    GRAPH,
    HOST_TO_HOST,
    LABELLED,
    NATIVE,
    NATIVE_ONE_CODE,
    ONE_QUERY,
    OP,
    OURS,
    PRODUCT,
    TENSOR,
    WHOLE_MAP,
    XOR,
)
from benchmarks.tables import Columns, markdown_lines, markdown_table

_KEY = ("task", "codes", "queries", "bits", "k", "data", "share", "cache", "busy")
_CPU_PEERS = ("usearch", "numkong")
_GPU_PEERS = (FAISS, FAISS + HOST_TO_HOST, PRODUCT, XOR)
_LINE_STYLES = {OURS: "o-", FAISS: "s-", PRODUCT: "^-", XOR: "v-"}


def cpu_files(folder: Path) -> list[Path]:
    """The result files of `hamming`."""
    return [file for file in sorted(folder.glob("hamming-*.jsonl")) if file not in gpu_files(folder)]


def gpu_files(folder: Path) -> list[Path]:
    """The result files of `hamming-gpu`."""
    return sorted(folder.glob("hamming-gpu-*.jsonl"))


def mapped_files(folder: Path) -> list[Path]:
    """The result files of `mapped`."""
    return sorted(folder.glob("mapped-*.jsonl"))


def single_query_files(folder: Path) -> list[Path]:
    """The result files of `single-query`."""
    return sorted(folder.glob("single-query-*.jsonl"))


def read(file: Path) -> list[Row]:
    """The newest row of each measurement."""
    return read_rows(file, _KEY)


def cpu_columns(rows: Sequence[Row]) -> Columns:
    """The columns for rows of `hamming` on the CPU.

    The number of codes and the number of queries have columns only if the rows differ in them. The rates of other
    libraries and of the bare loop, and the comparison with plain reads, have columns only if a row has the values.
    """
    columns: dict[str, Callable[[Row], str]] = {"task": _cpu_task}
    for name in ("codes", "queries"):
        if len({row[name] for row in rows}) > 1:
            columns[name] = lambda row, name=name: f"{row[name]:,}"
    columns["bits"] = lambda row: str(row["bits"])
    columns["k"] = _k
    columns[OURS] = lambda row: _cpu_rate(row, OURS)
    columns["FAISS's best"] = lambda row: _cpu_rate(row, row.get("faiss_best"))
    for name in (LABELLED, *_CPU_PEERS, BARE_LOOP):
        if _has(rows, name):
            columns[name] = lambda row, name=name: _cpu_rate(row, name)
    columns["queries/s"] = lambda row: f"{row['queries'] / statistics.median(row['seconds'][OURS]):,.0f}"
    columns["times FAISS's best"] = lambda row: _ratio(row.get("times_faiss"))
    columns["% of the bare loop's rate"] = lambda row: _percent(row.get("of_bare_loop"))
    if any(row["of_read"] for row in rows):
        title = "% of a plain read's rate: of the codes / of a buffer larger than the cache"
        columns[title] = lambda row: " / ".join(map(_percent, row["of_read"].values()))
    columns["extra MiB"] = lambda row: "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:.0f}"
    return columns


def cpu_caption(rows: Sequence[Row]) -> str:
    """What the columns mean."""
    caption = "rates in G distances/s, 10^9 distances per second; ratios are medians over the rounds; "
    caption += "times FAISS's best: the rate divided by that of FAISS's faster mode; "
    caption += "extra MiB: memory beyond codes, ids and answers"
    fewer = "may get fewer queries than hashengine"
    notes = {"usearch": fewer, "numkong": f"{fewer}, and only computes distances"}
    return "; ".join([caption, *(f"{name}: {notes[name]}" for name in _CPU_PEERS if _has(rows, name))])


def _has(rows: Sequence[Row], name: str) -> bool:
    """Whether any row has times of the system."""
    return any(name in row["seconds"] for row in rows)


def cpu_tables(rows: list[Row]) -> str:
    """The tables of one machine: an overview per kind of data, then every row."""
    row = rows[-1]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    parts = [
        f"{row['threads']} threads of {row['cpu']}, SIMD {row['simd_level']}, torch {row['torch']}, "
        f"FAISS {row['faiss']}, commit {commits}. Each cell has the rate in 10^9 distances/s and, in brackets, the "
        "same rate divided by that of FAISS's `IndexBinaryFlat` in the faster of its modes:"
    ]
    for data in dict.fromkeys(row["data"] for row in rows):
        parts.append(f"Data: {data}.")
        parts.append(_cpu_overview([row for row in rows if row["data"] == data and Task(row["task"]).has_k]))
    parts.append(f"All rows; {cpu_caption(rows)}:")
    parts.append(markdown_table(cpu_columns(rows), rows))
    return "\n\n".join(parts)


def _cpu_overview(rows: list[Row]) -> str:
    """A table with a line per code length and a column per kind of search, which `_question` names."""
    cells = {(row["bits"], _question(row)): row for row in rows}
    tasks = [task.value for task in Task]
    in_order = sorted(rows, key=lambda row: (row["codes"], tasks.index(row["task"]), row["k"]))
    questions = list(dict.fromkeys(map(_question, in_order)))
    lines = []
    for bits in sorted({row["bits"] for row in rows}):
        found = [cells.get((bits, question)) for question in questions]
        lines.append([str(bits), *("" if row is None else _rate_and_times(row) for row in found)])
    return markdown_lines(["bits", *questions], lines)


def _question(row: Row) -> str:
    """The search as a column title, such as "k = 100, 1,000 queries, 1M codes"."""
    text = f"k = {_k(row)}" if row["task"] != Task.range.value else f"radius that holds {_k(row)}"
    text += f", {_filter_share(row):.0%} filter" if row["task"] == Task.filter.value else ""
    text += f", {row['queries']:,} queries" if row["queries"] > 1 else ", one query"
    return f"{text}, {row['codes'] / 1e6:g}M codes"


def _rate_and_times(row: Row) -> str:
    return f"{_cpu_rate(row, OURS, 1)} ({_ratio(row.get('times_faiss'))})"


def _cpu_task(row: Row) -> str:
    share = f" {_filter_share(row):.0%}" if row["task"] == Task.filter.value else ""
    return row["task"] + share + ("" if row["data"] == "random" else f", {row['data']}")


def _filter_share(row: Row) -> float:
    """The share of the codes that the filter selects; rows without the field were measured with 0.5."""
    return row.get("share", 0.5)


def _cpu_rate(row: Row, name: str | None, digits: int = 2) -> str:
    """The system's G distances/s."""
    if name is None or name not in row["pairs"] or name not in row["seconds"]:
        return ""
    return f"{row['pairs'][name] / statistics.median(row['seconds'][name]) / 1e9:.{digits}f}"


def _k(row: Row) -> str:
    return "all" if row["k"] is None else f"{row['k']:,}"


def _ratio(value: float | None, digits: int = 1, missing: str = "") -> str:
    return missing if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def mapped_tables(rows: list[Row]) -> str:
    """The table of one machine: searches of a mapped file."""
    columns: Columns = {
        "codes": lambda row: f"{row['codes']:,}",
        "bits": lambda row: str(row["bits"]),
        "queries": lambda row: f"{row['queries']:,}",
        "k": _k,
        "page cache": _page_cache,
        "search GB/s": lambda row: _mapped_rate(row, "search"),
        "read GB/s": lambda row: _mapped_rate(row, "read"),
        "% of a plain read's rate": lambda row: _percent(row["of_read"]),
    }
    row = rows[-1]
    machine = f"{row['threads']} threads of {row['cpu']}, commit {row['commit']}"
    return f"{machine}. Medians of the rounds:\n\n{markdown_table(columns, rows)}"


def _page_cache(row: Row) -> str:
    return f"{row['cache_bytes'] >> 20} MiB" if row["limit"] == "cgroup" else "evicted before each call"


def _mapped_rate(row: Row, name: str) -> str:
    return f"{statistics.median(row['codes'] * row['bits'] / 8e9 / taken for taken in row['seconds'][name]):.2f}"


def single_query_tables(rows: list[Row]) -> str:
    """The table of one machine: the time of a search for one query, and its parts."""
    columns: Columns = {
        "codes": lambda row: f"{row['codes']:,}",
        "busy processes": lambda row: str(row["busy"]),
        "search": lambda row: _microseconds(row, OURS),
        "of it: checks": lambda row: f"{1e6 * (_median(row, OURS) - _median(row, NATIVE)):,.1f}",
        "of it: call and results": lambda row: _microseconds(row, NATIVE_ONE_CODE),
        "of it: kernel": lambda row: f"{1e6 * (_median(row, NATIVE) - _median(row, NATIVE_ONE_CODE)):,.1f}",
        "search, tensors": lambda row: _microseconds(row, TENSOR),
        "op": lambda row: _microseconds(row, OP),
        "FAISS": lambda row: _microseconds(row, FAISS),
        "99th percentile, search / FAISS": lambda row: " / ".join(
            f"{1e6 * row['latency'][name]['p99']:,.0f}" for name in (OURS, FAISS)
        ),
    }
    row = rows[-1]
    machine = f"{row['threads']} threads of {row['cpu']}, SIMD {row['simd_level']}, commit {row['commit']}"
    what = f"{row['bits']} bits, k = {row['k']}. Microseconds, medians"
    return f"{machine}; {what}:\n\n{markdown_table(columns, rows)}"


def _median(row: Row, name: str) -> float:
    seconds: float = row["latency"][name]["p50"]
    return seconds


def _microseconds(row: Row, name: str) -> str:
    return f"{1e6 * _median(row, name):,.1f}"


def gpu_tables(rows: list[Row]) -> str:
    """The tables of one machine: searches, latencies, builds and streamed searches."""
    searches, latencies = _searches(rows), [row for row in rows if row["task"] == "latency"]
    parts = [
        f"{_gpu_machine(rows)}. Rates and ratios are medians over the rounds. x NAME: how many times as fast as the "
        "system NAME. extra MB: memory beyond codes and answers:"
    ]
    if searches:
        parts.append(markdown_table(_search_columns(searches), searches))
    if latencies:
        parts.append("Microseconds of single calls, median / 99th percentile:")
        parts.append(markdown_table(_latency_columns(latencies), latencies))
    for row in rows:
        if row["task"] == "build":
            rates = [f"{name} {rate / 1e6:,.0f} M codes/s" for name, rate in row["codes_per_s"].items()]
            parts.append(f"Adding {row['codes']:,} codes of {row['bits']} bits: {', '.join(rates)}.")
        elif row["task"] == "stream":
            parts.append(
                f"{row['codes']:,} codes of {row['bits']} bits in host memory, {row['queries']:,} queries: searched at "
                f"{row['of_copy']:.0%} of the rate at which the codes are copied to the device."
            )
    return "\n\n".join(parts)


def _gpu_machine(rows: list[Row]) -> str:
    row = rows[-1]
    device = row.get("gpu") or row["cpu"]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return f"{device}, torch {row['torch']}, FAISS {row['faiss'] or 'missing'}, commit {commits}"


def _searches(rows: list[Row]) -> list[Row]:
    tasks = {task.value for task in Task}
    return [row for row in rows if row["task"] in tasks]


def _search_columns(rows: list[Row]) -> Columns:
    """The columns that at least one row can fill."""
    titles = {name: f"ms{name.removeprefix(OURS)}" for name in (OURS, GRAPH, OURS + HOST_TO_HOST, WHOLE_MAP)}
    columns: dict[str, Callable[[Row], str]] = {
        "task": _gpu_task,
        "codes": lambda row: f"{row['codes']:,}",
        "bits": lambda row: str(row["bits"]),
        "queries": lambda row: f"{row['queries']:,}",
        "k": _k,
        "cache": lambda row: row["cache"],
        "G distances/s": lambda row: f"{row['distances_per_s'] / 1e9:,.1f}",
        "queries/s": lambda row: f"{row['queries_per_s']:,.0f}",
    }
    for name, title in titles.items():
        if _has(rows, name):
            columns[title] = lambda row, name=name: _milliseconds(row["seconds"].get(name))
    if any("lowest_limit" in row for row in rows):
        columns["% of the lowest limit"] = _share_of_limit
    for name in _GPU_PEERS:
        if any(name in row["times"] for row in rows):
            columns[f"x {name}"] = lambda row, name=name: _ratio(row["times"].get(name), missing="-")
    if _has(rows, ONE_QUERY):
        columns["time / time of one query"] = lambda row: _ratio(row.get("times_one_query"), 2, missing="-")
    columns["extra MB"] = lambda row: f"{row['extra_bytes'] / 1e6:,.0f}"
    return columns


def _gpu_task(row: Row) -> str:
    share = f" {row['share']:.0%}" if row["share"] < 1 else ""
    return row["task"] + share + ("" if row["data"] == "random" else f", {row['data']}")


def _share_of_limit(row: Row) -> str:
    name = row.get("lowest_limit")
    return "-" if name is None else f"{row['of_limits'][name]:.0%} of {name}"


def _milliseconds(seconds: list[float] | None) -> str:
    return f"{1e3 * statistics.median(seconds):,.3f}" if seconds else "-"


def _latency_columns(rows: list[Row]) -> Columns:
    names = list(dict.fromkeys(name for row in rows for name in row["latency"]))

    def quantiles(row: Row, name: str) -> str:
        at = row["latency"].get(name)
        return "-" if at is None else f"{1e6 * at['p50']:,.1f} / {1e6 * at['p99']:,.1f}"

    columns: dict[str, Callable[[Row], str]] = {
        "queries": lambda row: str(row["queries"]),
        "codes": lambda row: f"{row['codes']:,} x {row['bits']}, k = {row['k']}",
    }
    return columns | {name: lambda row, name=name: quantiles(row, name) for name in names}


def plot_gpu(machines: Sequence[list[Row]], file: Path) -> None:
    """Plot distances per second against the number of codes and of queries; dashed lines show the lowest limit."""
    figure, grid = plots.new_figure(len(machines), 2, 10, 4.2 * len(machines), sharey="row")
    for rows, axes in zip(machines, grid, strict=True):
        plain = [row for row in _searches(rows) if (_gpu_task(row), row["bits"], row["k"]) == ("search", 64, 10)]
        # In the file, the row with a cold cache follows the row with a warm cache, so it replaces that row here.
        plain = list({(row["codes"], row["queries"]): row for row in plain}.values())
        for axis, along, fixed in zip(axes, ("codes", "queries"), ("queries", "codes"), strict=True):
            _draw(axis, plain, along, fixed)
            axis.set_xlabel("codes in the database" if along == "codes" else "queries in the batch", fontsize=8)
        axes[0].set_ylabel(f"{rows[-1].get('gpu') or rows[-1]['cpu']}\n64 bits, k = 10: distances/s", fontsize=8)
    plots.save_svg(figure, file)


def _draw(axis: Any, rows: list[Row], along: str, fixed: str) -> None:
    """Draw rates against the field `along`: one colour per value of the field `fixed`, one marker per system."""
    for number, value in enumerate(sorted({row[fixed] for row in rows})):
        colour = f"C{number % 10}"
        line = sorted((row for row in rows if row[fixed] == value), key=lambda row: row[along])
        for system, style in _LINE_STYLES.items():
            found = [row for row in line if system in row["seconds"]]
            rates = [row["codes"] * row["queries"] / statistics.median(row["seconds"][system]) for row in found]
            if found:
                sizes = [row[along] for row in found]
                axis.plot(sizes, rates, style, color=colour, label=f"{system}, {value:,} {fixed}", markersize=4)
        limited = [row for row in line if "lowest_limit" in row]
        if limited:
            limits = [row["limits"][row["lowest_limit"]] for row in limited]
            axis.plot([row[along] for row in limited], limits, "_--", color=colour, alpha=0.5, markersize=8)
    if rows:
        plots.set_log_scales(axis)
        axis.legend(fontsize=5, ncols=2)
