"""On a GPU: saved sessions of a CPU and back, the rules of sampling, grammars beside recorded steps."""

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from octo_run.engine import Engine, SamplingParams, Session
from octo_run.engine.grammar import Grammar
from octo_run.engine.sampling import BatchSampler
from octo_run.engine.saved_session import SavedSession, Snapshot
from octo_run.engine.saved_session.layout import attention_layers

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(max_tokens=24)
STORY = "The boats left at dawn, and the gulls followed them out to sea. " * 60
QUESTION = "The special magic number for Anna is 4815162. What is the special magic number for Anna?"


def load(device: str, kv: str, **options: Any) -> Engine:
    return Engine.load("octo-demo", kv=kv, device=device, dtype="float32", max_context=4096, **options)


@pytest.mark.parametrize("kv", ["oct3", "oct2:oct4", "bf16"])
@pytest.mark.parametrize(("one", "other"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_session_goes_on_where_another_device_wrote_it(tmp_path: Path, kv: str, one: str, other: str) -> None:
    """With the tokens of an unsaved one, and without reading it again."""
    first = load(one, kv)
    session = Session(first)
    assert "".join(session.ask(STORY, GREEDY)) is not None
    path = tmp_path / "s.safetensors"
    Snapshot.take(session, GREEDY).write(path)
    second = load(other, kv)
    assert SavedSession.read(path).restore(second) > 600
    moved = SavedSession.read(path).session(second)
    unsaved = session.ask(QUESTION, GREEDY)
    said = "".join(unsaved)
    continued = moved.ask(QUESTION, GREEDY)
    assert "".join(continued) == said and continued.ids == unsaved.ids
    assert continued.reused_tokens == unsaved.reused_tokens > 600


def test_conditioning_is_taken_over_under_recorded_steps(tmp_path: Path) -> None:
    """The engine has recorded its steps before the file's keys come: they read the new ones."""
    first = load("cpu", "oct3")
    session = Session(first)
    list(session.ask(STORY, GREEDY))
    path = tmp_path / "s.safetensors"
    Snapshot.take(session, GREEDY).write(path)
    second = load("cuda", "oct3")
    list(Session(second).ask("Hello there, how are you?", GREEDY))
    SavedSession.read(path).restore(second)
    for one, two in zip(attention_layers(first), attention_layers(second), strict=True):
        assert one.maps is not None and two.maps is not None and torch.equal(one.maps, two.maps.cpu())
    moved = SavedSession.read(path).session(second)
    assert "".join(moved.ask(QUESTION, GREEDY)) == "".join(session.ask(QUESTION, GREEDY))


RULES = [
    {"typical_p": 0.5}, {"top_n_sigma": 1.0}, {"xtc_probability": 0.5, "xtc_threshold": 0.05}, {"dry_multiplier": 1.0},
    {"frequency_penalty": 0.5, "penalty_range": 5}, {"logit_bias": {3: 5.0, 4: -100.0}},
    {"top_k": 20, "typical_p": 0.7}, {"logprobs": 5}, {"temperature": 0.0, "dry_multiplier": 2.0},
]  # fmt: skip


def test_the_same_seed_draws_the_same_tokens_on_both_devices() -> None:
    params = [SamplingParams(**{"temperature": 1.0, "seed": n, **rules}) for n, rules in enumerate(RULES)]
    generator = torch.Generator().manual_seed(1)
    lines = torch.randn(20, len(params), 5000, generator=generator) * 3
    rows = torch.tensor([*range(len(params))][::-1], dtype=torch.int32)
    found = []
    for device in ("cpu", "cuda"):
        sampler = BatchSampler(len(params), 5000, torch.device(device))
        sampler.arrange([sampler.enter(int(row), p, [1, 2, 3, 1, 2]) for row, p in zip(rows, params, strict=True)])
        tokens = []
        for line in lines:
            sampler.draw(line.to(device), rows.to(device))
            tokens.append(sampler.tokens.cpu().clone())
        found.append(torch.stack(tokens))
    assert torch.equal(*found)


@pytest.mark.parametrize("rules", RULES[:6])
def test_rules_under_recorded_steps(rules: dict[str, Any]) -> None:
    """Long enough that steps are recorded; alone and beside others the same."""
    params = SamplingParams(**{"temperature": 0.8, "seed": 5, "max_tokens": 40, **rules})
    engine = load("cuda", "oct3", sequences=3)
    alone = [token.id for token in engine.generate("The captain looked at the sea and", params)]
    cpu = [token.id for token in load("cpu", "oct3").generate("The captain looked at the sea and", params)]
    assert alone == cpu
    others = [SamplingParams(max_tokens=30), params, replace(params, seed=6)]
    prompts = ["In the morning", "The captain looked at the sea and", "The old man"]
    beside = {done.index: done.ids for done in engine.generate_batch(prompts, others)}
    assert beside[1] == alone


def test_grammars_under_recorded_steps_and_what_they_cost() -> None:
    pytest.importorskip("llguidance", reason="grammars need llguidance")
    engine = load("cuda", "oct3", sequences=4)
    grammar = Grammar("regex", "([a-z]{1,9} ){60}end")
    guided = SamplingParams(grammar=grammar, temperature=1.0, seed=1, max_tokens=600)
    free = replace(guided, grammar=None)
    speed = {}
    for name, params in (("free", free), ("guided", guided), ("free ", free), ("guided ", guided)):
        begun = time.perf_counter()
        tokens = list(engine.generate("A line:", params))
        speed[name] = 1e3 * (time.perf_counter() - begun) / len(tokens)
        if params.grammar is not None:
            assert re.fullmatch("([a-z]{1,9} ){60}end", "".join(token.text for token in tokens))
    print({name: f"{ms:.3f} ms a token" for name, ms in speed.items()})
    texts = [done.text for done in engine.generate_batch(["A line:"] * 6, [replace(guided, seed=n) for n in range(6)])]
    assert all(re.fullmatch("([a-z]{1,9} ){60}end", text) for text in texts)
