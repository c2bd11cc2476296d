"""The command line: one file per group of commands. A command parses its options and calls a library function.

Results go to stdout: a table on a terminal, tab-separated lines in a pipe or a file. Everything else goes to stderr.
Exit codes: 0 success; 1 a failure of the machine, such as a full disk, or a broken part that `doctor` found; 2 a
mistake in the input, reported in one line on stderr; 130 interrupted.

Importing this package does not import torch. Each command imports what it needs when it runs.
"""

from typing import Annotated

import typer

from hashengine._version import __version__
from hashengine.cli import demo, doctor, images, train
from hashengine.cli._app import command_line

__all__ = ["app", "command_line"]

app = command_line("Turn images into short binary codes and search them exactly.")


def _print_version(is_given: bool) -> None:
    if is_given:
        print(f"hashengine {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


for group in (images, demo, doctor):
    app.registered_commands += group.app.registered_commands
app.add_typer(train.app, name="train")
