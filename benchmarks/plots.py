"""Plots as small SVG files: text is stored as text, not as outlines, and coordinates have one decimal."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hashengine.errors import missing_package

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


def new_figure(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """Make a figure of `width` x `height` inches; returns it and its axes, an array [rows, columns].

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise missing_package("report", "matplotlib", "bench") from None
    matplotlib.use("svg")
    from matplotlib import pyplot

    # A fixed salt gives the same ids, and so the same file, for the same rows.
    font = {"svg.fonttype": "none", "font.family": ["DejaVu Sans", "sans-serif"]}
    matplotlib.rcParams.update({"svg.hashsalt": "hashengine", **font})
    return pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained", **options)


def set_log_scales(axis: Any) -> None:
    """Set logarithmic axes with a grid and labels such as "0.1".

    There are no tick marks and no minor ticks, because they would make the file much larger.
    """
    from matplotlib.ticker import FuncFormatter, NullLocator

    axis.set_xscale("log")
    axis.set_yscale("log")
    for each in (axis.xaxis, axis.yaxis):
        each.set_minor_locator(NullLocator())
        each.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.tick_params(bottom=False, left=False)
    axis.grid(alpha=0.3)


def save_svg(figure: Figure, file: Path) -> None:
    """Write the figure and close it."""
    from matplotlib import pyplot

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    pyplot.close(figure)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(compact(buffer.getvalue()), encoding="utf-8")


def compact(svg: str) -> str:
    """Shorten matplotlib's SVG without visible changes.

    Comments and metadata are removed. Groups without attributes are replaced by their children. Coordinates are rounded
    to one decimal, equal styles become one CSS class, and each element is on a line of its own.
    """
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(svg)
    referenced = set(re.findall(r"#(\w+)", svg))
    for element in root.iter():
        if element.get("id") not in referenced:
            element.attrib.pop("id", None)
        for name in ("d", "transform", "x", "y", "points", "width", "height"):
            if name in element.attrib:
                element.set(name, _round_numbers(element.attrib[name]))
    _flatten(root)
    styles = list(dict.fromkeys(element.get("style") for element in root.iter() if "style" in element.attrib))
    for element in root.iter():
        if "style" in element.attrib:
            element.set("class", f"s{styles.index(element.attrib.pop('style'))}")
    sheet = root.find(f".//{{{_SVG}}}style")
    sheet.text = "".join([sheet.text, *(f"\n.s{number}{{{style}}}" for number, style in enumerate(styles))])
    ElementTree.indent(root, "")
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _round_numbers(text: str) -> str:
    rounded = re.sub(r"\d+\.\d+", lambda number: f"{float(number.group()):.1f}".removesuffix(".0"), text)
    return " ".join(rounded.split())


def _flatten(parent: ElementTree.Element) -> None:
    """Remove metadata, empty groups and empty definitions, and replace groups without attributes by their children."""
    children = []
    for child in parent:
        _flatten(child)
        tag = child.tag.removeprefix(f"{{{_SVG}}}")
        if tag == "metadata" or (tag in ("g", "defs") and len(child) == 0):
            continue
        children += list(child) if tag == "g" and not child.attrib else [child]
    parent[:] = children
