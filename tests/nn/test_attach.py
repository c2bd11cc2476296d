"""`attach` and `detach`: where attention goes, that nothing else changes, and that all of it is undone."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import hashengine as he
from hashengine.nn import PlainSimAM, PlainTripletAttention, SimAM, TripletAttention
from tests.helpers.networks import BLOCKS, images, small_resnet, small_vgg
from tests.helpers.official import OfficialTriplet


class Halve(nn.Module):
    """Attention that shows in every result, and remembers its channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        return x * 0.5


def built_by(library: str, name: str) -> nn.Module:
    """A network as users build it, without its weights."""
    package = pytest.importorskip(library)
    with torch.device("meta"):
        return getattr(package.models, name)() if library == "torchvision" else package.create_model(name)


NETWORKS = {
    # network: insertions, the first SimAM and the first triplet attention
    ("torchvision", "resnet18"): (8, "layer1.0.conv2.attention", "layer1.0.attention"),
    ("torchvision", "resnext50_32x4d"): (16, "layer1.0.conv2.attention", "layer1.0.attention"),
    ("torchvision", "vgg16"): (5, "features.2.attention", "features.3.attention"),
    ("torchvision", "vgg16_bn"): (5, "features.3.attention", "features.5.attention"),
    ("torchvision", "alexnet"): (3, "features.0.attention", "features.1.attention"),
    ("timm", "resnet18"): (8, "layer1.0.conv2.attention", "layer1.0.se"),
    ("timm", "resnet50d"): (16, "layer1.0.conv2.attention", "layer1.0.se"),
    ("timm", "seresnet18"): (8, "layer1.0.conv2.attention", "layer1.0.se.attention"),
    ("timm", "vgg16"): (5, "features.2.attention", "features.3.attention"),
}


@pytest.mark.parametrize(("library", "network"), NETWORKS)
def test_networks_of_torchvision_and_timm_get_attention_where_it_belongs(library, network):
    count, simam, triplet = NETWORKS[library, network]
    model = built_by(library, network)
    before = dict(model.state_dict(keep_vars=True))
    for layer, kind, first, keys in (("simam", SimAM, simam, 0), ("triplet", TripletAttention, triplet, 18)):
        report = he.nn.attach(model, layer)
        names = [insertion.name for insertion in report.insertions]
        assert len(names) == count and names[0] == first
        assert all(isinstance(model.get_submodule(name), kind) for name in names)
        after = dict(model.state_dict(keep_vars=True))
        assert all(after.pop(key) is tensor for key, tensor in before.items())
        assert len(after) == count * keys and all(key.startswith(tuple(f"{name}." for name in names)) for key in after)
        assert he.nn.detach(model) == tuple(names)
    assert list(model.state_dict()) == list(before)


@pytest.mark.parametrize(("library", "block"), BLOCKS)
def test_simam_goes_where_its_authors_put_it(library, block):
    """They made the second convolution a Sequential of itself and SimAM."""
    model, expected = small_resnet(library, block), small_resnet(library, block)
    he.nn.attach(model, partial(SimAM, lam=0.1))
    for stage in (expected.layer1, expected.layer2):
        for residual in stage:
            residual.conv2 = nn.Sequential(residual.conv2, SimAM(lam=0.1))
    torch.testing.assert_close(model(images()), expected(images()))


@pytest.mark.parametrize(("library", "block"), BLOCKS)
def test_other_attention_ends_the_residual_branch(library, block):
    """As if the branch's last norm were a Sequential of itself and the attention."""
    model, expected = small_resnet(library, block), small_resnet(library, block)
    he.nn.attach(model, Halve)
    last = "bn2" if block == "BasicBlock" else "bn3"
    for stage in (expected.layer1, expected.layer2):
        for residual in stage:
            norm = getattr(residual, last)
            setattr(residual, last, nn.Sequential(norm, Halve(norm.num_features)))
    torch.testing.assert_close(model(images()), expected(images()))


def test_attention_of_timm_itself_runs_before_the_new_one():
    options = {"attn_layer": lambda channels, **_: nn.Conv2d(channels, channels, 1)}
    model, expected = small_resnet("timm", **options), small_resnet("timm", **options)
    he.nn.attach(model, Halve)
    for stage in (expected.layer1, expected.layer2):
        for residual in stage:
            residual.se = nn.Sequential(residual.se, Halve(residual.se.out_channels))
    torch.testing.assert_close(model(images()), expected(images()))


@pytest.mark.parametrize("normed", [False, True])
def test_plain_stacks_get_attention_once_a_stage(normed):
    model = small_vgg(normed)
    he.nn.attach(model, Halve)
    he.nn.attach(model, SimAM)
    layers = list(small_vgg(normed).features)
    for pool in [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)][::-1]:
        convolution = max(i for i in range(pool) if isinstance(layers[i], nn.Conv2d))
        layers.insert(pool, Halve(layers[convolution].out_channels))
        layers.insert(convolution + 1, SimAM())
    expected = nn.Sequential(*layers)
    torch.testing.assert_close(model.features(images()), expected(images()))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_triplet_attention_starts_a_plain_network_as_it_was(normed, training):
    model, before = small_vgg(normed).train(training), small_vgg(normed).train(training)
    report = he.nn.attach(model, "triplet")
    assert isinstance(model.features[3 if not normed else 5].attention, PlainTripletAttention)
    assert not report.recalibrate
    y = model(images())
    assert torch.equal(y, before(images()))
    y.square().sum().backward()
    gates = [module for name, module in model.named_modules() if name.endswith(".conv.bn")]
    assert len(gates) == 6 and all(norm.weight.grad.abs().min() > 0 for norm in gates)  # where learning starts


def test_plain_simam_leaves_what_does_not_stand_out():
    x = images(7)
    gate = PlainSimAM()(x) / x
    torch.testing.assert_close(gate, SimAM()(x) / x * (1 + torch.tensor(-0.5).exp()))
    assert gate.min() >= 1 - 1e-6 and gate.max() < 1.607
    torch.testing.assert_close(PlainSimAM()(torch.ones(1, 2, 3, 3)), torch.ones(1, 2, 3, 3))
    model = small_vgg()
    he.nn.attach(model, "simam")
    assert sum(isinstance(module, PlainSimAM) for module in model.modules()) == 2
    model = small_vgg(normed=True)
    he.nn.attach(model, "simam")
    assert not any(isinstance(module, PlainSimAM) for module in model.modules())  # the norm absorbs its gate


def anatomy(model: nn.Module) -> list[tuple]:
    """Everything by which a module could differ from what it was."""
    return [
        (name, type(module), set(vars(module)), list(module._modules), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]


MODELS = {"-".join(pair): partial(small_resnet, *pair) for pair in BLOCKS} | {"vgg": small_vgg}
COPIES = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "saved": lambda model: saved(model),
    "SyncBN": nn.SyncBatchNorm.convert_sync_batchnorm,
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
}


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("made", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("layer", ["simam", OfficialTriplet])
def test_attention_survives_and_leaves_no_trace(build, made, layer):
    model = build().eval()
    keys, parts, before = list(model.state_dict()), anatomy(model), model(images())
    he.nn.attach(model, layer)
    with_attention = model(images())
    assert not torch.allclose(with_attention, before, rtol=0.01)
    model = made(model)
    torch.testing.assert_close(model(images()), with_attention)
    state = model.state_dict()
    model.load_state_dict({key: state[key] for key in reversed(state)})
    he.nn.detach(model)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(images()), before)
    if made is not COPIES["SyncBN"]:
        assert anatomy(model) == parts


def test_layers_take_device_dtype_and_mode():
    model = small_resnet().double()
    model.layer2.eval()
    he.nn.attach(model, "triplet")
    attention = [model.layer1[0].attention, model.layer2[0].attention]
    assert [layer.cw.conv.bn.training for layer in attention] == [True, False]
    assert all(tensor.dtype in (torch.float64, torch.int64) for tensor in model.state_dict().values())
    model.train().bfloat16().to("meta")
    assert attention[1].training and attention[1].cw.conv.conv.weight.device.type == "meta"


@pytest.mark.parametrize(
    ("where", "sites"),
    [
        (lambda name: name.endswith(".1"), ["layer1.1", "layer2.1"]),
        ("layer2", ["layer2.0", "layer2.1"]),
        ("layer2.0", ["layer2.0"]),
        (["layer1.1", -1], ["layer1.1", "layer2.0", "layer2.1"]),
        (0, ["layer1.0", "layer1.1"]),
        ((1, 0), ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]),
    ],
)
def test_where_selects_blocks(where, sites):
    report = he.nn.attach(small_resnet(), "triplet", where=where)
    assert [insertion.name for insertion in report.insertions] == [f"{site}.attention" for site in sites]


@pytest.mark.parametrize(
    ("where", "sites"),
    [(None, [2, 7]), (1, [7]), ("features.0", [0]), ("features", [0, 2, 5, 7]), (lambda name: True, [0, 2, 5, 7])],
)
def test_where_selects_convolutions(where, sites):
    report = he.nn.attach(small_vgg(), "simam", where=where)
    assert [insertion.name for insertion in report.insertions] == [f"features.{site}.attention" for site in sites]


def test_a_block_can_have_both_and_a_backbone_can_be_part_of_a_model():
    model = nn.ModuleDict({"backbone": small_resnet(), "head": nn.Linear(5, 2)})
    he.nn.attach(model, "simam", where="layer1")
    he.nn.attach(model, "triplet", where="backbone.layer1.0")
    assert set(he.nn.detach(model)) == {
        "backbone.layer1.0.conv2.attention",
        "backbone.layer1.1.conv2.attention",
        "backbone.layer1.0.attention",
    }
    block = model["backbone"].layer1[1]
    assert he.nn.attach(block, "triplet").insertions[0].name == "attention"
    assert he.nn.detach(block) == ("attention",)


def test_the_report_reads_well():
    text = str(he.nn.attach(small_resnet(), "simam", where="layer1")).splitlines()
    assert text[:3] == [
        "attached 2 layers:",
        "  layer1.0.conv2.attention  SimAM(lam=0.0001), after layer1.0.conv2",
        "  layer1.1.conv2.attention  SimAM(lam=0.0001), after layer1.1.conv2",
    ]
    assert "hashengine.nn.recalibrate(model, batches)" in text[3] and len(text) == 4
    assert (
        str(he.nn.attach(small_resnet(), "triplet", where="layer1.0"))
        .splitlines()[1]
        .endswith(", at the end of the branch of layer1.0")
    )


def twice(model: nn.Module) -> nn.Module:
    he.nn.attach(model, "triplet")
    return model


def subclassed(model: nn.Module) -> nn.Module:
    """Its first block has a forward of its own."""
    base = type(model.layer1[0])
    model.layer1[0].__class__ = type("OtherBlock", (base,), {"forward": lambda self, x: base.forward(self, x) * 2})
    return model


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda: ("resnet18", "simam"), TypeError, "attach: model must be an nn.Module, got str"),
        (lambda: (small_resnet(), "cbam"), ValueError, "layer must be 'simam' or 'triplet' or a factory, got 'cbam'"),
        (lambda: (small_resnet(), SimAM()), TypeError, "layer must be a name or a factory .*, got SimAM"),
        (
            lambda: (small_resnet(), lambda channels: channels),
            TypeError,
            "must return an nn.Module, got int for",
        ),
        (lambda: (nn.Linear(2, 2), "simam"), ValueError, "model must have residual blocks .*, got Linear with none"),
        (
            lambda: (small_resnet(), "simam", "layer3"),
            ValueError,
            "where: 'layer3' is none of the 2 stages .*layer1.0",
        ),
        (lambda: (small_resnet(), "simam", [0, 2]), ValueError, "where: 2 is none of the 2 stages"),
        (lambda: (small_resnet(), "simam", []), ValueError, "where: it names none of the 2 stages"),
        (lambda: (small_resnet(), "simam", lambda n: False), ValueError, "where: the predicate accepts none of"),
        (lambda: (small_resnet(), "simam", 0.5), TypeError, "where must be a predicate, a name, .*, got 0.5"),
        (lambda: (twice(small_resnet()), "triplet", "layer2"), ValueError, "layer2.0 already has attention: detach"),
        (lambda: (twice(small_vgg()), "triplet"), ValueError, "features.3 already has attention: detach"),
        (lambda: (subclassed(small_resnet()), "triplet"), ValueError, "layer1.0 is a OtherBlock, whose forward may"),
    ],
)
def test_wrong_arguments_are_refused_and_change_nothing(arguments, error, message):
    model, *rest = arguments()
    parts = anatomy(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        he.nn.attach(model, *rest)
    assert parts is None or anatomy(model) == parts


def test_detach_needs_something_to_detach():
    with pytest.raises(ValueError, match="detach: model must have attached attention, got Sequential with none"):
        he.nn.detach(nn.Sequential(SimAM(), TripletAttention()))
