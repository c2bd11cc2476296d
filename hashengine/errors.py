"""The exception policy: which mistakes and failures raise which exception.

`InputError` is raised for a mistake that the caller can correct: a value out of range, a wrong dtype or shape, a
missing device, a damaged file, an optional package that is not installed. Its message is one line of this form:

    <where>: <what> must be <expected>, got <actual>[; <what to do>]

    search: k must be 1 to 50 (the number of codes), got 0
    add: codes must be uint8, got float32; pack activations with hashengine.ops.pack_bits first
    encode: model must be a model folder that holds model.safetensors, got 'photos': No such file or directory

`<where>` is the function or command that the user called, or the file that the user named. `InputError` is a
`ValueError`, so `except ValueError` catches it too. The ops in `torch.ops.hashengine` raise a plain `ValueError` with a
message of the same form. A function or layer that calls an op lets this `ValueError` through, because an op's arguments
are checked only in the kernel that runs.

Other exceptions have these meanings:

- `OSError`: the operating system reports a failure, such as a full disk. It passes through unchanged, except that one
  about a temporary file, or about none, names the output that was written.
- `torch.cuda.OutOfMemoryError`: a GPU is full. It passes through unchanged.
- torch's `RuntimeError` or `TypeError`: an argument of an op, a layer or a network has a Python type that torch refuses
  before the op runs, such as a numpy array for a tensor.
- `ImportError`: HASHENGINE_REQUIRE_NATIVE is set, and the native module cannot be loaded.
- `NotImplementedError`: `loss` was called on a hashing method that has only a closed form, or `fit` on a method that
  has only a loss.

The commands print `InputError`, the `ValueError` of an op, `OSError` and `OutOfMemoryError` in one line. An `OSError`
that a user can correct, such as a missing permission or a name that is too long, is a mistake there. Any other
exception in a command, except the `ImportError` above, is a defect of hashengine, and its traceback is the bug report.
"""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing hashengine must not import pydantic
    from pydantic import ValidationError


_LEFT_OUT = " ... "
_LONGEST_ACTUAL = 1000  # characters; a path and a reason from the system fit


class InputError(ValueError):
    """A mistake in the user's input; the message is one line that says what to correct.

    Commands print the message without a traceback and exit with code 2.
    """


def invalid(where: str, what: str, expected: str, actual: object, advice: str = "") -> InputError:
    """Make an `InputError` with a message in the form that this module describes.

    Args:
        where: the function or command that the user called, or the file that the user named.
        what: the argument, option or field that is wrong.
        expected: the words that follow "must be".
        actual: the value that was given, or its description; formatted with `str`.
        advice: what the user can do, if that does not follow from `expected`.
    """
    where, what, expected, advice = (brief(part, _LONGEST_ACTUAL) for part in (where, what, expected, advice))
    got = brief(actual, _LONGEST_ACTUAL)
    return InputError(f"{where}: {what} must be {expected}, got {got}" + (f"; {advice}" if advice else ""))


def brief(text: object, length: int = 200) -> str:
    """`text` in one line of at most `length` characters; the middle of a longer one is left out.

    A value from a damaged file may be as long as the file.
    """
    line = " ".join(part.strip() for part in str(text).splitlines())
    half = (length - len(_LEFT_OUT)) // 2
    return line if len(line) <= length else line[:half] + _LEFT_OUT + line[-half:]


def shown(value: object) -> str:
    """The `repr` of a value, or the size of an integer that has too many digits for Python to convert it to text."""
    try:
        return repr(value)
    except ValueError:  # sys.get_int_max_str_digits
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


# The system's reasons why a path cannot be used: a missing permission, something else in the place of a file or of a
# folder, or a name that no file can have.
UNUSABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG
)  # fmt: skip


def unusable(where: str, what: str, path: str, reason: str | None, use: str = "read") -> InputError:
    """The error for a file or a folder that the system does not let this user read or write.

    Args:
        where: as for `invalid`.
        what: as for `invalid`.
        path: the `repr` of its path.
        reason: the words of the system.
        use: what is not possible: "read", "written to", or "used" for either.
    """
    return invalid(where, what, f"one that can be {use}", f"{path}, which cannot be {use} ({reason})")


def missing_package(where: str, package: str, extra: str) -> InputError:
    """The error for an optional package that `where` needs and that the extra `extra` of hashengine installs."""
    return invalid(where, package, "installed", "no such package", f"pip install 'hashengine[{extra}]'")


def input_error(error: ValidationError, where: str) -> InputError:
    """Convert a failure of a pydantic validation to an `InputError` that names `where` and the field.

    It is the first one. A missing field comes last, because it may have been given under a mistyped name.

    A validator of a field raises `ValueError("must be <expected>")`. A validator of a whole options class raises
    `ValueError("<field> must be <expected>, got <actual>")`.
    """
    first = min(error.errors(include_url=False), key=lambda found: found["type"] == "missing")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):  # a validator has written the whole message
        return cause
    field = brief(".".join(str(part) for part in first["loc"]))
    if first["type"] == "extra_forbidden":
        return invalid(where, repr(field), "a known option", "an unknown one")
    if first["type"] == "missing":
        return invalid(where, field, "given", "nothing")
    message = brief(first["msg"].removeprefix("Value error, "))
    if not field and re.search(r"\bmust be .*, got ", message):
        return InputError(f"{where}: {message}")
    return invalid(where, field or "the input", _expected(message), brief(shown(first["input"])))


def _expected(message: str) -> str:
    """The words that follow "must be", derived from a message of pydantic or of a validator."""
    if found := re.match(r"\w+ should have (at (?:least|most) \d+ \w+)", message):
        return f"of {found[1]}"
    if found := re.match(r"(?:\w+ should|must) be (.*?)(?:, (?:unable to|got) .*)?$", message):
        return found[1]
    return f"valid ({message[:1].lower()}{message[1:]})"
