"""Key means in the engine: exact without coding, better with it, and kept through cuts and chunks."""

import pytest
import torch

from octo_run import Engine
from octo_run.engine import plan as plan_module
from octo_run.engine.arena import ArenaShape
from octo_run.engine.key_means import KeyMeans
from octo_run.engine.parts import held_bytes

TEXT = "The lighthouse keeper counted the ships that passed in the night and wrote their names in a long list. " * 24


def logits(kv: str, key_mean: bool, step: int | None = 64) -> torch.Tensor:
    engine = Engine.load(kv=kv, device="cpu", max_context=512, key_mean=key_mean)
    ids = engine.tokenizer.encode(TEXT, add_bos=True)[:460]
    return engine.logits(ids, step).double()


def test_without_coding_the_logits_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = logits("bf16", False)
    monkeypatch.setattr(plan_module, "takes_mean", lambda *_: True)
    with_means = logits("bf16", True)
    assert not torch.equal(with_means, exact), "means were taken out"
    assert float((with_means - exact).abs().max() / exact.abs().max()) < 1e-5


def test_with_coding_the_distribution_is_nearer() -> None:
    exact = logits("bf16", False).log_softmax(-1)
    divergence = {}
    for key_mean in (False, True):
        coded = logits("octopus2", key_mean).log_softmax(-1)
        divergence[key_mean] = float((exact.exp() * (exact - coded)).sum(-1).mean())
    assert divergence[True] < 0.9 * divergence[False]


def test_means_are_taken_once_and_again_after_a_cut() -> None:
    engine = Engine.load(kv="oct3", device="cpu", max_context=512, key_mean=True)
    means = engine.arena.means
    assert means is not None
    ids = engine.tokenizer.encode(TEXT, add_bos=True)
    engine.logits(ids[:200], 64)
    first = means.means.clone()
    assert float(first.abs().amax()) > 0
    engine.logits(ids[:400], 64)
    assert torch.equal(means.means, first), "the same first page gives the same means"
    other = [*ids[:70], *reversed(ids[70:250])]
    engine.logits(other, 64)
    assert not torch.equal(means.means, first)


def test_plan_counts_the_means() -> None:
    plans = [Engine.load(kv="oct3", device="cpu", max_context=512, key_mean=on).plan for on in (False, True)]
    engine = Engine.load(kv="oct3", device="cpu", max_context=512, key_mean=True)
    means = engine.arena.means
    assert means is not None
    assert plans[1].arena - plans[0].arena == sum(held_bytes(means))
    assert engine.plan.tokens_that_fit(engine.plan.total) >= 512


@pytest.mark.parametrize("sequences", [1, 200])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_only_what_attention_reads_is_kept(on_gpu: bool, sequences: int) -> None:
    shape = ArenaShape(2, 2, 64, 120, torch.float32, 300, chunk=96, sequences=sequences, mean_heads=6, on_gpu=on_gpu)
    means = KeyMeans(shape, torch.eye(64), 10000.0 ** (-torch.arange(0, 64, 2) / 64))
    step, chunk = torch.randn(sequences, 1, 6, 64), torch.randn(1, 96, 6, 64)
    rows = torch.arange(sequences, dtype=torch.int32)
    assert means.of_queries(1, None, rows, step).coefficients.shape == step.shape
    of_chunk = means.of_queries(1, sequences - 1, rows[:1], chunk)
    assert of_chunk.means.data_ptr() == means.means[1, sequences - 1].data_ptr()
    assert (of_chunk.of_queries is None) == on_gpu
