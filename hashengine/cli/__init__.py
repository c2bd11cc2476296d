"""The command line: one file per group of commands. A command parses its options and calls a library function.

Results go to stdout: a table on a terminal, tab-separated lines in a pipe or a file. Everything else goes to stderr.
Exit codes: 0 success; 1 a failure of the machine, such as a full disk, or a broken part that `doctor` found; 2 a
mistake in the input, reported in one line on stderr; 130 interrupted.

Importing this package imports neither torch nor numpy, rich or pydantic. Each command imports what it needs when it
runs. The help imports rich, and that of `train fit` and `train sweep` pydantic, whose fields are their options.
"""

from typing import Annotated, Any

import typer

from hashengine._version import __version__
from hashengine.cli import demo, doctor, images
from hashengine.cli._app import Commands, command_line, flush_stdout

__all__ = ["app", "command_line", "flush_stdout"]

app = command_line("Turn images into short binary codes and search them exactly.", add_completion=True)


class TrainCommands(Commands):
    """The group `train`, which imports its commands when they are looked up."""

    _commands: dict[str, Any]

    @property
    def commands(self) -> Any:
        """The commands by name."""
        if not self._commands:
            from hashengine.cli import train

            group: Any = typer.main.get_command(train.app)
            self._commands = group.commands
        return self._commands

    @commands.setter
    def commands(self, none: Any) -> None:
        """Called by the constructor, with the commands that were registered: none."""
        self._commands = none


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
app.add_typer(command_line("Train hash networks."), name="train", cls=TrainCommands)
