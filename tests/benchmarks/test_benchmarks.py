"""The benchmarks' commands: they verify before they time, print tables and keep what they measured."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks import cases, codes, eager, harness, kernels, memory, shapes, systems, timing
from benchmarks.__main__ import app
from hashengine import ops
from tests.helpers.layouts import feature_map

SMALL = ["hamming", "--codes", "3000", "--queries", "20", "--bits", "64", "--bits", "72", "-k", "5", "--rounds", "2"]
CPU = torch.device("cpu")


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def read_lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def faiss():
    return pytest.importorskip("faiss")


@pytest.mark.parametrize("data", ["random", "clustered"])
def test_hamming_prints_the_table_and_appends_the_results(tmp_path, faiss, data):
    output = tmp_path / "results" / "hamming.jsonl"
    for _ in range(2):
        tasks = [option for task in systems.Task for option in ("--task", task.value)]
        printed = invoke(*SMALL, *tasks, "--data", data, "--threads", 1, "--output", output)
        assert "times faiss" in printed
    rows = read_lines(output)
    once = [(bits, task) for bits in (64, 72) for task in ("search", "filter", "range", "map")]
    assert [(row["bits"], row["task"]) for row in rows] == 2 * once
    for row in rows:
        assert {"cpu", "commit", "torch", "faiss", "simd_level", "threads"} <= row.keys()
        assert all(len(times) == 2 and min(times) > 0 for times in row["seconds"].values())


def test_wrong_neighbours_are_not_timed(faiss, monkeypatch):
    def off_by_one(self, queries, k, **options):
        distances, ids = search(self, queries, k, **options)
        return distances, ids + 1

    search = systems.HammingIndex.search
    monkeypatch.setattr(systems.HammingIndex, "search", off_by_one)
    result = CliRunner().invoke(app, SMALL)
    assert result.exit_code != 0 and "must equal FAISS's before they are timed" in result.output


@pytest.mark.parametrize(("option", "message"), [(["--bits", "63"], "bits must be"), (["-k", "9999"], "k must be")])
def test_wrong_options_of_hamming_are_refused_in_one_line(faiss, option, message):
    result = CliRunner().invoke(app, [*SMALL, *option])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1


def test_clustered_codes_lie_around_centres():
    drawn = codes.draw_codes(codes.Data.clustered, 2000, 64, np.random.default_rng(1))
    distances = np.bitwise_count(drawn ^ drawn[:1]).sum(1)
    same, other = distances[distances < 20], distances[distances >= 20]
    assert len(same) < 50 and 28 < other.mean() < 36


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", cases.OPS)
def test_eager_and_fused_are_the_same_function(name, layout):
    """Outputs and gradients in float64, of x and of parameters under the same names."""
    op = cases.OPS[name]
    x = feature_map(layout, torch.float64, (2, 3, 5, 8))
    for direction in op.passes:
        modules = [module.double() for module in cases.build(op, x).values()]
        torch.testing.assert_close(*(cases.make_call(module, x, direction)() for module in modules))


def test_eager_hamming_is_the_ops_ranking():
    codes = ops.pack_bits(torch.randn(500, 16))  # 16 bits: many ties
    for got, want in zip(eager.hamming_topk(codes[:7], codes, 20), ops.hamming_topk(codes[:7], codes, 20), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("direction", [cases.FORWARD, cases.FORWARD_BACKWARD])
def test_wrong_results_are_not_timed(monkeypatch, direction):
    def run(x, lam):  # right or wrong in the pass under test only
        return simam(x, lam) + (1e-4 if direction == cases.FORWARD else 1e-4 * (x - x.detach()))

    simam = ops.simam
    monkeypatch.setattr("hashengine.nn.simam.simam", run)
    monkeypatch.setattr(kernels, "time_calls", lambda *_, **__: pytest.fail("timed"))
    op = cases.OPS["simam"]
    x = kernels.make_input((2, 3, 8, 8), kernels.Dtype.float32, kernels.Layout.contiguous, CPU)
    with pytest.raises(kernels.WrongResult, match="simam: result [01] of .* as accurate as eager.s before it is timed"):
        kernels.verify("simam", op, x, direction)


def test_integers_must_be_equal(monkeypatch):
    pack_bits = ops.pack_bits
    monkeypatch.setattr(ops, "pack_bits", lambda u: pack_bits(-u))
    result = CliRunner().invoke(app, ["kernels", "--op", "pack_bits", "--shape", "1", "1", "3", "16", "--no-compile"])
    assert result.exit_code == 1 and "integers differ" in result.output + str(result.exception)
    with pytest.raises(kernels.WrongResult, match="integers differ"):
        kernels.verify("pack_bits", cases.OPS["pack_bits"], torch.randn(3, 16), cases.FORWARD)


def test_kernels_prints_the_tables_and_keeps_every_number(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, dynamic, fullgraph: module)  # compiling takes a minute
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)  # and importing what it resets half of one
    output = tmp_path / "kernels-here.jsonl"
    shape = (2, 4, 6, 8)
    options = ["--shape", *shape, "--threads", 1, "--seconds", 0, "--layout", "channels_last", "--output", output]
    printed = invoke("kernels", "--op", "triplet_attention", "--op", "pack_bits", *options)
    assert "1 threads of" in printed and "triplet_attention" in printed
    rows = read_lines(output)
    assert [(row["op"], row["pass"], row["cache"]) for row in rows] == [
        (op, direction, cache)
        for op, directions in (("triplet_attention", ["forward", "forward+backward"]), ("pack_bits", ["forward"]))
        for direction in directions
        for cache in ("warm", "cold")
    ]
    for row in rows:
        assert {"cpu", "commit", "torch", "simd_level", "threads", "verified_batch"} <= row.keys()
        assert row["shape"] == list(shape) and row["layout"] == "channels_last" and row["rounds"] == 3
        assert set(row["seconds"]) == {"copy", "eager", "fused", "compile"}
        for name, quantiles in row["seconds"].items():
            assert 0 < quantiles["p20"] <= quantiles["p50"] <= quantiles["p80"], name
        assert row["percent_of_floor"]["fused"] == pytest.approx(
            100 * row["floor_bytes"] / (2 * 4 * math.prod(shape)) / row["copies"]["fused"]
        )
        assert row["peak_bytes"]["fused"] >= math.prod(shape) / 8
    assert set(rows[0]["speedup"]) == {"copy", "eager", "compile"}


def test_ops_take_turns_with_their_largest_batches_first_as_long_as_there_is_time(monkeypatch):
    clock, asked = iter([0, 0, 0, 0, 0, 61]), []
    monkeypatch.setattr(harness, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(kernels, "measure", lambda op, workload, *_, **__: asked.append((op, *workload.shape)) or [])
    options = ["--op", "simam", "--op", "pack_bits", "--model", "resnet18", "--model", "head", "--minutes", 1]
    assert "stopped after 1 minutes, without 13 of 17 measurements" in invoke("kernels", *options)
    assert asked == [
        ("simam", 32, 64, 56, 56),
        ("pack_bits", 65536, 16),
        ("simam", 32, 128, 28, 28),
        ("pack_bits", 65536, 64),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernels", "--op", "sigmoid"], "op must be one of simam"),
        (["kernels", "--device", "cuda:99"], "device cuda:99 must be there"),
        (["kernels", "--device", "tpu9"], "device must be cpu, cuda or cuda:N, got tpu9"),
        (["kernels", "--cuda-graphs"], "cuda-graphs needs --device cuda"),
        (["kernels", "--op", "simam", "--model", "head"], "no op of"),
        (["profile", "sigmoid"], "op must be one of simam"),
        (["profile", "hamming_topk", "--shape", "1", "10", "63", "1"], "shape must be QUERIES CODES BITS K"),
        (["model", "resnet18", "--dtype", "float16"], "dtype must be float32 or bfloat16"),
        (["model", "resnet19"], "model must be one of"),
        (["report", "--results", "nowhere"], "no kernels-*.jsonl in nowhere"),
    ],
)
def test_wrong_options_are_refused_in_one_line(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1


def test_a_shape_of_two_models_is_measured_once():
    found = shapes.workloads([shapes.Model.resnet50, shapes.Model.vgg16], None, gpu=False)
    assert len({workload.shape for workload in found}) == len(found) == 2 * (4 + 5 - 2)
    assert [w.models for w in found if w.shape == (32, 256, 56, 56)] == [["resnet50 x 32", "vgg16 x 32"]]
    batches = {w.shape[0] for w in shapes.workloads([shapes.Model.resnet18], None, gpu=True)}
    assert batches == {1, 32, 128}
    assert {w.shape[0] for w in shapes.workloads(list(shapes.Model), [5], gpu=True)} == {5}


def test_floors_are_the_designs():
    x = torch.empty(2, 4, 8, 8)
    floors = {
        (name, direction): [cases.OPS[name].floor(x, direction, on_chip) / x.nbytes for on_chip in (1 << 20, 16)]
        for name in ("simam", "triplet_attention", "greedy_sign")
        for direction in (cases.FORWARD, cases.FORWARD_BACKWARD)
    }
    maps = 2 * (4 * 8 + 8 * 4 + 8 * 8) * 2 * 16 / x.nbytes  # 16 bytes each, written and read
    assert floors == {
        ("simam", "forward"): [2, 3],
        ("simam", "forward+backward"): [5, 8],
        ("triplet_attention", "forward"): [2, 3],
        ("triplet_attention", "forward+backward"): [7 + maps, 7 + maps],
        ("greedy_sign", "forward"): [2, 2],
        ("greedy_sign", "forward+backward"): [5, 5],
    }


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
    assert turns[4:] == [(1e-3, 50), (0.1, 1)] * 6
    assert len(timing.time_calls({"slow": 9.0}, Clock(), cold=False, seconds=1.0)["slow"]) == 3


def test_a_cold_call_finds_another_array_in_the_cache():
    clock = timing.CpuClock()
    assert clock._eviction.nbytes >= 2 * clock.cache_bytes >= 1 << 20
    seen = []
    for cold in (True, False):
        assert len(clock.burst(lambda: seen.append(int(clock._eviction[-1])), 2, cold)) == 2
    assert seen == [1, 2, 2, 2]


def test_the_cuda_clock_pairs_its_events(monkeypatch):
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


def test_the_peak_counts_what_lives_at_once():
    x = torch.randn(1 << 16)
    scalars = 100
    assert memory.peak_bytes(lambda: (x + 1) * 2, CPU) == pytest.approx(2 * x.nbytes, abs=scalars)
    assert memory.peak_bytes(lambda: (x + 1).add_(2), CPU) == pytest.approx(x.nbytes, abs=scalars)
    assert memory.peak_bytes(lambda: x.add_(0), CPU) <= scalars


def test_the_extra_memory_of_a_call_is_that_above_what_it_returns():
    held = np.ones(8 << 20, np.uint8)

    def call():
        scratch = np.ones(32 << 20, np.uint8)
        return (scratch[: len(held)] + held,)

    extra = memory.extra_resident_bytes(call)
    assert extra is None or extra == pytest.approx(32 << 20, abs=2 << 20)
