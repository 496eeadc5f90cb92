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
#: Instructions by loops, on a machine with AVX2, and which they are in `emulated_instructions.h`.
EMULATED = {"emulated AVX-512": 1, "emulated VNNI": 2, "emulated AMX": 3, "emulated AVX2 VNNI": 4}
#: Parameters of a fixture: names for `kernels_of`.
TARGETS = [*MARCH, *EMULATED]


def kernels_of(name: str) -> ctypes.CDLL:
    """Kernels compiled for a target; skips the test where they cannot run."""
    if native.compiler() is None:
        pytest.skip("there is no C++ compiler")
    needs = MARCH.get(name, "avx2")
    cpuinfo = Path("/proc/cpuinfo")
    if needs and (not cpuinfo.is_file() or needs not in cpuinfo.read_text().split()):
        pytest.skip(f"this machine has no {needs}")
    if name in MARCH:
        return native.load(native.build(name))
    header = HERE / "emulated_instructions.h"
    digest = int.from_bytes(hashlib.sha256(header.read_bytes()).digest()[:4], "big")  # in the library's name, so
    flags = ("-include", str(header), f"-DEMULATED={EMULATED[name]}", f"-DDIGEST={digest}", "-O2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_FLAGS", native._FLAGS + flags)
        return native.load(native.build("x86-64-v3"))
