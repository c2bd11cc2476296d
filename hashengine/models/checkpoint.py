"""A model on disk: a folder with config.json and model.safetensors, written so that a crash leaves a whole model."""

import os
from pathlib import Path

import safetensors.torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hashengine.errors import InputError, input_error
from hashengine.models.config import HashNetConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def replace_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Write files into `folder`, made if missing. All are on disk before the first one replaces its predecessor."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = {name: folder / f".{name}.{os.getpid()}.partial" for name in contents}
    try:
        for name, content in contents.items():
            with open(partial[name], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in contents:
            os.replace(partial[name], folder / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def save(folder: Path, config: HashNetConfig, weights: dict[str, Tensor]) -> None:
    """Write the model. The weights carry a copy of the config, so that `load` notices files of two different saves."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    content = safetensors.torch.save(weights, metadata={"config": config.model_dump_json()})
    replace_files(folder, {WEIGHTS_FILE: content, CONFIG_FILE: config.model_dump_json(indent=2).encode() + b"\n"})


def load(folder: Path) -> tuple[HashNetConfig, dict[str, Tensor]]:
    """Read what `save` wrote. Raises InputError, naming the file, where one is missing, truncated or foreign."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise InputError(
                f"model: expected a folder written by save_pretrained, got {str(folder)!r}, which has no {name}"
            )
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    try:
        config = HashNetConfig.model_validate_json(config_path.read_bytes())
    except ValidationError as error:
        raise input_error(error, str(config_path)) from None
    except InputError as error:
        raise InputError(f"{config_path}: {error}") from None
    try:
        with safe_open(weights_path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{weights_path}: expected whole safetensors weights, got a damaged file: {error}") from None
    if metadata.get("config") != config.model_dump_json():
        raise InputError(f"{weights_path}: expected the weights saved with {config_path}, got others: save both anew")
    return config, weights
