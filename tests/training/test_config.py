"""The options of training, which are checked together with those of the method."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from hashengine.errors import InputError
from hashengine.methods import create, find, own_names
from hashengine.models import HashNetConfig
from hashengine.training import FitConfig, SweepConfig, fit, sweep
from hashengine.training.config import override, parse_yaml, read_yaml

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
        ({"images": ""}, r"^fit: images must be a path \('\.' is the working folder\), got ''$"),
        ({"output": ""}, "^fit: output must be a path .*got ''$"),
        ({"method_options": 3}, "^fit: method_options must be a .*got 3$"),
        ({"method_options": "alpha", "alpha": 0.2}, "^fit: method_options must be a .*got 'alpha'$"),
        ({"stem_stride": True}, "^fit: stem_stride must be a valid integer, got True$"),
        ({"stem_stride": 2.0}, "^fit: stem_stride must be a valid integer, got 2.0$"),
        ({"stem_stride": "1"}, "^fit: stem_stride must be 1 or 2, got '1'$"),
        ({"stem_stride": 3}, "^fit: stem_stride must be 1 or 2, got 3$"),
        ({"flip": "yes"}, "^fit: flip must be true or false, got 'yes'$"),
        ({"flip": 1}, "^fit: flip must be true or false, got 1$"),
        ({"epochs": 0}, "^fit: epochs must be greater than 0, got 0"),
        ({"batch_size": 1}, "^fit: batch_size must be greater than or equal to 2, got 1"),
        ({"device": 3}, "^fit: device must be 'auto', 'cpu', 'cuda', 'cuda:1' or a torch.device, got int$"),
        ({"widths": {8}}, "^fit: widths must be a list or a tuple, which has an order, got \\{8\\}$"),
        ({"widths": frozenset({8})}, "^fit: widths must be a list or a tuple, which has an order, got frozenset"),
        ({"lr": np.True_}, "^fit: lr must be a valid number, got np.True_$"),
        ({"lr": np.array(True)}, "^fit: lr must be a valid number, got array"),
        ({"alpha": torch.tensor(True)}, "^fit: alpha must be a valid number, got tensor"),
        ({"lr": float("inf")}, "^fit: lr must be less than or equal to 10*, got inf"),
    ],
)
def test_a_mistake_gives_an_error_of_one_line(options, complaint):
    with pytest.raises(InputError, match=complaint) as caught:
        FitConfig(**FOLDERS | options)
    assert "\n" not in str(caught.value)


def test_a_device_of_torch_is_taken_by_its_name():
    assert FitConfig(**FOLDERS, device=torch.device("cuda", 1)).device == "cuda:1"


def test_a_change_of_a_configuration_gives_an_error_of_one_line_with_another_way():
    config = FitConfig(**FOLDERS)
    with pytest.raises(
        InputError, match=r"^fit: bits must be left as .*got the new value 8; make .* \| {'bits': "
    ) as new:
        config.bits = 8
    with pytest.raises(InputError, match="^fit: bits must be left as it was constructed, got a deletion; ") as deleted:
        del config.bits
    assert "\n" not in str(new.value) + str(deleted.value)
    assert FitConfig(**config.model_dump() | {"bits": 8}) == FitConfig(**FOLDERS, bits=8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (fit, "fit: config must be a FitConfig, got dict; pass FitConfig(...)"),
        (sweep, "train sweep: config must be a SweepConfig, got dict; pass SweepConfig(...)"),
    ],
)
def test_options_that_are_no_configuration_are_refused_in_one_line(call, message):
    with pytest.raises(InputError) as caught:
        call(FOLDERS)
    assert str(caught.value) == message


NETWORK = {"classes": ("a", "b")}
OPTIONS = {"fit": (FitConfig, FOLDERS), "network": (HashNetConfig, NETWORK)}
OPTIONS |= {name: (find(name).Options, {}) for name in own_names()}


def numeric_options(kind: type) -> list[tuple[str, str]]:
    """The options of `kind`, int or float, of every class of options: (class, option)."""
    return [
        (name, option)
        for name, (config, _) in OPTIONS.items()
        for option, field in config.model_fields.items()
        if kind.__name__ in str(field.annotation)
    ]


def refused(name: str, option: str, value: object) -> str:
    config, required = OPTIONS[name]
    with pytest.raises(InputError) as caught:
        config(**required | {option: value})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_numeric_options_are_found():
    integers, numbers = numeric_options(int), numeric_options(float)
    assert {("fit", "epochs"), ("network", "widths"), ("itq", "rotation_seed"), ("cibhash", "hidden")} <= {*integers}
    assert {("fit", "lr"), ("network", "std"), ("greedy_hash", "alpha"), ("cibhash", "temperature")} <= {*numbers}


@pytest.mark.parametrize(("name", "option"), numeric_options(int), ids="-".join)
@pytest.mark.parametrize("value", [True, 8.0, "8", np.bool_(True), np.float64(8)], ids=repr)
def test_an_integer_option_takes_only_integers(name, option, value):
    for given in (value, (value,)) if option == "widths" else (value,):
        message = refused(name, option, given)
        assert f": {option}" in message and "must be" in message


@pytest.mark.parametrize(("name", "option"), numeric_options(float), ids="-".join)
@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), "x"], ids=repr)
def test_a_number_option_takes_only_finite_numbers(name, option, value):
    for given in (value, (value,)) if option in ("mean", "std") else (value,):
        message = refused(name, option, given)
        assert f": {option}" in message and "must be" in message


def test_integers_of_numpy_and_numbers_as_text_are_taken():
    config = FitConfig(**FOLDERS, bits=np.int64(16), widths=(np.uint8(8),), lr="4e-3", seed=np.uint64(2**64 - 1))
    assert (config.bits, config.widths, config.lr, config.seed) == (16, (8,), 0.004, 2**64 - 1)
    assert type(config.bits) is int and config.record()["widths"] == [8]


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        ("itq", "iterations", -1, "itq: iterations must be greater than or equal to 0, got -1"),
        ("itq", "iterations", 1_000_001, "itq: iterations must be less than or equal to 1000000, got 1000001"),
        ("itq", "rotation_seed", -1, f"itq: rotation_seed must be 0 to {2**64 - 1}, got -1"),
        ("itq", "rotation_seed", 2**64, f"itq: rotation_seed must be 0 to {2**64 - 1}, got {2**64}"),
        ("cibhash", "hidden", 0, "cibhash: hidden must be greater than 0, got 0"),
        ("cibhash", "hidden", 65_537, "cibhash: hidden must be less than or equal to 65536, got 65537"),
        ("cibhash", "hidden", 2**70, f"cibhash: hidden must be less than or equal to 65536, got {2**70}"),
    ],
)
def test_the_integer_options_of_the_methods_have_limits(name, option, value, message):
    with pytest.raises(InputError) as caught:
        create(name, **{option: value})
    assert str(caught.value) == message
    with pytest.raises(InputError) as caught:
        FitConfig(**FOLDERS, method=name, **{option: value})
    assert str(caught.value) == message.replace(f"{name}:", "fit:", 1)


def test_the_integer_options_of_the_methods_take_their_limits():
    assert create("itq", iterations=0, rotation_seed=2**64 - 1).options.rotation_seed == 2**64 - 1
    assert create("itq", iterations=1_000_000).options.iterations == 1_000_000
    assert create("cibhash", hidden=1).options.hidden == 1


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


def test_a_sweep_refuses_empty_paths_and_options_that_are_no_mapping():
    for options, complaint in (
        ({"output": ""}, "^train sweep: output must be a path"),
        ({"output": "sweep", "queries": ""}, "^train sweep: queries must be a path"),
        ({"output": "sweep", "options": 3, "bits": 16}, "^train sweep: options must be a .*got 3$"),
    ):
        with pytest.raises(InputError, match=complaint):
            SweepConfig(**options)


def test_flags_and_choices_of_integers_may_come_from_numpy():
    config = FitConfig(**FOLDERS, flip=np.True_, stem_stride=np.int64(2))
    assert config.flip is True and type(config.stem_stride) is int and config.stem_stride == 2
    with pytest.raises(InputError, match="^HashNetConfig: channels must be a valid integer, got True$"):
        HashNetConfig(classes=("a", "b"), channels=True)


BOMB = "b0: &b0 [1, 2, 3]\n" + "".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]\n" for n in range(1, 10))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("seed: 2020-99-99", "month must be in 1..12"),
        ("seed: " + "9" * 5000, "4300"),
        ("seed: !!int x", "invalid literal"),
        ("flip: !!bool x", "x"),
        ("seed: !!timestamp x", "group"),
        ("widths: " + "[" * 3000, "nested too deeply|expected"),
        ("seed: 1\nseed: 2", "'seed' twice"),
        (BOMB, "an alias"),
        ("a: [", "expected"),
    ],
)
def test_yaml_that_the_parser_cannot_read_gives_an_error_of_one_line(tmp_path, text, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_yaml(text)
    (tmp_path / "fit.yaml").write_text(text)
    with pytest.raises(InputError, match="^fit: config must be YAML, got ") as caught:
        read_yaml(tmp_path / "fit.yaml", "fit")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["images", "output"])
@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_a_path_that_no_file_system_can_have_is_refused(name, path):
    with pytest.raises(InputError, match=f"^fit: {name} must be a path that a file system can have"):
        FitConfig(**FOLDERS | {name: path})


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (
            lambda: FitConfig(**FOLDERS, alpha=0.7, method_options={"alpha": 0.5}),
            "^fit: 'alpha' must be given once, got 0.7, and 0.5 in method_options$",
        ),
        (
            lambda: FitConfig(**FOLDERS, alpha=0.5, method_options={"alpha": 0.5}),
            "^fit: 'alpha' must be given once, got 0.5, and 0.5 in method_options$",
        ),
        (
            lambda: SweepConfig(output="runs", bits=16, options={"bits": 8}),
            "^train sweep: 'bits' must be given once, got 16, and 8 in options$",
        ),
    ],
)
def test_an_option_that_is_given_at_two_levels_is_refused(make, complaint):
    with pytest.raises(InputError, match=complaint):
        make()


def test_an_option_takes_precedence_over_those_of_its_name_at_every_level():
    file = {
        "bits": 8,
        "method_options": {"alpha": 0.5, "beta": 1},
        "options": {"alpha": 1, "method_options": {"beta": 2}},
    }
    assert override(file, {"alpha": 0.7, "beta": 3}) == {
        "bits": 8,
        "method_options": {},
        "options": {"method_options": {}},
        "alpha": 0.7,
        "beta": 3,
    }
    assert override(file, {}) == file
    assert override({"options": 3}, {"bits": 16}) == {"options": 3, "bits": 16}


@pytest.mark.parametrize("value", [2024, 4.5, True])
def test_a_number_in_place_of_a_path_is_refused_with_a_hint_at_quotes(value):
    with pytest.raises(InputError, match=f"images must be a path \\(with quotes in a YAML file .*, got {value}$"):
        FitConfig(images=value, output="model")


@pytest.mark.parametrize("number", ["017", "1:30", "1_000", "0x10", "0b11", "1_0.5"])
def test_a_number_of_yaml_that_is_not_in_decimal_digits_is_refused(number):
    with pytest.raises(ValueError, match=f"^the number {number}: write it in decimal digits"):
        parse_yaml(f"seed: {number}")
    assert parse_yaml(f"name: '{number}'") == {"name": number}


def test_decimal_numbers_of_yaml_are_read():
    assert parse_yaml("[0, -7, +12, 0.5, .5, 1.e+3, -0.25, 1e-3]") == [0, -7, 12, 0.5, 0.5, 1000.0, -0.25, "1e-3"]


def test_a_file_without_options_is_named(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing")
    with pytest.raises(
        InputError, match="^fit: config must be lines of 'option: value', got no option in '.*empty.yaml'"
    ):
        read_yaml(tmp_path / "empty.yaml", "fit")
