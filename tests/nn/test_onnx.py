"""Networks with the layers in onnxruntime, after an export by either of torch's exporters.

The accuracy rule of `tests.helpers.numerics` holds: against float64, the errors of the exported model are compared with
those of the official modules in eager torch.
"""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import hashengine as he
from hashengine import ops
from hashengine.models import HashNet, HashNetConfig
from hashengine.nn import PlainSimAM, PlainTripletAttention, SimAM, TripletAttention
from tests.helpers.networks import images, small_resnet
from tests.helpers.numerics import assert_as_accurate_as_eager
from tests.helpers.official import OfficialSimAM, OfficialTriplet, randomise
from tests.helpers.onnx_runtime import OnnxModel

every_exporter = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "legacy"])


class Times(nn.Module):
    """`layer` times `factor`."""

    def __init__(self, layer: nn.Module, factor: float):
        super().__init__()
        self.layer, self.factor = layer, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.factor


# The name: our layer, and the official one that computes the same.
PAIRS = {
    "SimAM": (SimAM, OfficialSimAM),
    "SimAM for ImageNet": (partial(SimAM, lam=0.1), partial(OfficialSimAM, e_lambda=0.1)),
    "TripletAttention": (TripletAttention, OfficialTriplet),
    "TripletAttention without a branch": (
        partial(TripletAttention, no_spatial=True, kernel_size=3),
        partial(OfficialTriplet, no_spatial=True, kernel_size=3),
    ),
    "PlainSimAM": (PlainSimAM, lambda: Times(OfficialSimAM(), PlainSimAM._SCALE)),
    "PlainTripletAttention": (PlainTripletAttention, lambda: Times(OfficialTriplet(), 2)),
}


def twins(pair) -> tuple[nn.Module, nn.Module]:
    """A convolution and our layer, and the same with the official layer and the same parameters."""
    torch.manual_seed(0)
    ours, official = (nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), build()).eval() for build in pair)
    randomise(ours)
    layer = official[1].layer if isinstance(official[1], Times) else official[1]
    layer.load_state_dict(ours[1].state_dict())
    official[0] = copy.deepcopy(ours[0])
    return ours, official


def compare(exported: OnnxModel, official: nn.Module, x: Tensor) -> None:
    exact = copy.deepcopy(official).double()(x.double())
    assert_as_accurate_as_eager(exported(x)[0], official(x).detach(), exact.detach())


@every_exporter
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_exported_layers_are_as_accurate_as_the_official_ones(pair, dynamo):
    ours, official = twins(pair)
    compare(OnnxModel(ours, (images(),), dynamo=dynamo), official, images(seed=1))


@pytest.mark.parametrize("official", [OfficialSimAM, OfficialTriplet])
@every_exporter
def test_a_fused_network_can_be_exported(official, dynamo):
    torch.manual_seed(0)
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), official())).eval()
    fused = copy.deepcopy(model)
    assert he.nn.fuse(fused).fused == ("1",)
    compare(OnnxModel(fused, (images(),), dynamo=dynamo), model, images(seed=1))


@pytest.mark.parametrize("layer", [SimAM, TripletAttention])
def test_sizes_that_are_dynamic_in_the_export_are_dynamic_in_onnxruntime(layer):
    """Also for planes of 1 x 1, where the divisor of SimAM's variance is 1 instead of 0."""
    model = randomise(layer()).eval()
    names = {axis: torch.export.Dim(name) for axis, name in enumerate("nchw")}
    exported = OnnxModel(model, (images(),), dynamo=True, dynamic_shapes={"x": names})
    for shape in ((2, 3, 16, 16), (5, 4, 3, 7), (1, 2, 1, 1)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        compare(exported, model, x)


@every_exporter
@pytest.mark.parametrize("attention", ["simam", "triplet"])
def test_a_hash_network_can_be_exported_up_to_its_packed_codes(attention, dynamo):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            config = HashNetConfig(classes=("a", "b"), bits=16, image_size=16, widths=(8, 16), attention=attention)
            self.network = HashNet(config)

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            u = self.network(images).activations
            return u, ops.pack_bits(u)

    torch.manual_seed(0)
    model = randomise(Encoder()).eval()
    x = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    exported = OnnxModel(model, (x,), dynamo=dynamo)
    u, codes = exported(x)
    exact = copy.deepcopy(model).double().network(x).activations
    assert_as_accurate_as_eager(u, model(x)[0].detach(), exact.detach())
    assert torch.equal(codes, ops.pack_bits(u))


def test_a_network_in_training_mode_can_be_exported():
    """The official module can be; the exported graph normalises by the statistics of the batch."""
    ours, official = twins(PAIRS["TripletAttention"])
    exported = OnnxModel(ours.train(), (images(),), dynamo=True)
    compare(exported, official.train(), images(seed=1))


@pytest.mark.parametrize("opset", [None, 13, 17])
def test_bits_survive_packing_in_onnxruntime(opset):
    """Of batches of any size; the legacy exporter has the older versions of the operators."""

    class PackAndUnpack(nn.Module):
        def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
            codes = ops.pack_bits(u)
            return codes, ops.unpack_bits(codes)

    u = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    if opset is None:
        options = {"dynamo": True, "dynamic_shapes": [{0: torch.export.Dim("n")}]}
    else:
        options = {"dynamo": False, "dynamic_axes": {"x": {0: "n"}}, "input_names": ["x"], "opset_version": opset}
    exported = OnnxModel(PackAndUnpack(), (u[:3],), **options)
    for batch in (u, u[:1]):
        codes, bits = exported(batch)
        assert torch.equal(codes, ops.pack_bits(batch)) and torch.equal(bits, batch >= 0)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["simam", "triplet"])
def test_resnet18_with_attention_can_be_exported(layer):
    torch.manual_seed(0)
    model = pytest.importorskip("torchvision").models.resnet18()
    he.nn.attach(model, layer)
    compare(OnnxModel(randomise(model).eval(), (images(64),), dynamo=True), model, images(64, seed=1))


@every_exporter
@pytest.mark.parametrize("layer", ["simam", "triplet"])
def test_a_network_with_attached_attention_can_be_exported(layer, dynamo):
    model = small_resnet(depth=1)
    he.nn.attach(model, layer)
    compare(OnnxModel(randomise(model, seed=1).eval(), (images(),), dynamo=dynamo), model, images(seed=1))
