"""Writes a GGUF file of a Llama model, without its vocabulary, so that llama.cpp can be timed with the same weights.

    python scripts/write_gguf.py MODEL OUT.gguf [--type f16|q8_0|q4_1]

MODEL is a name or folder as for `octo-run`. All matrices get the type, norms stay float32, as llama.cpp's own
converter does it.
"""

import argparse
from pathlib import Path

import gguf
import torch

from octo_run.models.cache import resolve
from octo_run.models.config import ModelConfig, load_config
from octo_run.models.gguf.architectures import ARCHITECTURES
from octo_run.models.gguf.names import gguf_names
from octo_run.models.weights import load_weights

#: The types of a file, and what llama.cpp calls a file that is mostly of one.
TYPES = {
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_1": (gguf.GGMLQuantizationType.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
}


def pairs_together(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key matrix in llama.cpp's order: the two of a rotary pair side by side."""
    rows = weight.view(heads, 2, -1, weight.shape[1])
    return rows.transpose(1, 2).reshape(weight.shape)


def settings(writer: "gguf.GGUFWriter", cfg: ModelConfig) -> None:
    """The model's sizes."""
    writer.add_context_length(cfg.max_position_embeddings)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_block_count(cfg.num_layers)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_heads)
    writer.add_head_count_kv(cfg.num_kv_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=TYPES, default="f16")
    given = parser.parse_args()
    folder = resolve(given.model)
    cfg = load_config(folder)
    if cfg.architecture != "LlamaForCausalLM" or cfg.rope_scaling is not None or cfg.qkv_bias or cfg.mlp_bias:
        raise SystemExit(f"{given.model} is no plain Llama model: this script writes no other")
    weights = load_weights(folder, cfg, "cpu", torch.float32)
    kind, whole = TYPES[given.type]
    partial = given.out.with_name(given.out.name + ".part")
    writer = gguf.GGUFWriter(partial, "llama")
    settings(writer, cfg)
    writer.add_file_type(whole)
    for name in list(weights):
        weight = weights.pop(name)
        for part, heads in (("q_proj", cfg.num_heads), ("k_proj", cfg.num_kv_heads)):
            if name.endswith(f"{part}.weight"):
                weight = pairs_together(weight, heads)
        numbers, (stored,) = weight.numpy(), gguf_names(name, ARCHITECTURES["llama"])
        if numbers.ndim == 1:
            writer.add_tensor(stored, numbers)
        else:
            writer.add_tensor(stored, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(given.out)
    print(f"{given.out}: {given.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
