"""Energy of a GPU by the counter of NVML, the driver's own library; a machine without it has no meter."""

from __future__ import annotations

import ctypes

import torch


class EnergyMeter:
    """Reads what a GPU has consumed since its driver was loaded (`nvmlDeviceGetTotalEnergyConsumption`)."""

    def __init__(self, device: torch.device) -> None:
        self._library: ctypes.CDLL | None = None
        self._handle = ctypes.c_void_p()
        if device.type != "cuda":
            return
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
        # By its unique name: CUDA and NVML may number the GPUs differently.
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        if library.nvmlInit_v2() == 0 and library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(self._handle)) == 0:
            self._library = library

    def joules(self) -> float | None:
        """The counter in joules, or None where there is none; the driver renews it every 20 to 100 ms."""
        total = ctypes.c_ulonglong()
        if self._library is None:
            return None
        if self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(total)) != 0:
            return None
        return 1e-3 * total.value
