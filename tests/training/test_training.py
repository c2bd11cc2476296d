import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from hashengine.errors import InputError
from hashengine.metrics import mean_average_precision
from hashengine.models import HashNet
from tests.helpers.paths import ROOT
from training.__main__ import app
from training.config import FitConfig
from training.data import Batches, LabelledImages, load
from training.loop import fit
from training.prepare import prepare


def write_folder(root: Path, counts: dict[str, int], size: int = 8, seed: int = 0) -> Path:
    """Random grey images; those of the first class are dark, so that there is something to learn."""
    random = np.random.default_rng(seed)
    for index, (label, count) in enumerate(counts.items()):
        (root / label).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 100 if index == 0 else 256, (size, size), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{number}.png")
    return root


def tiny(images: Path, output: Path, **options) -> FitConfig:
    return FitConfig(**dict(images=images, output=output, epochs=2, batch_size=8, widths=(8,), device="cpu") | options)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("data") / "digits"
    prepare("digits", folder)
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if path.is_file()}


def test_digits_are_split_into_300_stratified_queries_and_the_rest(digits):
    from sklearn.datasets import load_digits

    record = json.loads((digits / "split.json").read_text())
    database, query = names(digits / "database"), names(digits / "query")
    assert (len(database), len(query)) == (1497, 300) == (record["database"]["images"], record["query"]["images"])
    source = load_digits()
    assert database | query == {f"{label}/{i:05d}.png" for i, label in enumerate(source.target)}
    for label, total in enumerate(np.bincount(source.target)):
        assert abs(record["query"]["classes"][str(label)] - 300 * total / 1797) < 1
    path = sorted(query)[0]
    pixels = np.asarray(Image.open(digits / "query" / path))
    assert np.array_equal(np.rint(pixels / 255 * 16), source.images[int(Path(path).stem)])


def test_a_split_depends_on_its_seed_alone_and_is_kept_when_asked_for_again(digits, tmp_path):
    again, other = prepare("digits", tmp_path / "again"), prepare("digits", tmp_path / "other", seed=1)
    first = json.loads((digits / "split.json").read_text())
    assert again == first and other["query"]["sha256"] != first["query"]["sha256"]
    before = (tmp_path / "again" / "split.json").stat().st_mtime_ns
    assert prepare("digits", tmp_path / "again") == first
    assert (tmp_path / "again" / "split.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="output: .*remove it"):
        prepare("digits", tmp_path / "again", seed=1)


def test_a_folder_of_class_folders_keeps_names_and_holds_out_no_copies(tmp_path):
    source = write_folder(tmp_path / "photos", {"a": 30, "b": 20})
    for number in range(15):  # a copy of every second image of "a"
        (source / "a" / f"copy {number}.png").write_bytes((source / "a" / f"{2 * number}.png").read_bytes())
    record = prepare(str(source), tmp_path / "split")
    database, query = names(tmp_path / "split" / "database"), names(tmp_path / "split" / "query")
    assert database | query == names(source) and not database & query
    assert len(query) == round(0.1 * 65) and record["queries_identical_to_a_database_image"] == 0
    assert all(path.startswith("b/") or int(Path(path).stem) % 2 for path in query)


def test_a_failed_preparation_leaves_nothing_behind(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "photos", {"a": 9, "b": 9})

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full_disk)
    with pytest.raises(OSError, match="No space left"):
        prepare(str(source), tmp_path / "split")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_official_sets_come_from_torchvision_with_the_test_images_as_queries(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")

    class Stub:
        classes = ["T-shirt/top", "Bag"]

        def __init__(self, root, train, download):
            assert root == tmp_path / "root" and download
            self.targets = torch.arange(40 if train else 20) % 2
            self.data = torch.randint(0, 256, (len(self.targets), 28, 28), dtype=torch.uint8)

    monkeypatch.setattr(datasets, "FashionMNIST", Stub)
    record = prepare("fashion-mnist", tmp_path / "all", root=tmp_path / "root")
    assert record["database"]["classes"] == {"Bag": 20, "T-shirt-top": 20} and record["query"]["images"] == 20
    assert prepare("fashion-mnist", tmp_path / "some", queries=6, root=tmp_path / "root")["query"]["classes"] == {
        "Bag": 3,
        "T-shirt-top": 3,
    }


@pytest.mark.parametrize(("source", "extra"), [("digits", "sklearn"), ("cifar10", "torchvision")])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, source, extra):
    for module in [name for name in sys.modules if name.split(".")[0] == extra]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(InputError, match=r"needs .*pip install 'hashengine\[train\]'"):
        prepare(source, tmp_path / "out")


def test_images_are_loaded_in_order_with_their_statistics(tmp_path):
    data = load(write_folder(tmp_path, {"b": 3, "a": 5}, size=12))
    assert data.classes == ("a", "b") and data.labels.tolist() == [0] * 5 + [1] * 3
    assert data.images.shape == (8, 1, 12, 12)
    assert torch.equal(data.images[5, 0], torch.from_numpy(np.array(Image.open(tmp_path / "b" / "0.png"))))
    (mean,), (std,) = data.statistics()
    pixels = data.images.double() / 255
    assert mean == pytest.approx(pixels.mean().item()) and std == pytest.approx(pixels.std(correction=0).item())
    assert load(tmp_path, 10).images.shape == (8, 1, 10, 10)


def test_batches_visit_every_image_once_an_epoch_shifted_and_flipped():
    size = 6
    images = torch.arange(size * size, dtype=torch.uint8).reshape(1, 1, size, size).repeat(20, 1, 1, 1)
    images += 5 * torch.arange(20, dtype=torch.uint8)[:, None, None, None]
    data = LabelledImages(images, torch.arange(20), ("a", "b"))
    seen = []
    for batch, labels in Batches(data, 5, shift=1, flip=True, seed=0, device=torch.device("cpu")):
        for image, label in zip(batch[:, 0], labels.tolist(), strict=True):
            padded = torch.nn.functional.pad(images[label].float(), (1, 1, 1, 1), mode="replicate")[0].byte()
            windows = [padded[y : y + size, x : x + size] for y in range(3) for x in range(3)]
            assert any(torch.equal(image, w) or torch.equal(image, w.flip(1)) for w in windows)
            seen.append(label)
    assert sorted(seen) == list(range(20)) != seen
    plain = Batches(data, 32, shift=0, flip=False, seed=0, device=torch.device("cpu"))
    ((batch, labels),) = plain
    assert torch.equal(batch, images[labels])


def test_a_short_training_on_digits_makes_codes_that_separate_the_classes(digits, tmp_path):
    output = tmp_path / "model"
    record = fit(FitConfig(images=digits / "database", output=output, epochs=4, widths=(16, 32), device="cpu"))
    model = HashNet.from_pretrained(output)
    database, query = load(digits / "database"), load(digits / "query")
    found = mean_average_precision(
        model.encode(query.images), query.labels, model.encode(database.images), database.labels
    )
    assert found.expected > 0.7  # codes that tell nothing give about 0.1
    assert record == json.loads((output / "training.json").read_text())
    losses = [epoch["classification"] for epoch in record["epochs"]]
    assert len(losses) == 4 and losses[-1] < losses[0] / 2
    assert record["images"] == 1497 and record["network"]["classes"] == list("0123456789")


@pytest.mark.parametrize("attention", ["none", "simam", "triplet"])
def test_the_seed_decides_the_model_and_the_caller_keeps_the_random_state(tmp_path, attention):
    images = write_folder(tmp_path / "images", {"a": 12, "b": 12})
    state = torch.get_rng_state()
    weights = []
    for run, seed in enumerate((3, 3, 4)):
        fit(tiny(images, tmp_path / str(run), seed=seed, attention=attention, flip=True))
        weights.append((tmp_path / str(run) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_diverging_training_is_told_and_writes_no_model(tmp_path):
    images = write_folder(tmp_path / "images", {"a": 12, "b": 12})
    with pytest.raises(InputError, match="lr: expected a finite loss"):
        fit(tiny(images, tmp_path / "model", lr=1e30, epochs=5))
    assert not any((tmp_path / "model").iterdir())


def invoke(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_the_command_line_goes_before_the_file_of_options(tmp_path):
    images = write_folder(tmp_path / "images", {"a": 12, "b": 12})
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump({"images": str(images), "bits": 24, "epochs": 1, "widths": [8]}))
    code, output = invoke("fit", "--config", tmp_path / "fit.yaml", "--output", tmp_path / "model", "--bits", 16)
    assert code == 0 and "16 bits" in output
    model = HashNet.from_pretrained(tmp_path / "model")
    assert model.config.bits == 16 and model.config.widths == (8,) and model.config.classes == ("a", "b")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["fit", "--images", "missing"], "folder: expected a folder of images, got '.*missing', which is missing"),
        (["fit", "--images", "empty"], "folder: expected images under"),
        (["fit", "--images", "one"], "images: expected at least two class folders in .*got only 'a'"),
        (["fit", "--images", "hollow"], "images: expected an image in every class folder, got none in .*c'"),
        (["fit", "--images", "loose"], "images: expected every image in a class folder, got .*x.png"),
        (["fit", "--images", "damaged"], "cannot read image .*damaged/b/1.png"),
        (["fit", "--images", "good", "--bits", "12"], "bits: expected a multiple of 8.*got 12"),
        (["fit", "--images", "good", "--epochs", "0"], "epochs: .*greater than 0, got 0"),
        (["fit", "--images", "good", "--attention", "big"], "attention: .*got 'big'"),
        (["fit", "--images", "good", "--config", "absent.yaml"], "config: cannot read .*absent.yaml"),
        (["fit", "--images", "good", "--config", "list.yaml"], "config: expected 'option: value' lines.*got list"),
        (["fit", "--images", "good", "--config", "unknown.yaml"], "bitz: "),
        (["fit"], "images: Field required"),
        (["prepare", "nothing"], "source: expected digits, fashion-mnist, cifar10 or a folder.*got 'nothing'"),
        (["prepare", "good", "--queries", "17"], "queries: expected at most 16 of these 18 images.*got 17"),
        (["prepare", "good", "--queries", "0"], "queries: expected at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "good", {"a": 9, "b": 9})
    write_folder(tmp_path / "one", {"a": 3})
    write_folder(tmp_path / "hollow", {"a": 3, "b": 3, "c": 0})
    write_folder(tmp_path / "loose", {"a": 3, "b": 3})
    (tmp_path / "loose" / "x.png").write_bytes((tmp_path / "good" / "a" / "0.png").read_bytes())
    write_folder(tmp_path / "damaged", {"a": 3, "b": 3})
    (tmp_path / "damaged" / "b" / "1.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "unknown.yaml").write_text("bitz: 16\n")
    code, output = invoke(*arguments, "--output", "out")
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 2 and "Traceback" not in output and not (tmp_path / "out").exists()
    assert re.match(f"error: {complaint}", line)


def test_the_module_runs_as_a_program_without_a_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "training", "fit", "--images", str(tmp_path), "--output", str(tmp_path / "model")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: folder: expected images under")
    assert "Traceback" not in done.stderr
