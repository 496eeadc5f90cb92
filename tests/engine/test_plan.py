"""The memory plan against what is really allocated, and how many tokens fit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octo_run.engine import Engine, MemoryPlan, plan_memory
from octo_run.engine import plan as plan_module
from octo_run.engine.plan import PARTS
from octo_run.errors import OctoError, UsageError
from octo_run.models.config import ModelConfig

CPU = torch.device("cpu")
CFG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=512,
    num_layers=4,
    num_heads=6,
    num_kv_heads=2,
    head_dim=128,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)


def plan(kv: str = "octopus3", **options: Any) -> MemoryPlan:
    return plan_memory(CFG, kv, **({"device": CPU, "dtype": torch.bfloat16} | options))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``free(n)``: the device has n bytes."""
    return lambda count: monkeypatch.setattr(plan_module, "free_memory", lambda _device: count)


def arena_bytes(engine: Engine) -> int:
    return sum(t.nbytes for name, t in vars(engine.arena).items() if isinstance(t, Tensor) and name != "_state_host")


@pytest.mark.parametrize("kv", ["bf16", "octopus2", "octopus3", "octopus4:octopus2"])
@pytest.mark.parametrize("options", [{}, {"sink": 0, "window": 128}, {"dtype": "bfloat16"}, {"max_context": 100}])
def test_the_arena_takes_what_the_plan_says(
    kv: str, options: dict[str, Any], make_checkpoint: Callable[..., Path]
) -> None:
    path = make_checkpoint(num_hidden_layers=3)
    engine = Engine.load(path, kv=kv, device="cpu", **({"max_context": 1000} | options))
    told = engine.memory_plan()
    assert told["arena"] + told["full_precision"] == arena_bytes(engine)
    assert told["context"] == engine.max_context
    assert told["total"] == sum(told[part] for part in PARTS)
    vectors = 3 * 2 * (engine.kv.k.bytes_per_vector + engine.kv.v.bytes_per_vector)
    assert told["bytes_per_token"] == vectors
    if engine.arena.pages.numel():
        assert engine.arena.pages.nbytes == engine.arena.pages.shape[0] * 64 * vectors


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
        {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
        {"attention_bias": True, "mlp_bias": True},
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_take_what_the_plan_says(
    changes: dict[str, Any], dtype: str, make_checkpoint: Callable[..., Path]
) -> None:
    engine = Engine.load(make_checkpoint(**changes), kv="octopus2", device="cpu", dtype=dtype)
    decoder = engine._decoder
    tensors = [decoder.embedding, decoder.final_norm, decoder.head]
    tensors += [t for layer in decoder.layers for t in vars(layer).values() if t is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(storages.values()) == engine.plan.weights


@given(
    budget=st.integers(0, 400_000_000),
    kv=st.sampled_from(["bf16", "octopus3"]),
    sink=st.integers(0, 100),
    window=st.sampled_from([0, 64, 256]),
    sequences=st.integers(1, 5),
)
@settings(max_examples=200, deadline=None)
def test_what_fits_is_the_longest_context_within_the_budget(
    budget: int, kv: str, sink: int, window: int, sequences: int
) -> None:
    base = plan(kv, max_context=1024, sink=sink, window=window, sequences=sequences)
    fits = base.tokens_that_fit(budget)

    def total(context: int) -> int:
        return replace(base, shape=replace(base.shape, context=context)).total

    if fits == 0:
        assert total(1) > budget
    else:
        assert total(fits) <= budget < total(fits + 1)


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(UsageError, match="131,073 tokens is beyond the model's 131,072; give --ctx 131072 or less"):
        plan(max_context=131073)
    windowed = replace(CFG, sliding_window=4096)
    with pytest.raises(UsageError, match="beyond the model's 4,096"):
        plan_memory(windowed, "bf16", device=CPU, dtype=torch.float32, max_context=4097)
    assert plan_memory(windowed, "bf16", device=CPU, dtype=torch.float32).context == 4096


def test_auto_context_takes_what_fits_into_its_share(free: Callable[[int], None]) -> None:
    free(100_000_000)
    short = plan()
    assert 256 < short.context < CFG.max_position_embeddings
    assert short.total <= 50_000_000 < replace(short, shape=replace(short.shape, context=short.context + 1)).total
    assert plan("octopus2").context > short.context > plan("octopus4").context > plan("bf16").context
    free(100_000_000_000)
    assert plan().context == CFG.max_position_embeddings


def test_auto_context_of_a_model_that_does_not_fit(free: Callable[[int], None]) -> None:
    free(20_000_000)
    with pytest.raises(OctoError, match=r"weights need 0\.01 GiB; of the 0\.02 GiB free on cpu, 0\.01 GiB"):
        plan()


def test_an_explicit_context_may_take_all_but_not_more(free: Callable[[int], None]) -> None:
    free(100_000_000)
    most = plan().tokens_that_fit()
    assert plan(max_context=most).total <= 100_000_000
    with pytest.raises(OctoError, match=f"give --ctx {most} or less") as caught:
        plan(max_context=most + 1)
    assert caught.value.exit_code == 1
    free(1_000_000)
    with pytest.raises(OctoError, match="choose a smaller model"):
        plan(max_context=500)


def test_nothing_grows_while_it_runs(tiny: Callable[..., Engine], random_ids: Callable[..., list[int]]) -> None:
    """The arena's tensors are the same ones, in the same place, after prompts and answers of all lengths."""
    engine = tiny("octopus3")

    def places() -> dict[str, tuple[int, int]]:
        tensors = {name: t for name, t in vars(engine.arena).items() if isinstance(t, Tensor)}
        return {name: (t.data_ptr(), t.nbytes) for name, t in tensors.items()}

    before = places()
    for length in (1, 64, 300, 500, 20):
        engine.logits(random_ids(length), 50)
        list(engine.generate(random_ids(length)))
    assert places() == before


def test_memory_now_is_the_process_on_a_cpu(tiny: Callable[..., Engine]) -> None:
    assert tiny().memory_now()["process_peak"] > 50_000_000


def test_free_memory_is_what_the_system_says() -> None:
    available = plan_module.free_memory(CPU)
    assert 0 < available < 1 << 50
