"""The command doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from hashengine.cli._app import command, command_line

app = command_line("Diagnosis of the installation.")


@command(app)
def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Only read what is installed: run nothing.")] = False,
) -> None:
    """Report what was built, what this machine can run, what is missing, and the command that repairs it."""
    from hashengine import doctor as diagnosis

    if not diagnosis.print_report(quick):
        raise typer.Exit(1)
