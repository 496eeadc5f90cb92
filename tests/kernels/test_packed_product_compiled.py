"""The product with a packed weight compiles for a Hopper GPU; none is needed."""

import inspect
import os
import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from octo_run.kernels.linear import launch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

made = runpy.run_path(str(Path(__file__).parent / "packed_weights.py"))["made"]
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

TYPES = {torch.uint8: "u8", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}


class Compiled:
    """In place of the kernel: compiles it as a launch would."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, _grid: Any) -> Any:
        def launch(*, num_warps: int, maxnreg: int | None = None, **named: Any) -> None:
            named.pop("launch_pdl", None)
            names = inspect.signature(self.kernel.fn).parameters
            constants = {n: v for n, v in named.items() if names[n].annotation is not inspect.Parameter.empty}
            kinds = {n: v.dtype if isinstance(v, torch.Tensor) else None for n, v in named.items()}
            types = {n: "i32" if kind is None else f"*{TYPES[kind]}" for n, kind in kinds.items()}
            types |= dict.fromkeys(constants, "constexpr")
            source = GluonASTSource(self.kernel, {name: types[name] for name in names}, constants, {})
            self.built = triton.compile(
                source,
                target=GPUTarget("cuda", 90, 32),
                options={"num_warps": num_warps} | ({} if maxnreg is None else {"maxnreg": maxnreg}),
            )

        return launch

    def spilled(self, tmp_path: Path) -> int:
        """Bytes a thread keeps in local memory."""
        file = tmp_path / "kernel.cubin"
        file.write_bytes(self.built.asm["cubin"])
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        found = subprocess.run([tools / "cuobjdump", "-res-usage", file], capture_output=True, text=True, check=True)
        (stack,) = re.findall(r"STACK:(\d+)", found.stdout + found.stderr)
        return int(stack)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """What compiles in place of the kernel, as for a launch on Hopper."""
    found = Compiled(launch.streamed_product_kernel)
    monkeypatch.setattr(launch, "streamed_product_kernel", found)
    monkeypatch.setattr(launch, "early", lambda _device: {"EARLY": True, "launch_pdl": True})
    return found


@pytest.mark.parametrize(
    ("kind", "group", "columns", "rows"),
    [
        ("int4", 128, 4096, 1),
        ("int4", 64, 4096, 16),
        ("int4", None, 576, 1),
        ("int8", None, 4096, 1),
        ("fp8", None, 14336, 9),
        ("fp4", 32, 2048, 1),
        ("fp4", 16, 4096, 16),
    ],
)
def test_it_compiles(kind: str, group: int | None, columns: int, rows: int, tmp_path: Path, compiled: Compiled) -> None:
    for swiglu in (False, True) if group == 128 else (False,):
        weight = made(kind, 64, columns, group, kind == "int4", 0)
        x = torch.zeros(rows, columns, dtype=torch.bfloat16)
        launch.fused(x, weight, None, x.new_empty(rows, 32 if swiglu else 64), swiglu=swiglu)
        assert compiled.spilled(tmp_path) <= (128 if rows > 8 else 0)
