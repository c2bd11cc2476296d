"""Tables from the result rows of the benchmark `model`."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness import Row, read_rows
from benchmarks.kernels.report import machine_line
from benchmarks.tables import Columns, markdown_table

_KEY = ("model", "attention", "pass", "system", "batch", "size", "dtype", "layout")

COLUMNS: Columns = {
    "system": lambda row: row["system"],
    "images/s": lambda row: f"{row['images_per_second']:,.1f}",
    "% of the rate without attention": lambda row: f"{100 * row['of_plain']:.0f}",
    "peak MB": lambda row: f"{row['peak_bytes'] / 1e6:,.0f}",
}
_WORKLOAD_COLUMNS: Columns = {
    "network": lambda row: row["model"],
    "attention": lambda row: row["attention"],
    "pass": lambda row: row["pass"],
    "batch": lambda row: f"{row['batch']} x {row['size']} px, {row['dtype']} {row['layout']}",
}


def files(folder: Path) -> list[Path]:
    """The result files of the benchmark `model`."""
    return sorted(folder.glob("model-*.jsonl"))


def read(file: Path) -> list[Row]:
    """The newest row of each measurement."""
    return read_rows(file, _KEY)


def tables(rows: list[Row]) -> str:
    """The table of one machine."""
    return f"{machine_line(rows[-1])}:\n\n{markdown_table({**_WORKLOAD_COLUMNS, **COLUMNS}, rows)}"
