"""Makes command-line options from the fields of a pydantic model, which declare name, type, default and help."""

from __future__ import annotations

import contextlib
import inspect
import math
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hashengine.cli._app import empty_value
from hashengine.errors import invalid

_SCALARS = (bool, int, float, str, Path)


def options_of(model: type[BaseModel], exclude: Iterable[str] = ()) -> list[inspect.Parameter]:
    """A parameter for each field of `model` that has a description.

    The value of an option that is not given is None. A field of several values, such as a tuple, becomes one option
    with comma-separated values.
    """
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name, field))
        for name, field in model.model_fields.items()
        if field.description and name not in exclude
    ]


def with_options(*parameters: inspect.Parameter) -> Any:
    """Decorate a function: replace `**options` by `parameters` in the signature that typer reads."""

    def decorate(function: Any) -> Any:
        own = inspect.signature(function, eval_str=True).parameters.values()
        fixed = [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.kind is not p.VAR_KEYWORD]
        function.__signature__ = inspect.Signature([*fixed, *parameters], return_annotation=None)
        return function

    return decorate


def given(model: type[BaseModel], options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given on the command line, as values for the fields of `model`."""
    return {
        name: _value(model.model_fields[name], value)
        for name, value in options.items()
        if value is not None and name in model.model_fields
    }


def unknown_options(where: str, arguments: list[str]) -> dict[str, Any]:
    """Parse options that the command does not declare: `--name value` or `--name=value`, with a value for `parse`.

    Raises:
        InputError: an argument is not of that form, or a value is empty.
    """
    options: dict[str, Any] = {}
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        name, has_value, value = argument.partition("=")
        if not name.startswith("--") or (not has_value and not remaining):
            raise invalid(where, "an argument", "'--option value'", repr(argument))
        text = value if has_value else remaining.pop(0)
        option = name.removeprefix("--").replace("-", "_")
        if not text:
            raise empty_value(where, option)
        options[option] = parse(text)
    return options


def parse(text: str) -> Any:
    """A value of an option whose type is not known: a decimal number, true or false; any other text stays as it is."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    return text


def parse_option(model: type[BaseModel], name: str, text: str) -> Any:
    """A value of the field `name` of `model`, or of an option that is no field. Text and paths stay as they are."""
    field = model.model_fields.get(name)
    return text if field is not None and _kind(field) in (str, Path) else parse(text)


def _annotation(name: str, field: FieldInfo) -> Any:
    kind = _kind(field)
    default = "" if field.is_required() or field.default is None else _text(field.default)
    option = typer.Option(
        f"--{name.replace('_', '-')}" + (f"/--no-{name.replace('_', '-')}" if kind is bool else ""),
        *(["-o"] if name == "output" else []),  # as for the other commands
        help=(field.description or "")[:1].upper() + (field.description or "")[1:] + ".",
        show_default=default or False,
        metavar=_metavar(kind),
    )
    return Annotated[(kind if kind in _SCALARS else str) | None, option]


def _kind(field: FieldInfo) -> Any:
    """The type of a field, without `None` and without constraints."""
    kind: Any = field.annotation
    while True:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        elif get_origin(kind) in (Union, types.UnionType):
            (kind,) = (part for part in get_args(kind) if part is not type(None))
        else:
            return kind


def _metavar(kind: Any) -> str | None:
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    return None if kind in _SCALARS else "VALUE,VALUE,..."


def _value(field: FieldInfo, value: Any) -> Any:
    kind = _kind(field)
    if get_origin(kind) is Literal:
        return {str(choice): choice for choice in get_args(kind)}.get(value, value)
    return [parse(part) for part in value.split(",")] if kind not in _SCALARS else value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
