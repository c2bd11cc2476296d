"""Image files: listing, reading, labels, and the conversion to tensors."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hashengine.errors import InputError
from hashengine.images import image_tensor, label_of, list_images, read_image


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def test_list_images_searches_subfolders_sorts_and_skips_hidden_and_other_files(tmp_path, noise):
    wanted = [save(tmp_path / name, noise) for name in ("b/2.PNG", "a/x/1.jpg", "c.bmp", "a/0.webp")]
    save(tmp_path / ".hidden" / "1.png", noise)
    save(tmp_path / "a" / ".2.png", noise)
    (tmp_path / "notes.txt").write_text("no image")
    assert list_images(tmp_path) == sorted(wanted)


def test_list_images_refuses_a_missing_folder_a_file_and_an_empty_folder(tmp_path, noise):
    for folder, complaint in (
        (tmp_path / "missing", "is missing"),
        (save(tmp_path / "file.png", noise), "is a file"),
        (tmp_path / "empty", "which holds none"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=complaint) as caught:
            list_images(folder)
        assert folder.name in str(caught.value) and "\n" not in str(caught.value)


def test_read_image_applies_the_exif_orientation(tmp_path, noise):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to display"
    path = save(tmp_path / "turned.png", noise[:32], exif=exif)
    assert np.array_equal(np.asarray(read_image(path)), np.rot90(noise[:32], -1))


def test_read_image_keeps_the_scale_of_16_bit_grey(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = save(tmp_path / "grey16.png", grey.astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(read_image(path, "L")), grey)


def test_read_image_makes_transparent_parts_white(tmp_path, noise):
    alpha = np.zeros((64, 64, 1), np.uint8)
    alpha[:32] = 255
    pixels = np.asarray(read_image(save(tmp_path / "half.png", np.concatenate([noise, alpha], 2))))
    assert np.array_equal(pixels[:32], noise[:32]) and (pixels[32:] == 255).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tiff", "webp"])
def test_the_error_names_a_truncated_image(tmp_path, noise, suffix):
    path = save(tmp_path / f"cut.{suffix}", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=f"cut.{suffix}: the file must be a readable image") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_a_text_file_a_missing_file_and_an_unknown_mode_are_refused(tmp_path, noise):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(InputError, match="text.png"):
        read_image(tmp_path / "text.png")
    with pytest.raises(InputError, match="missing.png.*No such file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(InputError, match="mode must be .*'CMYK'"):
        read_image(save(tmp_path / "good.png", noise), "CMYK")


def test_a_decompression_bomb_is_refused(tmp_path):
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(InputError, match="bomb.png.*exceeds limit"):
        read_image(path)


def test_image_tensor_keeps_an_image_that_fits_and_crops_a_wide_one_to_its_centre(noise):
    assert torch.equal(image_tensor(Image.fromarray(noise), 64, 3), torch.from_numpy(noise).permute(2, 0, 1))
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    assert torch.equal(image_tensor(Image.fromarray(wide), 20, 1), torch.full((1, 20, 20), 200, dtype=torch.uint8))


def test_label_of_is_the_first_folder_below_the_root(tmp_path):
    assert label_of(tmp_path / "cat" / "tabby" / "1.png", tmp_path) == "cat"
    assert label_of(tmp_path / "1.png", tmp_path) == ""
    with pytest.raises(InputError, match="label_of: path must be a file under"):
        label_of("/elsewhere/1.png", tmp_path)
