"""What weights are stored as when nobody says: int8 on a CPU with compiled kernels, and it is told."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octo_run.cli import runtime
from octo_run.cli.options import EngineOptions
from octo_run.kernels import cpu

ASKED = EngineOptions("octo-demo", "oct3", None, 256, "cpu", None, True, None)


def stored(**changes: Any) -> tuple[str | None, str | None]:
    found = runtime.resolved(replace(ASKED, **changes))
    return found.weights, found.head


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library", lambda: object())


def test_unasked_they_are_int8_on_a_cpu() -> None:
    assert stored() == ("int8", "int8")
    assert stored(weights="auto") == ("auto", "bf16") and stored(weights="bf16") == ("bf16", "bf16")
    assert stored(head="bf16") == (None, "bf16") and stored(weights="int4", head="int8") == ("int4", "int8")


def test_what_is_resolved_stays_so() -> None:
    found = runtime.resolved(ASKED)
    assert runtime.resolved(found) == found


def test_without_compiled_kernels_they_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert stored() == ("auto", "bf16")


def test_random_weights_are_those_of_their_shape() -> None:
    assert runtime.resolved(replace(ASKED, model="none/such"), "llama-3.1-8b").weights == "int8"
    assert runtime.resolved(replace(ASKED, model="none/such"), "mixtral-8x7b").weights == "auto", "it has experts"


def test_it_is_told_once(octo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(runtime, "_said", set())
    monkeypatch.setattr(runtime, "_planned", set())
    if cpu.library() is None:
        pytest.skip("the CPU's kernels are not compiled here")
    shown = octo("generate", "-p", "Once", "-n", "2", "--ctx", "256", "--device", "cpu", "--temp", "0")
    assert shown.code == 0 and shown.err.count("weights in int8, as a CPU is slow to read them; --weights bf16") == 1
    runtime._planned.clear()
    asked = octo("generate", "-p", "Once", "-n", "2", "--ctx", "256", "--device", "cpu", "--weights", "fp32")
    assert asked.code == 0 and "as a CPU is slow" not in asked.err and "weights fp32" in asked.err


@pytest.mark.few("experts")
@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"architectures": ["MixtralForCausalLM"], "num_local_experts": 3, "num_experts_per_tok": 2}, 1),
        (
            {
                "architectures": ["Qwen3_5ForCausalLM"], "num_hidden_layers": 4, "linear_key_head_dim": 32,
                "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
            },
            1,
        ),
        ({}, 0),
    ],
    ids=["experts", "recurrent", "dense"],
)  # fmt: skip
def test_16_bits_that_change_nothing_are_told(
    octo: Callable[..., Any], make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
    model: dict[str, Any], told: int,
) -> None:  # fmt: skip
    monkeypatch.undo()
    monkeypatch.setattr(runtime, "_said", set())
    monkeypatch.setattr(runtime, "_planned", set())
    path = make_checkpoint(**({"model_type": None} | model if model else {}))
    argv = ("-p", "Once", "-n", "1", "--ctx", "256", "--device", "cpu", "--conditioning", "off", "--weights", "bf16")
    run = octo("generate", "-m", str(path), *argv)
    said = "--weights bf16 changes nothing: weights of a model with experts or recurrent layers are in the dtype of the"
    assert run.code == 0 and run.err.count(said) == told, run.err
    assert ("weights fp32" if told else "weights bf16") in run.err


def test_a_benchmark_names_threads_and_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "path_name", lambda: "AVX2")
    engine = SimpleNamespace(device=torch.device("cpu"))
    assert re.fullmatch(r"cpu \(\d+ threads?, AVX2\)", runtime.device_name(engine))  # type: ignore[arg-type]
