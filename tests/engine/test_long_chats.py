"""Families whose layers forget: a chat that goes on reads new tokens only, and what is changed in it little more."""

from pathlib import Path
from typing import Any

import pytest
import torch

from octo_run.engine import Engine, SamplingParams, window_pages
from octo_run.engine.plan import recurrent_shape
from octo_run.kernels import PAGE_TOKENS as PAGE
from octo_run.models.config import ModelConfig, parse_config
from octo_run.models.families import FAMILIES

from . import test_expert_families, test_families, test_recurrent_families
from .test_window_pages import Counter

CONTEXT, ANSWER = 2048, 12


def config(kind: str, fields: dict[str, Any]) -> ModelConfig:
    """That of a class of transformers' configurations; no tokens end an answer."""
    architecture = f"{kind.removesuffix('Text')}ForCausalLM"
    values = fields | {
        "architectures": [architecture], "model_type": FAMILIES[architecture].model_type,
        "max_position_embeddings": CONTEXT, "eos_token_id": None,
    }  # fmt: skip
    return parse_config(values, Path("config.json"))


def chats() -> dict[str, ModelConfig]:
    """The small models of the other tests that have windows or recurrent layers."""
    small = {name: (kind, test_families.SMALL | fields) for name, (kind, fields) in test_families.MODELS.items()}
    model_type, fields = test_expert_families.FAMILIES["gpt-oss"]
    assert model_type == "gpt_oss"
    fields = test_expert_families.BASE | fields | {"rope_scaling": test_families.YARN, "rope_theta": 1e5}
    small["gpt-oss"] = ("GptOss", fields)
    exaone = test_families.SMALL | {"hidden_size": 256, "sliding_window": 70, "sliding_window_pattern": "LG"}
    small["exaone4-pattern"] = ("Exaone4", exaone)
    common = test_recurrent_families.COMMON
    small |= {name: (kind, common | fields) for name, (kind, fields) in test_recurrent_families.FAMILIES.items()}
    made = {name: config(*found) for name, found in small.items()}
    return {name: cfg for name, cfg in made.items() if cfg.sliding_window is not None or recurrent_shape(cfg)}


CHATS = chats()


def test_these_are_the_families_that_forget() -> None:
    seen = {cfg.architecture.removesuffix("ForCausalLM") for cfg in CHATS.values()}
    assert seen >= {
        "Gemma2", "Gemma3", "Gemma4", "Gemma4Unified", "GptOss", "Mistral", "Exaone4", "Cohere2", "Olmo3", "Phi3",
        "Qwen2", "Qwen3Next", "Qwen3_5", "Qwen3_5Moe",
    }  # fmt: skip


def load(cfg: ModelConfig) -> Engine:
    return Engine.load(random_weights=cfg, kv="bf16", device="cpu", dtype="float32", max_context=CONTEXT)


def numbers(count: int, seed: int) -> list[int]:
    return torch.randint(10, 8192, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def answer(engine: Engine, ids: list[int]) -> list[int]:
    return [token.id for token in engine.generate(ids, SamplingParams(max_tokens=ANSWER))]


@pytest.mark.few("gemma4-small")
@pytest.mark.parametrize("name", CHATS)
def test_turn_ten_reads_new_tokens_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, and with the tokens of an engine that has seen nothing else; so do an answer that is written again, a
    question of an earlier turn that is edited, and one that is taken back. Nothing but snapshots is kept behind
    windows."""
    monkeypatch.setattr(window_pages, "HISTORY", 0)
    engine, ids, turns = load(CHATS[name]), list[int](), list[int]()
    counter = Counter(engine, monkeypatch)
    for turn in range(10):
        question = numbers(60 + 5 * turn, turn)
        turns.append(len(ids))
        ids += question
        said = answer(engine, ids)
        assert counter.taken() <= len(question) + 1, f"turn {turn + 1}: more than the question and the last token"
        if turn < 9:
            ids += said
    assert said == answer(load(CHATS[name]), ids), "turn 10"
    assert answer(engine, ids) == said and counter.taken() < 2 * PAGE + ANSWER, "written again"
    edited = ids[: turns[4]] + numbers(50, 99)
    changed = answer(engine, edited)
    assert counter.taken() < 50 + 2 * PAGE + ANSWER, "an edited question"
    assert changed == answer(load(CHATS[name]), edited)
    if engine.arena.windows:
        (row,) = (sequence.row for sequence in engine.arena.table.rows if sequence is not None)
        assert engine.arena.windows[0].snapshots(row)
