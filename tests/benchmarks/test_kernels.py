"""`kernels` and `profile`: the verification of results, the rows and tables, the order of measurements, the traces."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import WrongAnswer
from benchmarks.kernels import eager, measure, shapes
from benchmarks.kernels.inputs import Dtype, Layout, make_input
from benchmarks.kernels.ops import FORWARD, FORWARD_BACKWARD, OPS, build, make_call
from hashengine import ops
from tests.helpers.benchmarks import assert_refused, invoke, read_lines, run_command
from tests.helpers.layouts import feature_map

CPU = torch.device("cpu")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", OPS)
def test_eager_and_fused_compute_the_same(name, layout):
    """In float64, their outputs agree, and so do the gradients of x and of the parameters."""
    op = OPS[name]
    x = feature_map(layout, torch.float64, (2, 3, 5, 8))
    for direction in op.passes:
        modules = [module.double() for module in build(op, x).values()]
        torch.testing.assert_close(*(make_call(module, x, direction)() for module in modules))


def test_eager_hamming_topk_equals_the_fused_op():
    codes = ops.pack_bits(torch.randn(500, 16))  # 16 bits: many ties
    actual, expected = eager.hamming_topk(codes[:7], codes, 20), ops.hamming_topk(codes[:7], codes, 20)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("direction", [FORWARD, FORWARD_BACKWARD])
def test_results_that_are_less_accurate_than_eager_raise_wrong_answer(monkeypatch, direction):
    def wrong_output_or_gradient(x, lam):
        return simam(x, lam) + (1e-4 if direction == FORWARD else 1e-4 * (x - x.detach()))

    simam = ops.simam
    monkeypatch.setattr("hashengine.nn.simam.simam", wrong_output_or_gradient)
    x = make_input((2, 3, 8, 8), Dtype.float32, Layout.contiguous, CPU)
    with pytest.raises(WrongAnswer, match="simam: result [01] of .* as accurate as eager.s before it is timed"):
        measure.verify("simam", OPS["simam"], x, direction)


def test_integers_must_be_equal(monkeypatch):
    pack_bits = ops.pack_bits
    monkeypatch.setattr(ops, "pack_bits", lambda u: pack_bits(-u))
    result = run_command("kernels", "--op", "pack_bits", "--shape", 1, 1, 3, 16, "--no-compile")
    assert result.exit_code == 1 and "integers differ" in result.output + str(result.exception)
    with pytest.raises(WrongAnswer, match="integers differ"):
        measure.verify("pack_bits", OPS["pack_bits"], torch.randn(3, 16), FORWARD)


def test_kernels_prints_the_table_and_writes_complete_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, dynamic, fullgraph: module)  # compiling is slow
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)  # its imports are slow
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


def test_ops_take_turns_with_their_largest_batches_first_until_the_deadline(monkeypatch):
    clock, measured = iter([0, 0, 0, 0, 0, 61]), []  # seconds at the start and before each measurement
    monkeypatch.setattr(harness, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(
        measure, "measure", lambda each, *_, **__: measured.append((each.op, *each.workload.shape)) or []
    )
    options = ["--op", "simam", "--op", "pack_bits", "--model", "resnet18", "--model", "head", "--minutes", 1]
    assert "stopped after 1 minutes, without 13 of 17 measurements" in invoke("kernels", *options)
    assert measured == [
        ("simam", 32, 64, 56, 56),
        ("pack_bits", 65536, 16),
        ("simam", 32, 128, 28, 28),
        ("pack_bits", 65536, 64),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernels", "--op", "sigmoid"], "kernels: op must be one of simam"),
        (["kernels", "--device", "cuda:99"], "kernels: device must be "),
        (
            ["kernels", "--device", "tpu9"],
            "kernels: device must be 'cpu', 'cuda', 'cuda:1' or a torch.device, got 'tpu9'",
        ),
        (["kernels", "--cuda-graphs"], "kernels: device must be cuda with --cuda-graphs, got cpu"),
        (
            ["kernels", "--op", "simam", "--model", "head"],
            "kernels: model must be a network that contains one of simam",
        ),
        (["profile", "sigmoid"], "profile: op must be one of simam"),
        (["profile", "hamming_topk", "--shape", 1, 10, 63, 1], "profile: shape must be QUERIES CODES BITS K"),
    ],
)
def test_wrong_options_give_an_error_of_one_line(arguments, message):
    assert_refused(message, *arguments)


def test_a_shape_of_two_models_is_measured_once_and_batches_can_be_given():
    found = shapes.workloads([shapes.Model.resnet50, shapes.Model.vgg16], None, gpu=False)
    shapes_of_one_batch = 4 + 5 - 2  # ResNet50 has 4 and VGG16 has 5; 2 are common to both
    assert len({workload.shape for workload in found}) == len(found) == 2 * shapes_of_one_batch
    assert [w.models for w in found if w.shape == (32, 256, 56, 56)] == [["resnet50 x 32", "vgg16 x 32"]]
    batches = {w.shape[0] for w in shapes.workloads([shapes.Model.resnet18], None, gpu=True)}
    assert batches == {1, 32, 128}
    assert {w.shape[0] for w in shapes.workloads(list(shapes.Model), [5], gpu=True)} == {5}


def test_floors_equal_the_traffic_counted_by_hand():
    x = torch.empty(2, 4, 8, 8)  # its planes and samples fit into 1 MiB on chip, but not into 16 bytes
    floors = {
        (name, direction): [OPS[name].floor(x, direction, on_chip) / x.nbytes for on_chip in (1 << 20, 16)]
        for name in ("simam", "triplet_attention", "greedy_sign")
        for direction in (FORWARD, FORWARD_BACKWARD)
    }
    maps = 2 * (4 * 8 + 8 * 4 + 8 * 8) * 2 * 16 / x.nbytes  # 16 bytes per value of a map, written and read
    assert floors == {
        ("simam", "forward"): [2, 3],
        ("simam", "forward+backward"): [5, 8],
        ("triplet_attention", "forward"): [2, 3],
        ("triplet_attention", "forward+backward"): [7 + maps, 7 + maps],
        ("greedy_sign", "forward"): [2, 2],
        ("greedy_sign", "forward+backward"): [5, 5],
    }


@pytest.mark.parametrize(
    ("op", "shape", "kernel"),
    [("simam", (1, 4, 5, 5), "simam_backward"), ("hamming_topk", (2, 90, 16, 3), "hamming_topk")],
)
def test_a_profile_names_the_kernels_and_writes_traces(tmp_path, op, shape, kernel):
    printed = invoke("profile", op, "--shape", *shape, "--steps", 2, "--output", tmp_path)
    assert f"hashengine::{kernel}" in printed and "eager / fused" in printed
    for system in ("eager", "fused"):
        events = json.loads((tmp_path / f"{op}-{system}.json").read_text())["traceEvents"]
        steps = [event for event in events if event["name"] == f"{op} {system}" and event["ph"] == "X"]
        assert len(steps) == 2 and all(step["dur"] > 0 for step in steps)
