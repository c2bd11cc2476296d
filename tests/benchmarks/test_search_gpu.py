"""The GPU search benchmarks, mostly run on the CPU at tiny sizes: limits, verified rows, the suite and its report."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks import harness, report, timing
from benchmarks.harness import WrongAnswer
from benchmarks.search import gpu, gpu_limits, gpu_suite, latency, oracle, streaming, torch_search
from benchmarks.search import report as search_report
from benchmarks.search.cases import Case, Task
from benchmarks.search.data import Data, make_codes
from benchmarks.search.database import Database
from benchmarks.search.gpu_limits import Gpu, Work
from benchmarks.timing import make_clock
from hashengine import HammingIndex, ops
from hashengine.index import execution
from tests.helpers.benchmarks import assert_refused, invoke, read_lines
from tests.helpers.faiss_oracle import equal_up_to_ties
from tests.helpers.paths import ROOT

CPU = torch.device("cpu")
H200 = Gpu(132, 1.755e9, "maximum", 4.3e12, tensor=True)
TINY = Case(3000, 64, 8, 5)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def work(queries: int, codes: int, bits: int, k: int = 10, share: float = 1.0) -> Work:
    answer_bytes = 12 * queries * k  # an int32 distance and an int64 position per neighbour
    return Work(queries, codes, bits, answer_bytes, share)


@pytest.mark.parametrize(
    ("bits", "popcount", "tensor"),
    [(64, 1.853, 29.65), (128, 0.927, 29.65), (256, 0.463, 14.83), (512, 0.2317, 7.413), (1024, 0.1158, 3.707)],
)
def test_limits_of_many_queries_follow_from_the_hardware(bits, popcount, tensor):
    """The expected limits are in 10^12 distances/s, computed by hand for 132 multiprocessors at 1.755 GHz."""
    found = gpu_limits.rate_limits(H200, work(10_000, 1_000_000, bits))
    assert found["popcount"] / 1e12 == pytest.approx(popcount, rel=1e-3)
    assert found["tensor"] / 1e12 == pytest.approx(tensor, rel=1e-3)
    assert found["alu"] / 1e12 == pytest.approx(24.32, rel=1e-3)
    assert gpu_limits.lowest(found) == ("alu" if bits <= 128 else "tensor")
    without = gpu_limits.rate_limits(H200._replace(tensor=False), work(10_000, 1_000_000, bits))
    assert without.keys() == {"popcount", "memory"} and gpu_limits.lowest(without) == "popcount"


def test_memory_is_the_lowest_limit_of_few_queries_and_of_whole_rankings():
    one = gpu_limits.rate_limits(H200, work(1, 100_000_000, 64))
    assert gpu_limits.lowest(one) == "memory"
    assert 100e6 / one["memory"] == pytest.approx(186e-6, rel=1e-3)  # seconds to read 800 MB at 4.3 TB/s
    eight = gpu_limits.rate_limits(H200, work(8, 100_000_000, 64))
    assert eight["memory"] == pytest.approx(8 * one["memory"], rel=1e-3) and gpu_limits.lowest(eight) == "memory"
    ranking = gpu_limits.rate_limits(H200, work(100, 1_000_000, 64, k=1_000_000))
    bytes_per_distance = 12 + 8 / 100  # of the answer, and of a code that is read once for 100 queries
    assert ranking["memory"] == pytest.approx(4.3e12 / bytes_per_distance, rel=1e-3)
    assert gpu_limits.lowest(ranking) == "memory"


def test_codes_that_a_filter_excludes_raise_the_limits():
    all_codes, few = (gpu_limits.rate_limits(H200, work(100, 1_000_000, 64, share=share)) for share in (1.0, 0.01))
    assert few["alu"] == pytest.approx(100 * all_codes["alu"])
    assert 50 < few["memory"] / all_codes["memory"] < 100  # the answers have the same size


@pytest.mark.parametrize("bits", [64, 72, 1024])
def test_the_searches_in_torch_are_exact(bits, monkeypatch):
    """The database is searched once in one chunk, once in many chunks."""
    database = Database(Case(700, bits, 7, 5), CPU)
    queries = database.queries[:7]
    expected = ops.hamming_topk(queries, database.codes, 30)
    for chunk in (1 << 20, 7 * 100):
        monkeypatch.setattr(torch_search, "_MAX_DISTANCES", chunk)
        monkeypatch.setattr(torch_search, "_MAX_SCORES", chunk)
        assert all(map(torch.equal, torch_search.topk_by_xor(queries, database.codes, 30), expected))
        assert equal_up_to_ties(torch_search.ProductSearch(database.codes).search(queries, 30), expected)


def test_peers_may_order_ties_differently_but_must_be_right():
    distances, positions = torch.tensor([[1, 2, 2]], dtype=torch.int32), torch.tensor([[4, 0, 9]])
    assert equal_up_to_ties((distances, torch.tensor([[4, 7, 8]])), (distances, positions))
    assert not equal_up_to_ties((distances, torch.tensor([[5, 0, 9]])), (distances, positions))
    assert not equal_up_to_ties((distances + 1, positions), (distances, positions))


FILTERED = TINY._replace(task=Task.filter, share=0.01)
RANGE = TINY._replace(task=Task.range)
MAP = TINY._replace(task=Task.map, k=None)
CASES = [
    TINY,
    TINY._replace(queries=1000),  # also searched from and to host memory
    TINY._replace(k=3000),  # the whole ranking
    FILTERED,
    RANGE,
    MAP,
    TINY._replace(data=Data.equal),  # all codes are tied
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_has_rates_ratios_and_limits(case, monkeypatch):
    monkeypatch.setattr(gpu_limits, "under_load", lambda gpu, device, call: gpu._replace(clock_is="held"))
    rows = gpu.measure_search(case, Database(case, CPU), make_clock(CPU), H200, 0)
    assert [row["cache"] for row in rows] == ["warm", "cold"]
    for row in rows:
        taken = np.median(row["seconds"]["hashengine"])
        assert row["distances_per_s"] == pytest.approx(case.codes * case.queries / taken)
        assert row["queries_per_s"] == pytest.approx(case.queries / taken)
        name = row["lowest_limit"]
        assert row["of_limits"][name] == row["distances_per_s"] / row["limits"][name]
        assert row["clock_is"] == "held" and row["extra_bytes"] >= 0 and not row["left_out"]
        peers = {"torch product"} | ({"torch xor"} if case.queries <= 32 else set())
        assert row["times"].keys() == (peers if case.task is Task.search else set())
        assert ("times_one_query" in row) == (case.task is Task.search and case.queries == 8)
        assert ("hashengine host to host" in row["seconds"]) == (case.queries == 1000)


def off_by_one(name):
    """An op that adds 1 to each value of the right answer."""
    right = getattr(ops, name)
    return lambda *arguments, **options: tuple(part + 1 for part in right(*arguments, **options))


@pytest.mark.parametrize(
    ("case", "name"),
    [(TINY, "hamming_topk"), (FILTERED, "hamming_topk"), (RANGE, "hamming_range"), (MAP, "hamming_count")],
    ids=str,
)
@pytest.mark.parametrize("too_large_for_the_oracle", [False, True])
def test_a_wrong_answer_raises_wrong_answer(case, name, too_large_for_the_oracle, monkeypatch):
    monkeypatch.setattr(gpu, "_MAX_HOST_CODES", 0 if too_large_for_the_oracle else 1 << 30)
    database = Database(case, CPU)
    gpu.make_plan(case, database)
    monkeypatch.setattr(ops, name, off_by_one(name))
    with pytest.raises(WrongAnswer, match="before they are timed"):
        gpu.make_plan(case, database)


def test_a_wrong_peer_is_left_out_and_a_slow_peer_is_called_once(monkeypatch):
    database = Database(TINY, CPU)
    monkeypatch.setattr(torch_search, "topk_by_xor", off_by_one("hamming_topk"))
    plan = gpu.make_plan(TINY, database)
    assert plan.left_out == {"torch xor": "its answers are wrong"} and "torch product" in plan.systems
    monkeypatch.setattr(gpu, "_MAX_SECONDS_IN_ROUNDS", 0)
    assert gpu.make_plan(TINY, database).called_once.keys() == {"torch product"}


def test_without_faiss_the_cpu_kernels_are_the_oracle(monkeypatch):
    monkeypatch.setattr(oracle, "faiss_version", lambda: None)
    codes = make_codes(Data.random, 300, 5, 64, None)
    cpu_kernels = oracle.make_oracle(codes.database, None)
    assert cpu_kernels.name == "hashengine on the CPU"
    expected = ops.hamming_topk(torch.from_numpy(codes.queries), torch.from_numpy(codes.database), 9)
    for found, right in zip(cpu_kernels.search(codes.queries, 9), expected, strict=True):
        assert np.array_equal(found, right.numpy())


def test_latencies_are_quantiles_of_verified_calls(monkeypatch):
    monkeypatch.setattr(latency, "_ROUNDS", 2)
    row = latency.measure_latency(TINY, Database(TINY, CPU), make_clock(CPU))
    names = {"", " from activations", " from activations as a graph", " host to host", " on the device"}
    assert row["latency"].keys() == {f"hashengine{name}" for name in names} | {
        "hashengine from activations on the device"
    }
    assert all(0 < at["p50"] <= at["p99"] and at["calls"] >= 2 for at in row["latency"].values())
    monkeypatch.setattr(ops, "pack_bits", lambda u: torch.zeros(len(u), 8, dtype=torch.uint8))
    with pytest.raises(WrongAnswer):
        latency.measure_latency(TINY, Database(TINY, CPU), make_clock(CPU))


def test_a_streamed_search_is_verified_and_compared_with_the_copy(monkeypatch):
    monkeypatch.setattr(execution, "STREAM_CHUNK_BYTES", 1000 * TINY.bits // 8)  # three chunks
    monkeypatch.setattr(timing, "_BURST_SECONDS", 0)
    row = streaming.measure_streaming(TINY, Database(TINY, CPU))
    assert row["seconds"].keys() == {"hashengine", "copy"}
    ours, copy = (np.array(row["seconds"][name]) for name in ("hashengine", "copy"))
    assert row["of_copy"] == np.median(copy / ours)
    assert row["distances_per_s"] == TINY.codes * TINY.queries / np.median(ours)
    assert row["host_bytes_per_s"] == TINY.codes * TINY.bits // 8 / np.median(copy)
    search = HammingIndex.search
    monkeypatch.setattr(HammingIndex, "search", lambda *arguments: tuple(part + 1 for part in search(*arguments)))
    with pytest.raises(WrongAnswer, match="before it is timed"):
        streaming.measure_streaming(TINY, Database(TINY, CPU))


@pytest.fixture
def steps():
    cases = (TINY, TINY._replace(queries=1), TINY._replace(codes=2000, queries=1))
    return [
        *((gpu_suite.SEARCH, case) for case in cases),
        (gpu_suite.LATENCY, TINY),
        (gpu_suite.BUILD, TINY),
        (gpu_suite.STREAM, TINY),
    ]


def run(steps, output, minutes=5.0):
    return gpu_suite.run(steps, device="cpu", minutes=minutes, output=output, seconds=0)


def test_only_steps_before_the_deadline_are_measured_and_stored(steps, tmp_path, capsys, monkeypatch):
    output = tmp_path / "hamming-gpu-here.jsonl"
    clock = iter([0, 0, 0, 1000, 1000])  # seconds at the start and before each step
    monkeypatch.setattr(harness.time, "monotonic", lambda: next(clock))
    run(steps, output)
    printed = capsys.readouterr().out
    assert "stopped after 5 minutes, without 4 of 6 measurements" in printed
    rows = read_lines(output)
    assert [(row["queries"], row["cache"]) for row in rows] == [(8, "warm"), (8, "cold"), (1, "warm"), (1, "cold")]
    for row in rows:
        assert {"cpu", "commit", "torch", "faiss"} <= row.keys() and row["benchmark"] == "hamming-gpu"


def test_a_failure_is_reported_and_the_other_rows_are_stored(steps, tmp_path, monkeypatch):
    def wrong_for_one_query(queries, codes, k, **options):
        distances, positions = right(queries, codes, k, **options)
        return distances, positions + (len(queries) == 1 and len(codes) == 2000)

    right = ops.hamming_topk
    monkeypatch.setattr(ops, "hamming_topk", wrong_for_one_query)
    output = tmp_path / "rows.jsonl"
    with pytest.raises(SystemExit, match=r"1 of 3 measurements failed:\nsearch, search of 2,000 x 64 bits"):
        run(steps[:3], output)
    assert len(read_lines(output)) == 4


def test_the_report_has_tables_and_a_plot_and_is_the_same_each_time(steps, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(latency, "_ROUNDS", 2)
    for _ in range(2):  # the report shows the newest rows only
        run([(what, case._replace(k=10)) for what, case in steps], tmp_path / "hamming-gpu-here.jsonl")
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        written = [file.name for file in report.render(tmp_path, folder)]
        assert written == ["search-gpu.md", "search-gpu.svg"]
    for name in written:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    text = (folders[0] / "search-gpu.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| search")]
    assert len(lines) == 6 and lines[0].startswith("| search | 3,000 | 64 | 8 | 10 | warm |")
    assert "Microseconds of single calls" in text and "Adding 3,000 codes of 64 bits: hashengine" in text


@pytest.mark.parametrize("file", search_report.gpu_files(report.RESULTS), ids=lambda file: file.stem)
def test_the_committed_rows_make_tables(file):
    assert "G distances/s" in search_report.gpu_tables(search_report.read(file))


def test_the_suite_has_each_step_once_and_can_be_shrunk():
    steps = gpu_suite.suite()
    assert len(set(steps)) == len(steps) and steps[0] == ("search", Case(1_000_000, 64, 10_000, 10))
    small = gpu_suite.shrunk_suite(10_000)
    assert len(small) == len(steps)
    assert all(case.codes <= 100_000 and (case.k or 1) <= case.share * case.codes for _, case in small)


def test_the_suite_starts_without_the_packages_of_the_command_line(tmp_path):
    missing = ["pydantic", "rich", "typer", "tqdm", "faiss", "matplotlib", "PIL", "torchvision"]
    code = f"import sys; sys.modules.update(dict.fromkeys({missing}))\nfrom benchmarks.search import gpu_suite\n"
    code += "gpu_suite.main()"
    options = ["--device", "cpu", "--minutes", "0", "--output", str(tmp_path / "rows.jsonl")]
    done = subprocess.run([sys.executable, "-c", code, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count = len(gpu_suite.suite())
    assert "FAISS missing" in done.stdout and f"stopped after 0 minutes, without {count} of {count}" in done.stdout


def test_hamming_passes_its_options_to_the_gpu_benchmark(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(gpu_suite, "run", lambda steps, **options: given.update(options, steps=steps))
    options = ["--codes", 3000, "--bits", 64, "-k", 5, "--task", "filter", "--task", "map", "--share", 0.01]
    output = tmp_path / "rows.jsonl"
    invoke("hamming", *options, "--device", "cuda:1", "--rounds", 7, "--images", tmp_path, "--output", output)
    cases = [Case(3000, 64, 1000, 5, Task.filter, share=0.01), Case(3000, 64, 1000, None, Task.map)]
    assert (given["device"], given["rounds"], given["images"], given["output"]) == ("cuda:1", 7, tmp_path, output)
    assert given["steps"] == [(gpu_suite.SEARCH, case) for case in cases]


@needs_gpu
def test_every_kind_of_measurement_works_on_a_gpu(tmp_path):
    output = tmp_path / "rows.jsonl"
    gpu_suite.run(gpu_suite.shrunk_suite(1000), device="cuda", minutes=5, output=output, seconds=0)
    tasks = {"search", "latency", "build", "stream", "filter", "range", "map"}
    assert {row["task"] for row in read_lines(output)} == tasks


@pytest.mark.parametrize("command", ["hamming", "hamming-gpu"])
def test_a_missing_device_is_refused(command):
    options = ["--codes", 3000, "-k", 5] if command == "hamming" else []
    assert_refused(f"{command}: device must be ", command, *options, "--device", "cuda:99")


def test_the_rounds_option_sets_the_number_of_rounds(monkeypatch):
    monkeypatch.setattr(timing, "_BURST_SECONDS", 0)
    for row in gpu.measure_search(TINY, Database(TINY, CPU), make_clock(CPU), None, 0, rounds=4):
        assert {len(seconds) for seconds in row["seconds"].values()} == {4}


def test_a_new_plan_has_no_systems_left_out_or_called_once():
    plan = gpu.Plan({}, 0, "nobody", 0)
    assert plan.called_once == plan.left_out == {}
