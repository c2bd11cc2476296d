"""Definition of an op in one call: schema, plain-torch reference, fake and autograd formula."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._decomp import register_decomposition
from torch._library.utils import get_layout_constraint_tag
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from hashengine.errors import invalid
from hashengine.ops._flops import register_flops

NAMESPACE = "hashengine"
_may_drop_tangents: list[Any] = []  # the overloads of the ops that have floating-point arguments and results
_kernels = torch.library.Library(NAMESPACE, "IMPL")  # torch removes its kernels with the object


def define_op(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    decomposition: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
    is_integer: bool = False,
) -> Callable[..., Any]:
    """Define `hashengine::<op>` and return its overload `default`, whose call costs less than that of the op.

    Args:
        schema: the schema with the op's name, such as `simam(Tensor x, float lam) -> Tensor`.
        reference: the op in plain torch. It runs on every device for which the op has no native kernel.
        fake: a function with the parameters of `reference`. It returns tensors that have the shape, dtype and strides
            of the results, but no values.
        setup_context: saves what `backward` needs, as for `torch.library.register_autograd`.
        backward: the autograd formula, as for `torch.library.register_autograd`. If it is None, a backward through the
            op raises `InputError`. It is ignored if the schema mutates an argument ("Tensor(a!)"), because torch allows
            no autograd formula for such an op.
        decomposition: the op in plain torch for programs that replace unknown ops by known ones, such as the exporter
            to ONNX. Unlike a reference, it must not read values. If it is None, these programs do not know the op.
        flops: the number of floating-point operations, for torch's `FlopCounterMode`: a function of the op's arguments
            and of `out_val`, its result. If it is None, the counter counts 0.
        is_integer: whether all tensors are integer, so that none can require a gradient. Such an op needs no formula,
            and a formula in Python would slow each call down.
    """
    name, signature = schema.split("(", 1)
    qualified_name = f"{NAMESPACE}::{name}"
    torch.library.define(qualified_name, f"({signature}", tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified_name, "default")(reference)
    op = getattr(getattr(torch.ops, NAMESPACE), name)
    if decomposition is not None:
        fake = _tell_inductor_first(op.default, fake)
    torch.library.register_fake(qualified_name, fake)
    if backward is None and not is_integer:
        backward = _refuse_gradient(name)
    if "!" not in signature and backward is not None:
        torch.library.register_autograd(qualified_name, backward, setup_context=setup_context or _save_nothing)
    if "[]" in signature or "Tensor, " in signature.partition("->")[2]:
        torch.library.register_vmap(qualified_name, _loop_over_batch(op))
    if decomposition is not None:
        # With the fake in the table of meta functions, torch does not run the decomposition instead of the fake.
        register_decomposition(op, type="meta")(fake)
        register_decomposition(op)(decomposition)
    if flops is not None:
        register_flops(op, flops)
    if "!" not in signature and not is_integer:
        _may_drop_tangents.append(op.default)
    return op.default


def refuse_tangents() -> None:
    """Let all ops refuse tangents of forward-mode differentiation, which they would drop.

    The native module does the same in C++. This is for a program without that module.
    """
    for op in _may_drop_tangents:
        _kernels.impl(op, _refuse_tangents_of(op), "ADInplaceOrView", with_keyset=True)


def _refuse_tangents_of(op: Any) -> Callable[..., Any]:
    """The kernel of `op` that runs between its autograd formula and its reference."""
    keys_below = torch._C._after_ADInplaceOrView_keyset

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        results = op.redispatch(keyset & keys_below, *args, **kwargs)
        if (
            forward_ad._current_level >= 0
            and any(tensor.is_floating_point() for tensor in _tensors_in(results))
            and _have_tangents(_tensors_in((args, kwargs)))
        ):
            raise invalid(
                op.name().removeprefix(f"{NAMESPACE}::"),
                "inputs",
                "without tangents of forward-mode differentiation",
                "some",
                "call the function in hashengine.ops inside the transform, where it computes in plain torch; if it was "
                "compiled outside the transform, call torch.compiler.reset() first",
            )
        return results

    return kernel


@_disable_dynamo  # the compiler, which would take the answer for a constant
def _have_tangents(tensors: list[Tensor]) -> bool:
    """Whether any of the tensors has a tangent, asked from below autograd, where torch hides the tangents."""
    torch_c: Any = torch._C  # its stubs lack these functions
    included, excluded = torch_c._dispatch_tls_local_include_set(), torch_c._dispatch_tls_local_exclude_set()
    with torch_c._ForceDispatchKeyGuard(included, excluded.remove(torch_c.DispatchKey.AutogradFunctionality)):
        return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _tell_inductor_first(op: Any, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Return `fake` that also registers `op` in Inductor, torch's default compiler, if that has been imported.

    Inductor registers unknown ops by itself, and calls their kernels. But if the environment variable CI is set, as it
    is on most build servers, it refuses an op that has a decomposition. Each compilation runs the fake before it
    generates code, and importing Inductor earlier would slow the start of every program down.
    """

    @functools.wraps(fake)
    def registering_fake(*args: Any, **kwargs: Any) -> Any:
        inductor = sys.modules.get("torch._inductor.lowering")
        if inductor is not None and op not in getattr(inductor, "lowerings", (op,)):
            constraint = inductor.tag_to_layout_constraint(get_layout_constraint_tag(op, with_default=True))
            inductor.make_fallback(op, layout_constraint=constraint, warn=False)
        return fake(*args, **kwargs)

    return registering_fake


def _loop_over_batch(op: Any) -> Callable[..., Any]:
    """A batching rule for `torch.vmap` that calls the op once per element of the batch.

    torch has such a rule of its own for ops without lists of tensors.
    """

    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
        if info.batch_size == 0:
            raise invalid("vmap", "the batch", "of at least one element", 0)

        def select(argument: Any, dim: Any, i: int) -> Any:
            if isinstance(argument, (list, tuple)) and isinstance(dim, (list, tuple)):
                return [select(part, part_dim, i) for part, part_dim in zip(argument, dim, strict=True)]
            return argument if dim is None else argument.select(dim, i)

        pairs = list(zip(arguments, in_dims, strict=True))
        results = [op(*(select(argument, dim, i) for argument, dim in pairs)) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return rule


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _refuse_gradient(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *gradients: Any) -> None:
        advice = "it has no derivative (double backward is not supported)"
        raise invalid(name, "inputs", "detached from the graph", "a backward through this op", advice)

    return backward
