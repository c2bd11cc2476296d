"""A sweep trains one run per combination of options, continues after an interruption, and writes a table."""

import json
import os
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from hashengine.errors import InputError
from hashengine.models import HashNet
from hashengine.training import FitConfig, Run, SweepConfig, fit, report, sweep
from hashengine.training import sweeps as sweeps_module
from hashengine.training.loop import train
from hashengine.training.runs import table
from tests.helpers.tiny_images import make_images


@pytest.fixture
def data(tmp_path) -> Path:
    make_images(tmp_path / "database", per_class=6)
    make_images(tmp_path / "query", per_class=2, seed=1)
    return tmp_path


def config(data: Path, **options) -> SweepConfig:
    shared = {"images": data / "database", "epochs": 1, "batch_size": 8, "widths": [8], "device": "cpu"}
    grid = {"bits": [8, 16], "seed": [0, 1]}
    return SweepConfig(**{"output": data / "runs", "queries": data / "query", "grid": grid} | shared | options)


def fit_into(output: Path, data: Path, **options) -> Run:
    """A run that no sweep made."""
    shared = {"images": data / "database", "epochs": 1, "batch_size": 8, "widths": (8,), "device": "cpu"}
    return fit(FitConfig(output=output, **shared, **options))


def folders(data: Path) -> list[str]:
    return sorted(path.name for path in (data / "runs").iterdir() if path.is_dir())


def test_each_combination_is_a_run_with_its_evaluation(data):
    results = sweep(config(data))
    assert folders(data) == [f"bits={bits},seed={seed}" for bits in (16, 8) for seed in (0, 1)]
    for name in folders(data):
        run = Run.load(data / "runs" / name)
        assert f"bits={run.options['bits']},seed={run.options['seed']}" == name
        assert run.model().config.bits == run.options["bits"]
        evaluation = json.loads((run.folder / "evaluation.json").read_text())
        assert (evaluation["queries"], evaluation["database"]) == (6, 18)
        assert 0 < run.figures()["mAP"] <= 1
    assert [(group.options, group.seeds) for group in results.groups] == [({"bits": 8}, [0, 1]), ({"bits": 16}, [0, 1])]
    assert (data / "runs" / "table.md").read_text() == results.to_markdown()
    assert json.loads((data / "runs" / "table.json").read_text()) == json.loads(results.to_json())
    assert sorted(map(str, report([data / "runs"]).groups)) == sorted(map(str, results.groups))


def test_an_interrupted_sweep_continues_and_keeps_complete_runs(data, monkeypatch):
    fit, trained = sweeps_module.fit, []

    def interrupted(options):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(options.output.name)
        return fit(options)

    monkeypatch.setattr(sweeps_module, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(config(data))
    assert len(folders(data)) == 3
    before = {name: (data / "runs" / name / "training.json").stat().st_mtime_ns for name in folders(data)}
    monkeypatch.setattr(sweeps_module, "fit", lambda options: trained.append(options.output.name) or fit(options))
    results = sweep(config(data))
    assert len(trained) == 4 and len(results.groups) == 2
    assert {name: (data / "runs" / name / "training.json").stat().st_mtime_ns for name in before} == before


def test_a_folder_with_a_run_of_other_options_is_refused(data):
    sweep(config(data, grid={"seed": [0]}))
    with pytest.raises(InputError, match="^train sweep: the run in .*seed=0.* got one with other epochs; remove it"):
        sweep(config(data, grid={"seed": [0]}, epochs=2))


@pytest.mark.parametrize("name", ["table.md", "table.json", "seed=1/config.json"])
@pytest.mark.parametrize("content", ["mine", '"my groups"', '{"groups": []}'])
def test_foreign_files_are_found_before_the_first_run_starts(data, name, content):
    foreign = data / "runs" / name
    foreign.parent.mkdir(parents=True)
    foreign.write_text(content)
    with pytest.raises(InputError, match="^train sweep: output must be a folder without foreign files"):
        sweep(config(data, grid={"seed": [0, 1]}))
    assert [path for path in (data / "runs").rglob("*") if path.is_file()] == [foreign]


@pytest.mark.parametrize("option", [{"queries": "nothere"}, {"grid": {"images": ["database", "nothere"]}}])
def test_a_missing_folder_is_found_before_the_first_run_starts(data, monkeypatch, option):
    monkeypatch.chdir(data)
    with pytest.raises(InputError, match="^train sweep: folder must be a folder of images, got 'nothere'"):
        sweep(config(data, **option))
    assert not (data / "runs").exists()


def test_a_mistake_in_any_run_is_found_before_the_first_run_starts(data):
    with pytest.raises(InputError, match="^fit: alpha must be"):
        sweep(config(data, grid={"alpha": [0.1, -1]}))
    with pytest.raises(InputError, match="^train sweep: bits must be a multiple of 8"):
        sweep(config(data, grid={"bits": [8, 12]}))
    assert not (data / "runs").exists()


def test_runs_that_would_share_a_folder_are_refused(data):
    same = {"images": [str(data / "a" / "b"), str(data / "a-b")]}
    with pytest.raises(InputError, match="^train sweep: grid must be values that give each run a folder of its own"):
        sweep(config(data, grid=same))
    with pytest.raises(InputError, match="got 'seed=1' twice$"):
        sweep(config(data, grid={"seed": [1, 1]}))
    assert not (data / "runs").exists()


def test_complete_runs_are_evaluated_again_with_other_queries(data):
    make_images(data / "other", per_class=3, seed=2)
    shared = {"grid": {"seed": [0]}}
    for name, count in [("query", 6), ("other", 9)]:
        sweep(config(data, queries=data / name, **shared))
        evaluation = data / "runs" / "seed=0" / "evaluation.json"
        assert json.loads(evaluation.read_text())["queries"] == count
    written = evaluation.stat().st_mtime_ns
    sweep(config(data, queries=data / "other", **shared))
    assert evaluation.stat().st_mtime_ns == written


@pytest.mark.parametrize("side", ["query", "database"])
def test_an_added_image_is_noticed(data, side):
    shared = {"grid": {"seed": [0]}}
    sweep(config(data, **shared))
    evaluation = data / "runs" / "seed=0" / "evaluation.json"
    before = json.loads(evaluation.read_text())
    image = next((data / side).rglob("*.png"))
    shutil.copyfile(image, image.with_name("added.png"))
    if side == "query":
        sweep(config(data, **shared))
        assert json.loads(evaluation.read_text())["queries"] == before["queries"] + 1
    else:
        with pytest.raises(InputError, match="^train sweep: the images must be those of the run in .*; remove the run"):
            sweep(config(data, **shared))
        assert json.loads(evaluation.read_text()) == before


def test_a_figure_of_an_earlier_network_is_not_shown(data):
    sweep(config(data, grid={"seed": [0]}))
    run, evaluation = data / "runs" / "seed=0", data / "runs" / "seed=0" / "evaluation.json"
    old = evaluation.read_bytes()
    fit_into(run, data, bits=16)
    assert not evaluation.exists()
    evaluation.write_bytes(old)
    with pytest.raises(InputError, match="evaluation.json: the file must be the evaluation of the network beside"):
        report([run])
    (run / "training.json").unlink()  # as after an interruption
    sweep(config(data, grid={"seed": [0]}, bits=24))
    assert evaluation.read_bytes() != old


def test_a_run_that_is_given_twice_counts_once(data):
    sweep(config(data, grid={"seed": [0]}))
    run = data / "runs" / "seed=0"
    [group] = report([run, run, data / "runs", data / "runs" / ".." / "runs"]).groups
    assert group.seeds == [0] and set(group.deviation.values()) == {None}


def test_a_finished_sweep_needs_no_images(data):
    first = sweep(config(data))
    for name in ("query", "database"):
        shutil.rmtree(data / name)
    assert sweep(config(data)) == first


def test_methods_can_be_compared(data):
    results = sweep(config(data, grid={"method": ["greedy_hash", "itq"]}, bits=8))
    header, rows = results.cells()
    assert "method" in header
    assert [row[header.index("method")] for row in rows] == ["greedy_hash", "itq"]
    assert "mAP" in header


def hand_made(folder: Path, seed: int, bits: int, accuracy: float) -> Run:
    options = {"images": "i", "output": str(folder), "device": "cpu", "seed": seed, "bits": bits, "widths": [8, 16]}
    return Run(folder, {"options": options, "epochs": [{"epoch": 1, "accuracy": accuracy}], "seconds": 100 * accuracy})


def test_the_table_has_mean_and_deviation_over_the_seeds(tmp_path):
    runs = [
        hand_made(tmp_path / str(i), seed, bits, accuracy)
        for i, (seed, bits, accuracy) in enumerate([(1, 8, 0.5), (0, 8, 0.7), (0, 16, 2.0)])
    ]
    results = table(runs)
    assert results.common == {"widths": [8, 16]}
    first, second = results.groups
    assert (first.options, first.seeds) == ({"bits": 8}, [0, 1])
    assert first.mean["accuracy"] == pytest.approx(0.6) and first.deviation["accuracy"] == pytest.approx(0.02**0.5)
    assert second.deviation == {"accuracy": None, "seconds": None}
    assert results.to_markdown().splitlines() == [
        "| bits | seeds | accuracy | seconds |",
        "| --- | --- | --- | --- |",
        "| 8 | 0, 1 | 0.6000 ± 0.1414 | 60.0000 ± 14.1421 |",
        "| 16 | 0 | 2.0000 | 200.0 |",
    ]


def test_a_damaged_or_missing_run_is_refused(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(
            InputError, match="^train report: run must be a model folder with training.json, or a folder"
        ):
            report([folder])
    with pytest.raises(InputError, match="^train report: folders must be at least one folder, got none"):
        report([])
    (tmp_path / "training.json").write_text('{"options": {}, "epochs": []}')
    with pytest.raises(InputError, match="training.json: the file must be the record of a training run"):
        report([tmp_path])


DAMAGED = [b"{", b"\xff" * 100_000, b'{"epochs": []}', b"[1]", b"[" * 100_000]
OTHER_FILES = [b'{"epochs": []}', b"[1]"]
DAMAGED_RUNS = [
    b'{"options": {}, "epochs": [1], "seconds": 1}',
    b'{"options": [], "epochs": [{"loss": "a"}], "seconds": 1}',
    b'{"options": "a", "epochs": [{"loss": 1}], "seconds": 1}',
    b'{"options": {"seed": "a"}, "epochs": [{"loss": 1}], "seconds": 1}',
    b'{"options": {}, "epochs": [{"loss": 1}], "seconds": null}',
    b'{"options": {}, "epochs": [{"loss": Infinity}], "seconds": 1}',
    b'{"options": {"images": "a\\u0000b"}, "epochs": [{"loss": 1}], "seconds": 1}',
    b'{"options": {"images": "\\ud800"}, "epochs": [{"loss": 1}], "seconds": 1}',
    b'{"options": {"images": 5}, "epochs": [{"loss": 1}], "seconds": 1}',
    b'{"options": {}, "epochs": [{"loss": 1}], "seconds": 1' + 400 * b"0" + b"}",
]


_EVALUATED = b'{"version": 1, "mean_average_precision": {"expected": 0.5}, "source": '
DAMAGED_EVALUATIONS = [_EVALUATED + source + b"}" for source in (b'"a\\u0000b"', b'"\\ud800"', b"5")]


@pytest.mark.parametrize(
    ("name", "content"),
    [("training.json", content) for content in DAMAGED]
    + [("evaluation.json", content) for content in DAMAGED if content not in OTHER_FILES]
    + [("training.json", content) for content in DAMAGED_RUNS]
    + [("evaluation.json", content) for content in DAMAGED_EVALUATIONS],
)
def test_a_damaged_record_of_a_run_gives_one_short_line(tmp_path, name, content):
    run = hand_made(tmp_path, 0, 8, 0.5)
    (tmp_path / "training.json").write_text(json.dumps(run.record))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: the file must be the .* got a damaged one: ") as caught:
        report([tmp_path])
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_a_record_of_a_run_without_a_field_says_which(tmp_path):
    run = hand_made(tmp_path, 0, 8, 0.5)
    (tmp_path / "training.json").write_text(json.dumps(run.record))
    (tmp_path / "evaluation.json").write_text('{"version": 1, "mean_average_precision": {}}')
    with pytest.raises(InputError, match="evaluation of a run, got a damaged one without the field 'expected'; remove"):
        report([tmp_path])
    (tmp_path / "training.json").write_text("{}")
    with pytest.raises(InputError, match="record of a training run, got a damaged one without the field 'epochs'$"):
        report([tmp_path])


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
@pytest.mark.parametrize(("name", "field"), [("training.json", "images"), ("evaluation.json", "source")])
def test_a_path_in_a_record_that_no_file_system_can_have_is_damage(data, text, name, field):
    sweep(config(data, grid={"seed": [0]}))
    file = data / "runs" / "seed=0" / name
    record = json.loads(file.read_text())
    (record["options"] if name == "training.json" else record)[field] = text
    file.write_text(json.dumps(record))
    for call in (lambda: report([data / "runs"]), lambda: sweep(config(data, grid={"seed": [0]}, queries=None))):
        with pytest.raises(InputError, match=rf"{name}: the file must be .*, got a damaged one: .*, which no file"):
            call()


def test_a_sweep_says_how_many_queries_have_no_relevant_image(data, monkeypatch):
    (data / "query" / "bars").rename(data / "query" / "bar")
    notes = []
    monkeypatch.setattr(sweeps_module._progress, "note", notes.append)
    sweep(config(data, grid={}))
    assert "2 of 6 queries have no relevant image and count as 0" in notes
    assert json.loads((data / "runs" / "run" / "evaluation.json").read_text())["without_relevant"] == 2


@pytest.mark.parametrize("content", [*OTHER_FILES, b"{", None], ids=["object", "list", "damaged", "folder"])
def test_a_foreign_evaluation_is_neither_replaced_nor_removed(data, content):
    run = data / "runs" / "seed=0"
    run.mkdir(parents=True)
    foreign = run / "evaluation.json"
    if content is None:
        foreign.mkdir()
    else:
        foreign.write_bytes(content)
    with pytest.raises(InputError, match="^fit: evaluation.json must be one that 'hashengine train sweep' wrote"):
        fit_into(run, data)
    with pytest.raises(InputError, match="^train sweep: evaluation.json must be one that"):
        sweep(config(data, grid={"seed": [0]}))
    assert list(run.iterdir()) == [foreign] and (content is None or foreign.read_bytes() == content)


def test_a_foreign_evaluation_in_a_finished_run_is_kept_and_named(data):
    sweep(config(data, grid={"seed": [0]}))
    run = data / "runs" / "seed=0"
    (run / "evaluation.json").write_text((run / "evaluation.json").read_text()[:50])
    with pytest.raises(
        InputError, match=r"got '.*seed=0/evaluation.json', which is not JSON \(.*\); move it to another"
    ):
        sweep(config(data, grid={"seed": [0]}))
    (run / "evaluation.json").write_text('{"index": "elsewhere", "mean_average_precision": {"expected": 0.5}}')
    with pytest.raises(InputError, match="^train sweep: evaluation.json must be one that"):
        sweep(config(data, grid={"seed": [0]}))
    with pytest.raises(InputError, match="^train report: evaluation.json must be one that .*; move it to another"):
        report([run])
    assert "elsewhere" in (run / "evaluation.json").read_text()


def test_the_record_of_another_network_is_refused(data):
    sweep(config(data, grid={"seed": [0, 1]}))
    first, second = data / "runs" / "seed=0", data / "runs" / "seed=1"
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(second / name, first / name)
    expected = "training.json: the file must be the record of the network in .*, got that of another network"
    with pytest.raises(InputError, match=expected):
        report([first])
    (first / "evaluation.json").unlink()
    with pytest.raises(InputError, match=expected):
        sweep(config(data, grid={"seed": [0, 1]}))
    assert not (first / "evaluation.json").exists()
    (first / "model.safetensors").unlink()  # the record alone can be reported
    assert report([first]).groups[0].seeds == [0]


def test_a_kill_between_the_network_and_its_record_is_noticed(data, monkeypatch):
    sweep(config(data, grid={"seed": [0]}))
    run = data / "runs" / "seed=0"
    monkeypatch.setattr("hashengine.training.loop.write_file", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit_into(run, data, bits=16, seed=9)
    with pytest.raises(InputError, match="training.json: the file must be the record of the network"):
        report([run])


def test_two_sweeps_into_one_folder_take_turns(data):
    """The second one finds the runs of the first, and trains nothing."""
    trained, tables = [], []

    def start():
        tables.append(sweep(config(data, grid={"seed": [0, 1]})).to_json())

    def counting(options):
        trained.append(options.seed)
        return fit(options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hashengine.training.sweeps.fit", counting)
        threads = [threading.Thread(target=start) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(trained) == [0, 1] and tables[0] == tables[1]


def test_runs_with_other_images_are_other_groups(data):
    shutil.copytree(data / "database", data / "moved")  # the same images in another folder
    shutil.copytree(data / "database", data / "other")
    image = next((data / "other").rglob("*.png"))
    shutil.copyfile(image, image.with_name("added.png"))
    images = [str(data / name) for name in ("database", "moved", "other")]
    header, rows = sweep(config(data, images=None, grid={"images": images})).cells()
    assert header[:2] == ["images", "seeds"] and [row[:2] for row in rows] == [[images[0], "0, 0"], [images[2], "0"]]


def test_evaluations_of_other_queries_are_not_averaged(data):
    sweep(config(data, grid={"seed": [0, 1]}))
    make_images(data / "others", per_class=3, seed=5)
    shutil.copytree(data / "query", data / "moved")
    sweep(config(data, grid={"seed": [1]}, queries=data / "moved"))  # the same queries in another folder
    assert [group.seeds for group in report([data / "runs"]).groups] == [[0, 1]]
    sweep(config(data, grid={"seed": [1]}, queries=data / "others"))
    header, rows = report([data / "runs"]).cells()
    assert header[:3] == ["queries", "seeds", "mAP"]
    assert [row[:2] for row in rows] == [[str(data / "query"), "0"], [str(data / "others"), "1"]]
    sweep(config(data, grid={"seed": [0, 1, 2]}, queries=None))  # trains the third
    assert report([data / "runs" / "seed=1", data / "runs" / "seed=2"]).groups[0].seeds == [1, 2]


def test_records_of_older_versions_are_grouped_by_folder(data):
    sweep(config(data, grid={"seed": [0, 1]}))
    for name in ("training.json", "evaluation.json"):
        path = data / "runs" / "seed=1" / name
        record = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in record.items() if key != "files_sha256"}))
    assert [group.seeds for group in report([data / "runs"]).groups] == [[0, 1]]


def test_a_folder_whose_images_changed_has_two_names(data):
    for number, name in enumerate(("first", "second")):
        fit_into(data / "runs" / name, data, seed=number)
        image = next((data / "database").rglob("*.png"))
        shutil.copyfile(image, image.with_name(f"added{number}.png"))
    header, rows = report([data / "runs"]).cells()
    assert header[0] == "images" and len({row[0] for row in rows}) == 2
    assert all(re.fullmatch(f"{data / 'database'} \\([0-9a-f]{{8}}\\)", row[0]) for row in rows)


def test_an_evaluation_of_an_older_version_is_accepted(data):
    sweep(config(data, grid={"seed": [0]}))
    evaluation = data / "runs" / "seed=0" / "evaluation.json"
    record = json.loads(evaluation.read_text())
    evaluation.write_text(json.dumps({name: value for name, value in record.items() if name != "fingerprint"}))
    assert report([data / "runs"]).groups[0].mean["mAP"] == record["mean_average_precision"]["expected"]
    evaluation.write_text(json.dumps(record | {"mean_average_precision": {"expected": 7}}))
    with pytest.raises(InputError, match="got a damaged one: ValueError: an mAP that is not from 0 to 1"):
        report([data / "runs"])


def test_a_run_without_its_network_is_trained_again(data):
    sweep(config(data, grid={"seed": [0]}))
    weights = data / "runs" / "seed=0" / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    sweep(config(data, grid={"seed": [0]}))
    assert weights.read_bytes() == content


@pytest.mark.parametrize("missing", [["config.json"], ["model.safetensors"], ["config.json", "model.safetensors"]])
def test_a_run_without_parts_of_its_network_is_trained_again(data, missing):
    sweep(config(data, grid={"seed": [0]}))
    run = data / "runs" / "seed=0"
    before = {name: (run / name).read_bytes() for name in ("config.json", "model.safetensors")}
    for name in missing:
        (run / name).unlink()
    sweep(config(data, grid={"seed": [0]}))
    assert {name: (run / name).read_bytes() for name in before} == before


def test_a_save_that_was_killed_between_its_files_can_be_repeated(data):
    fit_into(data / "model", data)
    for name in ("config.json", "training.json"):
        (data / "model" / name).unlink()
    fit_into(data / "model", data)
    assert {path.name for path in (data / "model").iterdir()} == {"config.json", "model.safetensors", "training.json"}


def test_a_damaged_digest_of_files_gives_a_table(data):
    fit_into(data / "model", data)
    record = json.loads((data / "model" / "training.json").read_text())
    (data / "model" / "training.json").write_text(json.dumps(record | {"files_sha256": ["a", 1]}))
    assert len(report([data / "model"]).groups) == 1


RECORDS = {
    "encode.json": '{"fingerprint": "", "source": ""}',
    "index.json": '{"fingerprint": "", "sources": []}',
    "split.json": '{"database": {}, "query": {}, "queries_identical_to_a_database_image": 0}',
}


def write_record(folder: Path, name: str) -> set[str]:
    """Make `folder` look like an output of another command, and return the names in it."""
    folder.mkdir()
    (folder / name).write_text(RECORDS[name])
    if name == "split.json":
        for side in ("database", "query"):
            (folder / side).mkdir()
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", RECORDS)
def test_a_sweep_writes_into_no_folder_of_another_command(data, name):
    write_record(data / "runs", name)
    with pytest.raises(InputError, match=f"^train sweep: output must be a new folder or .* holds {name}; choose"):
        sweep(config(data))
    write_record(data / "out", name)
    if name != "split.json":  # a model may be beside the sides of a split
        with pytest.raises(InputError, match=f"^fit: output must be .* in a folder that holds {name}; choose"):
            fit_into(data / "out" / "model", data)


@pytest.mark.parametrize("name", RECORDS)
def test_a_folder_of_another_command_does_not_become_a_model(data, name):
    names = write_record(data / "out", name)
    with pytest.raises(InputError, match=f"^fit: output must be a new folder or .* which holds {name}; choose another"):
        fit_into(data / "out", data)
    assert {path.name for path in (data / "out").iterdir()} == names


@pytest.mark.parametrize("name", RECORDS)
def test_a_foreign_file_of_such_a_name_does_not_matter(data, name):
    (data / "web").mkdir()
    (data / "web" / name).write_text('{"site": 1}')
    fit_into(data / "web" / "model", data)
    assert (data / "web" / name).read_text() == '{"site": 1}'


@pytest.mark.parametrize("name", ["training.json", "model.safetensors", "config.json"])
def test_every_file_that_is_replaced_must_be_that_of_a_model(data, name):
    fit_into(data / "model", data)
    (data / "model" / name).write_bytes(b"my notes" if name != "model.safetensors" else save({"mine": torch.zeros(3)}))
    before = (data / "model" / name).read_bytes()
    with pytest.raises(InputError, match=f"^fit: output must be a folder without foreign .* which has another {name}"):
        fit_into(data / "model", data)
    assert (data / "model" / name).read_bytes() == before


def test_a_pipe_in_place_of_the_weights_is_refused_and_not_opened(data):
    (data / "model").mkdir()
    os.mkfifo(data / "model" / "model.safetensors")
    with pytest.raises(InputError, match="which has another model.safetensors"):
        fit_into(data / "model", data)


def test_weights_in_a_folder_whose_name_is_no_utf8_are_recognised(data):
    folder = data / os.fsdecode(b"n\xff")
    fit_into(folder, data)
    (folder / "config.json").unlink()
    fit_into(folder, data)
    assert (folder / "config.json").is_file()


def test_an_evaluation_with_unknown_queries_is_not_averaged_with_others(data):
    sweep(config(data, grid={"seed": [0, 1]}))
    path = data / "runs" / "seed=0" / "evaluation.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in record.items() if k not in ("source", "files_sha256", "fingerprint")}))
    header, rows = report([data / "runs"]).cells()
    assert header[0] == "queries" and [row[0] for row in rows] == ["unknown", str(data / "query")]


@pytest.mark.parametrize("how", ["moved", "link", "device", "copied queries"])
def test_the_same_images_elsewhere_and_another_name_of_the_device_continue_a_sweep(data, monkeypatch, how):
    first = sweep(config(data, grid={"seed": [0]}))
    changed = {}
    if how == "moved":
        (data / "database").rename(data / "moved")
        changed = {"images": data / "moved"}
    elif how == "link":
        (data / "link").symlink_to(data / "database")
        changed = {"images": data / "link"}
    elif how == "device":
        changed = {"device": "auto"}
    else:
        shutil.copytree(data / "query", data / "copied")
        changed = {"queries": data / "copied"}
    for function in ("fit", "evaluate"):
        monkeypatch.setattr(sweeps_module, function, lambda *_: pytest.fail("done again"))
    assert sweep(config(data, grid={"seed": [0]}, **changed)).groups[0].mean == first.groups[0].mean


def test_a_sweep_evaluates_with_images_that_were_moved(data):
    sweep(config(data, grid={"seed": [0]}, queries=None))
    (data / "database").rename(data / "moved")
    [group] = sweep(config(data, grid={"seed": [0]}, images=data / "moved")).groups
    assert 0 < group.mean["mAP"] <= 1


def test_other_images_under_another_path_are_refused(data):
    sweep(config(data, grid={"seed": [0]}))
    make_images(data / "other", per_class=3, seed=2)
    with pytest.raises(InputError, match="got one with other images; remove it"):
        sweep(config(data, grid={"seed": [0]}, images=data / "other"))


def test_a_grid_with_two_names_of_one_value_is_refused(data):
    with pytest.raises(InputError, match="got 'lr=1e-3' and 'lr=0.001', which are equal"):
        sweep(config(data, grid={"lr": ["1e-3", 0.001]}))
    assert not (data / "runs").exists()


def test_a_copy_of_a_run_counts_once(data):
    run = fit_into(data / "runs" / "a", data)
    shutil.copytree(run.folder, data / "runs" / "b")
    [group] = report([data / "runs"]).groups
    assert group.seeds == [0]


def test_a_table_replaces_no_image(data):
    run = fit_into(data / "runs" / "a", data)
    photo = next((data / "query").rglob("*.png"))
    (data / "table.md").symlink_to(photo)
    before = photo.read_bytes()
    with pytest.raises(InputError, match="^train report: output must be a file that is no image"):
        report([run.folder], output=data / "table.md")
    assert photo.read_bytes() == before


def test_a_table_replaces_no_record_of_another_run(data):
    runs = [fit_into(data / "runs" / name, data) for name in "ab"]
    record = runs[1].folder / "training.json"
    before = record.read_bytes()
    with pytest.raises(
        InputError, match="^train report: output must be a file that is no part of codes, an index, a net"
    ):
        report([runs[0].folder], output=record)
    assert record.read_bytes() == before


def test_none_is_no_run():
    with pytest.raises(InputError, match="^Run.load: run must be a path"):
        Run.load(None)
    for folders, kind in ((None, "NoneType"), ("runs", "str"), (Path("runs"), "PosixPath"), (5, "int")):
        with pytest.raises(InputError, match=f"^train report: folders must be a list of folders, got {kind}$"):
            report(folders)
    with pytest.raises(InputError, match="^train report: run must be a path, got NoneType"):
        report([None])


@pytest.mark.parametrize("content", OTHER_FILES, ids=["object", "list"])
def test_a_foreign_evaluation_that_appears_during_the_training_is_kept(data, monkeypatch, content):
    foreign = data / "model" / "evaluation.json"
    monkeypatch.setattr("hashengine.training.loop.train", lambda *_: [foreign.write_bytes(content)] and [{"epoch": 1}])
    fit_into(data / "model", data)
    assert foreign.read_bytes() == content


def test_two_fits_into_one_folder_take_turns(data, monkeypatch):
    """The record that remains is that of the network beside it, and no lock remains."""
    running, most, notes = [0], [], []

    def counted(*arguments):
        running[0] += 1
        most.append(running[0])
        try:
            return train(*arguments)
        finally:
            running[0] -= 1

    monkeypatch.setattr("hashengine.training.loop.train", counted)
    monkeypatch.setattr("hashengine._progress.note", notes.append)
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda seed: fit_into(data / "model", data, seed=seed), range(3)))
    assert most == [1, 1, 1] and len({run.record["fingerprint"] for run in runs}) == 3
    assert Run.load(data / "model").record in [run.record for run in runs]
    assert {f"waiting for another training run in {data / 'model'}"} >= set(notes)
    names = sorted(path.name for path in (data / "model").iterdir())
    assert names == ["config.json", "model.safetensors", "training.json"]


def test_copies_with_other_evaluations_are_kept_and_those_without_one_are_not(data):
    make_images(data / "other", per_class=3, seed=2)
    sweep(config(data, grid={"seed": [0]}))
    shutil.copytree(data / "runs", data / "copies")
    (data / "copies" / "seed=0" / "evaluation.json").unlink()
    for folders_of_runs in (["runs", "copies"], ["copies", "runs"]):
        [group] = report([data / name for name in folders_of_runs]).groups
        assert "mAP" in group.mean and group.runs == [str(data / "runs" / "seed=0")]
    sweep(config(data, grid={"seed": [0]}, queries=data / "other", output=data / "copies"))
    groups = report([data / "runs", data / "copies"]).groups
    assert sorted(group.options["queries"] for group in groups) == sorted(
        str(data / name) for name in ("query", "other")
    )


def test_a_table_does_not_replace_the_record_of_a_copy(data):
    run = fit_into(data / "runs" / "a", data)
    shutil.copytree(run.folder, data / "runs" / "b")
    with pytest.raises(InputError, match="^train report: output must be a path that destroys no input"):
        report([run.folder, data / "runs" / "b"], output=data / "runs" / "b" / "training.json")


def test_a_sweep_evaluates_a_run_of_another_device_on_its_own(data):
    sweep(config(data, grid={"seed": [0]}, queries=None))
    record = data / "runs" / "seed=0" / "training.json"
    record.write_text(record.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    assert Run.load(record.parent).options["device"] == "cuda"
    [group] = sweep(config(data, grid={"seed": [0]})).groups
    assert "mAP" in group.mean


def test_a_foreign_evaluation_that_appears_before_the_evaluation_is_kept(data, monkeypatch):
    foreign = data / "runs" / "seed=0" / "evaluation.json"
    encode = HashNet.encode

    def create_first(self, *arguments, **options):
        foreign.write_bytes(OTHER_FILES[0])
        return encode(self, *arguments, **options)

    monkeypatch.setattr(HashNet, "encode", create_first)
    with pytest.raises(InputError, match="^train sweep: evaluation.json must be one that"):
        sweep(config(data, grid={"seed": [0]}))
    assert foreign.read_bytes() == OTHER_FILES[0]


@pytest.mark.parametrize("name", ["seed=0/evaluation.json", "table.json"])
def test_a_record_that_may_not_be_read_is_not_called_foreign(data, monkeypatch, name):
    sweep(config(data, grid={"seed": [0]}))
    forbidden, read = data / "runs" / name, Path.read_bytes

    def read_bytes(path):
        if path == forbidden:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(PermissionError):
        sweep(config(data, grid={"seed": [0]}))


def test_a_copy_that_was_evaluated_with_a_copy_of_the_queries_counts_once(data):
    sweep(config(data, grid={"seed": [0]}))
    shutil.copytree(data / "runs", data / "copies")
    shutil.copytree(data / "query", data / "q2")
    evaluation = data / "copies" / "seed=0" / "evaluation.json"
    evaluation.write_text(json.dumps(json.loads(evaluation.read_text()) | {"source": str(data / "q2")}))
    [group] = report([data / "runs", data / "copies"]).groups
    assert group.seeds == [0]


def test_two_names_of_one_device_are_no_grid(data):
    with pytest.raises(InputError, match="got 'device=cpu' and 'device=auto', which are equal"):
        sweep(config(data, grid={"device": ["cpu", "auto"]}))


def test_two_names_of_one_folder_are_no_grid(data, monkeypatch):
    monkeypatch.chdir(data)
    (data / "link").symlink_to("database")
    for other in ("./database", str(data / "database"), "link"):
        with pytest.raises(
            InputError, match="^train sweep: grid must be .*, got 'images=database' and '.*', which are"
        ):
            sweep(config(data, grid={"images": ["database", other]}))
    assert not (data / "runs").exists()
