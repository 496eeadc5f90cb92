"""Kernels that begin before the one in front of them has ended (programmatic dependent launch)."""

from __future__ import annotations

import functools

import torch


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel may begin before the one in front of it has ended: from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def early(device: torch.device) -> dict[str, bool]:
    """Constexpr EARLY and launch options of a kernel that waits, where it is told to, for the kernel in front."""
    return {"EARLY": True, "launch_pdl": True} if overlaps(device) else {"EARLY": False}
