"""The base class of the options of networks, methods and training runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from typing_extensions import Self

from hashengine._validation import as_integer, is_bool, is_path
from hashengine.errors import InputError, brief, input_error, invalid, shown


def _check_integer(value: Any) -> int:
    number = as_integer(value)
    if number is None:
        raise ValueError("must be a valid integer")
    return number


def _check_choice(value: Any) -> Any:
    """Refuse a value such as True or 1.0, which pydantic takes for the choice 1. It refuses all strings itself."""
    return value if isinstance(value, str) else _check_integer(value)


def _check_number(value: Any) -> Any:
    if is_bool(value):
        raise ValueError("must be a valid number")
    return value


def _check_flag(value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError("must be true or false")
    return bool(value)


def _check_path(value: Any) -> Any:
    if value == "":
        raise ValueError("must be a path ('.' is the working folder)")
    if isinstance(value, (int, float)):  # YAML reads a path of digits as a number
        raise ValueError("must be a path (with quotes in a YAML file if it looks like a number)")
    if isinstance(value, str) and not is_path(value):
        raise ValueError("must be a path that a file system can have")
    return value


def _check_seed(seed: int) -> int:
    if not 0 <= seed < 1 << 64:  # pydantic's message would round the bound
        raise ValueError(f"must be 0 to {(1 << 64) - 1}")
    return seed


# The types of options. Pydantic alone would take True and 8.0 for integers, True for a number, 1 and "yes" for a flag,
# and an empty string for the path of the working folder. A number may also be a string, because YAML reads 4e-3 as one.
Integer = Annotated[int, BeforeValidator(_check_integer)]
IntegerChoice = BeforeValidator(_check_choice)  # annotates a Literal of integers
Seed = Annotated[Integer, AfterValidator(_check_seed)]
Number = Annotated[float, BeforeValidator(_check_number)]
Flag = Annotated[bool, BeforeValidator(_check_flag)]
GivenPath = Annotated[Path, BeforeValidator(_check_path)]


class Config(BaseModel):
    """A frozen pydantic model that rejects unknown fields and reports a mistake as an `InputError` of one line.

    Attributes:
        where: the function or command that an error names; if it is empty, the error names the class.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    where: ClassVar[str] = ""

    def __init__(self, /, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise input_error(error, self.where or type(self).__name__) from None

    @model_validator(mode="before")
    @classmethod
    def _have_an_order(cls, values: Any) -> Any:
        """Refuse sets, because pydantic would convert them to tuples in an arbitrary order."""
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, (set, frozenset)):
                raise ValueError(f"{name} must be a list or a tuple, which has an order, got {brief(shown(value))}")
        return values

    if not TYPE_CHECKING:  # a type checker would allow assignments to any name

        def __setattr__(self, name: str, value: Any) -> None:
            try:
                super().__setattr__(name, value)
            except ValidationError:
                raise self._frozen(name, f"the new value {brief(shown(value))}") from None

        def __delattr__(self, name: str) -> None:
            try:
                super().__delattr__(name)
            except ValidationError:
                raise self._frozen(name, "a deletion") from None

    def _frozen(self, name: str, actual: str) -> InputError:
        made = f"{type(self).__name__}(**config.model_dump() | {{{name!r}: ...}})"
        advice = f"make another configuration: {made}"
        return invalid(self.where or type(self).__name__, name, "left as it was constructed", actual, advice)

    @classmethod
    def require(cls, config: Any) -> None:
        """Require that the argument `config` of the function that an error names is of this class."""
        if not isinstance(config, cls):
            advice = f"pass {cls.__name__}(...)"
            raise invalid(cls.where or cls.__name__, "config", f"a {cls.__name__}", type(config).__name__, advice)

    @classmethod
    def checked(cls, where: str, /, **values: Any) -> Self:
        """Construct from `values`. An error names the argument `where`, such as a file, not the attribute `where`."""
        new = cls.__new__(cls)
        try:
            cls.__pydantic_validator__.validate_python(values, self_instance=new)
        except ValidationError as error:
            raise input_error(error, where) from None
        return new
