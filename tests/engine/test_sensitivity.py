"""What coding one side of one layer does to a model, against the plain way of finding it out."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from octo_run.engine import sensitivity
from octo_run.engine.calibration import Calibration
from octo_run.engine.random_model import NoTokenizer
from octo_run.errors import OctoError
from octo_run.kernels.codec import KVFormat, parse_kv
from octo_run.models import rope
from octo_run.models.config import ModelConfig
from octo_run.models.decoder import Decoder
from octo_run.models.weights import random_weights

CFG = ModelConfig("LlamaForCausalLM", 300, 96, 128, 3, 4, 2, 64, 2048, 1e-5, 1e4)
CPU = torch.device("cpu")
FORMAT = parse_kv("oct2", 64)
IDS = torch.randint(0, 300, (333,), generator=torch.Generator().manual_seed(3)).tolist()


def decoder(cfg: ModelConfig = CFG, kind: str = "full", dtype: torch.dtype = torch.float32, gain: float = 2) -> Decoder:
    """A random model whose layers weigh more than random weights' do."""
    weights = random_weights(cfg, "cpu", dtype, seed=1)
    for name, weight in weights.items():
        if name.endswith("proj.weight"):
            weight.mul_(gain)
    made = Decoder(cfg, weights, None, [FORMAT.v.rotation] * cfg.num_layers)
    found = Calibration(made, NoTokenizer(cfg.vocab_size), None).conditioning(kind)
    made.store_keys([FORMAT.k.rotation] * cfg.num_layers, found)
    return made


@torch.inference_mode()
def plainly(model: Decoder, fmt: KVFormat, ids: list[int]) -> Tensor:
    """The same by a whole run of the decoder for each layer and side."""
    count, cfg = len(ids), model.cfg
    positions = torch.arange(count)
    cos, sin = rope.cos_sin(positions, model.inv_freq(0), model.embedding.dtype)
    query, key = positions[:, None], positions[None]
    old = (key >= 64) & ((key - 64) // 64 < (query - 128) // 64)

    def logits(coded: tuple[int, int] | None) -> Tensor:
        def attention(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seen_k, seen_v = k, v
            if coded == (index, 0):
                layer, mean = model.layers[index], torch.zeros_like(k)
                if layer.attention.key_mean is not None and layer.attention.maps is not None:
                    mean = rope.apply(layer.attention.key_mean.expand_as(k), cos[None], sin[None])
                    mean = torch.einsum("bnhd,hde->bnhe", mean, layer.attention.maps[1])
                seen_k = fmt.k.decode_rotated(fmt.k.encode_rotated(k - mean)).to(k.dtype) + mean
            if coded == (index, 1):
                seen_v = fmt.v.decode_rotated(fmt.v.encode_rotated(v)).to(v.dtype)
            q, k, v, seen_k, seen_v = (
                x[0].transpose(0, 1).repeat_interleave(cfg.num_heads // x.shape[2], 0)
                for x in (q, k, v, seen_k, seen_v)
            )
            scores = torch.where(old, q @ seen_k.mT, q @ k.mT) * model.specs[index].attention.scale
            weights = scores.masked_fill(key > query, -torch.inf).softmax(-1)
            return ((weights * old) @ seen_v + (weights * ~old) @ v).transpose(0, 1)[None]

        return model.logits(model.hidden(torch.tensor([ids]), positions[None], attention))[0, 192:].log_softmax(-1)

    exact = logits(None)
    found = [
        [float((exact.exp() * (exact - logits((layer, side)))).sum(-1).mean()) for side in (0, 1)]
        for layer in range(cfg.num_layers)
    ]
    return torch.tensor(found)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "qkv_bias": True},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "qk_norm": True},
}


@pytest.mark.few("llama-full")
@pytest.mark.parametrize("kind", ["off", "mean", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_whole_runs_find(family: str, kind: str) -> None:
    model = decoder(replace(CFG, **FAMILIES[family]), kind)
    wanted = plainly(model, FORMAT, IDS)
    assert wanted.min() > 1e-6
    torch.testing.assert_close(sensitivity.measure(model, FORMAT, IDS), wanted, rtol=2e-2, atol=1e-7)


@pytest.mark.few(1)
@pytest.mark.parametrize("rows", [1, 200, 10**6])
def test_groups_make_no_difference(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder()
    wanted = sensitivity.measure(model, FORMAT, IDS)
    assert torch.equal(sensitivity.measure(model, FORMAT, IDS), wanted)
    monkeypatch.setitem(sensitivity.ROWS, "cpu", rows)
    monkeypatch.setattr(sensitivity, "LOGIT_ROWS", 50)
    torch.testing.assert_close(sensitivity.measure(model, FORMAT, IDS), wanted, rtol=1e-3, atol=1e-8)


@pytest.mark.slow
def test_weights_in_bfloat16_are_measured_as_precisely() -> None:
    """In bfloat16 arithmetic all that is small would drown in its rounding."""
    half = decoder(dtype=torch.bfloat16, kind="off")
    wide = decoder(dtype=torch.bfloat16, kind="off")
    wide.dtype = torch.float32
    wide.embedding, wide.final_norm = wide.embedding.float(), wide.final_norm.float()
    wide.head = replace(wide.head, weight=wide.head.weight.float())
    wide.layers = [sensitivity._wide(layer) for layer in wide.layers]
    wanted = plainly(wide, FORMAT, IDS)
    torch.testing.assert_close(sensitivity.measure(half, FORMAT, IDS), wanted, rtol=5e-2, atol=1e-7)
    assert not bool(torch.isclose(plainly(half, FORMAT, IDS), wanted, rtol=5e-2, atol=1e-7).all())


def test_a_finer_code_costs_less() -> None:
    model = decoder()
    found = [sensitivity.measure(model, parse_kv(name, 64), IDS) for name in ("oct2", "oct3", "oct4")]
    assert bool((found[0] > 2 * found[1]).all()) and bool((found[1] > 2 * found[2]).all())


def test_too_few_tokens_and_a_model_that_overflows() -> None:
    with pytest.raises(ValueError, match="192 tokens see nothing that is coded: give more than 192"):
        sensitivity.measure(decoder(), FORMAT, IDS[:192])
    assert bool((sensitivity.measure(decoder(), FORMAT, IDS[:193]) > 0).all())
    broken = decoder()
    broken.final_norm[5] = torch.inf
    with pytest.raises(OctoError, match=r"not finite, so no formats can be chosen for it: give --kv oct3"):
        sensitivity.measure(broken, FORMAT, IDS)


def peak(work: Callable[[], object]) -> int:
    """Bytes that a piece of work takes at most from PyTorch's allocator of the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [one for one in seen.profiler.kineto_results.events() if one.name() == "[memory]"]
    events.sort(key=lambda one: one.start_ns())
    return max(itertools.accumulate(one.nbytes() for one in events))


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [300, 60_000])
def test_it_takes_what_is_planned_for_it(vocabulary: int) -> None:
    cfg = replace(CFG, vocab_size=vocabulary, num_layers=8, hidden_size=256, intermediate_size=700)
    model = decoder(cfg, "off")
    planned = sensitivity.working_bytes(cfg, len(IDS), CPU)
    assert 0.3 * planned < peak(lambda: sensitivity.measure(model, FORMAT, IDS)) < planned
