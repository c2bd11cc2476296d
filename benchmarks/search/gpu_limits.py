"""Limits on the rate of a GPU search, in distances per second.

Each limit follows from the rate of a part of the hardware, and holds only for searches that use this part. A search by
matrix products can exceed `popcount`. A search whose codes stay in the L2 cache can exceed `memory`. The first three
rates are per clock and multiprocessor:

- `popcount`: 16 POPC instructions, each of which counts 32 bits of a distance (CUDA C++ Programming Guide, "Throughput
  of Native Arithmetic Instructions").
- `tensor`: 128 products of 256 bits, which means that the 1-bit `wgmma` m64n256k256 takes 128 clocks. This rate is an
  assumption: eight times the int8 rate, as on the data sheet of the A100. On an H200 at
  1.755 GHz it gives 15.2 POPS. The repository JoeyBF/sseq has another kernel with this instruction; its authors report
  9.6 POPS on an H200 NVL. Only compute capability 9.0 has the instruction. It multiplies with AND. A distance therefore
  needs two products, the second one with the complements of the code and the query, and the inner dimension is twice
  the number of bits.
- `alu`: 105 distances of any length. The sum for each distance is tested for a hit with LOP3 instructions, about 0.6
  per distance (counted in the compiled code that tests a tile of 64 x 256 sums). A multiprocessor executes 64 LOP3
  instructions per clock.
- `memory`: codes and queries are read once and answers are written once, at the rate of a copy in the same run.
"""

import math
import shutil
import statistics
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.timing import Clock

_POPCOUNTS_PER_CLOCK, _BITS_PER_POPCOUNT = 16, 32
_PRODUCTS_PER_CLOCK, _BITS_PER_PRODUCT = 128, 256
_TESTS_PER_CLOCK = 105
_COPY_BYTES = 1 << 30  # far larger than any cache
_COPIES = 9


class Gpu(NamedTuple):
    """The properties of a GPU from which the limits follow.

    Attributes:
        multiprocessors: the number of multiprocessors.
        clock: the clock rate in Hz.
        clock_is: "held" if `clock` was measured under load, "maximum" if it is the highest clock rate of the GPU.
        memory: bytes per second that a copy reads and writes.
        tensor: whether the GPU has the 1-bit `wgmma`.
    """

    multiprocessors: int
    clock: float
    clock_is: str
    memory: float
    tensor: bool


class Work(NamedTuple):
    """The least work of a search; `share` is the part of the codes that the filter selects."""

    queries: int
    codes: int
    bits: int
    answer_bytes: int
    share: float = 1.0


def rate_limits(gpu: Gpu, work: Work) -> dict[str, float]:
    """The limits by name, in distances per second. Distances to codes that the filter excludes count as computed."""
    per_clock = {"popcount": _POPCOUNTS_PER_CLOCK / math.ceil(work.bits / _BITS_PER_POPCOUNT)}
    if gpu.tensor:
        per_clock["tensor"] = _PRODUCTS_PER_CLOCK / math.ceil(2 * work.bits / _BITS_PER_PRODUCT)
        per_clock["alu"] = float(_TESTS_PER_CLOCK)
    found = {name: rate * gpu.multiprocessors * gpu.clock / work.share for name, rate in per_clock.items()}
    read_bytes = work.share * work.codes * work.bits / 8 + work.queries * work.bits / 8
    return found | {"memory": work.codes * work.queries * gpu.memory / (read_bytes + work.answer_bytes)}


def lowest(limits: dict[str, float]) -> str:
    """The name of the lowest limit. `popcount` is ignored if the GPU has the 1-bit `wgmma`."""
    names = [name for name in limits if name != "popcount" or "tensor" not in limits]
    return min(names, key=limits.__getitem__)


def describe(device: torch.device, clock: Clock) -> Gpu | None:
    """The properties of the GPU, with its maximum clock rate and a measured `memory`; None for a CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    clock_rate = _ask(device, "clocks.max.sm").hertz() or properties.clock_rate * 1e3
    tensor = (properties.major, properties.minor) == (9, 0)
    return Gpu(properties.multi_processor_count, clock_rate, "maximum", copy_rate(device, clock), tensor)


def copy_rate(device: torch.device, clock: Clock, size: int = _COPY_BYTES) -> float:
    """Bytes per second that a copy of `size` bytes on the device reads and writes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock.burst(lambda: target.copy_(source), 1, False)
    return 2 * size / statistics.median(clock.burst(lambda: target.copy_(source), _COPIES, True))


def under_load(gpu: Gpu, device: torch.device, call: Callable[[], Any]) -> Gpu:
    """`gpu` with the clock rate that it holds while `call` runs repeatedly, if the driver reports that rate."""
    request = _ask(device, "clocks.sm")
    while not request.is_answered():
        call()
        torch.cuda.synchronize(device)
    clock_rate = request.hertz()
    return gpu._replace(clock=clock_rate, clock_is="held") if clock_rate else gpu


class _Request:
    """A call of nvidia-smi that runs while the device works."""

    def __init__(self, command: list[str]):
        self._process = None
        if shutil.which(command[0]):
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def is_answered(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def hertz(self) -> float | None:
        """Wait for the answer and convert it from MHz; None if it is not a number."""
        if self._process is None:
            return None
        answer, _ = self._process.communicate()
        try:
            return float(answer) * 1e6
        except ValueError:  # the driver or the device does not report the field
            return None


def _ask(device: torch.device, field: str) -> _Request:
    options = [f"--query-gpu={field}", "--format=csv,noheader,nounits", f"--id={device.index or 0}"]
    return _Request(["nvidia-smi", *options])
