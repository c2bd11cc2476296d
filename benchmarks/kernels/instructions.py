"""`instructions`: the machine instructions that kernels execute per unit of work, beside the numbers in their banners.

No GPU is needed. instruction_counts.json has one path per row: a kernel, and how often its branches are taken for one
input. A count depends on the compiler, so it holds for one release of nvcc.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.kernels.disassembly import (
    CSRC,
    Code,
    compile_cubin,
    disassemble_with_lines,
    find_disassembler,
    find_nvcc,
)
from benchmarks.kernels.executed import Branches, count_instructions, describe_branches
from hashengine.errors import invalid

COUNTS = Path(__file__).with_name("instruction_counts.json")
NVCC_RELEASE = "13.0"
ARCHITECTURE = "90a"
TOLERANCE = 0.15  # of the number in the banner

_WARP_THREADS = 32


@dataclass(frozen=True)
class CountedPath:
    """A kernel on one input.

    Attributes:
        name: such as "triplet pool, bfloat16".
        input: what the trip counts are for, such as "NCHW, 256 x 56 x 56".
        source: the file that defines the kernel, below csrc.
        kernel: parts of the kernel's mangled name.
        unit: the unit of work, such as "element of x".
        units: the units that a warp processes while it executes the kernel once.
        counts_threads: whether each instruction of a warp counts as one per thread.
        claim: the text of the source's banner, in which "{}" stands for the number.
        branches: how often the branches are taken.
        baseline: if not empty, the branches of a second count, which is subtracted. They replace those of `branches`.
            With one more trip of a loop than here, the difference is the cost of an iteration.
        derivation: where the numbers come from.
    """

    name: str
    input: str
    source: str
    kernel: list[str]
    unit: str
    units: float
    counts_threads: bool
    claim: str
    branches: Branches
    derivation: str
    baseline: Branches = field(default_factory=dict)

    def claimed(self) -> float:
        """The number in the banner.

        Raises:
            ValueError: the banner has no such text.
        """
        text = re.sub(r"\s*\n\s*//\s*", " ", (CSRC / self.source).read_text())
        before, _, after = self.claim.partition("{}")
        found = re.search(rf"{re.escape(before)}([0-9.]*[0-9]){re.escape(after)}", text)
        if found is None:
            raise ValueError(f"{self.source} has no text {self.claim!r}")
        return float(found[1])

    def count(self, code: Code) -> float:
        """The instructions per unit.

        Raises:
            ValueError: the numbers do not fit the branches of the code.
        """
        executed = count_instructions(code, self.branches)
        if self.baseline:
            executed -= count_instructions(code, {**self.branches, **self.baseline})
        return executed * (_WARP_THREADS if self.counts_threads else 1) / self.units


def read_paths(file: Path = COUNTS) -> list[CountedPath]:
    """The rows of the table."""
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    return [CountedPath(**row) for row in rows]


def missing_tool() -> str:
    """A line that says why nothing can be counted here; "" if everything can."""
    nvcc = find_nvcc()
    if isinstance(nvcc, str):
        return nvcc
    if nvcc.release != NVCC_RELEASE:
        return f"the counts are for nvcc {NVCC_RELEASE}, and this is {nvcc.release}"
    tool = find_disassembler("nvdisasm")
    return tool if isinstance(tool, str) else ""


def compile_paths(paths: Sequence[CountedPath]) -> Iterator[tuple[CountedPath, Code]]:
    """Each path with its machine code. Each source is compiled once.

    Raises:
        ValueError: no kernel or several kernels have all parts of the name.
    """
    with tempfile.TemporaryDirectory() as folder:
        for source in dict.fromkeys(path.source for path in paths):
            cubin = Path(folder, "kernel.cubin")
            compile_cubin(CSRC / source, ARCHITECTURE, cubin, ["-lineinfo"])
            codes = disassemble_with_lines(cubin, ARCHITECTURE)
            for path in paths:
                if path.source != source:
                    continue
                found = [code for code in codes if all(part in code.kernel for part in path.kernel)]
                if len(found) != 1:
                    names = ", ".join(code.kernel for code in found or codes)
                    raise ValueError(f"{path.name}: expected one kernel {path.kernel}, got {names}")
                yield path, found[0]


def run(only: str, shows_branches: bool) -> str:
    """A table of the paths whose names contain `only`; with `shows_branches`, the branches of each kernel as well."""
    if missing := missing_tool():
        raise invalid("instructions", "nvcc", f"nvcc {NVCC_RELEASE} and nvdisasm", missing)
    paths = [path for path in read_paths() if only in path.name]
    if not paths:
        raise invalid("instructions", "--only", "a part of a path's name", only)
    lines = []
    for path, code in compile_paths(paths):
        if shows_branches:
            lines += [path.name, *(f"  {line}" for line in describe_branches(code, path.branches))]
        try:
            counted, claimed = path.count(code), path.claimed()
        except ValueError as error:
            raise invalid("instructions", COUNTS.name, f"a row that fits the code of {path.name!r}", error) from None
        lines.append(
            f"{path.name}, {path.input}: {counted:.3g} instructions per {path.unit}; the banner says {claimed:g} "
            f"({counted / claimed:.2f})"
        )
    return "\n".join(lines)
