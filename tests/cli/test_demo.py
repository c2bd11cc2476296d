"""The demo: its folder, its steps, and the commands that it prints, which give the same results as the demo."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from hashengine.cli.demo import print_summary
from hashengine.errors import InputError
from hashengine.evaluation import demo as demo_module
from hashengine.evaluation import run_demo
from tests.helpers.commands import invoke, refuse, succeed
from tests.helpers.tiny_images import make_images


def test_a_folder_that_no_demo_made_or_that_contains_the_data_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("almost done")
    assert "demo: output must be a new folder or an earlier output" in refuse("demo", "--output", tmp_path)
    data = make_images(tmp_path / "out" / "data", per_class=1)
    complaint = refuse("demo", "--data", data, "--output", tmp_path / "out").splitlines()[-1]
    assert "demo: output must be a folder that does not contain the data" in complaint
    assert (tmp_path / "thesis.txt").exists() and (data / "dots" / "0.png").exists()


def test_the_demo_stops_at_a_failing_step_and_a_second_run_starts_over(tmp_path, monkeypatch, capsys):
    ran = []

    def prepare(*arguments, **options):
        ran.append("prepare")
        return {side: {"images": 1} for side in ("database", "query")}

    def fit(*arguments, **options):
        ran.append("fit")
        raise InputError("fit: the loss must be finite, got NaN")

    monkeypatch.setattr("hashengine.training.prepare", prepare, raising=False)
    monkeypatch.setattr("hashengine.training.fit", fit, raising=False)
    for _ in range(2):
        ran.clear()
        with pytest.raises(InputError, match="the loss must be finite"):
            run_demo("digits", tmp_path / "demo", 32)
        assert ran == ["prepare", "fit"]
        assert capsys.readouterr().err.count("$ hashengine train ") == 2
        (tmp_path / "demo" / "left-over").write_text("from the first run")
    demo_module.start_over(tmp_path / "demo", "digits")
    assert [path.name for path in (tmp_path / "demo").iterdir()] == [demo_module.MARKER.name]


def test_the_demo_mirrors_images_in_training_unless_they_are_digits_or_fashion_mnist():
    for data, mirrors in (("digits", False), ("fashion-mnist", False), ("cifar10", True), ("photos/", True)):
        (fit,) = [step for step in demo_module.steps(data, Path("demo"), 32) if "fit" in step.command]
        assert ("--flip" in fit.command) == mirrors


def test_the_printed_commands_give_the_same_results_as_the_demo(tmp_path, monkeypatch, capsys):
    """Run every command that the demo prints, and compare the model, the codes, the split and the figures."""
    data = make_images(tmp_path / "data", per_class=14)
    monkeypatch.chdir(tmp_path)
    report = run_demo(str(data), Path("demo"), 16)
    commands = [shlex.split(line[2:]) for line in capsys.readouterr().err.splitlines() if line.startswith("$ ")]
    assert [command[1:3] if command[1] == "train" else command[1:2] for command in commands] == [
        ["train", "prepare"], ["train", "fit"], ["encode"], ["encode"], ["index"], ["search"], ["evaluate"], ["report"],
    ]  # fmt: skip
    print_summary(report)
    assert "mAP" in capsys.readouterr().out
    Path("demo").rename("made-by-the-demo")
    for program, *arguments in commands:
        assert program == "hashengine"
        succeed(*arguments)
    by_commands, by_demo = Path("demo"), Path("made-by-the-demo")
    for name in (
        "model/model.safetensors",
        "model/config.json",
        "database/codes.npy",
        "query/codes.npy",
        "images/split.json",
    ):
        assert (by_commands / name).read_bytes() == (by_demo / name).read_bytes(), name
    first, second = (json.loads((folder / "report.json").read_text()) for folder in (by_commands, by_demo))
    for figures in (first, second):
        del figures["evaluation"]["seconds"]
    assert {key: first[key] for key in ("evaluation", "drawn", "worst")} == {
        key: second[key] for key in ("evaluation", "drawn", "worst")
    }


def test_the_demo_command_prints_the_path_of_its_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = make_images(tmp_path / "data", per_class=14)
    result = invoke("demo", "--data", data, "--output", "demo", "--bits", 16, "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "Open demo/report.html"
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--data", "nothere"], "demo: folder must be a folder of images, got 'nothere', which is missing"),
        (["--bits", 7], "demo: bits must be a multiple of 8, got 7"),
    ],
)
def test_a_mistake_in_the_options_is_found_before_an_earlier_demo_is_removed(tmp_path, options, complaint):
    for name in (demo_module.MARKER.name, "report.html"):
        (tmp_path / name).write_text("earlier")
    assert complaint in refuse("demo", *options, "--output", tmp_path)
    assert (tmp_path / "report.html").read_text() == "earlier"


def test_the_demo_follows_a_link_to_an_earlier_demo(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / demo_module.MARKER.name).write_text("")
    (tmp_path / "link").symlink_to("demo")
    demo_module.start_over(tmp_path / "link", "digits")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "demo" / demo_module.MARKER.name).read_text()


def test_an_interrupted_removal_of_an_earlier_demo_can_be_repeated(tmp_path, monkeypatch):
    output = tmp_path / "demo"
    demo_module.start_over(output, "digits")
    for name in ("a", "b"):
        (output / name).mkdir()
    (output / "link").symlink_to(tmp_path)
    rmtree = shutil.rmtree

    def interrupted(path):
        rmtree(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_module.start_over(output, "digits")
    monkeypatch.undo()
    demo_module.start_over(output, "digits")
    assert [path.name for path in output.iterdir()] == [".hashengine-demo"] and tmp_path.exists()


def test_a_folder_named_like_a_data_set_can_start_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        demo_module.start_over(Path("digits"), "digits")
    assert (tmp_path / "digits" / ".hashengine-demo").exists()


def test_data_that_cannot_be_split_leaves_an_earlier_demo_as_it_is(tmp_path):
    data = make_images(tmp_path / "data", per_class=1)
    demo_module.start_over(tmp_path / "demo", "digits")
    (tmp_path / "demo" / "model").mkdir()
    with pytest.raises(InputError, match="a folder with a class of at least two different images"):
        run_demo(str(data), tmp_path / "demo", 32)
    assert (tmp_path / "demo" / "model").is_dir()


def test_two_demos_in_one_folder_are_refused(tmp_path, monkeypatch):
    def second(*arguments, **options):
        with pytest.raises(InputError, match="^demo: output must be a folder that no other demo uses, got "):
            run_demo("digits", tmp_path / "demo", 32)
        raise InputError("the first demo went on")

    monkeypatch.setattr("hashengine.training.prepare", second, raising=False)
    with pytest.raises(InputError, match="the first demo went on"):
        run_demo("digits", tmp_path / "demo", 32)
    assert [path.name for path in (tmp_path / "demo").iterdir()] == [demo_module.MARKER.name]
