"""The base class of the options of networks, methods and training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError
from typing_extensions import Self

from hashengine._validation import as_integer, is_path
from hashengine.errors import input_error


def _check_integer(value: Any) -> int:
    number = as_integer(value)
    if number is None:
        raise ValueError("must be a valid integer")
    return number


def _check_choice(value: Any) -> Any:
    """Refuse a value such as True or 1.0, which pydantic takes for the choice 1. It refuses all strings itself."""
    return value if isinstance(value, str) else _check_integer(value)


def _check_number(value: Any) -> Any:
    if isinstance(value, bool):
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

    @classmethod
    def checked(cls, where: str, /, **values: Any) -> Self:
        """Construct from `values`. An error names the argument `where`, such as a file, not the attribute `where`."""
        new = cls.__new__(cls)
        try:
            cls.__pydantic_validator__.validate_python(values, self_instance=new)
        except ValidationError as error:
            raise input_error(error, where) from None
        return new
