"""The exception policy: the messages for a mistake, for a missing package and for a failure of pydantic."""

from __future__ import annotations

from typing import Annotated

import pytest
from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from hashengine._config import Config
from hashengine.errors import InputError, brief, invalid, missing_package


class Options(Config):
    bits: Annotated[int, Field(gt=0)] = 8
    names: Annotated[tuple[str, ...], Field(min_length=2)] = ("a", "b")
    pair: tuple[int, ...] = ()

    @field_validator("bits")
    @classmethod
    def _is_whole_bytes(cls, bits: int) -> int:
        if bits % 8:
            raise ValueError("must be a multiple of 8")
        return bits

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.pair) == 1:
            raise ValueError("pair must be of 0 or 2 numbers, got 1")
        if len(self.pair) == 3:
            raise invalid("pairs", "pair", "of 2 numbers", 3)
        return self


def test_a_mistake_is_a_value_error_of_one_line() -> None:
    error = invalid("search", "k", "1 to 50", 0)
    assert isinstance(error, InputError) and isinstance(error, ValueError)
    assert str(error) == "search: k must be 1 to 50, got 0"
    assert str(invalid("add", "codes", "uint8", "bool", "pack them")) == "add: codes must be uint8, got bool; pack them"


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    expected = "hamming: faiss must be installed, got no such package; pip install 'hashengine[bench]'"
    assert str(missing_package("hamming", "faiss", "bench")) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 12}, "Options: bits must be a multiple of 8, got 12"),
        ({"bits": 0}, "Options: bits must be greater than 0, got 0"),
        ({"bits": "x"}, "Options: bits must be a valid integer, got 'x'"),
        ({"bits": 8.5}, "Options: bits must be a valid integer, got 8.5"),
        ({"names": ("a",)}, "Options: names must be of at least 2 items, got ('a',)"),
        ({"names": 5}, "Options: names must be a valid tuple, got 5"),
        ({"pair": (1,)}, "Options: pair must be of 0 or 2 numbers, got 1"),
        ({"pair": (1, 2, 3)}, "pairs: pair must be of 2 numbers, got 3"),
        ({"colour": 1}, "Options: 'colour' must be a known option, got an unknown one"),
    ],
)
def test_a_failure_of_pydantic_becomes_an_input_error(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Options(**values)
    assert str(caught.value) == message


LONG = "x" * 100_000


@pytest.mark.parametrize(
    "values", [{"bits": LONG}, {"names": LONG}, {"pair": [LONG]}, {LONG: 1}, {"names": [LONG, [LONG]]}]
)
def test_an_error_shows_at_most_a_line_of_a_long_value(values: dict[str, object]) -> None:
    with pytest.raises(InputError) as caught:
        Options(**values)
    assert len(str(caught.value)) < 500


def test_a_long_text_loses_its_middle_and_its_line_breaks() -> None:
    assert brief(f"begin {LONG} end", 30) == "begin xxxxxx ... xxxxxxxx end"
    assert brief(" a  b\n c\n") == "a  b c"
    assert len(str(invalid("load", "the file", "JSON", LONG))) < 1100


def test_a_message_is_one_line_whatever_its_parts_contain():
    error = invalid("a\nb", "the size of x\ny", "at\nleast 1", "2\n3", "do\nthis")
    assert str(error) == "a b: the size of x y must be at least 1, got 2 3; do this"
