"""Image search on folders: the functions behind the commands `index`, `search` and `evaluate`."""

from __future__ import annotations

import os
from pathlib import Path

from hashengine._defaults import BATCH_SIZE, INDEX_MARKER, RADIUS
from hashengine._files import check_output
from hashengine._validation import DeviceName, check_path
from hashengine.errors import invalid
from hashengine.evaluation.encode import CodesFolder, encode_folder, is_codes_folder
from hashengine.evaluation.evaluate import evaluate
from hashengine.evaluation.image_index import ImageIndex, check_model
from hashengine.evaluation.records import Evaluation, SearchResults
from hashengine.models.checkpoint import fingerprint


def index_codes(
    codes: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    append: bool = False,
    model: str | os.PathLike[str] | None = None,
) -> ImageIndex:
    """Build an index of a codes folder, or add its codes to an existing index.

    Args:
        codes: the codes folder, which `CodesFolder.save` wrote.
        output: the index folder.
        append: add to the index in `output` instead of replacing it.
        model: the folder of the model that made the codes, if it is no longer where `encode_folder` found it.

    Raises:
        InputError: a folder is unusable, or the codes come from another model than the index.
    """
    output = check_path("index", "output", output)
    check_output(
        "index",
        output,
        outside=(codes, None if append else model),
        keeps=() if append else (codes,),
        is_folder=True,
        marker=None if append else INDEX_MARKER,
    )
    added = CodesFolder.load(codes, "index")
    if not append:
        used = check_path("index", "the model of the codes", model or added.record.model)
        if used.resolve() != (output / "model").resolve():  # of which the new index will have a copy
            check_output("index", output, keeps=(used,), is_folder=True)
        return ImageIndex.build(added, output, model)
    if model is not None:
        check_model(model, added.record.fingerprint)
    return ImageIndex.append_to(output, added)


def search_images(
    index: str | os.PathLike[str],
    query: str | os.PathLike[str],
    k: int | None = None,
    *,
    model: str | os.PathLike[str] | None = None,
    batch_size: int = BATCH_SIZE,
    device: DeviceName = "auto",
) -> SearchResults:
    """Find the `k` nearest images in an index.

    Args:
        index: the index folder.
        query: an image, a folder of images, or a folder of their codes.
        k: the number of neighbours per query; by default 10, or all images if the index has fewer.
        model: the folder of the model that encodes query images; by default, the copy in the index.
        batch_size: images per call of the network.
        device: where the network runs: "auto", "cpu", "cuda", "cuda:1", ...

    Raises:
        InputError: a folder or an image is unusable, `k` is out of range, or the queries come from another model.
    """
    query = check_path("search", "query", query)
    if not query.exists():
        expected = "an image, a folder of images or a codes folder"
        raise invalid("search", "query", expected, f"{str(query)!r}, which does not exist")
    image_index = ImageIndex.load(index, "search")
    k = image_index.neighbours(k)
    if model is not None and fingerprint(model, "search") != image_index.record.fingerprint:
        expected = f"that of the index, {str(Path(index, 'model'))!r}"
        raise invalid("search", "model", expected, f"another one, {os.fspath(model)!r}")
    if is_codes_folder(query):
        queries = CodesFolder.load(query, "search", "query")
    else:
        network = model or Path(index, "model")
        queries = encode_folder(query, network, batch_size=batch_size, device=device, where="search")
    return image_index.search(queries, k)


def evaluate_folders(
    index: str | os.PathLike[str], queries: str | os.PathLike[str], *, at: int | None = None, radius: int = RADIUS
) -> Evaluation:
    """Call `evaluate` for the index in the folder `index` and the labelled queries in the codes folder `queries`.

    Raises:
        InputError: a folder is unusable, or for the reasons that `evaluate` lists.
    """
    labelled = CodesFolder.load(queries, "evaluate", "queries")
    return evaluate(ImageIndex.load(index, "evaluate"), labelled, at=at, radius=radius)
