"""The commands of image search: what they print to stdout and stderr, what they write, and what they refuse."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hashengine.cli import app
from hashengine.evaluation.records import read_items
from tests.helpers.children import as_user
from tests.helpers.commands import invoke, refuse, succeed
from tests.helpers.paths import ROOT
from tests.helpers.tiny_images import make_images, make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, images, and the outputs of `encode`, `index`, `search` and `evaluate`."""
    folder = tmp_path_factory.mktemp("commands")
    make_model(folder / "model")
    make_images(folder / "images" / "database", per_class=5)
    make_images(folder / "images" / "query", per_class=2, seed=1)
    for name in ("database", "query"):
        succeed("encode", folder / "images" / name, "--model", folder / "model", "--output", folder / name)
    succeed("index", folder / "database", "--output", folder / "index")
    succeed("search", folder / "index", folder / "query", "-k", 3, "--output", folder / "results.json")
    succeed("evaluate", folder / "index", folder / "query", "--output", folder / "evaluation.json")
    return folder


def test_a_search_for_one_image_prints_tab_separated_neighbours(folder):
    image = folder / "images" / "database" / "dots" / "3.png"
    result = succeed("search", folder / "index", image, "-k", 15)
    header, *rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert header == ["rank", "distance", "path", "label"]
    assert [row[0] for row in rows] == [str(rank) for rank in range(1, 16)]
    assert [int(row[1]) for row in rows] == sorted(int(row[1]) for row in rows)
    assert rows[0][1] == "0"
    assert str(image) in [row[2] for row in rows if row[1] == "0"]
    assert all(Path(row[2]).parent.name == row[3] for row in rows)
    assert "1 query among 15 codes of 32 bits, k = 15" in result.stderr


def test_paths_below_the_working_folder_are_shortened(folder, monkeypatch):
    monkeypatch.chdir(folder)
    result = succeed("search", "index", "images/query/bars/0.png", "-k", 1)
    assert result.stdout.splitlines()[1].split("\t")[2].startswith("images/database/")


def test_a_folder_of_images_is_searched_like_its_codes(folder, tmp_path):
    succeed("search", folder / "index", folder / "images" / "query", "-k", 3, "--output", tmp_path / "results.json")
    here, there = (json.loads((place / "results.json").read_text()) for place in (tmp_path, folder))
    assert here["queries"] == there["queries"]
    assert len(here["queries"]) == 6 and all(len(query["hits"]) == 3 for query in here["queries"])


def test_evaluation_prints_the_figures_that_it_writes(folder):
    lines = succeed("evaluate", folder / "index", folder / "query").stdout.splitlines()
    written = json.loads((folder / "evaluation.json").read_text())["mean_average_precision"]
    assert lines[1].split("\t") == ["mAP", *(f"{written[name]:.4f}" for name in ("expected", "minimum", "maximum"))]


def test_evaluate_with_at_k_names_the_figure_map_at_k(folder):
    assert "mAP@2\t" in succeed("evaluate", folder / "index", folder / "query", "--at", 2).stdout


def test_queries_without_a_relevant_image_are_reported(folder, tmp_path):
    images = make_images(tmp_path / "images", per_class=2)
    (images / "bars").rename(images / "bar")
    succeed("encode", images, "--model", folder / "model", "--output", tmp_path / "codes")
    arguments = (folder / "index", tmp_path / "codes", "--output", tmp_path / "evaluation.json")
    line = "2 of 6 queries have no relevant image and count as 0"
    assert line in succeed("evaluate", *arguments).stderr
    assert json.loads((tmp_path / "evaluation.json").read_text())["without_relevant"] == 2
    succeed(
        "report", "--index", folder / "index", "--results", folder / "results.json",
        "--evaluation", tmp_path / "evaluation.json", "--output", tmp_path / "report.html",
    )  # fmt: skip
    assert line in (tmp_path / "report.html").read_text()
    assert "no relevant image" not in succeed("evaluate", folder / "index", folder / "query").stderr


def test_the_default_k_is_10_or_the_number_of_images(folder, tmp_path):
    image = folder / "images" / "query" / "bars" / "0.png"
    succeed("index", folder / "query", "--output", tmp_path / "index")
    assert len(succeed("search", tmp_path / "index", image).stdout.splitlines()) == 1 + 6
    assert len(succeed("search", folder / "index", image).stdout.splitlines()) == 1 + 10
    succeed("search", tmp_path / "index", folder / "query", "--output", tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text())["k"] == 6


def test_a_file_named_dash_is_written_if_its_folder_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for option in (("--output", "./-"), ("--output=./-",)):
        assert "mAP" in succeed("evaluate", folder / "index", folder / "query", *option).stdout
        assert json.loads(Path("-").read_text())["queries"] == 6
        Path("-").unlink()


def test_one_image_is_counted_in_the_singular(folder, tmp_path):
    (tmp_path / "images").mkdir()
    shutil.copy(folder / "images" / "query" / "bars" / "0.png", tmp_path / "images")
    command = ("encode", tmp_path / "images", "--model", folder / "model", "--output", tmp_path / "codes")
    assert succeed(*command).stderr.startswith("1 image to ")
    assert "1 code in the index" in succeed("index", tmp_path / "codes", "--output", tmp_path / "index").stderr


def test_index_with_append_adds_codes_to_the_index(folder, tmp_path):
    succeed("index", folder / "query", "--output", tmp_path / "index")
    assert (
        "21 codes in the index"
        in succeed("index", folder / "database", "--output", tmp_path / "index", "--append").stderr
    )


def test_report_writes_a_page_and_its_figures(folder, tmp_path):
    succeed(
        "report", "--index", folder / "index", "--results", folder / "results.json",
        "--evaluation", folder / "evaluation.json", "--output", tmp_path / "report.html",
    )  # fmt: skip
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert json.loads((tmp_path / "report.json").read_text())["queries"] == 6


def test_an_unreadable_image_is_counted_and_recorded(folder, tmp_path):
    images = make_images(tmp_path / "images", per_class=1)
    (images / "bars" / "broken.jpg").write_bytes(b"not a picture")
    result = succeed("encode", images, "--model", folder / "model", "--output", tmp_path / "codes")
    assert "3 images, 1 skipped" in result.stderr
    assert "broken.jpg" in json.loads((tmp_path / "codes" / "encode.json").read_text())["errors"][0]["path"]


NO_UTF8 = os.fsdecode(b"c\xe9")  # a name whose bytes are no UTF-8


@pytest.fixture(scope="module")
def named(folder, tmp_path_factory):
    """A folder with images, codes, an index and results, whose own name and class and file names are no UTF-8."""
    place = tmp_path_factory.mktemp("named") / NO_UTF8
    images = make_images(place / "images", per_class=2)
    (images / "bars").rename(images / NO_UTF8)
    (images / NO_UTF8 / "0.png").rename(images / NO_UTF8 / f"{NO_UTF8}.png")
    (images / NO_UTF8 / f"broken{NO_UTF8}.png").write_bytes(b"not a picture")
    shutil.copytree(folder / "model", place / "model")
    shutil.copytree(images, place / "copies")
    for source, codes, option in (("images", "codes", ()), ("copies", "copied codes", ("--append",))):
        succeed("encode", place / source, "--model", place / "model", "--output", place / codes)
        succeed("index", place / codes, "--output", place / "index", *option)
    succeed("search", place / "index", images, "-k", 12, "--output", place / "results.json")
    return place


def test_names_that_are_no_utf8_keep_their_bytes_in_all_files(named):
    names = {source: sorted(map(os.fsencode, (named / source).rglob("*.png"))) for source in ("images", "copies")}
    expected = names["images"]
    errors = json.loads((named / "codes" / "encode.json").read_text())["errors"]
    found = [os.fsencode(error["path"]) for error in errors]
    for folder, sources in (("codes", ["images"]), ("index", ["images", "copies"])):
        items = read_items(named / folder / "items.csv", "test", "items")
        broken = [os.fsencode(named / source / NO_UTF8 / f"broken{NO_UTF8}.png") for source in sources]
        wanted = [name for source in sources for name in names[source]]
        assert sorted([*(os.fsencode(item.path) for item in items), *broken]) == sorted(wanted)
        assert [item.label for item in items].count(NO_UTF8) == 2 * len(sources)
    queries = json.loads((named / "results.json").read_text())["queries"]
    assert sorted([*(os.fsencode(query["path"]) for query in queries), *found]) == expected
    assert {hit["label"] for hit in queries[0]["hits"]} == {NO_UTF8, "checks", "dots"}


def test_names_that_are_no_utf8_are_shown_escaped(named, tmp_path):
    image = named / "images" / NO_UTF8 / f"{NO_UTF8}.png"
    rows = [line.split("\t") for line in succeed("search", named / "index", image, "-k", 1).stdout.splitlines()]
    assert rows[1][2:] == [str(image).replace(NO_UTF8, r"c\xe9"), r"c\xe9"]
    succeed("evaluate", named / "index", named / "codes", "--output", named / "evaluation.json")
    page = named / "report.html"
    report = ("report", "--index", named / "index", "--results", named / "results.json", "--output", page)
    assert r"c\xe9/report.html" in succeed(*report, "--evaluation", named / "evaluation.json").stderr
    assert "unreadable" not in page.read_text() and r"c\xe9.png" in page.read_text()


def test_a_printed_table_has_one_line_per_row_whatever_the_names_are(folder, tmp_path):
    images = make_images(tmp_path / "images", per_class=1)
    (images / "bars" / "0.png").rename(images / "bars" / "tab\tline\nescape\x1b[31m.png")
    (images / "checks").rename(images / "a\nb")
    succeed("encode", images, "--model", folder / "model", "--output", tmp_path / "codes")
    succeed("index", tmp_path / "codes", "--output", tmp_path / "index")
    rows = succeed("search", tmp_path / "index", images / "dots" / "0.png", "-k", 3).stdout.splitlines()
    assert len(rows) == 4 and all(row.count("\t") == 3 for row in rows)
    assert any(r"tab\tline\nescape\x1b[31m.png" in row for row in rows)
    assert r"a\nb" in [row.split("\t")[3] for row in rows]


def test_a_console_that_lacks_a_character_gets_its_escape(folder, tmp_path):
    images = make_images(tmp_path / "Zürich", per_class=1)
    succeed("encode", images, "--model", folder / "model", "--output", tmp_path / "codes")
    succeed("index", tmp_path / "codes", "--output", tmp_path / "index")
    command = ["search", str(tmp_path / "index"), str(images / "dots" / "0.png"), "-k", "3"]
    done = CliRunner(charset="ascii").invoke(app, command)  # as with PYTHONIOENCODING=ascii
    assert done.exit_code == 0 and done.stdout.count(r"Z\xfcrich") == 3


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("command", "output"),
    [
        ("search index images/query/bars/0.png", "images/query/bars/0.png"),
        ("search index images/query", "images/query/bars/0.png"),
        ("search index query", "index/index.json"),
        ("search index query", "query/items.csv"),
        ("search index query", "index"),
        ("search index images/query --model model", "model/results.json"),
        ("evaluate index query", "index/evaluation.json"),
        ("evaluate index query", "query/encode.json"),
        ("report --index index --results results.json", "results.html"),
        ("report --index index --results results.json --evaluation evaluation.json", "evaluation.html"),
        ("report --index index --results results.json", "index/report.html"),
        ("encode images/query --model model", "model/codes"),
        ("encode images/query --model model", "images/query/bars"),
        ("encode images/query --model model", "results.json/codes"),
        ("index query", "query/index"),
        ("index query", "query"),
        ("index query", "results.json"),
    ],
)
def test_an_output_that_destroys_an_input_is_refused_before_the_work(folder, monkeypatch, command, output):
    monkeypatch.chdir(folder)
    before = contents(folder)
    monkeypatch.setattr("hashengine.models.HashNet.encode", None)
    where = command.split()[0]
    assert refuse(*command.split(), "--output", output).startswith(f"error: {where}: output must be ")
    assert contents(folder) == before


def test_results_can_be_written_next_to_the_photos_and_into_a_pipe(folder, tmp_path):
    photos = make_images(tmp_path / "photos", per_class=1)
    succeed("search", folder / "index", photos, "--output", photos / "results.json")
    succeed("search", folder / "index", photos, "--output", "/dev/null")
    assert Path("/dev/null").is_char_device() and (photos / "results.json").is_file()


@pytest.mark.parametrize("output", ["photos/plain", "photos/photo.dat", "link.json"])
def test_results_replace_no_image_whatever_its_name(folder, tmp_path, output):
    photo = make_images(tmp_path / "photos", per_class=1) / "bars" / "0.png"
    for name in ("plain", "photo.dat"):
        shutil.copyfile(photo, tmp_path / "photos" / name)
    (tmp_path / "link.json").symlink_to(photo)
    before = contents(tmp_path)
    message = refuse("search", folder / "index", tmp_path / "photos", "--output", tmp_path / output)
    assert message.startswith("error: search: output must be a path that destroys no input")
    assert contents(tmp_path) == before


def test_results_and_figures_replace_no_image(folder, tmp_path):
    photos = make_images(tmp_path / "photos", per_class=2) / "bars"
    shutil.copyfile(photos / "1.png", photos / "plain")
    queries = tmp_path / "queries"
    succeed("encode", folder / "images" / "query", "--model", folder / "model", "--output", queries)
    before = contents(tmp_path)
    for name, command in (
        ("1.png", ("search", folder / "index", photos / "0.png")),
        ("plain", ("search", folder / "index", queries)),
        ("1.png", ("search", folder / "index", folder / "images" / "query")),
        ("plain", ("evaluate", folder / "index", queries)),
    ):
        message = refuse(*command, "--output", photos / name)
        assert message.startswith(f"error: {command[0]}: output must be a file that is no image")
    assert contents(tmp_path) == before
    for _ in range(2):
        succeed("search", folder / "index", photos / "0.png", "--output", photos / "new.json")


def test_results_and_figures_replace_no_part_of_what_hashengine_wrote(folder, tmp_path):
    """Not even in a folder that is no input."""
    for name, copied in (("database", "codes"), ("index", "index"), ("model", "model")):
        shutil.copytree(folder / name, tmp_path / copied)
    queries = tmp_path / "queries"
    succeed("encode", folder / "images" / "query", "--model", folder / "model", "--output", queries)
    search = ("search", folder / "index", folder / "images" / "query")
    before = contents(tmp_path)
    for command, place in (
        (("evaluate", folder / "index", queries), "model/model.safetensors"),
        *((search, place) for place in ("codes/items.csv", "index/index.json", "index/items.csv")),
        *((search, place) for place in ("index/codes/manifest.json", "index/model/config.json", "model/config.json")),
    ):
        message = refuse(*command, "--output", tmp_path / place)
        assert "output must be a file that is no part of codes, an index, a network or a split, got" in message
    assert contents(tmp_path) == before
    for _ in range(2):
        succeed(*search, "--output", tmp_path / "index.json")
        succeed(*search, "--output", tmp_path / "model" / "results.json")


def test_mistakes_in_encode_are_refused(folder, tmp_path):
    model, output = ("--model", folder / "model"), ("--output", tmp_path / "codes")
    images = folder / "images" / "query"
    assert "missing" in refuse("encode", tmp_path / "nowhere", *model, *output)
    (tmp_path / "empty").mkdir()
    assert "a folder with images" in refuse("encode", tmp_path / "empty", *model, *output)
    (tmp_path / "empty" / "a.png").write_bytes(b"")
    result = invoke("encode", tmp_path / "empty", *model, *output)
    assert result.exit_code == 2 and result.stderr.splitlines()[-1].startswith(
        "error: encode: folder must be a folder with a readable image"
    )
    assert "encode: model must be a model folder" in refuse("encode", images, "--model", tmp_path / "empty", *output)
    assert "encode: batch_size must be at least 1, got 0" in refuse(
        "encode", images, *model, *output, "--batch-size", 0
    )
    assert "encode: output must be a new folder" in refuse("encode", images, *model, "--output", folder / "model")
    assert not (tmp_path / "codes").exists()


def test_codes_whose_model_has_moved_are_indexed_with_the_option_model(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    succeed("encode", folder / "images" / "query", "--model", tmp_path / "model", "--output", tmp_path / "codes")
    (tmp_path / "model").rename(tmp_path / "moved")
    command = ("index", tmp_path / "codes", "--output", tmp_path / "index")
    line = refuse(*command)
    assert "the model of the codes must be where 'encode' found it" in line and "pass --model MODEL" in line
    another = "index: model must be the one that made the codes, got another one in"
    assert another in refuse(*command, "--model", make_model(tmp_path / "other", seed=1))
    assert "index: model must be a model folder" in refuse(*command, "--model", tmp_path / "codes")
    assert not (tmp_path / "index").exists()
    succeed(*command, "--model", tmp_path / "moved")
    succeed(*command, "--append")  # needs no model, because the index has a copy
    succeed(*command, "--append", "--model", tmp_path / "moved")
    assert another in refuse(*command, "--append", "--model", tmp_path / "other")
    succeed("search", tmp_path / "index", folder / "images" / "query" / "bars" / "0.png", "-k", 1)
    succeed(*command, "--model", tmp_path / "index" / "model")  # the copy in the index that is replaced


def test_mistakes_in_index_are_refused(folder, tmp_path):
    assert "index: codes must be a codes folder" in refuse("index", folder / "model", "--output", tmp_path / "index")
    assert "index: index must be a folder written by" in refuse(
        "index", folder / "query", "--output", tmp_path / "i", "--append"
    )
    succeed(
        "encode", folder / "images" / "query", "--model", make_model(tmp_path / "m", 16), "--output", tmp_path / "c"
    )
    assert "codes must be codes of 32 bits" in refuse("index", tmp_path / "c", "--output", folder / "index", "--append")


def test_mistakes_in_search_are_refused(folder, tmp_path):
    index, query = folder / "index", folder / "images" / "query" / "bars" / "0.png"
    assert "search: index must be a folder written by" in refuse("search", tmp_path, query)
    assert "search: query must be an image" in refuse("search", index, tmp_path / "none.png")
    assert "search: output must be a file" in refuse("search", index, folder / "query")
    assert "search: k must be 1 to 15" in refuse("search", index, query, "-k", 0)
    assert "search: k must be 1 to 15" in refuse("search", index, query, "-k", 16)
    assert "search: device must be " in refuse("search", index, query, "--device", "tpu")
    assert "search: batch_size must be at least 1" in refuse("search", index, query, "--batch-size", 0)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    assert "broken.png" in refuse("search", index, tmp_path / "broken.png")
    make_model(tmp_path / "m16", 16)
    assert "model must be that of the index" in refuse("search", index, query, "--model", tmp_path / "m16")
    assert "another one" in refuse("search", index, query, "--model", make_model(tmp_path / "m1", seed=1))


@pytest.mark.parametrize("damage", ["codes", "items", "record", "model"])
def test_a_damaged_index_is_refused(folder, tmp_path, damage):
    index = tmp_path / "index"
    succeed("index", folder / "database", "--output", index)
    if damage == "codes":
        (file,) = (index / "codes").glob("codes-*.bin")
        file.write_bytes(file.read_bytes()[:-1])
    else:
        name = {"items": "items.csv", "record": "index.json", "model": "model/model.safetensors"}[damage]
        (index / name).write_bytes((index / name).read_bytes()[:40])
    refuse("search", index, folder / "images" / "query" / "bars" / "0.png", "-k", 1)


@pytest.mark.parametrize("name", ["index/index.json", "index/items.csv", "index/model/config.json", "results.json"])
@pytest.mark.parametrize("damage", ["cut", "bytes", "other"])
def test_an_error_shows_at_most_a_line_of_a_long_damaged_file(folder, tmp_path, name, damage):
    shutil.copytree(folder / "index", tmp_path / "index")
    shutil.copyfile(folder / "results.json", tmp_path / "results.json")
    long = json.dumps({"format": "x" * 100_000, "version": ["x" * 100_000], "bits": "x" * 100_000})
    content = {"cut": long[:-1].encode(), "bytes": b"\xff" * 100_000, "other": long.encode()}[damage]
    (tmp_path / name).write_bytes(content)
    query = folder / "images" / "query" / "bars" / "0.png"
    if name == "results.json":
        report = ("report", "--index", tmp_path / "index", "--results", tmp_path / "results.json")
        line = refuse(*report, "--output", tmp_path / "report.html")
    else:
        line = refuse("search", tmp_path / "index", query, "-k", 1)
    assert len(line) < 1000


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("results.json", "queries", []),
        ("results.json", "seconds", float("nan")),
        ("results.json", "encode.seconds", 0),
        ("results.json", "encode.count", -1),
        ("results.json", "k", -5),
        ("results.json", "queries_per_second", -1),
        ("evaluation.json", "mean_average_precision.expected", 5),
        ("evaluation.json", "precision_recall_curve", {"radius": [], "precision": [], "recall": [], "empty": []}),
        ("evaluation.json", "precision_recall_curve.recall", []),
        ("evaluation.json", "mean_average_precision.expected", float("inf")),
        ("index/index.json", "sources.0.seconds", 0),
        ("index/index.json", "sources.0.seconds", -1),
        ("index/index.json", "seconds", float("nan")),
    ],
)
def test_a_record_with_a_value_that_no_command_writes_is_refused(folder, tmp_path, name, path, value):
    shutil.copytree(folder / "index", tmp_path / "index")
    for file in ("results.json", "evaluation.json"):
        shutil.copyfile(folder / file, tmp_path / file)
    record = json.loads((tmp_path / name).read_text())
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    place = record
    for part in parents:
        place = place[part]
    place[last] = value
    (tmp_path / name).write_text(json.dumps(record))
    report = ("report", "--index", tmp_path / "index", "--results", tmp_path / "results.json")
    line = refuse(*report, "--evaluation", tmp_path / "evaluation.json", "--output", tmp_path / "report.html")
    assert "got another one" in line and not (tmp_path / "report.html").exists()


def test_mistakes_in_evaluate_and_report_are_refused(folder, tmp_path):
    assert "evaluate: queries must be a codes folder" in refuse("evaluate", folder / "index", folder / "images")
    report = ("report", "--index", folder / "index", "--output", tmp_path / "report.html", "--results")
    assert "report: results must be a file written by 'hashengine search'" in refuse(*report, tmp_path / "none.json")
    assert "report: results must be a file" in refuse(*report, folder / "evaluation.json")
    assert "ends in .html" in refuse(
        "report", "--index", folder / "index", "--results", folder / "results.json", "--output", tmp_path / "report"
    )


def test_python_m_hashengine_runs_the_command_line(folder):
    result = subprocess.run(
        [sys.executable, "-m", "hashengine", "search", "nowhere", "x.png"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(
        "error: search: query must be an image, a folder of images or a codes folder"
    )
    assert "Traceback" not in result.stderr


def run(*arguments):
    """Run a command in a new process, which must succeed; returns what it writes to stdout."""
    command = [sys.executable, "-m", "hashengine", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_a_dash_as_output_is_stdout(folder, tmp_path):
    image = folder / "images" / "query" / "bars" / "0.png"
    for query in (image, folder / "query"):
        assert json.loads(run("search", folder / "index", query, "-k", 2, "--output", "-"))["k"] == 2
    assert json.loads(run("evaluate", folder / "index", folder / "query", "--output", "-"))["queries"] == 6
    assert not (ROOT / "-").exists()


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("encode images/query --model model", "encode: output must be a folder, got '-', which stands for stdout"),
        ("index query", "index: output must be a folder, got '-', which stands for stdout"),
        ("index query --append", "index: output must be a folder, got '-', which stands for stdout"),
        ("train prepare images/query", "train prepare: output must be a folder, got '-'"),
        ("train prepare digits", "train prepare: output must be a folder, got '-'"),
        ("train fit --images images/query", "fit: output must be a folder, got '-'"),
        ("train sweep --images images/query", "train sweep: output must be a folder, got '-'"),
        ("demo", "demo: output must be a folder, got '-'"),
        ("train report model", "train report: output must be a name that ends in .md or .json, got '-'"),
        ("report --index index --results results.json", "report: output must be a name that ends in .html, got '-'"),
    ],
)
def test_a_dash_is_refused_where_the_output_is_no_single_file(folder, monkeypatch, command, complaint):
    monkeypatch.chdir(folder)
    assert refuse(*command.split(), "--output", "-").startswith(f"error: {complaint}")
    assert not Path("-").exists()


def test_files_that_are_no_images_are_counted_and_named_in_the_record(folder, tmp_path):
    images = make_images(tmp_path / "images", per_class=1)
    (images / "bars" / "0.png").rename(images / "bars" / "photo")
    for name in ("bars/notes.txt", "bars/photo.xmp", "Thumbs.db"):
        (images / name).write_bytes(b"no image")
    os.mkfifo(images / "dots" / "pipe.png")
    (images / "dots" / "IMG_1.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    result = succeed("encode", images, "--model", folder / "model", "--output", tmp_path / "codes")
    lines = result.stderr.splitlines()
    assert f"skipped: 3 files in {images} are no images" in lines
    assert f"skipped: {images / 'dots' / 'pipe.png'}: a named pipe" in lines
    assert any("IMG_1.heic: the file must be a readable image, got HEIC" in line for line in lines)
    assert "3 images, 2 skipped" in lines[-1]
    record = json.loads((tmp_path / "codes" / "encode.json").read_text())
    assert [Path(path).name for path in record["no_images"]] == ["Thumbs.db", "notes.txt", "photo.xmp"]
    assert [Path(error["path"]).name for error in record["errors"]] == ["pipe.png", "IMG_1.heic"]
    items = read_items(tmp_path / "codes" / "items.csv", "test", "items")
    assert [Path(item.path).name for item in items] == ["photo", "0.png", "0.png"]


def test_a_single_file_that_is_never_opened_is_refused(folder, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    complaint = "folder must be a folder of images, got .*pipe.png', which is a named pipe"
    result = invoke("search", folder / "index", tmp_path / "pipe.png")
    assert result.exit_code == 2 and re.search(complaint, result.stderr)


def test_a_warning_of_a_decoder_is_one_line_with_the_name_of_the_image(folder, tmp_path):
    images = make_images(tmp_path / "images", per_class=1)
    for name in ("bars", "dots"):
        Image.open(images / name / "0.png").save(images / name / "0.tiff", icc_profile=b"damaged")
    result = succeed("encode", images, "--model", folder / "model", "--output", tmp_path / "codes")
    lines = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    names = [images / name / "0.tiff" for name in ("bars", "dots")]
    expected = "the colour profile is ignored: cannot open profile from string"
    assert sorted(lines) == [f"warning: {name}: {expected}" for name in names]


@pytest.mark.parametrize("command", ["index {database} -o {output}", "encode {images} --model {model} -o {output}"])
@pytest.mark.parametrize("content", ['{"name": "my site"}', None])
def test_a_foreign_folder_or_file_is_never_replaced(folder, tmp_path, command, content):
    marker = "index.json" if command.startswith("index") else "encode.json"
    output = tmp_path / "output"
    if content is None:  # an earlier output with a file of the user
        shutil.copytree(folder / ("index" if command.startswith("index") else "database"), output)
    else:
        output.mkdir()
        (output / marker).write_text(content)
    (output / "thesis.txt").write_text("precious")
    paths = {name: folder / name for name in ("database", "images", "model")} | {"output": output}
    before = sorted(output.rglob("*"))
    assert "output must be a new folder or an earlier output" in refuse(
        *(word.format(**paths) for word in command.split())
    )
    assert sorted(output.rglob("*")) == before


def test_a_model_inside_the_index_that_is_built_again_is_not_lost(folder, tmp_path):
    succeed("index", folder / "database", "-o", tmp_path / "index")
    succeed("index", folder / "database", "-o", tmp_path / "index", "--model", tmp_path / "index" / "model")
    shutil.copytree(folder / "model", tmp_path / "index" / "model" / "extra")
    extra = tmp_path / "index" / "model" / "extra"
    line = refuse("index", folder / "database", "-o", tmp_path / "index", "--model", extra)
    assert "which also holds 'model/extra'" in line
    assert (tmp_path / "index" / "model" / "extra" / "config.json").is_file()


@pytest.mark.parametrize("content", ['{"precious": 1}', "[", '{"drawn": 1}'])
def test_the_figures_of_a_report_replace_no_foreign_file(folder, tmp_path, content):
    (tmp_path / "page.json").write_text(content)
    line = refuse(
        "report", "--index", folder / "index", "--results", folder / "results.json", "-o", tmp_path / "page.html"
    )
    assert "output must be a name without a foreign .json beside it" in line
    assert (tmp_path / "page.json").read_text() == content and not (tmp_path / "page.html").exists()


def test_a_report_may_be_written_again_but_not_through_a_link_to_its_own_figures(folder, tmp_path):
    arguments = ("report", "--index", folder / "index", "--results", folder / "results.json", "-o")
    for _ in range(2):
        succeed(*arguments, tmp_path / "page.html")
    (tmp_path / "other.html").symlink_to("page.json")
    (tmp_path / "other.json").symlink_to("page.json")
    assert "without a foreign .json beside it" in refuse(*arguments, tmp_path / "other.html")


def test_a_pipe_in_place_of_the_record_of_an_index_is_refused_by_report(folder, tmp_path):
    shutil.copytree(folder / "index", tmp_path / "index")
    (tmp_path / "index" / "index.json").unlink()
    os.mkfifo(tmp_path / "index" / "index.json")
    results = folder / "results.json"
    line = refuse("report", "--index", tmp_path / "index", "--results", results, "-o", tmp_path / "page.html")
    assert "index must be a folder written by 'hashengine index'" in line


def test_too_little_memory_is_one_line_with_status_1(folder, tmp_path, monkeypatch):
    def allocate(*_, **__):
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr("hashengine.evaluation.encode_folder", allocate, raising=False)
    result = invoke("encode", folder / "images", "--model", folder / "model", "--output", tmp_path / "codes")
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "path",
    ["images/query", "query", "query/codes.npy", "query/items.csv", "query/encode.json", "index", "index/index.json"]
    + ["index/codes", "model", "model/config.json", "model/model.safetensors"],
)
def test_what_cannot_be_read_is_named_in_one_line(folder, tmp_path, path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / path).chmod(0)
    if path.startswith(("images", "model")):
        command = ("encode", copy / "images" / "query", "--model", copy / "model", "--output", tmp_path / "codes")
    else:
        command = ("search", copy / "index", copy / "query", "--output", tmp_path / "results.json")

    def run() -> None:
        error = refuse(*command)
        assert f"must be one that can be read, got '{copy / path}" in error
        assert error.endswith("', which cannot be read (Permission denied)\n")

    as_user(run)


def test_a_name_that_is_too_long_or_a_folder_in_place_of_a_file_is_a_mistake(folder, tmp_path):
    too_long = tmp_path / ("a" * 300)
    error = refuse("index", folder / "query", "--output", too_long)
    assert error.endswith(f"got {str(too_long)!r}, which cannot be used (File name too long)\n")
    shutil.copytree(folder / "query", tmp_path / "codes")
    (tmp_path / "codes" / "items.csv").unlink()
    (tmp_path / "codes" / "items.csv").mkdir()
    error = refuse("index", tmp_path / "codes", "--output", tmp_path / "index")
    assert error.endswith(f"got {str(tmp_path / 'codes' / 'items.csv')!r}, which cannot be used (Is a directory)\n")
