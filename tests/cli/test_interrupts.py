"""Ctrl-C ends each command with one line and status 130, whatever it is doing, and leaves nothing half-written."""

import signal

import pytest

from tests.helpers.commands import succeed
from tests.helpers.interrupts import interrupt
from tests.helpers.tiny_images import make_images, make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, images, and the outputs of `encode`, `index` and `search`."""
    folder = tmp_path_factory.mktemp("commands")
    make_model(folder / "model")
    make_images(folder / "images", per_class=14)
    succeed("encode", folder / "images", "--model", folder / "model", "--output", folder / "codes")
    succeed("index", folder / "codes", "--output", folder / "index")
    succeed("search", folder / "index", folder / "codes", "--output", folder / "results.json")
    return folder


def arguments(folder, command, output):
    """The words of a command, with paths in `folder` and with `output`."""
    name, *words = command.split()
    return name, *(str(folder / word) if (folder / word).exists() else word.format(output) for word in words)


ENCODE = "encode images --model model --output {}"
FIT = "train fit --images images --epochs 1 --widths 8 --output {}"
SWEEP = "train sweep --images images --epochs 1 --widths 8 --queries images --output {}"


@pytest.mark.parametrize(
    ("module", "attribute", "command"),
    [
        ("torch", "import", ENCODE),
        ("hashengine.cli", "import", ENCODE),
        ("hashengine.evaluation.encode", "read_image", ENCODE),  # in other threads
        ("hashengine.models.hashnet", "HashNet.forward", ENCODE),
        ("numpy", "save", ENCODE),
        ("hashengine.index.folder", "sync_file", "index codes --output {}"),
        ("hashengine.index.execution", "topk_in_one_call", "search index images --output {}"),
        ("hashengine.metrics", "distance_counts", "evaluate index codes --output {}"),
        ("hashengine.evaluation.report", "read_image", "report --index index --results results.json --output {}.html"),
        ("hashengine.training.data", "read_image", FIT),
        ("hashengine.models.hashnet", "HashNet.forward", FIT),
        ("hashengine.training.sweeps", "evaluate", SWEEP),
        ("shutil", "copyfile", "train prepare images --output {}"),
        ("hashengine.evaluation.demo", "encode_folder", "demo --data images --output {}"),
    ],
)
def test_an_interrupt_ends_the_command_with_one_line(folder, tmp_path, module, attribute, command):
    status, errors = interrupt(module, attribute, *arguments(folder, command, tmp_path / "out"))
    assert status == 130 and "Traceback" not in errors
    kept = ": the complete runs are kept, and the same command continues the sweep" if "sweep" in command else ""
    assert [line for line in errors.splitlines() if "interrupted" in line] == [f"interrupted{kept}"]
    made = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert not any(name.endswith(".partial") for name in made)
    if "encode" in command or "index codes" in command or "prepare" in command:
        assert made == set()


@pytest.mark.parametrize(("module", "attribute"), [("numpy", "save"), ("hashengine.evaluation.encode", "read_image")])
def test_a_wait_that_the_signal_ends_ends_the_command_alike(folder, tmp_path, module, attribute):
    command = arguments(folder, ENCODE, tmp_path / "out")
    assert interrupt(module, attribute, *command, wait="signal") == (130, "interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wait", ["native", "signal"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_and_sighup_end_a_command_with_one_line_and_no_temporary_file(folder, tmp_path, wait, number):
    command = arguments(folder, ENCODE, tmp_path / "out")
    assert interrupt("numpy", "save", *command, wait=wait, number=number) == (128 + number, "terminated\n")
    assert list(tmp_path.iterdir()) == []
    errors = interrupt("numpy", "save", *command, "--log-json", wait=wait, number=number).errors
    assert '{"event": "terminated", "message": "terminated"}' in errors.splitlines()


def test_an_interrupt_of_an_index_that_is_replaced_keeps_the_old_one(folder, tmp_path):
    succeed("index", folder / "codes", "--output", tmp_path / "index")
    before = {path: path.read_bytes() for path in (tmp_path / "index").rglob("*") if path.is_file()}
    make_images(tmp_path / "more", per_class=2, seed=3)
    succeed("encode", tmp_path / "more", "--model", folder / "model", "--output", tmp_path / "codes")
    for codes, options in ((folder / "codes", ()), (tmp_path / "codes", ("--append",))):
        command = ("index", codes, "--output", tmp_path / "index", *options)
        assert interrupt("hashengine.index.folder", "sync_file", *command).status == 130
        assert not list(tmp_path.glob(".*"))
        succeed("search", tmp_path / "index", folder / "codes", "--output", tmp_path / "results.json")
    assert all(path.read_bytes().startswith(old) for path, old in before.items() if path.suffix == ".bin")


def test_an_interrupt_is_an_object_with_log_json(folder, tmp_path):
    command = arguments(folder, ENCODE, tmp_path / "out")
    errors = interrupt("hashengine.evaluation.encode", "read_image", *command, "--log-json").errors
    assert '{"event": "interrupted", "message": "interrupted"}' in errors.splitlines()
