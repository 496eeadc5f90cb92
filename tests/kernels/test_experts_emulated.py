"""The fused products with packed experts, run on the CPU by `lane_emulator`, against the values' own products."""

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octo_run.kernels.experts import launch, reference
from octo_run.kernels.experts.weights import FEW, tile_count
from octo_run.kernels.linear import PackedWeight

HERE = Path(__file__).parent
emulator = SimpleNamespace(**runpy.run_path(str(HERE / "lane_emulator.py")))
shared = SimpleNamespace(**runpy.run_path(str(HERE / "test_experts.py")))


@pytest.fixture(scope="module")
def emulated() -> Any:
    kernel = emulator.kernel_modules()["packed_product"].packed_experts_kernel
    return {watched: emulator.Kernel(kernel, watched=watched) for watched in (False, True)}


def on_a_gpu(weight: PackedWeight) -> PackedWeight:
    """The weight with scales and offsets as they lie on a GPU."""
    parts = {name: getattr(weight, name) for name in ("scales", "offsets")}
    return replace(weight, **{k: None if v is None else v.t().contiguous().t() for k, v in parts.items()})


def sort_by_hand(scratch: Any, experts: int) -> int:
    """What `choose_kernel` or the sorting kernels leave: pairs by expert, and tiles of them. Of a tile that nobody
    needs only the expert is written."""
    flat = scratch.indices.flatten()
    scratch.order.copy_(torch.argsort(flat, stable=True))
    tiles, first = [], 0
    for expert, count in enumerate(torch.bincount(flat, minlength=experts).tolist()):
        tiles += [(expert, first + i, first + min(i + FEW, count)) for i in range(0, count, FEW)]
        first += count
    most = tile_count(len(flat), experts, FEW)
    scratch.tiles[: len(tiles)] = torch.tensor(tiles)
    scratch.tiles[len(tiles) : most, 0] = -1
    return most


@pytest.mark.parametrize("packed", [*shared.PACKED, ("int4", None), ("int8", 32)], ids=str)
@pytest.mark.parametrize(
    ("rows", "dtype", "activation", "sizes"),
    [
        (1, torch.bfloat16, "silu", (136, 640)),
        (11, torch.float16, "clamped_silu", (136, 200)),
        (2, torch.bfloat16, "gelu_tanh", (512, 1024)),  # the warps have all as many blocks
        (3, torch.bfloat16, "clamped_silu", (1352, 264)),  # an odd number each
    ],
)
def test_the_fused_products_are_those_of_the_values(
    emulated: Any, monkeypatch: pytest.MonkeyPatch, packed: Any, rows: int, dtype: torch.dtype, activation: str,
    sizes: tuple[int, int],
) -> None:  # fmt: skip
    watched = packed in (("int4", 64), ("fp8", None))  # for threads that meet in shared memory; it takes its time
    monkeypatch.setattr(launch, "packed_experts_kernel", emulated[watched])
    layer = shared.Layer(
        rows, packed=packed, hidden=sizes[0], inner=sizes[1], biased=rows > 1, activation=activation, dtype=dtype,
        seed=rows, experts=4,
    )  # fmt: skip
    parts = {name: on_a_gpu(getattr(layer.weights, name)) for name in ("gate_up", "down")}
    layer.weights = replace(layer.weights, **parts)
    reference.route(layer.x, layer.router, layer.bias, layer.normalised, layer.scratch)
    tiles = sort_by_hand(layer.scratch, 4)
    for name, taken, made in (
        ("gate_up", layer.x, layer.scratch.inner), ("down", layer.scratch.inner, layer.scratch.parts),
    ):  # fmt: skip
        warps = 8 if rows == 11 else 4
        turns = -(-taken.shape[1] // (128 * warps))
        how = launch.Tiling(warps, turns, 2 if turns < 3 else 1, 1)
        launch.fused_product(taken, layer.weights, name, layer.scratch, made, tiles, how)
    layer.out.copy_(reference.combined(layer.scratch, rows, None))
    layer.check(2e-2 if dtype == torch.bfloat16 else 4e-3)


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ((200, 136), [("gate_up", False), ("down", True)]),
        ((200, 4992), ["gate_up of many", ("down", False)]),  # what is in front lets it begin too early
        ((4992, 136), [("gate_up", False), "down of many"]),
    ],
)
def test_codes_are_fetched_ahead_behind_the_same_kernel_only(
    monkeypatch: pytest.MonkeyPatch, columns: tuple[int, int], wanted: list[Any]
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(launch, "runs_ptx", lambda _device: True)
    monkeypatch.setattr(launch, "_sorted", lambda _scratch, _rows: 2)
    monkeypatch.setattr(launch, "_combine", lambda *_: None)
    monkeypatch.setattr(launch, "fused_product", lambda *given, known: made.append((given[2], known)))
    monkeypatch.setattr(launch, "_grouped", lambda *given: made.append(f"{given[2]} of many"))
    layer = shared.Layer(1, packed=("fp4", 32), hidden=columns[1], inner=columns[0], dtype=torch.bfloat16)
    parts = {name: on_a_gpu(getattr(layer.weights, name)) for name in ("gate_up", "down")}
    layer.weights = replace(layer.weights, **parts)
    launch.mix(layer.x, layer.weights, layer.scratch, layer.out)
    assert made == wanted
