"""The engine on a CUDA GPU against the engine on the CPU, and the memory plan against the allocator."""

import gc

import pytest
import torch

from octo_run.engine import Engine, SamplingParams

pytestmark = pytest.mark.gpu

TEXT = "I want to book a table for two in San Jose tonight. " * 24
FORMATS = ("bf16", "octopus3", "oct2", "oct3", "oct4")


def prompt(engine: Engine) -> list[int]:
    return engine.tokenizer.encode(TEXT, add_bos=True)


@pytest.mark.parametrize("kv", FORMATS)
def test_logits_agree_with_the_cpu(kv: str) -> None:
    """Both in float32 with the same rotation; codes may differ at ties, so coded formats get a wider bound."""
    cpu = Engine.load("octo-demo", kv=kv, device="cpu", dtype="float32", max_context=1024)
    gpu = Engine.load("octo-demo", kv=kv, device="cuda", dtype="float32", max_context=1024)
    ids = prompt(cpu)
    for step, part in ((None, ids), (1, ids[:270])):
        want, got = cpu.logits(part, step), gpu.logits(part, step).cpu()
        error = float((got - want).norm() / want.norm())
        assert error < (1e-4 if kv == "bf16" else 5e-3), f"{kv}, step {step}: {error}"


@pytest.mark.parametrize("kv", FORMATS)
def test_plan_matches_the_allocator_and_decode_allocates_nothing(kv: str) -> None:
    gc.collect()  # engines of earlier tests
    torch.cuda.empty_cache()
    torch._C._cuda_clearCublasWorkspaces()  # the plan counts the workspace, which an earlier engine may have taken
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    engine = Engine.load("octo-demo", kv=kv, device="cuda")
    for _ in engine.generate(prompt(engine), SamplingParams(max_tokens=400)):
        pass
    peak = torch.cuda.max_memory_allocated() - before
    assert abs(peak - engine.memory_plan()["total"]) <= 0.02 * peak, (peak, engine.memory_plan())
    generation = engine.generate(prompt(engine), SamplingParams(max_tokens=400))
    for _ in range(8):
        next(generation)
    held = torch.cuda.memory_allocated()
    for _ in generation:
        pass
    assert torch.cuda.memory_allocated() <= held
