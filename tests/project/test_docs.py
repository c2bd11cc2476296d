"""The documentation site builds without warnings, works without a network, and shows the recorded measurements."""

from __future__ import annotations

import importlib
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

pytest.importorskip("mkdocs")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_loads_nothing_from_a_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", page.read_text()):
            assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag), (page.name, tag)


def test_links_of_the_site_lead_to_files(site: Path) -> None:
    for page in site.rglob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"#?]+)[^"]*"', page.read_text()):
            if not re.match(r"(https?|mailto|data):", target) and page.name != "404.html":
                assert (page.parent / target).exists(), (page.name, target)


@pytest.mark.parametrize(
    "page", ["index", "ops", "nn", "metrics", "models", "methods", "training", "evaluation", "errors"]
)
def test_the_site_documents_every_public_name(site: Path, page: str) -> None:
    module = importlib.import_module(f"hashengine.{page}")
    names = getattr(module, "__all__", ["InputError", "invalid"])
    headings = re.findall(r"<h\d[^>]*>(.*?)</h\d>", (site / "api" / f"{page}.html").read_text(), re.DOTALL)
    text = " ".join(re.sub(r"<[^>]+>", "", heading) for heading in headings)
    assert [name for name in names if name.isidentifier() and not name.isupper() and name not in text] == []


def test_the_site_documents_the_commands(site: Path) -> None:
    text = (site / "api" / "commands.html").read_text()
    for command in ("encode", "index", "search", "evaluate", "report", "demo", "doctor", "train fit", "train sweep"):
        assert f"hashengine {command}" in text


def test_the_site_shows_the_measured_search_rates(site: Path) -> None:
    text = re.sub(r"<[^>]+>", " ", (site / "benchmarks.html").read_text())
    rows = map(
        json.loads, (ROOT / "benchmarks" / "results" / "hamming-epyc-zen3-2cores.jsonl").read_text().splitlines()
    )
    measured = [row for row in rows if row["data"] == "random" and row["task"] != "map"]
    assert measured
    for row in measured:
        rate = row["codes"] * row["queries"] / statistics.median(row["seconds"]["hashengine"]) / 1e9
        assert f"{rate:.1f} ({row['times_faiss']:.1f})" in text


def test_the_site_says_what_has_not_been_measured(site: Path) -> None:
    has_gpu_results = list((ROOT / "benchmarks" / "results").glob("hamming-gpu-*.jsonl"))
    assert ("Not measured yet." in (site / "benchmarks.html").read_text()) == (not has_gpu_results)
