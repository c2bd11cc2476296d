"""Timing of single calls, on CPU and GPU, with a warm and a cold cache, in as many rounds as the time allows."""

import ctypes
import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

Call = Callable[[], Any]

_SETTLE_SECONDS = 0.005  # OpenMP threads of the last system spin a while; compiled code may bring a runtime of its own
_BURST_SECONDS = 0.05  # about what the calls of one system take in one round
_MAX_CALLS = 64
_AHEAD_CYCLES = 1_000_000  # about half a millisecond of a GPU, in which the CPU launches some hundred short calls


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MB, as it comes to do in a network's loop.

    In a loop over one op it is chance whether such a block goes back to the system, so that its pages have to be
    cleared anew in each call, which takes longer than most ops. Larger ones always go back, and are left so.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 2**31 - 1)


class Clock(Protocol):
    """Where calls run and how long they take."""

    cache_bytes: int  # the last level's
    on_chip_bytes: int  # what one core, or one thread-block cluster, can keep of a tensor between two passes over it

    def burst(self, call: Call, calls: int, cold: bool) -> list[float]:
        """Seconds of single calls; cold: the caches hold something else before each."""

    def successive(self, call: Call, calls: int) -> list[float]:
        """Seconds of each of the calls, which follow each other as fast as the device takes them, the cache warm."""


class CpuClock:
    def __init__(self) -> None:
        self.cache_bytes = last_level_cache()
        self.on_chip_bytes = self.cache_bytes // torch.get_num_threads()
        self._eviction = torch.zeros(2 * self.cache_bytes, dtype=torch.uint8)

    def burst(self, call: Call, calls: int, cold: bool) -> list[float]:
        seconds = []
        for _ in range(calls):
            if cold:
                self._eviction.add_(1)
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return seconds

    def successive(self, call: Call, calls: int) -> list[float]:
        return self.burst(call, calls, cold=False)


class CudaClock:
    """Events on the current stream. While the cache is evicted the CPU runs ahead, so that launches are not in the way;
    with a warm cache calls follow each other as in a network, and a call that the CPU is late with takes longer."""

    def __init__(self, device: torch.device):
        properties = torch.cuda.get_device_properties(device)
        self.cache_bytes = properties.L2_cache_size
        cluster = 8 if properties.major >= 9 else 1  # blocks, portably
        self.on_chip_bytes = cluster * properties.shared_memory_per_block_optin
        self._eviction = torch.zeros(4 * self.cache_bytes, dtype=torch.uint8, device=device)

    def burst(self, call: Call, calls: int, cold: bool) -> list[float]:
        def in_succession() -> None:
            for _ in range(calls):
                call()

        if cold:
            return self._elapsed([call] * calls, before_each=self._eviction.zero_)
        return [self._elapsed([in_succession])[0] / calls]

    def successive(self, call: Call, calls: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        torch.cuda._sleep(_AHEAD_CYCLES)  # the device waits for the CPU once, and not before each call
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
    if device.type == "cuda":
        torch.cuda.set_device(device)  # its current stream is the one that events are recorded on
        return CudaClock(device)
    return CpuClock()


def time_calls(
    systems: Mapping[str, Call], clock: Clock, *, cold: bool, seconds: float, rounds: tuple[int, int] = (3, 15)
) -> dict[str, list[list[float]]]:
    """Seconds of each system's calls, a list a round, after a warm-up.

    The systems take turns, so that whatever disturbs the machine disturbs them alike; compare them round by round. Fast
    calls are repeated within a round; ``seconds`` is about what all rounds may take, within the bounds of ``rounds``.
    """
    calls, round_seconds = {}, 0.0
    for name, system in systems.items():
        clock.burst(system, 1, cold)
        start = time.perf_counter()
        clock.burst(system, 1, cold)
        taken = max(time.perf_counter() - start, 1e-6)  # the eviction included
        calls[name] = max(1, min(_MAX_CALLS, round(_BURST_SECONDS / taken)))
        round_seconds += calls[name] * taken + _SETTLE_SECONDS
    fewest, most = rounds
    times: dict[str, list[list[float]]] = {name: [] for name in systems}
    for _ in range(max(fewest, min(most, int(seconds / round_seconds)))):
        for name, system in systems.items():
            time.sleep(_SETTLE_SECONDS)
            times[name].append(clock.burst(system, calls[name], cold))
    return times


def capture_graph(call: Call) -> Call:
    """The call as a CUDA graph's replay: its kernels without their launches' cost on the CPU."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # what is allocated or tuned once must not be captured
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def last_level_cache() -> int:
    sizes = [
        int(size.removesuffix("K")) * 1024
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (size := file.read_text().strip()).endswith("K")
    ]
    return max(sizes, default=64 << 20)
