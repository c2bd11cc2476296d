"""Where attention can go in an existing network: its residual blocks, or the convolutions of a plain stack like VGG's.

Blocks are those of torchvision and timm. A plain stack is an ``nn.Sequential`` of convolutions, norms, activations,
dropouts and poolings.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hashengine.nn._hosts import block_class, is_attached

Where = Callable[[str], bool] | str | int | Iterable[str | int]


@dataclass(frozen=True)
class Host:
    """A module at whose end attention can run, and the number of channels that it computes."""

    name: str
    module: nn.Module
    channels: int


@dataclass(frozen=True)
class Site:
    """A residual block, or one convolution of a plain stack with the norm and the activations that follow it.

    Attributes:
        name: qualified name of the block or of the convolution.
        stage: counted from 0; a stage is the blocks of one parent, or a plain stack from pooling to pooling.
        usual: whether the site is taken when none is named: every block, and the last convolution of a plain stage.
        convolution: where SimAM goes: the convolution, before its norm or activation.
        branch: where other attention goes: the end of the residual branch, or the last activation.
        plain: no shortcut carries the signal past the attention.
        normed: a norm follows the convolution.
    """

    name: str
    stage: int
    usual: bool
    convolution: Host
    branch: Host
    plain: bool
    normed: bool


def find_sites(model: nn.Module) -> list[Site]:
    """The residual blocks of `model`; where it has none, the convolutions of its plain stacks."""
    modules = list(model.named_modules())
    blocks = [(name, module) for name, module in modules if block_class(module) is not None]
    if blocks:
        parents = list(dict.fromkeys(name.rpartition(".")[0] for name, _ in blocks))
        return [_block_site(name, block, parents.index(name.rpartition(".")[0])) for name, block in blocks]
    sites: list[Site] = []
    for name, module in modules:
        if _is_plain_stack(module):
            sites += _stack_sites(name, module, first_stage=sites[-1].stage + 1 if sites else 0)
    return sites


def select(sites: list[Site], where: Where | None) -> list[Site]:
    """The sites that `where` names: by a predicate on the name, a part of the name between dots, or a stage's index."""
    if where is None:
        return [site for site in sites if site.usual]
    if callable(where):
        chosen = [site for site in sites if where(site.name)]
        return chosen or _refuse("the predicate accepts none", sites)
    if not isinstance(where, Iterable):
        where = [where]
    selectors = [where] if isinstance(where, str) else list(where)
    stages = sites[-1].stage + 1
    names: set[str] = set()
    for selector in selectors:
        if isinstance(selector, str):
            matches = {site.name for site in sites if f".{selector}." in f".{site.name}."}
        elif isinstance(selector, int):
            matches = {site.name for site in sites if site.usual and selector in (site.stage, site.stage - stages)}
        else:
            raise TypeError(
                "attach: where must be a predicate, a name, the index of a stage, or several names and indices, "
                f"got {selector!r}"
            )
        names |= matches or _refuse(f"{selector!r} is none", sites)
    return [site for site in sites if site.name in names] or _refuse("it names none", sites)


def _refuse(complaint: str, sites: list[Site]):
    names = ", ".join(site.name for site in sites)
    raise ValueError(f"attach: where: {complaint} of the {sites[-1].stage + 1} stages and their sites {names}")


def _block_site(name: str, block: nn.Module, stage: int) -> Site:
    last = block.conv3 if hasattr(block, "conv3") else block.conv2
    convolution = Host(join(name, "conv2"), block.conv2, block.conv2.out_channels)
    branch = Host(name, block, last.out_channels)
    if getattr(block, "se", None) is not None and not is_attached(block):  # timm's own attention runs first
        branch = Host(join(name, "se"), block.se, last.out_channels)
    return Site(name, stage, True, convolution, branch, plain=False, normed=True)


def _is_plain_stack(module: nn.Module) -> bool:
    if not isinstance(module, nn.Sequential):
        return False
    known = all(isinstance(layer, nn.Conv2d) or _is_pooling(layer) or _is_elementwise(layer) for layer in module)
    return known and any(_is_pooling(layer) for layer in module)


def _is_pooling(layer: nn.Module) -> bool:
    return type(layer).__module__ == "torch.nn.modules.pooling"


def _is_elementwise(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) or type(layer).__module__ in (
        "torch.nn.modules.activation",
        "torch.nn.modules.dropout",
    )


def _stack_sites(name: str, stack: nn.Sequential, first_stage: int) -> list[Site]:
    layers = list(stack.named_children())
    starts = [i for i, (_, layer) in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    sites: list[Site] = []
    stage = first_stage
    for start, next_start in zip(starts, [*starts[1:], len(layers)], strict=True):
        end = start
        while end + 1 < next_start and _is_elementwise(layers[end + 1][1]):
            end += 1
        ends_stage = next_start == len(layers) or any(_is_pooling(layer) for _, layer in layers[end + 1 : next_start])
        convolution, branch = (
            Host(join(name, layers[i][0]), layers[i][1], layers[start][1].out_channels) for i in (start, end)
        )
        normed = any(isinstance(layer, _BatchNorm) for _, layer in layers[start:next_start])
        sites.append(Site(convolution.name, stage, ends_stage, convolution, branch, plain=True, normed=normed))
        stage += ends_stage
    return sites


def join(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child
