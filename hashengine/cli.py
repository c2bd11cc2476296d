"""The command line: one command a step, each a thin call into `hashengine.retrieval`.

What a command finds goes to stdout, as a table on a terminal and as tab-separated lines into a pipe; everything else
goes to stderr. Exit codes: 0 done, 1 the machine's refusal (a full disk), 2 a mistake in the input, each with one line
on stderr; 130 interrupted.
"""

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from hashengine import doctor as diagnosis
from hashengine import retrieval
from hashengine.errors import InputError


class Commands(TyperGroup):
    """Tells a mistake of the user's in one line instead of a traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of stdout has gone, as in `| head`: typer ends quietly
        except (InputError, OSError) as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2 if isinstance(error, InputError) else 1) from None


def command_line(help: str) -> typer.Typer:
    """An empty command line as all of the project's are."""
    return typer.Typer(
        cls=Commands, help=help, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
    )


app = command_line("Images to short binary codes to exact search.")


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


BatchSize = Annotated[int, typer.Option(help="Images per call of the network.")]
DeviceOption = Annotated[Device, typer.Option(help="Where the network runs; auto takes the GPU if there is one.")]
IndexFolder = Annotated[Path, typer.Argument(help="A folder written by 'hashengine index'.", show_default=False)]


@app.command()
def encode(
    folder: Annotated[Path, typer.Argument(help="Images at any depth; class folders below it give labels.")],
    model: Annotated[Path, typer.Option(help="A model folder, as 'python -m training fit' writes it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The codes folder to write.")],
    batch_size: BatchSize = 256,
    device: DeviceOption = Device.auto,
) -> None:
    """Encode every image under FOLDER to a binary code; unreadable ones are skipped and recorded."""
    codes = retrieval.encode_folder(folder, model, batch_size=batch_size, device=device.value)
    codes.save(output)
    record = codes.record
    skipped = f", {len(record.errors)} skipped" if record.errors else ""
    note(
        f"{record.count} images{skipped} to {record.bits}-bit codes in {record.seconds:.2f} s "
        f"({record.count / record.seconds:.0f} a second): {output}"
    )


@app.command()
def index(
    codes: Annotated[Path, typer.Argument(help="A folder written by 'hashengine encode'.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The index folder to write.")],
    append: Annotated[bool, typer.Option("--append", help="Add to the index that --output names.")] = False,
) -> None:
    """Build an index that searches CODES, with the images' names and the model in it."""
    added = retrieval.CodesFolder.load(codes)
    if append:
        image_index = retrieval.ImageIndex.load(output)
        image_index.append(added)
    else:
        image_index = retrieval.ImageIndex.build(added, output)
    note(f"{len(added.items)} codes added, {len(image_index.items)} in the index: {output}")


@app.command()
def search(
    index: IndexFolder,
    query: Annotated[Path, typer.Argument(help="An image, a folder of images, or a codes folder.")],
    k: Annotated[int, typer.Option("-k", help="How many neighbours of each query.")] = 10,
    model: Annotated[Path | None, typer.Option(help="The model for query images.", show_default="the index's")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the results here, as JSON.")] = None,
    batch_size: BatchSize = 256,
    device: DeviceOption = Device.auto,
) -> None:
    """Find the K nearest images in INDEX: printed for one image, written to --output for many."""
    image_index = retrieval.ImageIndex.load(index)
    if query.is_dir() and output is None:
        raise InputError("output: expected a file for the results of a whole folder, got none: pass --output FILE")
    if not query.exists():
        raise InputError(
            f"query: expected an image, a folder of images or a codes folder, got {str(query)!r}, which does not exist"
        )
    if retrieval.is_codes_folder(query):
        queries = retrieval.CodesFolder.load(query, "query")
    else:
        queries = retrieval.encode_folder(query, model or index / "model", batch_size=batch_size, device=device.value)
    results = image_index.search(queries, k)
    if output is not None:
        results.write(output)
        note(f"wrote {output}")
    if query.is_file():
        hits = results.queries[0].hits
        rows = [(hit.rank, hit.distance, shortened(hit.path), hit.label) for hit in hits]
        print_table(("rank", "distance", "path", "label"), rows)
    asked = f"{len(results.queries):,} {'query' if len(results.queries) == 1 else 'queries'}"
    note(
        f"{asked} among {results.database:,} codes of {results.bits} bits, k = {k}, "
        f"in {1000 * results.seconds:.2f} ms ({results.queries_per_second:,.0f} a second)"
    )


@app.command()
def evaluate(
    index: IndexFolder,
    queries: Annotated[Path, typer.Argument(help="A codes folder of labelled queries.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the figures here, as JSON.")] = None,
    at: Annotated[int | None, typer.Option(help="Depth of the mAP.", show_default="the whole ranking")] = None,
    radius: Annotated[int, typer.Option(help="In bits, for the precision within a Hamming ball.")] = 2,
) -> None:
    """Measure how well INDEX ranks images of the query's class first: mAP, precision, recall.

    Equal distances have no order of their own: each figure is the mean over all orders, with the worst and the best.
    """
    labelled = retrieval.CodesFolder.load(queries, "queries")
    evaluation = retrieval.evaluate(retrieval.ImageIndex.load(index), labelled, at=at, radius=radius)
    if output is not None:
        evaluation.write(output)
    depth = "mAP" if at is None else f"mAP@{at}"
    bands = [(depth, evaluation.mean_average_precision)]
    bands += [(f"precision@{k}", band) for k, band in evaluation.precision_at.items()]
    bands += [(f"recall@{k}", band) for k, band in evaluation.recall_at.items()]
    rows = [(name, *(f"{x:.4f}" for x in (band.expected, band.minimum, band.maximum))) for name, band in bands]
    rows.append((f"precision within radius {radius}", f"{evaluation.precision_within_radius:.4f}", "", ""))
    print_table(("measure", "expected", "minimum", "maximum"), rows)


@app.command()
def report(
    index: Annotated[Path, typer.Option(help="A folder written by 'hashengine index'.")],
    results: Annotated[Path, typer.Option(help="Written by 'hashengine search'.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .html to write; the same figures go into a .json.")
    ],
    evaluation: Annotated[Path | None, typer.Option(help="Written by 'hashengine evaluate'.")] = None,
    training: Annotated[Path | None, typer.Option(help="training.json, written by 'python -m training fit'.")] = None,
    queries: Annotated[int, typer.Option(help="Rows of the picture grid.")] = 12,
    seed: Annotated[int, typer.Option(help="Chooses the queries of the picture grid.")] = 0,
) -> None:
    """Write a page with queries and their nearest images, the figures and the timings; it needs no network."""
    retrieval.write_report(output, index, results, evaluation=evaluation, training=training, rows=queries, seed=seed)
    note(f"wrote {output} and {output.with_suffix('.json')}")


@app.command()
def demo(
    data: Annotated[str, typer.Option(help="digits, fashion-mnist, cifar10, or a folder of class folders.")] = "digits",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for all that the demo makes.")] = Path("demo"),
    bits: Annotated[int, typer.Option(help="Length of a code.")] = 32,
) -> None:
    """Run the whole path on real images, printing each command: train, encode, index, search, evaluate, report."""
    raise typer.Exit(retrieval.run_demo(data, output, bits))


@app.command()
def doctor() -> None:
    """Say what was built, what this machine can run, what is missing, and the command that mends it."""
    if not diagnosis.print_report():
        raise typer.Exit(1)


def note(message: str) -> None:
    """A line for the person at the terminal, kept out of pipes."""
    typer.echo(message, err=True)


def shortened(path: str) -> str:
    """`path` from the working folder on, where it lies below it."""
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path


def print_table(columns: tuple[str, ...], rows: list[tuple]) -> None:
    """A table on a terminal, tab-separated lines with a header elsewhere."""
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            print(*row, sep="\t")
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console().print(table)
