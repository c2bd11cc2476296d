"""Data sets as two disjoint folders of class folders: `database`, to train on and to search in, and `query`."""

import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from hashengine.errors import InputError
from hashengine.images import list_images
from training.data import list_classes

SPLIT_FILE = "split.json"
DIGITS_QUERIES = 300
FOLDER_QUERY_SHARE = 0.1


class Picture(NamedTuple):
    """One image of a data set: its class, its name in the class folder, and uint8 pixels or the file to copy."""

    label: str
    name: str
    content: np.ndarray | Path


class Split(NamedTuple):
    database: list[Picture]
    query: list[Picture]


def prepare(source: str, output: Path, *, seed: int = 0, queries: int | None = None, root: Path | None = None) -> dict:
    """Write `output`/database/<class>/..., `output`/query/<class>/... and split.json; return the latter's content.

    The folder appears under its name only when it is complete. One that already holds this very split is kept, so that
    an interrupted pipeline can be run again from its start.

    Args:
        source: "digits" (scikit-learn's 8x8 digits, 300 of the 1,797 held out), "fashion-mnist" or "cifar10"
            (torchvision's; the official test images are the queries), or a folder of class folders (a tenth held out).
        output: the folder to make.
        seed: of every random choice; held-out images are drawn from each class in proportion to its size.
        queries: the number of queries instead of the one above.
        root: where torchvision's files are, or are downloaded to where they are missing.

    Raises:
        InputError: the data set is unknown or unusable, an extra is missing, or `output` holds something else.
    """
    request = {"version": 1, "source": source, "seed": seed, "queries_asked": queries}
    if source not in SOURCES and Path(source).is_dir():
        files = [f"{path.relative_to(source)} {path.stat().st_size}" for path in list_images(source)]
        request |= {"source": str(Path(source).resolve()), "files_sha256": _digest("\n".join(files))}
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        return _already_there(output, request)
    if queries is not None and queries < 1:
        raise InputError(f"queries: expected at least 1, got {queries}")
    if source in SOURCES:
        split = SOURCES[source](seed, queries, root)
    elif Path(source).is_dir():
        split = _class_folders(Path(source), seed, queries)
    else:
        raise InputError(f"source: expected {', '.join(SOURCES)} or a folder of class folders, got {source!r}")

    partial = output.absolute().with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        digests = {side: _write(pictures, partial / side) for side, pictures in split._asdict().items()}
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
        (partial / SPLIT_FILE).write_text(json.dumps(record, indent=2) + "\n")
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return record


def _already_there(output: Path, request: dict) -> dict:
    try:
        record = json.loads((output / SPLIT_FILE).read_text())
        same = all(record[key] == value for key, value in request.items())
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise InputError(f"output: expected a new folder, or one with this very split, got {str(output)!r}: remove it")
    return record


def _write(pictures: list[Picture], folder: Path) -> dict[str, str]:
    """Write the pictures; return path within `folder` -> SHA-256 of the pixels, or of the file where one is copied."""
    digests = {}
    for picture in tqdm(pictures, f"writing {folder.name}", unit="img", leave=False, disable=None):
        path = folder / picture.label / picture.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(picture.content, Path):
            shutil.copyfile(picture.content, path)
        else:
            Image.fromarray(picture.content).save(path)
        digests[f"{picture.label}/{picture.name}"] = _content_digest(picture.content)
    return digests


def _content_digest(content: np.ndarray | Path) -> str:
    return _digest(content.read_bytes() if isinstance(content, Path) else content.tobytes())


def _digest(data: bytes | str) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def _draw(labels: list[str], count: int, seed: int) -> set[int]:
    """`count` indices, at random, from each class in proportion to its size, and never a whole class."""
    members: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    if count > len(labels) - len(members):
        raise InputError(
            f"queries: expected at most {len(labels) - len(members)} of these {len(labels)} images, since "
            f"one of each class must stay, got {count}"
        )
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


def _hold_out(pictures: list[Picture], count: int, seed: int) -> Split:
    chosen = _draw([picture.label for picture in pictures], count, seed)
    return Split(
        [picture for index, picture in enumerate(pictures) if index not in chosen],
        [picture for index, picture in enumerate(pictures) if index in chosen],
    )


def _digits(seed: int, queries: int | None, root: Path | None) -> Split:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("source: digits needs scikit-learn: pip install 'hashengine[train]'") from None
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # scikit-learn's grey levels are 0 to 16
    return _hold_out(_numbered(pixels, map(str, digits.target)), DIGITS_QUERIES if queries is None else queries, seed)


def _torchvision(dataset: str) -> Callable[[int, int | None, Path | None], Split]:
    def official(seed: int, queries: int | None, root: Path | None) -> Split:
        try:
            from torchvision import datasets
        except ImportError:
            raise InputError(f"source: {dataset} needs torchvision: pip install 'hashengine[train]'") from None
        sides = []
        for train in (True, False):
            try:
                data = getattr(datasets, dataset)(root or default_root(), train=train, download=True)
            except (OSError, RuntimeError) as error:
                raise InputError(
                    f"source: cannot read or download {dataset} in {str(root or default_root())!r}: "
                    f"{' '.join(str(error).split())}: give the folder that has it with --root"
                ) from None
            names = [data.classes[int(label)].replace("/", "-") for label in data.targets]
            sides.append(_numbered(np.asarray(data.data), names))
        database, query = sides
        if queries not in (None, len(query)):
            query = _hold_out(query, queries, seed).query
        return Split(database, query)

    return official


def default_root() -> Path:
    """The user's cache folder for downloaded data sets."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hashengine"


def _numbered(pixels: np.ndarray, labels) -> list[Picture]:
    return [Picture(label, f"{i:05d}.png", image) for i, (label, image) in enumerate(zip(labels, pixels, strict=True))]


def _class_folders(folder: Path, seed: int, queries: int | None) -> Split:
    """Hold out images of a user's folder, none of which has a copy of itself left in the database."""
    by_class = list_classes(folder)
    pictures = [
        Picture(label, path.relative_to(folder / label).as_posix(), path)
        for label, paths in by_class.items()
        for path in paths
    ]
    if queries is None:
        queries = max(1, round(FOLDER_QUERY_SHARE * len(pictures)))
    progress = tqdm(pictures, "comparing files", unit="img", leave=False, disable=None)
    digests = [_content_digest(picture.content) for picture in progress]
    copies = Counter(digests)
    unique = [picture for picture, digest in zip(pictures, digests, strict=True) if copies[digest] == 1]
    query = _hold_out(unique, queries, seed).query
    held_out = {picture.content for picture in query}
    return Split([picture for picture in pictures if picture.content not in held_out], query)


SOURCES = {"digits": _digits, "fashion-mnist": _torchvision("FashionMNIST"), "cifar10": _torchvision("CIFAR10")}
