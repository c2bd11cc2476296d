"""How calls are timed: in rounds, in bursts, with a warm and a cold cache."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing

CPU = torch.device("cpu")


def test_systems_take_turns_in_as_many_rounds_as_the_time_allows(monkeypatch):
    now, turns = [0.0], []

    class Clock:
        def burst(self, call, calls, cold):
            turns.append((call, calls))
            now[0] += calls * call
            return [call] * calls

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0], sleep=lambda seconds: None))
    times = timing.time_calls({"fast": 1e-3, "slow": 0.1}, Clock(), cold=False, seconds=1.0)
    assert {name: [len(calls) for calls in rounds] for name, rounds in times.items()} == {
        "fast": [50] * 6,
        "slow": [1] * 6,
    }
    calls_before_the_rounds = 4  # each system warms up and is then timed once
    assert turns[calls_before_the_rounds:] == [(1e-3, 50), (0.1, 1)] * 6
    assert len(timing.time_calls({"slow": 9.0}, Clock(), cold=False, seconds=1.0)["slow"]) == 3
    assert len(timing.time_calls({"slow": 9.0}, Clock(), cold=False, seconds=1.0, rounds=(7, 7))["slow"]) == 7


def test_short_calls_are_repeated_so_that_waking_the_threads_does_not_count(monkeypatch):
    """A burst of the short call has five calls. The first one takes longer, as if it woke the threads."""
    clock = SimpleNamespace(now=0.0, calls=0)

    def pass_time(seconds):
        clock.now += seconds

    def short():
        clock.calls += 1
        pass_time(0.03 if clock.calls % 5 == 1 else 0.0051)

    monkeypatch.setattr(timing, "time", SimpleNamespace(sleep=pass_time, perf_counter=lambda: clock.now))
    seconds = timing.time_in_rounds({"short": short, "long": lambda: pass_time(0.06)}, rounds=2)
    assert seconds == {"short": pytest.approx([0.0051] * 2), "long": pytest.approx([0.06] * 2)}
    assert clock.calls == 3 * 5  # one warm-up round and two rounds of five calls


def test_another_array_fills_the_cache_before_a_cold_call():
    clock = timing.CpuClock()
    assert clock._eviction.nbytes >= 2 * clock.cache_bytes >= 1 << 20
    seen = []
    for cold in (True, False):
        assert len(clock.burst(lambda: seen.append(int(clock._eviction[-1])), 2, cold)) == 2
    assert seen == [1, 2, 2, 2]


def test_the_cuda_clock_records_events_around_calls_and_synchronizes_before_it_reads_them(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, stop):
            assert log[-1] == "synchronize"
            return 6.0

    properties = SimpleNamespace(L2_cache_size=1024, major=9, shared_memory_per_block_optin=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    clock = timing.CudaClock(CPU)
    assert clock.on_chip_bytes == 8000
    assert clock.burst(lambda: log.append("call"), 3, cold=False) == [pytest.approx(2e-3)]
    assert log == ["event", "call", "call", "call", "event", "synchronize"]
    log.clear()
    clock._eviction = SimpleNamespace(zero_=lambda: log.append("evict"))
    assert clock.burst(lambda: log.append("call"), 2, cold=True) == [pytest.approx(6e-3)] * 2
    assert log == ["evict", "event", "call", "event"] * 2 + ["synchronize"]
