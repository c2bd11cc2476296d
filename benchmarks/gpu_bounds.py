"""What a GPU lets through at most in a Hamming search, in distances a second: the bounds beside which rates are put.

Operations a clock of one multiprocessor, and where they come from:

- popcount: 16 lanes of POPC, each 32 bits of a distance (CUDA C++ Programming Guide, "Throughput of Native Arithmetic
  Instructions").
- tensor: 128 products of 256 bits, the 1-bit ``wgmma`` m64n256k256 in 128 clocks: eight times int8, as on the A100,
  whose data sheet names both; a published kernel on an H200 that reaches 9.6 of the 15.2 POPS bears it out
  (JoeyBF/sseq). Only compute capability 9.0 has the instruction. It multiplies with AND, so that a distance takes a
  code and its complement: K is twice the bits.
- alu: 105 distances, which is what testing the products for hits allows at half an instruction each (64 lanes of LOP3;
  counted in the compiled epilogue of a 64 x 256 tile).
- memory: codes and queries read once, answers written once, at the rate of a copy measured in the same run. Codes that
  stay in the L2 cache may be read faster.
"""

import math
import shutil
import statistics
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.timing import Clock

_POPCOUNTS, _POPCOUNT_BITS = 16, 32
_PRODUCTS, _PRODUCT_BITS = 128, 256
_TESTED = 105
_COPY_BYTES = 1 << 30  # far beyond any cache
_COPIES = 9


class Gpu(NamedTuple):
    multiprocessors: int
    clock: float  # Hz
    clock_is: str  # "held" under load, or the "maximum" where the driver does not tell
    memory: float  # bytes a second that a copy reads and writes
    tensor: bool  # whether there is a native 1-bit product


class Work(NamedTuple):
    """What a search has to do at the least."""

    queries: int
    codes: int
    bits: int
    answer_bytes: int
    share: float = 1.0  # of the codes that a filter lets through: no other one need be looked at


def bounds(gpu: Gpu, work: Work) -> dict[str, float]:
    """Distances a second, those that the filter spares counted, by the name of what allows no more."""
    per_clock = {"popcount": _POPCOUNTS / math.ceil(work.bits / _POPCOUNT_BITS)}
    if gpu.tensor:
        per_clock |= {"tensor": _PRODUCTS / math.ceil(2 * work.bits / _PRODUCT_BITS), "alu": float(_TESTED)}
    found = {name: rate * gpu.multiprocessors * gpu.clock / work.share for name, rate in per_clock.items()}
    read = work.share * work.codes * work.bits / 8 + work.queries * work.bits / 8
    return found | {"memory": work.codes * work.queries * gpu.memory / (read + work.answer_bytes)}


def limiting(found: dict[str, float]) -> str:
    """The name of the smallest bound; populations need not be counted one by one where there is a 1-bit product."""
    names = [name for name in found if name != "popcount" or "tensor" not in found]
    return min(names, key=found.__getitem__)


def describe(device: torch.device, clock: Clock) -> Gpu | None:
    """The device at its maximum clock, its memory's rate measured; None for a CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    clock_rate = _asked(device, "clocks.max.sm").result() or properties.clock_rate * 1e3
    tensor = (properties.major, properties.minor) == (9, 0)
    return Gpu(properties.multi_processor_count, clock_rate, "maximum", copy_rate(device, clock), tensor)


def copy_rate(device: torch.device, clock: Clock, size: int = _COPY_BYTES) -> float:
    """Bytes a second that a copy on the device reads and writes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock.burst(lambda: target.copy_(source), 1, False)
    return 2 * size / statistics.median(clock.burst(lambda: target.copy_(source), _COPIES, True))


def under_load(gpu: Gpu, device: torch.device, call: Callable[[], Any]) -> Gpu:
    """The device at the clock that it holds while the call runs again and again, where the driver tells."""
    asked = _asked(device, "clocks.sm")
    while not asked.answered():
        call()
        torch.cuda.synchronize(device)
    held = asked.result()
    return gpu._replace(clock=held, clock_is="held") if held else gpu


class _Question:
    """A question to nvidia-smi, which answers while the device works."""

    def __init__(self, command: list[str]):
        self._process = None
        if shutil.which(command[0]):
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def answered(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def result(self) -> float | None:
        """Hz; None where there is no answer."""
        if self._process is None:
            return None
        answer, _ = self._process.communicate()
        try:
            return float(answer) * 1e6
        except ValueError:  # an older driver, or a device that does not tell
            return None


def _asked(device: torch.device, field: str) -> _Question:
    options = [f"--query-gpu={field}", "--format=csv,noheader,nounits", f"--id={device.index or 0}"]
    return _Question(["nvidia-smi", *options])
