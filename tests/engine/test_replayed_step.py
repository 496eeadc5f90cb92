"""Decode steps on a CPU are recorded, and give the tokens of steps that are not, on one thread and on two."""

from collections.abc import Iterator

import pytest
import torch

from octo_run.engine import Engine, SamplingParams
from octo_run.kernels.cpu import library


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    if library() is None:
        pytest.skip("the CPU's kernels are not compiled here")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def answer(engine: Engine, temperature: float) -> list[int]:
    params = SamplingParams(max_tokens=60, temperature=temperature, seed=3)
    return [token.id for token in engine.generate("Once upon a time there was a king. " * 12, params)]


@pytest.mark.few("0.0-oct3-int8")
@pytest.mark.parametrize("weights", [None, "bf16", "int8", "int4"])
@pytest.mark.parametrize("kv", ["oct3", "bf16"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_recorded_step_is_the_step(
    monkeypatch: pytest.MonkeyPatch, weights: str | None, kv: str, temperature: float
) -> None:
    head = "int8" if weights == "int8" else "bf16"  # as the program would choose
    engine = Engine.load(kv=kv, max_context=400, device="cpu", dtype="float32", weights=weights, head=head)
    torch.set_num_threads(1)
    found = answer(engine, temperature)
    assert len(found) > 20, "too short to be recorded"
    replays = engine.forward._replays
    assert replays.refused == {} and len(replays._known) == 1
    torch.set_num_threads(2)
    assert answer(engine, temperature) == found
    assert len(replays._known) == 2
    monkeypatch.setattr(type(replays), "run", lambda _self, _key, work: work())
    assert answer(engine, temperature) == found
