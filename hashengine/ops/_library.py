"""How an op comes to be: schema, plain-torch reference, fake and autograd formula, in one call."""

from collections.abc import Callable

import torch

NAMESPACE = "hashengine"


def define_op(
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Define ``hashengine::<op>`` and return the callable op.

    Args:
        schema: the schema with the op's name, ``"simam(Tensor x, float lam) -> Tensor"``.
        reference: the op in plain torch, the kernel on every device that has no native one.
        fake: the same signature on fake tensors; gives shapes, dtypes and strides only.
        setup_context, backward: the autograd formula, as for ``torch.library.register_autograd``. An op without one
            refuses to be differentiated; one whose schema mutates an argument ("Tensor(a!)") cannot have one.
    """
    name, signature = schema.split("(", 1)
    qualified_name = f"{NAMESPACE}::{name}"
    torch.library.define(qualified_name, f"({signature}", tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified_name, "default")(reference)
    torch.library.register_fake(qualified_name, fake)
    if "!" not in signature:
        torch.library.register_autograd(
            qualified_name, backward or _refuse_gradient(name), setup_context=setup_context or _save_nothing
        )
    return getattr(getattr(torch.ops, NAMESPACE), name)


def _save_nothing(ctx, inputs, output) -> None:
    pass


def _refuse_gradient(name: str) -> Callable:
    def backward(ctx, *gradients):
        raise RuntimeError(
            f"{name}: expected no gradient to be asked of this op, got a backward through it; "
            "it has no derivative here (double backward is not supported): detach its inputs"
        )

    return backward
