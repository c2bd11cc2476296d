"""python -m tests.soak --device cuda --minutes 5: random operations on indexes, compared with an index on the CPU.

The operations are run on a pair of indexes with equal contents: the first is placed at random, mostly on the given
devices; the second is on the CPU, in one shard. Their answers and their contents must be equal bit for bit. A pair goes
through 5 to 40 operations (steps). The pairs are counted from 0, and all random choices of pair i depend on the number
seed + i. The report of a difference names this number. A run with it as its seed starts with the pair that differed.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hashengine import HammingIndex, InputError
from tests.helpers.codes import rare_bits
from tests.helpers.hamming_levels import make_codes
from tests.helpers.index_operations import use_small_blocks

MOST_CODES = 200_000
MOST_QUERIES = 300
MOST_RESULTS = 1 << 22  # per call; also the most values in a filter with a mask per query
MOST_STEPS = 40  # per pair of indexes
BITS = (8, 16, 32, 64, 128, 256, 512, 1024)
KINDS = ("random", "clustered", "duplicate", "sparse")
SELECTED_SHARES = (0.0, 0.001, 0.1, 0.5, 1.0)  # the shares of the codes that a filter selects


class Difference(Exception):
    """An answer or contents that differ from those of the index on the CPU."""


def placements(devices: list[str]) -> list[dict[str, Any]]:
    """The possible constructor arguments of the index under test. The last entry is an index on the CPU."""
    found = [
        {"device": where, "streamed": streamed}
        for where in (devices[:1], devices[:1] * 3, devices)
        for streamed in (False, True)
    ]
    found = [place for number, place in enumerate(found) if place not in found[:number]]
    return [*found, {"device": ["cpu"], "streamed": False}]


class Comparison:
    """A pair of indexes with equal contents: `index` is the one under test, `plain` is on the CPU in one shard."""

    def __init__(self, devices: list[str], seed: int, most_codes: int, folder: Path, covered: Counter[str]) -> None:
        self.rng, self.devices, self.most_codes = np.random.default_rng(seed), devices, most_codes
        self.folder, self.covered = folder, covered
        self.bits = int(self.pick(BITS) if self.chance(0.6) else 8 * self.rng.integers(1, 129))
        self.kind = self.pick(KINDS)
        self.own_ids, self.next_id = self.chance(0.5), 0
        self.place = self.pick(placements(devices))
        self.index, self.plain = HammingIndex(self.bits, **self.place), HammingIndex(self.bits)
        self.operation = "nothing"

    def pick(self, choices: Sequence[Any]) -> Any:
        return choices[self.rng.integers(len(choices))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def size(self, most: int) -> int:
        """A random size from 1 to `most`, with all orders of magnitude equally likely."""
        return max(1, min(most, int(np.exp(self.rng.random() * np.log(most + 1)))))

    @contextlib.contextmanager
    def small_blocks(self) -> Iterator[None]:
        """Make shard blocks, chunks and transfers so small that the codes of this test fill several of them."""
        rows = max(8, self.most_codes // self.pick((3, 10, 40)))
        with pytest.MonkeyPatch.context() as patch:
            block = int(self.pick((8, 64, 4096)))
            use_small_blocks(
                patch, shard_block_rows=block, chunk_rows=rows, transfer_rows=rows, bytes_per_code=self.bits // 8
            )
            yield

    def codes(self, count: int) -> np.ndarray:
        if self.kind == "sparse":
            return rare_bits((count, self.bits // 8), 4, self.rng)
        return make_codes(self.kind, count, self.bits, self.rng)

    def given(self, values: np.ndarray) -> np.ndarray | torch.Tensor:
        """The values in a random form: a numpy array, or a tensor on the CPU or on the first device."""
        where = self.pick(("numpy", "cpu", self.devices[0]))
        return values if where == "numpy" else torch.from_numpy(np.ascontiguousarray(values)).to(where)

    def called(self, call: Callable[[], Any]) -> Any:
        """Run `call` and return its result.

        On a GPU, some calls run on a new stream, which first waits for the work in the current stream.
        """
        if not self.devices[0].startswith("cuda") or self.chance(0.7):
            return call()
        self.covered["on another stream"] += 1
        stream = torch.cuda.Stream(self.devices[0])
        stream.wait_stream(torch.cuda.current_stream(self.devices[0]))
        with torch.cuda.stream(stream):
            result = call()
        stream.synchronize()
        return result

    def describe(self) -> str:
        """The current operation and the contents of the index, for a report."""
        contents = f"{len(self.plain)} {self.kind} codes of {self.bits} bits"
        return f"{self.operation}; {contents} on {self.place}"

    def step(self) -> None:
        """Run a random operation on the pair of indexes. If they are empty, the operation is `add`."""
        writes = [self.add, self.remove, self.update, self.compact, self.move, self.save_and_load]
        reads = [self.search, self.search, self.range_search, self.count, self.reconstruct]
        operation = self.add if len(self.plain) == 0 else self.pick(writes + 2 * reads)
        self.covered[operation.__name__] += 1
        self.operation = operation.__name__
        operation()
        self.covered[f"on {', '.join(self.place['device'])}{', streamed' * self.index.streamed}"] += 1
        if operation.__name__ in {write.__name__ for write in writes}:
            self.check_equal((self.index.ids, self.index.codes), (self.plain.ids, self.plain.codes))

    def check_equal(self, results: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
        for result, right in zip(results, expected, strict=True):
            result, right = (torch.as_tensor(tensor).cpu() for tensor in (result, right))
            if result.dtype != right.dtype or result.shape != right.shape:
                kind = f"{right.dtype} {list(right.shape)}"
                raise Difference(f"{kind} expected, got {result.dtype} {list(result.shape)}")
            if not torch.equal(result, right):
                differing = (result != right).nonzero()
                where = tuple(differing[0].tolist())
                raise Difference(
                    f"{len(differing)} of {result.numel()} values differ, the first at {list(where)}: "
                    f"{right[where]} expected, got {result[where]}"
                )

    def compare(self, name: str, *arguments: Any, **options: Any) -> None:
        """Call a method of both indexes, and compare the answers.

        The answer of `index` must also be in the library and on the device of the first argument.
        """
        results = self.called(lambda: getattr(self.index, name)(*arguments, **options))
        expected = getattr(self.plain, name)(*arguments, **options)
        results, expected = (part if isinstance(part, tuple) else (part,) for part in (results, expected))
        first = arguments[0]
        for result in results:
            if type(result) is not type(first) or getattr(result, "device", 0) != getattr(first, "device", 0):
                kind = type(first).__name__
                raise Difference(f"results must be of type {kind} and on the device of the first argument")
        self.check_equal(results, expected)

    def add(self) -> None:
        count = self.size(max(1, self.most_codes - len(self.plain)))
        codes, ids = self.given(self.codes(count)), None
        if self.own_ids:
            ids = self.given(self.next_id + self.rng.permutation(3 * count)[:count])
            self.next_id += 3 * count
        self.operation += f" of {count} codes{' with ids' * self.own_ids}"
        self.called(lambda: self.index.add(codes, ids))
        self.plain.add(codes, ids)

    def some_ids(self) -> np.ndarray:
        ids = self.rng.permutation(self.plain.ids.numpy())
        return ids if self.chance(0.05) else ids[: self.size(len(ids))]

    def remove(self) -> None:
        ids = self.given(self.some_ids())
        self.operation += f" of {len(ids)} codes"
        self.called(lambda: self.index.remove(ids))
        self.plain.remove(ids)

    def update(self) -> None:
        ids = self.given(self.some_ids())
        codes = self.given(self.codes(len(ids)))
        self.operation += f" of {len(ids)} codes"
        self.called(lambda: self.index.update(ids, codes))
        self.plain.update(ids, codes)

    def compact(self) -> None:
        self.called(self.index.compact)
        self.plain.compact()

    def move(self) -> None:
        self.place = self.pick(placements(self.devices))
        self.operation += f" to {self.place}"
        self.index = self.called(lambda: self.index.to(**self.place))

    def save_and_load(self) -> None:
        """Save one of the two indexes, then load `index`, and sometimes `plain`, from the folder."""
        writer, mmap = self.pick(("index", "plain")), self.chance(0.5)
        path = self.folder / f"{writer}-{self.pick('ab')}"  # a folder of one writer: others may not save to it
        self.place = self.pick(placements(self.devices))
        self.operation += f" to {self.place}, mmap={mmap}"
        getattr(self, writer).save(path)
        self.index = HammingIndex.load(path, mmap=mmap, **self.place)
        if self.chance(0.3):
            self.plain = HammingIndex.load(path)

    def queries(self, most: int) -> np.ndarray | torch.Tensor:
        """Queries, some of which equal codes of the index."""
        most = max(1, min(MOST_QUERIES, most))
        count = self.size(most) if self.chance(0.5) else int(self.rng.integers(1, most + 1))
        queries = self.codes(count)
        known = self.rng.random(count) < 0.3
        queries[known] = self.plain.reconstruct(self.rng.choice(self.plain.ids.numpy(), known.sum()))
        self.operation += f" of {count} queries"
        self.covered["one query" if count == 1 else "several queries"] += 1
        return self.given(queries)

    def filter(self, queries: int) -> dict[str, Any]:
        shared, count = self.chance(0.5), len(self.plain)
        if self.chance(0.5) or (not shared and queries * count > MOST_RESULTS):
            return {}
        share = self.pick(SELECTED_SHARES)
        mask = self.rng.random(count if shared else (queries, count)) < share
        bitmap = self.chance(0.5)
        kind = f"{'bitmap' if bitmap else 'mask'}{'' if shared else ' per query'}"
        self.operation += f", {kind} that selects {share:.1%} of the codes"
        self.covered[kind] += 1
        return {"filter": self.given(np.packbits(mask, axis=-1, bitorder="little") if bitmap else mask)}

    def search(self) -> None:
        count = len(self.plain)
        k = min(count, int(self.pick((1, 10, 100, 1000, 4096, 4097, 20_000, count, self.size(count)))))
        queries = self.queries(MOST_RESULTS // k)
        self.operation += f", k = {k}"
        self.covered["k = 1" if k == 1 else "k = N" if k == count else "k <= 4096" if k <= 4096 else "k > 4096"] += 1
        self.compare("search", queries, k, **self.filter(len(queries)))

    def range_search(self) -> None:
        most = self.pick((None, 1, 7, 5000))
        queries = self.queries(MOST_RESULTS // (len(self.plain) if most is None else most))
        radius = int(self.rng.integers(0, self.bits + 1))
        self.operation += f", radius {radius}, max_results={most}"
        self.compare("range_search", queries, radius, max_results=most, **self.filter(len(queries)))

    def count(self) -> None:
        queries = self.queries(MOST_QUERIES)
        options, rows = self.filter(len(queries)), (len(queries), len(self.plain))
        labels = self.pick(("none", "classes", "shared"))
        self.operation += f", labels: {labels}"
        if labels == "classes":
            options["labels"] = tuple(self.given(self.rng.integers(-1, 4, side)) for side in rows)
        elif labels == "shared":
            columns = self.pick((2, 5, 64, 70))
            options["labels"] = tuple(self.given(self.rng.random((side, columns)) < 0.1) for side in rows)
        self.compare("count", queries, **options)

    def reconstruct(self) -> None:
        self.compare("reconstruct", self.given(self.some_ids()))


def run(devices: list[str], *, seconds: float, seed: int, most_codes: int = MOST_CODES) -> str:
    """Run steps for `seconds`, and return a summary. At the first failure, print its seed and step, and stop."""
    start, steps, seeds, lengths, most = time.monotonic(), 0, 0, set(), 0
    covered: Counter[str] = Counter()
    while seeds == 0 or time.monotonic() < start + seconds:
        with tempfile.TemporaryDirectory() as folder:
            comparison = Comparison(devices, seed + seeds, most_codes, Path(folder), covered)
            with comparison.small_blocks():
                for number in range(int(comparison.rng.integers(5, MOST_STEPS + 1))):
                    try:
                        comparison.step()
                    except Exception as error:
                        where = f"--seed {seed + seeds}, step {number}"
                        print(f"{where}: {comparison.describe()}", file=sys.stderr, flush=True)
                        if isinstance(error, Difference):
                            raise SystemExit(f"not the CPU's answer: {error}") from None
                        raise
                    most = max(most, len(comparison.plain))
                    steps += 1
                    if time.monotonic() > start + seconds:
                        break
        covered[f"{comparison.kind} codes"] += 1
        lengths.add(comparison.bits)
        seeds += 1
    taken = time.monotonic() - start
    lines = [
        f"{steps} steps of {seeds} indexes on {', '.join(devices)} in {taken:.0f} s, all answers equal to the CPU's",
        f"seed {seed}, {len(lengths)} code lengths of {min(lengths)} to {max(lengths)} bits, up to {most} codes",
        *(f"{times:7} {what}" for what, times in sorted(covered.items())),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cpu, cuda, cuda:1, or several of these, separated by commas")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, help="the seed of the first pair of indexes (default: random)")
    given = parser.parse_args()
    seed = random.randrange(1 << 31) if given.seed is None else given.seed
    devices = given.device.split(",")
    try:
        HammingIndex(8, devices)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"seed {seed}", flush=True)
    print(run(devices, seconds=60 * given.minutes, seed=seed))


if __name__ == "__main__":
    main()
