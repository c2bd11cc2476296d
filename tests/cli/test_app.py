"""What all commands share: help that imports no torch, the common options, and the policy for errors."""

import inspect
import json
import os
import shlex
import subprocess
import sys
import warnings

import pytest
import torch
import typer
from typer.testing import CliRunner

import hashengine
from hashengine import _progress
from hashengine.cli import app
from hashengine.cli._app import command, command_line
from hashengine.cli._options import given, options_of, unknown_options
from hashengine.errors import InputError
from hashengine.training import FitConfig, SweepConfig
from tests.helpers.children import as_user
from tests.helpers.commands import invoke, refuse, succeed
from tests.helpers.paths import ROOT
from tests.helpers.tiny_images import make_images, make_model

COMMANDS = [
    ("encode",), ("index",), ("search",), ("evaluate",), ("report",), ("demo",), ("doctor",),
    ("train", "prepare"), ("train", "fit"), ("train", "sweep"), ("train", "report"), ("train", "methods"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def default_progress():
    yield
    _progress.configure()


@pytest.mark.parametrize("name", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_the_common_options(name):
    assert name[0] in succeed("--help").stdout
    text = succeed(*name, "--help").stdout
    assert "Usage:" in text
    assert all(option in text for option in ("--threads", "--quiet", "--log-json"))


# The packages that take long to import.
SLOW = {"torch", "numpy", "PIL", "pydantic", "yaml", "tqdm", "rich"}


def imported(*arguments: str, environment: dict[str, str] | None = None) -> set[str]:
    """Those of `SLOW` that `hashengine arguments` has imported, in a new process."""
    script = """
import atexit, sys
from hashengine.__main__ import main
atexit.register(lambda: print("\\nimported", *{name.partition(".")[0] for name in sys.modules}))
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | (environment or {}),
    )
    assert "Traceback" not in done.stderr
    return SLOW & set(done.stdout.splitlines()[-1].split())


def completion(words: str) -> dict[str, str]:
    """The environment in which bash asks for the completions of the last one of `words`."""
    return {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_HASHENGINE_COMPLETE": "complete_bash"}


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (["--version"], {}, set()),
        (["--colour"], {}, set()),
        (["find"], {}, set()),
        (["encode", "x", "--sise", "3"], {}, set()),
        (["search"], {}, {"pydantic"}),  # typer checks the arguments that are given
        ([], completion("hashengine en"), set()),
        ([], {}, {"rich"}),
        (["--help"], {}, {"rich"}),
        *(([*name, "--help"], {}, {"rich"}) for name in COMMANDS if name[0] != "train"),
        # The options of these commands are fields of pydantic.
        *(([*name, "--help"], {}, {"rich", "pydantic", "numpy", "yaml"}) for name in COMMANDS[-2:]),
        ([], completion("hashengine train f"), {"pydantic", "numpy", "yaml"}),
    ],
)
def test_what_needs_no_work_imports_only_what_it_needs(arguments, environment, expected):
    assert imported(*arguments, environment=environment) <= expected


def test_completion_offers_commands_and_options():
    for words, offered in (("hashengine en", "encode"), ("hashengine search --mo", "--model")):
        environment = os.environ | completion(words)
        command = [sys.executable, "-m", "hashengine"]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout.split()) == (0, [offered]), done.stderr


def test_the_version_is_printed():
    assert succeed("--version").stdout == f"hashengine {hashengine.__version__}\n"
    assert "--version" in succeed("--help").stdout


def test_a_warning_is_a_note_in_one_line(tmp_path):
    app = command_line("A program that warns.")

    @command(app)
    def warn() -> None:
        """Warn."""
        warnings.warn("first line\nsecond line", UserWarning, stacklevel=1)

    @command(app)
    def other() -> None:
        """Exists because typer gives the only command of a program no name."""

    def note(*options: str) -> str:
        return CliRunner().invoke(app, ["warn", *options]).stderr

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert note() == "warning: first line second line\n"
        assert note("--quiet") == ""
        assert json.loads(note("--log-json"))["message"] == "warning: first line second line"


def test_a_path_that_cannot_be_used_is_a_mistake(tmp_path):
    app = command_line("A program that writes and reads.")
    tmp_path.chmod(0o555)
    path = tmp_path / "file"

    @command(app)
    def write() -> None:
        """Write a file."""
        path.touch()

    @command(app)
    def read() -> None:
        """Read a file."""
        path.read_bytes()

    def run(name: str, words: str) -> None:
        result = CliRunner().invoke(app, [name])
        expected = f"error: {name}: a file or folder must be one that can be {words}, got {str(path)!r}, "
        assert result.exit_code == 2
        assert result.stderr == f"{expected}which cannot be {words} (Permission denied)\n"

    as_user(lambda: run("write", "written to"))
    tmp_path.chmod(0o600)
    as_user(lambda: run("read", "read"))
    tmp_path.chmod(0o700)
    path.touch()
    path.chmod(0)
    as_user(lambda: run("read", "read"))


def test_the_option_threads_sets_the_number_of_threads_of_torch(tmp_path):
    before = torch.get_num_threads()
    try:
        images, model = make_images(tmp_path / "images", per_class=1), make_model(tmp_path / "model")
        succeed("encode", images, "--model", model, "--output", tmp_path / "codes", "--threads", 1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    for wrong in (0, 1 << 20, 1 << 70):
        assert f"threads must be 1 to 4096, got {wrong}" in refuse("doctor", "--threads", wrong)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("encode", "images", "--model", "model", "-o", ""), "output"),
        (("encode", "", "--model", "model", "-o", "codes"), "folder"),
        (("encode", "images", "--model=", "-o", "codes"), "model"),
        (("index", "codes", "--output", ""), "output"),
        (("search", "", "image.png"), "index"),
        (("search", "index", "", "--output", "results.json"), "query"),
        (("evaluate", "index", "queries", "-o", ""), "output"),
        (("report", "--index", "", "--results", "results.json", "-o", "page.html"), "index"),
        (("demo", "--data", ""), "data"),
        (("demo", "--output", ""), "output"),
        (("train", "prepare", "", "-o", "split"), "source"),
        (("train", "prepare", "images", "-o", "split", "--root", ""), "root"),
        (("train", "fit", "--images", "images", "--output", ""), "output"),
        (("train", "fit", "--images", "", "--output", "model", "--alpha", "0.2"), "images"),
        (("train", "fit", "--config", ""), "config"),
        (("train", "fit", "--images", "images", "--output", "model", "--alpha="), "alpha"),
        (("train", "fit", "--images", "images", "--output", "model", "--alpha", ""), "alpha"),
        (("train", "sweep", "--images", "images", "--output", "sweep", "--queries", ""), "queries"),
        (("train", "report", "run", ""), "runs"),
    ],
    ids=str,
)
def test_an_empty_value_is_refused_before_it_becomes_the_working_folder(arguments, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = " ".join(arguments[: 2 if arguments[0] == "train" else 1])
    expected = f"error: {command}: {name} must be a value that is not empty, got an empty string; a variable of the"
    assert refuse(*arguments).startswith(expected)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search", "index", "query", "-k", "abc"), "search: k must be a valid integer, got 'abc'"),
        (("encode", "images", "--batch-size", "1.5"), "encode: batch_size must be a valid integer, got '1.5'"),
        (("index", "codes", "--threads", "1\n2"), r"index: threads must be a valid integer, got '1\n2'"),
        (("train", "fit", "--lr", "x" * 1000), "train fit: lr must be a valid number, got 'xxxx"),
    ],
    ids=str,
)
def test_a_value_of_a_wrong_type_is_shown(arguments, message):
    error = refuse(*arguments)
    assert error.startswith(f"error: {message}") and len(error) < 300


def test_quiet_leaves_stderr_empty(tmp_path):
    images, model = make_images(tmp_path / "images", per_class=1), make_model(tmp_path / "model")
    (images / "bars" / "broken.png").write_bytes(b"")
    result = succeed("encode", images, "--model", model, "--output", tmp_path / "codes", "--quiet")
    assert result.stderr == ""
    assert json.loads((tmp_path / "codes" / "encode.json").read_text())["errors"]


def test_log_json_makes_every_line_of_stderr_an_object(tmp_path):
    images, model = make_images(tmp_path / "images", per_class=1), make_model(tmp_path / "model")
    (images / "bars" / "broken.png").write_bytes(b"")
    result = succeed("encode", images, "--model", model, "--output", tmp_path / "codes", "--log-json")
    events = [json.loads(line) for line in result.stderr.splitlines()]
    assert {event["event"] for event in events} == {"note", "progress"}
    (progress,) = [event for event in events if event["event"] == "progress"]
    assert (progress["task"], progress["done"], progress["total"]) == ("encoding", 4, 4)
    assert any("skipped: " in event.get("message", "") for event in events)


def test_log_json_reports_a_mistake_as_an_object(tmp_path):
    result = invoke("encode", tmp_path / "nowhere", "--model", "m", "--output", "o", "--log-json")
    assert result.exit_code == 2
    (event,) = [json.loads(line) for line in result.stderr.splitlines()]
    assert event["event"] == "error" and "which is missing" in event["message"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--colour"], "hashengine: '--colour' must be a known option, got an unknown one"),
        (["find"], "hashengine: no such command 'find'"),
        (["encode"], "encode: folder must be given"),
        (["encode", "x", "--sise", "3"], "encode: '--sise' must be a known option, got an unknown one"),
        (["train", "prepare", "x", "-o", "y", "--seed", "one"], "train prepare: seed"),
    ],
)
def test_a_mistake_in_the_options_gives_an_error_of_one_line(arguments, complaint):
    assert refuse(*arguments).startswith(f"error: {complaint}")
    result = invoke(*arguments, "--log-json")
    (event,) = [json.loads(line) for line in result.stderr.splitlines()]
    assert result.exit_code == 2 and event["event"] == "error" and event["message"].startswith(complaint)


def run_failing(error: Exception):
    """The result of a command that raises `error`."""
    app = command_line("A program that fails.")

    @command(app)
    def fail() -> None:
        """Fail."""
        raise error

    @command(app)
    def other() -> None:
        """Exists because typer gives the only command of a program no name."""

    return CliRunner().invoke(app, ["fail"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("search: k must be 1 to 5, got 0"), 2),
        (OSError(28, "No space left on device"), 1),
        (torch.cuda.OutOfMemoryError("CUDA out of memory.\n  Tried to allocate 2 GiB."), 1),
    ],
)
def test_expected_errors_are_reported_in_one_line(error, code):
    result = run_failing(error)
    assert result.exit_code == code
    one_line = " ".join(str(error).split())
    assert result.stderr == f"error: {one_line}\n"


def test_the_value_error_of_a_native_op_is_reported_as_a_mistake():
    app = command_line("A program that fails.")

    @command(app)
    def fail() -> None:
        """Fail."""
        torch.ops.hashengine.pack_bits(torch.zeros(2, 7))

    @command(app)
    def other() -> None:
        """Exists because typer gives the only command of a program no name."""

    result = CliRunner().invoke(app, ["fail"])
    expected = "error: pack_bits: u must be [..., bits] with bits a multiple of 8, got [2, 7]\n"
    assert (result.exit_code, result.stderr) == (2, expected)


@pytest.mark.parametrize("error", [ValueError("a defect"), RuntimeError("another"), KeyError("a third")])
def test_unexpected_errors_are_not_caught(error):
    assert run_failing(error).exception is error


def test_each_field_of_fit_config_with_a_description_becomes_an_option():
    names = {parameter.name for parameter in options_of(FitConfig, exclude=("output",))}
    assert names == {name for name, field in FitConfig.model_fields.items() if field.description} - {"output"}
    text = succeed("train", "fit", "--help").stdout
    assert all(f"--{name.replace('_', '-')}" in text for name in names)
    assert "of the one-cycle schedule" in " ".join(text.replace("│", " ").split())


def test_values_of_options_become_values_of_fields():
    options = {"widths": "8,16", "stem_stride": "2", "bits": 16, "flip": True, "seed": None, "unrelated": 1}
    assert given(FitConfig, options) == {"widths": [8, 16], "stem_stride": 2, "bits": 16, "flip": True}
    assert given(SweepConfig, {"queries": None}) == {}


def test_unknown_options_are_numbers_truth_values_or_text():
    arguments = ["--alpha", "0.5", "--log-terms=true", "--name", "x"]
    assert unknown_options("fit", arguments) == {"alpha": 0.5, "log_terms": True, "name": "x"}
    for wrong in (["alpha"], ["--alpha"]):
        with pytest.raises(InputError, match="^fit: an argument must be '--option value'"):
            unknown_options("fit", wrong)


def test_a_function_stays_callable_without_the_common_options():
    app = typer.Typer()

    @command(app)
    def double(number: int) -> None:
        """Double."""
        seen.append(2 * number)

    seen: list[int] = []
    double(21)
    assert seen == [42]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("arguments", ["--version", "train methods", "encode images --model model -o {output}"])
def test_closed_streams_do_not_disturb_a_command(tmp_path, closed, arguments):
    make_images(tmp_path / "images", per_class=1)
    make_model(tmp_path / "model")
    output = tmp_path / "codes"
    command = f"{sys.executable} -m hashengine {arguments.format(output=output)} {closed}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Error" not in done.stderr
    if "encode" in arguments:
        assert (output / "encode.json").is_file()


def test_a_long_error_is_shortened():
    result = invoke("encode", "x" * 300_000, "--model", "model", "--output", "codes")
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and len(result.stderr) < 2100


@pytest.mark.parametrize("arguments", ["--version", "--help", "train methods", "train methods --log-json"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_stdout_is_one_line(arguments, unbuffered):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "hashengine", *arguments.split()]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "No space left on device" in done.stderr
    assert unbuffered or "device: 'stdout'" in done.stderr or arguments in ("--version", "--help")


def test_an_error_keeps_the_blanks_of_a_name(tmp_path):
    assert "'two  blanks\\\\t'" in refuse("search", tmp_path, "two  blanks\\t")


def test_a_working_folder_that_was_removed_is_named(tmp_path):
    script = "import os; os.rmdir(os.getcwd()); from hashengine.cli import app; app()"
    (tmp_path / "gone").mkdir()
    command = [sys.executable, "-c", script, "search", str(tmp_path), "query.png"]
    result = subprocess.run(command, cwd=tmp_path / "gone", env=os.environ | {"PYTHONPATH": str(ROOT)},
                            capture_output=True, text=True)  # fmt: skip
    expected = "the working folder must be present, got one that was removed; change to another folder"
    assert (result.returncode, result.stderr) == (2, f"error: hashengine: {expected}\n")


@pytest.mark.parametrize("stderr", ["/dev/full", None])
def test_a_mistake_has_its_exit_code_if_stderr_cannot_be_written_to(stderr):
    command = [sys.executable, "-m", "hashengine", "search", "missing", "missing"]
    redirection = "2>&-" if stderr is None else f"2>{stderr}"
    result = subprocess.run(f"{shlex.join(command)} {redirection}", shell=True, stdout=subprocess.PIPE)
    assert (result.returncode, result.stdout) == (2, b"")


@pytest.mark.parametrize("variables", [{}, {"COMP_WORDS": "hashengine"}, {"COMP_WORDS": "", "COMP_CWORD": "x"}])
def test_a_completion_without_the_variables_of_bash_is_refused_in_one_line(variables, monkeypatch):
    monkeypatch.delenv("COMP_WORDS", raising=False)
    monkeypatch.delenv("COMP_CWORD", raising=False)
    monkeypatch.setenv("_HASHENGINE_COMPLETE", "complete_bash")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert refuse().startswith("error: hashengine: COMP_WORDS and COMP_CWORD must be those that bash sets")


def test_an_output_need_not_be_readable():
    """It may be a pipe of another user. A test as root could not notice it."""
    groups, outputs = [app], 0
    while groups:
        group = groups.pop()
        groups += [inner.typer_instance for inner in group.registered_groups]
        for registered in group.registered_commands:
            for parameter in inspect.signature(registered.callback, eval_str=True).parameters.values():
                for option in getattr(parameter.annotation, "__metadata__", ()):
                    if parameter.name == "output" and "Path" in str(parameter.annotation):
                        assert not option.readable, registered.callback
                        outputs += 1
    assert outputs >= 6
