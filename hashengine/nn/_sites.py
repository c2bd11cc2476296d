"""The sites of a network: the residual blocks, or the convolutions of a plain network, that can take attention.

Residual blocks are those of torchvision and timm. A plain stack, as in VGG, is an `nn.Sequential` that contains only
convolutions, BatchNorms, activations, dropouts and at least one pooling with a window of fixed size. A network is plain
if all of its convolutions are in plain stacks, of which each takes the channels that the one before returns. Otherwise,
a stack may be the stem of the network, a shortcut, a transition between dense blocks or a classifier.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from hashengine._validation import as_integer
from hashengine.errors import InputError, invalid, shown
from hashengine.nn._insertion import block_class, is_attached

Where: TypeAlias = Callable[[str], bool] | str | int | Iterable[str | int]

_FEATURE_LAYERS = (_ConvNd, nn.LayerNorm, nn.MultiheadAttention)  # a plain network has them in its plain stacks only


@dataclass(frozen=True)
class Host:
    """A module into which attention can be inserted, and the number of channels there.

    `channels` is None if the convolution that determines it has been replaced by a module without `out_channels`. The
    attention runs on the output of the module; if `is_before`, on its input.
    """

    name: str
    module: nn.Module
    channels: int | None
    is_before: bool = False


@dataclass(frozen=True)
class Site:
    """A residual block, or one convolution of a plain stack with the elementwise layers that follow it.

    Attributes:
        name: qualified name of the block or of the convolution.
        stage: index of the stage, from 0. A stage consists of the blocks of one parent module, or of the part of a
            plain stack up to a pooling.
        is_default: whether the site is selected by default. Every block is, and so is the last convolution of each
            stage of a plain stack.
        convolution: the host for SimAM: the second convolution of a block, or the convolution of a plain stack.
        branch: the host for other attention: the block, or the attention that timm built into it. In a plain stack, it
            is the last of the BatchNorms, activations and dropouts directly after the convolution. If there are none,
            it is the convolution. If it is a BatchNorm, it is the layer after that instead, because a conversion, such
            as `convert_sync_batchnorm`, replaces a BatchNorm by a module without its hooks. None if there is no layer
            after that.
        is_plain: whether the site is in a plain stack, in which no shortcut carries the signal past the attention.
        has_norm: whether a BatchNorm follows the convolution, before the next convolution.
    """

    name: str
    stage: int
    is_default: bool
    convolution: Host
    branch: Host | None
    is_plain: bool
    has_norm: bool


def find_sites(model: nn.Module) -> list[Site]:
    """The residual blocks of `model`; if it has none and is plain, the convolutions of its plain stacks."""
    modules = list(model.named_modules())
    blocks = [(name, module) for name, module in modules if block_class(module) is not None]
    if blocks:
        parents = list(dict.fromkeys(name.rpartition(".")[0] for name, _ in blocks))
        return [_block_site(name, block, parents.index(name.rpartition(".")[0])) for name, block in blocks]
    sites: list[Site] = []
    for name, stack in _stacks_of_plain_network(model):
        sites += _stack_sites(name, stack, first_stage=sites[-1].stage + 1 if sites else 0)
    return sites


def select(sites: list[Site], where: Where | None) -> list[Site]:
    """The sites that `where` selects; by default those with `is_default`.

    A selector is a predicate on the name, a part of the name between dots, or the index of a stage. An index selects
    only the default sites of the stage.
    """
    if where is None:
        return [site for site in sites if site.is_default]
    if callable(where):
        chosen = [site for site in sites if where(site.name)]
        if not chosen:
            raise _no_match("a predicate that accepts none", sites)
        return chosen
    is_scalar = as_integer(where) is not None or getattr(where, "ndim", 1) == 0  # some arrays and tensors are scalars
    selectors: list[Any] = [where]
    if (
        isinstance(where, Iterable)
        and not isinstance(where, (str, bytes, bytearray, memoryview, Mapping))
        and not is_scalar
    ):
        selectors = list(where)
    if not selectors:
        raise _no_match("none", sites)
    stages = _stage_count(sites)
    names: set[str] = set()
    for selector in selectors:
        if isinstance(selector, str):
            matches = {site.name for site in sites if f".{selector}." in f".{site.name}."}
        elif (number := as_integer(selector)) is not None:
            matches = {site.name for site in sites if site.is_default and number in (site.stage, site.stage - stages)}
        else:
            expected = "a predicate, a name, the index of a stage, or several names and indices"
            raise invalid("attach", "where", expected, shown(selector))
        if not matches:
            raise _no_match(shown(selector), sites)
        names |= matches
    return [site for site in sites if site.name in names]


def _no_match(actual: str, sites: list[Site]) -> InputError:
    names = ", ".join(site.name for site in sites)
    return invalid("attach", "where", f"one of the {_stage_count(sites)} stages or of the sites {names}", actual)


def _stage_count(sites: list[Site]) -> int:
    """The number of stages. The last site need not be in the last stage."""
    return max(site.stage for site in sites) + 1


def _block_site(name: str, block: Any, stage: int) -> Site:
    last = block.conv3 if hasattr(block, "conv3") else block.conv2
    channels = getattr(last, "out_channels", None)
    convolution = Host(qualified_name(name, "conv2"), block.conv2, getattr(block.conv2, "out_channels", None))
    branch = Host(name, block, channels)
    if getattr(block, "se", None) is not None and not is_attached(block):  # the new attention follows timm's own
        branch = Host(qualified_name(name, "se"), block.se, channels)
    return Site(name, stage, True, convolution, branch, is_plain=False, has_norm=True)


def _stacks_of_plain_network(model: nn.Module) -> list[tuple[str, nn.Sequential]]:
    """The plain stacks of a plain network, with their names; empty for other networks."""
    stacks: list[tuple[str, nn.Sequential]] = []
    inside: set[nn.Module] = set()
    channels: int | None = None
    for name, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, nn.Sequential) and _is_plain_stack(module):
            convolutions = [layer for layer in module if isinstance(layer, nn.Conv2d)]
            if channels not in (None, convolutions[0].in_channels):
                return []
            channels = convolutions[-1].out_channels
            stacks.append((name, module))
            inside.update(module.modules())
        elif _is_fully_connected_of_vgg(module):
            inside.update(module.modules())
        elif isinstance(module, _FEATURE_LAYERS):
            return []
    return stacks


def _is_fully_connected_of_vgg(module: nn.Module) -> bool:
    """Whether `module` is the part of timm's VGG that computes fully connected layers as convolutions."""
    return (type(module).__module__, type(module).__name__) == ("timm.models.vgg", "ConvMlp")


def _is_plain_stack(stack: nn.Sequential) -> bool:
    is_known = all(isinstance(layer, nn.Conv2d) or _is_pooling(layer) or _is_elementwise(layer) for layer in stack)
    has_convolution = any(isinstance(layer, nn.Conv2d) for layer in stack)
    return is_known and has_convolution and any(_is_pooling(layer) and hasattr(layer, "kernel_size") for layer in stack)


def _is_pooling(layer: nn.Module) -> bool:
    return type(layer).__module__ == "torch.nn.modules.pooling"


def _is_elementwise(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) or type(layer).__module__ in (
        "torch.nn.modules.activation",
        "torch.nn.modules.dropout",
    )


def _stack_sites(name: str, stack: nn.Sequential, first_stage: int) -> list[Site]:
    layers: list[tuple[str, Any]] = list(stack._modules.items())
    convolutions = [(i, layer) for i, (_, layer) in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    starts = [i for i, _ in convolutions]
    sites: list[Site] = []
    stage = first_stage
    for (start, conv), next_start in zip(convolutions, [*starts[1:], len(layers)], strict=True):
        end = start
        while end + 1 < next_start and _is_elementwise(layers[end + 1][1]):
            end += 1
        ends_stage = next_start == len(layers) or any(_is_pooling(layer) for _, layer in layers[end + 1 : next_start])
        host = functools.partial(_host, name, layers, conv.out_channels)
        branch: Host | None = host(end)
        if isinstance(layers[end][1], _BatchNorm):
            branch = host(end + 1, is_before=True) if end + 1 < len(layers) else None
        has_norm = any(isinstance(layer, _BatchNorm) for _, layer in layers[start:next_start])
        convolution = host(start)
        sites.append(Site(convolution.name, stage, ends_stage, convolution, branch, is_plain=True, has_norm=has_norm))
        stage += ends_stage
    return sites


def _host(parent: str, layers: list[tuple[str, nn.Module]], channels: int, i: int, *, is_before: bool = False) -> Host:
    child, layer = layers[i]
    return Host(qualified_name(parent, child), layer, channels, is_before)


def qualified_name(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child
