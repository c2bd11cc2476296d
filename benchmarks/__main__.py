"""python -m benchmarks: the benchmarks' command line."""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks import hamming as hamming_benchmark
from hashengine.cli import command_line

app = command_line("Numbers of hashengine beside its peers', measured in the same run.")


@app.callback()
def main() -> None:  # with it, `hamming` is a command of its own although it is the only one
    pass


@app.command()
def hamming(
    codes: Annotated[int, typer.Option(min=1, help="Codes in the database.")] = 1_000_000,
    queries: Annotated[int, typer.Option(min=1, help="Queries in a batch.")] = 1000,
    bits: Annotated[list[int] | None, typer.Option(min=8, help="Code length; may be repeated.")] = None,
    k: Annotated[list[int] | None, typer.Option("-k", min=1, help="Neighbours; may be repeated.")] = None,
    data: Annotated[hamming_benchmark.Data, typer.Option(help="How codes are drawn.")] = hamming_benchmark.Data.random,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of every system; default: all cores.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, in each of which every system runs once.")] = 5,
    output: Annotated[Path | None, typer.Option(help="Append the results to this file, a JSON object a line.")] = None,
) -> None:
    """Exact Hamming top-k on the CPU beside FAISS IndexBinaryFlat, in its heap and in its counting mode."""
    hamming_benchmark.run(
        codes=codes,
        queries=queries,
        bits=bits or [64, 128, 256],
        ks=k or [10, 100],
        data=data,
        threads=threads,
        rounds=rounds,
        output=output,
    )


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
