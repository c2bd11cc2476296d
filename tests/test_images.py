"""Image files: listing, reading, labels, and the conversion to tensors."""

import os
import socket
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from hashengine.errors import InputError
from hashengine.images import find_images, image_tensor, label_of, list_images, read_header, read_image
from tests.helpers.paths import ROOT
from tests.helpers.tiff_files import write_tiff


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


def test_a_file_without_the_suffix_of_an_image_is_found_by_its_content(tmp_path, noise):
    wanted = []
    for name, kind in (("no_suffix", "png"), ("photo.txt", "jpeg"), ("picture.dat", "webp"), ("a.avif", "png")):
        Image.fromarray(noise).save(tmp_path / name, kind)
        wanted.append(tmp_path / name)
    others = {
        "notes.txt": b"no image",
        "empty": b"",
        "a.json": b"{}",
        "a.xmp": b"<?xml version='1.0'?>",
        "Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600),
        "film.mp4": b"\0\0\0\x18ftypmp42" + bytes(100),
        "drawing.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    }
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    found = find_images(tmp_path)
    assert found.images == sorted(wanted) and found.unopened == []
    assert [path.name for path in found.others] == sorted(others)
    lines = []
    assert list_images(tmp_path, warn=lines.append) == found.images
    assert lines == [f"skipped: {len(others)} files in {tmp_path} are no images"]


@pytest.mark.parametrize(
    ("name", "content", "format"),
    [
        ("a.heic", b"\0\0\0\x18ftypheic" + bytes(100), "HEIC"),
        ("IMG_1", b"\0\0\0\x18ftypmif1" + bytes(100), "HEIC"),
        ("a.jxl", b"\xff\x0a" + bytes(100), "JPEG XL"),
        ("b", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100), "JPEG XL"),
        ("a.cr3", b"\0\0\0\x18ftypcrx " + bytes(100), "CR3"),
        ("a.pam", b"P7\nWIDTH 1\nHEIGHT 1\nDEPTH 1\nMAXVAL 255\nTUPLTYPE GRAYSCALE\nENDHDR\n\0", "PAM"),
        ("a.pfm", b"PF\n1 1\n-1.0\n" + bytes(12), "PFM"),
        ("a.exr", b"v/1\1" + bytes(100), "OpenEXR"),
        ("a.hdr", b"#?RADIANCE\n" + bytes(100), "Radiance HDR"),
        ("a.jxr", b"II\xbc\1" + bytes(100), "JPEG XR"),
        ("a.raf", b"FUJIFILMCCD-RAW 0201" + bytes(100), "RAF"),
        ("a.orf", b"IIRO\x08\0\0\0" + bytes(100), "ORF"),
        ("a.rw2", b"IIU\0\x08\0\0\0" + bytes(100), "RW2"),
        ("a.xcf", b"gimp xcf v011\0" + bytes(100), "XCF"),
    ],
)
def test_an_image_that_only_another_program_decodes_is_named_with_its_format(tmp_path, name, content, format):
    (tmp_path / name).write_bytes(content)
    assert find_images(tmp_path).images == [tmp_path / name]
    expected = f"{name}: the file must be a readable image, got {format}, which this Pillow cannot decode; convert it"
    for read in (read_image, read_header):
        with pytest.raises(InputError, match=expected):
            read(tmp_path / name)


def _deep_psd(mode: int, channels: int) -> bytes:
    """A PSD file of one pixel with 16 bits per channel."""
    return b"8BPS" + struct.pack(">H6xHIIHH", 1, channels, 1, 1, 16, mode) + bytes(14 + 2 * channels)


@pytest.mark.parametrize(
    ("content", "format"),
    [
        (_deep_psd(3, 3), "PSD"),
        (_deep_psd(1, 1), "PSD"),
        (b"8BPS\0\2" + bytes(100), "PSD"),  # a large document (PSB)
        (b"II*\0", "TIFF"),
        (b"MM\0*", "TIFF"),
        (b"II+\0", "TIFF"),  # a BigTIFF
        (b"MM\0+", "TIFF"),
    ],
)
@pytest.mark.parametrize("has_suffix", [False, True])
def test_an_image_of_a_kind_that_pillow_does_not_decode_is_an_image_with_a_reason(
    tmp_path, content, format, has_suffix
):
    path = tmp_path / ("a" + (".psd" if format == "PSD" else ".tif") * has_suffix)
    path.write_bytes(content)
    _is_an_image_with_a_reason(path, format)


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("name", ["a", "a.tif"])
def test_a_valid_tiff_file_of_a_kind_that_pillow_does_not_decode_is_not_called_another_content(
    tmp_path, name, big_endian
):
    write_tiff(tmp_path / name, np.zeros((2, 2), np.uint64), big_endian=big_endian)
    _is_an_image_with_a_reason(tmp_path / name, "TIFF")


def test_the_warning_of_a_decoder_is_the_reason_without_advice(tmp_path):
    (tmp_path / "a").write_bytes(b"MM\0+\0\x08\0\0" + bytes(100))
    assert find_images(tmp_path).images == [tmp_path / "a"]
    with pytest.raises(InputError, match="a: the file must be a readable image, got Corrupt EXIF data") as caught:
        read_image(tmp_path / "a")
    assert "convert it" not in str(caught.value)


def _is_an_image_with_a_reason(path: Path, format: str) -> None:
    assert find_images(path.parent).images == [path]
    expected = f"got {format} that is damaged or of a kind that this Pillow cannot decode; convert it to JPEG or PNG"
    for read in (read_image, read_header):
        with pytest.raises(InputError, match=f"{path.name}: the file must be a readable image, {expected}$"):
            read(path)


def test_a_text_that_begins_like_an_image_is_no_image(tmp_path, noise):
    save(tmp_path / "a.png", noise)
    for number, text in enumerate(("P7 is a runway", "PFM means portable float map", "PF", "II", "MM*", "8BP")):
        (tmp_path / f"{number}.txt").write_text(text)
    assert find_images(tmp_path).images == [tmp_path / "a.png"]


@pytest.mark.parametrize("path", [None, 5, b"a.png", "", "a\0b", "\ud800"])
def test_what_is_no_path_is_refused_in_one_line(tmp_path, path):
    for where, argument, call in (
        ("read_image", "path", lambda: read_image(path)),
        ("read_header", "path", lambda: read_header(path)),
        ("find_images", "folder", lambda: find_images(path)),
        ("list_images", "folder", lambda: list_images(path)),
        ("label_of", "path", lambda: label_of(path, tmp_path)),
        ("label_of", "root", lambda: label_of(tmp_path, path)),
    ):
        with pytest.raises(InputError, match=f"^{where}: {argument} must be a path") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_an_avif_image_is_read(tmp_path):
    try:
        Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "a.avif")
    except (KeyError, ValueError, OSError):
        pytest.skip("this Pillow has no AVIF")
    assert find_images(tmp_path).images == [tmp_path / "a.avif"]
    assert np.abs(np.asarray(read_image(tmp_path / "a.avif")).astype(int) - (200, 0, 0)).max() < 10


def test_pipes_sockets_and_devices_are_named_and_never_opened(tmp_path, noise, monkeypatch):
    save(tmp_path / "a.png", noise)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")  # a short name, because the path of a socket is limited
        found = find_images(tmp_path)
        kinds = {"device": "a device", "pipe.png": "a named pipe", "socket.jpg": "a socket"}
        assert found.images == [tmp_path / "a.png"]
        assert {path.name: reason for path, reason in found.unopened} == kinds
        for name, kind in kinds.items():
            for read in (read_image, read_header):
                with pytest.raises(InputError, match=f"{name}: the file must be a readable image, got {kind}"):
                    read(tmp_path / name)
    with pytest.raises(InputError, match="device: the file must be readable, got a device"):
        list_images(tmp_path)
    with pytest.raises(InputError, match="folder must be a folder of images, got .*, which is a named pipe"):
        find_images(tmp_path / "pipe.png")


def test_folders_and_links_that_cannot_be_read_are_named(tmp_path, noise, monkeypatch):
    save(tmp_path / "a" / "1.png", noise)
    (tmp_path / "b").mkdir()
    (tmp_path / "to_nothing.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "to_itself").symlink_to(tmp_path / "to_itself")
    (tmp_path / "c").symlink_to(tmp_path / "a")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name in ("b", "root"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = find_images(tmp_path)
    assert found.images == [tmp_path / "a" / "1.png"] and found.others == [tmp_path / "c"]
    assert [(path.name, reason) for path, reason in found.unopened] == [
        ("b", "Permission denied"),
        ("to_itself", "Too many levels of symbolic links"),
        ("to_nothing.png", "No such file or directory"),
    ]
    with pytest.raises(InputError, match="b: the folder must be readable, got Permission denied$"):
        list_images(tmp_path)
    (tmp_path / "root").mkdir()
    expected = "folder must be one that can be read, got .*root', which cannot be read .Permission denied.$"
    with pytest.raises(InputError, match=f"^find_images: {expected}"):
        find_images(tmp_path / "root")


def damaged_exif(path: Path, noise) -> Path:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + struct.pack("<HHII", 0x0132, 2, 99, 9999)
    return save(path, noise, exif=exif)


def test_warnings_of_a_decoder_carry_the_name_of_the_file(tmp_path, noise, monkeypatch):
    paths = [damaged_exif(tmp_path / f"{number}.jpg", noise) for number in range(20)]
    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("default")
        list(pool.map(read_image, paths))
    messages = [str(warning.message) for warning in caught]
    assert sorted({message.split(": ")[0] for message in messages}) == sorted(map(str, paths))
    assert all(message.count(": ") == 1 for message in messages)
    assert not any("\n" in message for message in messages)

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with pytest.warns(Image.DecompressionBombWarning, match="plain.png: Image size"):
        read_image(save(tmp_path / "plain.png", noise))
    with pytest.warns(Image.DecompressionBombWarning, match="plain.png: Image size"):
        assert read_header(tmp_path / "plain.png") == ("RGB", (64, 64))


def test_reading_leaves_the_filters_for_warnings_as_they_were(tmp_path, noise):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, show = list(warnings.filters), warnings.showwarning
        read_image(damaged_exif(tmp_path / "a.jpg", noise))  # its warning is ignored
        (tmp_path / "b.jpg").write_bytes(b"")
        with pytest.raises(InputError):
            read_image(tmp_path / "b.jpg")
        assert warnings.filters == before and warnings.showwarning is show


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


@pytest.mark.parametrize("damage", ["zeros", "a zero tail", "a bit"])
def test_a_damaged_png_is_refused(tmp_path, noise, damage):
    Image.fromarray(noise).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    start = data.index(b"IDAT") + 40
    if damage == "a bit":
        data[start] ^= 1
    else:
        data[start : start + 64 if damage == "zeros" else -30] = bytes(
            64 if damage == "zeros" else len(data) - 30 - start
        )
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match=r"a.png: the file must be a readable image, got .*broken PNG file"):
        read_image(tmp_path / "a.png")


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


@pytest.mark.parametrize(
    ("image", "size", "channels", "complaint"),
    [
        (None, 8, 3, "image must be a PIL image, got NoneType; read_image opens a file"),
        ("a.png", 8, 3, "image must be a PIL image, got str"),
        (Image.new("L", (0, 5)), 8, 3, "image must be of at least one pixel, got 0 x 5"),
        (Image.new("L", (4, 4)), 0, 3, "size must be at least 1, got 0"),
        (Image.new("L", (4, 4)), "8", 3, "size must be an integer of at least 1, got '8'"),
        (Image.new("L", (4, 4)), 8, 2, "channels must be 1 or 3, got 2"),
        (Image.new("L", (4, 4)), 8, True, "channels must be 1 or 3, got True"),
        (Image.new("L", (4, 4)), 8, "RGB", "channels must be 1 or 3, got 'RGB'"),
    ],
)
def test_image_tensor_refuses_other_arguments_in_one_line(image, size, channels, complaint):
    with pytest.raises(InputError, match=f"^preprocess: {complaint}"):
        image_tensor(image, size, channels)


def test_label_of_is_the_first_folder_below_the_root(tmp_path):
    assert label_of(tmp_path / "cat" / "tabby" / "1.png", tmp_path) == "cat"
    assert label_of(tmp_path / "1.png", tmp_path) == ""
    with pytest.raises(InputError, match="label_of: path must be a file under"):
        label_of("/elsewhere/1.png", tmp_path)


def test_a_damaged_exif_block_of_a_png_does_not_lose_the_image(tmp_path, noise):
    path = save(tmp_path / "broken.png", noise, exif=b"Exif\0\0not a TIFF header")
    with pytest.warns(UserWarning, match=r"broken.png: the EXIF orientation is ignored: "):
        image = read_image(path)
    np.testing.assert_array_equal(np.asarray(image), noise)


def with_tag(path: Path, tag: int, count: int) -> Path:
    """Change the number of values of a tag in a TIFF file."""
    content = bytearray(path.read_bytes())
    (first,) = struct.unpack_from("<I", content, 4)
    (tags,) = struct.unpack_from("<H", content, first)
    for entry in range(first + 2, first + 2 + 12 * tags, 12):
        if struct.unpack_from("<H", content, entry) == (tag,):
            struct.pack_into("<I", content, entry + 4, count)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("tag", "message"),
    [(278, 'libtiff: Incorrect count for "RowsPerStrip"'), (277, "More samples per pixel than can be decoded: ")],
)
def test_errors_that_a_decoder_prints_or_logs_carry_the_name_of_the_file(tmp_path, noise, capfd, tag, message):
    damaged = with_tag(save(tmp_path / "damaged.tif", noise, compression="tiff_lzw"), tag, 7)
    with pytest.raises(InputError, match=f"damaged.tif: the file must be a readable image, got .*{message}"):
        read_image(damaged)
    assert capfd.readouterr().err == ""


def test_errors_of_libtiff_in_other_code_go_to_stderr(tmp_path, noise, capfd):
    read_image(save(tmp_path / "intact.tif", noise))  # hashengine's handler is in place
    damaged = with_tag(save(tmp_path / "damaged.tif", noise, compression="tiff_lzw"), 278, 7)
    with Image.open(damaged) as image, pytest.raises(OSError):
        image.load()
    assert 'Incorrect count for "RowsPerStrip"' in capfd.readouterr().err


def test_threads_may_read_the_first_images_of_a_process_at_the_same_time(tmp_path, noise):
    path = with_tag(save(tmp_path / "damaged.tif", noise, compression="tiff_lzw"), 278, 7)
    script = f"""
import gc, sys, threading
from PIL import Image
from hashengine._file_warnings import named_warnings

sys.setswitchinterval(1e-6)

def read():
    with named_warnings("a file"):
        pass

threads = [threading.Thread(target=read) for _ in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
gc.collect()
for _ in range(20):
    try:
        Image.open({str(path)!r}).load()
    except OSError:
        pass
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('Incorrect count for "RowsPerStrip"') == 20


@pytest.mark.parametrize("name", ["huge.png", "huge", "slide.svs"])
def test_an_image_that_is_too_large_is_an_image_with_a_reason(tmp_path, name, monkeypatch):
    Image.new("L", (100, 50)).save(tmp_path / name, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert find_images(tmp_path).images == [tmp_path / name]
    with pytest.raises(InputError, match=f"{name}: the file must be a readable image, got Image size .5000 pixels. ex"):
        read_image(tmp_path / name)


def test_a_damaged_image_of_a_format_that_pillow_decodes_is_called_damaged(tmp_path):
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / "a.avif")
    content = (tmp_path / "a.avif").read_bytes()
    for name in ("a.avif", "a"):
        (tmp_path / name).write_bytes(content[:100])
        with pytest.raises(InputError, match=f"{name}: the file must be a readable image, got a damaged AVIF$"):
            read_image(tmp_path / name)


def test_a_mapped_file_whose_name_is_no_utf8_does_not_stop_reading(tmp_path, noise):
    """The list of mapped files has the names as bytes. The weights of a model are such a file."""
    save(tmp_path / "image.png", noise)
    script = (
        "import mmap, os, sys; folder = os.fsencode(sys.argv[1]); name = folder + b'/weights\\xe9'\n"
        "open(name, 'wb').write(b'weights')\n"
        "mapped = mmap.mmap(os.open(name, os.O_RDONLY), 0, access=mmap.ACCESS_READ)\n"
        "from hashengine.doctor import openmp_runtimes; from hashengine.images import read_image\n"
        "read_image(sys.argv[1] + '/image.png'); openmp_runtimes(); print('read')"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "read\n", done.stderr
