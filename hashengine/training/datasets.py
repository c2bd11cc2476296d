"""Writes a data set as two folders of class folders: `database`, to train on and to search in, and `query`."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from hashengine import _progress
from hashengine._defaults import DATA_SETS, SEED, SPLIT_FILE
from hashengine._files import check_output, is_empty, read_file, replace_folder
from hashengine._validation import check_integer, check_path
from hashengine.errors import InputError, invalid, missing_package
from hashengine.images import find_images, list_images
from hashengine.training.data import files_digest, list_classes

WHERE = "train prepare"  # the command that error messages name
DIGITS_QUERIES = 300
FOLDER_QUERY_SHARE = 0.1


class Picture(NamedTuple):
    """One image of a data set.

    Attributes:
        label: its class.
        name: its path within the class folder.
        content: uint8 pixels, or the file to copy.
    """

    label: str
    name: str
    content: np.ndarray | Path


class Split(NamedTuple):
    """A data set, divided into the database images and the query images."""

    database: list[Picture]
    query: list[Picture]


def check_folder(source: str | Path) -> None:
    """Require a folder of class folders that `prepare` can split.

    Raises:
        InputError: it is missing, cannot be read, or has no class of at least two different images.
    """
    list_images(str(source), WHERE)
    _class_folders(Path(source), SEED, None)


def prepare(
    source: str | Path,
    output: str | Path,
    *,
    seed: int = SEED,
    queries: int | None = None,
    root: str | Path | None = None,
) -> dict[str, Any]:
    """Write `output`/database/<class>/..., `output`/query/<class>/... and split.json; return the content of split.json.

    The folder appears under its name only when it is complete. If it already holds the same split, it is kept.
    Therefore an interrupted sequence of commands can be run again from its start.

    Args:
        source: "digits" (scikit-learn's 1,797 images of 8 x 8 pixels; by default, 300 become queries), "fashion-mnist"
            or "cifar10" (from torchvision; by default, all official test images are the queries), or a folder of class
            folders (by default, a tenth of its images become queries).
        output: the folder to write.
        seed: seed of every random choice. Queries are drawn from each class in proportion to its size.
        queries: the number of queries, instead of the default for `source`.
        root: the folder of torchvision's files. Missing files are downloaded to it. By default, it is in the user's
            cache.

    Raises:
        InputError: an argument is invalid, the data set is unknown or unusable, an extra is missing, or `output`
            contains anything else than this split.
    """
    check_path(WHERE, "source", source)
    source, output = str(source), check_path(WHERE, "output", output)
    root = None if root is None else check_path(WHERE, "root", root)
    seed = check_integer(WHERE, "seed", seed, 0)
    queries = None if queries is None else check_integer(WHERE, "queries", queries, 1)
    request: dict[str, Any] = {"version": 1, "source": source, "seed": seed, "queries_asked": queries}
    is_folder = source not in SOURCES and Path(source).is_dir()
    if source in SOURCES and Path(source).is_dir():
        _progress.note(f"{source!r} is the data set of this name; the folder of this name is './{source}'")
    check_output(WHERE, output, outside=(source,) if is_folder else (), is_folder=True)
    if is_folder:
        files = list_images(source, WHERE)
        request |= {"source": str(Path(source).resolve()), "files_sha256": files_digest(Path(source), files)}
        request |= {"contents_sha256": _contents_digest(Path(source), files)}
    if source not in SOURCES and not is_folder:
        raise invalid(WHERE, "source", f"{', '.join(SOURCES)} or a folder of class folders", repr(source))
    if output.exists() and (not output.is_dir() or not is_empty(output)):
        return _same_split(output, request)
    if source in SOURCES:
        split = SOURCES[source](seed, queries, root)
    else:
        split = _class_folders(Path(source), seed, queries)

    with replace_folder(output, marker=None, where=WHERE) as temporary:
        digests = {side: _write(pictures, temporary / side) for side, pictures in split._asdict().items()}
        record = request | {
            side: {
                "images": len(pictures),
                "classes": dict(sorted(Counter(picture.label for picture in pictures).items())),
                "sha256": _digest("\n".join(f"{digest}  {path}" for path, digest in sorted(digests[side].items()))),
            }
            for side, pictures in split._asdict().items()
        }
        shared = set(digests["database"].values()) & set(digests["query"].values())
        record["queries_identical_to_a_database_image"] = sum(d in shared for d in digests["query"].values())
        (temporary / SPLIT_FILE).write_text(json.dumps(record, indent=2) + "\n")
    return record


def _same_split(output: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The record in `output`; raises InputError if it is not the record of `request`."""
    try:
        record = json.loads(read_file(output / SPLIT_FILE).decode("utf-8-sig"))
        missing = request.keys() & {"contents_sha256"} - record.keys()  # in files of older versions
        is_same = all(record[key] == value for key, value in request.items() if key not in missing)
        # These expressions raise if the rest of the record has another form.
        int(record["queries_identical_to_a_database_image"])
        for side in (record["database"], record["query"]):
            is_same &= side["images"] == sum(side["classes"].values()) and isinstance(side["sha256"], str)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_same = False
    if not is_same:
        raise invalid(WHERE, "output", "a new folder, or one with this very split", repr(str(output)), "remove it")
    for side in ("database", "query"):
        count = _count_images(output / side)
        if count != record[side]["images"]:
            expected = f"a split with {record[side]['images']} images in {side!r}, as its {SPLIT_FILE} says"
            raise invalid(WHERE, "output", expected, f"{count} in {str(output)!r}", "remove it")
    return record


def _count_images(side: Path) -> int:
    """The number of images in a side of a split. A folder of results, or of a model, may be beside them."""
    try:
        return len(find_images(side, WHERE).images)
    except InputError:  # there are none
        return 0


def _write(pictures: list[Picture], folder: Path) -> dict[str, str]:
    """Write the pictures into `folder`.

    Returns:
        For each path in `folder`, the SHA-256 of the picture's pixels, or of the file if the picture is a copied file.
    """
    digests = {}
    for picture in _progress.track(pictures, f"writing {folder.name}", len(pictures), "img"):
        path = folder / picture.label / picture.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(picture.content, Path):
            shutil.copyfile(picture.content, path)
        else:
            Image.fromarray(picture.content).save(path)
        digests[f"{picture.label}/{picture.name}"] = _content_digest(picture.content)
    return digests


def _contents_digest(folder: Path, files: list[Path]) -> str:
    """SHA-256 of the names and the contents of files in `folder`."""
    paths = _progress.track(files, "reading files", len(files), "img")
    return _digest("\n".join(f"{_content_digest(path)}  {path.relative_to(folder)}" for path in paths))


def _content_digest(content: np.ndarray | Path) -> str:
    return _digest(content.read_bytes() if isinstance(content, Path) else content.tobytes())


def _digest(data: bytes | str) -> str:
    return hashlib.sha256(data.encode(errors="surrogateescape") if isinstance(data, str) else data).hexdigest()


def _draw(labels: list[str], count: int, seed: int, others: int = 0) -> set[int]:
    """Draw the indices of `count` images at random, from each class in proportion to its size, but never a whole class.

    `others` is the number of images that cannot be drawn because they have copies; an error counts them.

    Each class gives its proportion, rounded down. The images that are then missing come one by one from the classes
    with the largest remainders.
    """
    members: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    most = len(labels) - len(members)
    if count > most:
        expected = f"at most {most} of these {len(labels) + others} images, because one of each class must remain"
        expected += f" and {others} have identical copies" if others else ""
        raise invalid(WHERE, "queries", expected, count)
    quota = {label: count * len(indices) / len(labels) for label, indices in members.items()}
    share = {label: int(quota[label]) for label in members}
    by_remainder = sorted(members, key=lambda label: share[label] - quota[label])
    missing = count - sum(share.values())
    for label in itertools.cycle(by_remainder):
        if not missing:
            break
        if share[label] < len(members[label]) - 1:
            share[label] += 1
            missing -= 1
    random = np.random.default_rng(seed)
    return {index for label in sorted(members) for index in random.permutation(members[label])[: share[label]].tolist()}


def _hold_out(pictures: list[Picture], count: int, seed: int, others: int = 0) -> Split:
    chosen = _draw([picture.label for picture in pictures], count, seed, others)
    return Split(
        [picture for index, picture in enumerate(pictures) if index not in chosen],
        [picture for index, picture in enumerate(pictures) if index in chosen],
    )


def _digits(seed: int, queries: int | None, root: Path | None) -> Split:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise missing_package(WHERE, "scikit-learn", "train") from None
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # scikit-learn's grey levels are 0 to 16
    return _hold_out(_numbered(pixels, map(str, digits.target)), DIGITS_QUERIES if queries is None else queries, seed)


def _torchvision(dataset: str) -> Callable[[int, int | None, Path | None], Split]:
    def official(seed: int, queries: int | None, root: Path | None) -> Split:
        try:
            from torchvision import datasets
        except ImportError:
            raise missing_package(WHERE, "torchvision", "train") from None
        sides, folder = [], root or default_root()
        for train in (True, False):
            try:
                data = getattr(datasets, dataset)(folder, train=train, download=True)
            except (OSError, RuntimeError) as error:
                reason = " ".join(str(error).split())
                actual = f"{str(folder)!r}: {reason}"
                expected = f"a folder with {dataset}, or one to which it can be downloaded"
                raise invalid(WHERE, "root", expected, actual, "name the folder that holds it with --root") from None
            names = [data.classes[int(label)].replace("/", "-") for label in data.targets]
            sides.append(_numbered(np.asarray(data.data), names))
        database, query = sides
        if queries not in (None, len(query)):
            query = _hold_out(query, queries, seed).query
        return Split(database, query)

    return official


def default_root() -> Path:
    """The user's cache folder for downloaded data sets.

    Raises:
        InputError: the user has no home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hashengine"
    except RuntimeError:  # no HOME, and a user without an entry in the system's list, as in many containers
        raise invalid(WHERE, "root", "given with --root", "nothing, and this user has no home folder") from None


def _numbered(pixels: np.ndarray, labels: Iterable[str]) -> list[Picture]:
    return [Picture(label, f"{i:05d}.png", image) for i, (label, image) in enumerate(zip(labels, pixels, strict=True))]


def _class_folders(folder: Path, seed: int, queries: int | None) -> Split:
    """Split a user's folder.

    An image that has an identical copy in the folder never becomes a query. Therefore the database contains no copy of
    a query.
    """
    by_class = list_classes(folder, WHERE)
    pictures = [
        Picture(label, path.relative_to(folder / label).as_posix(), path)
        for label, paths in by_class.items()
        for path in paths
    ]
    progress = _progress.track(pictures, "comparing files", len(pictures), "img")
    digests = [_content_digest(picture.content) for picture in progress]
    copies = Counter(digests)
    unique = [picture for picture, digest in zip(pictures, digests, strict=True) if copies[digest] == 1]
    if queries is None:
        most = len(unique) - len({picture.label for picture in unique})  # one of each class must remain
        if most < 1:
            expected = "a folder with a class of at least two different images"
            raise invalid(WHERE, "source", expected, f"{str(folder)!r}, which has none")
        queries = min(max(1, round(FOLDER_QUERY_SHARE * len(pictures))), most)
    query = _hold_out(unique, queries, seed, len(pictures) - len(unique)).query
    held_out = {picture.content for picture in query}
    return Split([picture for picture in pictures if picture.content not in held_out], query)


SOURCES = dict(zip(DATA_SETS, (_digits, _torchvision("FashionMNIST"), _torchvision("CIFAR10")), strict=True))
