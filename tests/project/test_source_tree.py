"""The rules of ARCHITECTURE.md that can be checked: imports, names, one place per task, and its list of folders."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import CSRC, ROOT

PACKAGE = ROOT / "hashengine"
MODULES = sorted(PACKAGE.rglob("*.py"))
KERNEL_SOURCES = sorted(file for file in CSRC.rglob("*") if file.suffix in (".h", ".cuh", ".cpp", ".cu"))
DOCUMENTS = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")})

ENTRY_POINTS = {"__init__", "__main__"}  # no floor: the first imports from several, the second starts the commands

# A package may import packages of its own floor and of the floors below. The packages fingerprints, light, gallery and
# cluster do not exist yet.
FLOORS = (
    {"errors", "images", *(path.stem for path in PACKAGE.glob("_*.py*") if path.stem not in ENTRY_POINTS)},
    {"ops"},
    {"nn", "index", "metrics", "fingerprints", "light"},
    {"models", "methods", "doctor"},
    {"training", "evaluation", "gallery"},
    {"cluster"},
    {"cli"},
)
FLOOR_OF = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}


def imports(file: Path, *, at_runtime: bool = False) -> Iterator[tuple[str, int]]:
    """The absolute name and the line of everything that a file imports.

    `from a import b` gives "a.b". With `at_runtime`, imports under `if TYPE_CHECKING` are left out.
    """
    tree = ast.parse(file.read_text())
    typing_only: set[ast.AST] = set()
    if at_runtime:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
                typing_only.update(child for statement in node.body for child in ast.walk(statement))
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = file.relative_to(ROOT).with_suffix("").parts[: -node.level] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def package_of(file: Path) -> str:
    """The part of hashengine that a file belongs to: "index" for hashengine/index/folder.py, "errors" for errors.py."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def package_imports() -> Iterator[tuple[str, str, str]]:
    """(importing package, imported package, place) for every import within hashengine."""
    for file in MODULES:
        for name, line in imports(file, at_runtime=True):
            parts = name.split(".")
            if parts[0] == "hashengine" and len(parts) > 1 and parts[1] in FLOOR_OF:
                yield package_of(file), parts[1], f"{file.relative_to(ROOT)}:{line}"


def test_every_package_has_a_floor() -> None:
    assert {package_of(file) for file in MODULES} - ENTRY_POINTS <= set(FLOOR_OF)


def test_no_package_imports_from_a_higher_floor() -> None:
    upward = [
        f"{place}: {importer} imports {imported}"
        for importer, imported, place in package_imports()
        if importer not in ENTRY_POINTS and FLOOR_OF[imported] > FLOOR_OF[importer]
    ]
    assert upward == []


def test_packages_do_not_import_each_other_in_a_circle() -> None:
    below: dict[str, set[str]] = {}
    for importer, imported, _ in package_imports():
        if importer not in ENTRY_POINTS and importer != imported:
            below.setdefault(importer, set()).add(imported)

    def reachable(package: str, seen: set[str]) -> set[str]:
        for imported in below.get(package, set()) - seen:
            seen.add(imported)
            reachable(imported, seen)
        return seen

    assert [package for package in below if package in reachable(package, set())] == []


def test_only_the_command_line_imports_the_package_cluster() -> None:
    importers = {importer for importer, imported, _ in package_imports() if imported == "cluster"}
    assert importers <= {"cli", "cluster"}


def test_the_library_does_not_import_or_run_benchmarks_tests_or_recipes() -> None:
    for file in MODULES:
        outside = [
            name for name, _ in imports(file) if name.split(".")[0] in ("benchmarks", "tests", "training", "runpy")
        ]
        assert outside == [], file
        assert not re.search(r"\"-m\",\s*\"(benchmarks|tests|training)", file.read_text()), file


def test_no_test_imports_a_test() -> None:
    for file in (ROOT / "tests").rglob("*.py"):
        shared = [name for name, _ in imports(file) if any(part.startswith("test_") for part in name.split(".")[:-1])]
        shared += [name for name, _ in imports(file) if re.fullmatch(r"tests(\.\w+)*\.test_\w+", name)]
        assert shared == [], f"{file}: move what is shared to tests/helpers"


def test_only_one_module_writes_files_durably() -> None:
    writers = [
        str(file.relative_to(PACKAGE))
        for file in MODULES
        if re.search(r"\b(fsync|os\.(replace|rename|renames))\b", file.read_text())
    ]
    assert writers == ["_files.py"]


# The exceptions in all statements `raise Name(...)` of the library, besides InputError and OSError: see errors.py.
OTHER_EXCEPTIONS = {
    ("_config.py", "ValueError"),  # pydantic requires ValueError in validators
    ("_lazy.py", "AttributeError"),  # __getattr__ of a module must raise it
    ("_native.py", "ImportError"),  # HASHENGINE_REQUIRE_NATIVE is set
    ("methods/base.py", "NotImplementedError"),  # a method has either a loss or a closed form
    ("evaluation/records.py", "ValueError"),  # in validators, and caught in the same file
    ("index/formats.py", "ValueError"),  # caught in the same function
    ("models/config.py", "ValueError"),  # pydantic requires ValueError in validators
    ("training/config.py", "ValueError"),  # in validators, and caught in the same file
    ("training/runs.py", "ValueError"),  # caught in the same function
}


def raised_calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    """The name and the call of every `raise name(...)`, `raise name(...) from ...` and `return` of an InputError."""
    for node in ast.walk(ast.parse(file.read_text())):
        value = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Return) else None
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
            if isinstance(node, ast.Raise) or value.func.id in ("InputError", "invalid"):
                yield value.func.id, value


def test_the_library_raises_only_these_exceptions_by_name() -> None:
    raised = {
        (str(file.relative_to(PACKAGE)), name)
        for file in MODULES
        for name, _ in raised_calls(file)
        if name.endswith(("Error", "Exception")) and name not in ("InputError", "OSError")
    }
    assert raised == OTHER_EXCEPTIONS


# Functions of torch that make a tensor on the default device; those in the second set make it of the default dtype.
_OF_GIVEN_DTYPE = {
    "arange",
    "as_tensor",
    "asarray",
    "full",
    "randint",
    "randperm",
    "tensor",
    "tril_indices",
    "triu_indices",
}
_OF_DEFAULT_DTYPE = {"empty", "empty_strided", "eye", "linspace", "logspace", "ones", "rand", "randn", "zeros"}


def test_every_new_tensor_has_a_device_and_a_dtype() -> None:
    """A program may set other defaults with torch.set_default_device and torch.set_default_dtype."""
    for file in MODULES:
        if file == PACKAGE / "nn" / "fuse.py":
            continue  # it makes its tensors where the default device is the CPU
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not re.fullmatch(r"torch\.\w+", ast.unparse(node.func)):
                continue
            name, place = ast.unparse(node.func).removeprefix("torch."), f"{file}:{node.lineno}"
            given = {keyword.arg for keyword in node.keywords}
            assert name not in _OF_GIVEN_DTYPE | _OF_DEFAULT_DTYPE or "device" in given, place
            assert name not in _OF_DEFAULT_DTYPE or "dtype" in given, place


def literal_text(node: ast.expr) -> str:
    """The text of a string in the source; every value that an f-string inserts becomes "*"."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(literal_text(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return literal_text(node.left) + literal_text(node.right)
    return "*"


def test_every_message_of_an_input_error_has_the_form_that_errors_py_describes() -> None:
    for file in MODULES:
        if file.name == "errors.py":
            continue  # this file defines the form
        for name, call in raised_calls(file):
            text = literal_text(call.args[0]) if name == "InputError" else ""
            if name == "invalid":
                where, what, expected, actual = [literal_text(argument) for argument in call.args[:4]]
                text = f"{where}: {what} must be {expected}, got {actual}"
                assert not re.search(r"\bmust\b|\bgot\b", expected), f"{file}:{call.lineno}: {text}"
            assert not text or re.fullmatch(r"\S.*: \S.* must be \S.*, got .*", text), f"{file}:{call.lineno}: {text}"
            assert "\n" not in text, f"{file}:{call.lineno}"


def test_docstrings_are_markdown() -> None:
    for file in MODULES:
        text = file.read_text()
        assert not re.search(r":(func|class|mod|meth|attr|data|exc):`", text), f"{file} has a Sphinx role"
        assert "``" not in text.replace("```", ""), f"{file} has double backticks; Markdown has single ones"


# Imports without torch

WITHOUT_TORCH = [
    "hashengine",
    "hashengine.errors",
    "hashengine._files",
    "hashengine._validation",
    "hashengine._environment",
]
WITHOUT_TORCH += ["hashengine.index", "hashengine.index.folder", "hashengine.cli"]


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_the_module_does_not_import_torch(module: str) -> None:
    done = run_python(f"import {module}, sys; print('torch' in sys.modules)")
    assert done.stdout == "False\n", done.stdout + done.stderr


def test_the_help_of_every_command_needs_no_torch() -> None:
    script = """
import sys
import typer
from typer.testing import CliRunner
from hashengine.cli import app

def commands(command, path=()):
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))

paths = list(commands(typer.main.get_command(app)))
for path in paths:
    result = CliRunner().invoke(app, [*path, "--help"])
    assert result.exit_code == 0, (path, result.output)
    assert "torch" not in sys.modules, path
print(len(paths))
"""
    done = run_python(script)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5


# Native sources

TORCH_HEADER = re.compile(r'#include\s*[<"](torch|ATen|c10)/')
OPS = sorted(file.stem for file in (PACKAGE / "ops").glob("*.py") if not file.stem.startswith("_"))
FAMILIES = sorted(folder.name for folder in (CSRC / "cpu").iterdir() if folder.is_dir() and folder.name != "common")


def stems(folder: Path, pattern: str) -> set[str]:
    return {file.name.split(".")[0] for file in folder.rglob(pattern)}


def family_of(op: str) -> str:
    return next((family for family in FAMILIES if op.split("_")[0] == family), op)


def test_only_the_binding_includes_torch() -> None:
    including = {file.relative_to(CSRC).parts[0] for file in KERNEL_SOURCES if TORCH_HEADER.search(file.read_text())}
    assert including == {"binding"}
    assert not any("torch/extension.h" in file.read_text() for file in KERNEL_SOURCES)


def test_no_source_file_asks_whether_the_build_has_cuda() -> None:
    for file in KERNEL_SOURCES:
        assert not re.search(r"#\s*if.*(WITH|USE)_CUDA", file.read_text()), file


def test_no_language_standard_is_pinned() -> None:
    assert "-std=" not in (ROOT / "setup.py").read_text()


@pytest.mark.parametrize("op", OPS)
def test_one_op_has_one_name(op: str) -> None:
    """Both devices have a file with the name of the op. A header and a binding may serve a family, as Hamming's do."""
    assert op in stems(CSRC / "cpu", "*.cpp")
    assert op in stems(CSRC / "cuda", "*.cu")
    assert {op, family_of(op)} & stems(CSRC / "include", "*.h")
    for device in ("cpu", "cuda"):
        assert {f"{op}_{device}", f"{family_of(op)}_{device}"} & stems(CSRC / "binding", "*.cpp")
    tests = "\n".join(file.read_text() for file in (ROOT / "tests" / "ops").rglob("*.py"))
    assert re.search(rf"\b{op}\b", tests)
    benchmarks = "\n".join(file.read_text() for file in (ROOT / "benchmarks").rglob("*.py"))
    assert re.search(rf"\b{op}\b", benchmarks) or op == "triplet_attention_update"  # an internal op


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_file_with_a_family_prefix_is_named_after_an_op(device: str) -> None:
    """In a family's folder, only files of ops and of their backwards have names that begin with the family."""
    allowed = set(OPS) | {f"{op}_backward" for op in OPS}
    for family in FAMILIES:
        named = {file for file in stems(CSRC / device / family, "*.*") if file.split("_")[0] == family}
        assert named <= allowed


def test_both_devices_have_the_same_families() -> None:
    assert {folder.name for folder in (CSRC / "cuda").iterdir() if folder.is_dir()} == {*FAMILIES, "common"}


# The documents


def test_architecture_has_a_heading_for_every_folder() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    headings = set(re.findall(r"^#+ `([\w./-]+)/`", text, flags=re.MULTILINE))
    ignored = {"__pycache__", "build", "dist", "demo"}

    def folders(parent: Path) -> set[str]:
        found = (path for path in parent.iterdir() if path.is_dir() and path.name not in ignored)
        return {str(path.relative_to(ROOT)) for path in found if not path.name.startswith((".", "_"))}

    tops = {"csrc", "hashengine", "training", "benchmarks", "tests", "docs"}
    expected = tops | folders(CSRC) | folders(PACKAGE)
    assert headings >= {folder for folder in expected if list((ROOT / folder).rglob("*.*"))}
    assert {heading for heading in headings if not (ROOT / heading).is_dir()} == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_files_that_exist(document: Path) -> None:
    """Every path in backticks that begins with a folder of `top` exists.

    It is relative to the root of the checkout, to the document's folder or to csrc.
    """
    if document.name == "CHANGELOG.md":
        return  # it also names files that do not exist in this version
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    top = r"(?:csrc|include|binding|cpu|cuda|hashengine|training|benchmarks|tests|docs|\.ci)"
    for name in re.findall(rf"`({top}/[\w./*-]*)`", text):
        bases = (ROOT, document.parent, CSRC)
        assert any(next(base.glob(name.rstrip("/")), None) for base in bases), f"{document.name}: {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        # docs/hooks.py generates these pages of the site.
        generated = "docs" in document.parts and re.match(r"(\.\./)?(api/commands\.md$|project/)", target)
        assert target.startswith(("https://", "mailto:")) or generated or (document.parent / target).exists(), target
