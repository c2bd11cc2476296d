"""Compiles a CUDA source with nvcc, and reads the machine code of its kernels.

The disassembler, cuobjdump, comes with the CUDA toolkit, and with the package triton that torch installs on Linux.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hashengine import _toolchain

CSRC = Path(__file__).resolve().parents[2] / "csrc"

# A global memory access: a load, a store, an atomic operation or a reduction, also one whose address may be global.
_GLOBAL_ACCESS = re.compile(r"(LDG|STG|ATOMG|REDG|LD|ST|ATOM|RED|LDGSTS|UBLKCP|UTMALDG|UTMASTG)(\.|$)")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?(?:U?P\d+|U?PT)\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        address: its byte offset in the function.
        opcode: such as "LDG.E.64".
        operands: the rest of the line.
    """

    address: int
    opcode: str
    operands: str

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
    """

    kernel: str
    architecture: str
    instructions: tuple[Instruction, ...]

    def has(self, opcode: str) -> bool:
        """Whether an instruction's opcode begins with `opcode`."""
        return any(instruction.opcode.startswith(opcode) for instruction in self.instructions)


def find_nvcc() -> _toolchain.Nvcc | str:
    """The nvcc for the installed torch, or a line that says why there is none."""
    torch_cuda = torch.version.cuda or "13.0"
    found = _toolchain.find_nvcc(os.environ, torch_cuda, _toolchain.wheel_homes(torch_cuda))
    return str(found) if isinstance(found, _toolchain.Missing) else found


def find_cuobjdump() -> Path | str:
    """The disassembler, or a line that says that there is none."""
    nvcc = find_nvcc()
    folders = [] if isinstance(nvcc, str) else [Path(nvcc.home, "bin")]
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders))) or shutil.which("cuobjdump")
    return Path(found) if found else "cuobjdump is missing; it comes with the CUDA toolkit and with triton"


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

    for line in _dump("-sass", file).splitlines():
        if found := re.match(r"\s*code for sm_(\w+)", line):
            finish()
            architecture, kernel = found[1], ""
        elif found := re.match(r"\s*Function : (\S+)", line):
            finish()
            kernel, instructions = found[1], []
        elif found := _INSTRUCTION.match(line):
            instructions.append(Instruction(int(found[1], 16), found[2], found[3].strip()))
    finish()
    return codes


def intermediate_code(file: Path) -> dict[str, str]:
    """The PTX in an object, by architecture, such as {"80": "..."}."""
    parts = re.split(r"^\.target sm_(\w+)", _dump("-ptx", file), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _dump(option: str, file: Path) -> str:
    tool = find_cuobjdump()
    if isinstance(tool, str):
        raise RuntimeError(tool)
    return subprocess.run([str(tool), option, str(file)], capture_output=True, text=True, check=True).stdout


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
