"""A folder of images becomes a folder of codes."""

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from hashengine.errors import InputError
from hashengine.images import label_of, list_images, read_image
from hashengine.models import HashNet
from hashengine.models.checkpoint import WEIGHTS_FILE
from hashengine.retrieval.records import EncodeRecord, Item, Unreadable, new_folder, read_items, write_items


@dataclass(frozen=True)
class CodesFolder:
    """Codes (uint8 [N, bits/8]), the N images that they stand for, and how they came to be."""

    codes: np.ndarray
    items: list[Item]
    record: EncodeRecord

    def save(self, folder: str | os.PathLike) -> None:
        """Write to `folder`, whole or not at all; an earlier codes folder there is replaced.

        Raises:
            InputError: `folder` exists and is something else.
        """
        with new_folder(Path(folder), "encode.json", "output") as temporary:
            np.save(temporary / "codes.npy", self.codes)
            write_items(temporary / "items.csv", self.items)
            self.record.write(temporary / "encode.json")

    @classmethod
    def load(cls, folder: str | os.PathLike, argument: str = "codes") -> "CodesFolder":
        """Read what `save` wrote.

        Raises:
            InputError: a file is missing, damaged or at odds with the others; it names `argument`.
        """
        folder = Path(folder)
        if not is_codes_folder(folder):
            raise InputError(f"{argument}: expected a codes folder written by 'hashengine encode', got {str(folder)!r}")
        record = EncodeRecord.read(folder / "encode.json", argument, "hashengine encode")
        items = read_items(folder / "items.csv", argument)
        path = folder / "codes.npy"
        try:
            codes = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{argument}: expected an array in {str(path)!r}, got {error}") from None
        expected = (len(items), record.bits // 8)
        if codes.dtype != np.uint8 or codes.shape != expected:
            raise InputError(
                f"{argument}: expected uint8 {expected} in {str(path)!r}, as its items.csv and encode.json say, "
                f"got {codes.dtype} {codes.shape}"
            )
        return cls(codes, items, record)


def is_codes_folder(folder: Path) -> bool:
    """Whether `folder` is an output of 'hashengine encode' (its encode.json says so)."""
    return (folder / "encode.json").is_file()


def fingerprint(model: str | os.PathLike) -> str:
    """SHA-256 of the weights in the model folder `model`, which carry a copy of its config: one model, one value.

    Raises:
        InputError: `model` is not the folder of a saved model.
    """
    try:
        return hashlib.sha256(Path(model, WEIGHTS_FILE).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(
            f"model: expected a model folder with {WEIGHTS_FILE} in it, got {os.fspath(model)!r} ({error.strerror})"
        ) from None


def choose_device(device: str) -> torch.device:
    """The torch device of that name; "auto" is the GPU where torch sees one, else the CPU.

    Raises:
        InputError: torch knows no such device, or it is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: expected auto, cpu or cuda, got {device!r} ({str(error).splitlines()[0]})") from None
    return chosen


def encode_folder(
    folder: str | os.PathLike,
    model: str | os.PathLike,
    *,
    batch_size: int = 256,
    device: str = "auto",
    warn: Callable[[str], None] | None = None,
) -> CodesFolder:
    """Encode every image under `folder`, at any depth, in the order of their paths.

    Args:
        folder: the images; the first folder below it that an image lies in is its label. Or a single image file.
        model: a folder written by `HashNet.save_pretrained`.
        batch_size: images per call of the network.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        warn: called with one line for each image that cannot be read, which is skipped and recorded; prints to stderr
            where it is None.

    Raises:
        InputError: there is no such folder or model, or no image can be read.
    """
    if batch_size < 1:
        raise InputError(f"batch_size: expected at least 1, got {batch_size}")
    folder = Path(folder).absolute()
    is_single = folder.is_file()
    paths = [folder] if is_single else list_images(folder)
    chosen, identity = choose_device(device), fingerprint(model)
    network = HashNet.from_pretrained(model).to(chosen).eval()

    start = time.perf_counter()
    codes, items, errors = [], [], []
    for batch_paths, images in _batches(network, paths, batch_size):
        readable = []
        for path, image in zip(batch_paths, images, strict=True):
            if isinstance(image, InputError):
                if is_single:
                    raise image
                (warn or _print_to_stderr)(f"skipped: {image}")
                errors.append(Unreadable(path=str(path), reason=str(image)))
            else:
                readable.append(image)
                items.append(Item(len(items), str(path), "" if is_single else label_of(path, folder)))
        if readable:
            codes.append(network.encode(torch.stack(readable).to(chosen)).cpu().numpy())
    if not items:
        raise InputError(f"folder: expected a readable image in {str(folder)!r}, all of {len(errors)} are unreadable")
    record = EncodeRecord(
        bits=network.config.bits,
        count=len(items),
        source=str(folder),
        model=str(Path(model).absolute()),
        fingerprint=identity,
        device=str(chosen),
        seconds=time.perf_counter() - start,
        errors=errors,
    )
    return CodesFolder(np.concatenate(codes), items, record)


def _batches(network: HashNet, paths: list[Path], size: int) -> Iterator[tuple[list[Path], list]]:
    """Batches of paths with their preprocessed images, or the InputError of those that cannot be read.

    The images are decoded in threads (Pillow releases the interpreter lock) one batch ahead of the network.
    """

    def load(path: Path) -> torch.Tensor | InputError:
        try:
            return network.preprocess(read_image(path))
        except InputError as error:
            return error

    batches = [paths[start : start + size] for start in range(0, len(paths), size)]
    progress = tqdm(desc="encoding", total=len(paths), unit="img", leave=False, disable=None)
    with ThreadPoolExecutor() as pool, progress:
        ahead = pool.map(load, batches[0])  # starts at once
        for batch, following in zip_longest(batches, batches[1:], fillvalue=()):
            images, ahead = ahead, pool.map(load, following)
            yield batch, list(images)
            progress.update(len(batch))


def _print_to_stderr(line: str) -> None:
    tqdm.write(line, file=sys.stderr)  # beside the progress bar, not into it
