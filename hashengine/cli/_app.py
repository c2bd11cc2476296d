"""What all commands share: the handling of errors, and the options --threads, --quiet and --log-json."""

from __future__ import annotations

import errno
import functools
import inspect
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from hashengine import _progress
from hashengine._text import printable
from hashengine.errors import UNUSABLE, InputError, brief, invalid, shown, unusable

F = TypeVar("F", bound=Callable[..., None])

UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # click.UsageError, or typer's copy of it
_LONGEST_MESSAGE = 2000  # characters; a longer error, such as that of a path of megabytes, is shortened
_NO_MEMORY = "alloc_cpu.cpp"  # part of the RuntimeError that torch raises if the host has too little memory
_GIVEN = "hashengine.given"  # where a context keeps the values of the command line, by parameter, as text
STDOUT = Path("/dev/stdout")
MISTAKE, FAILURE = 2, 1  # exit codes: a mistake in the input; a failure of the machine


class Commands(TyperGroup):
    """A group of commands that reports expected errors and warnings in one line.

    Any other exception keeps its traceback.
    """

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command line or a completion of the shell.

        Refuses a completion for bash if the variables that bash sets are missing.
        """
        is_bash = os.environ.get("_HASHENGINE_COMPLETE") == "complete_bash"
        if is_bash and not ("COMP_WORDS" in os.environ and os.environ.get("COMP_CWORD", "").isdecimal()):
            expected = "those that bash sets during a completion"
            error = invalid("hashengine", "COMP_WORDS and COMP_CWORD", expected, "others", "unset _HASHENGINE_COMPLETE")
            _write_error(str(error))
            sys.exit(MISTAKE)
        return super().main(*args, **extra)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Parse the arguments of the group; a mistake in them is reported in one line."""
        if parent is None:  # before the arguments are parsed, so that both also apply to mistakes in them
            _escape_what_the_console_lacks()
            _progress.configure(log_json="--log-json" in args)
            warnings.showwarning = _note_warning  # type: ignore[assignment]
        try:
            return super().make_context(info_name, args, parent, **extra)
        except UsageError as error:
            _report_usage(error)
        except BrokenPipeError:
            raise
        except OSError as error:  # --help and --version print here
            _report(str(error), FAILURE)

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters of the group."""
        parameters: list[Any] = super().get_params(ctx)
        for parameter in parameters:
            # Typer's own flags, such as --help. For a value other than a bool, typer would import pydantic.
            if getattr(parameter, "is_flag", False) and parameter.default is None:
                parameter.default = False
        return parameters

    def invoke(self, ctx: Any) -> Any:
        """Run the command that `ctx` names."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the program that reads stdout, such as `head`, has closed it; typer exits without a message
        except UsageError as error:
            _report_usage(error)
        except Exception as error:
            if not _is_expected(error):
                raise
            where = f"{ctx.command_path} {ctx.invoked_subcommand}".partition(" ")[2]
            mistake = error if _is_mistake(error) else _unusable_path(where, error)
            _report(str(mistake or error), MISTAKE if mistake else FAILURE)


class Command(TyperCommand):
    """A command that refuses empty values, which would become the working folder, and takes "./-" for a file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of the command."""
        if args and not ctx.resilient_parsing:
            given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
            ctx.meta[_GIVEN] = given
            for name, value in given.items():
                if "" in (value if isinstance(value, (list, tuple)) else (value,)):
                    raise empty_value(ctx.command_path.partition(" ")[2], name)
        rest = super().parse_args(ctx, args)
        for name, value in ctx.meta.get(_GIVEN, {}).items():
            if isinstance(value, str) and value != "-" and ctx.params.get(name) == Path("-"):
                ctx.params[name] = Path.cwd() / "-"  # `Path` shortens "./-", a file, to "-", which is stdout
        return rest


def empty_value(where: str, name: str) -> InputError:
    """The error for an option or argument whose value is an empty string."""
    return invalid(where, name, "a value that is not empty", "an empty string", "a variable of the shell may be unset")


def _escape_what_the_console_lacks() -> None:
    """Make stdout and stderr escape a character that their encoding lacks; otherwise printing it raises an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_stdout(code: Any) -> Any:
    """Write what stdout still holds, and return the exit code: `code`, or `FAILURE` if the disk is full.

    Python itself would do that when it ends, and print a traceback.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python will try again
        if not code and not isinstance(error, BrokenPipeError):  # otherwise the error was reported
            _write_error(f"{error}: 'stdout'")
            return FAILURE
    return code


def _note_warning(message: Warning | str, *place: object) -> None:
    """Replaces `warnings.showwarning`, which writes two lines, with the place in the source."""
    _progress.note("warning: " + brief(message, _LONGEST_MESSAGE))


def _report(message: str, code: int) -> NoReturn:
    """Write an error in one line, and exit."""
    _write_error(message)
    raise typer.Exit(code) from None


def _write_error(message: str) -> None:
    message = brief(message, _LONGEST_MESSAGE)
    if _progress.logs_json():
        _progress.write_json("error", message=message)
    else:
        with suppress(OSError):  # stderr is closed or its disk is full: the exit code still tells what happened
            typer.echo(f"error: {printable(message)}", err=True)


def _report_usage(error: Any) -> NoReturn:
    """Report a mistake that typer found on the command line, in the form of `hashengine.errors`."""
    kind = type(error).__name__
    if kind == "NoArgsIsHelpError":  # a group was called without a command: typer prints its help
        raise error
    command = error.ctx.command_path if error.ctx else ""
    where = command.partition(" ")[2] or "hashengine"
    parameter = getattr(error, "param", None)
    if kind == "NoSuchOption":
        _report(f"{where}: {error.option_name!r} must be a known option, got an unknown one", MISTAKE)
    if kind == "MissingParameter" and parameter is not None:
        _report(f"{where}: {parameter.name} must be given", MISTAKE)
    message = error.message.strip().rstrip(".")
    if parameter is None:
        _report(f"{where}: {message[:1].lower()}{message[1:]}", MISTAKE)
    if found := re.fullmatch(r"\w+ (.+) is not readable", message, re.DOTALL):
        _report(str(unusable(where, parameter.name, found[1], os.strerror(errno.EACCES))), MISTAKE)
    words = re.sub(r"^\w+ should ", "must ", message)
    if words == message:
        _report(f"{where}: {parameter.name}: {message}", MISTAKE)
    given = error.ctx.meta.get(_GIVEN, {}).get(parameter.name) if error.ctx else None
    got = "" if given is None else f", got {brief(shown(given))}"
    _report(f"{where}: {parameter.name} {words.partition(', ')[0]}{got}", MISTAKE)


def _is_expected(error: Exception) -> bool:
    """Whether the policy of `hashengine.errors` allows this exception to reach a user."""
    torch = sys.modules.get("torch")
    is_out_of_memory = isinstance(error, MemoryError)
    if torch is not None:
        is_out_of_memory |= isinstance(error, torch.cuda.OutOfMemoryError)
        is_out_of_memory |= type(error) is RuntimeError and _NO_MEMORY in str(error)
    return isinstance(error, OSError) or is_out_of_memory or _is_mistake(error)


def _is_mistake(error: Exception) -> bool:
    """Whether `error` is an `InputError`, or a native op's `ValueError`, which is raised by a call in `torch._ops`."""
    if isinstance(error, InputError) or not isinstance(error, ValueError):
        return isinstance(error, InputError)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__") == "torch._ops"


def _unusable_path(where: str, error: Exception) -> InputError | None:
    """The mistake behind an error of the system about a path; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in UNUSABLE or error.filename is None:
        return None
    path, use = Path(error.filename), "used"
    if error.errno in (errno.EACCES, errno.EPERM):
        nearest = next(found for found in (path, *path.parents) if os.path.lexists(found))
        needed = os.R_OK if nearest == path else os.X_OK
        use = "written to" if os.access(nearest, needed) else "read"
    return unusable(where, "a file or folder", repr(str(path)), error.strerror, use)


def command_line(help: str, *, add_completion: bool = False) -> typer.Typer:
    """Make a command line without commands, which reports errors as described at `Commands`."""
    return typer.Typer(
        cls=Commands, help=help, no_args_is_help=True, add_completion=add_completion, pretty_exceptions_enable=False
    )


Threads = Annotated[
    int | None,
    typer.Option(help="CPU threads of torch and of the search.", show_default="all", rich_help_panel="Common"),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", help="Write neither progress nor notes to stderr.", rich_help_panel="Common")
]
LogJson = Annotated[
    bool, typer.Option("--log-json", help="Write progress and notes to stderr as JSON lines.", rich_help_panel="Common")
]

_COMMON = [
    inspect.Parameter("threads", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Threads),
    inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet),
    inspect.Parameter("log_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=LogJson),
]


def command(app: typer.Typer, before: Callable[[], None] | None = None, **settings: Any) -> Callable[[F], F]:
    """Register a function as a command of `app` that also takes the common options.

    Args:
        app: the command line.
        before: a function that is called first, before torch is imported.
        settings: passed on to `typer.Typer.command`.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def run(**given: Any) -> None:
            _check_working_folder()
            if before is not None:
                before()
            _apply(given.pop("threads"), given.pop("quiet"), given.pop("log_json"))
            function(**given)

        signature = inspect.signature(function, eval_str=True)
        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in signature.parameters.values()]
        combined = inspect.Signature([*own, *_COMMON], return_annotation=None)
        run.__signature__ = combined  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in combined.parameters.values()}
        app.command(cls=Command, **settings)(run)
        return function

    return decorate


def _check_working_folder() -> None:
    """Require a working folder. Without one, libraries that torch loads end the process with messages of their own."""
    try:
        os.getcwd()
    except FileNotFoundError:
        advice = "change to another folder"
        raise invalid("hashengine", "the working folder", "present", "one that was removed", advice) from None


def _apply(threads: int | None, quiet: bool, log_json: bool) -> None:
    _progress.configure(quiet=quiet, log_json=log_json)
    if threads is not None:
        from hashengine._validation import MOST_THREADS, check_integer  # imports numpy

        check_integer("hashengine", "threads", threads, 1, MOST_THREADS)
        import torch

        torch.set_num_threads(threads)  # a search uses this number too, unless it is given another one


DeviceOption = Annotated[
    str, typer.Option(help="Where the network runs: auto, cpu, cuda or cuda:1; auto takes a GPU if there is one.")
]
BatchSize = Annotated[int, typer.Option(help="Images per call of the network.")]
IndexFolder = Annotated[Path, typer.Argument(help="A folder written by 'hashengine index'.", show_default=False)]


def stdout_for_dash(output: Path | None) -> Path | None:
    """The path to write to: "-" stands for stdout."""
    return STDOUT if output == Path("-") else output


def print_table(columns: tuple[str, ...], rows: list[tuple[object, ...]], title: str | None = None) -> None:
    """Print a table if stdout is a terminal, otherwise tab-separated lines with a header.

    A tab, a line break and other unprintable characters in a cell are escaped.
    """
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            print(*map(printable, row), sep="\t")
        return
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    headers = (Column(Text(printable(name))) for name in columns)  # a Text, because brackets in a string are styles
    table = Table(*headers, title=None if title is None else Text(printable(title)))
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(table)
