"""Small images in class folders, and an untrained model for them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hashengine.models import HashNet, HashNetConfig

CLASSES = ("bars", "checks", "dots")


def make_images(folder: Path, per_class: int, seed: int = 0) -> Path:
    """Write `per_class` noisy 8 x 8 grey images of each class to `folder/<class>/<i>.png`."""
    generator = np.random.default_rng(seed)
    rows, columns = np.indices((8, 8))
    patterns = (rows % 2, (rows // 2 + columns // 2) % 2, (rows % 4 < 2) & (columns % 4 < 2))
    for name, pattern in zip(CLASSES, patterns, strict=True):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            noisy = np.clip(200 * pattern + generator.integers(0, 56, (8, 8)), 0, 255)
            Image.fromarray(noisy.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def make_model(folder: Path, bits: int = 32, seed: int = 0) -> Path:
    """Save an untrained network of `bits` bits to `folder`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = HashNet(HashNetConfig(bits=bits, classes=CLASSES, channels=1, image_size=8, widths=(8, 16)))
    model.save_pretrained(folder)
    return folder


def write_noise(folder: Path, counts: dict[str, int], size: int = 8, seed: int = 0) -> Path:
    """Write random grey images to `folder`/<class>/<i>.png; the first class is dark, so that a network can learn it."""
    generator = np.random.default_rng(seed)
    for index, (label, count) in enumerate(counts.items()):
        (folder / label).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 100 if index == 0 else 256, (size, size), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")
    return folder
