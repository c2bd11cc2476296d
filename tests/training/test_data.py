"""Images of class folders in memory, and random batches of these images."""

import numpy as np
import pytest
import torch
from PIL import Image

from hashengine.training.data import Batches, LabelledImages, load
from tests.helpers.tiny_images import write_noise


def test_images_are_loaded_in_order_with_their_statistics(tmp_path):
    data = load(write_noise(tmp_path, {"b": 3, "a": 5}, size=12))
    assert data.classes == ("a", "b") and data.labels.tolist() == [0] * 5 + [1] * 3
    assert data.images.shape == (8, 1, 12, 12)
    assert torch.equal(data.images[5, 0], torch.from_numpy(np.array(Image.open(tmp_path / "b" / "0.png"))))
    (mean,), (std,) = data.statistics()
    pixels = data.images.double() / 255
    assert mean == pytest.approx(pixels.mean().item()) and std == pytest.approx(pixels.std(correction=0).item())
    assert load(tmp_path, 10).images.shape == (8, 1, 10, 10)


def test_batches_visit_every_image_once_per_epoch_shifted_and_flipped():
    size = 6
    images = torch.arange(size * size, dtype=torch.uint8).reshape(1, 1, size, size).repeat(20, 1, 1, 1)
    images += 5 * torch.arange(20, dtype=torch.uint8)[:, None, None, None]
    data = LabelledImages(images, torch.arange(20), ("a", "b"))
    seen = []
    for (batch,), labels in Batches(data, 5, shift=1, flip=True, seed=0, device=torch.device("cpu")):
        for image, label in zip(batch[:, 0], labels.tolist(), strict=True):
            padded = torch.nn.functional.pad(images[label].float(), (1, 1, 1, 1), mode="replicate")[0].byte()
            # The nine windows of the padded image are its shifts by up to one pixel.
            windows = [padded[y : y + size, x : x + size] for y in range(3) for x in range(3)]
            assert any(torch.equal(image, w) or torch.equal(image, w.flip(1)) for w in windows)
            seen.append(label)
    assert sorted(seen) == list(range(20)) != seen
    plain = Batches(data, 32, shift=0, flip=False, seed=0, device=torch.device("cpu"))
    (((batch,), labels),) = plain
    assert torch.equal(batch, images[labels])


def test_two_views_show_the_same_images_under_different_augmentations():
    images = torch.arange(36, dtype=torch.uint8).reshape(1, 1, 6, 6).repeat(20, 1, 1, 1)
    data = LabelledImages(images, torch.arange(20), ("a", "b"))
    options = {"shift": 2, "flip": True, "seed": 0, "device": torch.device("cpu")}
    (batch, *_) = Batches(data, 20, **options, views=2)
    first, second = batch.views
    assert first.shape == second.shape == (20, 1, 6, 6) and not torch.equal(first, second)
    plain = Batches(data, 20, **options | {"shift": 0, "flip": False}, views=2)
    ((views, labels),) = plain
    assert torch.equal(views[0], views[1]) and torch.equal(views[0], images[labels])


def test_images_are_converted_to_the_given_channels_and_size(tmp_path):
    from hashengine.training.data import list_classes, read_into_memory

    folder = write_noise(tmp_path, {"a": 2, "b": 1}, size=12)
    data = read_into_memory(list_classes(folder), channels=3, size=8)
    assert data.images.shape == (3, 3, 8, 8) and data.labels.tolist() == [0, 0, 1]
