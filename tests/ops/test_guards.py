"""The guards that every op has: autocast, torch.compile forward and backward, double backward refused, determinism.

Fakes, opcheck over layouts and gradcheck stand beside the ops' formulas, in test_attention_ops and test_code_ops.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hashengine import ops
from tests.helpers.layouts import feature_map
from tests.ops.test_attention_ops import gate_maps, triplet_parameters

PARAMETERS = triplet_parameters(3, torch.float32)
MAPS = gate_maps(feature_map("contiguous"))


class Case(NamedTuple):
    """An op as a function of one tensor, and the first of its results that has a gradient (None: it has none)."""

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
    ops.triplet_attention_update(x.flatten()[:3], x.flatten()[3:6], *running, steps, [72, 60, 90], 0.1)
    return *running[0], *running[1], *steps


CASES = {
    "simam": Case(ops.simam),
    "simam_energy": Case(ops.simam_energy),
    "triplet_pool": Case(ops.triplet_pool),
    "triplet_gate": Case(lambda x: ops.triplet_gate(x, *MAPS)),
    "triplet_attention": Case(lambda x: ops.triplet_attention(x, *PARAMETERS, True)),
    "triplet_attention_eval": Case(lambda x: ops.triplet_attention(x, *PARAMETERS, False)),
    "triplet_attention_inference": Case(lambda x: ops.triplet_attention_inference(x, *PARAMETERS), differentiable=None),
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
        lambda codes: ops.hamming_count(codes[:3], codes, query_labels=codes[:3, 0].long(), labels=codes[:, 0].long()),
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


def test_every_op_stands_here():
    assert {name.removesuffix("_eval").removesuffix("_filtered") for name in CASES} == set(ops.__all__)


@every_op
def test_compiles_as_one_graph_forward_and_backward(name):
    case = CASES[name]
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        results_and_gradient(case, case.inputs(), compiled), results_and_gradient(case, case.inputs()), rtol=0, atol=0
    )


def test_inductor_compiles_the_layers_with_what_is_around_them():
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
def test_autocast_leaves_the_type_of_the_activations(name):
    """Half precision is native and adds up in float32, so there is nothing for autocast to change."""
    case = CASES[name]
    x = case.inputs().bfloat16()
    want = results_and_gradient(case, x)
    with torch.autocast("cpu", torch.bfloat16):
        got = results_and_gradient(case, x)
    assert got[0].dtype == got[-1].dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@with_gradient
def test_double_backward_is_refused_in_one_line(name):
    case = CASES[name]
    x = case.inputs().requires_grad_()
    (grad,) = torch.autograd.grad(outputs(case, x)[case.differentiable].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"_backward: .*double backward is not supported") as caught:
        grad.sum().backward()
    assert "\n" not in str(caught.value)


def test_inference_refuses_a_gradient_in_one_line():
    y = ops.triplet_attention_inference(feature_map("contiguous").requires_grad_(), *PARAMETERS)
    with pytest.raises(RuntimeError, match="triplet_attention_inference: expected no gradient") as caught:
        y.sum().backward()
    assert "\n" not in str(caught.value)


@every_op
def test_every_run_and_every_number_of_threads_gives_the_same_bits(name):
    case = CASES[name]
    want = results_and_gradient(case, case.inputs())
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.testing.assert_close(results_and_gradient(case, case.inputs()), want, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)


@with_gradient
def test_a_gradient_of_another_layout_is_taken(name):
    case = CASES[name]
    x = case.inputs().requires_grad_()
    y = outputs(case, x)[0]
    if name == "triplet_pool" or y.dim() != 4:
        pytest.skip("one layout of the result only")
    upstream = feature_map("contiguous", seed=3)
    layouts = (upstream, upstream.contiguous(memory_format=torch.channels_last), upstream.flip(2).flip(2))
    grads = [torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in layouts]
    one = torch.autograd.grad(y, x, torch.ones(()).expand_as(y), retain_graph=True)[0]
    torch.testing.assert_close(one, torch.autograd.grad(y, x, torch.ones_like(y))[0])
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0])


def test_a_gradient_that_is_not_used_is_not_asked_for():
    x = feature_map("contiguous").requires_grad_()
    for y in (ops.simam(x), ops.triplet_attention(x, *PARAMETERS, True)[0]):
        (grad,) = torch.autograd.grad((y * 0).sum() + x.sum(), x)
        torch.testing.assert_close(grad, torch.ones_like(x))


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_update_moves_the_buffers_as_batch_norm_does(momentum, dtype):
    norms = [torch.nn.BatchNorm2d(1, momentum=momentum).to(dtype) for _ in range(3)]
    copies = [torch.nn.BatchNorm2d(1, momentum=momentum).to(dtype) for _ in range(3)]
    for step in range(3):
        x = feature_map("contiguous", dtype, (3, 1, 4, 5), seed=step)
        for norm in copies:
            norm(x)
        mean, var = x.float().mean().expand(3).clone(), x.float().var(correction=0).expand(3).clone()
        lists = [list(column) for column in zip(*((n.running_mean, n.running_var) for n in norms), strict=True)]
        version = norms[0].running_mean._version
        ops.triplet_attention_update(mean, var, *lists, [n.num_batches_tracked for n in norms], [60] * 3, momentum)
        assert norms[0].running_mean._version > version  # autograd must see that a buffer has changed
    for norm, copy in zip(norms, copies, strict=True):
        torch.testing.assert_close(norm.state_dict(), copy.state_dict())


def test_update_errors_name_the_argument():
    values = torch.zeros(2)

    def call(mean=values, running=None, steps=2, counts=(5, 5), momentum=0.1):
        one = [torch.zeros(1) for _ in range(2)] if running is None else running
        ops.triplet_attention_update(
            mean, values, one, one, [torch.zeros((), dtype=torch.int64)] * steps, counts, momentum
        )

    for arguments, message in (
        ({"mean": torch.zeros(3)}, "var must have one entry a branch"),
        ({"running": [torch.zeros(1)]}, "running_mean must have one entry a branch"),
        ({"running": [torch.zeros(2), torch.zeros(1)]}, r"running_mean\[0\] must hold one value on cpu"),
        ({"steps": 1}, "num_batches_tracked must have one entry a branch"),
        ({"counts": (5, 1)}, "counts must be at least 2"),
        ({"momentum": -0.1}, "momentum must not be negative"),
    ):
        with pytest.raises(ValueError, match=f"triplet_attention_update: {message}") as caught:
            call(**arguments)
        assert "\n" not in str(caught.value)
