"""The base class of the options of networks, methods and training runs."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError
from typing_extensions import Self

from hashengine._validation import as_integer
from hashengine.errors import input_error


def _check_integer(value: Any) -> int:
    number = as_integer(value)
    if number is None:
        raise ValueError("must be a valid integer")
    return number


def _check_number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a valid number")
    return value


def _check_seed(seed: int) -> int:
    if not 0 <= seed < 1 << 64:  # pydantic's message would round the bound
        raise ValueError(f"must be 0 to {(1 << 64) - 1}")
    return seed


# The types of numeric options. Pydantic alone would take True and 8.0 for integers, and True for a number. A number may
# also be a string, because YAML reads 4e-3 as one.
Integer = Annotated[int, BeforeValidator(_check_integer)]
Seed = Annotated[Integer, AfterValidator(_check_seed)]
Number = Annotated[float, BeforeValidator(_check_number)]


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
