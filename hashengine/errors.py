"""The one exception for a user's mistake, and how a failed validation becomes one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the core needs torch and numpy alone
    from pydantic import ValidationError


class InputError(ValueError):
    """A mistake in what the user gave, told in one line: which argument, what was expected, what came, what to do.

    The command lines print the message alone, without a traceback, and exit with code 2.
    """


def input_error(error: ValidationError, source: str = "") -> InputError:
    """The first complaint of a pydantic `error` as one line: `source: field: message, got value`."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] in ("missing", "extra_forbidden") else f", got {first['input']!r}"
    return InputError(": ".join(part for part in (source, field, message + got) if part))
