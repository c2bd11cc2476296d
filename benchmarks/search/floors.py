"""`hamming-floors`: how near a batched search comes to the time that its instructions take at least.

Two methods compute the distances of many queries. The population count XORs a word of a code with a word of a query and
counts the bits, for the codes in the lanes of a vector. Bit-slicing looks up and adds the distances of all queries of a
block to one code at a time; see `csrc/cpu/hamming/bitsliced/scan.h`.

The time of a method's instructions is measured without what a search adds to them. For the population count, this is
the bare loop. For bit-slicing, it is a search of equal codes: every code reads the same table entries, which stay in
the first-level cache, and after the first codes there is no hit.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.harness import Row, WrongAnswer, append_rows, console_width, describe_machine, set_threads
from benchmarks.search.cpu_rates import bare_loop
from benchmarks.search.row_names import BARE_LOOP, FAISS, OURS
from benchmarks.tables import Columns, rich_table
from benchmarks.timing import median_ratio, time_in_rounds
from hashengine import HammingIndex
from tests.helpers.faiss_oracle import FaissOracle

BITS = (64, 128, 256, 512, 1024)
KS = (10, 100, 1000)
QUERIES = 1024  # two blocks of 512 queries
DEFAULT_ROUNDS = 5
EQUAL_CODES = "equal codes"

_FULL_ADDER = {"avx512": 2, "avx2": 5, "neon": 3}  # instructions
_VECTOR_BITS = {"avx512": 512, "avx2": 256, "neon": 128}
# Instructions for one word of the codes in the lanes of a vector, and for their comparison with the bound.
_COUNTED_WORD, _COMPARISON = {"avx512": 3, "avx2": 9}, {"avx512": 1, "avx2": 2}
_VERIFIED_QUERIES = 50


def sliced_instructions(bits: int, level: str) -> float | None:
    """The fewest instructions of bit-slicing for one distance: loads of table entries and additions; no addresses.

    None for a level without that method.
    """
    if level not in _FULL_ADDER:
        return None
    words = max(1, bits // 64)
    width = 7 if words <= 2 else 6 if words <= 4 else 3
    of_word = min(bits, 64)
    fields = [width] * (of_word // width) + ([of_word % width] if of_word % width else [])
    addends = [0] * (bits.bit_length() + 1)
    for field in fields * words:
        for weight in range(field.bit_length()):
            addends[weight] += 1
    instructions = sum(addends)  # loads
    for weight in range(bits.bit_length()):
        full, half = divmod(addends[weight], 2)  # a full adder adds two addends to the sum
        instructions += _FULL_ADDER[level] * full + 2 * half
        addends[weight + 1] += full + half
    return instructions / _VECTOR_BITS[level]


def counted_instructions(bits: int, level: str) -> float | None:
    """The fewest instructions of the population count for one distance, if loads of codes and queries cost nothing."""
    if level not in _COUNTED_WORD:
        return None
    words = max(1, bits // 64)
    return (words * _COUNTED_WORD[level] + _COMPARISON[level]) / (_VECTOR_BITS[level] // 64)


def run(
    *,
    codes: int,
    queries: int,
    bits: Sequence[int],
    ks: Sequence[int],
    threads: int | None,
    rounds: int | None,
    output: Path | None,
) -> list[Row]:
    """Measure both methods and the search for each code length, and print a table.

    Args:
        codes: the number of codes.
        queries: the number of queries.
        bits: code lengths.
        ks: numbers of neighbours.
        threads: torch's number of threads; None for all cores.
        rounds: how many times each call is timed; `DEFAULT_ROUNDS` if None.
        output: a JSON Lines file to append the rows to.

    Returns:
        A row for each code length and k.

    Raises:
        WrongAnswer: the answers of the search differ from FAISS's.
    """
    machine = describe_machine() | {"benchmark": "hamming-floors", "threads": set_threads(threads), "codes": codes}
    rows = []
    for length in bits:
        calls, distances = _calls(codes, queries, length, ks, machine["threads"])
        seconds = time_in_rounds(calls, rounds or DEFAULT_ROUNDS)
        of_length = [
            machine | {"queries": queries, "bits": length, "k": k} | _figures(seconds, distances, k, length, machine)
            for k in ks
        ]
        rows += of_length
        if output is not None:
            append_rows(output, of_length)
    caption = (
        f"{codes:,} codes, {queries:,} queries: billions of distances per second, and instructions per distance, at "
        f"least; {machine['threads']} threads of {machine['cpu']}, {machine['simd_level']}"
    )
    Console(width=console_width(160)).print(rich_table(_COLUMNS, rows, caption))
    return rows


def _calls(
    codes: int, queries: int, bits: int, ks: Sequence[int], threads: int
) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """The calls to time, and the number of distances that each computes."""
    rng = np.random.default_rng(bits)
    database, batch = (rng.integers(0, 256, (rows, bits // 8), dtype=np.uint8) for rows in (codes, queries))
    index, equal, oracle = HammingIndex(bits), HammingIndex(bits), FaissOracle(database)
    index.add(database)
    equal.add(np.repeat(database[:1], codes, axis=0))
    calls: dict[str, Callable[[], object]] = {EQUAL_CODES: partial(equal.search, batch, 1)}
    distances = {EQUAL_CODES: codes * queries}
    if (loop := bare_loop(bits, threads)) is not None:
        calls[BARE_LOOP], distances[BARE_LOOP] = loop
    for k in ks:
        few = batch[:_VERIFIED_QUERIES]
        if not all(map(np.array_equal, index.search(few, k), oracle.search(few, k))):
            raise WrongAnswer(f"hamming-floors: {bits} bits, k = {k}: the answers must equal those of {oracle.name}")
        for name, system in ((OURS, index), (FAISS, oracle)):
            calls[f"{name} {k}"], distances[f"{name} {k}"] = partial(system.search, batch, k), codes * queries
    return calls, distances


def _figures(seconds: Mapping[str, list[float]], distances: Mapping[str, int], k: int, bits: int, machine: Row) -> Row:
    rates = {name: distances[name] / statistics.median(times) / 1e9 for name, times in seconds.items()}
    ours = f"{OURS} {k}"
    floors = {name: rates[name] for name in (EQUAL_CODES, BARE_LOOP) if name in rates}
    fastest = max(floors, key=floors.__getitem__)
    share = distances[ours] / distances[fastest] * median_ratio(seconds[fastest], seconds[ours])
    return {
        "sliced_instructions": sliced_instructions(bits, machine["simd_level"]),
        "counted_instructions": counted_instructions(bits, machine["simd_level"]),
        "rates": floors | {OURS: rates[ours], FAISS: rates[f"{FAISS} {k}"]},
        "share_of_floor": share,
        "times_faiss": median_ratio(seconds[f"{FAISS} {k}"], seconds[ours]),
    }


def _rate(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row['rates'][name]:.1f}" if name in row["rates"] else "–"


def _instructions(name: str) -> Callable[[Row], str]:
    return lambda row: "–" if row[name] is None else f"{row[name]:.2f}"


_COLUMNS: Columns = {
    "bits": lambda row: str(row["bits"]),
    "k": lambda row: f"{row['k']:,}",
    "bit-slicing, instructions": _instructions("sliced_instructions"),
    "rate": _rate(EQUAL_CODES),
    "population count, instructions": _instructions("counted_instructions"),
    "rate ": _rate(BARE_LOOP),
    "search": _rate(OURS),
    "of the faster method": lambda row: f"{row['share_of_floor']:.0%}",
    "FAISS": _rate(FAISS),
    "times FAISS": lambda row: f"{row['times_faiss']:.1f}",
}
