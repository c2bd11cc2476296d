"""The devices on which an index lies or searches, the way to them, and what is said when one of them is full."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hashengine.errors import InputError

Device = str | torch.device
Devices = Device | Sequence[Device]

CPU = torch.device("cpu")
_OLDEST = (8, 0)  # the compute capability that the CUDA kernels ask for


def checked_devices(device: Devices) -> tuple[torch.device, ...]:
    """One device or several, each with its number; one may come more than once."""
    devices = tuple(device) if isinstance(device, (list, tuple)) else (device,)
    if not devices:
        raise InputError("device must be a device or a list of at least one, got an empty list")
    return tuple(map(_checked_device, devices))


def _checked_device(name: Device) -> torch.device:
    expected = "device must be 'cpu', 'cuda', 'cuda:1' or the like, a torch.device, or a list of these"
    if not isinstance(name, (str, torch.device)):
        raise TypeError(f"{expected}, got {type(name).__name__}")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"{expected}, got {name!r}") from None
    if device.type == "cpu":
        return CPU
    if device.type != "cuda":
        raise InputError(f"{expected}, got '{device}'")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 0:
        raise InputError(f"device must be 'cpu', for torch finds no GPU, got '{device}'; 'hashengine doctor' says why")
    number = torch.cuda.current_device() if device.index is None else device.index
    if number >= gpus:
        raise InputError(f"device must be one of {gpus} GPUs, 'cuda:0' to 'cuda:{gpus - 1}', got '{device}'")
    capability = torch.cuda.get_device_capability(number)
    if capability < _OLDEST:
        raise InputError(
            f"device must be a GPU of compute capability {_version(_OLDEST)} or more, got '{device}' "
            f"({torch.cuda.get_device_name(number)}) of {_version(capability)}; use 'cpu'"
        )
    return torch.device("cuda", number)


def _version(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; without waiting for the GPU where it comes from memory that it may not read later.

    CUDA has taken over a copy of pageable memory when the call returns. Pinned memory is read when its turn comes, and
    by then the caller may have written to it.
    """
    return tensor if tensor.device == device else tensor.to(device, non_blocking=_need_not_wait(tensor, device))


def write(target: Tensor, source: Tensor) -> None:
    """Copy to memory on a device, waiting no more than :func:`moved` does."""
    target.copy_(source, non_blocking=_need_not_wait(source, target.device))


def _need_not_wait(source: Tensor, device: torch.device) -> bool:
    return device.type == "cuda" and (source.is_cuda or not source.is_pinned())


def settle(devices: Iterable[torch.device]) -> None:
    """Wait for what this thread has asked of the devices, so that streams of other threads may build upon it."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def stop(devices: Iterable[torch.device]) -> None:
    """Wait for what all threads have asked of the devices."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def keep(tensors: Iterable[Tensor | None]) -> None:
    """Keep the memory of tensors, which a writer may let go of meanwhile, until this thread's stream has read them."""
    for tensor in tensors:
        if tensor is not None and tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


@contextmanager
def memory_for(op: str, devices: Sequence[torch.device], needed: int, streamed: bool = False) -> Iterator[None]:
    """Turns what torch raises when a GPU is full into one line.

    Args:
        needed: bytes, a lower bound: of what is kept or handed out, not of what kernels work with.
        streamed: whether the codes are in host memory already, so that only the results can be made smaller.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        gpus = dict.fromkeys(device for device in devices if device.type == "cuda")
        free = ", ".join(f"{_size(torch.cuda.mem_get_info(device)[0])} on {device}" for device in gpus)
        codes_too = "ask for less at once, give several devices, or keep the codes in host memory with streamed=True"
        advice = "ask for fewer queries or a smaller k at once" if streamed else codes_too
        raise torch.cuda.OutOfMemoryError(
            f"{op}: the GPU must have at least {_size(needed)} free, got {free or 'none'}; {advice}"
        ) from error


def _size(count: int) -> str:
    return f"{count} bytes" if count < 1 << 20 else f"{count / (1 << 30):.3g} GiB"
