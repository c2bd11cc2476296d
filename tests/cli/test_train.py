"""The commands of `hashengine train`."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from hashengine.cli._options import parse, unknown_options
from hashengine.models import HashNet
from tests.helpers.children import as_user
from tests.helpers.commands import invoke, refuse, succeed
from tests.helpers.paths import ROOT
from tests.helpers.tiny_images import make_images, write_noise

RECIPES = sorted((ROOT / "training" / "recipes").glob("*.yaml"))


def test_the_command_line_takes_precedence_over_the_file_of_options(tmp_path):
    images = write_noise(tmp_path / "images", {"a": 12, "b": 12})
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump({"images": str(images), "bits": 24, "epochs": 1, "widths": [8]}))
    arguments = ("--config", tmp_path / "fit.yaml", "--output", tmp_path / "model", "--bits", 16, "--alpha", 0.5)
    assert "16 bits, method greedy_hash" in succeed("train", "fit", *arguments).stdout
    model = HashNet.from_pretrained(tmp_path / "model")
    assert model.trained_by.options == {"alpha": 0.5}
    assert model.config.bits == 16 and model.config.widths == (8,) and model.config.classes == ("a", "b")


def test_the_command_line_takes_precedence_over_method_options_in_the_file(tmp_path):
    images = write_noise(tmp_path / "images", {"a": 12, "b": 12})
    options = {"images": str(images), "epochs": 1, "widths": [8], "bits": 8, "method_options": {"alpha": 0.2}}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(options))
    config = ("--config", tmp_path / "fit.yaml")
    succeed("train", "fit", *config, "--output", tmp_path / "model", "--alpha", 0.5)
    succeed("train", "sweep", *config, "--output", tmp_path / "runs", "--grid", "alpha=0.5")
    for folder in (tmp_path / "model", tmp_path / "runs" / "alpha=0.5"):
        assert HashNet.from_pretrained(folder).trained_by.options == {"alpha": 0.5}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("-3", -3),
        ("0.50", 0.5),
        ("4e-3", 0.004),
        ("true", True),
        ("False", False),
        # YAML reads these as numbers, truth values, a date and nothing.
        *((text, text) for text in ("1:30", "0x10", "0b1", "yes", "on", "off", "2020-01-01", "null", "~")),
        *((text, text) for text in ("nan", "inf", "[1", "{a: 1}", "9" * 5000)),
    ],
)
def test_a_value_on_the_command_line_is_a_decimal_number_a_truth_value_or_text(text, value):
    found = parse(text)
    assert found == value and type(found) is type(value)
    assert unknown_options("fit", ["--rotation-seed", text]) == {"rotation_seed": value}


def test_a_number_means_the_same_in_every_option(tmp_path):
    images = write_noise(tmp_path / "images", {"a": 12, "b": 12})
    shared = ("--epochs", 1, "--widths", "08", "--bits", 8, "--method", "itq", "--rotation-seed", "010")
    fitted = ("--images", images, "--output", tmp_path / "model", "--seed", "010")
    succeed("train", "fit", *shared, *fitted)
    succeed("train", "sweep", *shared, "--images", images, "--output", tmp_path / "runs", "--grid", "seed=010")
    for folder in (tmp_path / "model", tmp_path / "runs" / "seed=10"):
        options = json.loads((folder / "training.json").read_text())["options"]
        assert (options["seed"], options["rotation_seed"], options["widths"]) == (10, 10, [8])


def test_a_folder_whose_name_is_a_number_may_be_in_a_grid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_noise(tmp_path / "010", {"a": 12, "b": 12})
    succeed("train", "sweep", "--epochs", 1, "--widths", 8, "--bits", 8, "--output", "runs", "--grid", "images=010")
    record = json.loads((tmp_path / "runs" / "images=010" / "training.json").read_text())
    assert record["options"]["images"].endswith("010")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["fit", "--images", "missing"], "fit: folder must be a folder of images, got '.*missing', which is missing"),
        (["fit", "--images", "empty"], "fit: folder must be a folder with images"),
        (["fit", "--images", "one"], "fit: images must be in at least two class folders, got only 'a'"),
        (["fit", "--images", "hollow"], "fit: every class folder must be non-empty, got no image in .*c'"),
        (["fit", "--images", "loose"], "fit: every image must be in a class folder, got .*x.png"),
        (["fit", "--images", "damaged"], ".*damaged/b/1.png: the file must be a readable image"),
        (["fit", "--images", "good", "--bits", "12"], "fit: bits must be a multiple of 8, got 12"),
        (["fit", "--images", "good", "--epochs", "0"], "fit: epochs must be greater than 0, got 0"),
        (["fit", "--images", "good", "--attention", "big"], "fit: attention must be .*got 'big'"),
        (
            ["fit", "--images", "good", "--config", "absent.yaml"],
            "train fit: config must be a readable file, got .*absent.yaml",
        ),
        (
            ["fit", "--images", "good", "--config", "list.yaml"],
            "train fit: config must be lines of 'option: value', got list",
        ),
        (["fit", "--images", "good", "--config", "unknown.yaml"], "fit: 'bitz' must be an option of training"),
        (["fit"], "fit: images must be given"),
        (
            ["fit", "--images", "good", "--config", "number.yaml"],
            "train fit: every option in config must be a name, got 1 in '.*number.yaml'",
        ),
        (["fit", "--images", "good", "--self", "1"], "fit: 'self' must be an option of training"),
        (
            ["sweep", "--images", "good", "--config", "grid.yaml", "--grid", "bits=8"],
            "train sweep: grid must be lines of 'option: values', got list",
        ),
        *(
            (["fit", "--images", "good", f"--{name}", f"{1 << 70}"], f"fit: {field} must be (less than|0 to) .*, got ")
            for name, field in [
                ("seed", "seed"),
                ("epochs", "epochs"),
                ("bits", "bits"),
                ("shift", "shift"),
                ("widths", "widths.0"),
                ("image-size", "image_size"),
            ]
        ),
        (["fit", "--images", "good", "--alpha", "-1"], "fit: alpha must be greater than or equal to 0, got -1"),
        (
            ["fit", "--images", "good", "--method", "itq", "--alpha", "1"],
            "fit: 'alpha' must be an option of training or",
        ),
        (["fit", "--images", "good", "--bitz", "16"], "fit: 'bitz' must be an option of training or of the method"),
        (["fit", "--images", "good", "--stem-stride", "3"], "fit: stem_stride must be 1 or 2, got '3'"),
        (["fit", "--images", "good", "--widths", "8,x"], "fit: widths.1 must be a valid integer, .*got 'x'"),
        (["fit", "--images", "good", "extra"], "train fit: an argument must be '--option value', got 'extra'"),
        (
            ["sweep", "--images", "good", "--grid", "bits"],
            "train sweep: grid must be OPTION=VALUE,VALUE,..., got 'bits'",
        ),
        (
            ["sweep", "--images", "good", "--grid", "bits=8", "--grid", "bits=16"],
            "train sweep: grid must be each option once, with all its values, got 'bits' twice",
        ),
        (["fit", "--imgaes", "good"], "fit: 'imgaes' must be an option of training or of the method"),
        (
            ["sweep", "--images", "good", "--grid", "seed=1:30"],
            "train sweep: seed must be a valid integer, got '1:30'",
        ),
        (
            ["fit", "--images", "good", "--config", "twice.yaml"],
            "fit: 'alpha' must be given once, got 0.7, and 0.5 in method_options",
        ),
        (
            ["sweep", "--images", "good", "--config", "twice.yaml"],
            "fit: 'alpha' must be given once, got 0.7, and 0.5 in method_options",
        ),
        (["sweep", "--images", "good", "--grid", "bits=12"], "train sweep: bits must be a multiple of 8, got 12"),
        (["sweep", "--images", "good", "--grid", "device=tpu"], "fit: device must be 'auto', 'cpu', .*got 'tpu'"),
        (["report", "good"], "train report: run must be a model folder with training.json, or a folder of them"),
        (
            ["prepare", "nothing"],
            "train prepare: source must be digits, fashion-mnist, cifar10 or a folder.*got 'nothing'",
        ),
        (
            ["prepare", "good", "--queries", "17"],
            "train prepare: queries must be at most 16 of these 18 images.*got 17",
        ),
        (["prepare", "good", "--queries", "0"], "train prepare: queries must be at least 1, got 0"),
        (["prepare", "good", "--seed", "-1"], "train prepare: seed must be at least 0, got -1"),
        (["fit", "--images", "good", "--image-size", "4"], "fit: image_size must be .*8, got 4"),
    ],
)
def test_bad_input_gives_one_line_with_the_error_and_exit_status_2(tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    write_noise(tmp_path / "good", {"a": 9, "b": 9})
    write_noise(tmp_path / "one", {"a": 3})
    write_noise(tmp_path / "hollow", {"a": 3, "b": 3, "c": 0})
    write_noise(tmp_path / "loose", {"a": 3, "b": 3})
    (tmp_path / "loose" / "x.png").write_bytes((tmp_path / "good" / "a" / "0.png").read_bytes())
    write_noise(tmp_path / "damaged", {"a": 3, "b": 3})
    (tmp_path / "damaged" / "b" / "1.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "unknown.yaml").write_text("bitz: 16\n")
    (tmp_path / "number.yaml").write_text("1: 2\n")
    (tmp_path / "grid.yaml").write_text("grid: [bits]\n")
    (tmp_path / "twice.yaml").write_text("alpha: 0.7\nmethod_options: {alpha: 0.5}\n")
    output = ("--output", "out.md" if arguments[0] == "report" else "out")
    result = invoke("train", *arguments, *output)
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert result.output.endswith(f"{line}\n")
    assert result.exit_code == 2 and "Traceback" not in result.output and not (tmp_path / "out").exists()
    assert re.match(f"error: {complaint}", line)


def test_python_m_training_is_the_same_command(tmp_path):
    (tmp_path / "images").mkdir()
    images, model = str(tmp_path / "images"), str(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-m", "training", "fit", "--images", images, "--output", model],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: fit: folder must be a folder with images")
    assert "Traceback" not in done.stderr


def test_prepare_prints_the_sizes_of_the_database_and_of_the_queries(tmp_path):
    source = write_noise(tmp_path / "photos", {"a": 20, "b": 20})
    lines = succeed("train", "prepare", source, "--output", tmp_path / "split").stdout.splitlines()
    assert [line.split("\t")[:3] for line in lines[1:]] == [["database", "36", "2"], ["query", "4", "2"]]


def test_class_folders_whose_names_are_no_utf8_are_split_trained_and_evaluated(tmp_path):
    name = os.fsdecode(b"c\xe9")
    source = write_noise(tmp_path / name, {name: 8, "b": 8})
    table = succeed("train", "prepare", source, "--output", tmp_path / "split", "--queries", 4).stdout
    assert len(table.splitlines()) == 3
    split = json.loads((tmp_path / "split" / "split.json").read_text())
    assert set(split["database"]["classes"]) == {name, "b"} and split["source"] == str(source)
    images = ("--images", tmp_path / "split" / "database", "--queries", tmp_path / "split" / "query")
    tiny = ("--epochs", 1, "--widths", 8, "--bits", 8)
    succeed("train", "sweep", *images, *tiny, "--output", tmp_path / "runs" / name)
    assert succeed("train", "report", tmp_path / "runs" / name).stdout.startswith("seeds\t")
    fitted = succeed("train", "fit", *images[:2], *tiny, "--output", tmp_path / f"model {name}")
    assert fitted.stdout.startswith(f"model\t{tmp_path}/model c\\xe9\n")
    assert HashNet.from_pretrained(tmp_path / f"model {name}").config.classes == ("b", name)


def test_an_output_in_an_input_is_refused_before_the_work(tmp_path, monkeypatch):
    images = write_noise(tmp_path / "images", {"a": 3, "b": 3})
    run = tmp_path / "run"
    run.mkdir()
    record = {"options": {}, "epochs": [{"epoch": 1}], "seconds": 1.0}
    (run / "training.json").write_text(json.dumps(record))
    for arguments, output in [
        (("fit", "--images", images), images / "model"),
        (("fit", "--images", images), run / "training.json"),
        (("sweep", "--images", images), images / "a"),
        (("sweep", "--images", tmp_path / "b", "--queries", images), images / "runs"),
        (("prepare", images), images / "split"),
        (("report", run), run / "training.json"),
    ]:
        assert "output must be a " in refuse("train", *arguments, "--output", output)
    succeed("train", "report", run, "--output", tmp_path / "new" / "table.md")
    assert json.loads((run / "training.json").read_text()) == record and not (images / "split").exists()


def test_sweep_and_report_print_the_same_table(tmp_path):
    images, queries = make_images(tmp_path / "images", 4), make_images(tmp_path / "queries", 1, seed=1)
    runs = tmp_path / "runs"
    options = (
        "--images",
        images,
        "--queries",
        queries,
        "--output",
        runs,
        "--epochs",
        1,
        "--batch-size",
        8,
        "--bits",
        8,
    )
    arguments = ("train", "sweep", *options, "--widths", 8, "--grid", "alpha=0.1,0.5", "--grid", "seed=0,1")
    table = succeed(*arguments).stdout
    header, *rows = [line.split("\t") for line in table.splitlines()]
    assert header[:3] == ["alpha", "seeds", "mAP"] and [row[:2] for row in rows] == [["0.1", "0, 1"], ["0.5", "0, 1"]]
    assert succeed("train", "report", runs).stdout == table
    succeed("train", "report", runs, "--output", tmp_path / "table.json")
    assert len(json.loads((tmp_path / "table.json").read_text())["groups"]) == 2


def test_methods_are_listed_with_their_options():
    rows = [line.split("\t") for line in succeed("train", "methods").stdout.splitlines()]
    assert ["greedy_hash", "--alpha", "0.1"] in [row[:3] for row in rows]
    assert {row[0] for row in rows[1:]} == {"cibhash", "greedy_hash", "itq"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(recipe, tmp_path):
    """Options on the command line, which take precedence, make the network and the run tiny."""
    images = make_images(tmp_path / "images", per_class=4)
    tiny = ("--images", images, "--output", tmp_path / "model", "--epochs", 1, "--widths", 8, "--image-size", 8)
    succeed("train", "fit", "--config", recipe, *tiny)
    run = json.loads((tmp_path / "model" / "training.json").read_text())
    written = yaml.safe_load(recipe.read_text())
    kept = set(written) - {"images", "output", "epochs", "widths", "image_size"}
    assert {name: run["options"][name] for name in kept} == {name: written[name] for name in kept}


def test_every_named_data_set_has_a_recipe():
    assert {"digits", "fashion-mnist", "cifar10"} <= {path.stem for path in RECIPES}


def test_a_run_that_cannot_be_read_is_named(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "training.json").write_text("{}")
    (tmp_path / "b").chmod(0)

    reason = "which cannot be read (Permission denied)\n"

    def report() -> None:
        assert refuse("train", "report", tmp_path).endswith(f"got {str(tmp_path / 'b' / 'training.json')!r}, {reason}")
        assert refuse("train", "report", tmp_path / "b").endswith(f"got {str(tmp_path / 'b')!r}, {reason}")

    as_user(report)
    (tmp_path / "b").chmod(0o700)
    (tmp_path / "a" / "training.json").chmod(0)

    def report_file() -> None:
        found = refuse("train", "report", tmp_path / "a")
        assert found.endswith(f"got {str(tmp_path / 'a' / 'training.json')!r}, {reason}")

    as_user(report_file)
