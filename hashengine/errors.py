"""The exception policy: one exception, in one form, for every mistake of a user.

`InputError` is raised for whatever a caller can put right: a value out of range, a wrong dtype or shape, a missing
device, a damaged file, an optional package that is not installed. Its message is one line of this form::

    <where>: <what> must be <expected>, got <actual>[; <what to do>]

    search: k must be 1 to 50, got 0
    add: codes must be uint8, got float32; pack activations with hashengine.ops.pack_bits first
    HashNet.from_pretrained: model must be a folder with config.json, got 'photos'

``<where>`` is the function, command or file that the user named. `InputError` is a ``ValueError``, so ``except
ValueError`` catches it too. The native ops below ``torch.ops.hashengine`` raise a plain ``ValueError`` of the same form.

Two other kinds pass through unchanged: ``OSError`` where the machine refuses (a full disk, no permission) and
``torch.cuda.OutOfMemoryError``. The commands print both kinds and `InputError` in one line. Any other exception is a
defect of hashengine, and its traceback is the bug report.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing hashengine must not import pydantic
    from pydantic import ValidationError


class InputError(ValueError):
    """A mistake in what the user gave; the message is one line that says how to put it right.

    Commands print the message without a traceback and exit with code 2.
    """


def invalid(where: str, what: str, expected: str, actual: object, advice: str = "") -> InputError:
    """Make an `InputError` of the one form.

    Args:
        where: the function, command or file that the user named.
        what: the argument, option or field that is wrong.
        expected: what it must be, worded to follow "must be".
        actual: what came instead; formatted with ``str``.
        advice: what to do about it, if that does not follow from `expected`.
    """
    return InputError(f"{where}: {what} must be {expected}, got {actual}" + (f"; {advice}" if advice else ""))


def input_error(error: ValidationError, where: str) -> InputError:
    """Turn the first failure of a pydantic validation into an `InputError` that names `where` and the field."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    prefix = ": ".join(part for part in (where, field) if part)
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] in ("missing", "extra_forbidden") else f", got {first['input']!r}"
    return InputError(f"{prefix}: {message}{got}" if prefix else message + got)
