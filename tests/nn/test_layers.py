"""The layers: official state dicts, other classes of BatchNorm, factories, and training in a network."""

import copy
import importlib
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.func import functional_call, grad, stack_module_state, vmap

from hashengine import ops
from hashengine.errors import InputError
from hashengine.nn import GreedyHash, PlainSimAM, PlainTripletAttention, SimAM, TripletAttention, attach
from hashengine.ops.simam import LEAST_LAM
from tests.helpers.layouts import feature_map
from tests.helpers.networks import images, small_resnet
from tests.helpers.official import OfficialTriplet

OFFICIAL_NAMES = {"cw": "ChannelGateH", "hc": "ChannelGateW", "hw": "SpatialGate"}


def official(seed: int = 0) -> OfficialTriplet:
    """The official module with random parameters and statistics, in float64."""
    torch.manual_seed(seed)
    model = OfficialTriplet().double()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + (0.5 if name.endswith("var") else -0.3))
    return model


def other_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same state with the names of the other official implementation."""
    return {
        key.replace(gate + ".conv.", OFFICIAL_NAMES[gate] + ".spatial.", 1): value
        for key, value in state.items()
        for gate in [key.split(".")[0]]
    }


@pytest.mark.parametrize("rename", [lambda state: state, other_names])
@pytest.mark.parametrize("training", [False, True])
def test_triplet_attention_loads_both_official_state_dicts(rename, training):
    theirs = official()
    ours = TripletAttention().double()
    ours.load_state_dict(rename(theirs.state_dict()))
    ours.train(training), theirs.train(training)
    for step in range(3):
        x = feature_map("contiguous", torch.float64, seed=step)
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())  # includes running statistics


def test_triplet_attention_inside_a_model_renames_its_own_keys_only():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), TripletAttention()).double()
    state = {f"1.{key}": value for key, value in other_names(official().state_dict()).items()}
    state |= {f"0.{key}": value for key, value in model[0].state_dict().items()}
    model.load_state_dict(state)
    torch.testing.assert_close(model[1].hw.conv.conv.weight, official().hw.conv.conv.weight)


def test_no_spatial_leaves_out_a_branch():
    layer = TripletAttention(no_spatial=True)
    assert not hasattr(layer, "hw") and sum(p.numel() for p in layer.parameters()) == 200
    assert sum(p.numel() for p in TripletAttention(256).parameters()) == 300  # the number of channels is ignored
    x = feature_map("contiguous")
    assert layer(x).shape == x.shape


def test_triplet_attention_with_sync_batch_norm_gives_the_same_result():
    """With SyncBatchNorm, the layer runs separate ops (pool, convolution, gate) instead of triplet_attention."""
    plain = TripletAttention().double()
    plain.load_state_dict(official().state_dict())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(TripletAttention().double())
    converted.load_state_dict(official().state_dict())
    x = feature_map("channels_last", torch.float64)
    torch.testing.assert_close(converted.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("momentum", [0.01, None])
def test_separate_ops_give_the_same_gradients_as_the_fused_op(momentum):
    """With another class of BatchNorm, the layer runs separate ops (pool, convolution, gate)."""

    class OtherBatchNorm(nn.BatchNorm2d):
        pass

    layers = [TripletAttention().double(), TripletAttention().double()]
    for layer in layers:
        layer.load_state_dict(official().state_dict())
        for gate in (layer.cw, layer.hc, layer.hw):
            gate.conv.bn.momentum = momentum
    for gate in (layers[1].cw, layers[1].hc, layers[1].hw):
        gate.conv.bn.__class__ = OtherBatchNorm
    grads = []
    for layer in layers:
        x = feature_map("contiguous", torch.float64).requires_grad_()
        for _ in range(2):
            y = layer(x)
        y.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(layers[0].state_dict(), layers[1].state_dict())


@pytest.mark.parametrize("branch", ["cw", "hw"])
@pytest.mark.parametrize(
    "settings",
    [
        {"bias": True},
        {"dilation": 2, "padding": 6},
        {"padding_mode": "circular"},
        {"kernel_size": 3, "padding": 1},  # another size than in the other branches
        {"kernel_size": (7, 3), "padding": (3, 1)},
    ],
    ids=str,
)
def test_another_convolution_in_a_branch_is_used(branch, settings):
    """The fused op knows only the weight of a convolution, so the layer runs separate ops."""
    layer = TripletAttention().eval()
    convolution = nn.Conv2d(2, 1, **{"kernel_size": 7, "padding": 3, "bias": False} | settings)
    layer.get_submodule(f"{branch}.conv").conv = convolution
    x = feature_map("contiguous")
    gates = [layer.cw, layer.hc, layer.hw]
    maps = [gate.conv(pool) for gate, pool in zip(gates, ops.triplet_pool(x), strict=True)]
    torch.testing.assert_close(layer(x), ops.triplet_gate(x, *maps))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), ops.triplet_gate(x, *maps))


def test_factories_can_pass_the_number_of_channels():
    """Code that builds attention layers as `layer(channels)` can build these two, which ignore the number."""
    for layer in (SimAM, TripletAttention):
        assert layer(64)(feature_map("contiguous")).shape == (3, 4, 5, 6)


def test_layers_train_in_a_network():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), SimAM(8), nn.BatchNorm2d(8), nn.ReLU(), TripletAttention(8), nn.Flatten(),
        nn.Linear(8 * 36, 16),
    )  # fmt: skip
    hash_layer = GreedyHash(0.1)
    head = nn.Linear(16, 2, bias=False)
    images = torch.randn(64, 1, 6, 6)
    labels = (images[:, 0, :3].mean((1, 2)) > images[:, 0, 3:].mean((1, 2))).long()
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, 0.01)
    losses = []
    for _ in range(30):
        b, penalty = hash_layer(network(images))
        loss = nn.functional.cross_entropy(head(b), labels) + penalty
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.5 * losses[0]


LAM = "lam must be a finite number of 1e-18 or more"
ALPHA = "alpha must be a finite number of 0 or more"
CHANNELS = "channels must be a positive integer or None"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SimAM(lam=0.0), f"SimAM: {LAM}, got 0.0"),
        (lambda: SimAM(lam="1e-4"), f"SimAM: {LAM}, got '1e-4'"),
        (lambda: SimAM(lam=True), f"SimAM: {LAM}, got True"),
        (lambda: SimAM(lam=float("nan")), f"SimAM: {LAM}, got nan"),
        (lambda: SimAM(lam=float("inf")), f"SimAM: {LAM}, got inf"),
        (lambda: PlainSimAM(lam=5e-324), f"PlainSimAM: {LAM}, got 5e-324"),
        (lambda: SimAM(0.1), f"SimAM: {CHANNELS}, got 0.1; lambda is a keyword: SimAM\\(lam=0.1\\)"),
        (lambda: PlainSimAM(1e-4), f"PlainSimAM: {CHANNELS}, got 0.0001; .* PlainSimAM\\(lam=0.0001\\)"),
        (lambda: SimAM(True), f"SimAM: {CHANNELS}, got True$"),
        (lambda: SimAM(0), f"SimAM: {CHANNELS}, got 0$"),
        (lambda: SimAM("64"), f"SimAM: {CHANNELS}, got '64'$"),
        (lambda: SimAM(device="gpu"), "SimAM: device must be a torch device or None, got 'gpu'"),
        (lambda: SimAM(device=0.5), "SimAM: device must be a torch device or None, got 0.5"),
        (lambda: SimAM(dtype="half"), "SimAM: dtype must be a torch.dtype or None, got 'half'"),
        (
            lambda: TripletAttention(True),
            f"TripletAttention: {CHANNELS}, got True; no_spatial is a keyword: TripletAttention\\(no_spatial=True\\)",
        ),
        (lambda: PlainTripletAttention(False), f"PlainTripletAttention: {CHANNELS}, got False; no_spatial is"),
        (lambda: TripletAttention(-3), f"TripletAttention: {CHANNELS}, got -3$"),
        (lambda: TripletAttention(7.0), f"TripletAttention: {CHANNELS}, got 7.0$"),
        (lambda: TripletAttention(no_spatial="no"), "TripletAttention: no_spatial must be True or False, got 'no'"),
        (lambda: TripletAttention(dtype=float), "TripletAttention: dtype must be a torch.dtype or None, got <class"),
        (lambda: SimAM(lam=-(10**5000)), "SimAM: lam must be .* of 1e-18 or more, got an integer of 16610 bits"),
        (lambda: SimAM(-(10**5000)), f"SimAM: {CHANNELS}, got an integer of 16610 bits"),
        (
            lambda: TripletAttention(dtype=torch.int32),
            "TripletAttention: dtype must be a floating dtype, got torch",
        ),
        (lambda: PlainTripletAttention(dtype=torch.complex64), "PlainTripletAttention: dtype must be a floating dtype"),
        (lambda: SimAM(dtype=torch.bool), "SimAM: dtype must be a floating dtype, got torch.bool"),
        (lambda: PlainTripletAttention(device="gpu"), "PlainTripletAttention: device must be a torch device or None"),
        (lambda: GreedyHash(-1.0), f"GreedyHash: {ALPHA}, got -1.0"),
        (lambda: GreedyHash("x"), f"GreedyHash: {ALPHA}, got 'x'"),
        (lambda: GreedyHash(float("inf")), f"GreedyHash: {ALPHA}, got inf"),
        (lambda: GreedyHash(float("nan")), f"GreedyHash: {ALPHA}, got nan"),
        (lambda: TripletAttention(kernel_size=3.0), "TripletAttention: kernel_size must be an integer of .*, got 3.0"),
        (lambda: TripletAttention(kernel_size=4), "TripletAttention: kernel_size must be odd, got 4"),
    ],
)
def test_wrong_arguments_are_refused(build, message):
    with pytest.raises(InputError, match=f"^{message}") as caught:
        build()
    assert "\n" not in str(caught.value)


def test_numbers_of_other_libraries_become_numbers_of_python():
    assert type(SimAM(lam=torch.tensor(0.5)).lam) is type(GreedyHash(np.float32(1)).alpha) is float
    for channels in (None, 64, np.int64(64), torch.tensor(64)):
        SimAM(channels), TripletAttention(channels), PlainTripletAttention(channels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", [ops.simam, ops.simam_energy])
@pytest.mark.parametrize("lam", [LEAST_LAM, 1e300])
def test_the_smallest_and_a_huge_lambda_give_finite_gradients_on_constant_planes(lam, op, dtype):
    x = torch.ones(1, 2, 5, 5, dtype=dtype)
    x[:, 1, 2, 2] = 1.5
    leaf = x.clone().requires_grad_()
    y = op(leaf, lam)
    (gradient,) = torch.autograd.grad(y.sum(), leaf)
    in_plain_torch, derivative = torch.func.vjp(lambda x: op(x, lam), x)
    for result in (y, gradient, in_plain_torch, *derivative(torch.ones_like(x))):
        assert result.isfinite().all()


def test_gradients_of_single_samples_equal_those_of_a_loop():
    layer = TripletAttention().double().eval()
    layer.load_state_dict(official().state_dict())
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    x = feature_map("contiguous", torch.float64)

    def loss(parameters, sample):
        return functional_call(layer, parameters, (sample[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        expected = torch.autograd.grad(layer(sample[None]).square().sum(), list(layer.parameters()))
        torch.testing.assert_close([gradient[i] for gradient in found.values()], list(expected))


def test_an_ensemble_of_stacked_layers_gives_the_results_of_each():
    layers = [TripletAttention().double().eval() for _ in range(3)]
    for seed, layer in enumerate(layers):
        layer.load_state_dict(official(seed).state_dict())
    state = stack_module_state(layers)
    x = feature_map("contiguous", torch.float64)
    found = vmap(lambda *state: functional_call(layers[0], state, (x,)))(*state)
    torch.testing.assert_close(found, torch.stack([layer(x) for layer in layers]))


@pytest.mark.parametrize("layer", ["simam", "triplet"])
def test_an_attached_network_can_be_traced(layer):
    """`torch.jit.trace` compares a trace that records gradients with one that does not."""
    model = small_resnet().eval()
    attach(model, layer)
    traced = torch.jit.trace(model, images())
    torch.testing.assert_close(traced(images(seed=1)), model(images(seed=1)))


def replicas(module: nn.Module, count: int, monkeypatch) -> list[nn.Module]:
    """Copies as nn.DataParallel makes them, on the CPU: only the functions that copy between GPUs are replaced."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, *arguments: device)
    copy_all = lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices]  # noqa: E731
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copy_all)
    return replicate.replicate(module, [torch.device("cpu")] * count)


@pytest.mark.parametrize("training", [True, False])
def test_replicas_of_data_parallel_run_the_fused_op(training, monkeypatch):
    layer, x = nn.Sequential(TripletAttention(), SimAM()).train(training), torch.randn(3, 4, 5, 6)
    want = copy.deepcopy(layer)(x)
    copies = replicas(layer, 2, monkeypatch)
    assert "weight" not in copies[1][0].cw.conv.conv._parameters
    monkeypatch.setattr("hashengine.nn.triplet_attention.triplet_gate", None)  # the separate ops
    got = copies[1](x)
    assert torch.equal(got, want)
    got.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_layers_run_in_the_older_fsdp(use_orig_params):
    """Without `use_orig_params`, the default, parameters are plain attributes: views of one flat parameter."""
    layer, x = nn.Sequential(nn.Conv2d(4, 4, 1), TripletAttention()), torch.randn(3, 4, 5, 6)
    want = copy.deepcopy(layer)(x)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        device = torch.device("cpu")
        wrapped = FullyShardedDataParallel(layer, device_id=device, use_orig_params=use_orig_params)
        got = wrapped(x)
        got.sum().backward()
        assert torch.equal(got, want) and all(parameter.grad is not None for parameter in wrapped.parameters())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("place", ["conv.weight", "bn.weight", "bn.bias"])
def test_a_parameter_that_another_network_computes_is_used(place):
    layer, x = TripletAttention(), torch.randn(3, 4, 5, 6)
    other = copy.deepcopy(layer)
    part, name = place.split(".")
    module = getattr(layer.cw.conv, part)
    computed = getattr(module, name).detach() * 2 + 1
    delattr(module, name)
    setattr(module, name, computed.requires_grad_())
    getattr(getattr(other.cw.conv, part), name).data.copy_(computed.detach())
    got = layer(x)
    assert torch.equal(got, other(x))
    got.sum().backward()
    assert computed.grad is not None and computed.grad.abs().sum() > 0


def test_a_compiled_layer_in_training_takes_any_batch():
    layer, graphs = TripletAttention(), []
    want = copy.deepcopy(layer)

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, backend=count, dynamic=True, fullgraph=True)
    for batch in range(2, 14):
        x = torch.randn(batch, 4, 5, 6)
        assert torch.equal(compiled(x), want(x))
    assert len(graphs) == 1 and torch.equal(layer.cw.conv.bn.running_mean, want.cw.conv.bn.running_mean)
    x = torch.randn(3, 4, 5, 6)
    torch._dynamo.mark_dynamic(x, 0)
    torch.compile(TripletAttention(), backend="aot_eager")(x)


@pytest.mark.parametrize("frozen", [False, True])
def test_an_ensemble_in_evaluation_mode_compiles(frozen):
    """A batch of `vmap` hides that its parameters, or its images, require a gradient."""
    layers = [TripletAttention(kernel_size=3).eval().requires_grad_(not frozen) for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(2, 3, 4, 5, 6, requires_grad=True)

    def function(parameters, buffers, x):
        return torch.func.vmap(lambda p, b, z: torch.func.functional_call(layers[0], (p, b), (z,)))(
            parameters, buffers, x
        )

    inputs = [x, *(value for value in parameters.values() if value.requires_grad)]
    results = []
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        y = call(parameters, buffers, x)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", [SimAM, TripletAttention])
def test_compiled_autograd_runs_the_backward_of_an_eager_forward(layer, training):
    layer, x = layer().train(training), feature_map("contiguous")

    def gradient(context):
        leaf = x.clone().requires_grad_()
        y = layer(leaf).square().sum()
        with context:
            y.backward()
        return leaf.grad

    compiled = compiled_autograd._enable(torch.compile(backend="eager"))
    torch.testing.assert_close(gradient(compiled), gradient(nullcontext()))


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_an_exported_frozen_layer_has_a_gradient(grad_mode):
    layer, x = TripletAttention().eval().requires_grad_(False), feature_map("contiguous")
    with grad_mode():
        exported = torch.export.export(layer, (x,)).module()
    gradients = []
    for module in (exported, layer):
        leaf = x.clone().requires_grad_()
        module(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
