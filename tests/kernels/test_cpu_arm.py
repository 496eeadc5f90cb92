"""The CPU kernels on ARM, under an emulator, against double; on this machine likewise, so that the check is checked."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from octo_run.kernels.cpu import native

HERE = Path(__file__).parent
BOUNDS = {"int8": 3e-5, "fp32": 1e-6, "bf16": 1e-6, "attention": 1e-5}
ARM = ["aarch64-linux-gnu-g++", "-static"], ["qemu-aarch64"]
_NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
HOST = [*(native.compiler() or [""]), _NATIVE], []


@pytest.mark.slow
@pytest.mark.parametrize(("compiler", "runner"), [ARM, HOST], ids=["arm", "host"])
def test_products_and_attention_are_right(compiler: list[str], runner: list[str], tmp_path: Path) -> None:
    missing = [name for name in (compiler[0], *runner) if not name or shutil.which(name) is None]
    if missing:
        pytest.skip(f"there is no {missing[0] or 'C++ compiler'}")
    sources = [native._SOURCE / f"{name}.cpp" for name in ("linear", "attention", "threads")]
    program = tmp_path / "check"
    command = [*compiler, *native._FLAGS, "-O1", f"-I{native._SOURCE}", *map(str, sources)]
    subprocess.run([*command, str(HERE / "cpu_check.cpp"), "-o", str(program)], check=True, timeout=300)
    done = subprocess.run([*runner, str(program)], capture_output=True, text=True, check=True, timeout=300)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _ in lines] == ["int8", "fp32", "bf16"] * 2 + ["attention"] * 2
    assert all(float(error) < BOUNDS[name] for name, error in lines), done.stdout
