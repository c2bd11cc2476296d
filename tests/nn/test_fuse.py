"""`fuse` finds the official modules by their structure, checks what they compute, and makes them run the fused ops.

`unfuse` undoes it.
"""

import copy
import pickle
import re
import sys
import types

import pytest
import torch
from torch import Tensor, nn

import hashengine as he
from hashengine.nn import SimAM, TripletAttention
from tests.helpers.layouts import feature_map
from tests.helpers.official import LONG_TRIPLET, OfficialSimAM, OfficialTriplet, randomise

OFFICIAL = {
    "short": OfficialTriplet,
    "long": LONG_TRIPLET,
    "no spatial": lambda: OfficialTriplet(no_spatial=True),
    "kernel of 3": lambda: LONG_TRIPLET(kernel_size=3),
    "simam": OfficialSimAM,
    "simam for ImageNet": lambda: OfficialSimAM(e_lambda=0.1),
}
official = pytest.mark.parametrize("build", OFFICIAL.values(), ids=OFFICIAL)


@official
@pytest.mark.parametrize("training", [True, False])
def test_fused_modules_compute_the_same(build, training):
    torch.manual_seed(0)
    theirs = randomise(nn.Sequential(build(), nn.Conv2d(4, 2, 1), build())).double().train(training)
    ours = copy.deepcopy(theirs)
    report = he.nn.fuse(ours)
    assert report.fused == ("0", "2") and not report.left
    assert all(isinstance(ours[i], (SimAM, TripletAttention)) for i in (0, 2))
    x = feature_map("channels_last", torch.float64)
    results = []
    for model in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        gradients = torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()])
        results.append([y, *gradients, *model.state_dict().values()])
    torch.testing.assert_close(*results)


def share(layer: nn.Module, *names: str) -> nn.Module:
    for name in names:
        setattr(layer, name, layer.cw)
    return layer


@pytest.mark.parametrize("names", [("hw",), ("hc",), ("hc", "hw")])
@pytest.mark.parametrize("is_shared_first", [True, False])
def test_a_gate_may_serve_several_branches(names, is_shared_first):
    theirs = randomise(OfficialTriplet()).eval()
    ours = copy.deepcopy(theirs)
    if is_shared_first:
        share(ours, *names)
    he.nn.fuse(ours)
    share(ours, *names)
    x = feature_map("contiguous")
    torch.testing.assert_close(ours(x), share(theirs, *names)(x))
    he.nn.unfuse(ours)
    assert type(ours) is OfficialTriplet and type(ours.cw) is type(theirs.cw)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


@official
def test_state_dict_keeps_its_keys_and_tensors(build):
    model = build()
    before = dict(model.state_dict(keep_vars=True))
    he.nn.fuse(model)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[key] is tensor for key, tensor in before.items())
    model.load_state_dict(randomise(build()).state_dict())


def test_fusing_keeps_hooks_mode_dtype_and_identity():
    calls = []
    model = nn.Sequential(OfficialTriplet(), OfficialSimAM()).bfloat16().eval()
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    modules = list(model.modules())
    he.nn.fuse(model)
    assert list(model.modules()) == modules  # the same objects
    assert not any(module.training for module in modules) and model[0].cw.conv.conv.weight.dtype == torch.bfloat16
    y = model(feature_map("contiguous", torch.bfloat16))
    assert y.dtype == torch.bfloat16 and calls == ["hook"]
    model[1].e_lambda = 0.1  # a change after `fuse` must take effect
    x = feature_map("contiguous")
    torch.testing.assert_close(model[1](x), OfficialSimAM(e_lambda=0.1)(x))


@official
def test_fused_modules_can_be_copied_pickled_and_converted(build):
    model = randomise(build()).eval()
    he.nn.fuse(model)
    x = feature_map("contiguous")
    expected = model(x)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)),
    ):
        torch.testing.assert_close(other(x), expected)


def test_modules_with_sync_batch_norm_are_fused():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(randomise(OfficialTriplet()).eval())
    x = feature_map("contiguous")
    expected = model(x)
    assert he.nn.fuse(model).fused == ("",) and isinstance(model.cw.conv.bn, nn.SyncBatchNorm)
    torch.testing.assert_close(model(x), expected)


def test_modules_on_meta_are_fused_and_random_state_is_unchanged():
    with torch.device("meta"):
        model = OfficialTriplet()
    state = torch.get_rng_state()
    assert he.nn.fuse(model).fused == ("",)
    assert model.cw.conv.conv.weight.device.type == "meta"
    assert torch.equal(torch.get_rng_state(), state)


def freeze(model: nn.Module, part: str) -> nn.Module:
    model.get_submodule(part).requires_grad_(False)
    return model


@pytest.mark.parametrize("part", ["", "cw.conv.conv", "hc.conv.bn"])
def test_frozen_modules_are_fused_and_stay_frozen(part):
    model = freeze(OfficialTriplet(), part)
    frozen = [not parameter.requires_grad for parameter in model.parameters()]
    assert he.nn.fuse(model).fused == ("",)
    assert [not parameter.requires_grad for parameter in model.parameters()] == frozen and any(frozen)


@official
@pytest.mark.parametrize("is_created_there", [True, False])
def test_modules_are_fused_in_inference_mode(build, is_created_there):
    with torch.inference_mode(is_created_there):
        model = build()
    with torch.inference_mode():
        assert he.nn.fuse(model).fused == ("",)
    with torch.no_grad():
        assert he.nn.fuse(build()).fused == ("",)


class WithScale(OfficialSimAM):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale


class WithOptions(OfficialTriplet):
    def forward(self, x: Tensor, **options: float) -> Tensor:
        return super().forward(x) * options.get("scale", 1.0)


class MaxAndSum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x.amax(1, keepdim=True), x.sum(1, keepdim=True)), 1)


class PopulationVariance(OfficialSimAM):
    """Divides the sum of squares by the number of positions; the official module divides by that number minus 1."""

    def forward(self, x: Tensor) -> Tensor:
        d = (x - x.mean((2, 3), keepdim=True)).square()
        return x * torch.sigmoid(d / (4 * (d.mean((2, 3), keepdim=True) + self.e_lambda)) + 0.5)


class Detached(OfficialSimAM):
    def forward(self, x: Tensor) -> Tensor:
        return x + (super().forward(x) - x).detach()


class ThreeChannelsOnly(OfficialSimAM):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.new_zeros(1, 3, 1, 1)


class WithAnotherName(OfficialSimAM):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class WithParameter(OfficialSimAM):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))


def triplet(change) -> nn.Module:
    model = OfficialTriplet()
    change(model)
    return model


SIMILAR = {
    "another pool": (
        lambda: triplet(lambda m: setattr(m.hw, "compress", MaxAndSum())),
        "it computes something else",
    ),
    "another pool, hidden by BatchNorms of weight 0": (
        lambda: triplet(lambda m: (setattr(m.hw, "compress", MaxAndSum()), nn.init.zeros_(m.hw.conv.bn.weight))),
        "it computes something else",
    ),
    "another variance": (PopulationVariance, "it computes something else"),
    "one more argument": (WithScale, "its forward takes more arguments than x"),
    "keywords": (WithOptions, "its forward takes more arguments than x"),
    "another name": (WithAnotherName, "the argument of its forward is input, not x, and a caller may"),
    "another gradient": (Detached, "it computes something else"),
    "a fixed number of channels": (ThreeChannelsOnly, "it could not be tried: RuntimeError"),
    "a parameter": (WithParameter, "a SimAM has no parameters, but this module does"),
    "a negative lambda": (lambda: OfficialSimAM(e_lambda=-1.0), "e_lambda must be a number above 0, got -1.0"),
    "a stride": (
        lambda: triplet(lambda m: setattr(m.hc.conv, "conv", nn.Conv2d(2, 1, 7, 2, 3, bias=False))),
        r"hc.conv must convolve 2 channels to 1, .*stride=\(2, 2\)",
    ),
    "an activation": (
        lambda: triplet(lambda m: setattr(m.cw.conv, "relu", nn.ReLU())),
        r"cw.conv must consist of conv and bn, got \['conv', 'bn', 'relu'\]",
    ),
    "no norm": (
        lambda: triplet(lambda m: setattr(m.cw.conv, "bn", nn.Identity())),
        r"cw.conv must normalise by BatchNorm2d\(1\), got Identity",
    ),
    "one other kernel": (
        lambda: triplet(lambda m: setattr(m, "hw", OfficialTriplet(kernel_size=3).hw)),
        "the kernel sizes of its gates differ",
    ),
    "one more layer": (lambda: triplet(lambda m: m.add_module("extra", nn.Linear(2, 2))), "more parameters than"),
    "an inner hook": (
        lambda: triplet(lambda m: m.cw.register_forward_hook(lambda *_: None)),
        "a module inside it has hooks",
    ),
    "a patched forward": (
        lambda: triplet(lambda m: setattr(m, "forward", lambda x: x)),
        "its forward is not that of its class",
    ),
}


@pytest.mark.parametrize(("build", "reason"), SIMILAR.values(), ids=SIMILAR)
def test_similar_modules_are_left_unchanged(build, reason):
    model = nn.Sequential(build())
    classes = [type(module) for module in model.modules()]
    report = he.nn.fuse(model)
    assert report.fused == () and [type(module) for module in model.modules()] == classes
    assert re.search(reason, report.left["0"]), report.left["0"]
    assert f"left 0 alone: {report.left['0']}" in str(report)


def test_own_layers_and_other_modules_are_not_in_the_report():
    model = nn.Sequential(SimAM(), TripletAttention(), nn.Conv2d(3, 3, 1), nn.Sigmoid())
    report = he.nn.fuse(model)
    assert report == he.nn.FuseReport((), {}) and str(report).startswith("fused nothing: no module")
    assert he.nn.fuse(OfficialSimAM()).fused == ("",)


def test_wrong_models_are_refused():
    with pytest.raises(he.InputError, match="^fuse: model must be an nn.Module, got str"):
        he.nn.fuse("resnet18")
    with pytest.raises(he.InputError, match="^unfuse: model must be an nn.Module, got str"):
        he.nn.unfuse("resnet18")


def snapshot(model: nn.Module) -> list[tuple]:
    """The class and the attributes of each module; of tensors and modules, which objects they are."""
    return [(type(module), {**vars(module), "_modules": dict(module._modules)}) for module in model.modules()]


@official
def test_unfuse_restores_the_official_modules(build):
    model = randomise(nn.Sequential(build(), nn.Conv2d(4, 4, 1), nn.Sequential(build()))).eval()
    before, state = snapshot(model), dict(model.state_dict(keep_vars=True))
    x = feature_map("contiguous")
    expected = model(x)
    assert he.nn.fuse(model).fused == ("0", "2.0")
    assert he.nn.unfuse(model) == ("0", "2.0")
    assert snapshot(model) == before
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state) and all(after[key] is tensor for key, tensor in state.items())
    assert torch.equal(model(x), expected)
    assert he.nn.fuse(model).fused == ("0", "2.0")


@official
def test_copies_and_pickles_can_be_unfused(build):
    model = nn.Sequential(build())
    classes = [type(module) for module in model.modules()]
    he.nn.fuse(model)
    for other in (copy.deepcopy(model), copy.copy(model[0]), pickle.loads(pickle.dumps(model))):
        he.nn.unfuse(other)
        assert [type(module) for module in other.modules()] == classes[-len(list(other.modules())) :]


def test_a_network_without_fused_modules_cannot_be_unfused():
    expected = "unfuse: model must be a network with fused modules, got a Sequential with none"
    for model in (nn.Sequential(nn.Conv2d(2, 2, 1), SimAM()), nn.Sequential(OfficialSimAM())):
        with pytest.raises(he.InputError, match=expected):
            he.nn.unfuse(model)
    he.nn.fuse(model)
    he.nn.unfuse(model)
    with pytest.raises(he.InputError, match=expected):
        he.nn.unfuse(model)
    he.nn.fuse(model)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(he.InputError, match="unfuse: model must be uncompiled, got a compiled model"):
        he.nn.unfuse(compiled)


def test_a_pickle_can_be_read_without_the_official_code(monkeypatch):
    """The fused modules run; only `unfuse` needs the official classes."""
    module = types.ModuleType("official_code")
    module.Official = type("Official", (OfficialSimAM,), {"__module__": "official_code", "__qualname__": "Official"})
    monkeypatch.setitem(sys.modules, "official_code", module)
    model = nn.Sequential(OfficialTriplet(), module.Official())
    he.nn.fuse(model)
    pickled = pickle.dumps(model)
    monkeypatch.delitem(sys.modules, "official_code")
    read = pickle.loads(pickled)
    x = feature_map("contiguous")
    torch.testing.assert_close(read.eval()(x), model.eval()(x))
    classes = [type(part) for part in read.modules()]
    with pytest.raises(
        he.InputError, match="1 must be of an official class that can be imported, got official_code.Of"
    ):
        he.nn.unfuse(read)
    assert [type(part) for part in read.modules()] == classes
    assert he.nn.unfuse(model) == ("0", "1")
