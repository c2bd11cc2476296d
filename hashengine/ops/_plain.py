"""When the formula of an op runs in plain torch instead of the op itself.

Function transforms (`torch.func`, forward-mode differentiation) and tracing act on every operation of a computation.
They cannot look into an op with a kernel of its own: a transform fails or drops a derivative there, and a traced graph
contains an op that other programs do not know. Therefore the functions of `hashengine.ops` compute in plain torch while
a transform or a trace is active. The results are the same up to rounding errors.

`torch.compile` and `torch.export` keep the ops, except under forward-mode differentiation. For an export to ONNX,
`define_op` registers the formula as the op's decomposition.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# These functions are looked up once, because `needs_plain_torch` runs before each op, and an op on a small map takes a
# few microseconds.
_is_compiling = torch.compiler.is_compiling
_innermost_transform = torch._C._functorch.peek_interpreter_stack
_is_tracing = torch._C._is_tracing  # torch.jit.is_tracing without its check for scripts


def _has_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is active."""
    return forward_ad._current_level >= 0


# `torch.compile` calls this function while it compiles, and takes the result for a constant. The op refuses a tangent
# that later comes from outside the compiled function.
# `torch.compiler.assume_constant_result` sets the same mark, but imports the compiler.
_has_forward_mode._dynamo_marked_constant = True  # type: ignore[attr-defined]


def needs_plain_torch() -> bool:
    """Whether a transform of `torch.func`, a level of forward-mode differentiation or a trace is active.

    While `torch.compile` compiles, only forward-mode differentiation counts: the compiler itself handles the others.
    """
    if _is_compiling():
        return _has_forward_mode()
    return _innermost_transform() is not None or forward_ad._current_level >= 0 or _is_tracing()


def is_functionalized() -> bool:
    """Whether `torch.func.functionalize` is one of the active transforms."""
    kind = torch._C._functorch.TransformType.Functionalize
    return any(transform.key() == kind for transform in torch._C._functorch.get_interpreter_stack() or ())


def can_be_array(tensor: Tensor) -> bool:
    """Whether `tensor.numpy()` gives its values and is seen by nobody: no transform, trace, mode or compiler.

    Any of these records or replaces the operations on tensors, and would take an answer that was computed from an array
    for a constant.
    """
    if _is_compiling() or needs_plain_torch() or torch._C._len_torch_dispatch_stack():
        return False
    return tensor.is_cpu and tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_neg())


def untraced(check: Callable[..., None]) -> Callable[..., None]:
    """`check`, which only compares sizes and raises errors, without the warnings of a trace about comparisons."""

    @functools.wraps(check)
    def run(*arguments: Any, **options: Any) -> None:
        if not torch._C._is_tracing():
            return check(*arguments, **options)
        torch_c: Any = torch._C  # its stubs lack the setter
        state = torch_c._get_tracing_state()
        torch_c._set_tracing_state(None)
        try:
            return check(*arguments, **options)
        finally:
            torch_c._set_tracing_state(state)

    return run


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which operations on the device of `x` keep their dtype."""
    device = x.device.type
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def in_dtype_and_layout_of(x: Tensor, value: Tensor) -> Tensor:
    """`value`, which has the shape of `x`, in the dtype and layout of `x`; without an operation in place.

    Under a transform, the layout is left as it is: a tensor with the layout of `x` could not take a batch of values.
    """
    value = value.to(x.dtype)
    if needs_plain_torch():
        return value
    result = torch.empty_like(x)
    return value if value.stride() == result.stride() else torch.ops.aten.copy(result, value)
