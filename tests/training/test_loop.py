"""Training: from a folder of class folders to a model folder and its record."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hashengine import metrics
from hashengine.errors import InputError
from hashengine.methods import Config
from hashengine.methods.base import Batch, HashingMethod
from hashengine.models import HashNet, checkpoint
from hashengine.training import FitConfig, Run, fit
from hashengine.training.data import load
from hashengine.training.loop import build
from tests.helpers.tiny_images import write_noise


def tiny(images: Path, output: Path, **options) -> FitConfig:
    return FitConfig(**dict(images=images, output=output, epochs=2, batch_size=8, widths=(8,), device="cpu") | options)


@pytest.fixture
def images(tmp_path) -> Path:
    return write_noise(tmp_path / "images", {"a": 12, "b": 12})


def mean_average_precision(model: HashNet, digits: Path) -> float:
    query, database = load(digits / "query"), load(digits / "database")
    codes = [model.encode(side.images) for side in (query, database)]
    counts = metrics.distance_counts(*codes, labels=(query.labels, database.labels))
    return counts.mean_average_precision().expected


def test_a_short_training_on_digits_makes_codes_that_separate_the_classes(digits, tmp_path):
    output = tmp_path / "model"
    run = fit(FitConfig(images=digits / "database", output=output, epochs=4, widths=(16, 32), device="cpu"))
    record = run.record
    assert mean_average_precision(run.model(), digits) > 0.7  # uninformative codes give about 0.1
    assert record == json.loads((output / "training.json").read_text()) == Run.load(output).record
    losses = [epoch["classification"] for epoch in record["epochs"]]
    assert len(losses) == 4 and losses[-1] < losses[0] / 2
    assert record["images"] == 1497 and record["network"]["classes"] == list("0123456789")


def test_itq_and_cibhash_make_codes_that_beat_chance_on_digits(digits, tmp_path):
    for method, options in (("itq", {}), ("cibhash", {"epochs": 2, "hidden": 64, "lr": 1e-3})):
        config = FitConfig(
            images=digits / "database",
            output=tmp_path / method,
            method=method,
            widths=(16, 32),
            device="cpu",
            **options,
        )
        assert mean_average_precision(fit(config).model(), digits) > 0.2


@pytest.mark.parametrize("attention", ["none", "simam", "triplet"])
def test_the_seed_decides_the_model_and_the_random_state_is_unchanged(images, tmp_path, attention):
    state = torch.get_rng_state()
    weights = []
    for run, seed in enumerate((3, 3, 4)):
        fit(tiny(images, tmp_path / str(run), seed=seed, attention=attention, flip=True))
        weights.append((tmp_path / str(run) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_diverging_training_is_reported_and_writes_no_model(images, tmp_path):
    with pytest.raises(InputError, match="^fit: the loss must be finite, got .* lower the learning rate"):
        fit(tiny(images, tmp_path / "model", lr=1e30, epochs=5))
    assert not any((tmp_path / "model").iterdir())


@pytest.mark.parametrize("options", [{"lr": 1e30}, {"weight_decay": 1e30, "lr": 1e10}])
def test_a_last_step_that_diverges_writes_no_model(images, tmp_path, options):
    with pytest.raises(InputError, match="^fit: the loss must be finite, got infinity or NaN in epoch 1; lower"):
        fit(tiny(images, tmp_path / "model", epochs=1, **options))
    assert not any((tmp_path / "model").iterdir())


@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_rates_that_no_step_can_compute_are_refused(images, tmp_path, option):
    with pytest.raises(InputError, match=f"^fit: {option} must be less than or equal to 10*, got 1e"):
        fit(tiny(images, tmp_path / "model", **{option: 1e38}))


def test_greedy_hash_is_saved_with_alpha_as_a_field_of_the_config(images, tmp_path):
    run = fit(tiny(images, tmp_path / "model", alpha=0.25))
    config = json.loads((run.folder / "config.json").read_text())
    assert list(config) == [
        "format", "version", "bits", "classes", "channels", "image_size", "attention", "widths", "stem_stride", "alpha",
        "mean", "std",
    ]  # fmt: skip
    assert config["alpha"] == 0.25 and config == run.record["network"]
    loaded = checkpoint.load(run.folder)
    assert loaded.method.name == "greedy_hash" and loaded.method.options == {"alpha": 0.25}
    assert list(loaded.method.weights) == ["classifier.weight"]
    assert run.record["options"] == {**run.record["options"], "method": "greedy_hash", "alpha": 0.25, "epochs": 2}
    assert list(run.record["epochs"][0]) == ["epoch", "classification", "penalty", "accuracy"]


class Simple(HashingMethod):
    """A method that can be wrong in one place. Only this file uses it."""

    name = "simple"

    class Options(Config):
        wrong: str = ""

    def head(self, features: int, bits: int) -> torch.nn.Module:
        """A linear layer, which the method keeps."""
        self.kept = torch.nn.Linear(features, bits + 8 * (self.options.wrong == "head"))
        return self.kept

    def loss(self, batch: Batch, step: int, epoch: int) -> dict[str, torch.Tensor]:
        """The distance of the activations from 1 or -1."""
        distances = (1 - batch.activations.abs()).abs()
        returned = {"loss": distances.mean(), "terms": {}, "names": {"mean": distances.mean()}}
        return returned.get(self.options.wrong, {"distance": distances.mean()})

    def measures(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The mean activation."""
        return {"mean": batch.activations.mean() / (self.options.wrong != "measure")}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("head", r"the activations of the hash layer must be \[8, 8\], got \[8, 16\]; change the head of the method"),
        ("measure", "the measure 'mean' must be finite, got .* in epoch 1"),
        (
            "loss",
            "the result of the method's loss must be a dict of names and floating-point tensors without dim.*, got",
        ),
        ("terms", "the result of the method's loss must be at least one term, got none"),
        ("names", "the names of the method's terms and measures must be unique, and not 'epoch', got 'mean'"),
    ],
)
def test_a_wrong_method_is_noticed_in_the_first_epoch(images, tmp_path, wrong, message):
    with pytest.raises(InputError, match=f"^fit: {message}"):
        fit(tiny(images, tmp_path / "model", method="simple", bits=8, wrong=wrong))
    assert not (tmp_path / "model" / "training.json").exists()


def test_a_head_that_the_method_keeps_is_trained_once(images, tmp_path, recwarn):
    run = fit(tiny(images, tmp_path / "model", method="simple", bits=8))
    assert run.record["parameters"] == sum(parameter.numel() for parameter in run.model().parameters())
    assert not [warning for warning in recwarn if "duplicate" in str(warning.message)]


def test_a_method_with_an_option_of_training_is_refused(images, tmp_path):
    class Clashing(Simple):
        name = "clashing"

        class Options(Config):
            lr: float = 7.0

    with pytest.raises(
        InputError, match="fit: method must be one whose options have other names .* got 'clashing' with"
    ):
        tiny(images, tmp_path / "model", method="clashing")
    HashingMethod.registry.pop("clashing")


class Proxies(HashingMethod):
    """A method whose loss has a parameter. Only this file uses it."""

    from hashengine.methods.itq import ItqOptions as Options

    name = "proxies"

    def add_parameters(self, bits: int, classes: int) -> None:
        """Register one proxy per class."""
        self.proxies = torch.nn.Parameter(torch.randn(classes, bits))
        initial_proxies.append(self.proxies.detach().clone())

    def loss(self, batch: Batch, step: int, epoch: int) -> dict[str, torch.Tensor]:
        """The squared distance to the proxy."""
        steps.append((step, epoch))
        return {"distance": (batch.activations - self.proxies[batch.targets]).square().mean()}


steps: list[tuple[int, int]] = []  # the step and the epoch of each call of Proxies.loss
initial_proxies: list[torch.Tensor] = []  # the proxies of each model that was created

for method in (Simple, Proxies):  # other files list the methods of hashengine
    HashingMethod.registry.pop(method.name)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    for method in (Simple, Proxies):
        monkeypatch.setitem(HashingMethod.registry, method.name, method)


def test_the_parameters_of_another_method_are_trained_and_saved_with_a_prefix(images, tmp_path, monkeypatch):
    steps.clear()
    initial_proxies.clear()
    run = fit(tiny(images, tmp_path / "model", method="proxies", iterations=3))
    assert steps == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]
    config = json.loads((run.folder / "config.json").read_text())
    assert config["method"] == {"name": "proxies", "options": {"iterations": 3, "rotation_seed": 0}}
    assert "alpha" not in config
    loaded = checkpoint.load(run.folder)
    assert list(loaded.method.weights) == ["proxies"] and not any(name.startswith("method.") for name in loaded.weights)
    assert not torch.equal(loaded.method.weights["proxies"], initial_proxies[0])
    assert list(run.record["epochs"][0]) == ["epoch", "distance"]
    assert run.model().trained_by.name == "proxies"
    monkeypatch.setattr(HashingMethod, "registry", {})
    complaint = "config.json: method must be one of .*got 'proxies'; import the module that defines it first$"
    with pytest.raises(InputError, match=complaint):
        run.model()


@pytest.mark.parametrize(
    ("method", "options"), [("cibhash", {"hidden": 12}), ("itq", {"bits": 8}), ("greedy_hash", {})]
)
def test_a_loaded_model_is_saved_with_the_same_bytes(images, tmp_path, method, options):
    run = fit(tiny(images, tmp_path / "model", method=method, **options))
    run.model().save_pretrained(tmp_path / "copy")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (run.folder / name).read_bytes()
    pixels = load(images).images
    assert torch.equal(HashNet.from_pretrained(tmp_path / "copy").encode(pixels), run.model().encode(pixels))


def test_the_closed_form_records_its_error(images, tmp_path):
    (epoch,) = fit(tiny(images, tmp_path / "model", method="itq", bits=8)).record["epochs"]
    assert epoch["epoch"] == 1 and epoch["error"] < epoch["error_of_random_rotation"]


def test_more_bits_than_a_closed_form_allows_are_rejected(images, tmp_path):
    with pytest.raises(InputError, match="^itq: bits must be 1 to 8 "):
        fit(tiny(images, tmp_path / "model", method="itq", bits=16))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "training.json"])
def test_foreign_files_are_not_replaced(images, tmp_path, name):
    foreign = tmp_path / "foreign" / name
    foreign.parent.mkdir()
    foreign.write_text('{"mine": 1}')
    with pytest.raises(InputError, match=f"^fit: output must be a folder without foreign files, got .* another {name}"):
        fit(tiny(images, foreign.parent))
    assert foreign.read_text() == '{"mine": 1}'


def test_an_earlier_model_is_replaced_but_not_that_of_an_index(images, tmp_path):
    fit(tiny(images, tmp_path / "model", epochs=1))
    assert len(fit(tiny(images, tmp_path / "model", epochs=2)).record["epochs"]) == 2
    (tmp_path / "index.json").write_text('{"fingerprint": "", "sources": []}')
    with pytest.raises(InputError, match="^fit: output must be .* which is in a folder that holds index.json"):
        fit(tiny(images, tmp_path / "model"))


@pytest.mark.parametrize("method", ["greedy_hash", "itq"])
@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)]
)
def test_the_modes_of_the_caller_change_nothing(images, tmp_path, mode, method):
    fit(tiny(images, tmp_path / "plain", method=method, bits=8))
    with mode():
        fit(tiny(images, tmp_path / "mode", method=method, bits=8))
    plain, within = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "mode"))
    assert plain == within


def test_networks_built_in_two_threads_are_those_of_their_seeds(images, tmp_path):
    data = load(images)
    configs = [tiny(images, tmp_path / str(seed), seed=seed) for seed in range(8)]
    state = torch.get_rng_state()
    with ThreadPoolExecutor(2) as pool:
        built = [network for network, _ in pool.map(lambda config: build(config, data), configs)]
    assert torch.equal(torch.get_rng_state(), state)
    for config, network in zip(configs, built, strict=True):
        alone, _ = build(config, data)
        torch.testing.assert_close(network.state_dict(), alone.state_dict(), rtol=0, atol=0)
