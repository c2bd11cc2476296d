"""The layout of convolutions: channels_last, except in a training in which it is known to corrupt memory."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hashengine import _environment
from hashengine.models import HashNet, HashNetConfig, memory_format

AVX2 = frozenset({"avx", "avx2", "fma"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl"}
VERSIONS = ("2.11.0", "2.12.1+cpu", "2.13.0", "2.14.0", "2.15.0+cu132")


def problem(**changes) -> str | None:
    """`known_problem` on an x86 CPU with AVX-512, with some changes of the installation."""
    installation = {
        "torch_version": "2.15.0",
        "has_onednn": True,
        "machine": "x86_64",
        "cpu_flags": AVX512,
        "environment": {},
    }
    return memory_format.known_problem(**installation | changes)


@pytest.mark.parametrize("version", VERSIONS)
def test_avx512_is_unsafe_and_avx2_is_safe_with_every_torch(version):
    assert f"torch {version} can corrupt memory" in problem(torch_version=version)
    assert problem(torch_version=version, cpu_flags=AVX2) is None


@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
@pytest.mark.parametrize(
    ("limit", "is_safe"),
    [
        ("AVX2", True),
        ("avx2", True),
        ("SSE41", True),
        ("AVX2_VNNI_2", True),
        ("AVX512_CORE", False),
        ("DEFAULT", False),
    ],
)
def test_only_a_limit_below_avx512_is_safe(variable, limit, is_safe):
    assert (problem(environment={variable: limit}) is None) == is_safe


def test_an_empty_limit_has_no_effect():
    assert problem(environment={"ONEDNN_MAX_CPU_ISA": ""}) is not None


def test_unknown_cpu_flags_count_as_avx512_on_x86_only():
    assert "may have AVX-512" in problem(cpu_flags=frozenset())
    assert problem(cpu_flags=frozenset(), machine="aarch64") is None
    assert problem(machine="arm64") is None


def test_torch_without_onednn_is_safe():
    assert problem(has_onednn=False) is None


def test_a_fixed_release_is_safe_and_earlier_ones_are_not(monkeypatch):
    monkeypatch.setattr(memory_format, "FIRST_FIXED_TORCH", (2, 16))
    assert problem(torch_version="2.16.0") is None and problem(torch_version="2.20.1+cpu") is None
    assert problem(torch_version="2.15.1") is not None


def test_the_defaults_describe_this_installation(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for flags, layout in ((AVX512, torch.contiguous_format), (AVX2, torch.channels_last)):
        monkeypatch.setattr(_environment, "cpu_flags", lambda flags=flags: flags)
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
