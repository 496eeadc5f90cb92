"""The metadata of a GGUF file as a ``config.json``, and which of its tensors is which of the decoder's."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from octo_run.errors import OctoError, quoted, shown
from octo_run.models.config import ModelConfig, parse_config
from octo_run.models.families import FAMILIES
from octo_run.models.foreign import AGAIN
from octo_run.models.gguf.header import GgufModel
from octo_run.models.rope import inverse_frequencies
from octo_run.models.safetensors_file import TensorEntry, TensorFile

#: llama.cpp's name of an architecture -> the Hugging Face one.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM", "gemma3": "Gemma3ForCausalLM",
}  # fmt: skip
#: Those whose rows of q and k llama.cpp's converter reorders: it turns neighbouring coordinates, not halves of a head.
REORDERED = ("llama",)
#: Layers of the largest Gemma 3.
_GEMMA3_27B = 62
#: Those whose layers have experts.
_WITH_EXPERTS = ("qwen3moe",)
EMBEDDING, HEAD, ROPE_FREQS = "token_embd.weight", "output.weight", "rope_freqs.weight"

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
#: What is called otherwise in an architecture.
_OTHERWISE = {
    "gemma3": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
#: The matrices of all experts of a layer, and those of one, as older files have them.
_EXPERTS = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))_exps\.weight")
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj")
#: Rotary frequencies, which are computed from the configuration.
_COMPUTED = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")
#: What `model_config` reads, or what changes nothing. Any other entry of an architecture must be neutral.
_KNOWN_KEYS = {
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "block_count", "context_length", "embedding_length", "feed_forward_length",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned",
    "rope.scaling.original_context_length", "rope.scale_linear", "tensor_data_layout", "vocab_size",
}  # fmt: skip
#: Beside them those of an architecture.
_OWN_KEYS = {"gemma3": {"attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"}}
#: The same for architectures with experts, all of which are chosen by a softmax and weighted to a sum of 1.
_EXPERT_KEYS = {"expert_count", "expert_used_count", "expert_feed_forward_length"}
_EXPERT_NEUTRAL = {"expert_gating_func": 1, "expert_weights_norm": True, "expert_weights_scale": 1.0}
#: Values that change nothing, where 0, false and an empty text are not those.
_NEUTRAL = {
    "attention.causal": True, "rope.scaling.attn_factor": 1.0, "logit_scale": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0, "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0,
}  # fmt: skip


class Fields:
    """Typed access to metadata; every complaint names the file and the entry."""

    def __init__(self, path: Path, values: dict[str, Any], prefix: str = "") -> None:
        self.path, self.values, self.prefix = path, values, prefix

    def fail(self, key: str, problem: str) -> OctoError:
        return OctoError(f"{self.path}: the metadata {self.prefix}{key} {problem}.")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of the type ``kind`` (float: a whole number, too). A list with one value throughout counts as it."""
        value = self.values.get(self.prefix + key)
        if isinstance(value, list) and kind is not list and value and all(item == value[0] for item in value):
            value = value[0]
        if value is None:
            return default
        good = isinstance(value, (int, float) if kind is float else kind)
        if not good or (isinstance(value, bool) and kind is not bool):
            raise self.fail(key, f"is {quoted(value)}, which octo-run does not understand")
        return value

    def need(self, key: str, kind: type) -> Any:
        value = self.get(key, kind)
        if value is None:
            raise self.fail(key, f"is missing: {AGAIN}, or make the file again")
        return value


def architecture(model: GgufModel) -> str:
    """llama.cpp's name of the architecture.

    Raises:
        OctoError: It is none that octo-run computes.
    """
    fields = Fields(model.path, model.metadata)
    name = fields.need("general.architecture", str)
    kind = fields.get("general.type", str, "model")
    if kind != "model":
        raise OctoError(f"{model.path} holds no model but something else ({shown(kind, 40)}): give the model's file.")
    if name not in ARCHITECTURES:
        raise OctoError(
            f"{model.path} has the architecture {quoted(name)}, and octo-run imports {', '.join(ARCHITECTURES)}."
        )
    return str(name)


def model_config(model: GgufModel, ends: dict[str, Any]) -> tuple[dict[str, Any], ModelConfig]:
    """The content of ``config.json``, and its meaning.

    Args:
        ends: ``bos_token_id``, ``eos_token_id`` and the like.

    Raises:
        OctoError: Something is missing, contradictory, or changes the computation in a way that the decoder does not
            follow.
    """
    name = architecture(model)
    fields = Fields(model.path, model.metadata, f"{name}.")
    experts = name in _WITH_EXPERTS
    _refuse_unknown(fields, name)
    hidden, heads = fields.need("embedding_length", int), fields.need("attention.head_count", int)
    head_dim = fields.get("attention.key_length", int, hidden // max(1, heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.get(key, int, head_dim) != head_dim:
            raise fields.fail(key, f"is {quoted(fields.get(key, int))} where {head_dim}, the size of a head, is needed")
    values = {
        "architectures": [ARCHITECTURES[name]],
        "model_type": FAMILIES[ARCHITECTURES[name]].model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": fields.need("feed_forward_length", int),
        "num_hidden_layers": fields.need("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.need("context_length", int),
        "rms_norm_eps": short(fields.need("attention.layer_norm_rms_epsilon", float)),
        "rope_theta": short(fields.get("rope.freq_base", float, 10000.0)),
        "vocab_size": _shape(model, EMBEDDING)[0],
        "tie_word_embeddings": HEAD not in model.tensors,
        "dtype": "bfloat16",
        **ends,
    }
    if name != "qwen2":
        values["attention_bias"] = "blk.0.attn_q.bias" in model.tensors
    if experts:
        values |= {
            "num_experts": fields.need("expert_count", int),
            "num_experts_per_tok": fields.need("expert_used_count", int),
            "moe_intermediate_size": fields.need("expert_feed_forward_length", int),
            "norm_topk_prob": True,
        }
    if name == "gemma3":
        values |= _gemma3(fields, values)
    if name == "llama":
        values["mlp_bias"] = "blk.0.ffn_gate.bias" in model.tensors
    scaling = _scaling(fields)
    cfg = parse_config(values, model.path)
    if ROPE_FREQS in model.tensors:
        if scaling is not None:
            raise fields.fail("rope.scaling.factor", f"is given, and so is the tensor {ROPE_FREQS}: they contradict")
        scaling = _llama3(model, values, cfg)
    if scaling is not None:
        values["rope_scaling"] = scaling
    return values, parse_config(values, model.path)


def _gemma3(fields: Fields, values: dict[str, Any]) -> dict[str, Any]:
    """What Gemma 3 has beside the others. llama.cpp scales attention by the size of a head, but in the model of 62
    layers by what there is of the hidden state for a head."""
    large = values["num_hidden_layers"] == _GEMMA3_27B
    head = values["hidden_size"] // max(1, values["num_attention_heads"]) if large else values["head_dim"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": head,
        "sliding_window": fields.need("attention.sliding_window", int),
        "sliding_window_pattern": fields.get("attention.sliding_window_pattern", int, 6),
        "rope_local_base_freq": short(fields.get("rope.freq_base_swa", float, 10000.0)),
    }


def short(value: float) -> float:
    """A number that a GGUF file holds in float32 as the shortest decimal that means it: 1e-05."""
    return float(str(np.float32(value)))


def _shape(model: GgufModel, name: str) -> tuple[int, ...]:
    if name not in model.tensors:
        raise OctoError(f"{model.path} has no tensor {name}, which every model has: {AGAIN}.")
    return model.tensors[name].shape


def _refuse_unknown(fields: Fields, name: str) -> None:
    known, neutral = _KNOWN_KEYS | _OWN_KEYS.get(name, set()), _NEUTRAL
    if name in _WITH_EXPERTS:
        known, neutral = known | _EXPERT_KEYS, neutral | _EXPERT_NEUTRAL
    for key, value in fields.values.items():
        short = key.removeprefix(fields.prefix)
        if short == key or short in known:
            continue
        items = value if isinstance(value, list) else [value]
        if any(item != neutral.get(short, item) or (short not in neutral and item) for item in items):
            raise fields.fail(short, f"is {quoted(value)}, which this architecture does not have in octo-run")


def _scaling(fields: Fields) -> dict[str, Any] | None:
    """The ``rope_scaling`` that the metadata name. The factors of llama3 are a tensor instead."""
    factor = short(fields.get("rope.scaling.factor", float, fields.get("rope.scale_linear", float, 1.0)))
    kind = fields.get("rope.scaling.type", str, "none" if factor in (0.0, 1.0) else "linear")
    if kind not in ("linear", "yarn", "none"):
        raise fields.fail(
            "rope.scaling.type", f"is {quoted(kind)}, and octo-run knows linear, yarn and llama3's factors"
        )
    if kind == "none" or factor in (0.0, 1.0):
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = fields.need("rope.scaling.original_context_length", int)
    return scaling


def _llama3(model: GgufModel, values: dict[str, Any], cfg: ModelConfig) -> dict[str, Any] | None:
    """The ``rope_scaling`` whose frequencies those of the tensor ``rope_freqs`` are: divisors, one for each pair.

    The tensor is what llama.cpp's converter computed from the ``rope_scaling`` of a ``config.json``.
    """
    entry = model.tensors[ROPE_FREQS]
    if entry.shape != (cfg.head_dim // 2,) or entry.dtype != "F32":
        raise OctoError(f"{model.path}: {ROPE_FREQS} is {entry.dtype} {quoted(entry.shape)}, not F32 of half a head.")
    with TensorFile(entry.file) as file:
        divisors = np.frombuffer(file.read_bytes(entry.start, entry.end - entry.start), "<f4").astype(np.float64)
    if np.all(divisors == 1.0):
        return None
    plain = inverse_frequencies(cfg, torch.device("cpu"))
    for scaling in _candidates(divisors, plain.numpy().astype(np.float64) / (2 * math.pi)):
        scaled = inverse_frequencies(parse_config({**values, "rope_scaling": scaling}, model.path), plain.device)
        if np.allclose((plain / scaled).numpy(), divisors, rtol=1e-5, atol=0):
            return scaling
    raise OctoError(f"{model.path}: the factors in {ROPE_FREQS} are not those of llama3, the only ones octo-run knows.")


def _candidates(divisors: np.ndarray, turns: np.ndarray) -> list[dict[str, Any]]:
    """Scalings that may have made ``divisors``, of frequencies that turn so often for each token.

    Between the two wavelengths ``1 / divisor`` is linear in the frequency. That settles ``factor`` and the two
    wavelengths; ``low_freq_factor`` is 1, as a common factor of the three other numbers changes nothing.
    """
    factor = short(float(divisors.max()))
    if not 1.0 < factor < math.inf or not divisors.min() > 0:
        return []
    published = (4.0, 8192)
    found = [published]
    between = (divisors > 1.0 + 1e-6) & (divisors < factor * (1 - 1e-6))
    if between.sum() >= 2:
        shares = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
        slope, offset = np.polyfit(turns[between], shares, 1)  # share = (original * turns - 1) / (high - 1)
        if slope > 0 > offset:
            high, original = 1 - 1 / offset, slope / -offset
            found.append((round(high, 3), round(original)))
    return [
        {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
        for high, original in found
        if high > 1.0 and 1 <= original < 2**31
    ]


def tensor_names(model: GgufModel, expected: dict[str, tuple[int, ...]]) -> dict[str, TensorEntry]:
    """The decoder's name -> the tensor, for all that the decoder needs.

    Args:
        expected: Name -> shape, as `expected_tensors` gives them.

    Raises:
        OctoError: Tensors are missing, unknown or misshapen.
    """
    found: dict[str, TensorEntry] = {}
    arch = architecture(model)
    wanted = {gguf_name(name, arch): name for name in expected}
    stored = dict(part for name, entry in model.tensors.items() for part in _by_expert(name, entry))
    for name, entry in stored.items():
        if _COMPUTED.fullmatch(name):
            continue
        if name not in wanted:
            raise OctoError(
                f"{model.path} has the tensor {quoted(name)}, which is no part of the models that octo-run knows."
            )
        shape = expected[wanted[name]]
        if entry.shape != shape:
            raise OctoError(
                f"{model.path}: the tensor {name} has the shape {quoted(list(entry.shape))} where its metadata ask for "
                f"{list(shape)}: {AGAIN}."
            )
        found[wanted[name]] = entry
    missing = [name for name, ours in wanted.items() if ours not in found]
    if missing:
        raise OctoError(f"{model.path} lacks {len(missing):,} tensors of its model (such as {missing[0]}): {AGAIN}.")
    return {name: found[name] for name in expected}


def _by_expert(name: str, entry: TensorEntry) -> list[tuple[str, TensorEntry]]:
    """The matrices of the experts in a tensor of all of a layer's; of another tensor itself."""
    match = _EXPERTS.fullmatch(name)
    if match is None or len(entry.shape) != 3 or not entry.shape[0]:
        return [(name, entry)]
    size, found = (entry.end - entry.start) // entry.shape[0], []
    for expert in range(entry.shape[0]):
        start = entry.start + expert * size
        part = replace(entry, shape=entry.shape[1:], start=start, end=start + size)
        found.append((f"{match[1]}.{expert}.weight", part))
    return found


def gguf_name(name: str, arch: str) -> str:
    """What GGUF calls one of the decoder's tensors in an architecture of llama.cpp."""
    stem, _, kind = name.rpartition(".")
    if (expert := _EXPERT.fullmatch(stem)) is not None:
        return f"blk.{expert[1]}.ffn_{expert[3]}.{expert[2]}.{kind}"
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if layer is None:
        return f"{next(ours for ours, theirs in _TOP.items() if theirs == stem)}.{kind}"
    names = {**_LAYER, **_OTHERWISE.get(arch, {})}
    return f"blk.{layer[1]}.{next(ours for ours, theirs in names.items() if theirs == layer[2])}.{kind}"
