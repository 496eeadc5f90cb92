"""The scripts as modules, and as programs whose kernels are interpreted."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
#: For ``interpreted``: a script's pool is a thread, which knows what was replaced.
THREAD = "lambda count, mp_context: __import__('concurrent.futures').futures.ThreadPoolExecutor(1)"


@pytest.fixture(scope="session")
def script() -> Iterator[Callable[[str], ModuleType]]:
    """``script(name)``: a script of this project, imported as it is when it runs: its folder comes first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
        yield import_module


@pytest.fixture
def interpreted(tmp_path: Path) -> Callable[..., tuple[list[dict[str, Any]], str]]:
    """``interpreted(name, *argv, CONSTANT="code", ...)``: run a measuring script in a process whose Triton kernels are
    interpreted, some of its names replaced; returns its rows (--json) and its report (--markdown)."""
    pytest.importorskip("triton", reason="Triton is not installed")

    def run(name: str, *argv: str, **changes: str) -> tuple[list[dict[str, Any]], str]:
        rows, text = tmp_path / f"{name}.json", tmp_path / f"{name}.md"
        lines = [f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import {name} as bench"]
        lines += [f"bench.{constant} = {code}" for constant, code in changes.items()]
        lines.append(f"sys.exit(bench.main({[*argv, '--json', str(rows), '--markdown', str(text)]!r}))")
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(lines)],
            env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return json.loads(rows.read_text()), text.read_text()

    return run
