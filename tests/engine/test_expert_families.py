"""Families with routed experts against transformers: random models that it saves, read by us."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from octo_run.engine import Engine, SamplingParams
from octo_run.kernels.linear import PackedWeight
from octo_run.models.cache import DEMO_PATH
from octo_run.models.decoder import Decoder
from octo_run.models.experts import Experts
from octo_run.models.linear import Linear, PackedLinear

BASE: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 192, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 3,
    "num_key_value_heads": 1, "max_position_embeddings": 1024, "initializer_range": 0.1, "bos_token_id": 1,
    "eos_token_id": 4, "tie_word_embeddings": False,
}  # fmt: skip
QWEN = {"moe_intermediate_size": 40, "num_experts": 7, "num_experts_per_tok": 3}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral-g5-d64": (
        "mixtral", {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 64, "num_local_experts": 3},
    ),
    "qwen2-moe": ("qwen2_moe", {**QWEN, "shared_expert_intermediate_size": 56, "mlp_only_layers": [1]}),
    "qwen2-moe-normalised": (
        "qwen2_moe", {**QWEN, "norm_topk_prob": True, "num_experts_per_tok": 1, "tie_word_embeddings": True},
    ),
    "qwen2-moe-unbiased": ("qwen2_moe", {**QWEN, "shared_expert_intermediate_size": 40, "qkv_bias": False}),
    "qwen3-moe": ("qwen3_moe", {**QWEN, "norm_topk_prob": True, "head_dim": 64}),
    "qwen3-moe-dense-between": (
        "qwen3_moe", {**QWEN, "decoder_sparse_step": 2, "attention_bias": True, "head_dim": 80},
    ),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 2}),
    "granite-moe": (
        "granitemoe",
        {"num_local_experts": 6, "num_experts_per_tok": 2, "embedding_multiplier": 3.0, "attention_multiplier": 0.2,
         "residual_multiplier": 0.5, "logits_scaling": 4.0},
    ),
    "gpt-oss": (
        "gpt_oss", {"num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 64, "sliding_window": 128},
    ),
}  # fmt: skip


def save(family: str, folder: Path, **more: Any) -> Any:
    """A random float32 model of the family, which is returned, in a folder with the embedded model's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, changes = FAMILIES[family]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(BASE | changes | more))).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith(("bias", "sinks")):  # made as zeros
                tensor.normal_(std=0.3)
    model.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(DEMO_PATH / name, folder)
    return model


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def tokens(count: int) -> list[int]:
    return torch.randint(0, 8192, (count,), generator=torch.Generator().manual_seed(7)).tolist()


def greedy(engine: Engine, ids: list[int], count: int) -> list[int]:
    """``count`` greedy tokens, past any end token."""
    engine.end_ids = frozenset()
    return [token.id for token in engine.generate(ids, SamplingParams(max_tokens=count))]


@torch.inference_mode()
def greedy_by_transformers(model: Any, ids: list[int], count: int) -> list[int]:
    answer, cache, fresh = list[int](), None, torch.tensor([ids])
    for _ in range(count):
        out = model(fresh, past_key_values=cache, use_cache=True)
        cache, fresh = out.past_key_values, out.logits[:, -1:].argmax(-1)
        answer.append(int(fresh))
    return answer


@pytest.mark.few("mixtral", "granite-moe", "gpt-oss")
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_logits_and_greedy_tokens(family: str, tmp_path: Path) -> None:
    """At every position, in chunks; and step by step."""
    model = save(family, tmp_path)
    engine = Engine.load(tmp_path, kv="bf16", device="cpu", max_context=512)
    ids = tokens(300)
    theirs = model(torch.tensor([ids])).logits[0]
    for step in (None, 65):
        assert relative(engine.logits(ids, step), theirs) < 1e-4, f"step {step}"
    assert greedy(engine, ids[:190], 40) == greedy_by_transformers(model, ids[:190], 40)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_logits_however_the_prompt_is_cut(family: str, tmp_path: Path) -> None:
    model, ids = save(family, tmp_path), tokens(300)
    engine = Engine.load(tmp_path, kv="bf16", device="cpu", max_context=512)
    theirs = model(torch.tensor([ids])).logits[0]
    for step in (7, 1):
        assert relative(engine.logits(ids, step), theirs) < 1e-4, f"step {step}"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_most_likely_tokens_with_a_coded_cache(family: str, tmp_path: Path) -> None:
    """Weights of a size at which a random model's attention is not settled by its largest logit."""
    model = save(family, tmp_path, initializer_range=0.05)
    ids = tokens(300)
    theirs = model(torch.tensor([ids])).logits[0].argmax(-1)
    engine = Engine.load(tmp_path, kv="oct4", device="cpu", max_context=512)
    agreement = (engine.logits(ids, 1).argmax(-1) == theirs).float().mean()
    assert float(agreement) >= 0.97, float(agreement)


def dense_of(decoder: Decoder) -> None:
    """Put the values of packed matrices in their place."""

    def dense(linear: Any) -> Any:
        return Linear(linear.weight.dequantised(), linear.bias) if isinstance(linear, PackedLinear) else linear

    for index, layer in enumerate(decoder.layers):
        mixer, mlp = layer.attention, layer.mlp
        if isinstance(mlp, Experts):
            w = mlp.weights
            assert isinstance(w.gate_up, PackedWeight) and isinstance(w.down, PackedWeight)
            w = replace(w, gate_up=w.gate_up.dequantised(), down=w.down.dequantised())
            shared = mlp.shared
            if shared is not None:
                assert isinstance(shared.gate_up, PackedLinear)
                shared = replace(shared, gate_up=dense(shared.gate_up), down=dense(shared.down))
            mlp = replace(mlp, weights=w, shared=shared)
        else:
            mlp = replace(mlp, gate_up=dense(mlp.gate_up), down=dense(mlp.down))
        mixer = replace(mixer, qkv=dense(mixer.qkv), out=dense(mixer.out))
        decoder.layers[index] = replace(layer, mixer=mixer, mlp=mlp)


@pytest.mark.few("mixtral-int4")
@pytest.mark.parametrize("weights", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "gpt-oss"])
@torch.inference_mode()
def test_experts_packed_on_load(family: str, weights: str, tmp_path: Path) -> None:
    """Against the model of their values, which is near the model itself."""
    model = save(family, tmp_path, initializer_range=0.05)
    engine = Engine.load(tmp_path, kv="bf16", weights=weights, device="cpu", max_context=512)
    assert engine.plan.weight_format == weights
    ids = tokens(150)
    ours = [engine.logits(ids, step) for step in (None, 1)]
    dense_of(engine.forward.decoder)
    exact = engine.logits(ids)
    assert all(relative(one, exact) < 1e-3 for one in ours)
    theirs = model(torch.tensor([ids])).logits[0]
    # Where rounding changes the experts that are chosen, a token's logits are others: the median is not of those.
    error = float(((exact - theirs).norm(dim=1) / theirs.norm(dim=1)).median())
    assert error < {"int4": 0.3, "int8": 0.03, "fp8": 0.1}[weights]


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [None, "int4"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_on_a_gpu(family: str, weights: str | None, tmp_path: Path) -> None:
    """Against the CPU in float32; in bfloat16 recorded steps give what unrecorded ones give, bit by bit."""
    save(family, tmp_path, initializer_range=0.05)
    options: dict[str, Any] = {"kv": "bf16", "weights": weights, "max_context": 512}
    ids = tokens(300)
    cpu = Engine.load(tmp_path, device="cpu", **options)
    gpu = Engine.load(tmp_path, device="cuda", dtype="float32", **options)
    for step, part in ((None, ids), (7, ids), (1, ids[:100])):
        ours, theirs = gpu.logits(part, step).cpu(), cpu.logits(part, step)
        if weights is None:
            assert relative(ours, theirs) < 1e-4
        else:  # codes may differ at ties, because a GPU measures inputs with another rounding
            assert float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).median()) < 2e-2
    engine = Engine.load(tmp_path, device="cuda", dtype="bfloat16", **options)
    sequence, run, wanted = engine.sequence(), engine.step._run, list[Tensor]()
    engine.step._run = lambda _key, work: work()  # type: ignore[method-assign, assign]
    for recorded in (False, True):
        sequence.cut(0)
        engine.prefill(sequence, ids[:190])
        for place, token in enumerate(ids[190:240]):
            engine.step.start(sequence, token, SamplingParams())
            engine.step.launch([sequence])
            engine.step.read(sequence)
            if recorded:
                assert torch.equal(engine.step.logits[0], wanted[place])
            else:
                wanted.append(engine.step.logits[0].clone())
        engine.step._run = run  # type: ignore[method-assign]
