"""Copies to devices, synchronization, and the error message for a full GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

CPU = torch.device("cpu")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`: itself if it is there, otherwise a copy that later changes of `tensor` do not affect.

    A copy from pageable memory to a GPU is not waited for, because CUDA reads the memory before the call returns. CUDA
    reads pinned memory later, when the stream reaches the copy. Therefore a copy from pinned memory is waited for.
    """
    return tensor if tensor.device == device else tensor.to(device, non_blocking=_can_copy_async(tensor, device))


def copy_into(target: Tensor, source: Tensor) -> None:
    """Copy `source` to the memory of `target`; it is waited for in the same cases as in `to_device`."""
    target.copy_(source, non_blocking=_can_copy_async(source, target.device))


def _can_copy_async(source: Tensor, device: torch.device) -> bool:
    return device.type == "cuda" and (source.is_cuda or not source.is_pinned())


def synchronize_streams(devices: Iterable[torch.device]) -> None:
    """Wait for this thread's current stream on each GPU, so that other streams can use the results."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def synchronize_devices(devices: Iterable[torch.device]) -> None:
    """Wait for all streams of all threads on each GPU."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def record_streams(tensors: Iterable[Tensor | None]) -> None:
    """Keep the memory of GPU tensors allocated until this thread's stream has read it, even if Python frees them."""
    for tensor in tensors:
        if tensor is not None and tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


@contextmanager
def explain_out_of_memory(
    where: str, devices: Sequence[torch.device], needed: int, streamed: bool = False
) -> Iterator[None]:
    """Replace torch's out-of-memory error by one line that states the needed memory, the free memory and a remedy.

    Args:
        where: the method that the user called.
        devices: the devices in use.
        needed: bytes that each GPU needs at least: what the index stores or returns, without scratch memory of kernels.
        streamed: whether the codes are in host memory. If so, only smaller results can help.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        gpus = dict.fromkeys(device for device in devices if device.type == "cuda")
        free = ", ".join(f"{_size(torch.cuda.mem_get_info(device)[0])} on {device}" for device in gpus)
        advice = "pass fewer queries or a smaller k per call"
        if not streamed:
            advice = "use smaller batches, give several devices, or keep the codes in host memory with streamed=True"
        raise torch.cuda.OutOfMemoryError(
            f"{where}: free GPU memory must be at least {_size(needed)}, got {free or 'none'}; {advice}"
        ) from error


def _size(count: int) -> str:
    return f"{count} bytes" if count < 1 << 20 else f"{count / (1 << 30):.3g} GiB"
