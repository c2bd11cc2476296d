"""Hooks that generate parts of the documentation site while mkdocs builds it.

- `project/`: copies of the files in `DOCUMENTS`, with their links changed into links within the site;
- `api/commands.md`: every command with its options, read from the definition of the command line;
- `benchmarks.md`: in docs/benchmarks.md, each marker `<!-- results: NAME -->` is replaced by tables and a plot, which
  are made from benchmarks/results.
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # to import `benchmarks`, and hashengine from this checkout

from benchmarks.report import render  # noqa: E402
from hashengine.cli import app  # noqa: E402

DOCUMENTS = {
    "ARCHITECTURE.md": "project/architecture.md",
    "csrc/README.md": "project/kernels.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "CHANGELOG.md": "project/changelog.md",
}
NOT_MEASURED = "Not measured yet.\n"
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and plots."""
    for source, page in DOCUMENTS.items():
        files.append(File.generated(config, page, content=_in_the_site(source, page)))
    files.append(File.generated(config, "api/commands.md", content="\n".join(_commands())))
    for path in render(ROOT / "benchmarks" / "results", _fragments()):
        if path.suffix == ".svg":
            files.append(File.generated(config, f"assets/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace each `<!-- results: NAME -->` by the tables and the plot of the section NAME of benchmarks/report.py."""
    return re.sub(r"<!-- results: ([\w-]+) -->", lambda match: _results(match[1]), markdown)


def _fragments() -> Path:
    return ROOT / "build" / "benchmark-results"


def _results(section: str) -> str:
    tables = _fragments() / f"{section}.md"
    plot = _fragments() / f"{section}.svg"
    if not tables.exists():
        return NOT_MEASURED
    image = f"\n\n![{section}](assets/{plot.name})\n" if plot.exists() else ""
    return tables.read_text() + image


def _in_the_site(source: str, page: str) -> str:
    """The text of a document, with links to other documents changed into links to their pages.

    A link to any other file becomes plain text: the path in backticks, after the text of the link if that is different.
    """

    def link(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if image or not path or path.startswith(("https://", "mailto:")):
            return match[0]
        document = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if document in DOCUMENTS:
            relative = posixpath.relpath(DOCUMENTS[document], posixpath.dirname(page))
            return f"[{text}]({relative}{'#' + anchor if anchor else ''})"
        return f"`{document}`" if text == path else f"{text} (`{document}`)"

    return _LINK.sub(link, (ROOT / source).read_text())


def _commands() -> Iterator[str]:
    """The lines of the page of commands: a heading, the help and a table of parameters for each command."""
    yield "# Commands\n"
    yield "Results go to stdout, everything else to stderr. Exit codes: 0 success; 1 a failure of the machine, such as "
    yield "a full disk, or a broken part that `hashengine doctor` found; 2 a mistake in the input, reported in one "
    yield "line; 130 interrupted.\n"
    command = typer.main.get_command(app)
    yield from _command(command, click.Context(command, info_name="hashengine"))


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    children = getattr(command, "commands", {})
    if not children:
        yield f"## {context.command_path}\n"
        yield f"{(command.help or '').strip()}\n"
        yield "| parameter | meaning | default |\n|---|---|---|"
        for parameter in command.params:
            record = parameter.get_help_record(context) or (
                parameter.human_readable_name,
                getattr(parameter, "help", ""),
            )
            meaning, _, rest = (record[1] or "").partition("  [")
            default = next((part[9:] for part in rest.rstrip("]").split("; ") if part.startswith("default: ")), "")
            required = "required" if parameter.required else default
            yield f"| `{record[0].replace('|', ' or ')}` | {meaning.replace('|', ' or ')} | {required} |"
        yield ""
    for name, child in children.items():
        yield from _command(child, click.Context(child, info_name=name, parent=context))
