"""What measures searches on a GPU, on the CPU at tiny sizes: bounds, verified rows, the suite, its report."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks import gpu_bounds, gpu_latency, gpu_peers, gpu_search, gpu_stream, hamming_gpu, hamming_report, harness
from benchmarks.codes import Data, make_codes
from benchmarks.gpu_bounds import Gpu, Work
from benchmarks.gpu_data import Case, Database, make_oracle
from benchmarks.systems import Task
from benchmarks.timing import make_clock
from hashengine import InputError, ops
from hashengine.index import _parts, _search
from tests.benchmarks.test_benchmarks import invoke, read_lines
from tests.helpers.paths import ROOT

CPU = torch.device("cpu")
H200 = Gpu(132, 1.755e9, "maximum", 4.3e12, tensor=True)
TINY = Case(3000, 64, 8, 5)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def work(queries: int, codes: int, bits: int, k: int = 10, share: float = 1.0) -> Work:
    return Work(queries, codes, bits, 12 * queries * k, share)


@pytest.mark.parametrize(
    ("bits", "popcount", "tensor"),
    [(64, 1.853, 29.65), (128, 0.927, 29.65), (256, 0.463, 14.83), (512, 0.2317, 7.413), (1024, 0.1158, 3.707)],
)
def test_bounds_of_many_queries_are_those_of_the_hardware(bits, popcount, tensor):
    """In T distances/s, worked out by hand from 132 multiprocessors at 1.755 GHz."""
    found = gpu_bounds.bounds(H200, work(10_000, 1_000_000, bits))
    assert found["popcount"] / 1e12 == pytest.approx(popcount, rel=1e-3)
    assert found["tensor"] / 1e12 == pytest.approx(tensor, rel=1e-3)
    assert found["alu"] / 1e12 == pytest.approx(24.32, rel=1e-3)
    assert gpu_bounds.limiting(found) == ("alu" if bits <= 128 else "tensor")
    without = gpu_bounds.bounds(H200._replace(tensor=False), work(10_000, 1_000_000, bits))
    assert without.keys() == {"popcount", "memory"} and gpu_bounds.limiting(without) == "popcount"


def test_memory_limits_few_queries_and_the_whole_ranking():
    one = gpu_bounds.bounds(H200, work(1, 100_000_000, 64))
    assert gpu_bounds.limiting(one) == "memory"
    assert 100e6 / one["memory"] == pytest.approx(186e-6, rel=1e-3)
    eight = gpu_bounds.bounds(H200, work(8, 100_000_000, 64))
    assert eight["memory"] == pytest.approx(8 * one["memory"], rel=1e-3) and gpu_bounds.limiting(eight) == "memory"
    ranking = gpu_bounds.bounds(H200, work(100, 1_000_000, 64, k=1_000_000))
    assert ranking["memory"] == pytest.approx(4.3e12 / (12 + 8 / 100), rel=1e-3)
    assert gpu_bounds.limiting(ranking) == "memory"


def test_a_filter_spares_what_it_leaves_out():
    all_codes, few = (gpu_bounds.bounds(H200, work(100, 1_000_000, 64, share=share)) for share in (1.0, 0.01))
    assert few["alu"] == pytest.approx(100 * all_codes["alu"])
    assert 50 < few["memory"] / all_codes["memory"] < 100  # the answers are as many


@pytest.mark.parametrize("bits", [64, 72, 1024])
def test_torch_systems_answer_right(bits, monkeypatch):
    """In one part and in many."""
    database = Database(Case(700, bits, 7, 5), CPU)
    queries = database.queries[:7]
    want = ops.hamming_topk(queries, database.codes, 30)
    for parts in (1 << 20, 7 * 100):
        monkeypatch.setattr(gpu_peers, "_PAIRS", parts)
        monkeypatch.setattr(gpu_peers, "_SCORES", parts)
        for got, expected in zip(gpu_peers.xor_topk(queries, database.codes, 30), want, strict=True):
            assert torch.equal(got, expected)
        assert gpu_peers.agrees(gpu_peers.Product(database.codes).search(queries, 30), want)


def test_peers_need_not_break_ties_alike_but_must_be_right():
    distances, positions = torch.tensor([[1, 2, 2]], dtype=torch.int32), torch.tensor([[4, 0, 9]])
    assert gpu_peers.agrees((distances, torch.tensor([[4, 7, 8]])), (distances, positions))
    assert not gpu_peers.agrees((distances, torch.tensor([[5, 0, 9]])), (distances, positions))
    assert not gpu_peers.agrees((distances + 1, positions), (distances, positions))


CASES = [
    TINY,
    TINY._replace(queries=1000),
    TINY._replace(k=3000),
    TINY._replace(task=Task.filter, share=0.01),
    TINY._replace(task=Task.range),
    TINY._replace(task=Task.map, k=None),
    TINY._replace(data=Data.equal),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_tells_rates_ratios_and_bounds(case, monkeypatch):
    monkeypatch.setattr(gpu_bounds, "under_load", lambda gpu, device, call: gpu._replace(clock_is="held"))
    rows = gpu_search.measure(case, Database(case, CPU), make_clock(CPU), H200, 0)
    assert [row["cache"] for row in rows] == ["warm", "cold"]
    for row in rows:
        taken = np.median(row["seconds"]["hashengine"])
        assert row["distances_per_s"] == pytest.approx(case.codes * case.queries / taken)
        assert row["queries_per_s"] == pytest.approx(case.queries / taken)
        assert row["of_bounds"][row["limit"]] == row["distances_per_s"] / row["bounds"][row["limit"]]
        assert row["clock_is"] == "held" and row["extra_bytes"] >= 0 and not row["left_out"]
        peers = {"torch product"} | ({"torch xor"} if case.queries <= 32 else set())
        assert row["times"].keys() == (peers if case.task is Task.search else set())
        assert ("times_one_query" in row) == (case.task is Task.search and case.queries == 8)
        assert ("hashengine host to host" in row["seconds"]) == (case.queries == 1000)


def off_by_one(name):
    right = getattr(ops, name)
    return lambda *arguments, **options: tuple(part + 1 for part in right(*arguments, **options))


@pytest.mark.parametrize(
    ("case", "name"),
    [(TINY, "hamming_topk"), (CASES[3], "hamming_topk"), (CASES[4], "hamming_range"), (CASES[5], "hamming_count")],
    ids=str,
)
@pytest.mark.parametrize("on_device", [False, True])
def test_wrong_answers_are_not_timed(case, name, on_device, monkeypatch):
    monkeypatch.setattr(gpu_search, "_HOST_CODES", 0 if on_device else 1 << 30)
    monkeypatch.setattr(gpu_search, "time_calls", lambda *_, **__: pytest.fail("timed"))
    database = Database(case, CPU)
    gpu_search.Plan(case, database)
    monkeypatch.setattr(ops, name, off_by_one(name))
    with pytest.raises(gpu_search.WrongAnswer, match="before they are timed"):
        gpu_search.Plan(case, database)


def test_a_wrong_peer_is_left_out_and_a_slow_one_called_once(monkeypatch):
    database = Database(TINY, CPU)
    monkeypatch.setattr(gpu_peers, "xor_topk", off_by_one("hamming_topk"))
    plan = gpu_search.Plan(TINY, database)
    assert plan.left_out == {"torch xor": "its answers are wrong"} and "torch product" in plan.systems
    monkeypatch.setattr(gpu_search, "_LONGEST", 0)
    assert gpu_search.Plan(TINY, database).called_once.keys() == {"torch product"}


def test_without_faiss_the_kernels_of_the_cpu_are_the_oracle(monkeypatch):
    monkeypatch.setattr(gpu_peers, "faiss_version", lambda: None)
    codes = make_codes(Data.random, 300, 5, 64, None)
    oracle = make_oracle(codes.database, None)
    assert oracle.name == "hashengine on the CPU"
    want = ops.hamming_topk(torch.from_numpy(codes.queries), torch.from_numpy(codes.database), 9)
    for got, expected in zip(oracle.search(codes.queries, 9), want, strict=True):
        assert np.array_equal(got, expected.numpy())


@pytest.mark.parametrize("data", [Data.best_last, Data.best_first])
def test_neighbours_stand_at_one_end(data):
    codes = make_codes(data, 2000, 6, 64, None)
    positions = ops.hamming_topk(*map(torch.from_numpy, (codes.queries, codes.database)), 10)[1].double()
    assert (positions.mean() > 1500) == (data is Data.best_last)
    equal = make_codes(Data.equal, 100, 2, 64, None)
    assert (equal.database == equal.database[0]).all() and (equal.queries[0] != equal.queries[1]).any()


def test_latencies_are_quantiles_of_verified_calls(monkeypatch):
    monkeypatch.setattr(gpu_latency, "_ROUNDS", 2)
    row = gpu_latency.measure_latency(TINY, Database(TINY, CPU), make_clock(CPU))
    names = {"", " from activations", " from activations as a graph", " host to host", " on the device"}
    assert row["latency"].keys() == {f"hashengine{name}" for name in names} | {
        "hashengine from activations on the device"
    }
    assert all(0 < at["p50"] <= at["p99"] and at["calls"] >= 2 for at in row["latency"].values())
    monkeypatch.setattr(ops, "pack_bits", lambda u: torch.zeros(len(u), 8, dtype=torch.uint8))
    with pytest.raises(gpu_search.WrongAnswer):
        gpu_latency.measure_latency(TINY, Database(TINY, CPU), make_clock(CPU))


def test_what_is_streamed_is_verified_and_put_beside_the_copy(monkeypatch):
    monkeypatch.setattr(_parts, "_CHUNK_BYTES", 1000 * TINY.bits // 8)
    monkeypatch.setattr(harness, "_BURST_SECONDS", 0)
    row = gpu_stream.measure_stream(TINY, Database(TINY, CPU))
    assert row["seconds"].keys() == {"hashengine", "copy"}
    ours, copy = (np.array(row["seconds"][name]) for name in ("hashengine", "copy"))
    assert row["of_copy"] == np.median(copy / ours)
    assert row["distances_per_s"] == TINY.codes * TINY.queries / np.median(ours)
    assert row["host_bytes_per_s"] == TINY.codes * TINY.bits // 8 / np.median(copy)
    monkeypatch.setattr(_search, "merged_topk", lambda answers, **_: answers[0])
    with pytest.raises(gpu_search.WrongAnswer, match="before it is timed"):
        gpu_stream.measure_stream(TINY, Database(TINY, CPU))


@pytest.fixture
def steps():
    cases = (TINY, TINY._replace(queries=1), TINY._replace(codes=2000, queries=1))
    return [
        *((hamming_gpu.SEARCH, case) for case in cases),
        (hamming_gpu.LATENCY, TINY),
        (hamming_gpu.BUILD, TINY),
        (hamming_gpu.STREAM, TINY),
    ]


def run(steps, output, minutes=5.0):
    return hamming_gpu.run(steps, device="cpu", minutes=minutes, output=output, seconds=0)


def test_rows_are_kept_as_soon_as_they_are_there(steps, tmp_path, capsys, monkeypatch):
    output = tmp_path / "hamming-gpu-here.jsonl"
    clock = iter([0, 0, 0, 1000, 1000])
    monkeypatch.setattr(harness.time, "monotonic", lambda: next(clock))
    run(steps, output)
    printed = capsys.readouterr().out
    assert "stopped after 5 minutes, without 4 of 6 measurements" in printed
    rows = read_lines(output)
    assert [(row["queries"], row["cache"]) for row in rows] == [(8, "warm"), (8, "cold"), (1, "warm"), (1, "cold")]
    for row in rows:
        assert {"cpu", "commit", "torch", "faiss"} <= row.keys() and row["benchmark"] == "hamming-gpu"


def test_a_failure_is_told_and_the_others_are_kept(steps, tmp_path, monkeypatch):
    def wrong_for_one_query(queries, codes, k, **options):
        distances, positions = right(queries, codes, k, **options)
        return distances, positions + (len(queries) == 1 and len(codes) == 2000)

    right = ops.hamming_topk
    monkeypatch.setattr(ops, "hamming_topk", wrong_for_one_query)
    output = tmp_path / "rows.jsonl"
    with pytest.raises(SystemExit, match=r"1 of 3 measurements failed:\nsearch, search of 2,000 x 64 bits"):
        run(steps[:3], output)
    assert len(read_lines(output)) == 4


def test_the_report_tells_and_draws_what_was_measured(steps, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(gpu_latency, "_ROUNDS", 2)
    for _ in range(2):  # the newest count
        run([(what, case._replace(k=10)) for what, case in steps], tmp_path / "hamming-gpu-here.jsonl")
    plots = [tmp_path / name for name in ("one.svg", "two.svg")]
    for plot in plots:
        options = ["--results", tmp_path, "--plot", tmp_path / "no.svg", "--search-plot", plot]
        printed = invoke("report", *options)
    assert plots[0].read_bytes() == plots[1].read_bytes() and not (tmp_path / "no.svg").exists()
    lines = [line for line in printed.splitlines() if line.startswith("| search")]
    assert len(lines) == 6 and lines[0].startswith("| search | 3,000 | 64 | 8 | 10 | warm |")
    assert "Microseconds of single calls" in printed and "Adding 3,000 codes of 64 bits: hashengine" in printed


@pytest.mark.parametrize(
    "file", hamming_report.result_files(ROOT / "benchmarks" / "results"), ids=lambda file: file.stem
)
def test_kept_rows_make_tables(file):
    assert "G distances/s" in hamming_report.markdown(hamming_report.read_rows(file))


def test_the_suite_asks_for_everything_once_and_shrinks():
    steps = hamming_gpu.suite()
    assert len(set(steps)) == len(steps) and steps[0] == ("search", Case(1_000_000, 64, 10_000, 10))
    small = hamming_gpu.planned(10_000)
    assert len(small) == len(steps)
    assert all(case.codes <= 100_000 and (case.k or 1) <= case.share * case.codes for _, case in small)


def test_the_suite_runs_where_only_torch_and_numpy_are_installed(tmp_path):
    missing = ["pydantic", "rich", "typer", "tqdm", "faiss", "matplotlib", "PIL", "torchvision"]
    code = f"import sys; sys.modules.update(dict.fromkeys({missing}))\nfrom benchmarks import hamming_gpu\n"
    code += "hamming_gpu.main()"
    options = ["--device", "cpu", "--minutes", "0", "--output", str(tmp_path / "rows.jsonl")]
    done = subprocess.run([sys.executable, "-c", code, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count = len(hamming_gpu.suite())
    assert "FAISS missing" in done.stdout and f"stopped after 0 minutes, without {count} of {count}" in done.stdout


def test_hamming_measures_on_the_device_that_is_named(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(hamming_gpu, "run", lambda steps, **options: given.update(options, steps=steps))
    options = ["--codes", 3000, "--bits", 64, "-k", 5, "--task", "filter", "--task", "map", "--share", 0.01]
    invoke("hamming", *options, "--device", "cuda:1", "--output", tmp_path / "rows.jsonl")
    cases = [Case(3000, 64, 1000, 5, Task.filter, share=0.01), Case(3000, 64, 1000, None, Task.map)]
    assert given["device"] == "cuda:1" and given["steps"] == [(hamming_gpu.SEARCH, case) for case in cases]


@needs_gpu
def test_every_kind_of_measurement_works_on_a_gpu(tmp_path):
    output = tmp_path / "rows.jsonl"
    hamming_gpu.run(hamming_gpu.planned(1000), device="cuda", minutes=5, output=output, seconds=0)
    assert {json.loads(line)["task"] for line in output.read_text().splitlines()} == {
        "search", "latency", "build", "stream", "filter", "range", "map",
    }  # fmt: skip


def test_the_device_has_a_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(harness.find_device(name)) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda:0", "cuda:1"]
    with pytest.raises(InputError, match="device cuda:2 must be there, got 2 GPUs"):
        harness.find_device("cuda:2")
