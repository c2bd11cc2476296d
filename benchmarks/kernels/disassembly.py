"""Compiles a CUDA source with nvcc, and reads the machine code of its kernels.

The disassemblers, cuobjdump and nvdisasm, come with the CUDA toolkit, and with the package triton that torch installs
on Linux.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hashengine import _toolchain

CSRC = Path(__file__).resolve().parents[2] / "csrc"

# A global memory access: a load, a store, an atomic operation or a reduction, also one whose address may be global.
_GLOBAL_ACCESS = re.compile(r"(LDG|STG|ATOMG|REDG|LD|ST|ATOM|RED|LDGSTS|UBLKCP|UTMALDG|UTMASTG)(\.|$)")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P(?:\d+|T))\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_KERNEL = re.compile(r"^//-+ \.text\.(\S+)")
_LABEL = re.compile(r"^(\.L_\w+|\$[^:\s]+):")
_SOURCE_LINE = re.compile(r'^\s*//## File "([^"]+)", line (\d+)')


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        address: its byte offset in the function.
        opcode: such as "LDG.E.64".
        operands: the rest of the line.
        predicate: the register on which its execution depends, such as "P0" or "!UP1"; "" if there is none.
        source: the file and the line that it was compiled from; None if this was not read.
    """

    address: int
    opcode: str
    operands: str
    predicate: str = ""
    source: tuple[Path, int] | None = None

    @property
    def accesses_global_memory(self) -> bool:
        """Whether it reads or writes global memory, or may do so."""
        return _GLOBAL_ACCESS.match(self.opcode) is not None


@dataclass(frozen=True)
class Code:
    """The machine code of one kernel for one architecture.

    Attributes:
        kernel: the mangled name.
        architecture: such as "90a".
        instructions: in the order of their addresses.
        labels: the index of the instruction that follows each label; empty if this was not read.
    """

    kernel: str
    architecture: str
    instructions: tuple[Instruction, ...]
    labels: Mapping[str, int] = field(default_factory=dict)

    def has(self, opcode: str) -> bool:
        """Whether an instruction's opcode begins with `opcode`."""
        return any(instruction.opcode.startswith(opcode) for instruction in self.instructions)


def find_nvcc() -> _toolchain.Nvcc | str:
    """The nvcc for the installed torch, or a line that says why there is none."""
    torch_cuda = torch.version.cuda or "13.0"
    found = _toolchain.find_nvcc(os.environ, torch_cuda, _toolchain.wheel_homes(torch_cuda))
    return str(found) if isinstance(found, _toolchain.Missing) else found


def find_disassembler(name: str) -> Path | str:
    """The program "cuobjdump" or "nvdisasm", or a line that says that it is missing."""
    nvcc = find_nvcc()
    folders = [] if isinstance(nvcc, str) else [Path(nvcc.home, "bin")]
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = shutil.which(name, path=os.pathsep.join(map(str, folders))) or shutil.which(name)
    return Path(found) if found else f"{name} is missing; it comes with the CUDA toolkit and with triton"


def compile_cubin(source: Path, architecture: str, output: Path, flags: Sequence[str] = ()) -> str:
    """Compile `source` for "90a" or another architecture into a cubin; returns what nvcc printed.

    Raises:
        RuntimeError: nvcc is missing, or the source does not compile.
    """
    return _run_nvcc([*flags, "-cubin", f"-arch=sm_{architecture}", str(source), "-o", str(output)])


def compile_object(source: Path, arch_list: str, output: Path) -> None:
    """Compile `source` into an object with the code for `arch_list`, in the form of TORCH_CUDA_ARCH_LIST.

    Raises:
        RuntimeError: nvcc is missing, or the source does not compile.
    """
    flags = []
    for name in arch_list.replace(";", " ").split():
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    _run_nvcc([*flags, "-c", str(source), "-o", str(output)])


def _run_nvcc(arguments: Sequence[str]) -> str:
    nvcc = find_nvcc()
    if isinstance(nvcc, str):
        raise RuntimeError(nvcc)
    command = [f"{nvcc.home}/bin/nvcc", "-std=c++17", "-O3", f"-I{CSRC / 'include'}", f"-I{CSRC}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stderr


def disassemble(file: Path) -> list[Code]:
    """The machine code of every kernel in a cubin or an object.

    Raises:
        RuntimeError: the disassembler is missing.
    """
    codes: list[Code] = []
    architecture, kernel, instructions = "", "", list[Instruction]()

    def finish() -> None:
        if kernel:
            codes.append(Code(kernel, architecture, tuple(instructions)))

    for line in _run("cuobjdump", "-sass", str(file)).splitlines():
        if found := re.match(r"\s*code for sm_(\w+)", line):
            finish()
            architecture, kernel = found[1], ""
        elif found := re.match(r"\s*Function : (\S+)", line):
            finish()
            kernel, instructions = found[1], []
        elif found := _INSTRUCTION.match(line):
            instructions.append(Instruction(int(found[1], 16), found[3], found[4].strip(), found[2] or ""))
    finish()
    return codes


def disassemble_with_lines(cubin: Path, architecture: str) -> list[Code]:
    """The machine code of every kernel in a cubin, with labels and, if it was compiled with -lineinfo, source lines.

    Raises:
        RuntimeError: the disassembler is missing.
    """
    codes: list[Code] = []
    kernel, source = "", None
    instructions, labels = list[Instruction](), dict[str, int]()

    def finish() -> None:
        if kernel:
            codes.append(Code(kernel, architecture, tuple(instructions), labels))

    for line in _run("nvdisasm", "--print-code", "--print-line-info", str(cubin)).splitlines():
        if found := _KERNEL.match(line):
            finish()
            kernel, source = found[1], None
            instructions, labels = [], {}
        elif found := _SOURCE_LINE.match(line):
            source = Path(found[1]), int(found[2])
        elif found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            operands = found[4].strip()
            instructions.append(Instruction(int(found[1], 16), found[3], operands, found[2] or "", source))
    finish()
    return codes


def intermediate_code(file: Path) -> dict[str, str]:
    """The PTX in an object, by architecture, such as {"80": "..."}."""
    parts = re.split(r"^\.target sm_(\w+)", _run("cuobjdump", "-ptx", str(file)), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _run(name: str, *arguments: str) -> str:
    tool = find_disassembler(name)
    if isinstance(tool, str):
        raise RuntimeError(tool)
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def loads_in_flight(code: Code, opcode: str = "LDG.E.128") -> int:
    """The most loads that are issued one after the other before an instruction uses the result of one of them.

    The instructions are taken in the order of their addresses; jumps are not followed.
    """
    most, pending = 0, dict[str, int]()  # the registers of each pending load
    for instruction in code.instructions:
        used = set(re.findall(r"\bR\d+\b", instruction.operands))
        if instruction.opcode.startswith(opcode):
            target, *address = re.findall(r"\bR\d+\b", instruction.operands)
            if not pending.keys().isdisjoint(address):
                pending = {}
            first = int(target[1:])
            pending |= {f"R{first + i}": instruction.address for i in range(int(opcode.rsplit(".", 1)[1]) // 32)}
            most = max(most, len(set(pending.values())))
        elif not pending.keys().isdisjoint(used):
            pending = {}
    return most
