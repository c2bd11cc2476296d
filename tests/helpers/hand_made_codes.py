"""A folder of codes that are given as numbers, without images and without a network."""

import numpy as np

from hashengine.evaluation import CodesFolder
from hashengine.evaluation.records import EncodeRecord, Item


def hand_made(bytes_by_item: list[int], labels: str) -> CodesFolder:
    """Codes of 8 bits. Item i has the code `bytes_by_item[i]`, the label `labels[i]` and no image."""
    record = EncodeRecord(
        bits=8, count=len(labels), source="", model="", fingerprint="hand-made", device="cpu", seconds=1.0
    )
    items = [Item(i, f"/nowhere/{i}.png", label) for i, label in enumerate(labels)]
    return CodesFolder(np.array(bytes_by_item, dtype=np.uint8)[:, None], items, record)
