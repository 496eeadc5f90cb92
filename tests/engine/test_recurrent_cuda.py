"""Recurrent layers on a CUDA GPU: against the CPU, recorded steps against unrecorded ones, batches, cancelled steps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from octo_run.engine import Engine, SamplingParams
from octo_run.models.config import ModelConfig, parse_config

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams()
SMALL: dict[str, Any] = {
    "architectures": ["Qwen3_5ForCausalLM"], "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 192,
    "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
    "linear_key_head_dim": 64, "linear_value_head_dim": 128, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "max_position_embeddings": 4096,
}  # fmt: skip


def load(device: str = "cuda", kv: str = "bf16", **options: Any) -> Engine:
    engine = Engine.load("small", random_weights=shape(), device=device, kv=kv, **{"max_context": 1024} | options)
    engine.end_ids = frozenset()
    return engine


def shape() -> ModelConfig:
    return parse_config(SMALL, Path("config.json"))


def numbers(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 1000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_logits_agree_with_the_cpu() -> None:
    """Chunks, single tokens; both in float32."""
    cpu, ids = load("cpu", dtype="float32"), numbers(700)
    gpu = copied(cpu, "float32")  # random weights differ between devices
    for step, count in ((None, 700), (100, 700), (1, 270)):
        want, got = cpu.logits(ids[:count], step), gpu.logits(ids[:count], step).cpu()
        assert float((got - want).norm() / want.norm()) < 1e-4, step


def copied(engine: Engine, dtype: str) -> Engine:
    """An engine on the GPU with the weights of one on the CPU."""
    from octo_run.engine.allocation import parse_formats
    from octo_run.engine.plan import plan_memory
    from octo_run.models.config import GenerationDefaults
    from octo_run.models.decoder import Decoder
    from octo_run.models.weights import random_weights

    cfg, kind, device = engine.config, getattr(torch, dtype), torch.device("cuda")
    fmt = parse_formats("bf16", cfg, 0, kind)
    plan = plan_memory(cfg, fmt, device=device, dtype=kind, max_context=1024)
    weights = {name: x.to(device) for name, x in random_weights(cfg, "cpu", kind).items()}
    with torch.inference_mode():
        return Engine(
            "copy", cfg, Decoder(cfg, weights, None, None), engine.tokenizer, plan, fmt, GenerationDefaults(), 0
        )


@pytest.mark.parametrize("kv", ["bf16", "oct3"])
@torch.inference_mode()
def test_recorded_steps_equal_unrecorded_ones_bit_for_bit(kv: str) -> None:
    engine, ids, tokens = load(kv=kv), numbers(500), numbers(150, seed=1)
    sequence = engine.sequence()
    run, wanted = engine.step._run, []
    engine.step._run = lambda _key, work: work()  # type: ignore[method-assign, assign]
    for recorded in (False, True):
        sequence.cut(0)
        engine.prefill(sequence, ids)
        for place, token in enumerate(tokens):
            engine.step.start(sequence, token, GREEDY)
            engine.step.launch([sequence])
            engine.step.read(sequence)
            if recorded:
                assert torch.equal(engine.step.logits[0], wanted[place]), place
            else:
                wanted.append(engine.step.logits[0].clone())
        engine.step._run = run  # type: ignore[method-assign]


@torch.inference_mode()
def test_steps_agree_with_chunks_in_bfloat16() -> None:
    engine, ids = load(), numbers(400)
    want, rows = engine.logits(ids).cpu(), []
    sequence = engine.sequence()
    engine.prefill(sequence, ids[:200])
    for token in ids[200:]:
        engine.step.start(sequence, token, GREEDY)
        engine.step.launch([sequence])
        engine.step.read(sequence)
        rows.append(engine.step.logits[0].to("cpu", torch.float32).clone())
    got = torch.stack(rows)
    assert float((got - want[200:]).norm() / want[200:].norm()) < 5e-2


def test_sequences_answer_together_as_if_alone() -> None:
    """The first tokens: later ones may part where two are all but equal."""
    prompts = [numbers(length, seed=length) for length in (5, 70, 333, 64, 700)]
    alone = load(dtype="float32")
    want = []
    for ids in prompts:
        want.append([token.id for token in alone.generate(list(ids), SamplingParams(max_tokens=8))])
    alone.close()
    together = load(dtype="float32", sequences=3)
    found = sorted(together.generate_batch(prompts, SamplingParams(max_tokens=8)), key=lambda one: one.index)
    assert [one.ids for one in found] == want


@pytest.mark.parametrize("launched", [1, 3, 8])
def test_cancelled_steps_leave_nothing_behind(launched: int) -> None:
    engine, ids = load(dtype="float32"), numbers(330)
    want = [token.id for token in engine.generate(list(ids), SamplingParams(max_tokens=20))]
    sequence = engine.sequence()
    engine.prefill(sequence, ids)
    engine.step.start(sequence, want[0], GREEDY)
    for _ in range(launched):
        engine.step.launch([sequence])
    sequence.close()
    assert [token.id for token in engine.generate(list(ids), SamplingParams(max_tokens=20))] == want
