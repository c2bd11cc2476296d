"""The commands of `hashengine train`: prepare, fit, sweep, report, methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hashengine import _interrupt, _progress, training
from hashengine._defaults import DATA_SETS, SEED
from hashengine.cli._app import command, command_line, print_table
from hashengine.cli._options import given, options_of, parse_option, unknown_options, with_options
from hashengine.errors import invalid
from hashengine.training.config import FitConfig, SweepConfig, override, read_yaml

app = command_line("Train hash networks.")

ConfigFile = Annotated[
    Path | None, typer.Option(help="A YAML file of options; those on the command line take precedence.")
]
_ACCEPTS_UNKNOWN = {"allow_extra_args": True, "ignore_unknown_options": True}  # for the options of the method


@command(app)
def prepare(
    source: Annotated[str, typer.Argument(help=f"{', '.join(DATA_SETS)}, or a folder of class folders.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", readable=False, help="The folder to write, with database/ and query/.")
    ],
    seed: Annotated[int, typer.Option(help="Seed of the random choice of queries.")] = SEED,
    queries: Annotated[
        int | None, typer.Option(help="Number of queries to hold out.", show_default="depends on the source")
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(help="Folder of torchvision's files; missing files are downloaded to it.", show_default="a cache"),
    ] = None,
) -> None:
    """Write a data set as two disjoint folders of class folders: database and query."""
    record = training.prepare(source, output, seed=seed, queries=queries, root=root)
    rows: list[tuple[object, ...]] = [
        (side, f"{part['images']:,}", len(part["classes"]), part["sha256"][:16])
        for side, part in ((side, record[side]) for side in ("database", "query"))
    ]
    print_table(("", "images", "classes", "sha256 of the image list"), rows, f"{source} in {output}")
    if copies := record["queries_identical_to_a_database_image"]:
        _progress.note(f"{copies} of the queries are identical to a database image")


@command(app, before=training.let_waiting_threads_sleep, context_settings=_ACCEPTS_UNKNOWN)
@with_options(*options_of(FitConfig))
def fit(context: typer.Context, config: ConfigFile = None, **options: Any) -> None:
    """Train a hash network and write config.json, model.safetensors and training.json.

    The options of a method, such as --alpha of greedy_hash, are accepted too; 'hashengine train methods' lists them.
    """
    from_file = {} if config is None else read_yaml(config, "train fit")
    of_method = unknown_options("train fit", context.args)
    run = training.fit(FitConfig(**override(from_file, given(FitConfig, options) | of_method)))
    print_table(("model", str(run.folder)), [*run.summary()])


@command(app, before=training.let_waiting_threads_sleep, context_settings=_ACCEPTS_UNKNOWN)
@with_options(*options_of(SweepConfig, exclude=("grid",)), *options_of(FitConfig, exclude=("output",)))
def sweep(
    context: typer.Context,
    config: ConfigFile = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(help="OPTION=VALUE,VALUE,...; may be repeated. Each combination is a run.", show_default=False),
    ] = None,
    **options: Any,
) -> None:
    """Train one run per combination of a grid of options, and write a table of their results.

    Complete runs are kept; therefore the same command continues an interrupted sweep. The options of 'train fit' apply
    to every run.
    """
    _interrupt.keeps("the complete runs are kept, and the same command continues the sweep")
    from_file = {} if config is None else read_yaml(config, "train sweep")
    varied: dict[str, list[Any]] = {}
    for option, axis in map(_axis, grid or []):
        if option in varied:
            raise invalid("train sweep", "grid", "each option once, with all its values", f"{option!r} twice")
        varied[option] = axis
    of_method = unknown_options("train sweep", context.args)
    values = override(from_file, given(FitConfig, options) | given(SweepConfig, options) | of_method)
    if varied:
        from_yaml = values.get("grid") or {}
        if not isinstance(from_yaml, dict):
            raise invalid("train sweep", "grid", "lines of 'option: values'", type(from_yaml).__name__)
        values["grid"] = from_yaml | varied
    results = training.sweep(SweepConfig(**values))
    _print_runs(results)


@command(app)
def report(
    runs: Annotated[list[Path], typer.Argument(help="Model folders, or folders of them.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", readable=False, help="Write the table here, as .md or .json.", show_default=False
        ),
    ] = None,
) -> None:
    """Print a table of training runs: the mean and the standard deviation of each result over the seeds."""
    results = training.report(runs, output=output)
    if output is not None:
        _progress.note(f"wrote {output}")
    _print_runs(results)


@command(app)
def methods() -> None:
    """List the hashing methods with their options and defaults."""
    from hashengine import methods as registry

    rows: list[tuple[object, ...]] = []
    for name in registry.names():
        method = registry.find(name)
        rows += [
            (name, f"--{option.replace('_', '-')}", field.default, field.description)
            for option, field in method.Options.model_fields.items()
        ] or [(name, "", "", "")]
    print_table(("method", "option", "default", "meaning"), rows)


def _axis(text: str) -> tuple[str, list[Any]]:
    """Parse one option of a grid and its values, such as "bits=16,32"."""
    option, separator, values = text.partition("=")
    if not separator or not option or not values:
        raise invalid("train sweep", "grid", "OPTION=VALUE,VALUE,...", repr(text))
    name = option.replace("-", "_")
    return name, [parse_option(FitConfig, name, value) for value in values.split(",")]


def _print_runs(results: training.RunTable) -> None:
    header, rows = results.cells()
    print_table(tuple(header), [tuple(row) for row in rows])
