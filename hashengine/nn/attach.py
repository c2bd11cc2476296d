"""`attach` inserts attention into an existing network; `detach` removes it."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hashengine.errors import invalid, shown
from hashengine.nn._insertion import block_class, check_host, check_model, insert, is_attached, remove
from hashengine.nn._sites import Host, Site, Where, find_sites, qualified_name, select
from hashengine.nn.plain import PlainSimAM, PlainTripletAttention
from hashengine.nn.simam import SimAM
from hashengine.nn.triplet_attention import TripletAttention

Layer: TypeAlias = str | Callable[[int], nn.Module]


class Insertion(NamedTuple):
    """One attached layer: its qualified name, the layer as text, and where it runs."""

    name: str
    layer: str
    place: str


@dataclass(frozen=True)
class AttachReport:
    """What `attach` inserted; meant to be printed.

    Attributes:
        insertions: one per attached layer.
        recalibrate: true if the network has BatchNorms, and if the initial output of some attention differs from its
            input. If such a network was pretrained, call `hashengine.nn.recalibrate`.
    """

    insertions: tuple[Insertion, ...]
    recalibrate: bool

    def __str__(self) -> str:
        width = max(len(insertion.name) for insertion in self.insertions)
        lines = [f"attached {len(self.insertions)} layers:"]
        lines += [f"  {name:<{width}}  {layer}, {place}" for name, layer, place in self.insertions]
        if self.recalibrate:
            lines.append(
                "The running statistics of pretrained BatchNorms are out of date:"
                " hashengine.nn.recalibrate(model, batches) estimates them again."
            )
        return "\n".join(lines)


def attach(model: nn.Module, layer: Layer, where: Where | None = None) -> AttachReport:
    """Insert attention into a residual network of torchvision or timm, or into a plain network like VGG.

    A residual network has blocks of the class `BasicBlock` or `Bottleneck` of `torchvision.models.resnet` or
    `timm.models.resnet`. A plain network has all of its convolutions in plain stacks, and neither LayerNorm nor
    `nn.MultiheadAttention` outside of them. A plain stack is an `nn.Sequential` that consists of convolutions,
    BatchNorms, activations, dropouts and poolings, of which at least one is not adaptive. It takes the channels that
    the stack before it returns. The fully connected layers of timm's VGG, which are convolutions, may be outside. For
    other networks, put the layers into their code, or pass a part that is plain, such as `model.features`.

    In a residual block each layer goes where its authors put it: SimAM after the second convolution, before its norm;
    triplet attention at the end of the residual branch, before the addition. The papers do not cover plain stacks.
    In a plain stack, SimAM goes after the last convolution of a stage, and triplet attention after the norm and the
    activation that follow this convolution: into the hooks of the activation or, if the norm comes last, into those of
    the layer after the norm. There, "triplet" inserts `PlainTripletAttention`, whose initial output is
    its input, and "simam" inserts `PlainSimAM` if no norm follows the convolution.

    The existing keys of the state dict stay the same; the parameters of the new layers are added. Each layer gets the
    device and dtype of the convolution at its site, and the mode of the module into which it is inserted. Call `attach`
    before `torch.compile`, and before DDP or FSDP wrap `model`.

    Do not fold a convolution with SimAM and the BatchNorm after it into one convolution. SimAM runs between the two, in
    a hook of the convolution that `torch.fx.experimental.optimization.fuse` and `torch.ao.quantization.fuse_modules` do
    not see: after folding, SimAM would run after the norm, without an error. If SimAM may run after the norm, fold with
    `fuse_modules`, and call `attach` and train afterwards.

    Args:
        model: changed in place.
        layer: "simam", "triplet", or a factory that is called with the number of channels, such as
            `functools.partial(SimAM, lam=0.1)`. A layer that is not a SimAM goes where triplet attention goes.
        where: selects blocks, or convolutions of a plain stack. By default, these are all blocks, or the last
            convolution of each stage of a plain stack. A predicate on the qualified name selects the sites that it
            accepts. A name selects the sites whose qualified name contains it between dots, such as "layer3". The index
            of a stage, negative from the end, selects the default sites of the stage. Several names and indices select
            the sites of all of them.

    Returns:
        The report of all insertions.

    Raises:
        InputError: an argument has a wrong type, the factory does not return a module, `model` or a module inside it
            is compiled, scripted or wrapped, `model` is neither a residual nor a plain network, `where` selects no
            site, or a selected site cannot take the attention: it already has attention, `model` uses its module in
            several places, or one of its convolutions is quantized or replaced, for example. The model is then
            unchanged.
    """
    check_model("attach", model)
    if isinstance(layer, nn.Module) or not (layer in _LAYERS if isinstance(layer, str) else callable(layer)):
        expected = "'simam', 'triplet' or a factory that is called with the number of channels"
        actual = f"a {type(layer).__name__}" if isinstance(layer, nn.Module) else shown(layer)
        raise invalid("attach", "layer", expected, actual)
    sites = find_sites(model)
    if not sites:
        expected = "a network with residual blocks of torchvision or timm, or a plain network like VGG"
        advice = "put SimAM or TripletAttention into its code"
        raise invalid("attach", "model", expected, f"a {type(model).__name__}, which is neither", advice)
    placed = [_place(site, layer) for site in select(sites, where)]
    names = _registered_names(model)
    taken: set[nn.Module] = set()
    for host, _ in placed:
        check_host("attach", host.name or "model", host.module)
        if host.module in taken:
            actual, advice = "one that would take it before and after itself", "select other sites with where"
            raise invalid("attach", host.name, "a module that takes one attention", actual, advice)
        taken.add(host.module)
        if len(names[host.module]) > 1:
            actual = f"one that is registered as {' and '.join(names[host.module])}"
            advice = "make one module for each place, because the attention would run in all of them"
            raise invalid("attach", host.name, "a module of one place", actual, advice)
    has_norm = any(isinstance(module, _BatchNorm) for module in model.modules())
    changes_output = any(not isinstance(attention, PlainTripletAttention) for _, attention in placed)
    insertions = []
    for host, attention in placed:
        position = "before" if host.is_before else "after"
        if block_class(host.module) is not None:
            position = "at the end of the branch of"
        place = f"{position} {host.name or 'the model'}"
        child = insert(host.module, attention, is_before=host.is_before)
        text = f"{type(attention).__name__}({attention.extra_repr()})"
        insertions.append(Insertion(qualified_name(host.name, child), text, place))
    return AttachReport(tuple(insertions), recalibrate=has_norm and changes_output)


def detach(model: nn.Module) -> tuple[str, ...]:
    """Remove all attention that `attach` inserted, even if `model` has been copied, pickled or converted to SyncBN.

    Afterwards, the modules and the keys of the state dict are the same as before `attach`. Weights and running
    statistics that have changed in the meantime are not restored.

    Args:
        model: changed in place.

    Returns:
        The qualified names of the removed layers.

    Raises:
        InputError: `model` is not a module, has no attached attention, or is or contains a module that is compiled,
            scripted or wrapped.
    """
    check_model("detach", model)
    hosts = [(name, module) for name, module in model.named_modules() if is_attached(module)]
    if not hosts:
        raise invalid("detach", "model", "a network with attached attention", f"a {type(model).__name__} with none")
    return tuple(qualified_name(name, remove(host)) for name, host in hosts)


def _simam(site: Site) -> nn.Module:
    return SimAM() if site.has_norm else PlainSimAM()


def _triplet(site: Site) -> nn.Module:
    return PlainTripletAttention() if site.is_plain else TripletAttention()


_LAYERS: dict[str, Callable[[Site], nn.Module]] = {"simam": _simam, "triplet": _triplet}


def _registered_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All names under which each module is registered in `model`, with one name for each parent."""
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for parent, module in model.named_modules():
        for child, part in module._modules.items():
            if part is not None:
                names[part].append(qualified_name(parent, child))
    return names


def _place(site: Site, layer: Layer) -> tuple[Host, nn.Module]:
    """The host at `site`, and a new layer with the device and dtype of the convolution and the mode of the host."""
    attention: Any
    like = next(site.convolution.module.parameters(), None)
    channels = site.convolution.channels
    branch_channels = channels if site.branch is None else site.branch.channels
    if like is None or not like.is_floating_point() or channels is None or branch_channels is None:
        expected = "a block whose convolutions have floating parameters and out_channels"
        actual = "one with a quantized convolution or another module in its place"
        raise invalid("attach", site.name or "model", expected, actual, "select other blocks with where")
    with like.device:  # otherwise torch's default device, which may be another one
        if isinstance(layer, str):
            attention = _LAYERS[layer](site)
        else:
            attention = layer(branch_channels)
            if isinstance(attention, SimAM) and channels != branch_channels:
                attention = layer(channels)
    if not isinstance(attention, nn.Module):
        actual = f"a factory that returns {type(attention).__name__} for {site.name}"
        raise invalid("attach", "layer", "a factory that returns an nn.Module", actual)
    host = site.convolution if isinstance(attention, SimAM) else site.branch
    if host is None:
        actual = f"a BatchNorm after {site.name} that no layer follows"
        advice = "select other sites with where"
        raise invalid("attach", "the end of a plain stack", "a layer other than a BatchNorm", actual, advice)
    return host, attention.to(like.device, like.dtype).train(host.module.training)
