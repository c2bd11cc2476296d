"""The benchmarks' command line: python -m benchmarks."""

import math
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import compare as comparing
from benchmarks import report as reports
from benchmarks.harness import append_rows
from benchmarks.kernels import instructions as instruction_counts
from benchmarks.kernels import measure as kernel_measurements
from benchmarks.kernels import profiling
from benchmarks.kernels.inputs import Dtype, Layout
from benchmarks.kernels.ops import DEFAULT_OPS, OPS
from benchmarks.kernels.shapes import Model
from benchmarks.networks import throughput
from benchmarks.networks.throughput import Attention, Mode
from benchmarks.search import cpu as cpu_search
from benchmarks.search import floors as floor_search
from benchmarks.search import gpu_suite
from benchmarks.search import levels as level_search
from benchmarks.search import mapped as mapped_search
from benchmarks.search import single_query as single_query_search
from benchmarks.search.cases import Task, make_cases
from benchmarks.search.data import Data, can_make
from hashengine._validation import check_bits, check_device
from hashengine.cli import command_line
from hashengine.errors import invalid

app = command_line("Measure hashengine and its peers in the same run.")

Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
LayoutOption = Annotated[Layout, typer.Option(help="Memory format of the tensors.")]
Minutes = Annotated[float, typer.Option(min=0, help="After this many minutes, no measurement is started.")]
Output = Annotated[
    Path | None, typer.Option(help="File to append the result rows to, one JSON object per line.", show_default=False)
]
Rounds = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Number of rounds; each round times every system. Default: 5 on the CPU; on a GPU, as many as fit into a "
        "second, from 3 to 15.",
        show_default=False,
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Number of measured steps of each system.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads of every system; default: all cores.", show_default=False)
]


@app.command()
def hamming(
    task: Annotated[
        list[Task] | None,
        typer.Option(
            help="search: the k nearest codes; filter: the k nearest of the codes that a random filter selects; range: "
            "all codes within a radius, which is chosen so that it holds about k codes per query; map: mean average "
            "precision over the full ranking; count, only on the CPU: the number of codes at each distance. May be "
            "repeated; default: search.",
            show_default=False,
        ),
    ] = None,
    codes: Annotated[int, typer.Option(min=1, help="Codes in the database.")] = 1_000_000,
    queries: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Queries per batch; may be repeated with --levels; default: 1000.", show_default=False
        ),
    ] = None,
    bits: Annotated[
        list[int] | None, typer.Option(min=8, help="Bits per code; may be repeated; default: 64, 128 and 256.")
    ] = None,
    k: Annotated[
        list[int] | None, typer.Option("-k", min=1, help="Neighbours per query; may be repeated; default: 10 and 100.")
    ] = None,
    levels: Annotated[
        bool,
        typer.Option(
            "--levels",
            help="Compare the SIMD levels of this CPU in a grid of numbers of queries, k and code lengths, and name "
            "each cell in which a higher level is slower than a lower one.",
        ),
    ] = False,
    share: Annotated[
        float, typer.Option(min=0.001, max=1, help="For --task filter: the share of the codes that the filter selects.")
    ] = 0.5,
    data: Annotated[
        Data, typer.Option(help="How the codes are drawn, or the data set of images from which a network learns them.")
    ] = Data.random,
    images: Annotated[
        Path | None,
        typer.Option(
            envvar="HASHENGINE_DATA", help="Folder of the archive of images that --data names.", show_default=False
        ),
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    rounds: Rounds = None,
    output: Output = None,
) -> None:
    """Measure exact Hamming search, on the CPU or on a GPU.

    On the CPU, it is compared with FAISS IndexBinaryFlat in the faster of its two modes, with other libraries, with a
    bare distance loop over cached codes and, for a single query, with a plain read of the codes. On a GPU, it is
    compared with FAISS's GPU index, with searches in plain torch, and with limits that follow from the hardware. Only
    the task search has all of these comparisons. `hamming-gpu` measures all important cases.
    """
    if levels:
        if device != "cpu" or task or data is not Data.random:
            raise invalid("hamming", "--levels", "alone, or with options for sizes", "--task, --data or --device")
        level_search.run(
            codes=codes,
            queries=queries or level_search.QUERIES,
            bits=bits or level_search.BITS,
            ks=k or level_search.KS,
            threads=threads,
            rounds=rounds,
            output=output,
        )
        return
    if queries and len(queries) > 1:
        raise invalid("hamming", "queries", "one number without --levels", f"{len(queries)} numbers")
    lengths = bits or [64, 128, 256]
    cases = make_cases(
        "hamming",
        tasks=task or [Task.search],
        codes=codes,
        queries=queries[0] if queries else 1000,
        bits=lengths,
        ks=k or [10, 100],
        share=share,
        data=data,
    )
    if not all(can_make(data, length, images) for length in lengths):
        typer.echo(
            f"hamming: skipped, because --data {data.value} needs image archives; give their folder with --images or "
            "HASHENGINE_DATA"
        )
        return
    if not device.startswith("cuda"):
        check_device("hamming", device)
        cpu_search.run(cases, threads=threads, rounds=rounds, images=images, output=output)
        return
    if threads is not None:
        raise invalid("hamming", "threads", f"left out with --device {device}", threads)
    if Task.count in (task or []):
        raise invalid("hamming", "--task", f"map, which also counts, with --device {device}", Task.count.value)
    steps = [(gpu_suite.SEARCH, case) for case in cases]
    gpu_suite.run(steps, where="hamming", device=device, minutes=math.inf, rounds=rounds, images=images, output=output)


@app.command()
def hamming_floors(
    codes: Annotated[int, typer.Option(min=1, help="Codes in the database.")] = 1_000_000,
    queries: Annotated[int, typer.Option(min=1, help="Queries per batch.")] = floor_search.QUERIES,
    bits: Annotated[
        list[int] | None, typer.Option(min=8, help="Bits per code; may be repeated; default: 64 to 1024.")
    ] = None,
    k: Annotated[
        list[int] | None,
        typer.Option("-k", min=1, help="Neighbours per query; may be repeated; default: 10, 100 and 1000."),
    ] = None,
    threads: Threads = None,
    rounds: Rounds = None,
    output: Output = None,
) -> None:
    """Measure how near a batched search on the CPU comes to the time that its instructions take at least."""
    for length in bits or ():
        check_bits("hamming-floors", length)
    floor_search.run(
        codes=codes,
        queries=queries,
        bits=bits or floor_search.BITS,
        ks=k or floor_search.KS,
        threads=threads,
        rounds=rounds,
        output=output,
    )


@app.command()
def hamming_gpu(
    device: Device = "cuda",
    minutes: Minutes = 6.0,
    shrink: Annotated[
        int, typer.Option(min=1, help="Divide the numbers of codes and queries by this number, to try the command.")
    ] = 1,
    output: Output = None,
) -> None:
    """Measure searches, latencies, index builds and streamed searches on a GPU, the most important ones first.

    Each row is printed and appended to --output as soon as it is measured.
    """
    gpu_suite.run(gpu_suite.shrunk_suite(shrink), device=device, minutes=minutes, output=output)


@app.command()
def mapped(
    codes: Annotated[int, typer.Option(min=1, help="Codes in the file.")] = 100_000_000,
    queries: Annotated[int, typer.Option(min=1, help="Queries per batch.")] = 1,
    bits: Annotated[int, typer.Option(min=8, help="Bits per code.")] = 64,
    k: Annotated[int, typer.Option("-k", min=1, help="Neighbours per query.")] = 10,
    cache: Annotated[
        int,
        typer.Option(min=1, help="Size of the page cache in MiB, if this machine permits a memory cgroup."),
    ] = 256,
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds; each times one search and one read.")] = 5,
    folder: Annotated[Path, typer.Option(help="Folder for the file, on the disk to measure.")] = Path("build"),
    output: Output = None,
) -> None:
    """Measure searches of a mapped index that the page cache cannot hold, against a plain read of the same file."""
    mapped_search.run(
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
def single_query(
    codes: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Codes in the database; may be repeated; default: eight numbers from 1,000 to 1M."),
    ] = None,
    bits: Annotated[int, typer.Option(min=8, help="Bits per code.")] = 64,
    k: Annotated[int, typer.Option("-k", min=1, help="Neighbours.")] = 10,
    busy: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Other busy processes during a measurement; may be repeated; default: 0 and 2."),
    ] = None,
    threads: Threads = None,
    output: Output = None,
) -> None:
    """Measure searches of few codes for one query, with the parts of their overhead, against FAISS."""
    check_bits("single-query", bits)
    single_query_search.run(
        codes=codes or single_query_search.CODES,
        bits=bits,
        k=k,
        busy=[0, 2] if busy is None else busy,
        threads=threads,
        output=output,
    )


@app.command()
def kernels(
    op: Annotated[
        list[str] | None,
        typer.Option(
            help=f"One of {', '.join(OPS)}; may be repeated; default: {', '.join(DEFAULT_OPS)}.", show_default=False
        ),
    ] = None,
    model: Annotated[
        list[Model] | None, typer.Option(help="Network whose layer shapes are measured; may be repeated; default: all.")
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Samples per batch; may be repeated; default: chosen per network.", show_default=False
        ),
    ] = None,
    shape: Annotated[
        tuple[int, int, int, int] | None,
        typer.Option(metavar="N C H W", help="A single shape, instead of those of the networks.", show_default=False),
    ] = None,
    dtype: Annotated[
        list[Dtype] | None,
        typer.Option(help="Dtype of x; may be repeated; default: float32, on a GPU also bfloat16.", show_default=False),
    ] = None,
    layout: Annotated[
        list[Layout] | None,
        typer.Option(help="Memory format of the tensors; may be repeated; default: contiguous.", show_default=False),
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    quick: Annotated[
        bool, typer.Option(help="Measure only the smallest shape of each op, and limit --seconds to 0.2.")
    ] = False,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Measure torch.compile too.")] = True,
    cuda_graphs: Annotated[bool, typer.Option(help="Time the replay of a CUDA graph instead of each call.")] = False,
    seconds: Annotated[
        float, typer.Option(min=0, help="About how many seconds the rounds of a result row take.")
    ] = 1.5,
    minutes: Minutes = math.inf,
    output: Output = None,
) -> None:
    """Measure ops, forward and forward + backward, against eager torch, torch.compile and a copy of the tensor."""
    for name in op or []:
        if name not in OPS:
            raise invalid("kernels", "op", f"one of {', '.join(OPS)}", name)
    default_dtypes = [Dtype.float32, Dtype.bfloat16] if device.startswith("cuda") else [Dtype.float32]
    kernel_measurements.run(
        ops=op or list(DEFAULT_OPS),
        models=model,
        batches=batch,
        shape=shape,
        dtypes=dtype or default_dtypes,
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
        typer.Option(metavar="N C H W", help="Shape of x; for hamming_topk: QUERIES CODES BITS K.", show_default=False),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of x.")] = Dtype.float32,
    layout: LayoutOption = Layout.contiguous,
    device: Device = "cpu",
    steps: Steps = 5,
    forward_only: Annotated[bool, typer.Option("--forward", help="Leave out the backward pass.")] = False,
    output: Annotated[Path, typer.Option(help="Folder to write the traces to.")] = Path("build/profile"),
) -> None:
    """Print the time of each kernel of an op, fused and in eager torch, and write traces for ui.perfetto.dev."""
    if op not in profiling.NAMES:
        raise invalid("profile", "op", f"one of {', '.join(profiling.NAMES)}", op)
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
        typer.Argument(
            help="Networks of torchvision to which attention can be attached; default: resnet18.", show_default=False
        ),
    ] = None,
    attention: Annotated[
        list[Attention] | None,
        typer.Option(help="Attention to attach to every block; may be repeated; default: triplet.", show_default=False),
    ] = None,
    mode: Annotated[
        list[Mode] | None, typer.Option(help="Kind of step; may be repeated; default: both.", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples per batch.")] = 8,
    size: Annotated[int, typer.Option(min=32, help="Height and width of the images in pixels.")] = 224,
    dtype: Annotated[Dtype, typer.Option(help="float32, or bfloat16 by autocast.")] = Dtype.float32,
    layout: LayoutOption = Layout.contiguous,
    device: Device = "cpu",
    threads: Threads = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Number of rounds; each times at least one step of every system.")
    ] = 5,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Measure torch.compile too.")] = True,
    minutes: Minutes = math.inf,
    output: Output = None,
) -> None:
    """Measure images per second of a network without attention, with eager attention and with fused attention.

    Each network is also measured with torch.compile, unless --no-compile is given.
    """
    throughput.run(
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
def compare(
    other: Annotated[Path, typer.Argument(help="Another checkout, with its native module built in place.")],
    only: Annotated[str, typer.Option(help="Measure only the cells whose name contains this text.")] = "",
    rounds: Annotated[int, typer.Option(min=6, help="Number of rounds, at least 6; each times both checkouts.")] = 9,
    seconds: Annotated[float, typer.Option(min=0, help="About how many seconds a call is repeated per round.")] = 0.1,
    output: Output = None,
) -> None:
    """Measure search and kernels in this checkout and in OTHER, in alternation.

    A cell is one call with fixed sizes. The exit code is 1 if a cell is slower in this checkout than in OTHER, by more
    than 2% and by more than the noise.
    """
    comparisons = comparing.compare(other, only=only, rounds=rounds, seconds=seconds)
    typer.echo(comparing.summary(comparisons))
    if output is not None:
        append_rows(output, comparing.rows(comparisons))
    if any(comparison.is_slower for comparison in comparisons):
        raise typer.Exit(1)


@app.command()
def instructions(
    only: Annotated[str, typer.Option(help="Count only the paths whose name contains this text.")] = "",
    branches: Annotated[bool, typer.Option("--branches", help="List the branches of each kernel as well.")] = False,
) -> None:
    """Count the machine instructions that CUDA kernels execute, and print what their banners say.

    No GPU is needed, but one release of nvcc.
    """
    typer.echo(instruction_counts.run(only, branches))


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="Folder of the result rows, *.jsonl.")] = reports.RESULTS,
    output: Annotated[Path, typer.Option(help="Folder to write the tables and plots to.")] = reports.OUTPUT,
) -> None:
    """Write the Markdown tables and the plots of the documentation, from the result rows alone."""
    for file in reports.render(results, output):
        typer.echo(file)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
