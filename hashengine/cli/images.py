"""The commands of image search: encode, index, search, evaluate, report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from hashengine import _progress
from hashengine._defaults import BATCH_SIZE, CODES_MARKER, IMAGE_SUFFIXES, NEIGHBOURS, RADIUS, REPORT_ROWS, SEED
from hashengine._files import check_output, is_stdout
from hashengine._text import counted
from hashengine.cli._app import (
    BatchSize,
    DeviceOption,
    IndexFolder,
    command,
    command_line,
    print_table,
    stdout_for_dash,
)
from hashengine.errors import invalid

app = command_line("Search images by their codes.")


@command(app)
def encode(
    folder: Annotated[Path, typer.Argument(help="A folder of images at any depth; its subfolders are the classes.")],
    model: Annotated[Path, typer.Option(help="A model folder written by 'hashengine train fit'.")],
    output: Annotated[Path, typer.Option("--output", "-o", readable=False, help="The codes folder to write.")],
    batch_size: BatchSize = BATCH_SIZE,
    device: DeviceOption = "auto",
) -> None:
    """Encode every image under FOLDER to a binary code; other files and unreadable images are skipped and recorded."""
    # `check_output` comes before the import, which takes seconds.
    check_output("encode", output, outside=(model,), keeps=(folder, model), is_folder=True, marker=CODES_MARKER)
    from hashengine import evaluation

    codes = evaluation.encode_folder(folder, model, batch_size=batch_size, device=device)
    codes.save(output)
    _progress.note(f"{codes.record.summary()}: {output}")


@command(app)
def index(
    codes: Annotated[Path, typer.Argument(help="A folder written by 'hashengine encode'.")],
    output: Annotated[Path, typer.Option("--output", "-o", readable=False, help="The index folder to write.")],
    append: Annotated[bool, typer.Option("--append", help="Add to the index that --output names.")] = False,
    model: Annotated[
        Path | None, typer.Option(help="The model that made CODES.", show_default="where 'encode' found it")
    ] = None,
) -> None:
    """Build an index of CODES. The index also contains the paths of the images and a copy of the model."""
    from hashengine import evaluation

    image_index = evaluation.index_codes(codes, output, append=append, model=model)
    _progress.note(f"{counted(len(image_index.items), 'code')} in the index: {output}")


@command(app)
def search(
    index: IndexFolder,
    query: Annotated[Path, typer.Argument(help="An image, a folder of images, or a codes folder.")],
    k: Annotated[
        int | None,
        typer.Option("-k", help="Number of neighbours per query.", show_default=f"{NEIGHBOURS}, or all if fewer"),
    ] = None,
    model: Annotated[Path | None, typer.Option(help="The model for query images.", show_default="the index's")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", readable=False, help="Write the results here, as JSON; - is stdout."),
    ] = None,
    batch_size: BatchSize = BATCH_SIZE,
    device: DeviceOption = "auto",
) -> None:
    """Find the K nearest images in INDEX. Results of one image are printed; those of a folder need --output."""
    output = stdout_for_dash(output)
    if query.is_dir() and output is None:
        raise invalid("search", "output", "a file if the query is a folder", "none", "pass --output FILE")
    if output is not None:
        from hashengine.images import check_replaced_file

        # A folder of images may also hold results, but no image of it may be replaced.
        is_input = query.is_file() or (query / "encode.json").is_file() or _may_be_image(output)
        check_output("search", output, outside=(index, model, query if is_input else None))
        check_replaced_file("search", output)
    from hashengine import evaluation

    results = evaluation.search_images(index, query, k, model=model, batch_size=batch_size, device=device)
    if output is not None:
        results.write(output)
        _progress.note(f"wrote {output}")
    if query.is_file() and (output is None or not is_stdout(output)):
        hits = results.queries[0].hits
        rows: list[tuple[object, ...]] = [(hit.rank, hit.distance, shortened(hit.path), hit.label) for hit in hits]
        print_table(("rank", "distance", "path", "label"), rows)
    _progress.note(results.summary())


@command(app)
def evaluate(
    index: IndexFolder,
    queries: Annotated[Path, typer.Argument(help="A codes folder of labelled queries.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", readable=False, help="Write the figures here, as JSON; - is stdout."),
    ] = None,
    at: Annotated[int | None, typer.Option(help="Number of ranked images in the mAP.", show_default="all")] = None,
    radius: Annotated[int, typer.Option(help="Radius in bits for the precision within a radius.")] = RADIUS,
) -> None:
    """Measure how well INDEX ranks the images of a query's class before all others: mAP, precision, recall.

    Images at equal distances can be ranked in any order. A figure that depends on the order is shown as its
    mean over all orders, followed by its values for the worst and the best order.
    """
    output = stdout_for_dash(output)
    if output is not None:
        from hashengine.images import check_replaced_file

        check_output("evaluate", output, outside=(index, queries))
        check_replaced_file("evaluate", output)
    from hashengine import evaluation

    found = evaluation.evaluate_folders(index, queries, at=at, radius=radius)
    if output is not None:
        found.write(output)
    if found.without_relevant:
        _progress.note(f"{found.without_relevant} of {found.queries} queries have no relevant image and count as 0")
    if output is not None and is_stdout(output):
        return
    header, rows = found.cells()
    print_table(tuple(header), [tuple(row) for row in rows])


@command(app)
def report(
    index: Annotated[Path, typer.Option(help="A folder written by 'hashengine index'.")],
    results: Annotated[Path, typer.Option(help="The file written by 'hashengine search --output'.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", readable=False, help="The .html to write; the figures are written to a .json next to it."
        ),
    ],
    evaluation: Annotated[Path | None, typer.Option(help="The file written by 'hashengine evaluate --output'.")] = None,
    training: Annotated[Path | None, typer.Option(help="The training.json written by 'hashengine train fit'.")] = None,
    queries: Annotated[int, typer.Option(help="Number of queries in the picture grid.")] = REPORT_ROWS,
    seed: Annotated[int, typer.Option(help="Seed for drawing the queries in the picture grid.")] = SEED,
) -> None:
    """Write a page with queries and their nearest images, the figures and the timings. Viewing it needs no network."""
    from hashengine.evaluation import write_report

    write_report(output, index, results, evaluation=evaluation, training=training, rows=queries, seed=seed)
    _progress.note(f"wrote {output} and {output.with_suffix('.json')}")


def shortened(path: str) -> str:
    """`path` relative to the working folder, if it is in that folder; otherwise unchanged."""
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path


def _may_be_image(output: Path) -> bool:
    """Whether the file at the end of all links of `output` is an image, or would be taken for one."""
    from hashengine.images import is_image

    target = Path(os.path.realpath(output))
    return is_image(target) if target.is_file() else target.suffix.lower() in IMAGE_SUFFIXES
