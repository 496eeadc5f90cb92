"""Divisions of products with packed weights and of experts: all are checked and timed, and the chosen one is marked.

What they cost only a GPU tells. Here Triton kernels are interpreted, and those written lane by lane are emulated.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EMULATOR = Path(__file__).parents[1] / "kernels" / "lane_emulator.py"
Run = Callable[..., tuple[list[dict[str, Any]], str]]


def emulated(module: str, kernel: str) -> dict[str, str]:
    """The changes that let a kernel be emulated."""
    load = f"__import__('runpy').run_path({str(EMULATOR)!r})"
    code = f"(lambda e: e['Kernel'](e['kernel_modules']()[{module!r}].{kernel}))({load})"
    return {f"launch.{kernel}": code, "launch.runs_ptx": "lambda device: True", "copy_bandwidth": "lambda device: 1e9"}


def test_slices_and_programs_have_room_to_meet(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = script("bench_packed_products")
    from octo_run.kernels.linear import empty, launch

    monkeypatch.setattr(launch, "runs_ptx", lambda _device: True)
    for out, columns in ((4096, 14336), (6144, 4096), (600_000, 14336), (128256, 4096)):
        x = torch.empty(1, columns, dtype=torch.bfloat16, device="meta")
        found, chosen = bench.divisions(x, empty("int8", (out, columns), None, False, "meta"))
        assert chosen == (None if out == 600_000 else launch.tiling(columns // 128)), "its slices would have no room"
        assert (chosen is None or chosen in found) and len(found) == len({*found})
        for how in found:
            assert how.slices * how.warps * how.turns * 128 >= columns
            assert how.slices == 1 or how.slices * out <= launch.PARTS
            assert how.slices == 1 or how.programs <= how.slices  # a counter for each program, one a multiprocessor


def test_tilings_need_the_kernel_that_they_divide(
    script: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = script("bench_packed_products")
    monkeypatch.setattr(bench, "runs_ptx", lambda _device: False)
    with pytest.raises(SystemExit):
        bench.main(["--tilings"])
    assert "--tilings needs an NVIDIA GPU" in capsys.readouterr().err


def test_a_wrong_division_is_not_timed(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = script("bench_experts")
    from octo_run.kernels.experts import launch, reference

    def mix(x: Any, weights: Any, scratch: Any, out: Any, shared: Any = None, divisions: Any = None) -> None:
        reference.mix(x, weights, scratch, out, shared)
        if divisions is not None and divisions["down"].outputs == 2:
            out *= 1.1

    monkeypatch.setattr(bench, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(bench, "SHAPES", {"tiny": (3, 2, 32, 16, "silu")})
    monkeypatch.setattr(bench, "VECTORS", [(2, 256, 4)])
    monkeypatch.setattr(bench, "ROTATE_BYTES", 1)
    monkeypatch.setattr(launch, "route", reference.route)
    monkeypatch.setattr(launch, "mix", mix)
    steps = [step.what for step in bench.Case("tiny", "bf16", 1).steps(tilings=True)]
    assert steps[3:] == [
        "gate_up: 2 outputs by 256 columns, 4 warps", "gate_up: 1 outputs by 1024 columns, 4 warps (chosen)",
        "down: 4 outputs by 256 columns, 4 warps (chosen)",
    ]  # fmt: skip
    assert capsys.readouterr().err.startswith("down: 2 outputs by 256 columns, 4 warps: relative error ")
    monkeypatch.setattr(launch, "mix", lambda *_: None)
    with pytest.raises(ValueError, match="relative error inf"):
        bench.Case("tiny", "bf16", 1)


@pytest.mark.slow
def test_divisions_of_a_product(interpreted: Run) -> None:
    changes = emulated("streamed_product", "streamed_product_kernel") | {"runs_ptx": "lambda device: True"}
    changes |= {"TILINGS": "[(4, 1, 1, 1), (8, 2, 2, 1)]", "ROTATE_BYTES": "1", "REPEATS": "1"}
    argv = ("--shapes", "24x1152", "--rows", "1,9", "--kinds", "int8", "--peers", "", "--tilings")
    rows, text = interpreted("bench_packed_products", *argv, **changes)
    whats = [
        "bf16 library",
        "int8",
        "int8, 4 warps of 1 blocks, 1 ahead, 3 slices, 1 programs",
        "int8, 8 warps of 2 blocks, 2 ahead, 1 slices, 1 programs (chosen)",
    ]
    assert [(row["rows"], row["what"]) for row in rows] == [(count, what) for count in (1, 9) for what in whats]
    assert all(0 < row["error"] < 4e-3 for row in rows if "int8" in row["what"])
    assert "| 24x1152 | 9 | int8, 4 warps of 1 blocks" in text


@pytest.mark.slow
def test_divisions_of_experts(interpreted: Run) -> None:
    changes = emulated("packed_product", "packed_experts_kernel") | {"ROTATE_BYTES": "1", "REPEATS": "1"}
    changes |= {"TILINGS": "[(4, 1, 1)]", "VECTORS": "[(2, 16, 2), (1, 1024, 4)]"}
    changes["SHAPES"] = "{'tiny': (3, 2, 32, 16, 'silu')}"
    argv = ("--shapes", "tiny", "--kinds", "bf16,int8", "--rows", "1", "--tilings")
    rows, _ = interpreted("bench_experts", *argv, **changes)
    whats = {
        "bf16": ["gate_up: 2 outputs by 16 columns, 2 warps", "gate_up: 1 outputs by 1024 columns, 4 warps (chosen)",
                 "down: 2 outputs by 16 columns, 2 warps", "down: 1 outputs by 1024 columns, 4 warps",
                 "down: 4 outputs by 256 columns, 4 warps (chosen)"],
        "int8": ["gate_up: 4 warps of 1 blocks, 1 ahead, 1 programs",
                 "gate_up: 8 warps of 1 blocks, 2 ahead, 2 programs (chosen)",
                 "down: 4 warps of 1 blocks, 1 ahead, 1 programs",
                 "down: 8 warps of 1 blocks, 2 ahead, 2 programs (chosen)"],
    }  # fmt: skip
    for kind, divisions in whats.items():
        found = [row for row in rows if row["kind"] == kind]
        assert [row["what"] for row in found] == ["layer", "router", "products and sum", *divisions]
        assert all(0 < row["error"] < 1.5e-2 and row["microseconds"] > 0 for row in found)
        assert [row["tflops"] is None for row in found[:3]] == [False, True, False]
