"""`python -m training`: prepare a data set, then fit a hash network to it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hashengine.cli import command_line
from training import loop
from training import prepare as preparation
from training.config import FitConfig, read_yaml

app = command_line("Train hash networks.")
console = Console()


@app.command()
def prepare(
    source: Annotated[str, typer.Argument(help="digits, fashion-mnist, cifar10, or a folder of class folders")],
    output: Annotated[Path, typer.Option(help="folder to make, with database/ and query/ in it")],
    seed: Annotated[int, typer.Option(min=0, help="of the random choice of queries")] = 0,
    queries: Annotated[int | None, typer.Option(help="how many images to hold out as queries")] = None,
    root: Annotated[Path | None, typer.Option(help="where torchvision's files are or go; default: a cache")] = None,
) -> None:
    """Turn a data set into two disjoint folders of class folders: database and query."""
    record = preparation.prepare(source, output, seed=seed, queries=queries, root=root)
    table = Table(title=f"{source} in {output}")
    for column in ("", "images", "classes", "sha256 of the list"):
        table.add_column(column)
    for side in ("database", "query"):
        part = record[side]
        table.add_row(side, f"{part['images']:,}", str(len(part["classes"])), part["sha256"][:16])
    console.print(table)
    if twins := record["queries_identical_to_a_database_image"]:
        console.print(f"{twins} of the queries are identical to a database image")


@app.command()
def fit(
    images: Annotated[Path | None, typer.Option(help="folder of class folders")] = None,
    output: Annotated[Path | None, typer.Option(help="the model's folder")] = None,
    bits: Annotated[int | None, typer.Option(help="length of a code, a multiple of 8  [default: 32]")] = None,
    attention: Annotated[str | None, typer.Option(help="simam, triplet or none  [default: simam]")] = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the images  [default: by their number]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="images a step  [default: 64]")] = None,
    lr: Annotated[float | None, typer.Option(help="highest learning rate  [default: 0.004]")] = None,
    alpha: Annotated[float | None, typer.Option(help="weight of the quantisation penalty  [default: 0.1]")] = None,
    image_size: Annotated[int | None, typer.Option(help="pixels a side  [default: the images', at most 64]")] = None,
    flip: Annotated[bool | None, typer.Option(help="mirror half of the images  [default: no]")] = None,
    seed: Annotated[int | None, typer.Option(help="of weights, order and augmentation  [default: 0]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda  [default: auto]")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of options; the command line goes before it")] = None,
) -> None:
    """Train a hash network and write config.json, model.safetensors and training.json."""
    given = {name: value for name, value in locals().items() if name != "config" and value is not None}
    options = FitConfig(**({} if config is None else read_yaml(config)) | given)
    record = loop.fit(options)
    last = record["epochs"][-1]
    table = Table(title=f"model in {options.output}", show_header=False)
    table.add_row(
        "network",
        f"{record['network']['bits']} bits, attention {record['network']['attention']}, "
        f"{record['parameters']:,} parameters",
    )
    table.add_row(
        "images",
        f"{record['images']:,} of {len(record['network']['classes'])} classes, "
        f"{record['network']['image_size']} pixels a side",
    )
    table.add_row(
        "training",
        f"{len(record['epochs'])} epochs in {record['seconds']:.1f} s, "
        f"{record['images_per_second']:,.0f} images/s on {record['device']}",
    )
    table.add_row(
        "last epoch",
        f"loss {last['classification']:.4f} + penalty {last['penalty']:.4f}, "
        f"accuracy {last['accuracy']:.1%} on the training images",
    )
    console.print(table)


if __name__ == "__main__":
    app(prog_name="python -m training")
