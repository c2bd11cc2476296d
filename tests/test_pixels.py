"""Images of every mode of Pillow: their pixels as 8-bit sRGB or grey, their transparency and their colour profiles."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from hashengine.errors import InputError
from hashengine.images import image_tensor, read_image
from tests.helpers.tiff_files import write_tiff

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def pixels(image: Image.Image, mode: str = "RGB") -> np.ndarray:
    return np.asarray(image if image.mode == mode else image.convert(mode)).astype(int)


def read(path, mode="RGB") -> np.ndarray:
    return pixels(read_image(path, mode), mode)


@pytest.mark.parametrize(
    ("array", "levels"),
    [
        pytest.param(GREY.astype(np.float32) / 255, GREY, id="floats from 0 to 1"),
        pytest.param(np.full((4, 4), 0.5, np.float32), np.full((4, 4), 128), id="a constant image"),
        pytest.param(np.zeros((4, 4), np.float32), np.zeros((4, 4)), id="a black image"),
        pytest.param(GREY.astype(np.int32), GREY, id="32-bit integers from 0 to 255"),
        pytest.param(GREY.astype(np.uint16) * 257, GREY, id="16 bits"),
        pytest.param(GREY < 100, 255 * (GREY < 100), id="black and white"),
    ],
)
def test_grey_images_of_every_depth_keep_their_levels(tmp_path, array, levels):
    Image.fromarray(array).save(tmp_path / "a.tiff")
    assert np.array_equal(read(tmp_path / "a.tiff", "L"), levels)
    assert np.array_equal(read(tmp_path / "a.tiff")[..., 1], levels)
    opened = Image.open(tmp_path / "a.tiff")
    if opened.size == (16, 16):
        assert np.array_equal(image_tensor(opened, 16, 1)[0].numpy(), levels)


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (np.float32([[0.0, 255.0]]), "floating-point pixels must be 0 .black. to 1 .white., got 0 to 255; scale them"),
        (np.float32([[-0.5, 0.5]]), "floating-point pixels must be .*, got -0.5 to 0.5"),
        (np.float32([[0.5, np.nan]]), "floating-point pixels must be .*, got NaN"),
        (np.float32([[0.5, np.inf]]), "floating-point pixels must be .*, got 0.5 to inf"),
        (np.int32([[0, 2**31 - 1]]), "32-bit integer pixels must be 0 .black. to 255 .white., got 0 to 2.14748e.09"),
        (np.int32([[-1, 5]]), "32-bit integer pixels must be .*, got -1 to 5"),
        (np.int32([[0, 4095]]), "32-bit integer pixels must be .*, got 0 to 4095"),
    ],
)
def test_an_image_with_pixels_out_of_range_is_refused(tmp_path, array, complaint):
    Image.fromarray(array).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match=f"a.tiff: {complaint}"):
        read_image(tmp_path / "a.tiff")
    with pytest.raises(InputError, match=f"^preprocess: {complaint}"):
        image_tensor(Image.open(tmp_path / "a.tiff"), 8, 3)


DEEP = {
    "16 bits": (GREY.astype(np.uint16) * 257, {}),
    "floats": (GREY.astype(np.float32) / 255, {"sample_format": 3}),
    "12 bits": (GREY.astype(np.uint16) * 16 + 5, {"twelve_bits": True}),
    "8 bits": (GREY, {}),
}


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("deflate", [False, True])
def test_grey_tiff_files_of_every_depth_are_read_if_pillow_decodes_them(tmp_path, name, white_is_zero, deflate):
    array, options = DEEP[name]
    write_tiff(tmp_path / "a.tiff", array, photometric=1 - white_is_zero, deflate=deflate, **options)
    wanted = 255 - GREY if white_is_zero else GREY
    if name == "12 bits" and white_is_zero:  # Pillow knows no such mode
        with pytest.raises(InputError, match="a.tiff: the file must be a readable image"):
            read_image(tmp_path / "a.tiff")
        return
    assert np.array_equal(read(tmp_path / "a.tiff", "L"), wanted)
    assert np.array_equal(image_tensor(Image.open(tmp_path / "a.tiff"), 16, 1)[0].numpy(), wanted)


DEEP_COLOURS = COLOURS.astype(np.uint16) * 257
ALPHA = np.concatenate([COLOURS, np.full((16, 16, 1), 255, np.uint8)], 2)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize(
    ("array", "options", "wanted"),
    [
        pytest.param(COLOURS, {"photometric": 2}, COLOURS, id="RGB"),
        pytest.param(ALPHA, {"photometric": 2, "extra_samples": 2}, COLOURS, id="RGBA"),
        pytest.param(ALPHA[..., 2:], {"extra_samples": 2}, COLOURS[..., 2:].repeat(3, 2), id="LA"),
    ],
)
def test_samples_of_a_tiff_file_in_every_order_are_right_or_refused(
    tmp_path, array, options, wanted, deep, planes, deflate, big_endian
):
    array = array.astype(np.uint16) * 257 if deep else array
    write_tiff(tmp_path / "a.tiff", array, planes=planes, deflate=deflate, big_endian=big_endian, **options)
    if (planes == 2 and (array.shape[2] == 2 or (deep and not deflate))) or (deep and array.shape[2] == 2):
        with pytest.raises(InputError, match=r"a.tiff: (the file must be a readable|pixels must be those that)"):
            read_image(tmp_path / "a.tiff")
    else:
        assert np.array_equal(read(tmp_path / "a.tiff"), wanted)


@pytest.mark.parametrize(
    ("array", "options", "found"),
    [
        (
            GREY.astype(np.float32) / 255,
            {"sample_format": 3, "deflate": True, "big_endian": True},
            "compressed ones of",
        ),
        (GREY.astype(np.int32) * 0, {"sample_format": 2, "deflate": True, "big_endian": True}, "compressed ones of"),
        (
            DEEP_COLOURS,
            {"photometric": 2, "planes": 2, "tags": {258: [16]}},
            "uncompressed ones of 16 bits in separate",
        ),
        (
            COLOURS,
            {"photometric": 2, "planes": 2, "tags": {266: [2]}},
            "uncompressed ones of 8 bits in separate planes",
        ),
        (COLOURS, {"photometric": 8, "planes": 2}, "those of mode LAB in separate planes"),
        (COLOURS, {"photometric": 8, "planes": 2, "deflate": True}, "those of mode LAB in separate planes"),
        (COLOURS, {"photometric": 6, "tags": {530: [2, 2]}}, "uncompressed YCbCr with subsampling"),
        (COLOURS, {"photometric": 6}, "uncompressed YCbCr with subsampling"),  # 2 x 2 without the tag
        (GREY.astype(np.int8), {"sample_format": 2}, "signed ones of 8 bits in a TIFF file; save the image"),
    ],
)
def test_a_tiff_file_that_pillow_decodes_to_other_pixels_is_refused(tmp_path, array, options, found):
    write_tiff(tmp_path / "a.tiff", array, **options)
    complaint = f"pixels must be those that Pillow decodes, got {found}"
    with pytest.raises(InputError, match=f"a.tiff: {complaint}"):
        read_image(tmp_path / "a.tiff")
    with pytest.raises(InputError, match=f"^preprocess: {complaint}"):
        image_tensor(Image.open(tmp_path / "a.tiff"), 16, 1)


def test_a_tiff_palette_of_8_bits_is_read_like_one_of_16(tmp_path):
    colours = np.random.default_rng(1).integers(0, 256, (3, 256))
    for scale in (1, 257):
        tags = {320: (colours * scale).ravel().tolist()}
        write_tiff(tmp_path / "a.tiff", GREY, photometric=3, tags=tags)
        assert np.array_equal(read(tmp_path / "a.tiff"), colours.T[GREY])


@pytest.mark.parametrize("deflate", [False, True])
def test_damaged_data_of_a_tiff_file_are_refused(tmp_path, deflate):
    pixels = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    kind = {"photometric": 6, "tags": {530: [1, 1]}} if deflate else {"photometric": 2}
    write_tiff(tmp_path / "a.tiff", pixels, deflate=True, **kind)
    content = bytearray((tmp_path / "a.tiff").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    (tmp_path / "a.tiff").write_bytes(content)
    with pytest.raises(InputError, match="a.tiff: the file must be a readable image, got .*libtiff: "):
        read_image(tmp_path / "a.tiff")


def test_a_fits_file_of_16_bits_is_refused(tmp_path):
    cards = ["SIMPLE  = T", "BITPIX  = 16", "NAXIS   = 2", "NAXIS1  = 4", "NAXIS2  = 4", "BZERO   = 32768", "END"]
    header = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    (tmp_path / "a.fits").write_bytes(header + bytes(2880))
    with pytest.raises(
        InputError, match="a.fits: pixels must be those that Pillow decodes, got those of 16 bits in a F"
    ):
        read_image(tmp_path / "a.fits")


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "F", "P", "RGB", "RGBA", "CMYK", "LAB"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_uncompressed_tiff_file_is_turned_upright(tmp_path, mode, orientation):
    colours = Image.fromarray(COLOURS[:9])  # 16 x 9 pixels
    deep = {"I;16": GREY[:9].astype(np.uint16) * 257, "F": GREY[:9].astype(np.float32) / 255}
    image = Image.fromarray(deep[mode]) if mode in deep else colours.convert(mode)
    for compression in ("raw", "tiff_lzw"):
        image.save(tmp_path / f"{compression}.tiff", tiffinfo={274: orientation}, compression=compression)
    image.save(tmp_path / "plain.tiff")
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)  # of `Image.Transpose`
    plain = read_image(tmp_path / "plain.tiff")
    wanted = pixels(plain if turn is None else plain.transpose(Image.Transpose(turn)))
    assert np.array_equal(read(tmp_path / "raw.tiff"), wanted)
    assert np.array_equal(read(tmp_path / "tiff_lzw.tiff"), wanted)


@pytest.mark.parametrize("suffix", ["png", "pgm"])
def test_16_bit_grey_of_a_format_that_pillow_opens_with_mode_i_keeps_its_upper_8_bits(tmp_path, suffix):
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / f"a.{suffix}")
    assert np.array_equal(read(tmp_path / f"a.{suffix}", "L"), GREY)


def test_transparent_pixels_of_16_bits_become_white(tmp_path):
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "a.png", transparency=3 * 257)
    expected = np.where(GREY == 3, 255, GREY)
    assert np.array_equal(read(tmp_path / "a.png", "L"), expected)


def write_png(path: Path, bits: int, colour_type: int, transparent: bytes, rows: np.ndarray) -> None:
    """A PNG file of 4 x 4 pixels."""
    header = struct.pack(">IIBBBBB", 4, 4, bits, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = {b"IHDR": header, b"tRNS": transparent, b"IDAT": data, b"IEND": b""}
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")
            for name, content in chunks.items()
        )
    )


def test_the_transparent_colour_of_a_png_file_of_16_bits_becomes_white(tmp_path):
    colours = np.random.default_rng(3).integers(0, 1 << 16, (4, 4, 3))
    colours[1, 2] = (0x2001, 0x4002, 0x8003)
    colours[0, 0] = (0x0101, 0x0202, 0x0303)  # the lower bytes of the transparent colour
    write_png(tmp_path / "a.png", 16, 2, struct.pack(">HHH", 0x2001, 0x4002, 0x8003), colours.astype(">u2"))
    wanted = colours >> 8
    wanted[1, 2] = 255
    assert np.array_equal(read(tmp_path / "a.png"), wanted)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_transparent_pixels_of_a_png_file_with_few_grey_levels_become_white(tmp_path, bits):
    levels = (np.arange(16).reshape(4, 4) % (1 << bits)).astype(np.uint8)
    rows = np.packbits(np.unpackbits(levels[..., None], axis=2)[..., 8 - bits :].reshape(4, -1), axis=1)
    write_png(tmp_path / "a.png", bits, 0, (1).to_bytes(2, "big"), rows)
    wanted = np.where(levels == 1, 255, levels.astype(int) * 255 // ((1 << bits) - 1))
    assert np.array_equal(read(tmp_path / "a.png", "L"), wanted)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_opaque_colours_of_every_mode_are_kept(mode):
    image = Image.fromarray(COLOURS // 2 + 64)  # colours that each mode has
    converted = image_tensor(image.convert(mode), 16, 3).permute(1, 2, 0).numpy().astype(int)
    expected = image.convert({"1": "1", "L": "L", "P": "P"}.get(mode, "RGB"))
    tolerance = {"YCbCr": 4, "HSV": 6, "LAB": 6}.get(mode, 0)  # their pixels have 8 bits too
    assert np.abs(converted - pixels(expected)).max() <= tolerance


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_transparent_parts_of_every_mode_become_white(mode):
    alpha = np.zeros((16, 16, 1), np.uint8)
    alpha[:8] = 255
    image = Image.fromarray(np.concatenate([COLOURS, alpha], 2))
    image = image.convert("LA") if mode in ("LA", "La") else image
    image = image.convert("RGB").quantize(256) if mode == "PA" else image
    if mode == "PA":
        image = image.convert("PA")
        image.putalpha(Image.fromarray(alpha[..., 0]))
    image = image.convert(mode)
    found = image_tensor(image, 16, 3).permute(1, 2, 0).numpy()
    expected = pixels(Image.fromarray(COLOURS).convert("L") if mode[0] == "L" else Image.fromarray(COLOURS))
    if mode == "PA":
        expected = pixels(Image.fromarray(COLOURS).quantize(256))
    assert (found[8:] == 255).all() and np.array_equal(found[:8], expected[:8])


def icc(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", connection: bytes = b"XYZ ") -> bytes:
    """A profile of version 2, written by hand."""
    header = bytearray(128)
    header[8:12] = bytes([2, 0x40, 0, 0])
    header[12:24] = kind + space + connection
    header[36:40] = b"acsp"
    header[68:80] = xyz(0.9642, 1.0, 0.8249)[8:]
    table, data, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + (start + len(data)).to_bytes(4, "big") + len(content).to_bytes(4, "big")
        data += content + b"\0" * (-len(content) % 4)
    whole = header + len(tags).to_bytes(4, "big") + table + data
    whole[0:4] = len(whole).to_bytes(4, "big")
    return bytes(whole)


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(round(value * 65536).to_bytes(4, "big", signed=True) for value in values)


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + (1).to_bytes(4, "big") + round(value * 256).to_bytes(2, "big")


WHITE = {b"wtpt": xyz(0.9642, 1.0, 0.8249)}
GAMMA_GREY = icc(b"GRAY", WHITE | {b"kTRC": gamma(1.0)})
# The primaries of Adobe RGB (1998), adapted to D50.
WIDE = {
    b"rXYZ": xyz(0.60974, 0.31111, 0.01947),
    b"gXYZ": xyz(0.20528, 0.62567, 0.06087),
    b"bXYZ": xyz(0.14919, 0.06322, 0.74457),
}
_IDENTITY = (np.eye(3) * 65536).astype(">i4").tobytes()
_LEVELS = bytes(range(256))
# A table of 2 x 2 x 2 x 2 colours in CIE L*a*b*: white without ink, black with any ink.
_TABLE = bytes([255, 128, 128]) + bytes([0, 128, 128]) * 15
_LUT = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + _IDENTITY + _LEVELS * 4 + _TABLE + _LEVELS * 3
BLACK_INKS = icc(b"CMYK", WHITE | {b"A2B0": _LUT}, b"prtr", b"Lab ")
WIDE_RGB = icc(b"RGB ", WHITE | WIDE | {curve: gamma(2.2) for curve in (b"rTRC", b"gTRC", b"bTRC")})


def test_a_wide_gamut_profile_is_converted_to_srgb(tmp_path):
    green = np.full((4, 4, 3), (60, 200, 60), np.uint8)
    for suffix in ("png", "tiff", "jpg", "webp"):
        options = {"quality": 100} if suffix in ("jpg", "webp") else {}
        Image.fromarray(green).save(tmp_path / f"a.{suffix}", icc_profile=WIDE_RGB, **options)
        found = read(tmp_path / f"a.{suffix}")
        assert found[0, 0, 0] < 25 and abs(found[0, 0, 1] - 201) < 6  # Adobe RGB's green is outside of sRGB
        assert "icc_profile" not in read_image(tmp_path / f"a.{suffix}").info
    assert np.array_equal(image_tensor(Image.open(tmp_path / "a.png"), 4, 3).permute(1, 2, 0), read(tmp_path / "a.png"))


def test_a_grey_profile_is_converted_and_transparency_stays(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png", icc_profile=GAMMA_GREY)
    linear = np.rint(255 * np.clip(1.055 * (GREY / 255) ** (1 / 2.4) - 0.055, 0, 1))
    assert np.abs(read(tmp_path / "a.png", "L") - linear).max() <= 1
    half = Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(np.where(GREY < 128, 255, 0).astype(np.uint8))))
    half.save(tmp_path / "half.png", icc_profile=GAMMA_GREY)
    found = read(tmp_path / "half.png", "L")
    assert np.abs(found - linear)[GREY < 128].max() <= 1 and (found[GREY >= 128] == 255).all()


def test_an_srgb_profile_changes_nothing(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, image in {"rgb": Image.fromarray(COLOURS), "grey": Image.fromarray(GREY)}.items():
        image.save(tmp_path / f"{name}.png", icc_profile=srgb)
        assert np.array_equal(read(tmp_path / f"{name}.png"), pixels(image))


def test_a_lab_image_with_a_lab_profile_is_converted(tmp_path):
    lab = Image.fromarray(np.full((4, 4, 3), (128, 60, 100), np.uint8)).convert("LAB")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    lab.save(tmp_path / "lab.tiff", icc_profile=profile)
    lab.save(tmp_path / "plain.tiff")
    for name in ("lab", "plain"):
        assert np.abs(read(tmp_path / f"{name}.tiff")[0, 0] - (128, 60, 100)).max() <= 3


@pytest.mark.parametrize(
    ("profile", "mode", "reason"),
    [
        (b"not a profile", "RGB", "cannot open profile from string"),
        (WIDE_RGB[:200], "RGB", "cannot"),
        (WIDE_RGB, "CMYK", "it is for RGB, and the image is CMYK"),
        (GAMMA_GREY, "RGB", "it is for GRAY, and the image is RGB"),
    ],
)
def test_a_profile_that_is_damaged_or_does_not_fit_is_ignored_with_a_warning(tmp_path, profile, mode, reason):
    image = Image.fromarray(COLOURS).convert(mode)
    for name in "ab":  # equal warnings about two files
        image.save(tmp_path / f"{name}.tiff", icc_profile=profile)
        with pytest.warns(UserWarning, match=f"{name}.tiff: the colour profile is ignored: {reason}"):
            found = read(tmp_path / f"{name}.tiff")
        assert np.array_equal(found, pixels(image))


def test_a_cmyk_profile_is_used(tmp_path):
    cyan = Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    for name in ("a.tiff", "a.jpg"):
        cyan.save(tmp_path / name)
        assert np.abs(read(tmp_path / name)[0, 0] - (0, 255, 255)).max() <= 2  # Pillow's formula
        cyan.save(tmp_path / name, icc_profile=BLACK_INKS)
        assert read(tmp_path / name).max() <= 2
    Image.new("CMYK", (4, 4), (0, 0, 0, 0)).save(tmp_path / "white.tiff", icc_profile=BLACK_INKS)
    assert read(tmp_path / "white.tiff").min() >= 253


@pytest.mark.parametrize(("tag", "value"), [(274, 0), (274, 9), (296, 0), (334, 0)])
def test_harmless_errors_of_libtiff_are_warnings(tmp_path, tag, value):
    """They are about Orientation, ResolutionUnit and NumberOfInks."""
    write_tiff(tmp_path / "a.tiff", COLOURS, photometric=2, deflate=True, tags={tag: [value]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(read(tmp_path / "a.tiff"), COLOURS)


def test_a_file_with_many_errors_gives_a_short_line(tmp_path):
    rows = np.random.default_rng(4).random((400, 1728)) < 0.5
    Image.fromarray(rows).save(tmp_path / "a.tiff", compression="group3")
    content = bytearray((tmp_path / "a.tiff").read_bytes())
    content[200 : len(content) - 400 : 301] = bytes(len(content[200 : len(content) - 400 : 301]))
    (tmp_path / "a.tiff").write_bytes(content)
    with pytest.raises(InputError, match="got libtiff: .*; and [0-9]+ more$") as caught:
        read_image(tmp_path / "a.tiff")
    assert len(str(caught.value)) < 700


def test_an_opened_file_is_converted_like_its_name(tmp_path):
    colours = np.random.default_rng(1).integers(0, 256, (3, 256))
    write_tiff(tmp_path / "a.tiff", GREY, photometric=3, tags={320: colours.ravel().tolist()})
    opened = Image.open(tmp_path / "a.tiff")
    for _ in range(2):
        assert np.array_equal(image_tensor(opened, 16, 3).permute(1, 2, 0).numpy(), read(tmp_path / "a.tiff"))


def _xbm(width: int, *rows: int) -> bytes:
    values = ", ".join(f"0x{row:02x}" for row in rows)
    text = f"#define im_width {width}\n#define im_height {len(rows)}\nstatic char im_bits[] = {{\n{values}}};\n"
    return text.encode()


def _psd(mode: int, depth: int, width: int, height: int, data: bytes) -> bytes:
    """A PSD file of one channel; `data` begins with the kind of compression."""
    return b"8BPS" + struct.pack(">H6xHIIHH", 1, 1, height, width, depth, mode) + bytes(12) + data


BLACK_AND_WHITE = {
    # In these formats a set bit is black. XBM stores the leftmost pixel in the least significant bit.
    "a.xbm": (_xbm(8, 0x0F, 0x01), [[0] * 4 + [255] * 4, [0] + [255] * 7]),
    "raw.psd": (_psd(0, 1, 8, 2, b"\0\0\xf0\x80"), [[0] * 4 + [255] * 4, [0] + [255] * 7]),
    "packbits.psd": (_psd(0, 1, 8, 2, b"\0\1\0\2\0\2\0\xf0\0\x80"), [[0] * 4 + [255] * 4, [0] + [255] * 7]),
    "p1.pbm": (b"P1\n2 2\n0 1\n1 0\n", [[255, 0], [0, 255]]),
    "p4.pbm": (b"P4\n2 2\n\x40\x80", [[255, 0], [0, 255]]),
    "a.ras": (struct.pack(">8I", 0x59A66A95, 8, 1, 1, 2, 1, 0, 0) + b"\xf0\0", [[0] * 4 + [255] * 4]),
    # In PCX a set bit is white.
    "a.pcx": (
        struct.pack("<BBBB6H48sBBHH58x", 10, 5, 1, 1, 0, 0, 7, 0, 72, 72, b"", 0, 1, 2, 1) + b"\xc1\xf0\0",
        [[255] * 4 + [0] * 4],
    ),
    "grey.psd": (_psd(1, 8, 2, 1, b"\0\0\x40\xc8"), [[0x40, 0xC8]]),
}


@pytest.mark.parametrize("name", BLACK_AND_WHITE)
def test_black_is_black_in_files_of_1_bit_per_pixel(tmp_path, name):
    content, levels = BLACK_AND_WHITE[name]
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name, "L").tolist() == levels
    assert read(tmp_path / name)[..., 1].tolist() == levels
    height, width = np.shape(levels)
    if height == width:
        with Image.open(tmp_path / name) as opened:
            assert image_tensor(opened, width, 1)[0].tolist() == levels


def test_an_opened_xbm_file_is_converted_before_and_after_its_pixels_are_loaded(tmp_path):
    (tmp_path / "a.xbm").write_bytes(_xbm(8, *[0x0F] * 8))
    with Image.open(tmp_path / "a.xbm") as opened:
        for _ in range(2):
            assert image_tensor(opened, 8, 1)[0].tolist() == [[0] * 4 + [255] * 4] * 8


def _psd_of_channels(mode: int, channels: list[bytes], *, is_packed: bool = False, layers: int | None = None) -> bytes:
    """A PSD file of one row; its layer section has a number of layers, negative if the fourth channel is alpha."""
    section = struct.pack(">I", 0) if layers is None else struct.pack(">IIhI", 10, 2, layers, 0)
    packed = [bytes([len(row) - 1]) + row for row in channels]
    if is_packed:
        data = b"\0\1" + b"".join(struct.pack(">H", len(row)) for row in packed) + b"".join(packed)
    else:
        data = b"\0\0" + b"".join(channels)
    header = struct.pack(">H6xHIIHH", 1, len(channels), 1, len(channels[0]), 8, mode)
    return b"8BPS" + header + bytes(8) + section + data


@pytest.mark.parametrize(("mode", "channels"), [(1, 2), (3, 5), (4, 5)], ids=["grey", "RGB", "CMYK"])
def test_packed_psd_files_with_more_channels_than_pillow_reads_are_refused(tmp_path, mode, channels):
    rows = [bytes([0, 40, 80])] * channels
    path = tmp_path / "a.psd"
    path.write_bytes(_psd_of_channels(mode, rows, is_packed=True))
    with pytest.raises(InputError, match="a.psd: pixels must be .*, got compressed ones with more channels in a PSD"):
        read_image(path)
    path.write_bytes(_psd_of_channels(mode, rows))
    expected = [0, 40, 80] if mode != 4 else [0, 6, 25]
    assert np.abs(read(path, "L")[0].astype(int) - expected).max() <= 1
    path.write_bytes(_psd_of_channels(1, rows[:1], is_packed=True))
    assert read(path, "L").tolist() == [[0, 40, 80]]


@pytest.mark.parametrize(("layers", "is_alpha"), [(None, False), (1, False), (0, False), (-1, True)])
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_fourth_channel_of_a_psd_file_is_alpha_if_its_layers_say_so(tmp_path, layers, is_alpha, is_packed):
    rows = [bytes([10, 20])] * 3 + [bytes([255, 0])]
    (tmp_path / "a.psd").write_bytes(_psd_of_channels(3, rows, is_packed=is_packed, layers=layers))
    assert read(tmp_path / "a.psd", "L").tolist() == [[10, 255 if is_alpha else 20]]


@pytest.mark.parametrize(("alpha_bits", "expected"), [(0, [200, 20, 10]), (8, [255, 255, 255])])
def test_the_fourth_byte_of_a_tga_file_is_alpha_if_its_header_says_so(tmp_path, alpha_bits, expected):
    header = struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 2, 1, 32, 0x20 | alpha_bits)
    (tmp_path / "a.tga").write_bytes(header + bytes([10, 20, 200, 0]) * 2)
    assert read(tmp_path / "a.tga").tolist() == [[expected] * 2]


@pytest.mark.parametrize("kind", [1, 3])
def test_sun_raster_files_of_32_bits_are_refused(tmp_path, kind):
    header = struct.pack(">8I", 0x59A66A95, 2, 2, 32, 16, kind, 0, 0)
    (tmp_path / "a.ras").write_bytes(header + bytes([0, 10, 20, 200]) * 4)
    with pytest.raises(InputError, match="a.ras: pixels must be .*, got those of 32 bits in a Sun raster file"):
        read_image(tmp_path / "a.ras")


def test_a_gif_frame_of_grey_levels_does_not_get_the_palette_of_the_file(tmp_path):
    grey = bytes(level for i in range(4) for level in (i, i, i))
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0x81) + grey + b"\2\2\x4c\1\0"
    header = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x81, 0, 0) + bytes([255, 0, 0] * 4)
    (tmp_path / "a.gif").write_bytes(header + frame + b";")
    assert read(tmp_path / "a.gif").tolist() == [[[1, 1, 1]]]


def _gif(left: int, transparent: int | None = None, *, grey: bool = False) -> bytes:
    """A GIF file of 2 x 1 pixels with a frame of one pixel, whose colour is the second of the palette."""
    palette = bytes([9, 9, 9, 200, 200, 200]) if grey else bytes([255, 0, 0, 0, 255, 0])
    control = b"" if transparent is None else b"\x21\xf9\x04\1\0\0" + bytes([transparent, 0])
    frame = b"\x2c" + struct.pack("<HHHHB", left, 0, 1, 1, 0) + b"\2\2\x4c\1\0"
    return b"GIF89a" + struct.pack("<HHBBB", 2, 1, 0x80, 0, 0) + palette + control + frame + b";"


@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("transparent", [None, 0])
@pytest.mark.parametrize("grey", [False, True])
def test_what_the_first_frame_of_a_gif_file_does_not_cover_is_white(tmp_path, left, transparent, grey):
    (tmp_path / "a.gif").write_bytes(_gif(left, transparent, grey=grey))
    expected = [[[255, 255, 255]] * 2]
    expected[0][left] = [200] * 3 if grey else [0, 255, 0]
    assert read(tmp_path / "a.gif").tolist() == expected
    with Image.open(tmp_path / "a.gif") as opened:
        opened.load()
        assert image_tensor(opened, 1, 3).shape == (3, 1, 1)


def test_a_later_frame_of_a_gif_file_is_converted_as_it_was_opened(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[1].paste("red", (0, 0, 2, 4))  # the second frame covers what changes
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.gif") as opened:
        opened.seek(1)
        assert np.array_equal(image_tensor(opened, 4, 3).permute(1, 2, 0).numpy(), pixels(frames[1]))


def _ico(bitmap: bytes, size: int) -> bytes:
    entry = struct.pack("<4B2H2I", size, size, 0, 0, 1, 32, len(bitmap), 22)
    return struct.pack("<3H", 0, 1, 1) + entry + bitmap


@pytest.mark.parametrize(("alpha", "is_opaque"), [((0,) * 4, True), ((255,) * 4, True), ((0, 0, 0, 255), False)])
def test_the_fourth_byte_of_an_icon_is_alpha_unless_it_is_0_everywhere(tmp_path, alpha, is_opaque):
    header = struct.pack("<3I2H6I", 40, 2, 4, 1, 32, 0, 16, 0, 0, 0, 0)
    bitmap = header + b"".join(bytes([30, 20, 10, value]) for value in alpha) + bytes(8)  # and an empty mask
    (tmp_path / "a.ico").write_bytes(_ico(bitmap, 2))
    wanted = np.full((2, 2, 3), (10, 20, 30), np.uint8)
    found = read(tmp_path / "a.ico")
    assert np.array_equal(found, wanted) == is_opaque
    with Image.open(tmp_path / "a.ico") as image:
        assert np.array_equal(image_tensor(image, 2, 3).permute(1, 2, 0).numpy(), found)


def test_a_transparent_png_image_in_an_icon_is_white(tmp_path):
    png = io.BytesIO()
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(png, "PNG")
    (tmp_path / "a.ico").write_bytes(_ico(png.getvalue(), 2))
    assert (read(tmp_path / "a.ico") == 255).all()
