"""The packages import their names lazily, and modules that do not need torch do not import it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hashengine
import hashengine.index
from tests.helpers.paths import ROOT


def run(script: str) -> str:
    command = [sys.executable, "-W", "error", "-c", script]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "module",
    [
        "hashengine",
        "hashengine.index",
        "hashengine.index.folder",
        "hashengine.index.formats",
        "hashengine.index.searcher",
    ],
)
def test_a_module_that_needs_no_torch_does_not_import_it(module):
    run(f"import sys, {module}; assert 'torch' not in sys.modules")


@pytest.mark.parametrize("package", [hashengine, hashengine.index])
def test_every_public_name_exists_and_is_listed(package):
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'Hamming'"):
        _ = package.Hamming


def test_public_names_can_be_imported_from_the_packages():
    run(
        "from hashengine import HammingIndex, InputError, metrics, nn, ops; from hashengine.index import *;"
        "import hashengine; assert hashengine.HammingIndex is HammingIndex and hashengine.ops is ops"
    )


def test_a_new_process_finds_the_native_module_exactly_if_this_one_does():
    printed = run("from hashengine.ops import hamming_topk; from hashengine import _native; print(_native.available())")
    from hashengine import _native

    assert printed.strip() == str(_native.available())


@pytest.mark.parametrize("package", [hashengine, hashengine.index])
def test_type_checkers_see_the_same_names(package):
    """Together, the unconditional imports and those under `if TYPE_CHECKING` import exactly the names of __all__."""
    tree = ast.parse(Path(package.__file__).read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    for node in tree.body:
        if isinstance(node, ast.If):
            imports += node.body
    names = {alias.name for node in imports for alias in node.names}
    assert names - {"TYPE_CHECKING", "lazy_imports"} == set(package.__all__)
