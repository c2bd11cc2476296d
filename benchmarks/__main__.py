"""python -m benchmarks: the benchmarks' command line."""

import math
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import hamming as hamming_benchmark
from benchmarks import hamming_gpu as hamming_gpu_benchmark
from benchmarks import kernels as kernels_benchmark
from benchmarks import mapped as mapped_benchmark
from benchmarks import model as model_benchmark
from benchmarks import profiling
from benchmarks import report as report_of_kernels
from benchmarks.cases import DEFAULT_OPS, OPS
from benchmarks.codes import Data
from benchmarks.gpu_data import Case
from benchmarks.kernels import Dtype, Layout
from benchmarks.model import Attention, Mode
from benchmarks.shapes import Model
from benchmarks.systems import Task, check_sizes
from hashengine.cli import command_line
from hashengine.errors import InputError

app = command_line("Numbers of hashengine beside its peers', measured in the same run.")


IMAGES = Path(__file__).parents[2] / "shared" / "data"  # beside the repository

Device = Annotated[str, typer.Option(help="cpu, cuda, or cuda:N.")]
Minutes = Annotated[float, typer.Option(min=0, help="After which no measurement is begun.")]
Output = Annotated[Path | None, typer.Option(help="Append the results to this file, a JSON object a line.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of every system; default: all cores.")]


@app.command()
def hamming(
    task: Annotated[
        list[Task] | None,
        typer.Option(
            help="search: the k nearest; filter: of a share of the codes; range: the radius of about k; map: mean "
            "average precision over the full ranking. Default: search."
        ),
    ] = None,
    codes: Annotated[int, typer.Option(min=1, help="Codes in the database.")] = 1_000_000,
    queries: Annotated[int, typer.Option(min=1, help="Queries in a batch.")] = 1000,
    bits: Annotated[list[int] | None, typer.Option(min=8, help="Code length; may be repeated.")] = None,
    k: Annotated[list[int] | None, typer.Option("-k", min=1, help="Neighbours; may be repeated.")] = None,
    share: Annotated[float, typer.Option(min=0.001, max=1, help="Of the codes that a filter lets through.")] = 0.5,
    data: Annotated[Data, typer.Option(help="How codes are drawn, or of whose images they are learned.")] = Data.random,
    images: Annotated[Path, typer.Option(help="Folder of the images' archives.")] = IMAGES,
    device: Device = "cpu",
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(min=1, help="On the CPU; in each of them every system runs once.")] = 5,
    output: Output = None,
) -> None:
    """Exact Hamming search on the CPU beside FAISS IndexBinaryFlat, in the better of its two modes, and other peers.

    A bare loop over cached codes and, for a single query, a plain read of the codes are measured in the same rounds. On
    a GPU: beside FAISS's index there, products in torch, and the device's bounds; `hamming-gpu` runs all that matters.
    """
    tasks, lengths, ks = task or [Task.search], bits or [64, 128, 256], k or [10, 100]
    if device != "cpu":
        check_sizes(codes, lengths, ks)
        steps = [
            (
                hamming_gpu_benchmark.SEARCH,
                Case(codes, length, queries, own_k, each, data, share if each is Task.filter else 1.0),
            )
            for length in lengths
            for each in tasks
            for own_k in ((None,) if each is Task.map else ks)
        ]
        hamming_gpu_benchmark.run(steps, device=device, minutes=math.inf, output=output, images=images)
        return
    hamming_benchmark.run(
        tasks=tasks,
        codes=codes,
        queries=queries,
        bits=lengths,
        ks=ks,
        share=share,
        data=data,
        images=images,
        threads=threads,
        rounds=rounds,
        output=output,
    )


@app.command()
def hamming_gpu(
    device: Device = "cuda",
    minutes: Minutes = 6.0,
    shrink: Annotated[int, typer.Option(min=1, help="Divides the numbers of codes and queries, to try it.")] = 1,
    output: Output = None,
) -> None:
    """Searches, latencies and additions on a GPU, the important ones first; each row is kept as soon as it is there."""
    steps = hamming_gpu_benchmark.planned(shrink)
    hamming_gpu_benchmark.run(steps, device=device, minutes=minutes, output=output)


@app.command()
def mapped(
    codes: Annotated[int, typer.Option(min=1, help="Codes in the file.")] = 100_000_000,
    queries: Annotated[int, typer.Option(min=1, help="Queries in a batch.")] = 1,
    bits: Annotated[int, typer.Option(min=8, help="Code length.")] = 64,
    k: Annotated[int, typer.Option("-k", min=1, help="Neighbours.")] = 10,
    cache: Annotated[int, typer.Option(min=1, help="MiB of page cache, where a memory cgroup can be made.")] = 256,
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of a search and a plain read.")] = 5,
    folder: Annotated[Path, typer.Option(help="Where the file is written, on the disk to measure.")] = Path("build"),
    output: Output = None,
) -> None:
    """Searches of a mapped index that the page cache cannot keep, beside a plain read of the same file."""
    mapped_benchmark.run(
        codes=codes,
        queries=queries,
        bits=bits,
        k=k,
        cache_bytes=cache << 20,
        threads=threads,
        rounds=rounds,
        folder=folder,
        output=output,
    )


@app.command()
def kernels(
    op: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(OPS)}; may be repeated.")] = None,
    model: Annotated[list[Model] | None, typer.Option(help="Whose layer shapes; may be repeated.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Instead of each model's own; may be repeated.")
    ] = None,
    shape: Annotated[
        tuple[int, int, int, int] | None, typer.Option(metavar="N C H W", help="One shape instead of the models'.")
    ] = None,
    dtype: Annotated[list[Dtype] | None, typer.Option(help="Default: float32; on a GPU bfloat16, too.")] = None,
    layout: Annotated[list[Layout] | None, typer.Option(help="Default: contiguous; may be repeated.")] = None,
    device: Device = "cpu",
    threads: Threads = None,
    quick: Annotated[bool, typer.Option(help="Only the smallest shape of each op, in short rounds.")] = False,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Measure torch.compile, too.")] = True,
    cuda_graphs: Annotated[bool, typer.Option(help="Replay CUDA graphs: no launch costs, for any system.")] = False,
    seconds: Annotated[float, typer.Option(min=0, help="About how long each table row may take.")] = 1.5,
    minutes: Minutes = math.inf,
    output: Output = None,
) -> None:
    """Every op, forward and forward + backward, beside eager torch, torch.compile and a copy of the tensor."""
    for name in op or []:
        if name not in OPS:
            raise InputError(f"op must be one of {', '.join(OPS)}, got {name}")
    gpu = device.startswith("cuda")
    kernels_benchmark.run(
        ops=op or list(DEFAULT_OPS),
        models=model,
        batches=batch,
        shape=shape,
        dtypes=dtype or ([Dtype.float32, Dtype.bfloat16] if gpu else [Dtype.float32]),
        layouts=layout or [Layout.contiguous],
        device=device,
        threads=threads,
        quick=quick,
        compiled=compiled,
        cuda_graphs=cuda_graphs,
        seconds=min(seconds, 0.2) if quick else seconds,
        minutes=minutes,
        output=output,
    )


@app.command()
def profile(
    op: Annotated[str, typer.Argument(help=f"One of {', '.join(profiling.NAMES)}.")],
    shape: Annotated[
        tuple[int, int, int, int] | None,
        typer.Option(metavar="N C H W", help="Of x; for hamming_topk: QUERIES CODES BITS K."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of x.")] = Dtype.float32,
    layout: Annotated[Layout, typer.Option(help="Of x.")] = Layout.contiguous,
    device: Device = "cpu",
    steps: Annotated[int, typer.Option(min=1, help="Calls under the profiler.")] = 5,
    forward_only: Annotated[bool, typer.Option("--forward", help="Leave out the backward.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the traces.")] = Path("build/profile"),
) -> None:
    """The kernels of an op beside eager's, forward and backward, and a trace of each for ui.perfetto.dev."""
    if op not in profiling.NAMES:
        raise InputError(f"op must be one of {', '.join(profiling.NAMES)}, got {op}")
    profiling.run(
        op=op,
        shape=shape,
        dtype=dtype,
        layout=layout,
        device=device,
        steps=steps,
        forward_only=forward_only,
        output=output,
    )


@app.command()
def model(
    name: Annotated[
        list[str] | None,
        typer.Argument(help="Models of torchvision that attention can be attached to. Default: resnet18."),
    ] = None,
    attention: Annotated[
        list[Attention] | None,
        typer.Option(help="What is put into every block; may be repeated. Default: triplet."),
    ] = None,
    mode: Annotated[list[Mode] | None, typer.Option(help="Default: both.")] = None,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    size: Annotated[int, typer.Option(min=32, help="Pixels of a side.")] = 224,
    dtype: Annotated[Dtype, typer.Option(help="bfloat16 by autocast.")] = Dtype.float32,
    layout: Annotated[Layout, typer.Option(help="Of images and weights.")] = Layout.contiguous,
    device: Device = "cpu",
    threads: Threads = None,
    steps: Annotated[int, typer.Option(min=1, help="Rounds, in each of which every system steps.")] = 5,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Measure torch.compile, too.")] = True,
    minutes: Minutes = math.inf,
    output: Output = None,
) -> None:
    """Images a second of a network without attention, and with it: eager, compiled, fused."""
    model_benchmark.run(
        names=name or ["resnet18"],
        attentions=attention or [Attention.triplet],
        modes=mode or list(Mode),
        batch=batch,
        size=size,
        dtype=dtype,
        layout=layout,
        device=device,
        threads=threads,
        steps=steps,
        compiled=compiled,
        minutes=minutes,
        output=output,
    )


@app.command()
def report(
    results: Annotated[
        Path, typer.Option(help="Folder of kernels-*.jsonl and hamming-gpu-*.jsonl.")
    ] = report_of_kernels.RESULTS,
    plot: Annotated[Path, typer.Option(help="The roofline plot to write.")] = report_of_kernels.PLOT,
    search_plot: Annotated[
        Path, typer.Option(help="The plot of searches on a GPU to write.")
    ] = report_of_kernels.SEARCH_PLOT,
) -> None:
    """Print the tables of kernels and of searches on a GPU and draw their plots, from the kept results alone."""
    report_of_kernels.run(results, plot, search_plot)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
