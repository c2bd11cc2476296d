"""How often each instruction of a kernel is executed, from the trip counts of its loops and the shares of its branches.

The blocks of the code are the states of a Markov chain. A warp enters at the first block. It leaves a block by its last
instruction if that is a branch, with the share of the branch, or else to the next block. The expected numbers of visits
solve a linear system.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.kernels.disassembly import Code, Instruction

_TARGET = re.compile(r"`\(([^)]+)\)")

# For each line of source code, written "file: beginning of the line", how often its branches are taken. "trips" is for
# branches that go back: the iterations of the loop, each time it is entered. "taken" is for the other branches: the
# share of their executions that jump. A list has one number per branch, in the order of their addresses. The line "*"
# has the trips of all other loops.
Branches = Mapping[str, Mapping[str, float | Sequence[float]]]


def count_instructions(code: Code, branches: Branches) -> float:
    """The number of instructions that one warp executes. A called function counts as the call alone.

    Branches that go forward and are not in `branches` are never taken.

    Raises:
        ValueError: a loop that is executed has no trip count, an entry of `branches` matches no branch, or it has the
            wrong number of numbers, and the message names the branches; or a loop never ends.
    """
    shares, wrong = _shares(code, branches)
    if wrong:
        raise ValueError(f"{code.kernel}: " + "; ".join(wrong))
    begins = _block_begins(code)
    blocks = {begin: block for block, begin in enumerate(begins)}
    ends = [*begins[1:], len(code.instructions)]
    chain = np.zeros((len(begins), len(begins)))  # [from, to]
    for block, end in enumerate(ends):
        last = code.instructions[end - 1]
        share = shares.get(end - 1, 0.0 if _is_conditional(last) else 1.0) if _leaves(last) else 0.0
        if target := _target(last):
            chain[block, blocks[code.labels[target]]] += share
        if share < 1 and end < len(code.instructions):
            chain[block, blocks[end]] += 1 - share
    reached = _reachable(chain)
    entered = np.zeros(len(reached))
    entered[0] = 1
    try:
        visits = np.linalg.solve(np.eye(len(reached)) - chain[np.ix_(reached, reached)].T, entered)
    except np.linalg.LinAlgError:
        raise ValueError(f"{code.kernel}: the branches that leave a loop are never taken") from None
    lasts = {ends[block] - 1: code.instructions[ends[block] - 1] for block in reached}
    if loops := [last for index, last in lasts.items() if _is_conditional(last) and index not in shares]:
        places = "; ".join(f"{loop.address:04x}, {source_of(loop)!r}" for loop in loops)
        raise ValueError(f"{code.kernel}: no trip counts for the loops at {places}")
    sizes = np.subtract(ends, begins)
    return float(visits @ sizes[reached])


def describe_branches(code: Code, branches: Branches) -> list[str]:
    """One line per conditional branch: its address, its direction, its source and how often it is taken."""
    shares, _ = _shares(code, branches)
    return [
        f"{instruction.address:04x} {'back' if _goes_back(code, index) else 'forward'} "
        f"{shares.get(index, float('nan')):.4f} {source_of(instruction)}"
        for index, instruction in enumerate(code.instructions)
        if _is_conditional(instruction)
    ]


def source_of(instruction: Instruction) -> str:
    """The instruction's line of source code, such as "reduce.cu: for (int i = 0; i < n; ++i) {"."""
    if instruction.source is None:
        return ""
    file, line = instruction.source
    lines = _lines(file)
    return f"{file.name}: {lines[line - 1].strip() if line <= len(lines) else ''}"


@cache
def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def _target(instruction: Instruction) -> str:
    """The label to which a branch jumps; "" for other instructions."""
    if not instruction.opcode.startswith("BRA"):
        return ""
    found = _TARGET.search(instruction.operands)
    assert found, instruction
    return found[1]


def _leaves(instruction: Instruction) -> bool:
    """Whether the instruction ends a block."""
    name = instruction.opcode.partition(".")[0]
    if name in ("BRX", "JMP", "JMX"):
        raise ValueError(f"the counter cannot follow {instruction.opcode}")
    return name in ("BRA", "EXIT", "RET")


def _is_conditional(instruction: Instruction) -> bool:
    if not _leaves(instruction):
        return False
    has_condition = bool(instruction.operands.partition("`")[0].strip()) and instruction.opcode.startswith("BRA")
    return bool(instruction.predicate) or has_condition


def _goes_back(code: Code, index: int) -> bool:
    target = _target(code.instructions[index])
    return bool(target) and code.labels[target] <= index


def _block_begins(code: Code) -> list[int]:
    after = {index + 1 for index, instruction in enumerate(code.instructions) if _leaves(instruction)}
    begins = {0} | after | set(code.labels.values())
    return sorted(begin for begin in begins if begin < len(code.instructions))


def _reachable(chain: np.ndarray) -> list[int]:
    reached, pending = {0}, [0]
    while pending:
        following = set(np.flatnonzero(chain[pending.pop()]).tolist()) - reached
        reached |= following
        pending += following
    return sorted(reached)


def _shares(code: Code, branches: Branches) -> tuple[dict[int, float], list[str]]:
    """The share of executions that jump, for each conditional branch by its index, and what does not fit.

    Loops without a trip count are left out.
    """
    shares: dict[int, float] = {}
    backward, forward = dict[str, list[int]](), dict[str, list[int]]()
    for index, instruction in enumerate(code.instructions):
        if not _is_conditional(instruction):
            continue
        goes_back = _goes_back(code, index)
        if not goes_back:
            shares[index] = 0.0
        elif "*" in branches:
            shares[index] = _share_of(branches["*"]["trips"])
        source = source_of(instruction)
        if (key := next((begin for begin in branches if source.startswith(begin)), None)) is not None:
            (backward if goes_back else forward).setdefault(key, []).append(index)
    wrong: list[str] = []
    for key, rule in branches.items():
        for kind, given in rule.items() if key != "*" else ():
            found = (backward if kind == "trips" else forward).get(key, [])
            numbers = list(given) if isinstance(given, Sequence) else [given] * len(found)
            if not found or len(numbers) != len(found):
                addresses = ", ".join(f"{code.instructions[index].address:04x}" for index in found) or "none"
                wrong.append(f"{key!r}: {len(numbers)} of {kind!r} for the branches {addresses}")
            else:
                shares |= zip(found, map(_share_of if kind == "trips" else float, numbers), strict=True)
    return shares, wrong


def _share_of(trips: float) -> float:
    """The share of its executions in which the branch of a loop goes back."""
    return 1 - 1 / trips
