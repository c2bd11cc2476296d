"""Tests that run on many ops: torch.compile and determinism.

For ops with a gradient also: autocast, the error of a double backward, and upstream gradients in other layouts.

Values, opcheck and finite differences are tested in the files of the single ops.
"""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch._inductor.config
import torch._inductor.lowering
from torch import Tensor
from torch.autograd import forward_ad

from hashengine import _native, ops
from hashengine.nn import GreedyHash, SimAM
from hashengine.ops.triplet_attention import triplet_attention_inference
from hashengine.ops.triplet_attention_update import triplet_attention_update
from tests.helpers.eager import gate_maps, triplet_parameters
from tests.helpers.layouts import feature_map
from tests.helpers.threads import with_threads

PARAMETERS = triplet_parameters(3, torch.float32)
MAPS = gate_maps(feature_map("contiguous"))


class Case(NamedTuple):
    """An op as a function of one tensor.

    `differentiable` is the index of the first result that has a gradient; None if no result has one.
    """

    function: Callable[[Tensor], Tensor | tuple[Tensor, ...]]
    inputs: Callable[[], Tensor] = lambda: feature_map("contiguous")
    differentiable: int | None = 0


def activations() -> Tensor:
    return feature_map("contiguous").flatten()[:352].view(11, 32)


def packed() -> Tensor:
    return ops.pack_bits(activations())


def update(x: Tensor) -> tuple[Tensor, ...]:
    running = [[torch.zeros(1) for _ in range(3)] for _ in range(2)]
    steps = [torch.zeros((), dtype=torch.int64) for _ in range(3)]
    triplet_attention_update(x.flatten()[:3], x.flatten()[3:6], *running, steps, [72, 60, 90], 0.1)
    return *running[0], *running[1], *steps


CASES = {
    "simam": Case(ops.simam),
    "simam_energy": Case(ops.simam_energy),
    "triplet_pool": Case(ops.triplet_pool),
    "triplet_gate": Case(lambda x: ops.triplet_gate(x, *MAPS)),
    "triplet_attention": Case(lambda x: ops.triplet_attention(x, *PARAMETERS, True)),
    "triplet_attention_eval": Case(lambda x: ops.triplet_attention(x, *PARAMETERS, False)),
    "triplet_attention_inference": Case(lambda x: triplet_attention_inference(x, *PARAMETERS)),
    "triplet_attention_update": Case(update, differentiable=None),
    "greedy_sign": Case(lambda u: ops.greedy_sign(u, 0.1), activations, 1),
    "pack_bits": Case(ops.pack_bits, activations, None),
    "unpack_bits": Case(ops.unpack_bits, packed, None),
    "pack_filter": Case(lambda codes: ops.pack_filter(codes > 7), packed, None),
    "hamming_topk": Case(lambda codes: ops.hamming_topk(codes[:3], codes, 4), packed, None),
    "hamming_topk_filtered": Case(
        lambda codes: ops.hamming_topk(codes[:3], codes, 4, filter=ops.pack_filter(codes[:, 0] > 7)), packed, None
    ),
    "hamming_range": Case(lambda codes: ops.hamming_range(codes[:3], codes, 30), packed, None),
    "hamming_count": Case(
        lambda codes: ops.hamming_count(codes[:3], codes, labels=(codes[:3, 0].long(), codes[:, 0].long())),
        packed,
        None,
    ),
}
differentiable = [name for name, case in CASES.items() if case.differentiable is not None]
with_gradient = pytest.mark.parametrize("name", differentiable)
every_op = pytest.mark.parametrize("name", CASES)


def outputs(case: Case, x: Tensor, function: Callable | None = None) -> tuple[Tensor, ...]:
    result = (function or case.function)(x)
    return result if isinstance(result, tuple) else (result,)


def results_and_gradient(case: Case, x: Tensor, function: Callable | None = None) -> list[Tensor]:
    if case.differentiable is None:
        return list(outputs(case, x, function))
    x = x.detach().requires_grad_()
    results = outputs(case, x, function)
    (grad,) = torch.autograd.grad([y.square().sum() for y in results if y.requires_grad], x)
    return [*(y.detach() for y in results), grad]


def base_name(name: str) -> str:
    return name.removesuffix("_eval").removesuffix("_filtered")


def test_every_op_has_a_case():
    internal = {"triplet_attention_inference", "triplet_attention_update"}
    assert {base_name(name) for name in CASES} == set(ops.__all__) | internal


@every_op
def test_compiles_as_one_graph_forward_and_backward(name):
    case = CASES[name]
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        results_and_gradient(case, case.inputs(), compiled), results_and_gradient(case, case.inputs()), rtol=0, atol=0
    )


def test_ops_compile_together():
    x = feature_map("channels_last").requires_grad_()
    maps = gate_maps(x)

    def function(x: Tensor) -> Tensor:
        return sum(pool.sum() for pool in ops.triplet_pool(ops.simam(x))) + ops.triplet_gate(x, *maps).square().sum()

    want = torch.autograd.grad(function(x), x)[0]
    got = torch.autograd.grad(torch.compile(function, fullgraph=True, backend="aot_eager")(x), x)[0]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("on_a_build_server", [False, True])
@torch._inductor.config.patch(force_disable_caches=True)
def test_inductor_compiles_the_attention_ops_with_the_torch_ops_around_them(monkeypatch, on_a_build_server):
    """If the variable CI is set, Inductor refuses an op with a decomposition that nobody has registered there."""
    if on_a_build_server:
        monkeypatch.setenv("CI", "true")
    else:
        monkeypatch.delenv("CI", raising=False)
    for op in [op for op in torch._inductor.lowering.lowerings if str(op).startswith("hashengine.")]:
        monkeypatch.delitem(torch._inductor.lowering.lowerings, op)
    torch.compiler.reset()
    weight = feature_map("contiguous", shape=(4, 4, 3, 3), seed=1)

    def function(x: Tensor) -> Tensor:
        x = ops.simam(torch.nn.functional.conv2d(x, weight, padding=1) * 0.5).relu()
        return ops.triplet_attention(x + 1, *PARAMETERS, True)[0].flatten(1)

    case = Case(function)
    for layout in ("contiguous", "channels_last"):
        x = feature_map(layout)
        got = results_and_gradient(case, x, torch.compile(function, fullgraph=True))
        torch.testing.assert_close(got, results_and_gradient(case, x))


@with_gradient
def test_autocast_does_not_change_the_results_for_bfloat16(name):
    """The ops accept bfloat16 and sum in float32, so autocast has nothing to change."""
    case = CASES[name]
    x = case.inputs().bfloat16()
    want = results_and_gradient(case, x)
    with torch.autocast("cpu", torch.bfloat16):
        got = results_and_gradient(case, x)
    assert got[0].dtype == got[-1].dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@with_gradient
def test_double_backward_raises_an_error_of_one_line(name):
    case = CASES[name]
    x = case.inputs().requires_grad_()
    (grad,) = torch.autograd.grad(outputs(case, x)[case.differentiable].sum(), x, create_graph=True)
    op = base_name(name).removesuffix("_inference")
    message = f"^{op}_backward: inputs must be detached .*double backward is not supported"
    with pytest.raises(ValueError, match=message) as caught:
        grad.sum().backward()
    assert "\n" not in str(caught.value)


def test_the_gradients_of_inference_are_those_of_the_forward_in_eval_mode():
    def gradients(op):
        x = feature_map("contiguous").requires_grad_()
        parameters = [[tensor.clone().requires_grad_() for tensor in tensors] for tensors in PARAMETERS[:3]]
        y = op(x, *parameters, *PARAMETERS[3:])
        return torch.autograd.grad(y.square().sum(), [x, *(tensor for tensors in parameters for tensor in tensors)])

    want = gradients(lambda *arguments: ops.triplet_attention(*arguments, False)[0])
    torch.testing.assert_close(gradients(triplet_attention_inference), want, rtol=0, atol=0)


@every_op
def test_repeated_runs_with_1_to_3_threads_give_the_same_bits(name):
    case = CASES[name]
    want = results_and_gradient(case, case.inputs())
    for got in with_threads(lambda: results_and_gradient(case, case.inputs()), (1, 2, 3)):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@with_gradient
def test_upstream_gradients_in_other_layouts_give_the_same_gradients(name):
    case = CASES[name]
    x = case.inputs().requires_grad_()
    y = outputs(case, x)[0]
    if name == "triplet_pool" or y.dim() != 4:
        pytest.skip("the result has only one layout")
    upstream = feature_map("contiguous", seed=3)
    layouts = (upstream, upstream.contiguous(memory_format=torch.channels_last), upstream.flip(2).flip(2))
    grads = [torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in layouts]
    one = torch.autograd.grad(y, x, torch.ones(()).expand_as(y), retain_graph=True)[0]
    torch.testing.assert_close(one, torch.autograd.grad(y, x, torch.ones_like(y))[0])
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0])


def test_an_upstream_gradient_of_zero_adds_nothing():
    x = feature_map("contiguous").requires_grad_()
    for y in (ops.simam(x), ops.triplet_attention(x, *PARAMETERS, True)[0]):
        (grad,) = torch.autograd.grad((y * 0).sum() + x.sum(), x)
        torch.testing.assert_close(grad, torch.ones_like(x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", differentiable)
def test_forward_mode_inside_a_compiled_function_gives_the_tangents(name, backend):
    """The tangents of all floating-point results are compared."""
    case = CASES[name]
    if backend == "inductor" and name != "simam_energy":
        pytest.skip("Inductor gets the same graph as aot_eager")
    x = case.inputs()
    tangent = x.roll(1, -1)

    def function(x: Tensor) -> Tensor:
        floats = [y for y in torch.func.jvp(lambda z: outputs(case, z), (x,), (tangent,))[1] if y.is_floating_point()]
        return torch.cat([y.float().flatten() for y in floats])

    torch.compiler.reset()
    want = function(x)
    assert want.abs().max() > 0
    torch.testing.assert_close(torch.compile(function, backend=backend)(x), want)


RAW_OPS = torch.ops.hashengine
raw_calls = {
    "simam": lambda x: RAW_OPS.simam(x, 1e-4),
    "simam_energy": lambda x: RAW_OPS.simam_energy(x, 1e-4),
    "greedy_sign": lambda x: RAW_OPS.greedy_sign(x, 0.1),
    "triplet_pool": RAW_OPS.triplet_pool,
    "triplet_gate": lambda x: RAW_OPS.triplet_gate(x, *MAPS),
    "simam_energy_backward": lambda x: RAW_OPS.simam_energy_backward(x, x, 1e-4),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", raw_calls)
def test_ops_refuse_tangents_that_their_formulas_would_drop(name, device):
    x = feature_map("contiguous").to(device)
    if device == "meta" and name == "triplet_gate":
        pytest.skip("its other arguments are on the CPU")
    with forward_ad.dual_level(), pytest.raises(ValueError, match=f"^{name}: inputs must be without tangents"):
        raw_calls[name](forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.skipif(not _native.available(), reason="the tests above run without the native module")
def test_ops_refuse_tangents_without_the_native_module():
    tests = f"{__file__}::{test_ops_refuse_tangents_that_their_formulas_would_drop.__name__}"
    program = f"""
        import sys, pytest
        from hashengine import _native
        _native.refuse("a test")
        sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", {tests!r}]))
    """
    environment = {name: value for name, value in os.environ.items() if name != "HASHENGINE_REQUIRE_NATIVE"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and f"{2 * len(raw_calls) - 1} passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_refuses_tangents_until_it_is_compiled_again(backend):
    x = feature_map("contiguous")
    torch.compiler.reset()
    function = torch.compile(ops.simam, backend=backend)
    function(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(ValueError, match=r"compiled outside the transform, call torch.compiler.reset\(\) first"):
            function(dual)
        torch.compiler.reset()
        tangent = forward_ad.unpack_dual(function(dual)).tangent
        torch.testing.assert_close(tangent, forward_ad.unpack_dual(ops.simam(dual)).tangent)


def test_an_empty_batch_of_vmap_is_refused_in_one_line():
    x = torch.zeros(0, 2, 3, 4, 5)
    with pytest.raises(ValueError, match="^vmap: the batch must be of at least one element, got 0"):
        torch.vmap(lambda x: RAW_OPS.triplet_attention_inference(x, *PARAMETERS, 1e-5))(x)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x, number: ops.greedy_sign(x, number), "greedy_sign: alpha"),
        (lambda x, number: ops.simam(x, number), "simam: lam"),
        (lambda x, number: ops.simam_energy(x, number), "simam_energy: lam"),
        (lambda x, number: ops.triplet_attention(x, *PARAMETERS, False, number), "triplet_attention: eps"),
        (lambda x, number: GreedyHash(number), "GreedyHash: alpha"),
        (lambda x, number: SimAM(lam=number), "SimAM: lam"),
    ],
)
def test_numbers_that_require_a_gradient_are_refused(call, name):
    number = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(ValueError, match=f"^{name} must be a number, got a tensor that requires a gradient"):
        call(feature_map("contiguous"), number)
    call(feature_map("contiguous"), number.detach())


@pytest.mark.parametrize("place", [3, 4])
def test_running_statistics_that_require_a_gradient_are_refused(place):
    parameters = [[tensor.clone() for tensor in tensors] for tensors in PARAMETERS]
    parameters[place][1].requires_grad_()
    x = feature_map("contiguous")
    for op in (triplet_attention_inference, lambda *arguments: ops.triplet_attention(*arguments, False)):
        with pytest.raises(ValueError, match="running statistics must be without a gradient, got some that require"):
            op(x, *parameters)
        with torch.no_grad():
            op(x, *parameters)
