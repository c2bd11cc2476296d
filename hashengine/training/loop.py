"""Training a hash network: from a folder of class folders to a saved model and its record."""

from __future__ import annotations

import functools
import json
import math
import operator
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hashengine import _environment, _progress, methods
from hashengine._defaults import CODES_MARKER, INDEX_MARKER, SPLIT_FILE, is_split
from hashengine._files import TEMPORARY_LOCK, check_output, locked, make_folder, write_file
from hashengine._torch_defaults import own_random_numbers, torch_defaults
from hashengine._validation import check_device
from hashengine.errors import InputError, invalid, shown
from hashengine.methods.base import Batch, HashingMethod, View
from hashengine.models import HashNet, checkpoint
from hashengine.models.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    MethodState,
    Model,
    document,
    has_config,
    has_weights,
)
from hashengine.training import data
from hashengine.training.config import FitConfig
from hashengine.training.runs import EVALUATION_FILE, RECORD_FILE, Run, check_evaluation_file, has_record

_ENCODE_BATCH = 512


@torch_defaults()
def fit(config: FitConfig) -> Run:
    """Train a network and write config.json, model.safetensors and training.json into `config.output`.

    There is no validation: the saved model is that of the last epoch, and no image outside `config.images` is read. On
    the CPU of one machine, the same configuration and number of threads give the same weights. The default dtype and
    device of torch have no effect. A second call for the same folder, in this process or another one, waits.

    Raises:
        InputError: an option, the folder of images or an image is unusable, or the loss became infinite or NaN.
    """
    FitConfig.require(config)
    device = check_device("fit", config.device, auto=True)
    check_model_output("fit", config)
    images = data.load(config.images, config.image_size)
    make_folder(config.output)  # an unwritable folder is reported before training

    def wait() -> None:
        _progress.note(f"waiting for another training run in {config.output}")

    with locked(config.output, wait, TEMPORARY_LOCK, keep=False):
        return _fit(config, images, device)


def _fit(config: FitConfig, images: data.LabelledImages, device: torch.device) -> Run:
    image_size = images.images.shape[-1]
    epochs, shift = config.epochs_for(len(images.labels)), config.shift_for(image_size)
    network, method = build(config, images)
    network.to(device).train()
    method.to(device).train()
    batches = data.Batches(images, config.batch_size, shift, config.flip, config.seed, device, views=method.views)

    started = time.perf_counter()
    if method.has_closed_form:
        epochs, history = 1, [_fit_closed_form(network, method, batches.images)]
        seen = len(images.labels)
    else:
        history = train(network, method, batches, epochs, config)
        seen = epochs * len(batches) * batches.batch_size
    seconds = time.perf_counter() - started

    network.trained_by = MethodState(method.name, config.method_options, method.state_dict())
    parameters = sum(parameter.numel() for parameter in _parameters(network, method))
    record = {
        "version": 1,
        "options": config.record(),
        "network": document(Model(network.config, {}, network.trained_by)),
        "chosen": {"epochs": epochs, "shift": shift, "batch_size": batches.batch_size},
        "images": len(images.labels),
        "files_sha256": images.files_sha256,
        "parameters": parameters,
        "epochs": history,
        "seconds": round(seconds, 3),
        "images_per_second": round(seen / seconds, 1),
        "device": _environment.device_name(device),
        "versions": {name: _environment.versions()[name] for name in ("hashengine", "torch", "python")},
    }
    model = Model(network.config, network.state_dict(), network.trained_by)
    record["fingerprint"] = checkpoint.save(config.output, model)
    write_file(config.output / RECORD_FILE, json.dumps(record, indent=2) + "\n")
    with suppress(InputError):  # it is another file, which was created during the training
        check_evaluation_file("fit", config.output)
        (config.output / EVALUATION_FILE).unlink(missing_ok=True)  # that of an earlier network
    return Run(config.output, record)


def check_model_output(where: str, config: FitConfig) -> None:
    """Require that `config.output` can be written, and that only files of an earlier model are replaced.

    Raises:
        InputError: the folder contains other files of the same names, or belongs to an index; the error names `where`.
    """
    folder = config.output
    check_output(where, folder, outside=(config.images,), is_folder=True)
    check_evaluation_file(where, folder)
    check_no_other_output(where, folder, "that of an earlier model")
    check_no_other_output(where, folder.parent, "that of an earlier model", inside=folder)
    replaced = [name for name in (CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE) if (folder / name).exists()]
    is_own = {CONFIG_FILE: has_config, WEIGHTS_FILE: has_weights, RECORD_FILE: has_record}
    if foreign := [name for name in replaced if not is_own[name](folder)]:
        actual = f"{str(folder)!r}, which has another {foreign[0]}"
        raise invalid(where, "output", "a folder without foreign files", actual, "choose another folder")


def check_no_other_output(where: str, folder: Path, expected: str, inside: Path | None = None) -> None:
    """Require that `folder` is no codes folder, index or split. They could not be replaced with a model in them.

    Args:
        where: the function or command to name in an error.
        folder: the folder, which need not exist.
        expected: what the output may be besides a new folder.
        inside: the output, if it is in `folder`. A model may be beside the sides of a split.

    Raises:
        InputError: it is one; the error names `where`.
    """
    found = [m.name for m in (CODES_MARKER, INDEX_MARKER) if m._replace(contents=()).problem(folder) is None]
    found += [SPLIT_FILE] if inside is None and is_split(folder) else []
    for record in found:
        actual = f"{str(inside or folder)!r}, which {'is in a folder that ' if inside else ''}holds {record}"
        raise invalid(where, "output", f"a new folder or {expected}", actual, "choose another folder")


def build(config: FitConfig, images: data.LabelledImages) -> tuple[HashNet, HashingMethod]:
    """An untrained network for `images` and the method that trains it, on the CPU, both initialised from `config.seed`.

    The caller's random state does not change.
    """
    method = methods.create(config.method, **config.method_options)
    channels, size = images.images.shape[1], images.images.shape[-1]
    with torch_defaults(), own_random_numbers(config.seed):
        network = HashNet(config.network(images.classes, channels, size, *images.statistics()), method.head)
        method.add_parameters(config.bits, len(images.classes))
    return network, method


def train(
    network: HashNet, method: HashingMethod, batches: data.Batches, epochs: int, config: FitConfig
) -> list[dict[str, float]]:
    """Train network and method in place.

    Args:
        network: the network, in training mode.
        method: the method, with its parameters on the same device.
        batches: the batches, with as many views of each image as the method needs.
        epochs: passes over the batches.
        config: only the learning rate and the weight decay are used.

    Returns:
        For each epoch, its number and the means of the loss terms and of the method's measures, on augmented images.

    Raises:
        InputError: the loss, a measure or a weight became infinite or NaN, or the hash layer has another shape.
    """
    parameters = _parameters(network, method)
    optimizer = torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)
    total = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=total)
    history, step = [], 0
    with _progress.task("training", total, "step") as progress:
        for epoch in range(1, epochs + 1):
            # The sums stay on the device, because reading a value in every step would wait for a GPU.
            sums = torch.zeros((), dtype=torch.float32, device=network.device)
            for views, labels in batches:
                batch = _forward(network, views, labels)
                if step == 0:
                    _check_shape_of_activations(batch, network)
                try:
                    terms = method.loss(batch, step, epoch)
                except ValueError as error:  # an op on the CPU rejected NaN; otherwise the mean loss becomes NaN
                    if bool(torch.isfinite(batch.activations).all()):
                        raise
                    raise _diverged(epoch, config.lr) from error
                with torch.no_grad():
                    measures = method.measures(batch)
                if step == 0:
                    _check_figures(terms, measures)
                loss = functools.reduce(operator.add, terms.values())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                reported = {name: term.detach() for name, term in terms.items()} | measures
                values = torch.stack([value.float() for value in reported.values()])
                sums = sums + values
                progress.update()
                step += 1
            means = dict(zip(reported, (sums / len(batches)).tolist(), strict=True))
            loss_mean = sum(means[name] for name in terms)
            if not math.isfinite(loss_mean):
                raise _diverged(epoch, config.lr)
            for name in measures:
                if not math.isfinite(means[name]):
                    raise invalid("fit", f"the measure {name!r}", "finite", f"{means[name]} in epoch {epoch}")
            history.append({"epoch": epoch, **means})
            progress.set_postfix(epoch=f"{epoch}/{epochs}", loss=f"{loss_mean:.3f}")
    # No loss shows what the last step did.
    if not all(bool(torch.isfinite(tensor).all()) for tensor in network.state_dict().values()):
        raise _diverged(epochs, config.lr)
    return history


def _parameters(network: HashNet, method: HashingMethod) -> list[Tensor]:
    """The parameters of both, each once: a method may also hold the head that it made."""
    return list({id(parameter): parameter for part in (network, method) for parameter in part.parameters()}.values())


def _check_shape_of_activations(batch: Batch, network: HashNet) -> None:
    expected, actual = [len(batch.features), network.config.bits], list(batch.activations.shape)
    if actual != expected:
        raise invalid(
            "fit", "the activations of the hash layer", str(expected), actual, "change the head of the method"
        )


def _check_figures(terms: Any, measures: Any) -> None:
    """Require what the methods `loss` and `measures` of a `HashingMethod` return."""
    for name, figures in (("loss", terms), ("measures", measures)):
        wanted = "a dict of names and floating-point tensors without dimensions"
        is_dict = isinstance(figures, dict) and all(isinstance(key, str) for key in figures)
        if not is_dict or not all(isinstance(value, Tensor) and not value.dim() for value in figures.values()):
            raise invalid("fit", f"the result of the method's {name}", wanted, shown(figures))
    if not terms:
        raise invalid("fit", "the result of the method's loss", "at least one term", "none")
    if shared := ({"epoch"} & (terms | measures).keys()) | (terms.keys() & measures.keys()):
        raise invalid(
            "fit", "the names of the method's terms and measures", "unique, and not 'epoch'", repr(min(shared))
        )


def _forward(network: HashNet, views: tuple[Tensor, ...], targets: Tensor) -> Batch:
    """The network's outputs for each view of the images. BatchNorm computes separate statistics for each view."""
    first, *others = (View(*network(images)) for images in views)
    return Batch(first.activations, first.features, targets, *others)


@torch.no_grad()
def _fit_closed_form(network: HashNet, method: HashingMethod, images: Tensor) -> dict[str, float]:
    """Replace the network's hash layer by the head that the method computes from the features of `images`.

    Returns:
        The record of the run's only epoch.
    """
    network.eval()
    features = []
    with _progress.task("computing features", len(images), "img") as progress:
        for part in images.split(_ENCODE_BATCH):
            features.append(network(part).features)
            progress.update(len(part))
    network.hash_layer = method.fit(torch.cat(features), network.config.bits)
    return {"epoch": 1, **method.figures()}


def _diverged(epoch: int, lr: float) -> InputError:
    actual = f"infinity or NaN in epoch {epoch}"
    return invalid("fit", "the loss", "finite", actual, f"lower the learning rate, which is {lr}")
