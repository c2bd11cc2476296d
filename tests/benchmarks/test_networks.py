"""`model`: its rows, its deadline, the verification of whole networks, and wrong options."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness
from benchmarks.networks import throughput
from benchmarks.networks.throughput import Attention
from tests.helpers.benchmarks import assert_refused, invoke, read_lines


@pytest.fixture(autouse=True)
def torchvision():
    return pytest.importorskip("torchvision")


@pytest.mark.parametrize("attention", ["simam", "triplet"])
def test_networks_with_eager_and_with_fused_attention_compute_the_same(attention):
    models = throughput.make_models("resnet18", Attention(attention), compiled=False)
    assert list(models) == ["without attention", "eager", "fused"]
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    eager, fused = (models[name].double().eval() for name in ("eager", "fused"))
    torch.testing.assert_close(eager(images), fused(images))
    for system, module in (("eager", "benchmarks.kernels.eager"), ("fused", "hashengine.nn")):
        layers = [layer for layer in models[system].modules() if type(layer).__module__.startswith(module)]
        attention_layers = [layer for layer in layers if type(layer).__name__ in ("SimAM", "TripletAttention")]
        assert len(attention_layers) == 8  # one per block of ResNet18


def test_images_per_second_are_the_batch_size_divided_by_the_time(tmp_path):
    output = tmp_path / "model.jsonl"
    options = ["--batch", 2, "--size", 32, "--steps", 1, "--threads", 1, "--no-compile", "--output", output]
    printed = invoke("model", "resnet18", "--dtype", "bfloat16", "--layout", "channels_last", *options)
    assert "resnet18, triplet, 2 x 3 x 32 x 32, bfloat16" in printed
    rows = read_lines(output)
    assert [(row["pass"], row["system"]) for row in rows] == [
        (mode, system) for mode in ("training", "inference") for system in ("without attention", "eager", "fused")
    ]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(2 / row["seconds"][0])
        assert row["peak_bytes"] > 0
    assert rows[0]["of_plain"] == 1


def test_no_network_is_measured_after_the_deadline(tmp_path, monkeypatch):
    clock = iter([0, 0, 0, 0, 61])  # seconds at the start and before each measurement
    output = tmp_path / "model.jsonl"
    monkeypatch.setattr(harness, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(throughput, "time_calls", lambda calls, *_, **__: dict.fromkeys(calls, [[1.0]]))
    monkeypatch.setattr(throughput, "peak_bytes", lambda call, device: 0)
    options = ["--batch", 2, "--size", 32, "--no-compile", "--minutes", 1, "--output", output]
    printed = invoke("model", "resnet18", "resnet34", "--attention", "simam", "--attention", "none", *options)
    assert "stopped after 1 minutes, without 5 of 8 measurements" in printed
    rows = {(row["model"], row["attention"], row["pass"]): row["layout"] for row in read_lines(output)}
    measured = [("simam", "training"), ("simam", "inference"), ("none", "training")]
    assert rows == {("resnet18", *each): "contiguous" for each in measured}


def test_a_wrong_network_fails_the_verification():
    models = throughput.make_models("resnet18", Attention.simam, compiled=False)
    with torch.no_grad():
        models["fused"].fc.bias += 1e-3
    with pytest.raises(SystemExit, match="must be as accurate as the eager one before it is timed"):
        throughput.verify(models, torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet18", "--dtype", "float16"], "model: dtype must be float32 or bfloat16"),
        (["resnet19"], "model: name must be one of"),
    ],
)
def test_wrong_options_give_an_error_of_one_line(arguments, message):
    assert_refused(message, "model", *arguments)
