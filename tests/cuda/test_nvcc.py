"""The CUDA kernels compile with nvcc without warnings, register spills or stack frames.

A kernel that may start before the previous one has finished accesses no global memory before it waits.
"""

import re
from pathlib import Path

import pytest

from benchmarks.kernels.disassembly import (
    Code,
    Instruction,
    compile_cubin,
    disassemble,
    find_disassembler,
    find_nvcc,
    loads_in_flight,
)
from tests.emulation.harness import KERNELS
from tests.helpers.paths import CSRC


def has_kernel(source: Path) -> bool:
    """Whether a source, or a header that it includes, defines a kernel. Other sources only call launchers."""
    text = source.read_text()
    included = (CSRC / name for name in re.findall(r'^#include "([^"]+)"', text, re.MULTILINE))
    return "__global__" in text or any(has_kernel(header) for header in included if header.exists())


# Each architecture takes about the same time to compile for, so the fast tests compile only for 9.0a.
ARCHITECTURES = ("90a", *(pytest.param(name, marks=pytest.mark.slow) for name in ("80", "100", "120")))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", KERNELS, ids=lambda source: str(source.relative_to(CSRC)))
def test_nvcc_compiles_without_warning_or_spill(source, architecture, tmp_path):
    nvcc = find_nvcc()
    if isinstance(nvcc, str):
        pytest.skip(nvcc)
    if int(architecture.rstrip("a")) not in nvcc.arches:
        pytest.skip(f"nvcc {nvcc.release} does not support sm_{architecture}")
    cubin = tmp_path / "kernel.cubin"
    printed = compile_cubin(source, architecture, cubin, ["-Werror", "all-warnings", "-Xptxas", "-v"])
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", printed)
    assert bool(frames) == has_kernel(source), printed
    assert set(frames) <= {("0", "0", "0")}, printed
    if frames and not isinstance(find_disassembler("cuobjdump"), str):
        codes = disassemble(cubin)
        assert codes and not list(filter(None, map(early_access, codes)))


def early_access(code: Code) -> str:
    """The first access to global memory before the wait for the previous kernel; "" if there is none.

    The compiler may move a load that it takes for constant in front of the wait.
    """
    for instruction in code.instructions:
        if instruction.opcode.startswith("ACQBULK"):
            return next(
                (
                    f"{code.kernel}: {early.opcode} before the wait"
                    for early in code.instructions
                    if early.address < instruction.address and early.accesses_global_memory
                ),
                "",
            )
    return ""


@pytest.mark.parametrize(
    ("opcodes", "is_wrong"),
    [
        (["LDC", "PREEXIT", "ACQBULK", "LDG.E.64"], False),
        (["LDC", "LDS", "ULDC.64", "ACQBULK", "LDG.E.64"], False),
        (["LDG.E.CONSTANT", "LDC"], False),  # waits for nothing
        (["LDG.E.CONSTANT", "ACQBULK"], True),
        (["PREEXIT", "ATOMG.E.ADD.STRONG.GPU", "ACQBULK"], True),
        (["LD.E", "ACQBULK"], True),
        (["LDGSTS.E", "ACQBULK"], True),
    ],
    ids=str,
)
def test_an_access_before_the_wait_is_found(opcodes, is_wrong):
    instructions = tuple(Instruction(16 * i, opcode, "") for i, opcode in enumerate(opcodes))
    assert bool(early_access(Code("kernel", "90a", instructions))) == is_wrong


def test_some_kernels_wait(tmp_path):
    for missing in (find_nvcc(), find_disassembler("cuobjdump")):
        if isinstance(missing, str):
            pytest.skip(missing)
    (source,) = [kernel for kernel in KERNELS if kernel.stem == "select"]
    compile_cubin(source, "90a", tmp_path / "kernel.cubin")
    assert any(code.has("ACQBULK") for code in disassemble(tmp_path / "kernel.cubin"))


# The 16-byte loads that a thread has in flight, as the banners of the sources say: by kernel and by dtype.
LOADS = {
    "reduce_kernel<PoolSource": {"__nv_bfloat16": 4, "__half": 4, "float": 4},
    "reduce_kernel<ProductSource": {"__nv_bfloat16": 8, "__half": 8, "float": 8},
    "apply_kernel<ApplyGate<": {"__nv_bfloat16": 2, "__half": 2, "float": 2},
    "apply_kernel<ApplyGateBackward": {"__nv_bfloat16": 2, "__half": 2, "float": 2},
}


@pytest.mark.parametrize("name", ["reduce", "apply"])
def test_loads_of_the_triplet_passes_are_in_flight_together(name, tmp_path):
    """The compiler may use the result of a load before it issues the next one."""
    for missing in (find_nvcc(), find_disassembler("cuobjdump")):
        if isinstance(missing, str):
            pytest.skip(missing)
    (source,) = [kernel for kernel in KERNELS if kernel.parent.name == "triplet" and kernel.stem == name]
    compile_cubin(source, "90a", tmp_path / "kernel.cubin")
    found: dict[tuple[str, str], set[int]] = {}
    for code in disassemble(tmp_path / "kernel.cubin"):
        for kernel, dtypes in LOADS.items():
            for dtype in dtypes:
                if is_instance(code.kernel, kernel, dtype) and code.has("LDG.E.128"):
                    found.setdefault((kernel, dtype), set()).add(loads_in_flight(code))
    expected = {
        (kernel, dtype): {loads}
        for kernel, dtypes in LOADS.items()
        for dtype, loads in dtypes.items()
        if kernel.startswith(name)
    }
    assert found == expected


def is_instance(mangled: str, kernel: str, dtype: str) -> bool:
    """Whether a mangled name is that of `kernel`, such as "reduce_kernel<PoolSource", for the dtype."""
    function, argument = kernel.rstrip("<").split("<")
    letters = {"float": "f", "__half": "6__half", "__nv_bfloat16": "13__nv_bfloat16"}[dtype]
    return f"{len(function)}{function}" in mangled and f"{len(argument)}{argument}I{letters}" in mangled


@pytest.mark.parametrize(
    ("lines", "loads"),
    [
        (["LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E.128 R8, desc[UR4][R2.64+0x10]", "FADD R0, R4, R8"], 2),
        (["LDG.E.128 R4, desc[UR4][R2.64]", "FADD R0, R7, R1", "LDG.E.128 R8, desc[UR4][R2.64]"], 1),
        (["LDG.E.128 R4, desc[UR4][R2.64]", "FADD R0, R8, R1", "LDG.E.128 R8, desc[UR4][R2.64]"], 2),
        (["LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E.128 R8, desc[UR4][R4.64]"], 1),  # the address comes from a load
        (["LDG.E R4, desc[UR4][R2.64]"], 0),
    ],
)
def test_loads_in_flight_are_counted(lines, loads):
    split = [line.partition(" ") for line in lines]
    code = Code("kernel", "90a", tuple(Instruction(16 * i, op, rest) for i, (op, _, rest) in enumerate(split)))
    assert loads_in_flight(code) == loads
