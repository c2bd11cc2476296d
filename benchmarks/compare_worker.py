"""Times single cells for `benchmarks.compare`, in a process that imports one of the two compared checkouts.

A cell is one call with fixed sizes.

The process is started with PYTHONPATH set to a checkout. It reads one JSON object per line from stdin:

- `{"list": true}`: it prints the names of all cells as a JSON array.
- `{"cell": name, "seconds": s}`: it repeats the cell for about `s` seconds and prints `{"seconds": median}`, the
  median time of one call.

It uses only names that both checkouts have: the ops, `TripletAttention` and `HammingIndex`.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch

import hashengine
import hashengine.nn
import hashengine.ops

Call = Callable[[], object]
ops = torch.ops.hashengine

CODES = 1_000_000
BITS = (64, 128, 256, 512, 1024)
SHAPES = ((1, 64, 56, 56), (32, 64, 56, 56), (32, 256, 14, 14), (32, 512, 7, 7))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@lru_cache(maxsize=1)
def codes(bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 256, (CODES, bits // 8), dtype=torch.uint8, generator=generator)


def search_cells() -> Iterator[tuple[str, Callable[[], Call]]]:
    """Yield the name of each cell of the search, and a function that prepares it and returns the call to time."""
    for bits in BITS:
        for queries, k in ((1000, 10), (1000, 100), (1000, 1000), (64, 10), (1, 10)):
            yield f"search/topk/{bits} bits/{queries} queries/k {k}", lambda b=bits, q=queries, k=k: topk(b, q, k)
    yield "search/topk/64 bits/1000 queries/k 10000", lambda: topk(64, 1000, 10_000)
    yield "search/topk/64 bits/1000 queries/k 100/half filtered out", lambda: topk(64, 1000, 100, filtered=True)
    yield "search/range/64 bits/1000 queries/radius 16", radius
    yield "search/count/64 bits/1000 queries", count
    yield "search/index/64 bits/1000 codes/1 query/k 10", small_index


def topk(bits: int, queries: int, k: int, filtered: bool = False) -> Call:
    stored = codes(bits)
    bitmap = torch.full(((CODES + 7) // 8,), 0b01010101, dtype=torch.uint8) if filtered else None
    batch = stored[:queries] ^ 1
    return lambda: ops.hamming_topk(batch, stored, k, bitmap, 0)  # 0: all threads


def radius() -> Call:
    stored = codes(64)
    queries = stored[:1000] ^ 1
    return lambda: hashengine.ops.hamming_range(queries, stored, 16)


def count() -> Call:
    stored = codes(64)
    queries = stored[:1000] ^ 1
    return lambda: hashengine.ops.hamming_count(queries, stored)


def small_index() -> Call:
    index = hashengine.HammingIndex(64)
    index.add(codes(64)[:1000])
    query = codes(64)[:1] ^ 1
    return lambda: index.search(query, 10)


def kernel_cells() -> Iterator[tuple[str, Callable[[], Call]]]:
    """Yield the name of each cell of the other ops, and a function that prepares it and returns the call to time."""
    for op in (simam, triplet_attention):
        for shape in SHAPES:
            for dtype in DTYPES:
                for layout in LAYOUTS:
                    for direction in ("forward", "forward+backward"):
                        name = f"kernels/{op.__name__}/{'x'.join(map(str, shape))}/{dtype}/{layout}/{direction}"
                        yield name, lambda o=op, s=shape, d=dtype, m=layout, w=direction: o(feature_map(s, d, m), w)
    for rows in (128, 65536):
        for direction in ("forward", "forward+backward"):
            yield f"kernels/greedy_sign/{rows}x64/{direction}", lambda r=rows, w=direction: greedy_sign(r, w)
        yield f"kernels/pack_bits/{rows}x64/forward", lambda r=rows: pack_bits(r)


def feature_map(shape: tuple[int, ...], dtype: str, layout: str) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    return x.contiguous(memory_format=LAYOUTS[layout])


def call_of(direction: str, forward: Callable[[], torch.Tensor], x: torch.Tensor) -> Call:
    """`forward` itself or, for "forward+backward", a call that also computes the gradient of x."""
    if direction == "forward":
        return forward
    gradient = torch.ones_like(x)
    x.requires_grad_()
    return lambda: torch.autograd.grad(forward(), x, gradient)


def simam(x: torch.Tensor, direction: str) -> Call:
    return call_of(direction, lambda: hashengine.ops.simam(x), x)


def triplet_attention(x: torch.Tensor, direction: str) -> Call:
    layer = hashengine.nn.TripletAttention().to(x.dtype).requires_grad_(False)
    layer.train(direction != "forward")
    return call_of(direction, lambda: layer(x), x)


def greedy_sign(rows: int, direction: str) -> Call:
    u = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))
    return call_of(direction, lambda: hashengine.ops.greedy_sign(u, 0.1)[0], u)


def pack_bits(rows: int) -> Call:
    u = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))
    return lambda: hashengine.ops.pack_bits(u)


def median_seconds(call: Call, seconds: float) -> float:
    """The median time of a call, which is repeated for `seconds` and at least once, after one warm-up call."""
    call()
    durations: list[float] = []
    end = time.perf_counter() + seconds
    while not durations or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


def main() -> None:
    """Answer requests until stdin ends."""
    cells = dict((*search_cells(), *kernel_cells()))
    for line in sys.stdin:
        request = json.loads(line)
        if "list" in request:
            answer: object = list(cells)
        else:
            answer = {"seconds": median_seconds(cells[request["cell"]](), request["seconds"])}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
