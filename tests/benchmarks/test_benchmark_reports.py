"""What is made of a measurement: the report's tables and plot, profiles, whole networks."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness, model, report
from tests.benchmarks.test_benchmarks import invoke, read_lines
from tests.helpers.paths import ROOT

MACHINE = {"cpu": "A CPU", "simd_level": "avx2", "threads": 2, "torch": "2.11", "commit": "abc", "cuda_graphs": False}


def row(models, shape=(32, 64, 56, 56), cache="warm", op="simam", layout="contiguous", **speedup) -> dict:
    measured = {"op": op, "pass": "forward", "shape": list(shape), "dtype": "float32", "layout": layout, "cache": cache}
    seconds = {name: {"p50": 1e-3} for name in ("copy", "fused", *speedup)}
    return MACHINE | measured | {
        "models": models, "speedup": speedup, "copies": {"fused": 2.5}, "percent_of_floor": {"fused": 80.0},
        "floor_bytes": 2 * 4 * math.prod(shape), "seconds": seconds,
    }  # fmt: skip


def write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))


def test_geometric_means_take_each_shape_once():
    rows = [
        row(["a x 1", "b x 1"], (1, 2, 3, 4), eager=2.0, compile=1.0),
        row(["a x 1"], (1, 2, 3, 5), eager=8.0, compile=4.0),
        row(["a x 1"], (1, 2, 3, 5), cache="cold", eager=100.0, compile=100.0),  # warm goes first
        row(["a x 1"], (1, 2, 3, 6), cache="cold", eager=4.0, compile=2.0),  # too large to be warm
        row(["a x 1"], (1, 2, 3, 4), layout="channels_last", eager=3.0, compile=3.0),
    ]
    assert report.geometric_means(rows) == {
        ("simam", "forward", "float32", "a x 1"): {"eager": pytest.approx(4), "compile": pytest.approx(2)},
        ("simam", "forward", "float32", "b x 1"): {"eager": pytest.approx(2), "compile": pytest.approx(1)},
        ("simam", "forward", "float32 channels_last", "a x 1"): {
            "eager": pytest.approx(3), "compile": pytest.approx(3),
        },
    }  # fmt: skip


def test_the_tables_tell_what_the_newest_rows_hold(tmp_path):
    file = tmp_path / "kernels-here.jsonl"
    write(
        file,
        [
            row(["a x 32"], eager=1.0, compile=1.0),
            row(["a x 32"], eager=12.34, compile=1.5),
            row(["h x 1"], (1, 16), op="pack_bits", eager=3.0, compile=0.5),
        ],
    )
    text = report.markdown(report.read_rows(file))
    assert text.startswith("2 threads of A CPU, SIMD avx2, torch 2.11, commit abc.")
    assert [line for line in text.splitlines() if line.startswith("| ")] == [
        "|  | a x 32 | copies (floor) |",
        "| `simam` forward, float32 | 12.3 / 1.5 | 2.5 (2.0) |",
        "|  | h x 1 | copies (floor) |",
        "| `pack_bits` forward, float32 | 3.0 / 0.5 | - |",
    ]
    assert text.endswith("Slower than `torch.compile`: `pack_bits` forward 1 x 16 float32 (0.50).")


def test_the_report_draws_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    write(tmp_path / "kernels-here.jsonl", [row(["a x 1"], (1, 2, 3, size), eager=3.0, compile=2.0) for size in (4, 9)])
    plots = [tmp_path / "docs" / name for name in ("one.svg", "two.svg")]
    for plot in plots:
        assert "| `simam` forward, float32 |" in invoke("report", "--results", tmp_path, "--plot", plot)
    assert "GB/s of the floor" in plots[0].read_text()
    assert plots[0].read_bytes() == plots[1].read_bytes()


@pytest.mark.parametrize("file", report.result_files(), ids=lambda file: file.stem)
def test_the_tables_of_the_readme_are_the_reports(file):
    assert report.markdown(report.read_rows(file)) in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("op", "shape", "kernel"),
    [("simam", (1, 4, 5, 5), "simam_backward"), ("hamming_topk", (2, 90, 16, 3), "hamming_topk")],
)
def test_a_profile_names_the_kernels_and_leaves_a_trace(tmp_path, op, shape, kernel):
    printed = invoke("profile", op, "--shape", *shape, "--steps", 2, "--output", tmp_path)
    assert f"hashengine::{kernel}" in printed and "eager / fused" in printed
    for system in ("eager", "fused"):
        events = json.loads((tmp_path / f"{op}-{system}.json").read_text())["traceEvents"]
        steps = [event for event in events if event["name"] == f"{op} {system}" and event["ph"] == "X"]
        assert len(steps) == 2 and all(step["dur"] > 0 for step in steps)


@pytest.mark.parametrize("attention", ["simam", "triplet"])
def test_a_network_with_eager_attention_is_the_same_network(attention):
    pytest.importorskip("torchvision")
    models = model.make_models("resnet18", model.Attention(attention), compiled=False)
    assert list(models) == ["without attention", "eager", "fused"]
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    eager, fused = (models[name].double().eval() for name in ("eager", "fused"))
    torch.testing.assert_close(eager(images), fused(images))
    for system, module in (("eager", "benchmarks.eager"), ("fused", "hashengine.nn")):
        layers = [layer for layer in models[system].modules() if type(layer).__module__.startswith(module)]
        assert sum(type(layer).__name__ in ("SimAM", "TripletAttention") for layer in layers) == 8


def test_model_counts_images(tmp_path):
    pytest.importorskip("torchvision")
    output = tmp_path / "model.jsonl"
    options = ["--batch", 2, "--size", 32, "--steps", 1, "--threads", 1, "--no-compile", "--output", output]
    printed = invoke("model", "resnet18", "--dtype", "bfloat16", "--layout", "channels_last", *options)
    assert "resnet18, triplet, 2 x 3 x 32 x 32, bfloat16" in printed
    rows = read_lines(output)
    assert [(row["pass"], row["system"]) for row in rows] == [
        (mode, system) for mode in ("training", "inference") for system in ("without attention", "eager", "fused")
    ]
    for each in rows:
        assert each["images_per_second"] == pytest.approx(2 / each["seconds"][0])
        assert each["peak_bytes"] > 0
    assert rows[0]["of_plain"] == 1


def test_networks_follow_each_other_as_long_as_there_is_time(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    clock, output = iter([0, 0, 0, 0, 61]), tmp_path / "model.jsonl"
    monkeypatch.setattr(harness, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(model, "time_calls", lambda calls, *_, **__: dict.fromkeys(calls, [[1.0]]))
    monkeypatch.setattr(model, "peak_bytes", lambda call, device: 0)
    options = ["--batch", 2, "--size", 32, "--no-compile", "--minutes", 1, "--output", output]
    printed = invoke("model", "resnet18", "resnet34", "--attention", "simam", "--attention", "none", *options)
    assert "stopped after 1 minutes, without 5 of 8 measurements" in printed
    rows = {(row["model"], row["attention"], row["pass"]): row["layout"] for row in read_lines(output)}
    measured = [("simam", "training"), ("simam", "inference"), ("none", "training")]
    assert rows == {("resnet18", *each): "contiguous" for each in measured}


def test_a_wrong_network_is_not_timed():
    pytest.importorskip("torchvision")
    models = model.make_models("resnet18", model.Attention.simam, compiled=False)
    with torch.no_grad():
        models["fused"].fc.bias += 1e-3
    with pytest.raises(SystemExit, match="must be as accurate as the eager one before it is timed"):
        model.verify(models, torch.randn(2, 3, 32, 32))
