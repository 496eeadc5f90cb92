"""Runs the Triton cases of the kernel tests under Triton's interpreter, in a process of their own.

The interpreter must be chosen before Triton is imported, and other tests of this process may have imported it.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


#: Kinds of kernels, and in how many parts their cases run, so that none takes many minutes.
PARTS = {
    "attention": 4, "batch": 1, "encode": 4, "linear": 1, "octopus": 1, "page": 1, "recurrent": 1, "step": 4,
    "trellis": 1,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("kind", "share"), [(kind, f"{part}/{parts}") for kind, parts in PARTS.items() for part in range(parts)]
)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_interpreted(kind: str, share: str) -> None:
    file = HERE / f"test_{kind}_kernels.py"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-k", "triton", "--share", share, "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "skipped" not in run.stdout, run.stdout[-500:]
