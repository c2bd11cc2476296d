"""What the layout of the sources promises."""

import re

from tests.helpers.paths import ROOT

SOURCES = [file for file in (ROOT / "csrc").rglob("*") if file.suffix in (".h", ".cuh", ".cpp", ".cu")]
TORCH_HEADER = re.compile(r'#include\s*[<"](torch|ATen|c10)/')


def test_only_the_binding_includes_torch():
    including = {file.parent.name for file in SOURCES if TORCH_HEADER.search(file.read_text())}
    assert including == {"binding"}
    assert not any("torch/extension.h" in file.read_text() for file in SOURCES)


def test_cuda_is_in_the_build_or_out_of_it():
    for file in SOURCES:
        assert not re.search(r"#\s*if.*(WITH|USE)_CUDA", file.read_text()), file


def test_no_language_standard_is_pinned():
    assert "-std=" not in (ROOT / "setup.py").read_text()


def test_the_readme_of_the_kernels_names_files_that_exist():
    text = (ROOT / "csrc" / "README.md").read_text()
    names = re.findall(r"`((?:include|cpu|cuda|binding|tests|hashengine|benchmarks)/[\w/.]+\.\w+)`", text)
    assert len(names) > 10
    for name in names:
        base = ROOT if name.split("/")[0] in ("tests", "hashengine", "benchmarks") else ROOT / "csrc"
        assert (base / name).exists(), name
