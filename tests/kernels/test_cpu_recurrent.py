"""The CPU's recurrent step against the recurrence in float64, outputs and states poisoned."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from octo_run.kernels.cpu import recurrent
from octo_run.kernels.recurrent import DeltaShape

_here = Path(__file__).parent
_targets = runpy.run_path(str(_here / "cpu_targets.py"))
_cases: dict[str, Any] = runpy.run_path(str(_here / "test_recurrent_kernels.py"))
SHAPES = [*_cases["SHAPES"], DeltaShape(2, 6, 20, 24, 3)]


@pytest.fixture(autouse=True, params=["native", "x86-64-v2", "x86-64-v3"])
def _target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _targets["kernels_of"](request.param)
    monkeypatch.setattr(recurrent, "library", lambda: found)


def step(*arguments: Any) -> None:
    assert recurrent.step(*arguments)


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_the_recurrence(shape: DeltaShape) -> None:
    case = _cases["Case"](shape, 40, torch.float32)
    want, memory = case.exact()
    _cases["close"](_cases["run_steps"](step, case, 40), want, torch.float32)
    _cases["close"](case.state.memory[2], memory, torch.float32)
    assert bool(case.state.memory[[0, 1, 3, 4]].isnan().all() and case.state.conv[[0, 1, 3, 4]].isnan().all())


@pytest.mark.parametrize(("rows", "at"), _cases["BATCHES"])
@pytest.mark.parametrize("threads", [1, 3])
def test_steps_the_rows_of_a_batch(
    rows: list[int], at: list[int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    case = _cases["Case"](SHAPES[2], 91, torch.float32)
    want, _ = case.exact()
    out = _cases["batch_step"](step, case, rows, at)
    for number, row in enumerate(rows):
        if row < 0:
            assert bool((out[number] == 0).all())
        else:
            _cases["close"](out[number], want[at[number]], torch.float32)


def test_other_dtypes_and_layouts_are_left_to_the_reference() -> None:
    case = _cases["Case"](SHAPES[0], 2, torch.bfloat16)
    arguments = case.weights, case.state, torch.zeros(2, dtype=torch.int32), torch.tensor([1, 2], dtype=torch.int32)
    assert not recurrent.step(case.projected, case.gates, *arguments, case.out(2))
