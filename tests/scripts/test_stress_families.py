"""The stress of families: what is drawn has what its case says, and the page says what engines do."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from octo_run.engine.plan import plan_memory
from octo_run.engine.shapes import SHAPES
from octo_run.models.config import parse_config
from octo_run.models.plain_attention import weights_of

Script = Callable[[str], ModuleType]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "kv-families.md"
TOKENS = 512


@pytest.fixture(scope="module")
def stress(script: Script) -> ModuleType:
    return script("stress_families")


def case_of(stress: ModuleType, name: str) -> Any:
    return next(case for case in stress.CASES if name in case.name)


def shares(stress: ModuleType, layer: Any, text: Any) -> torch.Tensor:
    """The weights of attention of the queries that are looked at, ``[heads, queries, n]``."""
    logits = stress._logits(text.q, text.k).flatten(0, 1)
    found: torch.Tensor = weights_of(logits.clone(), stress._hidden(layer.attention, len(text.k)), layer.attention)
    return found


@pytest.mark.parametrize("name", ["Llama 3", "gpt-oss, whole", "Qwen2.5", "Gemma 4, heads of 512"])
def test_a_case_has_what_its_name_says(stress: ModuleType, name: str) -> None:
    case = case_of(stress, name)
    layer = stress.Stressed.make(case, 8.0, 16.0, TOKENS)
    text = layer.draw(TOKENS, 5)
    rest = text.k[1:]
    if case.first:
        first = shares(stress, layer, text)[..., 0]
        assert 0.2 < float(first.mean()) < 0.95
    if name == "Llama 3":
        assert float(text.k[0].norm(dim=-1).min()) > 1.5 * float(rest.norm(dim=-1).mean())
    if case.sinks:
        assert 0.2 < 1 - float(shares(stress, layer, text).sum(-1).mean()) < 0.8
    if case.bias:
        mean = layer._turned(layer.parts["bias"].expand(TOKENS, -1, -1))[1:]
        energy = mean.square().sum(-1).mean() / (rest - mean).square().sum(-1).mean()
        assert 8 < float(energy) < 32
    if case.channels:
        size = rest.square().mean((0, 1)).sqrt()
        assert float(size.max() / size.median()) > 4
    if "512" in name:
        assert text.v.shape[-1] == 512 and torch.allclose(text.v[9].square().mean(-1), torch.ones(2).double())


def test_what_is_measured(stress: ModuleType) -> None:
    """Better formats err less; a bias needs the mean out of the code; the first token, sinks."""
    rows = list(stress.measure(case_of(stress, "Qwen2.5"), tokens=TOKENS, scale=8.0, energy=16.0, sinks=(64, 0)))
    at = {(row.kv, row.conditioning, row.sinks): row for row in rows}
    for kind in ("off", "mean", "full"):
        errors = [at[kv, kind, 64] for kv in ("oct2", "oct3", "oct4")]
        assert errors[0].logits > 1.5 * errors[1].logits > 2 * errors[2].logits
        assert errors[0].values > errors[1].values > errors[2].values > 0
    assert at["oct3", "off", 64].logits > 2.5 * at["oct3", "mean", 64].logits
    assert at["oct3", "full", 0].keys > 1.5 * at["oct3", "full", 64].keys


def test_the_page_says_what_engines_do(stress: ModuleType) -> None:
    """Every kind of layers, by plans of short models of the same configuration."""
    page = PAGE.read_text()
    for case in stress.CASES:
        assert page.count(f"| {case.name} |") >= 3, f"the page has no figures of {case.name}"
    for row in stress.defaults():
        assert f"| {' | '.join(row)} |" in page
        values = {**SHAPES, **stress.MORE}[row[0]] | {"num_hidden_layers": 6, "quantization_config": None}
        if "layer_types" in values:
            values["layer_types"] = values["layer_types"][:6]
        cfg = replace(parse_config(values, Path("config.json")), vocab_size=1024)
        plan = plan_memory(
            cfg, "oct3", device=torch.device("cpu"), dtype=torch.bfloat16, max_context=1024, free=1 << 50
        )
        assert (plan.conditioning, str(plan.shape.sink)) == row[2:4]
        assert (plan.shape.token_bytes < 2 * sum(2 * 2 * n * d for n, d in cfg.cached_heads) / 3) == (row[4] == "yes")
