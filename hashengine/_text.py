r"""Text that leaves the program: names on consoles and pages, and JSON.

A file name is any sequence of bytes. Python decodes a byte that is no UTF-8 to a lone surrogate, such as "\udce9" for
0xe9, and encodes it back to the same byte. Strict writers of UTF-8 refuse such a name.
"""

from __future__ import annotations

import json
import re
from typing import Any

# Control characters, line separators, lone surrogates, and marks that reverse the direction of the text after them.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """`text` in one line that every console and page can show: an unprintable character or byte becomes its escape."""
    return _UNPRINTABLE.sub(_escape, str(text))


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a name that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return found[0].encode("unicode_escape").decode()


def counted(number: int, noun: str) -> str:
    """A number and a regular noun in the singular or the plural: "1 image", "2 images"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def to_json(value: Any, indent: int | None = None) -> str:
    """A plain value or a pydantic model as JSON. A lone surrogate becomes an escape, which `json.loads` turns back."""
    import pydantic_core

    try:
        return pydantic_core.to_json(value, indent=indent).decode()
    except pydantic_core.PydanticSerializationError as error:
        if "surrogates not allowed" not in str(error):
            raise
        return json.dumps(pydantic_core.to_jsonable_python(value), indent=indent)
