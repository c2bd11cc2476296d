"""What a hash network is made of, checked: the content of its config.json."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hashengine.errors import input_error


class Config(BaseModel):
    """A frozen pydantic model that refuses unknown fields and tells a mistake in one line, as an `InputError`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **values):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise input_error(error) from None


class HashNetConfig(Config):
    """Everything needed to build a `HashNet`; its weights come on top.

    Attributes:
        bits: length of a code, a positive multiple of 8.
        classes: the names of the classes, in the order of the classifier's outputs; at least two.
        channels: 1 for grey images, 3 for RGB.
        image_size: height and width in pixels that the network sees, 8 to 256.
        attention: the attention inside every residual block.
        widths: channels of each stage; every stage but the first halves height and width.
        stem_stride: 2 halves height and width before the first stage: 4 times less work, for 28 pixels and above.
        alpha: weight of the quantisation penalty, `alpha * mean(||u| - 1|^3)`.
        mean, std: per channel, of pixels scaled to 0..1; images are normalised with them inside the network.
    """

    format: Literal["hashengine.HashNet"] = "hashengine.HashNet"
    version: Literal[1] = 1
    bits: Annotated[int, Field(gt=0)] = 32
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    channels: Literal[1, 3] = 3
    image_size: Annotated[int, Field(ge=8, le=256)] = 32
    attention: Literal["none", "simam", "triplet"] = "simam"
    widths: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)] = (32, 64, 128)
    stem_stride: Literal[1, 2] = 1
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    mean: tuple[float, ...] = (0.5,)
    std: tuple[Annotated[float, Field(gt=0)], ...] = (0.5,)

    @field_validator("bits")
    @classmethod
    def _whole_bytes(cls, bits: int) -> int:
        if bits % 8:
            raise ValueError("expected a multiple of 8, since codes are packed into bytes")
        return bits

    @field_validator("classes")
    @classmethod
    def _distinct(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(classes)) < len(classes):
            raise ValueError("expected every class once")
        return classes

    @model_validator(mode="after")
    def _statistics_per_channel(self):
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise ValueError(f"{name}: expected one number or one for each of the {self.channels} channels")
        return self
