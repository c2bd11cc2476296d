"""Definition of an op in one call: schema, plain-torch reference, fake and autograd formula."""

from collections.abc import Callable
from typing import Any

import torch
from torch._decomp import register_decomposition

from hashengine.errors import invalid
from hashengine.ops._flops import register_flops

NAMESPACE = "hashengine"


def define_op(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    decomposition: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
    no_gradient: str | None = "it has no derivative (double backward is not supported)",
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
        no_gradient: the end of the message of that `InputError`. None if no argument can require a gradient, because
            all tensors are integer. Such an op needs no formula, and a formula in Python would slow each call down.
    """
    name, signature = schema.split("(", 1)
    qualified_name = f"{NAMESPACE}::{name}"
    torch.library.define(qualified_name, f"({signature}", tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified_name, "default")(reference)
    torch.library.register_fake(qualified_name, fake)
    if backward is None and no_gradient is not None:
        backward = _refuse_gradient(name, no_gradient)
    if "!" not in signature and backward is not None:
        torch.library.register_autograd(qualified_name, backward, setup_context=setup_context or _save_nothing)
    op = getattr(getattr(torch.ops, NAMESPACE), name)
    if decomposition is not None:
        # With the fake in the table of meta functions, torch does not run the decomposition instead of the fake.
        register_decomposition(op, type="meta")(fake)
        register_decomposition(op)(decomposition)
    if flops is not None:
        register_flops(op, flops)
    return op.default


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _refuse_gradient(name: str, advice: str) -> Callable[..., Any]:
    def backward(ctx: Any, *gradients: Any) -> None:
        raise invalid(name, "inputs", "detached from the graph", "a backward through this op", advice)

    return backward
