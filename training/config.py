"""The options of `fit`: one checked object, from a YAML file, the command line, or both."""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field

from hashengine.errors import InputError
from hashengine.models.config import Config, HashNetConfig


class FitConfig(Config):
    """How a hash network is trained. A field that is None is chosen from the images; the report names the choice.

    Attributes:
        images: a folder of class folders.
        output: the model's folder.
        bits, attention, alpha, image_size, widths, stem_stride: as in `HashNetConfig`.
        epochs: passes over the images.
        batch_size: images a step.
        lr: the highest learning rate of the one-cycle schedule.
        weight_decay: AdamW's.
        shift: each image moves by up to this many pixels, at random, each time it is seen.
        flip: mirror half of the images at random; right for photographs, wrong for digits and text.
        seed: of the weights, the order of the images and the augmentation.
        device: "auto" takes a GPU where there is one.
    """

    images: Path
    output: Path
    bits: int = 32
    attention: Literal["none", "simam", "triplet"] = "simam"
    epochs: Annotated[int, Field(gt=0)] | None = None
    batch_size: Annotated[int, Field(ge=2)] = 64
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4e-3
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    alpha: float = 0.1
    image_size: int | None = None
    widths: tuple[int, ...] = (32, 64, 128)
    stem_stride: Literal[1, 2] | None = None
    shift: Annotated[int, Field(ge=0)] | None = None
    flip: bool = False
    seed: Annotated[int, Field(ge=0)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def network(self, classes: tuple[str, ...], channels: int, image_size: int, mean, std) -> HashNetConfig:
        """The network these options ask for, on images of this kind."""
        return HashNetConfig(
            bits=self.bits,
            classes=classes,
            channels=channels,
            image_size=image_size,
            attention=self.attention,
            widths=self.widths,
            stem_stride=self.stem_stride or (2 if image_size >= 24 else 1),
            alpha=self.alpha,
            mean=mean,
            std=std,
        )

    def epochs_for(self, images: int) -> int:
        """`epochs`, or as many as make about 200,000 images in all: at most 20, at least 3."""
        return self.epochs or min(20, max(3, round(200_000 / images)))

    def shift_for(self, image_size: int) -> int:
        """`shift`, or an eighth of the image."""
        return image_size // 8 if self.shift is None else self.shift


def read_yaml(path: Path) -> dict:
    """The options in a YAML file. Raises InputError where it is missing, no YAML, or no mapping."""
    try:
        options = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"config: cannot read {str(path)!r}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config: expected YAML in {str(path)!r}: {' '.join(str(error).split())}") from None
    if not isinstance(options, dict):
        raise InputError(f"config: expected 'option: value' lines in {str(path)!r}, got {type(options).__name__}")
    return options
