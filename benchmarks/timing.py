"""Timing of calls on the CPU (`time_in_rounds`), or on the CPU or a GPU with a warm or a cold cache (`time_calls`)."""

import ctypes
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

Call = Callable[[], Any]

# The pauses let the OpenMP threads of the previous system stop spinning, so that they do not slow down the next one.
_PAUSE_SECONDS_PER_TURN = 0.05
_PAUSE_SECONDS_PER_BURST = 0.005
_BURST_SECONDS = 0.05  # the calls of one system in one round take about this long
_MAX_CALLS_PER_BURST = 64
_DEFAULT_ROUNDS = (3, 15)  # the smallest and the largest number of rounds
_DEVICE_SLEEP_CYCLES = 1_000_000  # 0.5 ms at 2 GHz; estimated to let the CPU launch about a hundred short calls


def time_in_rounds(systems: Mapping[str, Call], rounds: int, *, warm_up: bool = True) -> dict[str, list[float]]:
    """Seconds per call of each system in each round, after one warm-up round if `warm_up`.

    The systems take turns, so that a disturbance of the machine affects all of them. Compare them round by round.
    In each round, a short call is repeated for `_BURST_SECONDS`, and the median of its times is taken. The first call
    wakes sleeping threads and is therefore slower.
    """
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(not warm_up, rounds + 1):
        for name, system in systems.items():
            time.sleep(_PAUSE_SECONDS_PER_TURN)
            burst: list[float] = []
            end = time.perf_counter() + _BURST_SECONDS
            while not burst or time.perf_counter() < end:
                start = time.perf_counter()
                system()
                burst.append(time.perf_counter() - start)
            if turn:
                seconds[name].append(statistics.median(burst))
    return seconds


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median, over the rounds, of the ratio of the two times of a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks of less than 32 MiB, as its dynamic threshold does in a training loop.

    In a loop over a single op, it depends on chance whether glibc returns such a block to the system. If it does, the
    system clears the block's pages again in the next call, which takes longer than most ops. Larger blocks are always
    returned.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 2**31 - 1)


class Clock(Protocol):
    """Times calls on one device.

    Attributes:
        cache_bytes: size of the last-level cache.
        on_chip_bytes: size of a thread's share of that cache; on a GPU, size of a cluster's shared memory.
    """

    cache_bytes: int
    on_chip_bytes: int

    def burst(self, call: Call, calls: int, cold: bool) -> list[float]:
        """Time `calls` calls. Returns the seconds of each call, or a list with only their mean.

        If `cold`, other data fills the cache before each call.
        """

    def successive(self, call: Call, calls: int) -> list[float]:
        """Seconds of each of `calls` back-to-back calls with a warm cache."""


class CpuClock:
    """Times calls on the CPU."""

    def __init__(self) -> None:
        self.cache_bytes = last_level_cache()
        self.on_chip_bytes = self.cache_bytes // torch.get_num_threads()
        self._eviction = torch.zeros(2 * self.cache_bytes, dtype=torch.uint8)

    def burst(self, call: Call, calls: int, cold: bool) -> list[float]:
        """Seconds of each call."""
        seconds = []
        for _ in range(calls):
            if cold:
                self._eviction.add_(1)
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return seconds

    def successive(self, call: Call, calls: int) -> list[float]:
        """Seconds of each call."""
        return self.burst(call, calls, cold=False)


class CudaClock:
    """Times calls with events on the current stream.

    With a cold cache, the device overwrites its cache before each call. Meanwhile the CPU launches the call, so its
    time does not include the launch. With a warm cache, calls follow each other as in a network. The time then includes
    the time that the device waits for a launch.
    """

    def __init__(self, device: torch.device):
        properties = torch.cuda.get_device_properties(device)
        self.cache_bytes = properties.L2_cache_size
        blocks_per_cluster = 8 if properties.major >= 9 else 1  # 8 blocks are possible on all such GPUs
        self.on_chip_bytes = blocks_per_cluster * properties.shared_memory_per_block_optin
        self._eviction = torch.zeros(4 * self.cache_bytes, dtype=torch.uint8, device=device)

    def burst(self, call: Call, calls: int, cold: bool) -> list[float]:
        """Seconds of each call if `cold`; otherwise their mean, as the only element."""

        def back_to_back() -> None:
            for _ in range(calls):
                call()

        if cold:
            return self._elapsed([call] * calls, before_each=self._eviction.zero_)
        return [self._elapsed([back_to_back])[0] / calls]

    def successive(self, call: Call, calls: int) -> list[float]:
        """Seconds of each call."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        torch.cuda._sleep(_DEVICE_SLEEP_CYCLES)  # so that the calls are launched before the device needs them
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) / 1e3 for start, stop in itertools.pairwise(events)]

    def _elapsed(self, calls: list[Call], before_each: Call = lambda: None) -> list[float]:
        pairs = []
        for call in calls:
            before_each()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            pairs.append((start, stop))
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) / 1e3 for start, stop in pairs]


def make_clock(device: torch.device) -> Clock:
    """The clock of a device. A CUDA device becomes the current one, because events use its current stream."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        return CudaClock(device)
    return CpuClock()


def time_calls(
    systems: Mapping[str, Call],
    clock: Clock,
    *,
    cold: bool,
    seconds: float,
    rounds: tuple[int, int] = _DEFAULT_ROUNDS,
) -> dict[str, list[list[float]]]:
    """Seconds of each system's calls, one list per round, after a warm-up.

    The systems take turns, so that a disturbance of the machine affects all of them. Compare them round by round. Fast
    calls are repeated within a round.

    Args:
        systems: the calls by name.
        clock: the clock of their device.
        cold: evict the cache before each call.
        seconds: about how long all rounds together may take.
        rounds: the smallest and the largest number of rounds, whatever `seconds` is.
    """
    calls, round_seconds = {}, 0.0
    for name, system in systems.items():
        clock.burst(system, 1, cold)
        start = time.perf_counter()
        clock.burst(system, 1, cold)
        taken = max(time.perf_counter() - start, 1e-6)  # includes the time of the eviction
        calls[name] = max(1, min(_MAX_CALLS_PER_BURST, round(_BURST_SECONDS / taken)))
        round_seconds += calls[name] * taken + _PAUSE_SECONDS_PER_BURST
    fewest, most = rounds
    times: dict[str, list[list[float]]] = {name: [] for name in systems}
    for _ in range(max(fewest, min(most, int(seconds / round_seconds)))):
        for name, system in systems.items():
            time.sleep(_PAUSE_SECONDS_PER_BURST)
            times[name].append(clock.burst(system, calls[name], cold))
    return times


def capture_graph(call: Call) -> Call:
    """Capture the call as a CUDA graph; returns its replay, in which the CPU does not launch each kernel."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # one-time allocations and tuning must not be captured
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def last_level_cache() -> int:
    """Bytes of the first core's largest cache; 64 MiB if the system does not report it."""
    sizes = [
        int(size.removesuffix("K")) * 1024
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (size := file.read_text().strip()).endswith("K")
    ]
    return max(sizes, default=64 << 20)
