"""Training a hash network: from a folder of class folders to a saved model and its record."""

import json
import math
import platform
import time

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import hashengine
from hashengine.errors import InputError
from hashengine.models import HashNet
from hashengine.models.checkpoint import replace_files
from training import data
from training.config import FitConfig

RECORD_FILE = "training.json"


def fit(config: FitConfig) -> dict:
    """Train as `config` says; write config.json, model.safetensors and training.json; return the latter's content.

    The model is that of the last epoch: no image outside `config.images` is looked at. The same configuration gives the
    same weights on one machine's CPU with one number of threads.

    Raises:
        InputError: an option, the folder or one of its images is unusable, or the loss became infinite.
    """
    device = _device(config.device)
    config.network(("a", "b"), 1, config.image_size or 8, (0.5,), (0.5,))  # a mistake here need not wait for the images
    images = data.load(config.images, config.image_size)
    image_size = images.images.shape[-1]
    config.output.mkdir(parents=True, exist_ok=True)  # what cannot be written is better known before the training
    epochs, shift = config.epochs_for(len(images.labels)), config.shift_for(image_size)
    batches = data.Batches(images, config.batch_size, shift, config.flip, config.seed, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = HashNet(config.network(images.classes, images.images.shape[1], image_size, *images.statistics()))
    model.to(device).train()

    started = time.perf_counter()
    history = train(model, batches, epochs, config)
    seconds = time.perf_counter() - started

    record = {
        "version": 1,
        "options": config.model_dump(mode="json"),
        "network": model.config.model_dump(mode="json"),
        "chosen": {"epochs": epochs, "shift": shift, "batch_size": batches.batch_size},
        "images": len(images.labels),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "epochs": history,
        "seconds": round(seconds, 3),
        "images_per_second": round(epochs * len(batches) * batches.batch_size / seconds, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "versions": {
            "hashengine": hashengine.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    model.save_pretrained(config.output)
    replace_files(config.output, {RECORD_FILE: json.dumps(record, indent=2).encode() + b"\n"})
    return record


def train(model: HashNet, batches: data.Batches, epochs: int, config: FitConfig) -> list[dict[str, float]]:
    """Train in place; for each epoch the means of the losses and of the accuracy, on the augmented images.

    Of `config` only the learning rate and the weight decay are used.
    """
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=epochs * len(batches))
    history = []
    with tqdm(total=epochs * len(batches), desc="training", unit="step", leave=False, disable=None) as progress:
        for epoch in range(1, epochs + 1):
            sums = torch.zeros(3, device=model.device)  # summed on the device: reading each step would stall a GPU
            for images, labels in batches:
                try:
                    output = model(images)
                except ValueError as error:  # on a CPU greedy_sign refuses NaN; a GPU would stall to look
                    raise _diverged(epoch, config.lr) from error
                classification = cross_entropy(output.logits, labels)
                optimizer.zero_grad()
                (classification + output.penalty).backward()
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    accuracy = (output.logits.argmax(1) == labels).float().mean()
                    sums += torch.stack((classification.detach(), output.penalty.detach(), accuracy))
                progress.update()
            classification, penalty, accuracy = (sums / len(batches)).tolist()
            if not math.isfinite(classification + penalty):
                raise _diverged(epoch, config.lr)
            history.append({"epoch": epoch, "classification": classification, "penalty": penalty, "accuracy": accuracy})
            progress.set_postfix(epoch=f"{epoch}/{epochs}", loss=f"{classification + penalty:.3f}")
    return history


def _diverged(epoch: int, lr: float) -> InputError:
    return InputError(f"lr: expected a finite loss, got infinity or NaN in epoch {epoch}: lower it, which is {lr}")


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device: expected a GPU that torch can use, got none: choose --device cpu")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))
