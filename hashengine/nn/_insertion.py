"""Insertion of attention into an existing module, the host, and removal of attention from its host.

If the host is a residual block, the attention runs at the end of the residual branch, before the addition. Any other
host runs the attention on its output, or on its input if the layer before it is a BatchNorm.

The attention becomes a child of the host. The existing keys of the state dict do not change. Mode, device, dtype and
DDP apply to the attention as to any other child. How the attention runs depends on the kind of host:

- A host that is not a residual block, such as a convolution or an activation, runs the attention in a forward hook or
  in a forward pre-hook. The hook is a function at the top level of this Python module, because only such a function can
  be pickled. A BatchNorm is never the host: `convert_sync_batchnorm` replaces it by a module without its hooks.
- A block of timm has a slot for attention, `se`, and runs the attention there. If the slot is taken, the module in the
  slot is the host and runs the attention in a hook.
- A block of torchvision has no slot: its class is replaced by a subclass that runs the attention. Alternatives fail:
  a hook on the block's last BatchNorm is lost when `convert_sync_batchnorm` replaces the BatchNorm, and a wrapper
  around the BatchNorm renames its parameters.

A plain attribute of the host holds the name of the inserted child; copies and pickles of the host keep the attribute.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hashengine.errors import invalid

TORCHVISION, TIMM = "torchvision.models.resnet", "timm.models.resnet"

# torch's classes for data parallelism: wrappers, and base classes that `fully_shard` and `replicate` add to a module
_WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DDP"}

_MARK = "_attention_child"  # the attribute of a host that holds the name of the inserted child


def block_class(module: nn.Module) -> type[nn.Module] | None:
    """The class BasicBlock or Bottleneck of torchvision or timm if `module` is an instance of it, otherwise None.

    Classes are compared by name, so that neither library has to be imported.
    """
    for base in type(module).__mro__:
        if base.__module__ in (TORCHVISION, TIMM) and base.__name__ in ("BasicBlock", "Bottleneck"):
            return base
    return None


def is_attached(host: nn.Module) -> bool:
    return _MARK in vars(host)


def check_host(where: str, name: str, host: nn.Module) -> None:
    """Check that `host` can take attention."""
    if is_attached(host):
        raise invalid(where, name, "without attention", "a module that already has attention", "detach it first")
    block: Any = block_class(host)
    if block is not None:
        may_be_subclass = block.__module__ == TIMM  # `insert` replaces the class of a torchvision block
        has_known_forward = type(host) is block or (may_be_subclass and type(host).forward is block.forward)
        if not has_known_forward or "forward" in vars(host):
            raise invalid(where, name, f"a {block.__name__}", f"a {type(host).__name__}, whose forward may differ")
    if hasattr(host, "attention"):
        raise invalid(where, name, "without an attribute 'attention'", "a module that has one")


def check_model(where: str, model: Any, *, may_be_compiled: bool = False) -> None:
    """Check that `model` is a module, and that neither it nor a module inside it is wrapped, scripted or compiled.

    Data parallelism, scripts and compiled code would not see a change inside the model.
    """
    if not isinstance(model, nn.Module):
        raise invalid(where, "model", "an nn.Module", type(model).__name__)
    for name, module in model.named_modules():
        place = f" at {name!r}" if name else ""
        if wrapper := _wrapper(module):
            advice = f"call {where} before {wrapper} wraps a part of the model"
            raise invalid(where, "model", "unwrapped", f"a {wrapper}{place}", advice)
        if isinstance(module, torch.jit.ScriptModule):
            advice = f"call {where} before torch.jit.script or torch.jit.trace"
            raise invalid(where, "model", "without TorchScript", f"a ScriptModule{place}", advice)
        is_compiled = hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
        if is_compiled and not may_be_compiled:
            compiled = f"a compiled module{place}" if name else "a compiled model"
            raise invalid(where, "model", "uncompiled", compiled, f"call {where} before torch.compile")


def _wrapper(module: nn.Module) -> str | None:
    """The name of the class of torch that makes `module` data-parallel, or None.

    Classes are compared by name, so that torch.distributed.fsdp, which takes long to import, need not be imported.
    """
    for base in type(module).__mro__:
        if base.__name__ in _WRAPPERS and base.__module__.startswith("torch."):
            return base.__name__
    return None


def insert(host: nn.Module, attention: nn.Module, *, is_before: bool = False) -> str:
    """Make `host` run `attention`. A residual block runs it before the addition.

    Any other host runs it on its output or, if `is_before`, on its input.

    Returns:
        The name of the new child.
    """
    child = "attention"
    block = block_class(host)
    if block is None:
        host.add_module(child, attention)
        if is_before:
            host.register_forward_pre_hook(_run_attention_before, with_kwargs=True)
        else:
            host.register_forward_hook(_run_attention)
    elif block.__module__ == TIMM:
        child = "se"
        host.se = attention
    else:
        from hashengine.nn._torchvision import WITH_ATTENTION

        host.__class__ = WITH_ATTENTION[block]
        host.add_module(child, attention)
    setattr(host, _MARK, child)
    return child


def remove(host: nn.Module) -> str:
    """Undo `insert`. Returns the name of the former child."""
    child = vars(host).pop(_MARK)
    delattr(host, child)
    block = block_class(host)
    if block is None:
        for hooks in (host._forward_hooks, host._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_run_attention, _run_attention_before)]:
                del hooks[key]
                host._forward_pre_hooks_with_kwargs.pop(key, None)
    elif block.__module__ == TIMM:
        host.se = None  # type: ignore[assignment]  # in timm, an empty slot is a plain attribute
    else:
        host.__class__ = block
    return child


def _run_attention(host: Any, _: tuple[Any, ...], output: Tensor) -> Tensor:
    return _attention_of(host)(output)


def _run_attention_before(host: Any, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    attention = _attention_of(host)
    if inputs:
        return (attention(inputs[0]), *inputs[1:]), named
    (name, x), *others = named.items()
    return (), {name: attention(x), **dict(others)}


def _attention_of(host: Any) -> Any:
    attention = host._modules.get("attention")
    if attention is None:  # torch.ao.quantization, for example, replaces a host and copies its hooks, but no children
        actual = f"a {type(host).__name__} that was put in its place"
        raise invalid("attach", "the host of an attention", "the module itself", actual, "attach after that conversion")
    return attention
