"""Writes a model folder of transformers as a GGUF file, as llama.cpp's converter does.

Names of tensors and metadata are those of the gguf package's own tables and writer. What the converter does to tensors,
and what it writes of a configuration, is told here once more, apart from the importer.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file
from torch import Tensor

#: Hugging Face's ``model_type`` -> llama.cpp's architecture.
ARCHS = {
    "mixtral": "llama", "ministral3": "mistral3", "mistral": "mistral3", "gpt_oss": "gpt-oss", "olmo3": "olmo2",
    "qwen3_next": "qwen3next", "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe",
}  # fmt: skip
PERMUTED = ("llama", "mistral3", "granite", "smollm3")
GEMMA = ("gemma2", "gemma3")
DELTA = ("qwen3next", "qwen35", "qwen35moe")


def permuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key matrix, the two of a rotary pair side by side."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


class Converter:
    """One file in the making: ``metadata`` and ``tensors`` may be changed before `write`."""

    def __init__(self, folder: Path, vocabulary: dict[str, Any], quant: str = "F32") -> None:
        import transformers

        self.config = transformers.AutoConfig.from_pretrained(folder).to_dict()
        self.kind = self.config["model_type"]
        self.arch = ARCHS.get(self.kind, self.kind)
        self.weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        self.vocabulary, self.quant = vocabulary, quant
        self.rope = dict(self.config.get("rope_parameters") or {})
        self.heads, self.kv = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        which = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.arch)
        self.names = gguf.get_tensor_name_map(which, self.config["num_hidden_layers"])
        self.tensors = {name: tensor for stem in self.weights for name, tensor in self._converted(stem)}

    @property
    def head_dim(self) -> int:
        return self.config.get("head_dim") or self.config["hidden_size"] // self.heads

    def _name(self, name: str) -> str:
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        return found

    def _converted(self, name: str) -> Iterator[tuple[str, Tensor]]:
        tensor = self.weights[name]
        if self.kind == "gpt_oss":
            yield from self._of_gpt_oss(name, tensor)
            return
        if self.arch in DELTA:
            yield from self._of_qwen(name, tensor)
            return
        if ".experts." in name:
            if ".experts.0." in name:  # with the others behind it
                every = [self.weights[name.replace(".0.w", f".{i}.w")] for i in range(self.config["num_local_experts"])]
                layer, matrix = name.split(".")[2], name.split(".")[-2]
                yield self._name(f"layers.{layer}.feed_forward.experts.{matrix}.weight"), torch.stack(every)
            return
        if self.arch in PERMUTED and ".q_proj." in name:
            tensor = permuted(tensor, self.heads)
        elif self.arch in PERMUTED and ".k_proj." in name:
            tensor = permuted(tensor, self.kv)
        elif self.arch in GEMMA and name.endswith("norm.weight"):
            tensor = tensor + 1
        yield self._name(name), tensor

    def _of_gpt_oss(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        if "sinks" in name:
            name += ".weight"
        if ".experts." not in name:
            yield self._name(name), tensor
        elif "down_proj" in name:
            bias = name.endswith("_bias")
            yield (
                self._name(name.replace("_bias", ".bias") if bias else f"{name}.weight"),
                tensor if bias else tensor.transpose(-1, -2),
            )
        else:
            bias = name.endswith("_bias")
            tensor, kind = (tensor, "bias") if bias else (tensor.transpose(-1, -2), "weight")
            stem = name.removesuffix("_bias").removesuffix("gate_up_proj")
            yield self._name(f"{stem}gate_proj.{kind}"), tensor[:, ::2]
            yield self._name(f"{stem}up_proj.{kind}"), tensor[:, 1::2]

    def _of_qwen(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        keys, values = self.config["linear_num_key_heads"], self.config["linear_num_value_heads"]
        key_dim, value_dim = self.config["linear_key_head_dim"], self.config["linear_value_head_dim"]

        def spread(weight: Tensor, dim: int, size: int) -> Tensor:
            shape = [*weight.shape[:dim], keys, values // keys, size, *weight.shape[dim + 1 :]]
            return weight.reshape(shape).transpose(dim, dim + 1).reshape(weight.shape)

        if self.arch != "qwen3next" and ".linear_attn." in name:
            if ".in_proj_qkv." in name or ".conv1d." in name:
                start = 2 * keys * key_dim
                tensor = torch.cat((tensor[:start], spread(tensor[start:], 0, value_dim)))
            elif ".in_proj_z." in name:
                tensor = spread(tensor, 0, value_dim)
            elif ".out_proj." in name:
                tensor = spread(tensor, 1, value_dim)
            elif not name.endswith("norm.weight"):
                tensor = spread(tensor, 0, 1)
        if name.endswith(".A_log"):
            tensor = -tensor.exp()
        elif name.endswith(".dt_bias"):
            name = name.replace(".dt_bias", ".dt_proj.bias")
        elif ".conv1d." in name:
            tensor = tensor.squeeze()
        elif name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
            tensor = tensor + 1
        layer = (name.split(".") * 2)[2]
        if ".in_proj_qkvz." in name:
            group = values // keys * value_dim
            parts = tensor.view(keys, -1, tensor.shape[1]).split([key_dim, key_dim, group, group], 1)
            q, k, v, z = (part.flatten(0, 1) for part in parts)
            yield f"blk.{layer}.attn_qkv.weight", torch.cat((q, k, v))
            yield f"blk.{layer}.attn_gate.weight", z
        elif ".experts.gate_up_proj" in name:
            for part, half in zip(("gate", "up"), tensor.chunk(2, 1), strict=True):
                yield f"blk.{layer}.ffn_{part}_exps.weight", half
        elif ".experts.down_proj" in name:
            yield f"blk.{layer}.ffn_down_exps.weight", tensor
        elif ".experts." not in name:
            yield self._name(name), tensor
        elif ".experts.0." in name:
            names = [name.replace(".experts.0.", f".experts.{i}.") for i in range(self.config["num_experts"])]
            yield self._name(name.replace(".experts.0.", ".experts.")), torch.stack([*map(self.weights.get, names)])

    def _type(self, name: str, tensor: Tensor) -> Type:
        matrix = tensor.dim() > 1 and "ffn_gate_inp" not in name and "conv1d" not in name and not name.endswith("bias")
        if self.quant == "MXFP4":
            return Type.MXFP4 if "_exps.weight" in name else Type.F32
        return Type[self.quant] if matrix else Type.F32

    def write(self, path: Path, **changes: Any) -> Path:
        """Write the file; ``changes`` are metadata of the architecture, with _ for dots, None: left out."""
        writer = gguf.GGUFWriter(path, self.arch)
        self._general(writer)
        getattr(self, f"_{self.kind}", lambda writer: None)(writer)
        for key, value in self.vocabulary.items():
            _add(writer, key, value)
        for key, value in changes.items():
            writer.kv_data[0].pop(key, None)
            if value is not None:
                _add(writer, key, value)
        for name, tensor in self.tensors.items():
            kind = self._type(name, tensor)
            writer.add_tensor(name, gguf.quants.quantize(tensor.contiguous().numpy(), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def stored(self) -> dict[str, Tensor]:
        """The tensors as a reader decodes them."""
        found = {}
        for name, tensor in self.tensors.items():
            kind = self._type(name, tensor)
            data = gguf.quants.dequantize(gguf.quants.quantize(tensor.contiguous().numpy(), kind), kind)
            found[name] = torch.from_numpy(data).reshape(tensor.shape)
        return found

    def _general(self, writer: gguf.GGUFWriter) -> None:
        """What most architectures have."""
        config = self.config
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        if config.get("intermediate_size") is not None:
            writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv)
        if self.kind == "gemma2":  # has no base of RoPE
            return
        rope = self.rope.get("full_attention", self.rope)
        if rope.get("rope_type") == "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            for key in ("attention_factor", "beta_fast", "beta_slow"):
                if rope.get(key) is not None:
                    getattr(writer, f"add_rope_scaling_yarn_{key.replace('attention', 'attn')}")(rope[key])
        writer.add_rope_freq_base(rope["rope_theta"])
        if "sliding_attention" in self.rope:
            writer.add_rope_freq_base_swa(self.rope["sliding_attention"]["rope_theta"])
        if "layer_norm_eps" in config:
            writer.add_layer_norm_eps(config["layer_norm_eps"])
        else:
            writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        experts = config.get("num_local_experts") or config.get("num_experts")
        if experts is not None:
            writer.add_expert_count(experts)
            writer.add_expert_used_count(config["num_experts_per_tok"])
        if config.get("head_dim") is not None and self.kind not in ("phi3", "granite"):
            writer.add_key_length(config["head_dim"])
            writer.add_value_length(config["head_dim"])
        writer.add_file_type(0)

    def _mixtral(self, writer: gguf.GGUFWriter) -> None:
        writer.add_vocab_size(self.config["vocab_size"])
        writer.add_rope_dimension_count(self.head_dim)
        if self.rope.get("rope_type") == "llama3":
            self.tensors["rope_freqs.weight"] = llama3_factors(self.rope, self.head_dim)

    _smollm3 = _mistral = _mixtral

    def _ministral3(self, writer: gguf.GGUFWriter) -> None:
        self._mixtral(writer)
        writer.add_rope_scaling_yarn_log_mul(self.rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(self.rope["llama_4_scaling_beta"])

    def _gpt_oss(self, writer: gguf.GGUFWriter) -> None:
        writer.add_sliding_window(self.config["sliding_window"])
        writer.add_expert_feed_forward_length(self.config["intermediate_size"])

    def _qwen3_5_text(self, writer: gguf.GGUFWriter) -> None:
        config = self.config
        if "moe_intermediate_size" in config:
            writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
            writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
        writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
        writer.add_ssm_state_size(config["linear_key_head_dim"])
        writer.add_ssm_group_count(config["linear_num_key_heads"])
        writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
        writer.add_ssm_inner_size(config["linear_value_head_dim"] * config["linear_num_value_heads"])
        writer.add_full_attention_interval(4)
        writer.add_rope_dimension_count(int(self.head_dim * 0.25))
        if self.arch != "qwen3next":
            writer.add_rope_dimension_sections([3, 3, 2, 0])

    _qwen3_next = _qwen3_5_moe_text = _qwen3_5_text

    def _phi3(self, writer: gguf.GGUFWriter) -> None:
        context, original = (
            self.config["max_position_embeddings"],
            self.config["original_max_position_embeddings"],
        )
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_dimension_count(int(self.rope.get("partial_rotary_factor", 1.0) * self.config["hidden_size"])
                                        // self.heads)  # fmt: skip
        writer.add_sliding_window(self.config["sliding_window"] or 0)
        if "long_factor" in self.rope:
            scale = context / original
            factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
            writer.add_rope_scaling_attn_factors(factor)
            self.tensors["rope_factors_long.weight"] = torch.tensor(self.rope["long_factor"])
            self.tensors["rope_factors_short.weight"] = torch.tensor(self.rope["short_factor"])

    def _gemma2(self, writer: gguf.GGUFWriter) -> None:
        writer.add_layer_norm_rms_eps(self.config["rms_norm_eps"])
        writer.add_key_length(self.config["head_dim"])
        writer.add_value_length(self.config["head_dim"])
        writer.add_attn_logit_softcapping(self.config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(self.config["final_logit_softcapping"])
        writer.add_sliding_window(self.config["sliding_window"])

    def _granite(self, writer: gguf.GGUFWriter) -> None:
        self._mixtral(writer)
        writer.add_attention_scale(self.config["attention_multiplier"])
        writer.add_embedding_scale(self.config["embedding_multiplier"])
        writer.add_residual_scale(self.config["residual_multiplier"])
        writer.add_logit_scale(self.config["logits_scaling"])

    def _olmo3(self, writer: gguf.GGUFWriter) -> None:
        writer.add_sliding_window(self.config["sliding_window"])
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in self.config["layer_types"]])

    def _exaone4(self, writer: gguf.GGUFWriter) -> None:
        writer.add_vocab_size(self.config["vocab_size"])
        if self.config["sliding_window"] is not None:
            self._olmo3(writer)
        if self.rope.get("rope_type") == "llama3":
            self.tensors["rope_freqs.weight"] = llama3_factors(self.rope, self.head_dim)

    def _glm4(self, writer: gguf.GGUFWriter) -> None:
        writer.add_rope_dimension_count(int(self.head_dim * self.rope["partial_rotary_factor"]))

    def _cohere2(self, writer: gguf.GGUFWriter) -> None:
        writer.add_logit_scale(self.config["logit_scale"])
        writer.add_sliding_window(self.config["sliding_window"])
        writer.add_vocab_size(self.config["vocab_size"])
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def llama3_factors(rope: dict[str, Any], head_dim: int) -> Tensor:
    """The divisors that the converter computes of a llama3 scaling."""
    low, high, original = (
        rope[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    found = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * i / head_dim)
        share = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        found.append(1 / ((1 - share) / rope["factor"] + share))
    return torch.tensor(found)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)  # type: ignore[operator]
