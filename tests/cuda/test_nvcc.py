"""The CUDA kernels compile with nvcc without warnings, register spills or stack frames.

A kernel that may start before the previous one has finished accesses no global memory before it waits.
"""

import re
from pathlib import Path

import pytest

from benchmarks.kernels.disassembly import Code, Instruction, compile_cubin, disassemble, find_cuobjdump, find_nvcc
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
    if frames and not isinstance(find_cuobjdump(), str):
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
    for missing in (find_nvcc(), find_cuobjdump()):
        if isinstance(missing, str):
            pytest.skip(missing)
    (source,) = [kernel for kernel in KERNELS if kernel.stem == "select"]
    compile_cubin(source, "90a", tmp_path / "kernel.cubin")
    assert any(code.has("ACQBULK") for code in disassemble(tmp_path / "kernel.cubin"))
