"""The description of a hash network, as config.json stores it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator
from typing_extensions import Self

from hashengine._config import Config, Integer, IntegerChoice, Number
from hashengine._defaults import BITS
from hashengine._validation import MAX_BITS


def _is_whole_bytes(bits: int) -> int:
    if bits % 8:
        raise ValueError("must be a multiple of 8")
    return bits


# The options that `HashNetConfig` and `hashengine.training.FitConfig` share. Each description is also the help of the
# option on the command line.
Bits = Annotated[
    Integer,
    Field(gt=0, le=MAX_BITS, description="length of a code, a multiple of 8"),
    AfterValidator(_is_whole_bytes),
]
Attention = Annotated[Literal["none", "simam", "triplet"], Field(description="attention layer in every residual block")]
ImageSize = Annotated[Integer, Field(ge=8, le=256)]
Widths = Annotated[
    tuple[Annotated[Integer, Field(gt=0, le=65_536)], ...],
    Field(min_length=1, max_length=64, description="channels of each stage of the network"),
]
StemStride = Annotated[Literal[1, 2], IntegerChoice]

DEFAULT_ATTENTION: Attention = "simam"
DEFAULT_WIDTHS: Widths = (32, 64, 128)


class HashNetConfig(Config):
    """The description of a `HashNet`, without its weights and without the method that trained it.

    Attributes:
        bits: length of a code, a positive multiple of 8.
        classes: the names of the training classes, in the order of their labels; at least two.
        channels: 1 for grey images, 3 for RGB.
        image_size: height and width in pixels of the network's input, 8 to 256.
        attention: the attention layer inside every residual block, or "none".
        widths: channels of each stage; every stage except the first halves height and width.
        stem_stride: the stride of the first convolution. A stride of 2 halves height and width before the first stage,
            which quarters the work. It is meant for images of 24 pixels or more per side.
        mean: the mean of the pixels, scaled to 0..1: one number per channel, or one for all channels. The network
            subtracts it from its scaled input.
        std: the standard deviation of the scaled pixels: one number per channel, or one for all channels. The network
            divides by it after the subtraction.
    """

    bits: Bits = BITS
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    channels: Annotated[Literal[1, 3], IntegerChoice] = 3
    image_size: ImageSize = 32
    attention: Attention = DEFAULT_ATTENTION
    widths: Widths = DEFAULT_WIDTHS
    stem_stride: StemStride = 1
    mean: tuple[Annotated[Number, Field(allow_inf_nan=False)], ...] = (0.5,)
    std: tuple[Annotated[Number, Field(gt=0, allow_inf_nan=False)], ...] = (0.5,)

    @field_validator("classes")
    @classmethod
    def _are_distinct(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(classes)) < len(classes):
            raise ValueError("must be distinct names")
        return classes

    @model_validator(mode="after")
    def _has_statistics_per_channel(self) -> Self:
        for name in ("mean", "std"):
            count = len(getattr(self, name))
            if count not in (1, self.channels):
                raise ValueError(
                    f"{name} must be one number or one for each of the {self.channels} channels, got {count}"
                )
        return self
