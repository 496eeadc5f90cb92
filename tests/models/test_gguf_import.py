"""Models made of GGUF files: the weights that went in, the logits of transformers' own reader, or one sentence."""

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from octo_run.engine.quantise import quantise
from octo_run.errors import OctoError, UsageError
from octo_run.models import cache, hub, safetensors_writer
from octo_run.models.config import load_config
from octo_run.models.decoder import Decoder
from octo_run.models.gguf import importer, tensors
from octo_run.models.gguf.header import read_model
from octo_run.models.gguf.importer import import_model
from octo_run.models.names import HubName
from octo_run.models.weights import load_weights
from octo_run.tokenizer import load_tokenizer


def attention(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True).transpose(1, 2)


@torch.inference_mode()
def logits_of(folder: Path, ids: Tensor) -> Tensor:
    cfg = load_config(folder)
    decoder = Decoder(cfg, load_weights(folder, cfg, "cpu", torch.float32), None, None)
    return decoder.logits(decoder.hidden(ids, torch.arange(ids.shape[1])[None], attention))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def transformers_model(path: Path) -> Any:
    """The model of transformers' own reader (`from_pretrained` with a GGUF file asks for accelerate, this does not)."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    if "moe_intermediate_size" in config.to_dict():  # which that reader passes over
        config.moe_intermediate_size = 64
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    weights = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def refused(path: Path, name: str | None = None) -> str:
    """The one sentence with which a file is refused; nothing is left in the cache."""
    with pytest.raises(OctoError) as error:
        import_model(path, name)
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and len(text) <= 480 and ".incomplete" not in text
    left = [place for place in cache.cache_folder().rglob("*") if ".locks" not in place.parts]
    assert {place.name for place in left} <= {"CACHEDIR.TAG", ".locks"}, left
    assert len(hub.list_models()) == 1
    return text


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-wide-head": ("llama", {"tie_word_embeddings": True, "head_dim": 48}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3": ("qwen3", {"rope_theta": 1e6}),
    "qwen3moe": ("qwen3moe", {"rope_theta": 1e6}),
    "gemma3": ("gemma3", {}),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("quant", ["F32", "BF16"])
def test_weights_and_config_come_back(name: str, quant: str, small_gguf: Callable[..., Any], tmp_path: Path) -> None:
    arch, changes = CONFIGS[name]
    small = small_gguf(arch, quant=quant, **changes)
    entry = import_model(small.write(tmp_path / f"{name}.gguf"))
    assert entry.label == f"imported/{name}" and entry.complete
    cfg = load_config(entry.path)
    for key, value in small.config.items():
        stored = json.loads((entry.path / "config.json").read_text())
        assert stored.get(key, value) == value, key
    weights = load_weights(entry.path, cfg, "cpu", torch.float32)
    assert weights.keys() == small.weights.keys()
    for tensor, values in small.weights.items():
        assert torch.equal(weights[tensor], values), tensor


@pytest.mark.parametrize(
    "name", ["llama", "qwen2-tied", "qwen3", "qwen3moe"]
)  # the others have what that reader passes over
def test_logits_equal_those_of_transformers(name: str, small_gguf: Callable[..., Any], tmp_path: Path) -> None:
    """Transformers reads the same file by code of its own."""
    arch, changes = CONFIGS[name]
    path = small_gguf(arch, **changes).write(tmp_path / "model.gguf")
    oracle = transformers_model(path)
    ids = torch.randint(0, 300, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        theirs = oracle(ids).logits
    assert relative(logits_of(import_model(path).path, ids), theirs) < 1e-5


@pytest.mark.few(3)
@pytest.mark.parametrize("quant", ["F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_matrices(quant: str, small_gguf: Callable[..., Any], tmp_path: Path) -> None:
    """What the import stores is what transformers' reader decodes, rounded to bfloat16 once."""
    small = small_gguf("llama", quant=quant)
    path = small.write(tmp_path / "model.gguf")
    theirs = transformers_model(path).state_dict()
    folder = import_model(path).path
    ours = load_weights(folder, load_config(folder), "cpu", torch.bfloat16)
    for name, values in ours.items():
        assert torch.equal(values, theirs[name].to(torch.bfloat16)), name
    name = "model.layers.1.self_attn.q_proj.weight"
    assert relative(ours[name].float(), small.weights[name]) < (0.2 if quant.startswith("Q4") else 0.1)


def half(value: float) -> bytes:
    return struct.pack("<e", value)


def q4_k_values(block: bytes) -> list[float]:
    """A block of Q4_K by its description in ggml: 256 items of 4 bits in 8 groups with 6-bit scales and minima."""
    d, least = struct.unpack("<2e", block[:4])
    packed, items = block[4:16], block[16:]
    values = []
    for group in range(8):
        if group < 4:
            scale, minimum = packed[group] & 63, packed[group + 4] & 63
        else:
            scale = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
            minimum = packed[group + 4] >> 4 | packed[group] >> 6 << 4
        for i in range(32):
            nibble = items[group // 2 * 32 + i] >> (4 * (group % 2)) & 15
            values.append(d * scale * nibble - least * minimum)
    return values


def q6_k_values(block: bytes) -> list[float]:
    """A block of Q6_K: 256 items of 6 bits in 16 groups with 8-bit scales."""
    low, high, scales = block[:128], block[128:192], struct.unpack("16b", block[192:208])
    (d,) = struct.unpack("<e", block[208:])
    values = []
    for i in range(256):
        part, rest = divmod(i, 128)
        quarter, place = divmod(rest, 32)
        nibble = low[part * 64 + (quarter % 2) * 32 + place] >> (4 * (quarter // 2)) & 15
        bits = high[part * 32 + place] >> (2 * quarter) & 3
        values.append(d * scales[i // 16] * ((nibble | bits << 4) - 32))
    return values


@pytest.mark.parametrize("quant", ["Q4_K", "Q6_K"])
def test_k_quants(quant: str, small_gguf: Callable[..., Any], tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType

    small = small_gguf("llama", hidden_size=256, intermediate_size=256, head_dim=64)
    rng = np.random.default_rng(1)
    expected: dict[str, list[float]] = {}
    for name, (data, _) in list(small.tensors.items()):
        if data.ndim != 2:
            continue
        blocks = []
        for _ in range(data.size // 256):
            scale = half(float(rng.uniform(1e-4, 1e-3)))
            if quant == "Q4_K":
                blocks.append(scale + half(float(rng.uniform(1e-4, 1e-3))) + rng.bytes(12 + 128))
            else:
                blocks.append(rng.bytes(128 + 64 + 16) + scale)
        decode = q4_k_values if quant == "Q4_K" else q6_k_values
        expected[name] = [value for block in blocks for value in decode(block)]
        stored = np.frombuffer(b"".join(blocks), np.uint8).reshape(data.shape[0], -1)
        small.tensors[name] = stored, GGMLQuantizationType[quant]
    folder = import_model(small.write(tmp_path / "model.gguf")).path
    ours = load_weights(folder, load_config(folder), "cpu", torch.bfloat16)
    for name, ggml in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
        values = torch.tensor(expected[f"blk.1.{ggml}.weight"], dtype=torch.float32).to(torch.bfloat16)
        difference = (ours[f"model.layers.1.{name}.weight"].reshape(-1).float() - values.float()).abs()
        # decoded in float32 in another order: a last bit of bfloat16 may differ
        assert (difference <= values.float().abs() * 2**-7).all() and (difference == 0).float().mean() > 0.99


def test_large_tensors_are_decoded_in_pieces_and_shards(
    small_gguf: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = small_gguf("llama", quant="BF16")
    monkeypatch.setattr(tensors, "PIECE_ITEMS", 1000)
    monkeypatch.setattr(safetensors_writer, "SHARD_BYTES", 50_000)
    pieces: list[int] = []
    decode = tensors._decode
    monkeypatch.setattr(tensors, "_decode", lambda rows, kind: pieces.append(rows.size) or decode(rows, kind))
    states: list[hub.PullProgress] = []
    entry = import_model(small.write(tmp_path / "model.gguf"), progress=states.append)
    assert max(pieces) <= 16 * 64 * 2, "no more than a head's rows"
    files = sorted(path.name for path in entry.path.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    weights = load_weights(entry.path, load_config(entry.path), "cpu", torch.float32)
    assert all(torch.equal(weights[name], values) for name, values in small.weights.items())
    done = [state.done_bytes for state in states]
    assert done == sorted(done) and done[-1] == states[-1].total_bytes
    assert done[-1] == sum((entry.path / name).stat().st_size for name in files)


# Rotary frequencies


def factors(scaling: dict[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """The divisors that llama.cpp's converter writes for a llama3 scaling."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    result = []
    for i in range(head_dim // 2):
        wavelength = 2 * np.pi * theta ** (2 * i / head_dim)
        if wavelength < original / high:
            result.append(1.0)
        elif wavelength > original / low:
            result.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            result.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(result, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize(("high", "original", "head_dim"), [(4.0, 8192, 64), (4.0, 8192, 128), (8.0, 4096, 128)])
def test_llama3_scaling_comes_back_from_the_factors(
    factor: float, high: float, original: int, head_dim: int, small_gguf: Callable[..., Any], tmp_path: Path
) -> None:
    from gguf import GGMLQuantizationType

    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }  # fmt: skip
    small = small_gguf("llama", head_dim=head_dim, rope_theta=500000.0)
    small.tensors["rope_freqs.weight"] = factors(scaling, 500000.0, head_dim), GGMLQuantizationType.F32
    folder = import_model(small.write(tmp_path / "model.gguf")).path
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] == scaling


def test_other_rope_scalings(small_gguf: Callable[..., Any], tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType

    small = small_gguf("llama")
    small.metadata |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    folder = import_model(small.write(tmp_path / "linear.gguf")).path
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    small.metadata["llama.rope.scaling.type"] = "longrope"
    with pytest.raises(OctoError, match=r"llama\.rope\.scaling\.type is 'longrope'"):
        import_model(small.write(tmp_path / "longrope.gguf"))
    small.metadata["llama.rope.scaling.type"] = "yarn"
    with pytest.raises(OctoError, match=r"llama\.rope\.scaling\.original_context_length is missing"):
        import_model(small.write(tmp_path / "yarn.gguf"))
    small.metadata |= {"llama.rope.scaling.original_context_length": 128, "llama.rope.scaling.yarn_beta_fast": 32.0}
    folder = import_model(small.write(tmp_path / "yarn.gguf")).path
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] == scaling
    small.metadata["llama.rope.scaling.yarn_beta_fast"] = 16.0
    with pytest.raises(OctoError, match=r"llama\.rope\.scaling\.yarn_beta_fast is 16\.0, which this architecture"):
        import_model(small.write(tmp_path / "other-yarn.gguf"))
    for name in ("type", "factor", "yarn_beta_fast"):
        small.metadata[f"llama.rope.scaling.{name}"] = None
    small.tensors["rope_freqs.weight"] = np.linspace(1, 3, 8, dtype=np.float32), GGMLQuantizationType.F32
    with pytest.raises(OctoError, match=r"the factors in rope_freqs\.weight are not those of llama3"):
        import_model(small.write(tmp_path / "odd.gguf"))
    small.tensors["rope_freqs.weight"] = np.ones(8, np.float32), GGMLQuantizationType.F32
    folder = import_model(small.write(tmp_path / "ones.gguf")).path
    assert load_config(folder).rope_scaling is None


# What is refused by name


def changed(key: str, value: Any) -> Callable[[Any], None]:
    return lambda small: small.metadata.__setitem__(key, value)


def retyped(small: Any) -> None:
    from gguf import GGMLQuantizationType

    small.tensors["blk.0.ffn_up.weight"] = np.zeros((96, 64 // 32 * 40), np.uint8), GGMLQuantizationType.Q8_1


def extra(name: str) -> Callable[[Any], None]:
    def change(small: Any) -> None:
        from gguf import GGMLQuantizationType

        small.tensors[name] = np.zeros((4, 64), np.float32), GGMLQuantizationType.F32

    return change


def nan(small: Any) -> None:
    data, kind = small.tensors["blk.1.ffn_up.weight"]
    data[3, 7] = np.nan
    small.tensors["blk.1.ffn_up.weight"] = data, kind


REFUSALS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "architecture": (
        lambda s: setattr(s, "arch", "falcon"),
        r"the architecture 'falcon', and octo-run imports llama, .* only: try the model's repository of safetensors",
    ),
    "adapter": (changed("general.type", "adapter"), r"holds no model but something else \(adapter\)"),
    "experts": (changed("llama.expert_used_count", 8), r"llama\.expert_used_count is 8, which this architecture"),
    "window": (changed("llama.attention.sliding_window", 128), r"llama\.attention\.sliding_window is 128"),
    "unequal layers": (changed("llama.attention.head_count_kv", [2, 1]), r"head_count_kv is \[2, 1\]"),
    "value length": (changed("llama.attention.value_length", 8), r"value_length is 8 where 16"),
    "part of a head": (changed("llama.rope.dimension_count", 8), r"rope\.dimension_count is 8 where 16"),
    "no heads": (changed("llama.attention.head_count", None), r"llama\.attention\.head_count is missing"),
    "zero heads": (changed("llama.attention.head_count", 0), r"num_attention_heads is 0"),
    "no layers": (changed("llama.block_count", None), r"llama\.block_count is missing"),
    "many layers": (changed("llama.block_count", 4000), r"lacks 35,982 tensors"),
    "layers beyond": (changed("llama.block_count", 2**31), r"num_hidden_layers is 2147483648"),
    "fewer layers": (changed("llama.block_count", 1), r"the tensor 'blk\.1\."),
    "no epsilon": (changed("llama.attention.layer_norm_rms_epsilon", None), r"layer_norm_rms_epsilon is missing"),
    "text for a number": (changed("llama.block_count", "two"), r"block_count is 'two'"),
    "another width": (changed("llama.feed_forward_length", 97), r"has the shape \[96, 64\] where .* \[97, 64\]"),
    "quantization": (retyped, r"blk\.0\.ffn_up\.weight is quantized as Q8_1"),
    "tensor": (extra("blk.0.ffn_gate_inp.weight"), r"the tensor 'blk\.0\.ffn_gate_inp\.weight'"),
    "no embedding": (lambda s: s.tensors.pop("token_embd.weight"), r"no tensor token_embd\.weight"),
    "no norm": (lambda s: s.tensors.pop("blk.1.attn_norm.weight"), r"lacks 1 tensors .*blk\.1\.attn_norm\.weight"),
    "not a number": (nan, r"model\.layers\.1\.mlp\.up_proj\.weight holds values that are no finite numbers"),
    "tokenizer": (changed("tokenizer.ggml.model", "rwkv"), r"tokenizer\.ggml\.model is 'rwkv'"),
    "no tokenizer": (changed("tokenizer.ggml.model", None), r"tokenizer\.ggml\.model is missing"),
    "pre-tokenizer": (changed("tokenizer.ggml.pre", "falcon"), r"tokenizer\.ggml\.pre is 'falcon', and .* smollm"),
    "no pre-tokenizer": (changed("tokenizer.ggml.pre", None), r"tokenizer\.ggml\.pre is missing"),
    "no tokens": (changed("tokenizer.ggml.tokens", None), r"tokenizer\.ggml\.tokens is missing"),
    "no merges": (changed("tokenizer.ggml.merges", None), r"tokenizer\.ggml\.merges is missing"),
    "a merge of one": (changed("tokenizer.ggml.merges", ["ab"]), r"merges has 'ab'"),
    "a merge of nothing": (changed("tokenizer.ggml.merges", ["a zz"]), r"merge of 'a' and 'zz' .* makes no token"),
    "types": (changed("tokenizer.ggml.token_type", [1, 1]), r"token_type has 2 entries for 300 tokens"),
    "end beyond": (changed("tokenizer.ggml.eos_token_id", 320), r"eos_token_id is 320, and there are 300 tokens"),
    "too few rows": (
        lambda s: (
            s.metadata["tokenizer.ggml.tokens"].extend(f"t{i}" for i in range(40))
            or s.metadata["tokenizer.ggml.token_type"].extend([1] * 40)
        ),
        r"340 tokens and rows for 330",
    ),
    "a token twice": (lambda s: s.metadata["tokenizer.ggml.tokens"].__setitem__(9, "a"), r"has 'a' twice"),
    "sampling": (changed("general.sampling.temp", -1.0), r"generation_config\.json: temperature is -1\.0"),
}


@pytest.mark.few(8)
@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_supported_is_refused_by_name(name: str, small_gguf: Callable[..., Any], tmp_path: Path) -> None:
    change, sentence = REFUSALS[name]
    small = small_gguf("llama")
    change(small)
    path = small.write(tmp_path / "model.gguf")
    text = refused(path)
    assert re.search(sentence, text), text
    assert str(path) in text and "octo-run-import" not in text


VALUES: tuple[Any, ...] = (
    0, -1, 1, 3, 2**31, 2**63, True, 1e-40, 1e30, float("nan"), "", "x", "\x1b[2J\u202e", [], ["x"], [1, 2], [""] * 300,
    [2**40] * 300, [float("inf")] * 300, list(range(300)), [f"t {i}" for i in range(300)],
)  # fmt: skip


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_any_value_of_any_entry_is_taken_or_refused(kind: str, small_gguf: Callable[..., Any], tmp_path: Path) -> None:
    small = small_gguf("llama", vocab_size=300, num_hidden_layers=1)
    small.metadata |= {"tokenizer.ggml.model": kind, "tokenizer.ggml.unknown_token_id": 0}
    small.metadata["tokenizer.ggml.scores"] = [-float(i) for i in range(300)]
    model = read_model(small.write(tmp_path / "model.gguf"))
    name = HubName("imported/x")
    importer._Import(model, name, None, None)
    keys = [*model.metadata, "llama.rope.scaling.type", "llama.rope.scaling.factor", "general.sampling.top_k"]
    keys += ["tokenizer.ggml.add_space_prefix", "tokenizer.ggml.precompiled_charsmap", "general.type", "llama.odd"]
    refusals = 0
    for key in keys:
        for value in VALUES:
            other = replace(model, metadata=model.metadata | {key: value})
            try:
                importer._Import(other, name, None, None)
            except OctoError as error:
                refusals += 1
                text = str(error)
                assert text.isprintable() and len(text) <= 480 and text.endswith(".") and "octo-run-import" not in text
                assert str(model.path) in text, (key, value, text)
    assert refusals > len(keys) * len(VALUES) / 3


def cut_experts(small: Any) -> None:
    data, kind = small.tensors["blk.1.ffn_up_exps.weight"]
    small.tensors["blk.1.ffn_up_exps.weight"] = np.ascontiguousarray(data[:-1]), kind


EXPERTS: list[tuple[Callable[[Any], Any], str]] = [
    (changed("qwen3moe.expert_count", None), "expert_count is missing"),
    (changed("qwen3moe.expert_count", 6), r"tensor blk\.0\.ffn_gate_inp\.weight has the shape \[5, 64\]"),
    (changed("qwen3moe.expert_used_count", 9), "num_experts_per_tok is 9, more than the 5 experts"),
    (
        changed("qwen3moe.expert_feed_forward_length", 32),
        r"has the shape \[64, 64\] where its metadata ask for \[32, 64\]",
    ),
    (changed("qwen3moe.expert_gating_func", 2), r"expert_gating_func is 2, which this architecture does not have"),
    (changed("qwen3moe.expert_weights_norm", False), r"expert_weights_norm is False"),
    (changed("qwen3moe.expert_shared_count", 1), r"expert_shared_count is 1, which this architecture does not have"),
    (cut_experts, r"lacks 1 tensors of its model \(such as blk\.1\.ffn_up\.4\.weight\)"),
    (lambda s: s.tensors.pop("blk.0.ffn_down_exps.weight"), r"lacks 5 tensors .*blk\.0\.ffn_down\.0"),
    (extra("blk.0.ffn_gate_up_exps.weight"), r"the tensor 'blk\.0\.ffn_gate_up_exps\.weight'"),
]


@pytest.mark.parametrize("number", range(len(EXPERTS)))
def test_experts_that_are_refused(number: int, small_gguf: Callable[..., Any], tmp_path: Path) -> None:
    change, sentence = EXPERTS[number]
    small = small_gguf("qwen3moe")
    change(small)
    text = refused(small.write(tmp_path / "model.gguf"))
    assert re.search(sentence, text), text


def test_any_value_of_what_is_said_of_experts(small_gguf: Callable[..., Any], tmp_path: Path) -> None:
    model, name = read_model(small_gguf("qwen3moe").write(tmp_path / "model.gguf")), HubName("imported/x")
    for key in ("expert_count", "expert_used_count", "expert_feed_forward_length", "expert_gating_func"):
        for value in VALUES:
            try:
                importer._Import(replace(model, metadata=model.metadata | {f"qwen3moe.{key}": value}), name, None, None)
            except OctoError as error:
                assert str(error).isprintable() and len(str(error)) <= 480 and str(model.path) in str(error)


GEMMA3: list[tuple[Callable[[Any], Any], str]] = [
    (changed("gemma3.attention.sliding_window", None), "attention.sliding_window is missing"),
    (changed("gemma3.attention.sliding_window_pattern", 0), "sliding_window_pattern is 0"),
    (changed("gemma3.attention.sliding_window_pattern", [True, False]), "which octo-run does not understand"),
    (changed("gemma3.final_logit_softcapping", 30.0), r"final_logit_softcapping is 30\.0, which this architecture"),
    (lambda s: s.tensors.pop("blk.3.post_ffw_norm.weight"), r"lacks 1 tensors .*blk\.3\.post_ffw_norm\.weight"),
]


@pytest.mark.parametrize("number", range(len(GEMMA3)))
def test_gemma_3_that_is_refused(number: int, small_gguf: Callable[..., Any], tmp_path: Path) -> None:
    change, sentence = GEMMA3[number]
    small = small_gguf("gemma3")
    change(small)
    text = refused(small.write(tmp_path / "model.gguf"))
    assert re.search(sentence, text), text


def test_what_gemma_3_is_told_by_its_shape(small_gguf: Callable[..., Any], tmp_path: Path) -> None:
    """Of 62 layers attention is scaled by a head's share of the hidden state; what is said of windows counts."""
    small = small_gguf("gemma3", num_hidden_layers=62, head_dim=32, query_pre_attn_scalar=16)
    small.metadata |= {"gemma3.attention.sliding_window_pattern": 3, "gemma3.rope.freq_base_swa": 20000.0}
    cfg = load_config(import_model(small.write(tmp_path / "model.gguf")).path)
    assert cfg.attention_scale == 16**-0.5 and cfg.sliding_window == 24
    assert [index for index, kind in enumerate(cfg.layer_types[:6]) if kind == "full_attention"] == [2, 5]
    assert cfg.sliding_rope is not None and cfg.sliding_rope.theta == 20000.0


# Splits and archives


@pytest.fixture
def splits(small_gguf: Callable[..., Any], tmp_path: Path) -> list[Path]:
    small_gguf("llama").write(tmp_path / "parts" / "model.gguf", split_max_tensors=8)
    parts = sorted((tmp_path / "parts").glob("*.gguf"))
    assert len(parts) == 3 and parts[0].name == "model-00001-of-00003.gguf"
    return parts


def test_splits_are_one_model(splits: list[Path], small_gguf: Callable[..., Any]) -> None:
    small = small_gguf("llama")
    entry = import_model(splits[0])
    assert entry.label == "imported/model"
    weights = load_weights(entry.path, load_config(entry.path), "cpu", torch.float32)
    assert all(torch.equal(weights[name], values) for name, values in small.weights.items())


def test_splits_that_lie(splits: list[Path]) -> None:
    assert "give the first, model-00001-of-00003.gguf" in refused(splits[1])
    content = splits[2].read_bytes()
    splits[2].unlink()
    assert "1 of the 3 files of model-00001-of-00003.gguf are not beside it (such as model-00003" in refused(splits[0])
    splits[2].write_bytes(splits[1].read_bytes())
    assert "is called file 3 of 3 and says that it is 2 of 3" in refused(splits[0])
    splits[2].write_bytes(content)
    alone = splits[0].with_name("alone.gguf")
    alone.write_bytes(splits[0].read_bytes())
    assert "is one of 3 files of a model and not called" in refused(alone)
    other = splits[0].with_name("model-00001-of-00002.gguf")
    other.write_bytes(splits[0].read_bytes())
    assert "is called file 1 of 2 and says that it is 1 of 3" in refused(other)
    key = b"split.tensors.count" + struct.pack("<I", 5)
    first = splits[0].read_bytes()
    assert first.count(key) == 1
    place = first.index(key) + len(key)
    splits[0].write_bytes(first[:place] + struct.pack("<i", 99) + first[place + 4 :])
    assert "hold 99 tensors and they hold 21" in refused(splits[0])


def archive(path: Path, **files: Path | bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.read_bytes()
            target.writestr(name.replace("__", "/").replace("_gguf", ".gguf"), data)
    return path


def test_archives_hold_one_file(small_gguf: Callable[..., Any], tmp_path: Path) -> None:
    small = small_gguf("llama")
    model = small.write(tmp_path / "model.gguf")
    for name in ("a.whl", "b.zip"):
        entry = import_model(archive(tmp_path / name, pkg__The_gguf=model, pkg__py=b"x = 1"), name[0])
        weights = load_weights(entry.path, load_config(entry.path), "cpu", torch.float32)
        assert all(torch.equal(weights[key], values) for key, values in small.weights.items())
        assert not list(cache.cache_folder().rglob("*.incomplete"))
        hub.remove(entry.label)
    assert import_model(archive(tmp_path / "a.whl", **{"pkg__Small-1B_gguf": model})).label == "imported/Small-1B"
    hub.remove("imported/Small-1B")
    assert "holds 2 GGUF files" in refused(archive(tmp_path / "two.zip", a_gguf=model, b_gguf=model))
    assert "holds 0 GGUF files" in refused(archive(tmp_path / "none.zip", a=b"x"))
    assert "a.gguf in" in refused(archive(tmp_path / "bad.zip", a_gguf=b"GGUF?")), "not the temporary file"
    whole = (tmp_path / "b.zip").read_bytes()
    for number, data in enumerate((whole[:-100], whole[:200] + whole[400:], b"", b"PK\x05\x06" + bytes(18))):
        (tmp_path / f"{number}.zip").write_bytes(data)
        refused(tmp_path / f"{number}.zip")
    torn = bytearray(whole)
    torn[2000:2020] = bytes(20)
    (tmp_path / "torn.zip").write_bytes(torn)
    assert "torn.zip is not valid zip" in refused(tmp_path / "torn.zip")


def test_an_archive_of_endless_lists_takes_no_memory(tmp_path: Path) -> None:
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, 60_000_000, 0, 0)
    path = tmp_path / "long.zip"
    with path.open("wb") as file:
        file.truncate(60_000_000)
        file.seek(60_000_000)
        file.write(end)
    assert "list of files has 60,000,000 bytes" in refused(path)


# Names, the cache, faults on the way


def test_the_cache_finds_imported_models(small_gguf: Callable[..., Any], tmp_path: Path) -> None:
    path = small_gguf("llama").write(tmp_path / "model.gguf")
    entry = import_model(path, "mine")
    assert hub.resolve("imported/mine") == entry.path
    assert [item.label for item in hub.list_models()] == ["octo-demo", "imported/mine"]
    with pytest.raises(OctoError, match="imported/mine is there already: remove it with `octo-run rm imported/mine`"):
        import_model(path, "imported/mine")
    with pytest.raises(UsageError, match="use `octo-run import FILE mine`"):
        hub.pull("imported/mine")
    (entry.path / "tokenizer.json").unlink()
    with pytest.raises(OctoError, match="run `octo-run import FILE mine` again"):
        hub.resolve("imported/mine")
    assert import_model(path, "mine").complete
    assert hub.remove("imported/mine") > 0
    with pytest.raises(OctoError, match="`octo-run import FILE mine`"):
        hub.resolve("imported/mine")


@pytest.mark.parametrize(
    ("file", "label"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1"),
        ("a model -- v1..gguf", "a-model-v1"),
        ("ä.gguf", "model"),
        ("-x-.GGUF", "x"),
        ("x" * 150 + ".gguf", "x" * 90),
    ],
)
def test_default_names(file: str, label: str, small_gguf: Callable[..., Any], tmp_path: Path) -> None:
    assert import_model(small_gguf("llama").write(tmp_path / file)).label == f"imported/{label}"


@pytest.mark.parametrize("name", ["", "a/b", "a--b", "x@y", "..", "-x", "a b", "imported/", "n" * 200])
def test_names_that_are_none(name: str, small_gguf: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no name for a model"):
        import_model(small_gguf("llama").write(tmp_path / "model.gguf"), name)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no file"):
        import_model(tmp_path / "none.gguf")
    assert "holds no GGUF file" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "is no regular file" in refused(tmp_path / "pipe.gguf")


def test_a_folder_with_one_model(splits: list[Path], small_gguf: Callable[..., Any]) -> None:
    """Of a split model the first; what belongs to images does not count."""
    small_gguf("llama").write(splits[0].with_name("mmproj-model.gguf"))
    assert import_model(splits[0].parent).label == "imported/model"
    small_gguf("llama").write(splits[0].with_name("other-Q8_0.gguf"))
    with pytest.raises(UsageError, match=r"holds 2 GGUF models; give one of them: `octo-run import .*other-Q8_0.gguf`"):
        import_model(splits[0].parent, "other")


def test_the_command(
    small_gguf: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from octo_run.cli import main

    path = small_gguf("llama").write(tmp_path / "model.gguf")
    assert main(["import", str(path), "mine"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "imported/mine: " in err and "chat with it: octo-run chat -m imported/mine" in err
    assert main(["list"]) == 0 and "imported/mine" in capsys.readouterr().out
    assert main(["show", "imported/mine"]) == 0 and "LlamaForCausalLM" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    prompt = [
        "generate",
        "-m",
        "imported/mine",
        "-p",
        "The quick",
        "-n",
        "3",
        "--temp",
        "0",
        "--device",
        "cpu",
        "--kv",
        "bf16",
    ]
    assert main([*prompt, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["generated_tokens"] > 0
    assert main(["rm", "imported/mine", "--yes"]) == 0
    assert main(["import", str(tmp_path / "none.gguf")]) == 2
    assert "octo-run: There is no file" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:1000])
    assert main(["import", str(path)]) == 1
    assert "model.gguf is no complete GGUF file" in capsys.readouterr().err


def test_a_full_disk_is_told_first(
    small_gguf: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    path = small_gguf("llama").write(tmp_path / "model.gguf")
    monkeypatch.setattr(importer.store.shutil, "disk_usage", lambda _path: SimpleNamespace(free=100_000))
    assert "is too full for imported/model" in refused(path)


@pytest.mark.slow
def test_a_disk_that_takes_no_more(small_gguf: Callable[..., Any], tmp_path: Path) -> None:
    path = small_gguf("llama").write(tmp_path / "model.gguf")
    command = f"ulimit -f 64; exec {sys.executable} -m octo_run import {path}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1 and "takes no file that large" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(cache.cache_folder().rglob("*.incomplete")) and len(hub.list_models()) == 1


def test_a_file_that_changes_while_it_is_read(
    small_gguf: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_gguf("llama").write(tmp_path / "model.gguf")
    check = tensors.check_types
    monkeypatch.setattr(tensors, "check_types", lambda model: check(model) or os.truncate(path, 60_000))
    assert "was changed or replaced while it was read" in refused(path)


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_an_import_that_is_stopped_leaves_no_model(sign: int, small_gguf: Callable[..., Any], tmp_path: Path) -> None:
    path = small_gguf("llama").write(tmp_path / "model.gguf")
    code = (
        "import sys, time; from octo_run.models.gguf import importer; from octo_run.models import safetensors_writer\n"
        "def slow(*_): print('writing', flush=True); time.sleep(60)\n"
        "safetensors_writer.Shard.write = slow\nimporter.import_model(sys.argv[1])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"writing\n"
    with pytest.raises(OctoError, match="Another process is writing or removing imported/model now"):
        import_model(path)
    process.send_signal(sign)
    process.communicate(timeout=30)
    assert len(hub.list_models()) == 1
    entry = import_model(path)
    assert not list(cache.cache_folder().rglob("*.incomplete"))
    assert load_tokenizer(entry.path).decode(load_tokenizer(entry.path).encode("The fox")) == "The fox"


def test_sampling_and_ends(small_gguf: Callable[..., Any], tmp_path: Path) -> None:
    small = small_gguf("llama")
    folder = import_model(small.write(tmp_path / "plain.gguf")).path
    assert load_config(folder).eos_token_ids == (2, 0), "the end that is named first, then <|endoftext|>"
    assert json.loads((folder / "generation_config.json").read_text())["do_sample"] is False
    small.metadata |= {"general.sampling.temp": 0.6, "general.sampling.top_k": 20}
    folder = import_model(small.write(tmp_path / "sampled.gguf")).path
    values = json.loads((folder / "generation_config.json").read_text())
    assert values["do_sample"] and values["temperature"] == 0.6 and values["top_k"] == 20


@pytest.mark.parametrize(
    ("arch", "quant", "weights"),
    [
        ("llama", "Q8_0", "int4"),
        ("qwen2", "F32", "int8"),
        ("qwen3moe", "Q8_0", "int8"),
        ("qwen3moe", "F32", "int4"),
        ("gemma3", "Q8_0", "int8"),
    ],
)
def test_quantised_imports_are_what_quantising_an_import_gives(
    arch: str, quant: str, weights: str, small_gguf: Callable[..., Any], tmp_path: Path
) -> None:
    small = small_gguf(arch, quant=quant, intermediate_size=192, tie_word_embeddings=arch == "qwen2")
    path = small.write(tmp_path / "model.gguf")
    plain, out = import_model(path, "plain"), tmp_path / "out"
    quantise(plain.path, out, weights, device="cpu")
    packed = import_model(path, "packed", weights=weights)
    assert packed.complete and packed.bytes < 0.9 * plain.bytes
    want, got = (load_file(folder / "model.safetensors") for folder in (out, packed.path))
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (out, packed.path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_a_quantised_import_that_cannot_be_is_refused_first(small_gguf: Callable[..., Any], tmp_path: Path) -> None:
    path = small_gguf("llama").write(tmp_path / "model.gguf")  # 96 columns
    with pytest.raises(OctoError, match=r"96 columns, no multiple of 64"):
        import_model(path, weights="int4")
    with pytest.raises(UsageError, match="There is no format of weights 'int5'"):
        import_model(path, weights="int5")
    assert not [*cache.cache_folder().glob("models--*/snapshots/*")]
