"""The Python and shell examples of README.md and of docs run as they are written, except that `make` is a dry run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.paths import ROOT


class Block(NamedTuple):
    """A fenced block of a document. Blocks in "python" and "sh" are run, blocks in other languages are not."""

    language: str
    code: str


README = ROOT / "README.md"
GUIDES = sorted((ROOT / "docs").rglob("*.md"))
NEEDED = {  # text: package. A README block or a guide that contains the text is skipped if the package is missing.
    "torchvision": "torchvision",
    "hashengine train": "sklearn",
    "benchmarks": "faiss",
    "import faiss": "faiss",
    "torch.onnx": "onnxscript",
}


def blocks(document: Path) -> list[Block]:
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(), re.M | re.S)]


def name(block: Block) -> str:
    return re.sub(r"\W+", "-", block.code.splitlines()[-1])


README_BLOCKS = blocks(README)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A shell environment in which `python` and `hashengine` are those under test."""
    scripts = tmp_path / "bin"
    scripts.mkdir()
    for program, arguments in (("python", ""), ("hashengine", "-m hashengine")):
        (scripts / program).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (scripts / program).chmod(0o755)
    return os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def runnable(shell: str) -> str:
    """The shell example with each `make` as a dry run, because some targets run this test suite or its set-up."""
    make = f"make --dry-run --directory={ROOT} " if shutil.which("make") else "true make "
    return re.sub(r"^make ", make, shell, flags=re.MULTILINE)


def skip_without_packages(code: str) -> None:
    for word, package in NEEDED.items():
        if word in code:
            pytest.importorskip(package)


def run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("block", README_BLOCKS, ids=name)
def test_each_block_of_the_readme_runs_on_its_own(block: Block, environment: dict[str, str], tmp_path: Path) -> None:
    skip_without_packages(block.code)
    shell = ["bash", "-euxc", runnable(block.code)]
    run(shell if block.language == "sh" else [sys.executable, "-c", block.code], tmp_path, environment)


@pytest.mark.parametrize(
    "guide", [guide for guide in GUIDES if blocks(guide)], ids=lambda path: str(path.relative_to(ROOT))
)
def test_guide_runs_from_top_to_bottom(guide: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """The blocks of a guide build on each other, so one Python process runs all of them, shell blocks included."""
    steps = ["import subprocess"]
    for block in blocks(guide):
        if block.language == "python":
            steps.append(block.code)
        elif block.language == "sh":
            steps.append(f"subprocess.run(['bash', '-euxc', {runnable(block.code)!r}], check=True)")
    script = "\n".join(steps)
    skip_without_packages(script)
    run([sys.executable, "-c", script], tmp_path, environment)


def test_blocks_of_the_readme_are_python_or_shell_and_those_of_guides_are_in_known_languages() -> None:
    assert {block.language for block in README_BLOCKS} == {"python", "sh"}
    assert {block.language for guide in GUIDES for block in blocks(guide)} <= {"python", "sh", "text", "toml", "yaml"}


def test_the_readme_has_an_example_of_every_command_that_its_text_names_except_two() -> None:
    text = re.sub(r"^```.*?^```", "", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`((?:hashengine|make|python -m \w+) [a-z]+)", text))
    shell = "".join(block.code for block in README_BLOCKS if block.language == "sh")
    assert named >= {"make demo", "make docs"}
    assert {command for command in named if command not in shell} <= {"make setup", "make docs"}
