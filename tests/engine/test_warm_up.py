"""The warm-up: everything that a first answer would wait for runs, and nothing of it stays."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from octo_run.engine import Engine, SamplingParams
from octo_run.engine.warm_up import STEPS, warm_up
from octo_run.models.config import ModelConfig
from octo_run.models.families import DeltaFields

from .conftest import TINY

triton = pytest.importorskip("triton", reason="Triton is not installed")
PARAMS = SamplingParams(temperature=0.8, seed=3, max_tokens=30, repetition_penalty=1.1)
WINDOWED = replace(TINY, layer_types=("sliding_attention", "full_attention"), sliding_window=100)
RECURRENT = replace(
    TINY, architecture="Qwen3_5ForCausalLM", rope_share=0.25, qk_norm=True,
    layer_types=("linear_attention", "full_attention"), delta=DeltaFields(1, 2, 16, 16, 4),
)  # fmt: skip
ON_A_GPU = """
import sys

import triton

from octo_run import Engine, SamplingParams
from octo_run.engine.warm_up import warm_up

params = SamplingParams(temperature=0.8, seed=1, max_tokens=40)
engine = Engine.load("octo-demo", kv=sys.argv[1], device="cuda", max_context=2048)
told, late = [], []
warm_up(engine, params, lambda: told.append(1))
triton.knobs.compilation.listener = lambda **about: late.append(about["src"].name)
list(engine.generate("I want to book a table for two in San Jose tonight, and the gulls followed us.", params))
print(len(told), late)
"""


def fail() -> None:
    raise AssertionError("nothing was compiled")


@pytest.mark.parametrize(
    ("kv", "context", "cfg"),
    [("bf16", 500, TINY), ("oct3", 500, TINY), ("oct3", 260, TINY), ("bf16", 5, TINY), ("bf16", 1, TINY),
     ("oct3", 500, WINDOWED), ("oct3", 500, RECURRENT)],
)  # fmt: skip
def test_nothing_stays(tiny: Callable[..., Engine], kv: str, context: int, cfg: ModelConfig) -> None:
    """No sequence, page or prefix; the answer reads its whole prompt and is that of an engine just loaded."""
    engine, other = tiny(kv, context, cfg=cfg), tiny(kv, context, cfg=cfg)
    warm_up(engine, PARAMS, fail)
    table = engine.arena.table
    assert table.rows == [None] and len(table.kept) == 0
    assert all(pool.free == len(pool) for pool in (table.pool, *(window.pool for window in table.windows)))
    prompt = [256, *b"A line:"][:context]
    said, wanted = (one.generate(prompt, PARAMS) for one in (engine, other))
    assert [token.id for token in said] == [token.id for token in wanted]
    assert said.reused_tokens == 0 and said.read_tokens == len(prompt)


def test_pages_are_filled_read_and_coded(tiny: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the beginning of a conversation, before there are pages, and as in a long one: two chunks, the second one
    behind packed pages, and a page between the steps."""
    engine = tiny("oct3")
    chunks, steps, coded = list[tuple[int, int]](), list[int](), list[int]()
    read, launch, code = engine.forward.chunks, engine.step.launch, engine.arena.code_oldest

    def seen(given: list[Any]) -> Any:
        chunks.extend((chunk.count, chunk.sequence.packed) for chunk in given)
        return read(given)

    monkeypatch.setattr(engine.forward, "chunks", seen)
    monkeypatch.setattr(engine.step, "launch", lambda given: (steps.append(len(given[0])), launch(given)))
    monkeypatch.setattr(engine.arena, "code_oldest", lambda *given: (coded.append(1), code(*given)))
    warm_up(engine, PARAMS, fail)
    assert chunks == [(32, 0), (320, 0), (63, 3)] and coded == [1]
    assert steps == [32, 33, 34, 383, 384, 385] and len(steps) == 2 * STEPS


def test_rules_of_the_answers_are_those_of_the_steps(tiny: Callable[..., Engine]) -> None:
    engine = tiny()
    warm_up(engine, PARAMS, fail)
    noisy = engine.step.sampler.kind
    warm_up(engine, replace(PARAMS, temperature=0.0, repetition_penalty=1.0), fail)
    assert noisy[:2] == (True, True) and engine.step.sampler.kind[:2] == (False, False)


@pytest.mark.parametrize("failure", [RuntimeError("no compiler"), KeyboardInterrupt()])
def test_nothing_stays_of_one_that_fails(
    tiny: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    engine, listener = tiny("oct3"), triton.knobs.compilation.listener

    def launch(_: object) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(engine.step, "launch", launch)
        with pytest.raises(type(failure)):
            warm_up(engine, PARAMS, fail)
    table = engine.arena.table
    assert table.rows == [None] and table.pool.free == len(table.pool)
    assert triton.knobs.compilation.listener is listener
    warm_up(engine, PARAMS, fail)


def test_it_is_told_once_that_kernels_are_compiled(
    tiny: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, told = tiny(), list[int]()
    launch = engine.step.launch

    def compiling(given: list[Any]) -> None:
        triton.knobs.compilation.listener(cache_hit=len(told) > 0)  # as Triton calls it
        launch(given)

    monkeypatch.setattr(engine.step, "launch", compiling)
    warm_up(engine, PARAMS, lambda: told.append(1))
    assert told == [1]


@pytest.mark.gpu
@pytest.mark.parametrize("kv", ["oct3", "bf16"])
def test_an_answer_compiles_nothing_after_it(tmp_path: Path, kv: str) -> None:
    """In a process of its own, with an empty cache: the warm-up compiles, the answer finds everything there."""
    done = subprocess.run(
        [sys.executable, "-c", ON_A_GPU, kv], capture_output=True, text=True, timeout=500,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "1 []", "kernels that the answer compiled"
