"""python -m tests.soak --device cuda --minutes 5: random operations on a HammingIndex, each compared with the CPU's.

One index after the other goes through some dozens of steps, on the devices and, beside it, on the CPU in one piece;
what they answer and what they hold must be equal bit for bit. All choices come from the seed, those of index i of a run
from the seed + i: the seed that a difference is told with begins with the index that showed it.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.codes import rare_bits
from hashengine import HammingIndex, InputError
from hashengine.index import _codes, _parts
from tests.helpers.hamming_levels import make_codes

MOST_CODES = 200_000
MOST_QUERIES = 300
RESULTS = 1 << 22  # of a call, and pairs with a bit of their own in a filter: what the CPU does in a second
MOST_STEPS = 40  # of an index
BITS = (8, 16, 32, 64, 128, 256, 512, 1024)
KINDS = ("random", "clustered", "duplicate", "sparse")
SHARES = (0.0, 0.001, 0.1, 0.5, 1.0)  # that a filter lets through


class Different(Exception):
    """An answer or a content that is not the CPU's."""


def placements(devices: list[str]) -> list[dict[str, Any]]:
    """Of the index under test, as its constructor takes them; the codes come home now and then."""
    found = [
        {"device": where, "streamed": streamed}
        for where in (devices[:1], devices[:1] * 3, devices)
        for streamed in (False, True)
    ]
    found = [place for number, place in enumerate(found) if place not in found[:number]]
    return [*found, {"device": ["cpu"], "streamed": False}]


class Life:
    """An index on the devices, `index`, and the same on the CPU, `plain`; all choices are drawn from one seed."""

    def __init__(self, devices: list[str], seed: int, most_codes: int, folder: Path, covered: Counter):
        self.rng, self.devices, self.most_codes, self.folder = np.random.default_rng(seed), devices, most_codes, folder
        self.covered = covered
        self.bits = int(self.pick(BITS) if self.chance(0.6) else 8 * self.rng.integers(1, 129))
        self.kind = self.pick(KINDS)
        self.own_ids, self.next_id = self.chance(0.5), 0
        self.place = self.pick(placements(devices))
        self.index, self.plain = HammingIndex(self.bits, **self.place), HammingIndex(self.bits)
        self.doing = "nothing"

    def pick(self, choices):
        return choices[self.rng.integers(len(choices))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def size(self, most: int) -> int:
        """1 to most, each order of magnitude as likely as the others."""
        return max(1, min(most, int(np.exp(self.rng.random() * np.log(most + 1)))))

    @contextlib.contextmanager
    def short_parts(self) -> Iterator[None]:
        """Runs and chunks of which these few codes, too, need many."""
        rows = max(8, self.most_codes // self.pick((3, 10, 40)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_codes, "_RUN", int(self.pick((8, 64, 4096))))
            patch.setattr(_codes, "_BLOCK_BYTES", rows * self.bits // 8)
            patch.setattr(_parts, "_CHUNK_BYTES", rows * self.bits // 8)
            yield

    def codes(self, count: int) -> np.ndarray:
        if self.kind == "sparse":
            return rare_bits((count, self.bits // 8), 4, self.rng)
        return make_codes(self.kind, count, self.bits, self.rng)

    def given(self, values: np.ndarray) -> np.ndarray | torch.Tensor:
        """In numpy, in torch, or on a device."""
        where = self.pick(("numpy", "cpu", self.devices[0]))
        return values if where == "numpy" else torch.from_numpy(np.ascontiguousarray(values)).to(where)

    def called(self, call: Callable[[], Any]) -> Any:
        """On a GPU now and then on a stream of its own, which begins after all that was asked for."""
        if not self.devices[0].startswith("cuda") or self.chance(0.7):
            return call()
        self.covered["on another stream"] += 1
        stream = torch.cuda.Stream(self.devices[0])
        stream.wait_stream(torch.cuda.current_stream(self.devices[0]))
        with torch.cuda.stream(stream):
            result = call()
        stream.synchronize()
        return result

    def step(self) -> None:
        """One operation on both, drawn; an empty index gets codes."""
        changes = [self.add, self.remove, self.update, self.compact, self.move, self.save_and_load]
        looks = [self.search, self.search, self.range_search, self.count, self.reconstruct]
        operation = self.add if len(self.plain) == 0 else self.pick(changes + 2 * looks)
        self.covered[operation.__name__] += 1
        self.doing = operation.__name__
        operation()
        self.covered[f"on {', '.join(self.place['device'])}{', streamed' * self.index.streamed}"] += 1
        if operation.__name__ in {change.__name__ for change in changes}:
            self.same((self.index.ids(), self.index.codes), (self.plain.ids(), self.plain.codes))

    def same(self, mine: tuple, right: tuple) -> None:
        for one, other in zip(mine, right, strict=True):
            one, other = (torch.as_tensor(part).cpu() for part in (one, other))
            if one.dtype != other.dtype or one.shape != other.shape:
                expected = f"{other.dtype} {list(other.shape)}"
                raise Different(f"{expected} expected, got {one.dtype} {list(one.shape)}")
            if not torch.equal(one, other):
                differing = (one != other).nonzero()
                where = tuple(differing[0].tolist())
                raise Different(
                    f"{len(differing)} of {one.numel()} values differ, the first at {list(where)}: "
                    f"{other[where]} expected, got {one[where]}"
                )

    def both(self, name: str, *arguments, **options) -> None:
        """A call whose answers are compared, and of which the answers lie where the queries do."""
        mine = self.called(lambda: getattr(self.index, name)(*arguments, **options))
        right = getattr(self.plain, name)(*arguments, **options)
        mine, right = (part if isinstance(part, tuple) else (part,) for part in (mine, right))
        for part in mine:
            if type(part) is not type(arguments[0]) or getattr(part, "device", 0) != getattr(arguments[0], "device", 0):
                raise Different(f"results of {type(arguments[0]).__name__} must be where the arguments are")
        self.same(mine, right)

    def add(self) -> None:
        count = self.size(max(1, self.most_codes - len(self.plain)))
        codes, ids = self.given(self.codes(count)), None
        if self.own_ids:
            ids = self.given(self.next_id + self.rng.permutation(3 * count)[:count])
            self.next_id += 3 * count
        self.doing += f" of {count} codes{' with ids' * self.own_ids}"
        self.called(lambda: self.index.add(codes, ids))
        self.plain.add(codes, ids)

    def some_ids(self) -> np.ndarray:
        ids = self.rng.permutation(self.plain.ids().numpy())
        return ids if self.chance(0.05) else ids[: self.size(len(ids))]

    def remove(self) -> None:
        ids = self.given(self.some_ids())
        self.doing += f" of {len(ids)} codes"
        self.called(lambda: self.index.remove(ids))
        self.plain.remove(ids)

    def update(self) -> None:
        ids = self.given(self.some_ids())
        codes = self.given(self.codes(len(ids)))
        self.doing += f" of {len(ids)} codes"
        self.called(lambda: self.index.update(ids, codes))
        self.plain.update(ids, codes)

    def compact(self) -> None:
        self.called(self.index.compact)
        self.plain.compact()

    def move(self) -> None:
        self.place = self.pick(placements(self.devices))
        self.doing += f" to {self.place}"
        self.index = self.called(lambda: self.index.to(**self.place))

    def save_and_load(self) -> None:
        """The folder of either index is the other's, too."""
        path, mmap = self.folder / self.pick("ab"), self.chance(0.5)
        self.place = self.pick(placements(self.devices))
        self.doing += f" to {self.place}, mmap={mmap}"
        self.pick((self.index, self.plain)).save(path)
        self.index = HammingIndex.load(path, mmap=mmap, **self.place)
        if self.chance(0.3):
            self.plain = HammingIndex.load(path)

    def queries(self, most: int) -> np.ndarray | torch.Tensor:
        """Some of them codes of the index."""
        most = max(1, min(MOST_QUERIES, most))
        count = self.size(most) if self.chance(0.5) else int(self.rng.integers(1, most + 1))
        queries = self.codes(count)
        known = self.rng.random(count) < 0.3
        queries[known] = self.plain.reconstruct(self.rng.choice(self.plain.ids().numpy(), known.sum()))
        self.doing += f" of {count} queries"
        self.covered["one query" if count == 1 else "several queries"] += 1
        return self.given(queries)

    def filter(self, queries: int) -> dict[str, Any]:
        shared, count = self.chance(0.5), len(self.plain)
        if self.chance(0.5) or (not shared and queries * count > RESULTS):
            return {}
        share = self.pick(SHARES)
        mask = self.rng.random(count if shared else (queries, count)) < share
        bitmap = self.chance(0.5)
        kind = f"{'bitmap' if bitmap else 'mask'}{' of a row' if shared else 's, a row a query'}"
        self.doing += f", {kind} of {share:g}"
        self.covered[kind] += 1
        return {"filter": self.given(np.packbits(mask, axis=-1, bitorder="little") if bitmap else mask)}

    def search(self) -> None:
        count = len(self.plain)
        k = min(count, int(self.pick((1, 10, 100, 1000, 4096, 4097, 20_000, count, self.size(count)))))
        queries = self.queries(RESULTS // k)
        self.doing += f", k = {k}"
        self.covered["k = 1" if k == 1 else "k = N" if k == count else "k <= 4096" if k <= 4096 else "k > 4096"] += 1
        self.both("search", queries, k, **self.filter(len(queries)))

    def range_search(self) -> None:
        most = self.pick((None, 1, 7, 5000))
        queries = self.queries(RESULTS // (len(self.plain) if most is None else most))
        radius = int(self.rng.integers(0, self.bits + 1))
        self.doing += f", radius {radius}, max_results={most}"
        self.both("range_search", queries, radius, max_results=most, **self.filter(len(queries)))

    def count(self) -> None:
        queries = self.queries(MOST_QUERIES)
        options, rows = self.filter(len(queries)), (len(queries), len(self.plain))
        labels = self.pick(("none", "classes", "shared"))
        self.doing += f", labels: {labels}"
        if labels == "classes":
            options["labels"] = tuple(self.given(self.rng.integers(-1, 4, side)) for side in rows)
        elif labels == "shared":
            columns = self.pick((1, 5, 64, 70))
            options["labels"] = tuple(self.given(self.rng.random((side, columns)) < 0.1) for side in rows)
        self.both("count", queries, **options)

    def reconstruct(self) -> None:
        self.both("reconstruct", self.given(self.some_ids()))


def run(devices: list[str], *, seconds: float, seed: int, most_codes: int = MOST_CODES) -> str:
    """A summary; ends with the seed and the step of the first difference."""
    start, steps, seeds, lengths, most = time.monotonic(), 0, 0, set(), 0
    covered: Counter[str] = Counter()
    while seeds == 0 or time.monotonic() < start + seconds:
        with tempfile.TemporaryDirectory() as folder:
            life = Life(devices, seed + seeds, most_codes, Path(folder), covered)
            with life.short_parts():
                for number in range(int(life.rng.integers(5, MOST_STEPS + 1))):
                    try:
                        life.step()
                    except Exception as error:
                        what = f"{life.doing}; {len(life.plain)} {life.kind} codes of {life.bits} bits on {life.place}"
                        print(f"--seed {seed + seeds}, step {number}: {what}", file=sys.stderr, flush=True)
                        if isinstance(error, Different):
                            raise SystemExit(f"not the CPU's answer: {error}") from None
                        raise
                    most = max(most, len(life.plain))
                    steps += 1
                    if time.monotonic() > start + seconds:
                        break
        covered[f"{life.kind} codes"] += 1
        lengths.add(life.bits)
        seeds += 1
    taken = time.monotonic() - start
    told = f"{steps} steps of {seeds} indexes on {', '.join(devices)} in {taken:.0f} s, all answers those of the CPU\n"
    told += f"seed {seed}, {len(lengths)} code lengths of {min(lengths)} to {max(lengths)} bits, up to {most} codes\n"
    return told + "\n".join(f"{times:7} {what}" for what, times in sorted(covered.items()))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cpu, cuda, cuda:1, or several with commas between them")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, help="of the first index; default: another each time")
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
