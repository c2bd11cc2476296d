"""Text that leaves the program: escapes for consoles and pages, and JSON with names that are no UTF-8."""

import json
import os

import pytest
from pydantic import BaseModel

from hashengine._text import printable, to_json

NAME = os.fsdecode(b"c\xe9")


class Named(BaseModel):
    name: str


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (NAME, r"c\xe9"),
        ("a\tb\nc\rd", r"a\tb\nc\rd"),
        ("\x1b[31mred\x9b\x7f", r"\x1b[31mred\x9b\x7f"),
        ("a\u2028b\ud800", r"a\u2028b\ud800"),
        ("Zürich 東京 👩‍🚀 c:\\d", "Zürich 東京 👩‍🚀 c:\\d"),
        (7, "7"),
    ],
)
def test_unprintable_characters_are_escaped_and_others_are_not(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize("value", [Named(name=NAME), {"name": NAME}])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_returns_a_name_that_is_no_utf8(value, indent):
    text = to_json(value, indent)
    assert text.isascii() and os.fsencode(json.loads(text)["name"]) == b"c\xe9"


def test_json_of_other_names_is_that_of_pydantic():
    assert to_json(Named(name="Zürich"), 2) == Named(name="Zürich").model_dump_json(indent=2)
    with pytest.raises(ValueError, match="Unable to serialize"):
        to_json(object())


@pytest.mark.parametrize("mark", ["\u202e", "\u2066", "\u200f"])
def test_marks_that_reverse_the_direction_are_escaped(mark):
    assert printable(f"a{mark}gnp.b") == f"a\\u{ord(mark):04x}gnp.b"
