"""The memory plan against what is really allocated, and how many tokens fit."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octo_run.engine import Engine, MemoryPlan, plan_memory, system_memory
from octo_run.engine import plan as plan_module
from octo_run.engine.arena import PAGE
from octo_run.engine.parts import held_bytes
from octo_run.engine.plan import PARTS
from octo_run.engine.working_bytes import temporary_bytes
from octo_run.errors import OctoError, UsageError
from octo_run.models.config import ModelConfig
from octo_run.models.tensors import num_parameters

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


def plan(kv: str = "oct3", **options: Any) -> MemoryPlan:
    return plan_memory(CFG, kv, **({"device": CPU, "dtype": torch.bfloat16} | options))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``free(n)``: the device has n bytes."""
    return lambda count: monkeypatch.setattr(plan_module, "free_memory", lambda _device: count)


@pytest.mark.few(4)
@pytest.mark.parametrize("kv", ["bf16", "octopus2", "oct3", "octopus4:octopus2"])
@pytest.mark.parametrize("options", [{}, {"sink": 0, "window": 128}, {"dtype": "bfloat16"}, {"max_context": 100}])
def test_the_arena_takes_what_the_plan_says(
    kv: str, options: dict[str, Any], make_checkpoint: Callable[..., Path]
) -> None:
    path = make_checkpoint(num_hidden_layers=3)
    engine = Engine.load(path, kv=kv, device="cpu", **({"max_context": 1000} | options))
    told = engine.memory_plan()
    keys = engine.forward.decoder.key_tensors
    assert told["arena"] + told["full_precision"] == sum(held_bytes(engine.arena)) + sum(held_bytes(keys))
    assert told["context"] == engine.max_context
    assert told["total"] == sum(told[part] for part in PARTS)
    vectors = 3 * 2 * (engine.kv[0].k.bytes_per_vector + engine.kv[0].v.bytes_per_vector)
    assert told["bytes_per_token"] == vectors
    if engine.arena.pages.numel():
        assert engine.arena.pages.nbytes == engine.arena.pages.shape[0] * 64 * vectors


@pytest.mark.few(3)
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
    engine = Engine.load(make_checkpoint(**changes), kv="oct3", device="cpu", dtype=dtype)
    decoder = engine.forward.decoder
    parts = decoder.embedding, decoder.final_norm, decoder.head, decoder.layers
    assert sum(held_bytes(*parts, but=(decoder.key_tensors,))) == engine.plan.weights
    assert engine.plan.weights == num_parameters(engine.config) * engine.dtype.itemsize


def test_the_rest_takes_what_the_plan_says(make_checkpoint: Callable[..., Path]) -> None:
    """All but what is taken for the time of an operation."""
    engine = Engine.load(make_checkpoint(), kv="oct3", device="cpu", max_context=700, sequences=3)
    told, decoder = engine.plan, engine.forward.decoder
    kept = sum(held_bytes(engine.arena, engine.forward, engine.step, but=(decoder,)))
    kept += sum(held_bytes(decoder.key_tensors))
    assert told.total - told.weights - temporary_bytes(decoder, told.shape, engine.kv, CPU) == kept


@given(
    budget=st.integers(0, 400_000_000),
    kv=st.sampled_from(["bf16", "oct3"]),
    sink=st.integers(0, 100),
    window=st.sampled_from([0, 64, 256]),
    sequences=st.integers(1, 5),
    limit=st.sampled_from([700, 2**40]),
)
@settings(max_examples=40, deadline=None)
def test_what_fits_are_the_most_pages_within_the_budget(
    budget: int, kv: str, sink: int, window: int, sequences: int, limit: int
) -> None:
    base = plan(kv, max_context=1024, sink=sink, window=window, sequences=sequences)
    pages = base.pages_that_fit(budget, limit)

    def total(pages: int) -> int:
        return base.of(base.shape.with_pages(pages, limit)).total

    if pages is None:
        assert total(0) > budget
    else:
        assert total(pages) <= budget < total(pages + 1)
        assert base.shape.with_pages(pages, limit).context <= limit
    alone = base.of(replace(base.shape, sequences=1))
    pages = alone.pages_that_fit(budget, 2**40)
    assert base.tokens_that_fit(budget) == (0 if pages is None else alone.shape.with_pages(pages, 2**40).context)


def test_sequences_share_what_fits(free: Callable[[int], None]) -> None:
    """Each may have the whole context; the pages are as many as fit, or as many as all of them can hold."""
    free(200_000_000)
    short = plan(sequences=3)
    assert 256 < short.context < CFG.max_position_embeddings and short.shape.max_pages == short.shape.pages
    assert short.context < plan(sequences=1).context
    free(400_000_000)
    shared = plan(sequences=3, max_context=None)
    assert shared.context > 1.5 * short.context and shared.total <= 200_000_000
    free(100_000_000_000)
    assert plan(sequences=3).shape.pages == 3 * plan(sequences=3).shape.max_pages
    page = PAGE * plan().shape.token_bytes
    told = plan(sequences=3, cache_bytes=10 * page + 1)
    assert told.shape.pages == told.shape.max_pages == 10 and told.context == 64 + 64 + 10 * PAGE + PAGE - 1
    told = plan(sequences=3, cache_bytes=10 * page, max_context=500)
    assert (told.shape.pages, told.context) == (10, 500)
    with pytest.raises(UsageError, match=f"cache_bytes is 5 and one page takes {page:,}: give more"):
        plan(cache_bytes=5)
    with pytest.raises(UsageError, match=r"cache_bytes hold 2 pages and a context of 1,000 tokens has 13: give "):
        plan(cache_bytes=2 * page, max_context=1000)


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(UsageError, match="131,073 tokens is beyond the model's: choose one of 131072 tokens or less"):
        plan(max_context=131073)
    kinds = ("sliding_attention",) * CFG.num_layers
    windowed = replace(CFG, sliding_window=4096, layer_types=kinds, max_position_embeddings=9000)
    assert plan_memory(windowed, "bf16", device=CPU, dtype=torch.float32).context == 9000, "a window is no context"


def test_auto_context_takes_what_fits_into_its_share(free: Callable[[int], None]) -> None:
    free(200_000_000)
    short = plan()
    assert 256 < short.context < CFG.max_position_embeddings
    more = short.shape.with_pages(short.shape.pages + 1, CFG.max_position_embeddings)
    assert short.total <= 100_000_000 < short.of(more).total
    assert plan("octopus2").context > short.context > plan("octopus4").context > plan("bf16").context
    free(100_000_000_000)
    assert plan().context == CFG.max_position_embeddings


def test_auto_context_of_a_model_that_does_not_fit(free: Callable[[int], None]) -> None:
    free(20_000_000)
    with pytest.raises(OctoError, match=r"weights need 0\.01 GiB; of the 0\.02 GiB free on cpu, 0\.01 GiB"):
        plan()


def test_an_explicit_context_may_take_all_but_not_more(free: Callable[[int], None]) -> None:
    free(120_000_000)
    most = plan().tokens_that_fit()
    assert plan(max_context=most).total <= 120_000_000
    with pytest.raises(OctoError, match=f"choose a context of {most} tokens or less") as caught:
        plan(max_context=most + 1)
    assert caught.value.exit_code == 1
    free(1_000_000)
    with pytest.raises(OctoError, match="choose a smaller model"):
        plan(max_context=500)


def test_nothing_grows_while_it_runs(tiny: Callable[..., Engine], random_ids: Callable[..., list[int]]) -> None:
    """The arena's tensors are the same ones, in the same place, after prompts and answers of all lengths."""
    engine = tiny("oct3")

    def places() -> dict[str, tuple[int, int]]:
        tensors = {name: t for name, t in vars(engine.arena).items() if isinstance(t, Tensor)}
        return {name: (t.data_ptr(), t.nbytes) for name, t in tensors.items()}

    before = places()
    for length in (1, 64, 300, 500, 20):
        engine.logits(random_ids(length), 50)
        list(engine.generate(random_ids(length)))
    assert places() == before


@pytest.mark.slow
@pytest.mark.parametrize("conditioning", ["off", "full"])
def test_a_huge_maximum_costs_nothing_before_it_is_used(conditioning: str, free: Callable[[int], None]) -> None:
    """The plan takes milliseconds; the arena, half of what is free, takes memory page by page as it is written."""
    free(8_000_000_000)
    cfg = replace(CFG, max_position_embeddings=2**31 - 1)
    begun = time.thread_time()
    told = plan_memory(cfg, "oct3", device=CPU, dtype=torch.bfloat16, conditioning=conditioning)
    assert time.thread_time() - begun < 1
    assert 1_000_000 < told.context < 2**31 - 1 and told.arena > 3_900_000_000
    begun, before = time.process_time(), system_memory.resident()
    engine = Engine.load(
        "huge", kv="oct3", random_weights=cfg, device="cpu", dtype="bfloat16", conditioning=conditioning
    )
    next(engine.generate([1, 2, 3] * 100))
    assert time.process_time() - begun < 10
    assert system_memory.resident() - before < 400_000_000


def in_a_process(code: str, *arguments: object, limit: str = "") -> Any:
    """What ``code`` prints as JSON, run by itself under the shell's ``limit``."""
    command = f"{limit}\nexec {shlex.quote(sys.executable)} -c {shlex.quote(code)} {' '.join(map(str, arguments))}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


BENCH = """
import json, sys
from octo_run.engine import Engine, benchmark
told = []
for kv in sys.argv[1:]:
    engine = None
    engine = Engine.load("octo-demo", kv=kv, device="cpu")
    benchmark.copy_bandwidth(engine.device)
    benchmark.forget_peak(engine.device)
    for test, depth in ((("tg", 8), 0), (("pp", 512), 3500)):
        benchmark.run_round(engine, test, [5] * 512, depth=depth, batch=1, clock=lambda work: work())
    told.append([engine.memory_plan()["total"], engine.memory_now()])
print(json.dumps(told))
"""
#: What the libraries take on their first call beside the tensors, code included: 20 MB measured (two threads).
LIBRARIES = 40_000_000


@pytest.mark.slow
def test_what_is_in_use_on_a_cpu_is_what_was_planned() -> None:
    """Of two engines in turn, the second one does not count what is left of the first one."""
    for total, now in in_a_process(BENCH, "oct3", "bf16"):
        assert now["engine_peak"] == now["process_peak"] - now["before_loading"]
        assert 0.8 * total < now["engine_peak"] < total + LIBRARIES, (total, now)
        assert now["before_loading"] > 100_000_000, "PyTorch has its share"


ULIMIT = """
import json, os, sys
import torch
from octo_run.engine import Engine, system_memory
from octo_run.models.config import ModelConfig
from octo_run.models.tensors import num_parameters
if len(sys.argv) > 1:
    shape = ModelConfig("LlamaForCausalLM", 1000, 256, 512, 4, 6, 2, 128, 2**31 - 1, 1e-5, 1e4)
    free = system_memory.available()
    engine = Engine.load("made up", kv="oct3", random_weights=shape, device="cpu", dtype="bfloat16")
    next(engine.generate([1, 2, 3] * 300))
    print(json.dumps([free, engine.plan.total, engine.max_context]))
else:
    print(os.sysconf("SC_PAGE_SIZE") * int(open("/proc/self/statm").read().split()[0]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v is Linux's")
@pytest.mark.parametrize("kind", ["v", "d"])
def test_an_engine_keeps_within_ulimit(kind: str) -> None:
    base = in_a_process(ULIMIT)
    spare = 600_000_000
    free, total, context = in_a_process(ULIMIT, "run", limit=f"ulimit -{kind} {(base + spare) // 1024}")
    assert free < 1.01 * (spare if kind == "v" else base + spare) and total <= 0.51 * free and context > 256


def test_memory_now_tells_pytorchs_own_share_on_a_cpu(tiny: Callable[..., Engine]) -> None:
    now = tiny().memory_now()
    assert now["process_peak"] > 50_000_000 and now["before_loading"] > 50_000_000
    assert now["engine_peak"] == max(0, now["process_peak"] - now["before_loading"])


def test_free_memory_is_what_the_system_says() -> None:
    available = plan_module.free_memory(CPU)
    assert 0 < available < 1 << 50
