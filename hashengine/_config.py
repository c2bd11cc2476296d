"""The base class of the options of networks, methods and training runs."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self

from hashengine.errors import input_error


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
