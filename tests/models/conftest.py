"""GGUF files of small random models, written by the gguf package's own writer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA3 = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def gguf_name(name: str, arch: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    names = LAYER | GEMMA3 if arch == "gemma3" else LAYER
    return f"blk.{layer}.{names[rest]}.{kind}"


def reordered(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter writes those of q and k: the halves of a head interleaved."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def small_bpe() -> dict[str, Any]:
    """The metadata of a byte-level BPE with ChatML's tokens; a token that only text makes stands behind them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    library.train_from_iterator(["The quick brown fox jumps over the lazy dog, she sells sea shells."] * 4, trainer)
    import json

    model = json.loads(library.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def with_stacked_experts(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With the matrices of a layer's experts in one tensor, by GGUF's name, the router by its own."""
    found: dict[str, Any] = {}
    for name, values in weights.items():
        parts = name.split(".")
        if "experts" in parts:
            found.setdefault(f"blk.{parts[2]}.ffn_{parts[6].removesuffix('_proj')}_exps.weight", []).append(values)
        else:
            found["blk." + parts[2] + ".ffn_gate_inp.weight" if ".mlp.gate." in name else name] = values
    return {name: np.stack(values) if isinstance(values, list) else values for name, values in found.items()}


@dataclass
class SmallGguf:
    """What goes into a GGUF file: metadata, and tensors as (values or bytes, GGML type), to be changed and written."""

    arch: str
    config: dict[str, Any]
    weights: dict[str, Any]
    metadata: dict[str, Any]
    tensors: dict[str, tuple[np.ndarray, Any]] = field(default_factory=dict)

    def write(self, path: Path, **splits: Any) -> Path:
        from gguf import GGUFWriter

        path.parent.mkdir(parents=True, exist_ok=True)
        writer = GGUFWriter(path, self.arch, **splits)
        for key, value in self.metadata.items():
            if value is not None:
                add(writer, key, value)
        for name, (data, kind) in self.tensors.items():
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "rms_norm_eps": 1e-6, "head_dim": 128},
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "rms_norm_eps": 1e-6, "head_dim": 64,
        "num_hidden_layers": 8, "sliding_window": 24, "sliding_window_pattern": 6, "query_pre_attn_scalar": 64,
        "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1e6, "tie_word_embeddings": True,
        "rope_local_base_freq": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "qwen3moe": {
        "architectures": ["Qwen3MoeForCausalLM"], "rms_norm_eps": 1e-6, "head_dim": 64, "num_experts": 5,
        "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True,
    },
}  # fmt: skip


@pytest.fixture
def small_gguf() -> Callable[..., SmallGguf]:
    """``small_gguf("llama", quant="F32", seed=0, **config)``: a random model as llama.cpp's converter writes it.

    Matrices are of the type ``quant``, all else F32. ``weights`` are the values by Hugging Face names, in float32 and
    exact in bfloat16.
    """

    def make(arch: str = "llama", *, quant: str = "F32", seed: int = 0, **changes: Any) -> SmallGguf:
        import torch
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        from octo_run.models.config import parse_config
        from octo_run.models.weights import random_weights

        config = {
            "hidden_act": "silu", "vocab_size": 330, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
        } | SHAPES[arch] | changes  # fmt: skip
        cfg = parse_config(config, Path("config.json"))
        weights = {name: tensor.float() for name, tensor in random_weights(cfg, "cpu", torch.bfloat16, seed).items()}
        metadata = {
            f"{arch}.block_count": cfg.num_layers,
            f"{arch}.context_length": cfg.max_position_embeddings,
            f"{arch}.embedding_length": cfg.hidden_size,
            f"{arch}.feed_forward_length": cfg.intermediate_size,
            f"{arch}.attention.head_count": cfg.num_heads,
            f"{arch}.attention.head_count_kv": cfg.num_kv_heads,
            f"{arch}.attention.key_length": cfg.head_dim,
            f"{arch}.attention.value_length": cfg.head_dim,
            f"{arch}.attention.layer_norm_rms_epsilon": cfg.rms_norm_eps,
            f"{arch}.rope.freq_base": cfg.rope_theta,
            f"{arch}.vocab_size": cfg.vocab_size,
            "general.name": "A small model",
            **small_bpe(),
        }
        if arch == "gemma3":
            metadata |= {
                f"{arch}.attention.sliding_window": config["sliding_window"],
                f"{arch}.rope.scaling.type": "linear",
                f"{arch}.rope.scaling.factor": 8.0,
            }
        if cfg.experts is not None:
            metadata |= {
                f"{arch}.expert_count": cfg.experts.count,
                f"{arch}.expert_used_count": cfg.experts.chosen,
                f"{arch}.expert_feed_forward_length": cfg.experts.inner,
            }
        result = SmallGguf(arch, config, weights, metadata)
        for name, values in with_stacked_experts({name: tensor.numpy() for name, tensor in weights.items()}).items():
            if arch == "llama" and ".q_proj." in name:
                values = reordered(values, cfg.num_heads)
            elif arch == "llama" and ".k_proj." in name:
                values = reordered(values, cfg.num_kv_heads)
            if arch == "gemma3" and name.endswith("norm.weight"):
                values = values + np.float32(1)
            kind = GGMLQuantizationType[quant if values.ndim > 1 and "ffn_gate_inp" not in name else "F32"]
            result.tensors[name if name.startswith("blk.") else gguf_name(name, arch)] = (
                quantize(np.ascontiguousarray(values), kind),
                kind,
            )
        return result

    return make


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of the test's own."""
    monkeypatch.setenv("OCTO_RUN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module", autouse=True)
def _small_models_are_measured_quickly(short_calibration: None) -> None: ...
