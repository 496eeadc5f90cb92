"""The decoder against transformers: the same random weights, the same logits, for every family and shape."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from octo_run.kernels.step.reference import normed
from octo_run.models import rope
from octo_run.models.config import ModelConfig, RopeScaling, parse_config
from octo_run.models.decoder import Decoder
from octo_run.models.weights import random_weights

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 211,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-6}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rms_norm_eps": 1e-6}


def heads(query: int, kv: int, head_dim: int) -> dict[str, int]:
    return {"num_attention_heads": query, "num_key_value_heads": kv, "head_dim": head_dim}


CONFIGS: dict[str, dict[str, Any]] = {
    "llama-g3-d64-tied": {},
    "llama-g1-d80-biases": {**heads(2, 2, 80), "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "llama3-g4-d128": {
        **heads(8, 2, 128),
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3,
        "tie_word_embeddings": False,
    },
    "linear-g7-d64": {**heads(7, 1, 64), "hidden_size": 84, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "mistral-g4-d128": {**MISTRAL, **heads(4, 1, 128), "rope_theta": 1e6, "tie_word_embeddings": False},
    "qwen2-g7-d64": {**QWEN2, **heads(14, 2, 64), "rope_theta": 1e6},
    "qwen2-g7-d128-untied": {**QWEN2, **heads(7, 1, 128), "tie_word_embeddings": False},
    "qwen3-g2-d128": {**QWEN3, **heads(4, 2, 128), "rope_theta": 1e6},
    "qwen3-g3-d80-biases": {**QWEN3, **heads(6, 2, 80), "attention_bias": True, "tie_word_embeddings": False},
}


def build(changes: dict[str, Any]) -> tuple[ModelConfig, dict[str, Tensor], Any]:
    """Our configuration, random float32 weights, and transformers' model with the same weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = BASE | changes
    cfg = parse_config(values, Path("config.json"))
    weights = random_weights(cfg, "cpu", torch.float32, seed=3)
    oracle = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), attn_implementation="eager").eval()
    missing, unexpected = oracle.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return cfg, weights, oracle


def plain_attention(k: Tensor, v: Tensor, q: Tensor) -> Tensor:
    """Causal attention over ``[B, C, heads, d]`` in full precision."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    mixed = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True)
    return mixed.transpose(1, 2)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_logits_equal_those_of_transformers(name: str) -> None:
    cfg, weights, oracle = build(CONFIGS[name])
    ids = torch.randint(0, cfg.vocab_size, (1, 150), generator=torch.Generator().manual_seed(0))
    theirs = oracle(ids).logits
    decoder = Decoder(cfg, weights, None, None)
    assert not weights, "weights that the decoder did not use"
    hidden = decoder.hidden(ids, torch.arange(150)[None], lambda _layer, q, k, v: plain_attention(k, v, q))
    assert relative(decoder.logits(hidden), theirs) < 1e-5


@pytest.mark.parametrize("name", ["qwen2-g7-d64", "qwen3-g3-d80-biases", "llama-g1-d80-biases"])
@torch.inference_mode()
def test_rotations_change_nothing_but_the_basis(name: str) -> None:
    """With any two rotations of keys and values the logits stay; what attention is handed is rotated."""
    cfg, weights, _ = build(CONFIGS[name])
    generator = torch.Generator().manual_seed(1)
    k_rotation, v_rotation = (
        torch.linalg.qr(torch.randn(cfg.head_dim, cfg.head_dim, generator=generator, dtype=torch.float64))[0]
        for _ in range(2)
    )
    given = [k_rotation] * cfg.num_layers, [v_rotation] * cfg.num_layers
    ids, positions = torch.arange(40)[None], torch.arange(40)[None]
    seen: list[dict[str, Tensor]] = []
    results = []
    for rotations in ((None, None), given):
        decoder = Decoder(cfg, dict(weights), *rotations)
        first: dict[str, Tensor] = {}

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, first: dict[str, Tensor] = first) -> Tensor:
            if layer == 0:
                first |= {"q": q, "k": k, "v": v}
            return plain_attention(k, v, q)

        results.append(decoder.logits(decoder.hidden(ids, positions, attention)))
        seen.append(first)
    assert relative(results[1], results[0]) < 1e-5
    for name, rotation in (("q", k_rotation), ("k", k_rotation), ("v", v_rotation)):
        assert relative(seen[1][name], seen[0][name] @ rotation.to(torch.float32).T) < 1e-5


def test_frequencies_of_llama3_scaling_are_those_of_transformers() -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    values = BASE | {"rope_theta": 500000.0, "head_dim": 128, "rope_scaling": LLAMA3 | {"factor": 32.0}}
    cfg = parse_config(values, Path("config.json"))
    theirs, factor = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.for_model(**values), torch.device("cpu"))
    assert factor == 1.0
    assert torch.equal(rope.inverse_frequencies(cfg, torch.device("cpu")), theirs)


def test_llama3_scaling_keeps_short_wavelengths_and_stretches_long_ones() -> None:
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    values = BASE | {"rope_theta": 500000.0, "head_dim": 128}
    plain = parse_config(values, Path("config.json"))
    scaled = parse_config(
        values | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}}, Path("config.json")
    )
    assert scaled.rope_scaling == scaling
    ratio = rope.inverse_frequencies(plain, torch.device("cpu")) / rope.inverse_frequencies(scaled, torch.device("cpu"))
    assert ratio[0] == 1.0 and ratio[-1] == 8.0
    assert bool((ratio.diff() >= 0).all())


def test_rope_turns_pairs_by_position_times_frequency() -> None:
    frequencies = torch.tensor([1.0, 0.25])
    x = torch.tensor([1.0, 2.0, 0.0, 0.0]).view(1, 1, 1, 4)
    cos, sin = rope.cos_sin(torch.tensor([[3]]), frequencies, torch.float32)
    angles = 3 * frequencies.double()
    expected = torch.cat((torch.tensor([1.0, 2.0]) * angles.cos(), torch.tensor([1.0, 2.0]) * angles.sin()))
    torch.testing.assert_close(rope.apply(x, cos, sin).flatten().double(), expected, atol=1e-6, rtol=0)


def test_rms_norm_works_in_float32_and_rounds_before_the_weight() -> None:
    """The order of roundings in 16-bit arithmetic is part of the published models."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 64, generator=generator).bfloat16(), torch.rand(64, generator=generator).bfloat16()
    wide = x.float()
    normal = (wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()).bfloat16()
    close = (normed(x, weight, 1e-5).float() - (weight * normal).float()).abs() <= 2**-7 * (
        weight * normal
    ).float().abs()
    assert normed(x, weight, 1e-5).dtype == torch.bfloat16
    assert bool(close.all())
