"""Default values that a library function shares with the command that calls it.

They have a module of their own so that the help of the command can show them without importing the function: that
import would also import torch.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from hashengine._files import Marker

DATA_SETS = ("digits", "fashion-mnist", "cifar10")  # the names that `hashengine.training.prepare` knows
SEED = 0
BITS = 32  # the length of a code
BATCH_SIZE = 256  # images per call of the network
NEIGHBOURS = 10  # results per query of a search
RADIUS = 2  # in bits, for precision within a radius
REPORT_ROWS = 12  # rows of the picture grid in a report, one query per row

# A file whose name ends in one of these is taken for an image without a look at its content.
IMAGE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpeg", ".jpg", ".jxl", ".pbm", ".pgm", ".png"}
    | {".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)

# How an earlier codes folder and an earlier index are recognised.
CODES_MARKER = Marker("encode.json", ("fingerprint", "source"), ("codes.npy", "items.csv", "encode.json"))
_TOKEN = "[0-9a-f]" * 8  # in the names of the files that HammingIndex.save writes
INDEX_MARKER = Marker(
    "index.json",
    ("fingerprint", "sources"),
    ("items.csv", "index.json", "lock", "model/config.json", "model/model.safetensors")
    + (
        "codes/manifest.json",
        "codes/lock",
        *(f"codes/{kind}-{_TOKEN}.bin" for kind in ("codes", "ids", "live")),
    ),
)
SPLIT_FILE = "split.json"  # the record of 'hashengine train prepare'
_SPLIT_MARKER = Marker(SPLIT_FILE, ("database", "query", "queries_identical_to_a_database_image"))

# The files of the folders that hashengine writes, as patterns, and how a folder is recognised.
_PARTS = (
    (CODES_MARKER._replace(contents=()), CODES_MARKER.contents),
    (INDEX_MARKER._replace(contents=()), ("items.csv", "index.json")),
    (Marker("manifest.json", ("bit_order", "next_id", "crc32")), ("manifest.json", "*.bin")),  # HammingIndex.save
    (Marker("config.json", ("format", "version", "bits")), ("config.json", "model.safetensors", "training.json")),
    (_SPLIT_MARKER, (SPLIT_FILE,)),
)


def is_part(file: Path) -> bool:
    """Whether `file` belongs to codes, an index, a network or a split that hashengine wrote."""
    return any(
        any(fnmatchcase(file.name, name) for name in names) and marker.problem(file.parent) is None
        for marker, names in _PARTS
    )


def is_split(folder: Path) -> bool:
    """Whether 'hashengine train prepare' wrote `folder`, which then has the sides `database` and `query`."""
    return _SPLIT_MARKER.problem(folder) is None and all((folder / side).is_dir() for side in ("database", "query"))
