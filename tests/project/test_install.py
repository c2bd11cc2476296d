"""A wheel and an sdist without native kernels work in new environments outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

pytest.importorskip("setuptools")
pytest.importorskip("pip")
pytest.importorskip("torchvision")
pytestmark = pytest.mark.slow

# This script runs in the new environment. It checks where hashengine is, searches, and attaches attention to a network.
USE = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")  # the native module was not built
import hashengine as he
assert Path(he.__file__).is_relative_to(sys.prefix), he.__file__
import torch
import torchvision

codes = torch.arange(256, dtype=torch.uint8).view(-1, 1)
index = he.HammingIndex(8)
index.add(codes)
distances, ids = index.search(codes[:3], k=2)
assert distances.tolist() == [[0, 1]] * 3 and ids[:, 0].tolist() == [0, 1, 2]
index.save("index")
assert len(he.HammingIndex.load("index")) == 256

network = torchvision.models.resnet18()
he.nn.attach(network, "simam")
assert network(torch.randn(2, 3, 32, 32)).shape == (2, 1000)
"""


def run(command: list[str], folder: Path) -> str:
    """Run a command without this suite's PYTHONPATH and without a compiler; returns its output."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HASHENGINE_BUILD")}
    env |= {"CXX": "/nonexistent/c++", "HASHENGINE_REQUIRE_NATIVE": "0", "COLUMNS": "160"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist of a copy of the checkout, and the wheel of the unpacked sdist."""
    folder = tmp_path_factory.mktemp("build")
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "demo", "__pycache__", ".*_cache", "*.so", "*.egg-info"
    )
    shutil.copytree(ROOT, folder / "checkout", ignore=ignore)
    (folder / "checkout" / "hashengine" / "_build.json").unlink(missing_ok=True)

    def build(kind: str, source: Path) -> Path:
        script = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
        run([sys.executable, "-c", script], source)
        [built] = folder.glob({"sdist": "*.tar.gz", "wheel": "*.whl"}[kind])
        return built

    sdist = build("sdist", folder / "checkout")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    [source] = (folder / "unpacked").iterdir()
    return {"sdist": sdist, "wheel": build("wheel", source)}


def test_a_wheel_contains_only_hashengine(distributions: dict[str, Path]) -> None:
    wheel = distributions["wheel"]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    version = wheel.name.split("-")[1]
    assert {name.split("/")[0] for name in names} == {"hashengine", f"hashengine-{version}.dist-info"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "hashengine").rglob("*") if path.is_file()}
    built = {name for name in sources if "__pycache__" in name or name.endswith((".so", "_build.json"))}
    assert sources - built <= set(names)


def test_an_sdist_contains_what_the_tests_need(distributions: dict[str, Path]) -> None:
    with tarfile.open(distributions["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "hashengine", "tests", "benchmarks", "training", "docs"):
        assert any(name.startswith(f"{folder}/") for name in names), folder
    expected = {"setup.py", "pyproject.toml", "Makefile", "mkdocs.yml", "LICENSE", "README.md", ".clang-format"}
    assert expected <= names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or name.startswith((".venv/", "build/"))]


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_a_wheel_and_an_sdist_work_outside_the_checkout(
    kind: str, distributions: dict[str, Path], tmp_path: Path
) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = str(environment / "bin" / "python")
    [site] = environment.glob("lib/python*/site-packages")
    # torch and the other requirements are those of this environment, so that nothing is downloaded.
    (site / "requirements.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    install = ["--python", python, "install", "--no-deps", "--no-index", "--ignore-installed", "--no-build-isolation"]
    run([sys.executable, "-m", "pip", *install, str(distributions[kind])], tmp_path)

    run([python, "-c", USE], tmp_path)
    assert "native module" in run([str(environment / "bin" / "hashengine"), "doctor"], tmp_path)
    assert "encode" in run([python, "-m", "hashengine", "--help"], tmp_path)
    installed = {path.name.split("-")[0] for path in site.iterdir()}
    assert installed - {"requirements.pth", "__pycache__"} == {"hashengine"}
