"""Runs the commands of `hashengine` in this process."""

from typing import Any

from typer.testing import CliRunner

from hashengine.cli import app


def invoke(*arguments: object) -> Any:
    """Run a command; its arguments are formatted with `str`."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Any:
    """Run a command that must succeed."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refuse(*arguments: object) -> str:
    """Run a command that must fail with exit code 2 and nothing on stdout; returns its single line on stderr."""
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr
