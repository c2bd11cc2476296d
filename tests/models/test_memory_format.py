"""The layout of convolutions: channels_last, except in a training in which it is known to corrupt memory."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hashengine.models import HashNet, HashNetConfig, memory_format

VERSIONS = ("2.11.0", "2.12.1+cpu", "2.13.0", "2.14.0", "2.15.0+cu132")


def problem(**changes) -> str | None:
    """`known_problem` on an x86 CPU, with some changes of the installation."""
    installation = {"torch_version": "2.15.0", "has_onednn": True, "machine": "x86_64"}
    return memory_format.known_problem(**installation | changes)


@pytest.mark.parametrize("version", VERSIONS)
def test_x86_is_unsafe_with_every_torch_and_arm_is_safe(version):
    for machine in ("x86_64", "AMD64"):
        assert f"torch {version} can corrupt memory" in problem(torch_version=version, machine=machine)
    for machine in ("aarch64", "arm64"):
        assert problem(torch_version=version, machine=machine) is None


def test_torch_without_onednn_is_safe():
    assert problem(has_onednn=False) is None


def test_a_fixed_release_is_safe_and_earlier_ones_are_not(monkeypatch):
    monkeypatch.setattr(memory_format, "FIRST_FIXED_TORCH", (2, 16))
    assert problem(torch_version="2.16.0") is None and problem(torch_version="2.20.1+cpu") is None
    assert problem(torch_version="2.15.1") is not None


def test_the_defaults_describe_this_installation(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for machine, layout in (("x86_64", torch.contiguous_format), ("aarch64", torch.channels_last)):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        assert memory_format.training_format(torch.device("cpu")) == layout
        assert memory_format.training_format(torch.device("cuda", 0)) == torch.channels_last


@pytest.fixture
def unsafe(monkeypatch):
    """A CPU on which a training in channels_last is unsafe."""
    monkeypatch.setattr(memory_format, "known_problem", lambda: "a problem")


def network(channels: int) -> HashNet:
    torch.manual_seed(0)
    config = HashNetConfig(bits=16, classes=("a", "b"), channels=channels, image_size=16, widths=(8, 16))
    return HashNet(config)


def images(channels: int) -> Tensor:
    return torch.randint(0, 256, (5, channels, 16, 16), dtype=torch.uint8)


def layouts_of_convolutions(model: HashNet, x: Tensor, backward: bool) -> set[bool]:
    """The layouts of the inputs, weights and outputs of the backbone's convolutions: True means channels_last.

    `is_channels_last` follows the rule by which torch chooses the layout of a convolution.
    """
    seen = set()

    def is_channels_last(tensor: Tensor) -> bool:
        return not tensor.is_contiguous() or (
            tensor.stride() != torch.empty(tensor.shape).stride()  # if a tensor has both layouts, its strides decide
        )

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.update(is_channels_last(tensor) for tensor in (inputs[0], module.weight, output))

    handles = [m.register_forward_hook(record) for m in model.backbone.modules() if isinstance(m, nn.Conv2d)]
    result = model(x).activations
    if backward:
        result.square().sum().backward()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("channels", [1, 3])
def test_training_is_contiguous_if_channels_last_is_unsafe(unsafe, channels):
    model = network(channels).train()
    assert layouts_of_convolutions(model, images(channels), backward=True) == {False}
    channels_last = images(channels).to(memory_format=torch.channels_last)
    assert layouts_of_convolutions(model, channels_last, backward=True) == {False}


def test_inference_uses_channels_last_even_if_training_is_unsafe(unsafe):
    model = network(3).eval()
    with torch.no_grad():
        assert True in layouts_of_convolutions(model, images(3), backward=False)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # from mkldnn.flags
def test_training_uses_channels_last_if_that_is_safe(monkeypatch):
    monkeypatch.setattr(memory_format, "known_problem", lambda: None)
    with torch.backends.mkldnn.flags(enabled=False):  # the CPU that runs this test may be one on which it is unsafe
        assert True in layouts_of_convolutions(network(3).train(), images(3), backward=True)


@pytest.mark.parametrize("convert", [
    lambda model: model.to(memory_format=torch.channels_last),
    lambda model: model.double().float(),
    copy.deepcopy,
    lambda model: model.cpu(),
], ids=["to channels_last", "to float64 and back", "deepcopy", "to the CPU"])  # fmt: skip
def test_conversions_keep_the_safe_layout(unsafe, convert):
    model = convert(network(3)).train()
    assert layouts_of_convolutions(model, images(3), backward=True) == {False}


def test_both_layouts_give_close_activations_and_equal_files(monkeypatch, tmp_path: Path):
    x = images(3)
    monkeypatch.setattr(memory_format, "known_problem", lambda: None)
    model = network(3)
    model.save_pretrained(tmp_path / "channels_last")
    fast = model.eval()(x).activations
    monkeypatch.setattr(memory_format, "known_problem", lambda: "a problem")
    safe = HashNet.from_pretrained(tmp_path / "channels_last")
    torch.testing.assert_close(safe(x).activations, fast)
    safe.save_pretrained(tmp_path / "contiguous")
    names = ("config.json", "model.safetensors")
    first, second = (
        [(tmp_path / folder / n).read_bytes() for n in names] for folder in ("channels_last", "contiguous")
    )
    assert first == second
