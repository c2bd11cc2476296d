"""The options of training, which are checked together with those of the method."""

import subprocess
import sys

import pytest

from hashengine.errors import InputError
from hashengine.training import FitConfig, SweepConfig

FOLDERS = {"images": "images", "output": "model"}


def test_the_options_of_the_method_are_given_like_the_others():
    config = FitConfig(**FOLDERS, alpha=0.5)
    assert config.method == "greedy_hash" and config.method_options == {"alpha": 0.5}
    assert FitConfig(**FOLDERS).method_options == {"alpha": 0.1}
    assert FitConfig(**FOLDERS, method="itq", iterations=3).method_options == {"iterations": 3, "rotation_seed": 0}
    record = config.record()
    assert record["alpha"] == 0.5 and "method_options" not in record
    assert FitConfig(**record) == config


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            {"bitz": 16},
            "^fit: 'bitz' must be an option of training or of the method greedy_hash \\(alpha\\), got an unknown",
        ),
        ({"method": "itq", "alpha": 1}, "^fit: 'alpha' must be an option of training or of the method itq"),
        ({"method": "lattice"}, "^fit: method must be one of cibhash, greedy_hash, itq.*got 'lattice'"),
        ({"alpha": -1}, "^fit: alpha must be greater than or equal to 0, got -1"),
        ({"epochs": 0}, "^fit: epochs must be greater than 0, got 0"),
        ({"batch_size": 1}, "^fit: batch_size must be greater than or equal to 2, got 1"),
        ({"lr": float("inf")}, "^fit: lr must be a finite number"),
    ],
)
def test_a_mistake_gives_an_error_of_one_line(options, complaint):
    with pytest.raises(InputError, match=complaint) as caught:
        FitConfig(**FOLDERS | options)
    assert "\n" not in str(caught.value)


def test_a_missing_option_is_named():
    with pytest.raises(InputError, match="^fit: output must be given"):
        FitConfig(images="images")


def test_a_sweep_collects_the_shared_options_and_refuses_to_vary_the_output():
    config = SweepConfig(output="runs", bits=16, alpha=0.2, grid={"seed": [0, 1]})
    assert config.options == {"bits": 16, "alpha": 0.2} and config.grid == {"seed": (0, 1)}
    with pytest.raises(InputError, match="^train sweep: grid must be without the option 'output'"):
        SweepConfig(output="runs", grid={"output": ["a"]})
    with pytest.raises(InputError, match="^train sweep: grid.seed must be of at least 1 item"):
        SweepConfig(output="runs", grid={"seed": []})


def test_importing_the_options_does_not_import_torch():
    script = "import sys, hashengine.training, hashengine.training.config; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
