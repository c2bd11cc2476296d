"""Every command and every example in README.md runs as it stands there."""

import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)  # (language, code)
NAMES = [re.sub(r"\W+", "-", code.splitlines()[-1]) for _, code in BLOCKS]
NEEDED = {
    "torchvision": "torchvision",
    "training": "sklearn",
    "benchmarks": "faiss",
    "faiss": "faiss",
}  # a word in the block: a package


@pytest.fixture
def environment(tmp_path):
    """A shell environment in which `python` and `hashengine` are those under test."""
    scripts = tmp_path / "bin"
    scripts.mkdir()
    for name, command in (("python", ""), ("hashengine", "-m hashengine")):
        (scripts / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {command} "$@"\n')
        (scripts / name).chmod(0o755)
    return os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def runnable(shell: str) -> str:
    """The block with its `make` lines as dry runs: what they would run is this very suite and its set-up."""
    return re.sub(r"^make ", f"make --dry-run --directory={ROOT} ", shell, flags=re.MULTILINE)


@pytest.mark.parametrize(("language", "code"), BLOCKS, ids=NAMES)
def test_block_runs(language, code, environment, tmp_path):
    for word, package in NEEDED.items():
        if word in code:
            pytest.importorskip(package)
    command = {"sh": ["bash", "-euxc", runnable(code)], "python": [sys.executable, "-c", code]}[language]
    if code.startswith("make ") and not shutil.which("make"):
        pytest.skip("make is not installed")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_command_that_the_text_names_is_in_a_block():
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`((?:hashengine|make|python -m \w+) [a-z]+)", text))
    shell = "".join(code for language, code in BLOCKS if language == "sh")
    assert named >= {"hashengine doctor", "make demo"}
    assert {command for command in named if command not in shell} <= {"make setup"}


def test_the_table_of_search_rates_is_what_was_measured():
    million = 1_000_000
    columns = {
        "k = 10": ("search", 10, million), "k = 100": ("search", 100, million), "k = 1,000": ("search", 1000, million),
        "k = 10,000": ("search", 10_000, million), "k = 100 of half the codes": ("filter", 100, million),
        "radius of 100": ("range", 100, million), "one query of 8M, k = 10": ("search", 10, 8 * million),
    }  # fmt: skip
    lines = (ROOT / "benchmarks" / "results" / "hamming-epyc-zen3-2cores.jsonl").read_text().splitlines()
    measured = {}
    for row in map(json.loads, lines):
        rate = row["codes"] * row["queries"] / statistics.median(row["seconds"]["hashengine"]) / 1e9
        if row["data"] == "random" and row["task"] != "map":
            key = str(row["bits"]), (row["task"], row["k"], row["codes"])
            measured[key] = f"{rate:.1f} ({row['times_faiss']:.1f})"
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in README.splitlines() if line.startswith("|")]
    head = next(i for i, line in enumerate(table) if line[0] == "bits")
    assert table[head][1:] == list(columns)
    body = itertools.takewhile(lambda line: line[0].isdigit(), table[head + 2 :])
    told = {(line[0], column): cell for line in body for column, cell in zip(columns.values(), line[1:], strict=True)}
    assert {key: cell for key, cell in told.items() if cell} == measured


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
