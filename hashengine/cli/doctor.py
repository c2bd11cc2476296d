"""The command doctor."""

from __future__ import annotations

import typer

from hashengine.cli._app import command, command_line

app = command_line("Diagnosis of the installation.")


@command(app)
def doctor() -> None:
    """Report what was built, what this machine can run, what is missing, and the command that repairs it."""
    from hashengine import doctor as diagnosis

    if not diagnosis.print_report():
        raise typer.Exit(1)
