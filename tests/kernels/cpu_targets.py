"""Instruction sets that the CPU kernels are compiled for in tests."""

import ctypes
from pathlib import Path

import pytest

from octo_run.kernels.cpu import native

#: Values of -march, and the flag of the machine that each needs.
TARGETS = {
    "native": "",
    "x86-64-v2": "sse4_2",
    "x86-64-v3": "avx2",
    "alderlake": "avx_vnni",
    "skylake-avx512": "avx512bw",
    "icelake-server": "avx512_vnni",
}


def kernels_of(name: str) -> ctypes.CDLL:
    """Kernels compiled for a target; skips the test where they cannot run."""
    if native.compiler() is None:
        pytest.skip("there is no C++ compiler")
    cpuinfo = Path("/proc/cpuinfo")
    if TARGETS[name] and (not cpuinfo.is_file() or TARGETS[name] not in cpuinfo.read_text().split()):
        pytest.skip(f"this machine has no {TARGETS[name]}")
    return native.load(native.build(name))
