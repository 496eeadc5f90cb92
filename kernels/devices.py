"""What a device can run, and how much of it at once."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_HERE = nullcontext()
INTERPRETED_PROCESSORS = 4
"""Multiprocessors where there are none: the interpreter's."""


def processors(device: torch.device) -> int:
    """Multiprocessors of the device given, not of the current one (``INTERPRETED_PROCESSORS`` if it is no GPU)."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return _processors(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def is_nvidia(device: torch.device) -> bool:
    """Whether it is an NVIDIA GPU (AMD's are of the type "cuda", too)."""
    return device.type == "cuda" and torch.version.cuda is not None


@functools.cache
def runs_ptx(device: torch.device) -> bool:
    """Whether kernels with PTX for sm_80 run there: an NVIDIA GPU, not interpreted."""
    import triton

    return (
        is_nvidia(device)
        and not triton.knobs.runtime.interpret
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )  # fmt: skip


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel may begin before the one in front of it has ended (programmatic dependent launch).

    That is from Hopper on.
    """
    return is_nvidia(device) and torch.cuda.get_device_capability(device) >= (9, 0)


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Kernels launched within go to the tensor's GPU, whichever is the current one. Nothing for other devices."""
    if tensor.is_cuda and tensor.get_device() == torch.cuda.current_device():
        return _HERE  # a guard takes some microseconds
    guard: AbstractContextManager[object] = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    return guard


def early(device: torch.device) -> dict[str, bool]:
    """Constexpr EARLY and launch options of a kernel that waits, where it is told to, for the kernel in front."""
    return {"EARLY": True, "launch_pdl": True} if overlaps(device) else {"EARLY": False}


@contextmanager
def without_collection() -> Iterator[None]:
    """Inside the block, which may compile kernels, nobody looks for garbage.

    Triton makes millions of objects while it reads a long kernel, and looking through them took a third of the time:
    13.0 s of the processor for a table-decode kernel, 8.9 without (Triton 3.6, on a CPU).
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def compiling(tell: Callable[[], object]) -> Iterator[None]:
    """Inside the block, call ``tell`` once if kernels have to be compiled, in any thread: when the first one is done
    that Triton's cache on the disk did not have, a second or so after it was begun."""
    from triton import knobs

    former, told = knobs.compilation.listener, False

    def listen(**about: Any) -> None:
        nonlocal told
        if former is not None:
            former(**about)
        if not told and not about["cache_hit"]:
            told = True
            tell()

    knobs.compilation.listener = listen
    try:
        yield
    finally:
        knobs.compilation.listener = former
