"""The options of a training run (`FitConfig`) and of a sweep (`SweepConfig`).

The values come from Python, or from a YAML file and the command line.

The descriptions of the fields are the help of `hashengine train fit` and `sweep`. Importing this module does not import
torch; constructing a `FitConfig` does.
"""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import Field, ValidationInfo, field_validator, model_validator

from hashengine import methods
from hashengine._config import Config, Flag, GivenPath, Integer, Number, Seed
from hashengine._defaults import BITS, SEED
from hashengine._validation import check_device_name
from hashengine.errors import brief, invalid, shown
from hashengine.models.config import (
    DEFAULT_ATTENTION,
    DEFAULT_WIDTHS,
    Attention,
    Bits,
    HashNetConfig,
    ImageSize,
    StemStride,
    Widths,
)

_IMAGES_PER_RUN = 200_000  # the default number of epochs is this divided by the number of images, limited to 3..20


class FitConfig(Config):
    """How a hash network is trained.

    The value of a field that is None is chosen from the images; training.json records it. The options of the method,
    such as greedy hash's `alpha`, are passed like fields and are collected in `method_options`.
    """

    where: ClassVar[str] = "fit"

    images: Annotated[GivenPath, Field(description="folder of class folders to train on")]
    output: Annotated[GivenPath, Field(description="the model folder to write")]
    method: Annotated[
        str, Field(description="hashing method; 'hashengine train methods' lists them and their options")
    ] = methods.DEFAULT
    bits: Bits = BITS
    attention: Attention = DEFAULT_ATTENTION
    epochs: Annotated[
        Annotated[Integer, Field(gt=0, le=1_000_000)] | None,
        Field(description="passes over the images; by default 200,000 / number of images, at least 3 and at most 20"),
    ] = None
    batch_size: Annotated[Integer, Field(ge=2, description="images per step")] = 64
    lr: Annotated[
        Number, Field(gt=0, le=1e30, allow_inf_nan=False, description="highest learning rate of the one-cycle schedule")
    ] = 4e-3
    weight_decay: Annotated[Number, Field(ge=0, le=1e30, allow_inf_nan=False, description="weight decay of AdamW")] = (
        0.01
    )
    image_size: Annotated[
        ImageSize | None,
        Field(description="pixels per side; by default the images' own size, limited to 8 to 64"),
    ] = None
    widths: Widths = DEFAULT_WIDTHS
    stem_stride: Annotated[
        StemStride | None,
        Field(
            description="stride of the first convolution: 2 halves height and width before the first stage; by default "
            "2 for images of 24 pixels or more, otherwise 1"
        ),
    ] = None
    shift: Annotated[
        Annotated[Integer, Field(ge=0, le=65_536)] | None,
        Field(description="an image moves at random by up to this many pixels; by default an eighth of its size"),
    ] = None
    flip: Annotated[
        Flag, Field(description="mirror half of the images at random: for photographs, not for digits or text")
    ] = False
    seed: Annotated[Seed, Field(description="seed of the weights, image order and augmentation")] = SEED
    device: Annotated[
        str, Field(description="where to train: auto, cpu, cuda or cuda:1; auto takes a GPU if there is one")
    ] = "auto"
    method_options: Annotated[dict[str, Any], Field(validate_default=True)] = {}

    @model_validator(mode="before")
    @classmethod
    def _collect_method_options(cls, values: Any) -> Any:
        return _collect_others(cls, values, into="method_options")

    @field_validator("method")
    @classmethod
    def _is_known(cls, name: str) -> str:
        options = methods.find(name, cls.where).Options.model_fields
        if shared := sorted(options.keys() & cls.model_fields.keys()):
            actual = f"{name!r} with the option {shared[0]!r}"
            raise invalid(cls.where, "method", "one whose options have other names than those of training", actual)
        return name

    @field_validator("device", mode="before")
    @classmethod
    def _is_a_device(cls, name: Any) -> str:
        check_device_name(cls.where, name, auto=True)
        return str(name)

    @field_validator("method_options")
    @classmethod
    def _belong_to_the_method(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Check the given options and add the others with their defaults. Imports the method and therefore torch."""
        if "method" not in info.data:  # the method is invalid, which pydantic reports
            return options
        method = methods.find(info.data["method"], cls.where)
        unknown = sorted(set(options) - set(method.Options.model_fields))
        if unknown:
            own = ", ".join(method.Options.model_fields) or "none"
            expected = f"an option of training or of the method {method.name} ({own})"
            raise invalid(cls.where, brief(repr(unknown[0])), expected, "an unknown one")
        return method.Options.checked(cls.where, **options).model_dump(mode="json")

    def record(self) -> dict[str, Any]:
        """All options, including those of the method, as the plain values that training.json stores."""
        return self.model_dump(mode="json", exclude={"method_options"}) | self.method_options

    def network(
        self,
        classes: tuple[str, ...],
        channels: int,
        image_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> HashNetConfig:
        """The description of the network that these options define for the given images."""
        return HashNetConfig.checked(
            self.where,
            bits=self.bits,
            classes=classes,
            channels=channels,
            image_size=image_size,
            attention=self.attention,
            widths=self.widths,
            stem_stride=self.stem_stride or (2 if image_size >= 24 else 1),
            mean=mean,
            std=std,
        )

    def epochs_for(self, images: int) -> int:
        """`epochs`, or the default for this number of images."""
        return self.epochs or min(20, max(3, round(_IMAGES_PER_RUN / images)))

    def shift_for(self, image_size: int) -> int:
        """`shift`, or the default for images of this size."""
        return image_size // 8 if self.shift is None else self.shift


def override(options: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """The options in `others`, and those in `options` that have other names, also in `options` and `method_options`."""
    return _without(options, others) | others


def _without(options: dict[str, Any], names: Container[str]) -> dict[str, Any]:
    nested = ("options", "method_options")  # the fields into which `_collect_others` moves options
    return {
        name: _without(value, names) if name in nested and isinstance(value, dict) else value
        for name, value in options.items()
        if name not in names
    }


def _collect_others(config: type[Config], values: Any, into: str) -> Any:
    """Move the entries of `values` that are not fields of `config` into the dict that is the value of field `into`.

    Raises:
        InputError: that dict has one of them already.
    """
    if not isinstance(values, dict):  # pydantic reports it
        return values
    fields = {name: value for name, value in values.items() if name in config.model_fields}
    others = {name: value for name, value in values.items() if name not in config.model_fields}
    if not isinstance(given := fields.get(into, {}), dict):  # pydantic reports it
        return fields
    if name := next((name for name in others if name in given), None):
        actual = f"{brief(shown(others[name]))}, and {brief(shown(given[name]))} in {into}"
        raise invalid(config.where, brief(repr(name)), "given once", actual)
    return fields | {into: given | others}


class SweepConfig(Config):
    """The runs of a sweep: the options that all runs share, and a grid of those that vary."""

    where: ClassVar[str] = "train sweep"

    output: Annotated[
        GivenPath, Field(description="folder to write: one model folder per run, table.md and table.json")
    ]
    queries: Annotated[
        GivenPath | None, Field(description="folder of class folders with the query images for the mAP of each run")
    ] = None
    grid: Annotated[
        dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]],
        Field(description="values of an option of 'fit', as OPTION=VALUE,VALUE,...; one run per combination"),
    ] = {}
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _collect_shared_options(cls, values: Any) -> Any:
        return _collect_others(cls, values, into="options")

    @field_validator("grid")
    @classmethod
    def _leaves_the_folders_alone(cls, grid: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        if "output" in grid:
            raise ValueError("must be without the option 'output', because the sweep names the folder of each run")
        return grid


class _OptionsLoader(yaml.SafeLoader):
    """Reads YAML without aliases, a few of which can stand for billions of values, and without duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError(f"an alias, *{self.peek_event().anchor}: write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{repeated[0]!r} twice")
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: Any) -> Any:
        """A number in decimal digits. YAML 1.1 also has octal ones such as 017, and sexagesimal ones such as 1:30."""
        if re.fullmatch(r"[-+]?(0[bxo_0-9].*|.*[:_].*)", node.value):
            raise ValueError(f"the number {brief(node.value)}: write it in decimal digits, or put quotes around it")
        return self.construct_yaml_float(node) if node.tag.endswith("float") else self.construct_yaml_int(node)


for _tag in ("int", "float"):
    _OptionsLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _OptionsLoader.construct_decimal)


def parse_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        ValueError: the text is not YAML, contains an alias or a duplicate key, or a value that is none, such as the
            date 2020-99-99.
    """
    try:
        return yaml.load(text, Loader=_OptionsLoader)
    except RecursionError:
        raise ValueError("a value that is nested too deeply") from None
    except Exception as error:  # for values such as !!bool x, the parser raises KeyError, AttributeError and others
        raise ValueError(str(error) or type(error).__name__) from None


def read_yaml(path: Path, where: str) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        InputError: the file cannot be read, is not YAML, or does not hold a mapping.
    """
    try:
        options = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise invalid(where, "config", "a readable file", f"{str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise invalid(where, "config", "YAML", f"{str(path)!r}: {brief(error)}") from None
    if not isinstance(options, dict):
        actual = "no option" if options is None else type(options).__name__
        raise invalid(where, "config", "lines of 'option: value'", f"{actual} in {str(path)!r}")
    for name in options:
        if not isinstance(name, str):
            raise invalid(where, "every option in config", "a name", f"{brief(repr(name))} in {str(path)!r}")
    return options
