"""Attention in networks that exist: `attach`, and `detach` which undoes it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hashengine.nn._hosts import block_class, insert, is_attached, obstacle, refuse_wrapped, remove
from hashengine.nn._sites import Host, Site, Where, find_sites, join, select
from hashengine.nn.plain import PlainSimAM, PlainTripletAttention
from hashengine.nn.simam import SimAM
from hashengine.nn.triplet_attention import TripletAttention

Layer = str | Callable[[int], nn.Module]


class Insertion(NamedTuple):
    """One attached layer: its qualified name, the layer as text, and where it runs."""

    name: str
    layer: str
    place: str


@dataclass(frozen=True)
class AttachReport:
    """What `attach` inserted; ``print`` it.

    Attributes:
        insertions: one a layer.
        recalibrate: whether a pretrained network's BatchNorms now see other activations than they were trained on.
    """

    insertions: tuple[Insertion, ...]
    recalibrate: bool

    def __str__(self) -> str:
        width = max(len(insertion.name) for insertion in self.insertions)
        lines = [f"attached {len(self.insertions)} layers:"]
        lines += [f"  {name:<{width}}  {layer}, {place}" for name, layer, place in self.insertions]
        if self.recalibrate:
            lines.append(
                "Running statistics of pretrained BatchNorms no longer fit: hashengine.nn.recalibrate(model, batches)"
                " estimates them anew."
            )
        return "\n".join(lines)


def attach(model: nn.Module, layer: Layer, where: Where | None = None) -> AttachReport:
    """Put attention into the residual networks of torchvision and timm, and into plain stacks like VGG's.

    In residual blocks each layer goes where its authors put it: SimAM after the second convolution, before its norm;
    triplet attention at the end of the residual branch, before the addition. In a plain stack, for which they say
    nothing, SimAM goes after the last convolution of a stage and triplet attention before its pooling; there "triplet",
    and "simam" where no norm follows, mean :class:`PlainTripletAttention` and :class:`PlainSimAM`, which start as the
    network was.

    Every key of the state dict stays; the parameters of the new layers, if any, come on top. The layers take device,
    dtype and mode of their place. Attach before ``torch.compile`` and before DDP or FSDP wrap the model.

    Args:
        model: changed in place.
        layer: "simam", "triplet", or a factory that is called with the number of channels, such as
            ``functools.partial(SimAM, lam=0.1)``. A layer that is no SimAM goes where triplet attention goes.
        where: which blocks, or which convolutions of a plain stack: a predicate on the qualified name; a name or its
            part between dots, like "layer3"; a stage's index, from 0 or from the end; or several of these. By default
            every block, and the last convolution of every plain stage.

    Returns:
        The report of what went where.

    Raises:
        TypeError: an argument is of another type, or the factory returns no module.
        ValueError: nothing fits, `where` names nothing, or attention is already there. The model is then as it was.
    """
    refuse_wrapped("attach", model)
    if isinstance(layer, str) and layer not in _LAYERS:
        raise ValueError(f"attach: layer must be {' or '.join(map(repr, _LAYERS))} or a factory, got {layer!r}")
    if not isinstance(layer, str) and (not callable(layer) or isinstance(layer, nn.Module)):
        raise TypeError(
            f"attach: layer must be a name or a factory called with the channels, got {type(layer).__name__}"
        )
    sites = find_sites(model)
    if not sites:
        raise ValueError(
            "attach: model must have residual blocks of torchvision or timm, or a plain stack like VGG's, "
            f"got {type(model).__name__} with none: put SimAM or TripletAttention into its code"
        )
    placed = [_place(site, layer) for site in select(sites, where)]
    for host, _ in placed:
        if reason := obstacle(host.module):
            raise ValueError(f"attach: {host.name} {reason}")
    normed = any(isinstance(module, _BatchNorm) for module in model.modules())
    changed = any(not isinstance(attention, PlainTripletAttention) for _, attention in placed)
    insertions = []
    for host, attention in placed:
        place = f"{'after' if block_class(host.module) is None else 'at the end of the branch of'} {host.name or 'it'}"
        child = insert(host.module, attention)
        text = f"{type(attention).__name__}({attention.extra_repr()})"
        insertions.append(Insertion(join(host.name, child), text, place))
    return AttachReport(tuple(insertions), recalibrate=normed and changed)


def detach(model: nn.Module) -> tuple[str, ...]:
    """Take out what `attach` put into `model`, also if that was before a copy, a pickle or a SyncBN conversion.

    Modules, keys and outputs are then what they were before; running statistics are left as they are.

    Returns:
        The qualified names that the layers had.

    Raises:
        ValueError: nothing was attached.
    """
    refuse_wrapped("detach", model)
    hosts = [(name, module) for name, module in model.named_modules() if is_attached(module)]
    if not hosts:
        raise ValueError(f"detach: model must have attached attention, got {type(model).__name__} with none")
    return tuple(join(name, remove(host)) for name, host in hosts)


def _simam(site: Site) -> nn.Module:
    return SimAM() if site.normed else PlainSimAM()


def _triplet(site: Site) -> nn.Module:
    return PlainTripletAttention() if site.plain else TripletAttention()


_LAYERS: dict[str, Callable[[Site], nn.Module]] = {"simam": _simam, "triplet": _triplet}


def _place(site: Site, layer: Layer) -> tuple[Host, nn.Module]:
    """The layer for `site`, on its device, in its dtype and mode, and the host that it goes to."""
    if isinstance(layer, str):
        attention = _LAYERS[layer](site)
    else:
        attention = layer(site.branch.channels)
        if isinstance(attention, SimAM) and site.convolution.channels != site.branch.channels:
            attention = layer(site.convolution.channels)
    if not isinstance(attention, nn.Module):
        raise TypeError(f"attach: layer must return an nn.Module, got {type(attention).__name__} for {site.name}")
    host = site.convolution if isinstance(attention, SimAM) else site.branch
    like = next(site.convolution.module.parameters())
    return host, attention.to(like.device, like.dtype).train(host.module.training)
