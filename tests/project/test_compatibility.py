"""Every cell of the tables in docs/guides/compatibility.md: what works with which feature of torch, and how.

A row of a table is a feature, a column is an op, a layer or a network. The cells say

- works: the feature gives the results of eager torch, and an op of hashengine computes them;
- plain torch: it gives these results, and no op of hashengine takes part;
- refused (n): it raises an error of one line; the list below the tables has its text under the number n;
- a dash: the combination has no meaning.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap
from torch.utils._pytree import tree_leaves

import hashengine as he
from hashengine import ops
from hashengine.nn import GreedyHash, PlainSimAM, PlainTripletAttention, SimAM, TripletAttention
from tests.helpers.networks import images, small_resnet
from tests.helpers.official import OfficialSimAM, OfficialTriplet, randomise
from tests.helpers.onnx_runtime import OnnxModel
from tests.helpers.paths import ROOT

PAGE = ROOT / "docs" / "guides" / "compatibility.md"
WORKS, PLAIN, NO_MEANING = "works", "plain torch", "–"


class Op(nn.Module):
    """An op, or several, as a module whose output is one tensor."""

    def __init__(self, function: Callable[[Tensor], Tensor | tuple[Tensor, ...]]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return joined(self.function(x))


class TripletAttentionOp(TripletAttention):
    """The op `triplet_attention`, with the parameters of the layer."""

    def forward(self, x: Tensor) -> Tensor:
        gates = [gate.conv for gate in (self.cw, self.hc, self.hw)]
        lists = [[gate.conv.weight for gate in gates]]
        lists += [[getattr(gate.bn, name) for gate in gates] for name in ("weight", "bias")]
        lists += [[getattr(gate.bn, name) for gate in gates] for name in ("running_mean", "running_var")]
        return ops.triplet_attention(x, *lists, self.training)[0]


class JoinedGreedyHash(GreedyHash):
    """`GreedyHash` with one tensor as its output."""

    def forward(self, u: Tensor) -> Tensor:
        return joined(super().forward(u))


def joined(tensors: Tensor | tuple[Tensor, ...]) -> Tensor:
    if isinstance(tensors, Tensor):
        return tensors
    wide = torch.promote_types(tensors[0].dtype, tensors[-1].dtype)
    return torch.cat([tensor.flatten().to(wide) for tensor in tensors])


def gate(x: Tensor) -> Tensor:
    """`triplet_gate` with maps that depend on x."""
    return ops.triplet_gate(x, x.mean(2)[:, None], x.mean(3).transpose(1, 2)[:, None], x.mean(1)[:, None])


def pack(u: Tensor) -> Tensor:
    codes = ops.pack_bits(u.flatten(1))
    return torch.cat((codes, ops.unpack_bits(codes).to(torch.uint8)), 1)


def search(x: Tensor) -> tuple[Tensor, ...]:
    codes = ops.pack_bits(x.flatten(1))
    found = (*ops.hamming_topk(codes[:1], codes, 2), *ops.hamming_range(codes[:1], codes, 20))
    return *found, ops.hamming_count(codes[:1], codes)[0]


def attached() -> nn.Module:
    model = small_resnet(depth=1)
    he.nn.attach(model, "simam", where="layer1")
    he.nn.attach(model, "triplet", where="layer2")
    return model


def fused() -> nn.Module:
    attention = (OfficialSimAM(), OfficialTriplet(kernel_size=3))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *attention, nn.AdaptiveAvgPool2d(1))
    assert len(he.nn.fuse(model).fused) == 2
    return model


SUBJECTS: dict[str, Callable[[], nn.Module]] = {
    "simam": lambda: Op(ops.simam),
    "simam_energy": lambda: Op(ops.simam_energy),
    "triplet_attention": lambda: TripletAttentionOp(kernel_size=3),
    "triplet_pool": lambda: Op(ops.triplet_pool),
    "triplet_gate": lambda: Op(gate),
    "greedy_sign": lambda: Op(functools.partial(ops.greedy_sign, alpha=0.3)),
    "pack_bits, unpack_bits": lambda: Op(pack),
    "Hamming search": lambda: Op(search),
    "SimAM": SimAM,
    "TripletAttention": lambda: TripletAttention(kernel_size=3),
    "GreedyHash": JoinedGreedyHash,
    "PlainSimAM": PlainSimAM,
    "PlainTripletAttention": lambda: PlainTripletAttention(kernel_size=3),
    "attached": attached,
    "fused": fused,
}
NETWORKS = ("attached", "fused")
ATTENTION = (SimAM, TripletAttention)


def build(subject: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(SUBJECTS[subject]()).eval()


def example(subject: str, seed: int = 0) -> Tensor:
    """An input: images for a network, otherwise a feature map [2, 3, 2, 4], float32."""
    if subject in NETWORKS:
        return images(8, seed=seed)
    return torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def with_convolution(subject: str) -> nn.Module:
    """A network with parameters before the subject."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), build(subject))


def train_step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and of all parameters."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return [y.detach(), x.grad, *(g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients)]


# A check returns a function that uses the feature, and the result that it must give.
Check = tuple[Callable[[], Any], Any]


def autocast(subject: str) -> Check:
    """Under autocast, each layer computes as it does alone from the same input."""
    model, x, calls = with_convolution(subject), example(subject), []
    for module in model.modules():
        if isinstance(module, (Op, GreedyHash, *ATTENTION)):
            # Clones, because later operations of a network may be in place.
            module.register_forward_hook(lambda module, inputs, y: calls.append((module, inputs[0].clone(), y.clone())))

    def run() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        return [y for _, _, y in calls]

    run()
    assert calls and all(x.dtype == torch.bfloat16 for _, x, _ in calls)
    alone = [copy.deepcopy(module) for module, _, _ in calls]
    for module in alone:
        module._forward_hooks.clear()
    inputs = [x.detach() for _, x, _ in calls]
    calls.clear()
    return run, [module(x) for module, x in zip(alone, inputs, strict=True)]


def grad_scaler(subject: str) -> Check:
    def run(scale: float) -> Tensor:
        x = example(subject).requires_grad_()
        optimizer = torch.optim.SGD([x], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        scaler.scale(build(subject)(x).sum()).backward()
        scaler.step(optimizer)
        return x.detach()

    return lambda: run(2.0**10), run(1)


def compile(subject: str) -> Check:
    torch.compiler.reset()  # torch does not compile a forward again that it has skipped in another test
    model, x = build(subject), example(subject)
    if is_differentiable(subject):
        compiled = torch.compile(build(subject), fullgraph=True, backend="aot_eager")
        return lambda: train_step(compiled, x), train_step(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    return lambda: compiled(x), model(x)


def export(subject: str) -> Check:
    model, x = build(subject), example(subject, seed=1)
    exported = torch.export.export(model, (example(subject),)).module()
    return lambda: exported(x), model(x)


class AllSubjects(nn.Module):
    """Every subject of a network, so that one export or compilation serves all. `inputs` has one row per subject."""

    def __init__(self, subjects: list[str]):
        super().__init__()
        self.parts = nn.ModuleList(build(subject) for subject in subjects)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(x) for part, x in zip(self.parts, inputs, strict=True))


ALL = [subject for subject in SUBJECTS if subject != "Hamming search"]


@functools.cache
def packaged() -> Callable[..., list[Tensor]]:
    """`AllSubjects`, compiled by AOTInductor."""
    inputs = tuple(map(example, ALL))
    with torch.no_grad():
        exported = torch.export.export(AllSubjects(ALL).eval(), inputs)
    package = io.BytesIO()
    torch._inductor.aoti_compile_and_package(exported, package_path=package)
    package.seek(0)
    return torch._inductor.aoti_load_package(package)


def aot_inductor(subject: str) -> Check:
    run, inputs, index = packaged(), tuple(map(example, ALL)), ALL.index(subject)
    return lambda: run(*inputs)[index], build(subject)(inputs[index])


@functools.cache
def onnx_model(dynamo: bool) -> OnnxModel:
    return OnnxModel(AllSubjects(ALL).eval(), tuple(map(example, ALL)), dynamo=dynamo)


def onnx(subject: str, dynamo: bool = True) -> Check:
    model, x = build(subject), example(subject)
    exported, index = onnx_model(dynamo), ALL.index(subject)
    exact = copy.deepcopy(model).double()(x.double())
    # Each node of the graph rounds once, and no node makes a relative error larger.
    bound = len(exported.nodes) * torch.finfo(torch.float32).eps * exact.abs().max().item()

    def run() -> tuple[torch.dtype, bool]:
        y = exported(*map(example, ALL))[index]
        return y.dtype, bool(((y - exact).abs() <= bound).all())

    return run, (model(x).dtype, True)


def trace(subject: str) -> Check:
    model, x = build(subject), example(subject, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, example(subject))
    return lambda: traced(x), model(x)


def script(subject: str) -> Check:
    return lambda: torch.jit.script(build(subject)), None


def flops(subject: str) -> Check:
    from torch.utils.flop_counter import FlopCounterMode

    def count(run: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    model, x = build(subject), example(subject).requires_grad_()
    # A trace contains the convolutions themselves.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(build(subject), x.detach())
    return lambda: count(lambda: model(x)), count(lambda: traced(x))


# --- derivatives, in float64 ---


def function(subject: str) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """The subject as a function, an input, and a direction."""
    return build(subject).double(), example(subject).double(), example(subject, seed=2).double()


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The Jacobian by one backward per element of the output, with the autograd formulas of the ops."""
    return torch.autograd.functional.jacobian(f, x)


def along(matrix: Tensor, v: Tensor) -> Tensor:
    """The product of a Jacobian and a direction."""
    return (matrix * v).flatten(-v.dim()).sum(-1)


def scalar(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A weighted sum of the output of `f`."""

    def weighted(x: Tensor) -> Tensor:
        y = f(x).flatten()
        return (y * torch.arange(1, len(y) + 1, dtype=y.dtype) / len(y)).sum()

    return weighted


def reverse_gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(scalar(f)(x), x)[0]


def func_grad(subject: str) -> Check:
    f, x, _ = function(subject)
    return lambda: grad(scalar(f))(x), reverse_gradient(f, x)


def func_vjp(subject: str) -> Check:
    f, x, _ = function(subject)
    y, pullback = vjp(scalar(f), x)
    return lambda: pullback(torch.ones_like(y))[0], reverse_gradient(f, x)


def func_jvp(subject: str) -> Check:
    f, x, v = function(subject)
    return lambda: jvp(f, (x,), (v,)), (f(x), along(jacobian(f, x), v))


def forward_mode(subject: str) -> Check:
    f, x, v = function(subject)

    def run() -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent

    return run, along(jacobian(f, x), v)


def func_linearize(subject: str) -> Check:
    f, x, v = function(subject)
    y, pushforward = linearize(f, x)
    return lambda: (y, pushforward(v)), (f(x), along(jacobian(f, x), v))


def func_jacrev(subject: str) -> Check:
    f, x, _ = function(subject)
    return lambda: jacrev(f)(x), jacobian(f, x)


def func_jacfwd(subject: str) -> Check:
    f, x, _ = function(subject)
    return lambda: jacfwd(f)(x), jacobian(f, x)


def func_hessian(subject: str) -> Check:
    """Along one direction, against a central difference of the gradient by the autograd formula."""
    f, x, v = function(subject)
    x, v = x[:, :, :2, :2].contiguous(), v[:, :, :2, :2]
    step = 2.0**-16  # the error of the difference, step ** 2, and that of its rounding, 2 ** -53 / step, are small
    difference = (reverse_gradient(f, x + step * v) - reverse_gradient(f, x - step * v)) / (2 * step)
    return lambda: along(hessian(scalar(f))(x), v).round(decimals=5), difference.round(decimals=5)


def func_vmap(subject: str) -> Check:
    f, x, v = function(subject)
    return lambda: vmap(f)(torch.stack((x, v))), torch.stack((f(x), f(v)))


def per_sample_gradients(subject: str) -> Check:
    model, x = with_convolution(subject).double(), example(subject).double()
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, parameters, sample[None]).square().sum()

    def alone(sample: Tensor) -> dict[str, Tensor]:
        gradients = torch.autograd.grad(loss(parameters, sample), list(parameters.values()), materialize_grads=True)
        return dict(zip(parameters, gradients, strict=True))

    each = [alone(sample) for sample in x]
    expected = {name: torch.stack([gradients[name] for gradients in each]) for name in parameters}
    return lambda: vmap(grad(loss), in_dims=(None, 0))(parameters, x), expected


def ensemble(subject: str) -> Check:
    models = [with_convolution(subject).double() for _ in range(2)]
    nn.init.ones_(models[1][0].weight)
    x = example(subject).double()
    state = stack_module_state(models)
    run = vmap(lambda *state: functional_call(models[0], state, x))
    return lambda: run(*state), torch.stack([model(x) for model in models])


def double_backward(subject: str) -> Check:
    f, x, _ = function(subject)
    x.requires_grad_()
    (first,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    return lambda: torch.autograd.grad(first.square().sum(), x), None


# --- training ---


def checkpointing(subject: str) -> Check:
    model, x = with_convolution(subject), example(subject)

    def run(reentrant: bool) -> list[Tensor]:
        twin = copy.deepcopy(model)
        checkpointed = Op(lambda x: torch.utils.checkpoint.checkpoint(twin, x, use_reentrant=reentrant))
        checkpointed.twin = twin
        return train_step(checkpointed, x)

    return lambda: [run(True), run(False)], [train_step(model, x)] * 2


@contextmanager
def process_group() -> Iterator[None]:
    """The only process of a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def data_parallel(subject: str) -> Check:
    model, x = with_convolution(subject), example(subject)

    def run() -> list[Tensor]:
        with process_group():
            return train_step(nn.parallel.DistributedDataParallel(copy.deepcopy(model)), x)

    return run, train_step(model, x)


def fully_sharded(subject: str) -> Check:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, x = with_convolution(subject), example(subject)

    def run() -> list[Tensor]:
        with process_group():
            return train_step(fully_shard(copy.deepcopy(model), mesh=init_device_mesh("cpu", (1,))), x)

    return run, train_step(model, x)


def quantization_aware(subject: str) -> Check:
    """Training with simulated quantisation; the layers get and return float tensors."""
    from torch.ao import quantization

    model, x = with_convolution(subject).train(), example(subject)
    model.qconfig = quantization.get_default_qat_qconfig()
    prepared = quantization.prepare_qat(model)

    def run() -> list[bool]:
        return [bool(tensor.isfinite().all()) for tensor in train_step(prepared, x)]

    return run, [True] * (2 + len(list(prepared.parameters())))


def quantized(subject: str) -> Check:
    """Inference with tensors of 8 bits."""
    model, x = build(subject), torch.quantize_per_tensor(example(subject), 0.1, 128, torch.quint8)
    if subject in NETWORKS:
        model = next(module for module in model.modules() if isinstance(module, ATTENTION))
    return lambda: model(x), None


def pruning(subject: str) -> Check:
    """A pruned network computes with the weights that are left."""
    from torch.nn.utils import prune

    model, x = with_convolution(subject), example(subject)
    pruned = copy.deepcopy(model)
    for name, module in pruned.named_modules():
        if isinstance(module, nn.Conv2d):
            prune.l1_unstructured(module, "weight", amount=0.3)
            model.get_submodule(name).weight.data.mul_(module.weight_mask)
    return lambda: train_step(pruned, x)[:2], train_step(model, x)[:2]


# --- defaults, devices, copies ---


def default_dtype(subject: str) -> Check:
    """New parameters have the default dtype. Results have the dtype of x."""
    model, x = build(subject), example(subject)

    def run() -> list[Tensor]:
        results = []
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            try:
                assert all(parameter.dtype == dtype for parameter in SUBJECTS[subject]().parameters())
                results.append(model(x))
            finally:
                torch.set_default_dtype(torch.float32)
        return results

    return run, [model(x)] * 2


def default_device(subject: str) -> Check:
    model, x = build(subject), example(subject)

    def run() -> Tensor:
        torch.set_default_device("meta")
        try:
            assert all(parameter.is_meta for parameter in SUBJECTS[subject]().parameters())
            return model(x)
        finally:
            torch.set_default_device(None)

    return run, model(x)


def meta(subject: str) -> Check:
    def layout(y: Tensor) -> tuple[Any, ...]:
        return y.shape, y.stride(), y.dtype

    model, x = build(subject), example(subject)
    on_meta, x_on_meta = build(subject).to("meta"), x.to("meta")
    return lambda: layout(on_meta(x_on_meta)), layout(model(x))


def same(subject: str, copied: Callable[[nn.Module], nn.Module]) -> Check:
    model, x = build(subject), example(subject)
    other = copied(model)
    return lambda: train_step(other, x), train_step(model, x)


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(torch.load(file))
    return other


FEATURES: dict[str, Callable[[str], Check]] = {
    "autocast": autocast,
    "GradScaler": grad_scaler,
    "torch.compile": compile,
    "torch.export": export,
    "AOTInductor": aot_inductor,
    "ONNX": onnx,
    "ONNX, legacy exporter": functools.partial(onnx, dynamo=False),
    "jit.trace": trace,
    "jit.script": script,
    "func.grad": func_grad,
    "func.vjp": func_vjp,
    "func.jvp": func_jvp,
    "func.jacrev": func_jacrev,
    "func.jacfwd": func_jacfwd,
    "func.hessian": func_hessian,
    "func.linearize": func_linearize,
    "func.vmap": func_vmap,
    "per-sample gradients": per_sample_gradients,
    "stack_module_state": ensemble,
    "forward-mode AD": forward_mode,
    "double backward": double_backward,
    "activation checkpointing": checkpointing,
    "DDP": data_parallel,
    "FSDP2": fully_sharded,
    "quantisation-aware training": quantization_aware,
    "8-bit tensors": quantized,
    "pruning": pruning,
    "set_default_dtype": default_dtype,
    "set_default_device": default_device,
    "meta": meta,
    "deepcopy": functools.partial(same, copied=copy.deepcopy),
    "pickle": functools.partial(same, copied=lambda model: pickle.loads(pickle.dumps(model))),
    "torch.save": functools.partial(same, copied=saved),
    "state_dict": functools.partial(same, copied=loaded),
    "FlopCounterMode": flops,
}


def is_differentiable(subject: str) -> bool:
    return subject not in ("pack_bits, unpack_bits", "Hamming search")


def tables(page: str) -> dict[tuple[str, str], str]:
    """The cells of the tables, by feature and subject."""
    cells, header = {}, []
    for line in page.splitlines():
        if not line.startswith("|"):
            header = []
            continue
        first, *rest = (cell.strip().replace("`", "") for cell in line.strip("|").split("|"))
        if not header:
            header = rest
        elif not first.startswith("---"):
            cells |= {(first, subject): cell for subject, cell in zip(header, rest, strict=True)}
    return cells


def refusals(page: str) -> dict[str, str]:
    """The texts of the errors, by number."""
    return dict(re.findall(r"^(\d)\. `([^`]+)`", page, re.MULTILINE))


CELLS = tables(PAGE.read_text())
REFUSALS = refusals(PAGE.read_text())
SLOW = ("AOTInductor", "ONNX")


@contextmanager
def recorded_ops() -> Iterator[set[str]]:
    """The ops of hashengine that torch's dispatcher calls, in eager, compiled or exported code."""
    names: set[str] = set()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield names
    names |= {event.name for event in profile.events() if event.name.startswith("hashengine::")}


def contains_tensors(result: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))


def marks(feature: str) -> list[Any]:
    return [pytest.mark.slow] if feature in SLOW else []


def cells() -> list[Any]:
    return [
        pytest.param(feature, subject, cell, id=f"{feature}-{subject}", marks=marks(feature))
        for (feature, subject), cell in CELLS.items()
        if cell != NO_MEANING
    ]


def test_the_tables_are_complete():
    assert {feature for feature, _ in CELLS} == set(FEATURES)
    assert {subject for _, subject in CELLS} == set(SUBJECTS)
    assert len(CELLS) == len(FEATURES) * len(SUBJECTS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("feature", "subject", "cell"), cells())
def test_a_cell_of_the_tables_is_true(feature, subject, cell):
    if cell.startswith("refused"):
        message = REFUSALS[cell.removeprefix("refused (").removesuffix(")")]
        with pytest.raises((ValueError, RuntimeError), match=re.escape(message)):
            FEATURES[feature](subject)[0]()
        return
    run, expected = FEATURES[feature](subject)
    with recorded_ops() as names:
        actual = run()
    if contains_tensors(expected):
        torch.testing.assert_close(actual, expected)
    else:
        assert actual == expected
    assert cell in (WORKS, PLAIN) and bool(names) == (cell == WORKS)
