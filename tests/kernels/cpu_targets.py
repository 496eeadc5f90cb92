"""Instruction sets that the CPU kernels are compiled for in tests."""

import ctypes
import hashlib
from pathlib import Path

import pytest

from octo_run.kernels.cpu import native

HERE = Path(__file__).parent
#: Values of -march, and the flag of the machine that each needs.
MARCH = {
    "native": "",
    "x86-64-v2": "sse4_2",
    "x86-64-v3": "avx2",
    "alderlake": "avx_vnni",
    "skylake-avx512": "avx512bw",
    "icelake-server": "avx512_vnni",
}
#: Instructions by loops, for a machine with AVX2 but without the flag: which they are in `emulated_instructions.h`.
EMULATED = {
    "emulated AVX-512": (1, "avx512bw"),
    "emulated VNNI": (2, "avx512_vnni"),
    "emulated AMX": (3, "amx_int8"),
    "emulated AVX2 VNNI": (4, "avx_vnni"),
}
#: Parameters of a fixture: names for `kernels_of`.
TARGETS = [*MARCH, *EMULATED]


def kernels_of(name: str) -> ctypes.CDLL:
    """Kernels compiled for a target; skips the test where they cannot run."""
    if native.compiler() is None:
        pytest.skip("there is no C++ compiler")
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split() if cpuinfo.is_file() else ())
    if (needs := MARCH.get(name, "avx2")) and needs not in flags:
        pytest.skip(f"this machine has no {needs}")
    if name in MARCH:
        return native.load(native.build(name))
    number, real = EMULATED[name]
    if real in flags:
        pytest.skip(f"this machine has {real} itself")
    header = HERE / "emulated_instructions.h"
    digest = int.from_bytes(hashlib.sha256(header.read_bytes()).digest()[:4], "big")  # in the library's name, so
    options = ("-include", str(header), f"-DEMULATED={number}", f"-DDIGEST={digest}", "-O2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_FLAGS", native._FLAGS + options)
        return native.load(native.build("x86-64-v3"))
