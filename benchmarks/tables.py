"""Tables of result rows: the same columns as Markdown and on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from benchmarks.harness import Row

if TYPE_CHECKING:  # Markdown tables can be made without rich
    from rich.table import Table

Columns = Mapping[str, Callable[[Row], str]]  # maps each title to the function that formats a row's cell


def markdown_table(columns: Columns, rows: Sequence[Row]) -> str:
    """A Markdown table with one line per row."""
    return markdown_lines(list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def markdown_lines(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; `lines` has the cells of each line."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *lines))


def rich_table(columns: Columns, rows: Sequence[Row], caption: str | None = None) -> Table:
    """A table for a rich console, with one line per row."""
    from rich.table import Table

    table = Table(*columns, caption=caption)
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    return table


def by(shape: Sequence[int], separator: str = " x ") -> str:
    """A shape as text, such as "32 x 64 x 56 x 56"."""
    return separator.join(map(str, shape))
