"""Encodes a folder of images; writes and reads folders of codes."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hashengine import _progress
from hashengine._defaults import BATCH_SIZE, CODES_MARKER, is_split
from hashengine._files import read_unchanged, replace_folder
from hashengine._threads import thread_pool
from hashengine._validation import DeviceName, check_code_array, check_device, check_integer, check_path, is_path
from hashengine.errors import InputError, brief, invalid, unusable
from hashengine.evaluation.records import (
    EncodeRecord,
    Item,
    Unreadable,
    check_items,
    items_digest,
    read_items,
    write_items,
)
from hashengine.images import FoundImages, find_images, label_of, read_image
from hashengine.models import HashNet
from hashengine.models.checkpoint import CONFIG_FILE, WEIGHTS_FILE, fingerprint


@dataclass(frozen=True)
class CodesFolder:
    """The codes of a folder of images.

    Attributes:
        codes: uint8 [N, bits / 8].
        items: the N images.
        record: from which images and by which model the codes were made.
    """

    codes: np.ndarray
    items: list[Item]
    record: EncodeRecord

    def described(self) -> EncodeRecord:
        """`record` with the number and the digests of these codes and items, which a caller may have changed.

        Raises:
            InputError: the parts do not belong together, as `check_codes_folder` describes.
        """
        check_codes_folder("CodesFolder.described", "codes", self)
        digests = {"codes_sha256": codes_digest(self.codes), "items_sha256": items_digest(self.items)}
        return self.record.model_copy(update=digests | {"count": len(self.items)})

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the codes to `folder`; an earlier codes folder there is replaced atomically.

        Raises:
            InputError: `folder` exists and is neither empty nor a codes folder, or the parts do not belong together.
        """
        folder = check_path("encode", "output", folder)
        check_codes_folder("encode", "codes", self)
        with replace_folder(folder, marker=CODES_MARKER, where="encode") as temporary:
            np.save(temporary / "codes.npy", self.codes)
            write_items(temporary / "items.csv", self.items)
            self.described().write(temporary / "encode.json")

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], where: str = "CodesFolder.load", argument: str = "codes"
    ) -> CodesFolder:
        """Read what `save` wrote. A save at the same time is not mixed with the earlier one.

        Args:
            folder: the codes folder.
            where: the function or command to name in an error.
            argument: the argument of that function or command to name in an error.

        Raises:
            InputError: a file is missing, damaged or inconsistent with the others.
        """
        path = check_path(where, argument, folder)
        return read_unchanged([path / "encode.json"], lambda: cls._read(path, where, argument))

    @classmethod
    def _read(cls, folder: Path, where: str, argument: str) -> CodesFolder:
        if not is_codes_folder(folder):
            raise invalid(where, argument, "a codes folder written by 'hashengine encode'", repr(str(folder)))
        record = EncodeRecord.read(folder / "encode.json", where, argument, "hashengine encode")
        items = read_items(folder / "items.csv", where, argument)
        check_items(items, [record], folder / "items.csv", where, argument)
        path = folder / "codes.npy"
        if not path.is_file():  # opening a pipe would wait
            raise invalid(where, argument, "a codes folder with a file codes.npy", f"{str(folder)!r} without one")
        try:
            codes = np.load(path, allow_pickle=False)
        except PermissionError as error:
            raise unusable(where, argument, repr(str(path)), error.strerror) from None
        except Exception as error:  # numpy evaluates the header of a damaged file, which may raise anything
            raise invalid(where, argument, f"an array in {str(path)!r}", error) from None
        if not isinstance(codes, np.ndarray):
            raise invalid(where, argument, f"an array in {str(path)!r}", "an archive of arrays")
        shape = (record.count, record.bits // 8)
        if len(items) != record.count:
            expected = f"a codes folder with {record.count} images in items.csv, as encode.json says"
            raise invalid(where, argument, expected, len(items), "encode again")
        if codes.dtype != np.uint8 or codes.shape != shape:
            expected = f"uint8 {list(shape)} in {str(path)!r}, as items.csv and encode.json say"
            raise invalid(where, argument, expected, f"{codes.dtype} {list(codes.shape)}")
        if record.codes_sha256 not in ("", codes_digest(codes)):
            expected = f"the codes in {str(path)!r} that encode.json describes"
            raise invalid(where, argument, expected, "others: the file is damaged or was replaced", "encode again")
        loaded = cls(codes, items, record)
        check_codes_folder(where, argument, loaded)
        return loaded


def _can_be_written(item: Item) -> bool:
    """Whether items.csv can hold the item, so that a reader gets it back."""
    if type(item.id) is not int or not (isinstance(item.path, str) and isinstance(item.label, str)):
        return False
    return is_path(item.path) and (item.label == "" or is_path(item.label))


def check_codes_folder(where: str, argument: str, codes: object) -> None:
    """Require a `CodesFolder` whose parts belong together: codes of the record's bits, and one item per code.

    The id of an item must be its row. The count in the record may be another one, because `CodesFolder.described`
    counts the items.

    Raises:
        InputError: they do not; the error names `where` and `argument`.
    """
    if not isinstance(codes, CodesFolder):
        raise invalid(where, argument, "a CodesFolder", type(codes).__name__, "CodesFolder.load reads one")
    if not isinstance(codes.codes, np.ndarray):
        raise invalid(where, argument, "codes in a numpy array", type(codes.codes).__name__)
    bits = codes.record.bits
    if bits < 8 or bits % 8:
        raise invalid(where, argument, "codes of a positive multiple of 8 bits, in the record too", bits)
    check_code_array(where, argument, codes.codes, bits)
    if len(codes.items) != len(codes.codes):
        raise invalid(where, argument, f"{len(codes.codes)} codes with one item each", f"{len(codes.items)} items")
    if wrong := next((item for item in codes.items if not _can_be_written(item)), None):
        expected = "codes whose items have an integer id, and text that a file can hold as path and label"
        raise invalid(where, argument, expected, brief(repr(tuple(wrong))))
    if other := next((item for row, item in enumerate(codes.items) if item.id != row), None):
        expected = "codes whose items have their rows, counted from 0, as ids"
        raise invalid(where, argument, expected, f"the id {other.id} for {other.path!r}", "number the items again")


def codes_digest(codes: np.ndarray) -> str:
    """SHA-256 of codes."""
    return hashlib.sha256(np.ascontiguousarray(codes).data).hexdigest()


def is_codes_folder(folder: Path) -> bool:
    """Whether `folder` is an output of 'hashengine encode', which writes encode.json."""
    return (folder / "encode.json").is_file()


def encode_folder(
    folder: str | os.PathLike[str],
    model: str | os.PathLike[str],
    *,
    batch_size: int = BATCH_SIZE,
    device: DeviceName = "auto",
    warn: Callable[[str], None] = _progress.note,
    where: str = "encode",
) -> CodesFolder:
    """Encode all images under `folder`, at any depth, in the order of their paths.

    `hashengine.images.find_images` describes which files are images.

    Args:
        folder: a folder of images, or an image file. The label of an image is the name of the first folder below
            `folder` on the image's path, or "" if there is none.
        model: a folder written by `HashNet.save_pretrained`.
        batch_size: images per call of the network.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        warn: called with one line for each image, file or folder that cannot be read, and one line for all files that
            are no images. All of these are skipped and recorded. By default the line is written to stderr.
        where: the function or command to name in an error.

    Raises:
        InputError: there is no such folder, model or device, `batch_size` is below 1, or no image can be read.
    """
    # A tensor cannot be split into parts of a size beyond 63 bits.
    batch_size = min(check_integer(where, "batch_size", batch_size, 1), 1 << 31)
    folder = _normal(check_path(where, "folder", folder))
    model = check_path(where, "model", model)
    is_single = folder.is_file()
    found = FoundImages([folder], [], []) if is_single else find_images(folder, where)
    chosen = check_device(where, device, auto=True)
    identity, network = read_unchanged(
        [model / CONFIG_FILE, model / WEIGHTS_FILE],
        lambda: (fingerprint(model, where), HashNet.from_pretrained(model)),
    )
    network = network.to(chosen).eval()

    start = time.perf_counter()
    codes: list[np.ndarray] = []
    items: list[Item] = []
    errors: list[Unreadable] = []
    if is_split(folder):
        warn(f"{folder} is a split: its sides, 'database' and 'query', become the labels; name one of them instead")
    if found.others:
        warn(found.describe_others(folder))
    for path, reason in found.unopened:
        warn(f"skipped: {path}: {reason}")
        errors.append(Unreadable(path=str(path), reason=reason))
    for batch_paths, images in _batches(network, found.images, batch_size):
        readable = []
        for path, image in zip(batch_paths, images, strict=True):
            if isinstance(image, InputError):
                if is_single:
                    raise image
                warn(f"skipped: {image}")
                errors.append(Unreadable(path=str(path), reason=str(image)))
            else:
                readable.append(image)
                items.append(Item(len(items), str(path), "" if is_single else label_of(path, folder)))
        if readable:
            codes.append(network.encode(torch.stack(readable).to(chosen), batch_size).cpu().numpy())
    if not items:
        actual = f"{len(errors)} unreadable ones in {str(folder)!r}"
        raise invalid(where, "folder", "a folder with a readable image", actual)
    rows = np.concatenate(codes)
    record = EncodeRecord(
        bits=network.config.bits,
        count=len(items),
        source=str(folder),
        model=str(model.absolute()),
        fingerprint=identity,
        codes_sha256=codes_digest(rows),
        items_sha256=items_digest(items),
        device=str(chosen),
        seconds=time.perf_counter() - start,
        errors=errors,
        no_images=[str(path) for path in found.others],
    )
    return CodesFolder(rows, items, record)


def _normal(folder: Path) -> Path:
    """The absolute path without "..", so that the same folder has the same name; with it, if it is behind a link."""
    normal = Path(os.path.abspath(folder))
    try:
        return normal if normal.samefile(folder) else folder.absolute()
    except OSError:  # a mistake, which is reported later
        return folder.absolute()


def _batches(
    network: HashNet, paths: list[Path], size: int
) -> Iterator[tuple[list[Path], list[torch.Tensor | InputError]]]:
    """Yield batches of paths, and for each path the preprocessed image or the error that reading it raised.

    The images are decoded in threads, because Pillow releases the interpreter's lock. The next batch is decoded while
    the network encodes the current one. An exception, such as that of Ctrl-C, cancels what is not decoded yet.
    """

    def load(path: Path) -> torch.Tensor | InputError:
        try:
            return network.preprocess(read_image(path))
        except InputError as error:
            return error

    batches = [paths[start : start + size] for start in range(0, len(paths), size)]
    with thread_pool() as pool, _progress.task("encoding", len(paths), "img") as progress:
        ahead = pool.map(load, batches[0])  # starts to decode the first batch
        for batch, following in zip(batches, [*batches[1:], []], strict=True):
            images, ahead = ahead, pool.map(load, following)
            yield batch, list(images)
            progress.update(len(batch))
