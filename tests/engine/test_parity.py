"""The whole engine against transformers with a plain cache, and what the codec changes about it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from octo_run.engine import Engine, SamplingParams
from octo_run.models.cache import DEMO_PATH

TEXT = (
    "I want to book a table for two in San Jose tonight. Italian food please, at 7 pm. What is the phone number? "
    "The boats left at dawn. The special magic number for Anna is 4815162. Gulls followed them out to sea. "
)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama-g3-d80": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 80, "hidden_size": 96},
    "llama3-scaling": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
    "qwen2-g7": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "hidden_size": 84,
        "tie_word_embeddings": False,
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128},
}


def oracle(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.inference_mode()
def greedy_by_transformers(model: Any, ids: list[int], count: int) -> tuple[list[int], list[float]]:
    """``count`` greedy tokens, and the gap between the best and the second best logit at each."""
    answer, gaps, cache, fresh = list[int](), list[float](), None, torch.tensor([ids])
    for _ in range(count):
        out = model(fresh, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0, -1].float()
        best = logits.topk(2)
        answer.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        fresh = torch.tensor([answer[-1:]])
    return answer, gaps


def greedy(engine: Engine, ids: list[int], count: int) -> list[int]:
    """``count`` greedy tokens, past any end token."""
    ends, engine.end_ids = engine.end_ids, frozenset()
    try:
        return [token.id for token in engine.generate(ids, SamplingParams(max_tokens=count))]
    finally:
        engine.end_ids = ends


@pytest.fixture(scope="module")
def demo_oracle() -> Any:
    return oracle(DEMO_PATH)


@pytest.fixture(scope="module")
def prompt(demo: Callable[..., Engine]) -> list[int]:
    """330 ids of text: beyond sinks, window and two pages."""
    ids = demo("bf16").tokenizer.encode(TEXT * 6)
    assert len(ids) >= 330
    return ids[:330]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_random_models_from_files(family: str, make_checkpoint: Callable[..., Path]) -> None:
    """Logits and greedy tokens, through chunks that cross sinks, window and page edges in several ways."""
    path = make_checkpoint(torch_dtype="float32", shards=2, **FAMILIES[family])
    model = oracle(path)
    engine = Engine.load(path, kv="bf16", device="cpu", max_context=512)
    assert engine.dtype == torch.float32
    ids = torch.randint(0, 8192, (300,), generator=torch.Generator().manual_seed(7)).tolist()
    theirs = model(torch.tensor([ids])).logits[0]
    for step in (None, 128, 65, 7, 1):
        assert relative(engine.logits(ids, step), theirs) < 1e-4, f"step {step}"
    assert greedy(engine, ids[:190], 64) == greedy_by_transformers(model, ids[:190], 64)[0]


@pytest.mark.few(1)
@pytest.mark.parametrize("step", [None, 100, 64, 1])
@torch.inference_mode()
def test_demo_logits_in_float32(step: int | None, demo: Any, demo_oracle: Any, prompt: list[int]) -> None:
    assert relative(demo("bf16").logits(prompt, step), demo_oracle(torch.tensor([prompt])).logits[0]) < 1e-4


@pytest.mark.slow
def test_demo_greedy_in_float32(demo: Any, demo_oracle: Any, prompt: list[int]) -> None:
    for ids in (prompt[:20], prompt[:150]):
        assert greedy(demo("bf16"), ids, 64) == greedy_by_transformers(demo_oracle, ids, 64)[0]


QUESTIONS = (
    "I want to book a table for two in San Jose tonight.",
    "Find me a comedy film for this evening.",
    "What is the weather in Paris tomorrow?",
    "Reserve a hotel room for three nights in Boston.",
)
# The spacing of bfloat16 numbers from 8 to 16, where the demo model's best logits lie.
STEP = 0.0625


@pytest.mark.slow
@pytest.mark.usefixtures("exact_products")
@torch.inference_mode()
def test_demo_bfloat16_rounds_where_transformers_does(demo: Any, prompt: list[int]) -> None:
    """With the same attention function the logits are the same to the bit: all other roundings agree."""

    def attention(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2).transpose(1, 2) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True).transpose(1, 2)

    decoder = demo("bf16", "bfloat16")._decoder
    ids = torch.tensor([prompt])
    ours = decoder.logits(decoder.hidden(ids, torch.arange(ids.shape[1])[None], attention))
    assert torch.equal(ours, oracle(DEMO_PATH, torch.bfloat16)(ids).logits.float())


@pytest.mark.slow
def test_demo_greedy_in_bfloat16(demo: Any) -> None:
    """At each of 64 greedy tokens the choice is the same, but where transformers' best two logits are at most two steps
    of bfloat16 apart: there its own attention functions disagree too (ours keeps scores and weights in float32)."""
    model, engine = oracle(DEMO_PATH, torch.bfloat16), demo("bf16", "bfloat16")
    alike = 0
    for question in QUESTIONS:
        ids = engine.tokenizer.chat([{"role": "user", "content": question}])
        theirs, gaps = greedy_by_transformers(model, ids, 64)
        logits = engine.logits(ids + theirs[:-1], 1)[len(ids) - 1 :]
        ours = logits.argmax(-1).tolist()
        assert [i for i in range(64) if ours[i] != theirs[i] and gaps[i] > 2 * STEP] == []
        alike += sum(a == b for a, b in zip(ours, theirs, strict=True))
    assert alike >= 0.97 * 64 * len(QUESTIONS)


@pytest.mark.slow
def test_a_coded_cache_is_close_but_not_equal(demo: Any, prompt: list[int]) -> None:
    """The logits of the last tokens see coded pages; those of the first tokens nothing but full precision."""
    exact = demo("bf16").logits(prompt)
    errors = {}
    for kv in ("oct2", "oct3", "oct4", "octopus3"):
        ours = demo(kv).logits(prompt, 64)
        assert relative(ours[:128], exact[:128]) < 1e-4
        errors[kv] = float((ours[-64:] - exact[-64:]).norm() / exact[-64:].norm())
    assert 1e-4 < errors["oct4"] < errors["oct3"] < errors["oct2"] < 0.2
    assert errors["oct4"] < 0.03 and errors["oct3"] < errors["octopus3"]


def test_a_coded_cache_before_the_first_page_is_exact(demo: Any, prompt: list[int]) -> None:
    """Rotations fold away: without packed pages only float32 rounding is left."""
    assert relative(demo("oct3").logits(prompt[:128]), demo("bf16").logits(prompt[:128])) < 1e-4
