"""`attach` puts attention at the right sites and changes nothing else. `detach` undoes it."""

import copy
import io
import pickle
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import hashengine as he
from hashengine.nn import PlainSimAM, PlainTripletAttention, SimAM, TripletAttention
from tests.helpers.networks import BLOCKS, images, small_resnet, small_vgg
from tests.helpers.official import OfficialTriplet


class Halve(nn.Module):
    """Attention that visibly changes every result, and checks its number of channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        return x * 0.5


def built_by(library: str, name: str) -> nn.Module:
    """A network that its library builds, on the meta device and therefore without weights."""
    package = pytest.importorskip(library)
    with torch.device("meta"):
        return getattr(package.models, name)() if library == "torchvision" else package.create_model(name)


NETWORKS = {
    # (library, network): (number of insertions, name of the first SimAM, name of the first triplet attention)
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
def test_attention_goes_to_the_right_sites_of_torchvision_and_timm(library, network):
    count, simam, triplet = NETWORKS[library, network]
    model = built_by(library, network)
    before = dict(model.state_dict(keep_vars=True))
    for layer, kind, first, keys_per_layer in (("simam", SimAM, simam, 0), ("triplet", TripletAttention, triplet, 18)):
        report = he.nn.attach(model, layer)
        names = [insertion.name for insertion in report.insertions]
        assert len(names) == count and names[0] == first
        assert all(isinstance(model.get_submodule(name), kind) for name in names)
        after = dict(model.state_dict(keep_vars=True))
        assert all(after.pop(key) is tensor for key, tensor in before.items())
        assert len(after) == count * keys_per_layer
        assert all(key.startswith(tuple(f"{name}." for name in names)) for key in after)
        assert he.nn.detach(model) == tuple(names)
    assert list(model.state_dict()) == list(before)


NEITHER = "model must be a network with residual blocks of torchvision or timm, or a plain network like VGG, got a"


@pytest.mark.parametrize(
    ("library", "network"),
    [
        ("timm", "resnetv2_50"),  # the stem is a stack
        ("timm", "nf_resnet26"),
        ("timm", "resnest14d"),  # the shortcuts are stacks
        ("timm", "densenet121"),  # the transitions between dense blocks are stacks
        ("torchvision", "densenet121"),
        ("torchvision", "squeezenet1_0"),  # the classifier is a stack
        ("torchvision", "squeezenet1_1"),
    ],
)
def test_stems_shortcuts_transitions_and_classifiers_are_no_sites(library, network):
    model = built_by(library, network)
    parts = anatomy(model)
    for layer in ("simam", "triplet"):
        with pytest.raises(he.InputError) as caught:
            he.nn.attach(model, layer)
        assert str(caught.value).startswith(f"attach: {NEITHER} {type(model).__name__}, which is neither; put ")
    assert anatomy(model) == parts


def stack(*channels: int, pool: type[nn.Module] = nn.MaxPool2d) -> nn.Sequential:
    pairs = zip(channels, channels[1:], strict=False)
    layers = [layer for pair in pairs for layer in (nn.Conv2d(*pair, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers, pool(2))


class Linked(nn.Module):
    """A network of the given parts; `attach` reads the parts and does not run them."""

    def __init__(self, **parts: nn.Module):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


@pytest.mark.parametrize(
    "parts",
    [
        {"stem": stack(3, 8), "encoder": nn.TransformerEncoderLayer(8, 2)},
        {"stem": stack(3, 8), "norm": nn.LayerNorm(8)},
        {"encoder": stack(3, 8), "decoder": nn.ConvTranspose2d(8, 3, 2, 2)},
        {"stem": stack(3, 8), "body": nn.Conv2d(8, 8, 3)},
        {"volume": nn.Conv3d(3, 3, 1), "features": stack(3, 8)},
        {"left": stack(3, 8, 8), "right": stack(3, 8, 8)},  # two inputs, or a branch and its shortcut
        {"features": stack(3, 8), "classifier": stack(8, 5, pool=nn.AdaptiveAvgPool2d)},
        {"classifier": stack(8, 5, pool=nn.AdaptiveAvgPool2d)},
        {"pools": nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), "fc": nn.Linear(2, 2)},
    ],
    ids=lambda parts: "-".join(parts),
)
def test_a_network_with_a_stack_is_not_plain_if_its_stacks_are_only_a_part_of_it(parts):
    with pytest.raises(he.InputError, match=f"^attach: {NEITHER} Linked, which is neither; "):
        he.nn.attach(Linked(**parts), "simam")


def test_a_plain_network_may_consist_of_several_stacks_and_a_head():
    head = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.GRU(8, 8))
    model = Linked(block1=stack(3, 8, 8), block2=stack(8, 16), head=head)
    report = he.nn.attach(model, "triplet")
    assert [insertion.name for insertion in report.insertions] == ["block1.3.attention", "block2.1.attention"]
    he.nn.attach(model, "simam")  # the convolutions in the triplet attention are no sites
    assert len(he.nn.detach(model)) == 4


def test_a_part_of_a_network_can_be_plain():
    model = Linked(features=stack(3, 8), neck=nn.Conv2d(8, 8, 1))
    assert he.nn.attach(model.features, "simam").insertions[0].name == "0.attention"


@pytest.mark.slow
def test_of_torchvisions_classifiers_only_resnets_vggs_and_alexnet_are_accepted():
    models = pytest.importorskip("torchvision.models")
    # RegNets cannot be built without weights.
    names = [name for name in models.list_models(module=models) if not name.startswith("regnet")]
    accepted = set()
    for name in names:
        with torch.device("meta"):
            options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            model = models.get_model(name, weights=None, **options)
        try:
            he.nn.attach(model, "triplet")
            accepted.add(name)
        except he.InputError as error:
            assert NEITHER in str(error)
    families = ("resnet", "resnext", "wide_resnet", "vgg", "alexnet")
    assert accepted == {name for name in names if name.startswith(families)}


@pytest.mark.slow
def test_of_timms_families_only_resnets_hrnets_and_vggs_are_accepted():
    """One network of each family, in which `timm.models.resnet` has the blocks of the first two."""
    timm = pytest.importorskip("timm")
    families = {timm.models.model_entrypoint(name).__module__: name for name in reversed(timm.list_models())}
    accepted = set()
    for family, name in families.items():
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
        except (NotImplementedError, RuntimeError):  # cannot be built without weights
            continue
        try:
            he.nn.attach(model, "triplet")
            accepted.add(family.rpartition(".")[2])
        except he.InputError as error:
            assert NEITHER in str(error)
    assert accepted == {"resnet", "hrnet", "vgg"}


@pytest.mark.parametrize(("library", "block"), BLOCKS)
def test_simam_goes_where_its_authors_put_it(library, block):
    """The authors replace the second convolution by a Sequential of the convolution and SimAM."""
    model, expected = small_resnet(library, block), small_resnet(library, block)
    he.nn.attach(model, partial(SimAM, lam=0.1))
    for stage in (expected.layer1, expected.layer2):
        for residual in stage:
            residual.conv2 = nn.Sequential(residual.conv2, SimAM(lam=0.1))
    torch.testing.assert_close(model(images()), expected(images()))


@pytest.mark.parametrize(("library", "block"), BLOCKS)
def test_other_attention_ends_the_residual_branch(library, block):
    """`attach` gives the same result as replacing the last norm by a Sequential of the norm and the attention."""
    model, expected = small_resnet(library, block), small_resnet(library, block)
    he.nn.attach(model, Halve)
    last = "bn2" if block == "BasicBlock" else "bn3"
    for stage in (expected.layer1, expected.layer2):
        for residual in stage:
            norm = getattr(residual, last)
            setattr(residual, last, nn.Sequential(norm, Halve(norm.num_features)))
    torch.testing.assert_close(model(images()), expected(images()))


def test_attention_built_by_timm_runs_before_the_new_one():
    options = {"attn_layer": lambda channels, **_: nn.Conv2d(channels, channels, 1)}
    model, expected = small_resnet("timm", **options), small_resnet("timm", **options)
    he.nn.attach(model, Halve)
    for stage in (expected.layer1, expected.layer2):
        for residual in stage:
            residual.se = nn.Sequential(residual.se, Halve(residual.se.out_channels))
    torch.testing.assert_close(model(images()), expected(images()))


@pytest.mark.parametrize("normed", [False, True])
def test_plain_stacks_get_attention_once_per_stage(normed):
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
def test_triplet_attention_initially_does_not_change_a_plain_network(normed, training):
    model, before = small_vgg(normed).train(training), small_vgg(normed).train(training)
    report = he.nn.attach(model, "triplet")
    assert isinstance(model.features[3 if not normed else 5].attention, PlainTripletAttention)
    assert not report.recalibrate
    y = model(images())
    assert torch.equal(y, before(images()))
    y.square().sum().backward()
    gates = [module for name, module in model.named_modules() if name.endswith(".conv.bn")]
    assert len(gates) == 6 and all(norm.weight.grad.abs().min() > 0 for norm in gates)  # the gates can learn


def test_plain_simam_does_not_change_neurons_at_the_mean():
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
    assert not any(isinstance(module, PlainSimAM) for module in model.modules())  # a BatchNorm follows


def hooks_of(module: nn.Module) -> tuple[dict, ...]:
    return module._forward_hooks, module._forward_pre_hooks


def anatomy(model: nn.Module) -> list[tuple]:
    """The name, class, attributes, children and number of hooks of each module of `model`."""
    return [
        (name, type(module), set(vars(module)), list(module._modules), *map(len, hooks_of(module)))
        for name, module in model.named_modules()
    ]


def norm_before_pooling() -> nn.Sequential:
    """A plain network in which BatchNorms end the two stages."""
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.MaxPool2d(2)]
    second = [nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(8), nn.AvgPool2d(2)]
    return nn.Sequential(*first, *second)


MODELS = {"-".join(pair): partial(small_resnet, *pair) for pair in BLOCKS}
MODELS |= {"vgg": small_vgg, "norm before pooling": norm_before_pooling}
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
@pytest.mark.parametrize("convert", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("layer", ["simam", OfficialTriplet])
def test_attention_survives_copies_and_detach_restores_the_model(build, convert, layer):
    model = build().eval()
    keys, parts, before = list(model.state_dict()), anatomy(model), model(images())
    he.nn.attach(model, layer)
    with_attention = model(images())
    assert not torch.allclose(with_attention, before, rtol=0.01)
    model = convert(model)
    torch.testing.assert_close(model(images()), with_attention)
    state = model.state_dict()
    model.load_state_dict({key: state[key] for key in reversed(state)})
    he.nn.detach(model)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(images()), before)
    if convert is not COPIES["SyncBN"]:
        assert anatomy(model) == parts


def test_new_layers_take_the_dtype_and_mode_of_their_block_and_follow_later_conversions():
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
        (0, ["layer1.0", "layer1.1"]),  # the index of a stage
        (torch.tensor(1), ["layer2.0", "layer2.1"]),
        ((1, 0), ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]),
    ],
)
def test_where_selects_blocks(where, sites):
    report = he.nn.attach(small_resnet(), "triplet", where=where)
    assert [insertion.name for insertion in report.insertions] == [f"{site}.attention" for site in sites]


def test_the_last_site_need_not_be_in_the_last_stage():
    block = type(small_resnet().layer1[0])
    model = nn.Sequential(block(8, 8), nn.Sequential(block(8, 8)), block(8, 8))
    report = he.nn.attach(model, "triplet", where=-1)  # stage 1 is the block 1.0
    assert [insertion.name for insertion in report.insertions] == ["1.0.attention"]


@pytest.mark.parametrize(
    ("where", "sites"),
    [
        (None, [2, 7]),  # the last convolution of each stage
        (1, [7]),  # the last convolution of stage 1
        ("features.0", [0]),
        ("features", [0, 2, 5, 7]),
        (lambda name: True, [0, 2, 5, 7]),
    ],
)
def test_where_selects_convolutions(where, sites):
    report = he.nn.attach(small_vgg(), "simam", where=where)
    assert [insertion.name for insertion in report.insertions] == [f"features.{site}.attention" for site in sites]


def test_a_block_takes_both_layers_and_a_backbone_may_be_part_of_a_model():
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


def test_the_report_lists_the_insertions():
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


def with_triplet(model: nn.Module) -> nn.Module:
    he.nn.attach(model, "triplet")
    return model


def patched(model: nn.Module) -> nn.Module:
    """Give the first block a forward of its own."""
    model.layer1[0].forward = lambda x: x
    return model


def subclassed(model: nn.Module) -> nn.Module:
    """Replace the class of the first block by a subclass with another forward."""
    base = type(model.layer1[0])
    model.layer1[0].__class__ = type("OtherBlock", (base,), {"forward": lambda self, x: base.forward(self, x) * 2})
    return model


def changed(path: str, part: nn.Module | None = None, **options) -> nn.Module:
    """A small residual network with `part` at `path`; by default, the module of the next block."""
    model = small_resnet(**options)
    model.set_submodule(path, part or model.get_submodule(path.replace("layer1.0", "layer2.0")))
    return model


def with_shared(layer: nn.Module, convolution: nn.Module | None = None) -> nn.Module:
    """A plain stack with `layer` after both convolutions."""
    first, second = convolution or nn.Conv2d(3, 3, 3), convolution or nn.Conv2d(3, 3, 3)
    return nn.Sequential(first, layer, nn.MaxPool2d(2), second, layer, nn.MaxPool2d(2))


def quantized() -> nn.Module:
    """A residual network of torchvision whose convolutions are quantized."""
    package = pytest.importorskip("torchvision")
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = torch.backends.quantized.supported_engines[-1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated
            return package.models.quantization.resnet18(weights=None, quantize=True)
    finally:
        torch.backends.quantized.engine = engine


SEVERAL = "must be a module of one place, got one that is registered as"
REPLACED = "must be a block whose convolutions .*, got one with a quantized .*; select other blocks with where"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: (with_shared(nn.ReLU()), "triplet"), f"1 {SEVERAL} 1 and 4; make one module for each place"),
        (lambda: (with_shared(nn.Dropout2d()), "triplet"), f"1 {SEVERAL} 1 and 4; make"),
        (lambda: (with_shared(nn.ReLU(), nn.Conv2d(3, 3, 1)), "simam"), f"0 {SEVERAL} 0 and 3; make"),
        (lambda: (changed("layer1.0"), "triplet"), f"layer1.0 {SEVERAL} layer1.0 and layer2.0"),
        (lambda: (changed("layer1.0.conv2"), "simam"), f"layer1.0.conv2 {SEVERAL} layer1.0.conv2 and layer2.0.conv2"),
        (lambda: (changed("layer1.0.conv2", nn.Identity()), "triplet"), f"layer1.0 {REPLACED}"),
        (lambda: (changed("layer1.0.conv2", nn.Sequential(nn.Conv2d(8, 8, 1))), "simam"), f"layer1.0 {REPLACED}"),
        (lambda: (changed("layer2.0.conv3", nn.Identity(), block="Bottleneck"), "simam"), f"layer2.0 {REPLACED}"),
        (lambda: (quantized(), "simam"), f"layer1.0 {REPLACED}"),
        (lambda: (quantized(), "triplet"), f"layer1.0 {REPLACED}"),
        (lambda: (small_resnet(), "simam", b"\x01"), r"where must be a predicate, a name, .*, got b'\\x01'"),
        (lambda: (small_resnet(), "simam", [bytearray(1)]), r"where must be a predicate, .*, got bytearray"),
        (lambda: (small_resnet(), "simam", memoryview(b"\x01")), "where must be a predicate, .*, got <memory"),
        (lambda: ("resnet18", "simam"), "model must be an nn.Module, got str"),
        (lambda: (small_resnet(), "cbam"), "layer must be 'simam', 'triplet' or a factory .*, got 'cbam'"),
        (lambda: (small_resnet(), SimAM()), "layer must be 'simam', 'triplet' or a factory .*, got a SimAM"),
        (lambda: (small_resnet(), 3), "layer must be 'simam', 'triplet' or a factory .*, got 3"),
        (
            lambda: (small_resnet(), lambda channels: channels),
            "layer must be a factory that returns an nn.Module, got a factory that returns int for layer1.0",
        ),
        (lambda: (nn.Linear(2, 2), "simam"), f"{NEITHER} Linear, which is neither; put SimAM"),
        (lambda: (small_resnet(), "simam", "layer3"), "where must be one of the 2 stages .*layer1.0.*, got 'layer3'"),
        (lambda: (small_resnet(), "simam", [0, 2]), "where must be one of the 2 stages .*, got 2"),
        (lambda: (small_resnet(), "simam", []), "where must be one of the 2 stages .*, got none"),
        (lambda: (small_resnet(), "simam", lambda name: False), "where must be .*, got a predicate that accepts none"),
        (lambda: (small_resnet(), "simam", 0.5), "where must be a predicate, a name, .*, got 0.5"),
        (lambda: (small_resnet(), "simam", True), "where must be a predicate, a name, .*, got True"),
        (lambda: (small_resnet(), "simam", [0, False]), "where must be a predicate, a name, .*, got False"),
        (lambda: (small_resnet(), "simam", torch.tensor(0.5)), r"where must be a predicate, .*, got tensor\(0.5"),
        (lambda: (with_triplet(small_resnet()), "triplet", "layer2"), "layer2.0 must be without attention, .*detach"),
        (lambda: (with_triplet(small_vgg()), "triplet"), "features.3 must be without attention, .*; detach it first"),
        (
            lambda: (subclassed(small_resnet()), "triplet"),
            "layer1.0 must be a BasicBlock, got a OtherBlock, whose forward may differ",
        ),
        (
            lambda: (subclassed(small_resnet("timm", "Bottleneck")), "triplet"),
            "layer1.0 must be a Bottleneck, got a OtherBlock, whose forward may differ",
        ),
        (
            lambda: (patched(small_resnet("timm")), "triplet"),
            "layer1.0 must be a BasicBlock, got a BasicBlock, whose forward may differ",
        ),
    ],
)
def test_wrong_arguments_are_refused_and_change_nothing(arguments, message):
    model, *rest = arguments()
    parts = anatomy(model) if isinstance(model, nn.Module) else None
    with pytest.raises(he.InputError, match=f"^attach: {message}"):
        he.nn.attach(model, *rest)
    assert parts is None or anatomy(model) == parts


def test_unselected_blocks_may_be_replaced_and_a_backbone_may_have_two_names():
    model = changed("layer1.0.conv2", nn.Identity())
    assert len(he.nn.attach(model, "triplet", where="layer2").insertions) == 2
    backbone = small_vgg()
    assert he.nn.attach(nn.ModuleDict({"a": backbone, "b": backbone}), "triplet").insertions


def test_triplet_attention_runs_between_a_norm_and_the_layer_after_it():
    model = norm_before_pooling().eval()
    layers = list(norm_before_pooling())
    report = he.nn.attach(model, Halve)
    places = [(insertion.name, insertion.place) for insertion in report.insertions]
    assert places == [("2.attention", "before 2"), ("6.attention", "before 6")]
    expected = nn.Sequential(*layers[:2], Halve(6), *layers[2:6], Halve(8), layers[6]).eval()
    torch.testing.assert_close(model(images()), expected(images()))


def test_a_norm_at_the_end_of_a_plain_stack_has_no_layer_to_run_the_attention():
    def stack(*end):
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), *end)

    message = "the end of a plain stack must be a layer other than a BatchNorm, got a BatchNorm after 2 that no layer"
    with pytest.raises(he.InputError, match=message):
        he.nn.attach(stack(), "triplet")
    assert [insertion.name for insertion in he.nn.attach(stack(), "simam").insertions] == [
        "0.attention",
        "2.attention",
    ]
    between = stack(nn.Conv2d(4, 4, 3), nn.MaxPool2d(2))
    with pytest.raises(
        he.InputError, match="^attach: 4 must be a module that takes one attention, got one that would take"
    ):
        he.nn.attach(between, "triplet", where=["2", "4"])
    assert he.nn.attach(between, "triplet", where="2").insertions[0].place == "before 4"


def test_a_pooling_in_several_places_ends_several_stages():
    pool = nn.MaxPool2d(2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), pool, nn.Conv2d(4, 4, 3), nn.ReLU(), pool)
    assert [insertion.name for insertion in he.nn.attach(model, "triplet").insertions] == ["1.attention", "4.attention"]


def test_detach_needs_something_to_detach():
    message = "detach: model must be a network with attached attention, got a Sequential with none"
    with pytest.raises(he.InputError, match=message):
        he.nn.detach(nn.Sequential(SimAM(), TripletAttention()))


def test_the_layer_after_a_norm_may_be_called_by_keyword():
    model, x = norm_before_pooling(), torch.randn(2, 6, 8, 8)
    he.nn.attach(model, Halve)
    torch.testing.assert_close(model[2](input=x), model[2](x), rtol=0, atol=0)
    he.nn.detach(model)
    assert not model[2]._forward_pre_hooks and not model[2]._forward_pre_hooks_with_kwargs
