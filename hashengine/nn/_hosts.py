"""How attention comes to run at the end of a module that knows nothing of it, and how it leaves again.

The attention becomes a child of its host, so every key that the state dict had stays, and mode, device, dtype and DDP
reach it as they reach any child. Three kinds of host run it in three ways:

- a convolution, an activation: by a forward hook, a function of this module, so that the network still pickles;
- a block of timm: in its own slot for attention, ``se``; where that is taken, by a hook of what is in it;
- a block of torchvision, which has no slot: its class becomes a subclass that has one. A hook of the block's last
  BatchNorm would do, until ``convert_sync_batchnorm`` replaces that BatchNorm and drops the hook without a word; a
  wrapper around it would rename its parameters.

A mark on the host, a plain attribute, tells what came in here from what was there; copies and pickles keep it.
"""

from torch import Tensor, nn

TORCHVISION, TIMM = "torchvision.models.resnet", "timm.models.resnet"

_MARK = "_attention_child"  # on a host: the name of the child that runs there


def block_class(module: nn.Module) -> type[nn.Module] | None:
    """Which BasicBlock or Bottleneck, of torchvision or timm, `module` is or derives from.

    The classes are named and not imported: a network that holds one has imported its library.
    """
    for base in type(module).__mro__:
        if base.__module__ in (TORCHVISION, TIMM) and base.__name__ in ("BasicBlock", "Bottleneck"):
            return base
    return None


def is_attached(host: nn.Module) -> bool:
    return _MARK in vars(host)


def obstacle(host: nn.Module) -> str | None:
    """Why `host` cannot take attention, or None."""
    if is_attached(host):
        return "already has attention: detach it first"
    block = block_class(host)
    if block is not None and block.__module__ == TORCHVISION and type(host) is not block:
        return f"is a {type(host).__name__}, whose forward may differ from the {block.__name__} that it derives from"
    if hasattr(host, "attention"):
        return "has an attribute 'attention' of its own"
    return None


def refuse_wrapped(function: str, model: nn.Module) -> None:
    """Compiled code and DDP have taken stock of the model already: what changes inside would pass them by."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(f"{function}: model must not be wrapped in DistributedDataParallel yet: {function} first")
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules()):
        raise ValueError(f"{function}: model must not be compiled yet: {function} first")


def insert(host: nn.Module, attention: nn.Module) -> str:
    """Run `attention` on what `host` computes. Returns the name of the new child."""
    child = "attention"
    block = block_class(host)
    if block is None:
        host.add_module(child, attention)
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
        for key in [key for key, hook in host._forward_hooks.items() if hook is _run_attention]:
            del host._forward_hooks[key]
    elif block.__module__ == TIMM:
        host.se = None
    else:
        host.__class__ = block
    return child


def _run_attention(host: nn.Module, _, output: Tensor) -> Tensor:
    return host.attention(output)
