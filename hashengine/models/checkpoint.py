"""A model on disk: a folder with config.json and model.safetensors.

config.json describes the network and the method that trained it; the method determines the kind of the network's head.
model.safetensors holds the weights of the network and of the method, and the content of config.json as metadata.

Version 1 of the format was designed for greedy hash alone. For greedy hash, config.json therefore has a field `alpha`
at the top level, and the names of the classifier's weights are stored unchanged, such as `classifier.weight`. For any
other method, the field `method` of config.json holds the name and the options of the method, and the names of the
method's weights are stored with the prefix `method.`.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hashengine._files import read_file, read_unchanged, write_files
from hashengine._text import to_json
from hashengine.errors import InputError, input_error, invalid, unusable
from hashengine.models.config import HashNetConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

_GREEDY_HASH = "greedy_hash"
_GREEDY_HASH_PREFIX = "classifier."
_METHOD_PREFIX = "method."


class MethodState(NamedTuple):
    """The method that trained a network, as plain values.

    Attributes:
        name: the method's name.
        options: its options.
        weights: the parameters and buffers of the method by name. Those of the head are not included, because the head
            belongs to the network.
    """

    name: str
    options: dict[str, Any]
    weights: dict[str, Tensor]


class Model(NamedTuple):
    """What a model folder holds: a network, its weights by name, and the method that trained it (None if none did)."""

    network: HashNetConfig
    weights: dict[str, Tensor]
    method: MethodState | None


class _MethodSection(BaseModel):
    name: str
    options: dict[str, Any]


class _Header(BaseModel):
    """The fields of config.json that do not describe the network."""

    model_config = ConfigDict(extra="allow")

    format: Literal["hashengine.HashNet"] = "hashengine.HashNet"
    version: Literal[1] = 1
    alpha: float | None = None
    method: _MethodSection | None = None


def save(folder: Path, model: Model) -> str:
    """Write the model. A crash leaves the previous model, the new model, or a mix of both, which `load` refuses.

    Returns:
        The fingerprint of the weights that were written.
    """
    described = document(model)
    weights = dict(model.weights)
    if model.method is not None:
        prefix = "" if model.method.name == _GREEDY_HASH else _METHOD_PREFIX
        of_method = {prefix + name: tensor for name, tensor in model.method.weights.items()}
        if both := sorted(weights.keys() & of_method.keys()):
            actual = f"{both[0]!r}, which is also a weight of the method"
            raise invalid(str(folder), "a weight of the network", "named otherwise than those of its method", actual)
        weights |= of_method
    content = safetensors.torch.save(
        {name: _copy_of(tensor) for name, tensor in weights.items()},
        metadata={"config": to_json(described)},
    )
    write_files(folder, {WEIGHTS_FILE: content, CONFIG_FILE: to_json(described, indent=2).encode() + b"\n"})
    return hashlib.sha256(content).hexdigest()


def _copy_of(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU. Tied weights need copies, because safetensors refuses tensors that share memory."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def has_config(folder: Path) -> bool:
    """Whether config.json in `folder` is that of a model."""
    try:
        return _is_header(read_file(folder / CONFIG_FILE))
    except OSError:
        return False


def has_weights(folder: Path) -> bool:
    """Whether model.safetensors in `folder` is that of a model: it holds a copy of config.json.

    Weights that were cut off count as such if config.json is that of a model.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():  # opening a pipe would wait
        return False
    try:
        with path.open("rb") as opened, safe_open(_utf8_path(path, opened), framework="pt") as weights:
            return _is_header((weights.metadata() or {}).get("config", ""))
    except (OSError, ValueError, SafetensorError):
        return has_config(folder)


def _is_header(text: str | bytes) -> bool:
    try:
        return "format" in _Header.model_validate(json.loads(text)).model_fields_set
    except (ValueError, RecursionError):  # pydantic's ValidationError is a ValueError
        return False


def fingerprint(model: str | os.PathLike[str], where: str = "fingerprint") -> str:
    """SHA-256 of the weights file in the model folder `model`. That file also contains a copy of config.json.

    Raises:
        InputError: `model` is not the folder of a saved model; the error names `where`.
    """
    weights, expected = Path(model, WEIGHTS_FILE), f"a model folder that holds {WEIGHTS_FILE}"
    try:
        if weights.exists() and not weights.is_file():  # opening a pipe would wait
            raise invalid(where, "model", expected, f"{os.fspath(model)!r}, where it is no file")
        return hashlib.sha256(weights.read_bytes()).hexdigest()
    except InputError:
        raise
    except PermissionError as error:
        raise unusable(where, "model", repr(str(weights)), error.strerror) from None
    except (OSError, ValueError) as error:  # ValueError: a character that no path has
        raise invalid(where, "model", expected, f"{os.fspath(model)!r}: {getattr(error, 'strerror', error)}") from None


def load(folder: Path) -> Model:
    """Read what `save` wrote. A save at the same time is not mixed with the earlier one.

    Raises:
        InputError: a file is missing, truncated or foreign, or the two files are from different saves.
        OSError: a file cannot be read, for example because the permission is missing.
    """
    return read_unchanged([folder / CONFIG_FILE, folder / WEIGHTS_FILE], lambda: _read(folder))


def _read(folder: Path) -> Model:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            expected = "a folder written by 'hashengine train fit' or save_pretrained"
            raise invalid("HashNet.from_pretrained", "model", expected, f"{str(folder)!r}, which has no {name}")
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    try:
        header = _Header.model_validate(json.loads(config_path.read_bytes()))  # pydantic's parser refuses surrogates
    except ValidationError as error:
        raise input_error(error, str(config_path)) from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
        raise invalid(str(config_path), "the file", "JSON", f"another text ({error})") from None
    network = HashNetConfig.checked(str(config_path), **(header.model_extra or {}))
    try:
        # `open` also reports why a file cannot be opened. safe_open reports it as missing.
        with weights_path.open("rb") as opened, safe_open(_utf8_path(weights_path, opened), framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise invalid(
            str(weights_path), "the file", "complete safetensors weights", f"a damaged file: {error}"
        ) from None
    model = Model(network, weights, _split_off_method(header, weights))
    if metadata.get("config") != to_json(document(model)):
        expected = f"the weights saved together with {config_path}"
        raise invalid(str(weights_path), "the file", expected, "weights of another save", "save the model again")
    return model


def _utf8_path(path: Path, opened: BinaryIO) -> Path:
    """`path`, or another path of the opened file if that one is no UTF-8, which safetensors refuses."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return Path(f"/proc/self/fd/{opened.fileno()}")
    return path


def _split_off_method(header: _Header, weights: dict[str, Tensor]) -> MethodState | None:
    """Move the method's weights from `weights` to the result; None if `header` names no method."""
    if header.method is not None:
        name, options, prefix, stripped = header.method.name, header.method.options, _METHOD_PREFIX, _METHOD_PREFIX
    elif header.alpha is not None:
        name, options, prefix, stripped = _GREEDY_HASH, {"alpha": header.alpha}, _GREEDY_HASH_PREFIX, ""
    else:
        return None
    own = [key for key in weights if key.startswith(prefix)]
    return MethodState(name, options, {key.removeprefix(stripped): weights.pop(key) for key in own})


def document(model: Model) -> dict[str, Any]:
    """The content of config.json, with its fields in the order that the format defines."""
    fields = {"format": "hashengine.HashNet", "version": 1, **model.network.model_dump(mode="json")}
    method = model.method
    if method is not None and method.name == _GREEDY_HASH:
        statistics = {name: fields.pop(name) for name in ("mean", "std")}  # alpha is stored before these fields
        fields |= method.options | statistics
    elif method is not None:
        fields["method"] = {"name": method.name, "options": method.options}
    return fields


def describe_mismatch(folder: Path, error: RuntimeError) -> InputError:
    """The error for weights that do not fit the network in config.json by name or shape."""
    reason = " ".join(str(error).split())
    return invalid(str(folder / WEIGHTS_FILE), "weights", f"those of the network in {CONFIG_FILE}", reason)
