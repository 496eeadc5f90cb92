"""Random programs on an engine with recurrent layers: whatever happened, a sequence goes on as in a fresh engine."""

import contextlib
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from octo_run import kernels
from octo_run.engine import Engine, SamplingParams
from octo_run.engine.pool import PoolExhausted
from octo_run.engine.sequence import Sequence
from octo_run.errors import OctoError
from octo_run.kernels import recurrent
from octo_run.models.config import ModelConfig
from octo_run.models.families import DeltaFields

CFG = ModelConfig(
    architecture="Qwen3_5ForCausalLM", vocab_size=260, hidden_size=48, intermediate_size=64, num_layers=3, num_heads=3,
    num_kv_heads=1, head_dim=64, max_position_embeddings=2048, rms_norm_eps=1e-6, rope_theta=1e4, rope_share=0.25,
    qk_norm=True, layer_types=("linear_attention", "linear_attention", "full_attention"),
    delta=DeltaFields(1, 2, 16, 16, 4),
)  # fmt: skip
SETTINGS: dict[str, Any] = {"context": 460, "sink": 16, "window": 64, "cfg": CFG}
GREEDY = SamplingParams()


class Struck(BaseException):
    """An interrupt."""


def remember(weights: dict[str, torch.Tensor]) -> None:
    """States that last."""
    for name, weight in weights.items():
        if name.endswith("A_log"):
            weight.fill_(-5)


class Program:
    """Runs random operations, some of which are struck in the middle of the layers."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine, self.source = engine, random.Random(seed)
        base = [self.source.randrange(256) for _ in range(330)]
        self.texts = [base, base[:150] + [self.source.randrange(256) for _ in range(200)], base[:40] + base[100:]]
        self.fail_in: int | None = None
        self.struck = 0

    def strike(self) -> None:
        if self.fail_in is not None:
            self.fail_in -= 1
            if self.fail_in < 0:
                self.fail_in = None
                self.struck += 1
                raise Struck

    def live(self) -> list[Sequence]:
        return [seq for seq in self.engine.arena.table.rows if seq is not None and seq.pinned]

    def run(self, count: int, fresh: Engine) -> None:
        for _ in range(count):
            self.fail_in = self.source.randrange(12) if self.source.random() < 0.25 else None
            (work,) = self.source.choices(
                [self.open, self.feed, self.step, self.cut, self.end], weights=[4, 5, 6, 2, 2]
            )
            with contextlib.suppress(PoolExhausted, Struck):
                work()
            self.fail_in = None
        for sequence in self.live():
            self.check(sequence, fresh)

    def open(self) -> None:
        text = self.source.choice(self.texts)
        ids = text[: self.source.choice([self.source.randrange(1, len(text)), len(text)])]
        try:
            sequence = self.engine.arena.open(ids)
        except OctoError:
            assert len(self.live()) == 4
            return
        assert sequence.ids == ids[: len(sequence)] and len(sequence) < len(ids)
        self.engine.prefill(sequence, ids[len(sequence) :])

    def feed(self) -> None:
        if live := self.live():
            sequence = self.source.choice(live)
            known = sequence.ids
            if room := 459 - len(known):
                ids = self.source.choices(range(256), k=self.source.randrange(1, min(room, 90) + 1))
                self.engine.prefill(sequence, ids)
                assert sequence.ids == known + ids

    def step(self) -> None:
        able = [seq for seq in self.live() if 0 < len(seq) < 440]
        if not able:
            return
        chosen = self.source.sample(able, self.source.randrange(1, len(able) + 1))
        for sequence in chosen:
            if self.source.random() < 0.5 or not sequence.ready:
                known = sequence.ids
                self.engine.step.start(sequence, self.source.randrange(256), GREEDY)
                assert sequence.ids == known
            while sequence.unread:
                self.engine.step.read(sequence)
        for _ in range(self.source.randrange(1, 6)):
            self.engine.step.launch(chosen)
        for sequence in chosen:
            for _ in range(self.source.randrange(len(sequence.unread) + 1)):
                self.engine.step.read(sequence)

    def cut(self) -> None:
        if live := self.live():
            sequence = self.source.choice(live)
            assert sequence.cut(self.source.randrange(len(sequence) + 1)) == len(sequence) == len(sequence.ids)

    def end(self) -> None:
        if live := self.live():
            sequence = self.source.choice(live)
            sequence.close() if self.source.random() < 0.85 else sequence.discard()

    def check(self, sequence: Sequence, fresh: Engine) -> None:
        ids = [*sequence.ids, 7]
        if len(ids) < 460:
            with contextlib.suppress(PoolExhausted):
                found = self.engine.prefill(sequence, [7])
                assert float((found - fresh.logits(ids)[-1]).abs().max()) < 1e-4


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """Programs in this list may strike wherever something is computed."""
    found: list[Program] = []
    for owner, name in ((kernels, "attend"), (kernels, "encode_pages"), (recurrent, "step"), (recurrent, "chunk")):
        whole = getattr(owner, name)

        def struck(*args: Any, whole: Any = whole, **kwargs: Any) -> Any:
            for program in found:
                program.strike()
            return whole(*args, **kwargs)

        monkeypatch.setattr(owner, name, struck)
    return found


@pytest.mark.few("0")
@pytest.mark.parametrize("first", [0, 10, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_programs(first: int, programs: list[Program], tiny: Callable[..., Engine]) -> None:
    fresh = tiny(**SETTINGS, change=remember)
    engine = tiny(**SETTINGS, change=remember, sequences=4, pages=9)
    struck = 0
    for seed in range(first, first + (200 if first == 1000 else 10)):
        for row in list(engine.arena.table.rows):
            if row is not None:
                row.discard()
        program = Program(engine, seed)
        programs[:] = [program]
        with torch.inference_mode():
            program.run(25, fresh)
        struck += program.struck
    assert struck > 3
