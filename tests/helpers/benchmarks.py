"""Runs the commands of the benchmarks in this process, and reads the rows that they write."""

import json
from pathlib import Path

from typer.testing import CliRunner, Result

from benchmarks.__main__ import app


def run_command(*arguments: object) -> Result:
    """Run `python -m benchmarks` with these arguments. The command may fail."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def invoke(*arguments: object) -> str:
    """Run `python -m benchmarks` with these arguments. The command must succeed; its output is returned."""
    result = run_command(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def assert_refused(message: str, *arguments: object) -> None:
    """Check that the command fails with exit code 2 and one line on stderr that starts with "error: " and `message`."""
    result = run_command(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1, result.stderr


def read_lines(file: Path) -> list[dict]:
    """The rows of a results file."""
    return [json.loads(line) for line in file.read_text().splitlines()]
