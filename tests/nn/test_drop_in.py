"""The layers inside whole networks: timm, compile, export, DDP, SyncBN, channels_last, mixed precision, accuracy."""

import copy
import itertools
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import hashengine as he
from hashengine.nn import SimAM, TripletAttention
from tests.helpers.networks import images, small_resnet, small_vgg
from tests.helpers.numerics import assert_as_accurate_as_eager
from tests.helpers.official import OfficialSimAM, OfficialTriplet, randomise

NETWORKS = {
    "torchvision": partial(small_resnet, depth=1),
    "timm": partial(small_resnet, "timm", "Bottleneck", depth=1),
    "vgg": small_vgg,
}
LAYERS = ("simam", "triplet")
everywhere = pytest.mark.parametrize(("network", "layer"), list(itertools.product(NETWORKS, LAYERS)))


def with_attention(network: str, layer: str) -> nn.Module:
    model = NETWORKS[network]()
    he.nn.attach(model, layer)
    return randomise(model, seed=1)


def train_step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, gradients and buffers of one forward and backward."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    parameters = dict(model.named_parameters())
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
    gradients = torch.autograd.grad(y, [x, *parameters.values()], weights)
    results = {"y": y.detach(), "x.grad": gradients[0]}
    results |= {f"{name}.grad": grad for name, grad in zip(parameters, gradients[1:], strict=True)}
    return results | {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("layer", [SimAM, TripletAttention])
def test_timm_takes_the_layers_as_attn_layer(layer):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("resnet18", block_args={"attn_layer": layer})
    assert sum(isinstance(module, layer) for module in model.modules()) == 8
    model, expected = small_resnet("timm", attn_layer=layer), small_resnet("timm")
    for block in (*expected.layer1, *expected.layer2):
        block.se = layer()
    expected.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images()), expected(images()))


@everywhere
def test_networks_compile_to_one_graph(network, layer):
    """With `fullgraph`, a graph break is an error. `attach`, `detach` and `fuse` refuse a compiled network."""
    model = with_attention(network, layer)
    expected = train_step(copy.deepcopy(model), images())
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    actual = {name.replace("_orig_mod.", ""): tensor for name, tensor in train_step(compiled, images()).items()}
    torch.testing.assert_close(actual, expected)
    for function in (partial(he.nn.attach, layer="simam"), he.nn.detach, he.nn.fuse):
        with pytest.raises(he.InputError, match="model must be uncompiled, got a compiled model"):
            function(compiled)


@everywhere
def test_networks_can_be_exported(network, layer):
    model = with_attention(network, layer).eval()
    x = images()
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    assert set(exported.state_dict) <= set(model.state_dict())
    other = torch.cat((x, images(seed=1)))
    torch.testing.assert_close(exported.module()(other), model(other))


def fused(build) -> nn.Module:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), build()))
    assert he.nn.fuse(model).fused == ("1",)
    return model


TRACEABLE = {
    "attached simam": partial(with_attention, "torchvision", "simam"),
    "attached triplet": partial(with_attention, "torchvision", "triplet"),
    "fused simam": partial(fused, OfficialSimAM),
    "fused triplet": partial(fused, OfficialTriplet),
    "simam": SimAM,
    "triplet": TripletAttention,
    "plain triplet": he.nn.PlainTripletAttention,
    "greedy hash": he.nn.GreedyHash,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", TRACEABLE.values(), ids=TRACEABLE)
def test_networks_can_be_traced(build, training):
    """The trace computes the same for other sizes, too, and updates the running statistics in the same way."""
    model = build().double().train(training)
    state = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = torch.jit.trace(model, images(dtype=torch.float64))
    assert not [warning for warning in caught if "hashengine" in warning.filename]
    assert not any(buffer.requires_grad for buffer in model.buffers())
    for size in (16, 7, 1):
        x = images(size, torch.float64, seed=size)
        results = []
        for module in (traced, model):
            module.load_state_dict(state)
            results.append((module(x), dict(copy.deepcopy(model).named_buffers())))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("build", TRACEABLE.values(), ids=TRACEABLE)
def test_scripts_are_refused_in_one_line(build):
    with pytest.raises(he.InputError, match=r"^torch.jit.script: obj must be without layers of .* use torch.jit.trace"):
        torch.jit.script(build())


@everywhere
@pytest.mark.filterwarnings("ignore")
def test_attention_is_attached_after_the_conversion_for_quantisation_aware_training(network, layer):
    def converted(model: nn.Module) -> nn.Module:
        model.train().qconfig = torch.ao.quantization.get_default_qat_qconfig()
        return torch.ao.quantization.prepare_qat(model)

    model = converted(NETWORKS[network]())
    assert he.nn.attach(model, layer).insertions
    assert all(gradient.isfinite().all() for gradient in train_step(model, images()).values())
    if layer == "simam":  # its host is a convolution, which the conversion replaces
        with pytest.raises(he.InputError, match="must be the module itself, got a Conv2d that .*; attach after that"):
            converted(with_attention(network, layer))(images())


@everywhere
def test_conversion_to_sync_batch_norm_does_not_change_results(network, layer):
    """In one process, SyncBatchNorm computes the same as BatchNorm.

    With it, TripletAttention runs separate ops (pool, convolution, gate) instead of the fused op.
    """
    model = with_attention(network, layer).double()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())
    x = images(dtype=torch.float64)
    torch.testing.assert_close(train_step(converted, x), train_step(model, x))
    torch.testing.assert_close(converted.eval()(x), model.eval()(x))


@everywhere
def test_channels_last_is_kept_and_does_not_change_results(network, layer):
    model = with_attention(network, layer).double()
    x = images(dtype=torch.float64)
    expected = train_step(copy.deepcopy(model), x)
    layouts = []
    for module in model.modules():
        if isinstance(module, (SimAM, TripletAttention)):
            module.register_forward_hook(lambda _, args, y: layouts.append((args[0], y)))
    actual = train_step(model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected)
    assert len(layouts) >= 2
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for pair in layouts for tensor in pair)


@pytest.mark.parametrize(("layer", "official"), [(SimAM, OfficialSimAM), (TripletAttention, OfficialTriplet)])
def test_layers_under_autocast_are_as_accurate_as_the_official_ones(layer, official):
    """Under autocast, the layers take and return bfloat16."""
    eager = randomise(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), official(), nn.BatchNorm2d(16)))
    fused = copy.deepcopy(eager)
    he.nn.fuse(fused)
    assert isinstance(fused[1], layer)
    seen = []
    fused[1].register_forward_hook(lambda _, args, y: seen.append((args[0].dtype, y.dtype)))
    exact = train_step(copy.deepcopy(eager).double(), images(dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        results = [train_step(model, images()) for model in (fused, eager)]
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    for name in ("y", "x.grad", "0.weight.grad"):
        assert_as_accurate_as_eager(*(result[name] for result in results), exact[name])
    assert all(parameter.dtype == torch.float32 for parameter in fused.parameters())


def train_in_processes(rank: int, network: str, layer: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(with_attention(network, layer).double())
    model(images(dtype=torch.float64, seed=rank)).square().sum().backward()
    if rank == 0:
        torch.save([parameter.grad for parameter in model.module.parameters()], f"{folder}/gradients")
    with pytest.raises(he.InputError, match="model must be unwrapped, got a DistributedDataParallel"):
        he.nn.detach(model)
    dist.destroy_process_group()


def test_distributed_training_averages_the_gradients(tmp_path):
    """After a backward in two processes, the gradients are the mean of those that each process would compute alone."""
    torch.multiprocessing.spawn(train_in_processes, ("torchvision", "triplet", str(tmp_path)), nprocs=2)
    alone = []
    for seed in range(2):
        model = with_attention("torchvision", "triplet").double()
        model(images(dtype=torch.float64, seed=seed)).square().sum().backward()
        alone.append([parameter.grad for parameter in model.parameters()])
    expected = [sum(gradients) / 2 for gradients in zip(*alone, strict=True)]
    torch.testing.assert_close(torch.load(tmp_path / "gradients"), expected)


def resnet18() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    model = models.resnet18()
    model.avgpool = model.fc = nn.Identity()  # compare the whole last feature map
    return model


def vgg16() -> nn.Module:
    vgg = pytest.importorskip("torchvision.models.vgg")
    torch.manual_seed(0)
    features = vgg.make_layers(vgg.cfgs["D"])
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(features)


def pair(build, layer: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The fused and the eager network, with the same weights.

    The eager network has official layers at the places where `attach` puts layers. `fuse` has converted those of the
    fused network.
    """
    eager = build()
    report = he.nn.attach(eager, {"simam": SimAM, "triplet": TripletAttention}[layer])
    for insertion in report.insertions:
        host = eager.get_submodule(insertion.name.rpartition(".")[0])
        host.attention = {"simam": OfficialSimAM, "triplet": OfficialTriplet}[layer]()
    eager = randomise(eager).to(dtype)
    fused = copy.deepcopy(eager)
    assert len(he.nn.fuse(fused).fused) == len(report.insertions) == {resnet18: 8, vgg16: 5}[build]
    return fused, eager


end_to_end = pytest.mark.parametrize("build", [resnet18, vgg16])


@end_to_end
@pytest.mark.parametrize("layer", LAYERS)
def test_networks_in_float64_equal_eager_ones(build, layer):
    fused, eager = pair(build, layer, torch.float64)
    x = images(64, torch.float64)
    actual, expected = train_step(fused, x), train_step(eager, x)
    for name, tensor in expected.items():
        scale = tensor.abs().max().clamp(min=1e-30)
        torch.testing.assert_close(actual[name] / scale, tensor / scale, rtol=0, atol=1e-9, msg=name)
    torch.testing.assert_close(fused.eval()(x), eager.eval()(x))


@end_to_end
@pytest.mark.parametrize("layer", LAYERS)
def test_networks_in_float32_are_as_accurate_as_eager_ones(build, layer):
    """Compare the result of the network. Then compare each attention layer alone, on inputs from the float64 network.

    Gradients are compared only for single layers. In a whole network, rounding may move an activation to the other side
    of a ReLU's kink or change which value is the maximum, and the error then depends on chance.
    """
    networks = pair(build, layer, torch.float32)
    exact = copy.deepcopy(networks[1]).double()
    x = images(64, torch.float64)
    layers = [name for name, module in networks[0].named_modules() if isinstance(module, (SimAM, TripletAttention))]
    captured = {}

    def capture(module: nn.Module, arguments: tuple[Tensor], y: Tensor, name: str) -> None:
        y.register_hook(lambda grad_y: captured.update({name: (arguments[0], grad_y)}))

    handles = [exact.get_submodule(name).register_forward_hook(partial(capture, name=name)) for name in layers]
    y = train_step(exact, x)["y"]
    for handle in handles:
        handle.remove()
    assert_as_accurate_as_eager(*(network(x.float()).detach() for network in networks), y)
    for name in layers:
        x_exact, grad_exact = (tensor.detach().float() for tensor in captured[name])
        results = []
        for network, dtype in ((networks[0], torch.float32), (networks[1], torch.float32), (exact, torch.float64)):
            leaf = x_exact.to(dtype).requires_grad_()
            y = network.get_submodule(name)(leaf)
            results.append((y.detach(), *torch.autograd.grad(y, leaf, grad_exact.to(dtype))))
        for compared in zip(*results, strict=True):
            assert_as_accurate_as_eager(*compared)
