"""The metadata of a GGUF file as a ``config.json``."""

import math
from typing import Any

import numpy as np
import torch

from octo_run.errors import OctoError, quoted
from octo_run.models.config import ModelConfig, parse_config
from octo_run.models.families import FAMILIES
from octo_run.models.foreign import AGAIN
from octo_run.models.gguf.architectures import EXPERT_INNER, PREDICTING, Architecture, architecture
from octo_run.models.gguf.fields import Fields, short
from octo_run.models.gguf.header import GgufModel
from octo_run.models.rope import inverse_frequencies
from octo_run.models.safetensors_file import TensorFile

#: The lists of factors of longrope -> the tensors that hold them.
_FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
INNER = "feed_forward_length"
EMBEDDING, HEAD, ROPE_FREQS = "token_embd.weight", "output.weight", "rope_freqs.weight"

#: What `model_config` reads, or what changes nothing. Any other entry of an architecture must be neutral.
_KNOWN_KEYS = {
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "block_count", "context_length", "embedding_length", "feed_forward_length", "rope.dimension_count",
    "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned",
    "rope.scaling.original_context_length", "rope.scale_linear", "tensor_data_layout", "vocab_size",
}  # fmt: skip
#: Values that change nothing, where 0, false and an empty text are not those.
_NEUTRAL = {
    "attention.causal": True, "rope.scaling.attn_factor": 1.0, "logit_scale": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0, "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0,
}  # fmt: skip


def model_config(model: GgufModel, ends: dict[str, Any]) -> tuple[dict[str, Any], ModelConfig]:
    """The content of ``config.json``, and its meaning.

    Args:
        ends: ``bos_token_id``, ``eos_token_id`` and the like.

    Raises:
        OctoError: Something is missing, contradictory, or changes the computation in a way that the decoder does not
            follow.
    """
    name, arch = architecture(model)
    fields, family = Fields(model.path, model.metadata, f"{name}."), FAMILIES[arch.model]
    longrope = arch.longrope and any(name in model.tensors for name in _FACTORS.values())
    _refuse_unknown(fields, arch, {"rope.scaling.attn_factor"} if longrope else set())
    hidden, heads = fields.need("embedding_length", int), fields.need("attention.head_count", int)
    head_dim = fields.get("attention.key_length", int, hidden // max(1, heads))
    turned = fields.get("rope.dimension_count", int, head_dim)
    layers = fields.need("block_count", int) - (fields.get(PREDICTING, int, 0) if PREDICTING in arch.keys else 0)
    # models whose MLPs are experts throughout may have no other
    inner = next((key for key in (INNER, EXPERT_INNER) if f"{fields.prefix}{key}" in fields.values), INNER)
    for key, value in (("attention.value_length", None), ("rope.dimension_count", turned)):
        value = fields.get(key, int, head_dim) if value is None else value
        if value != head_dim and not (key.startswith("rope") and family.rope.partial and 0 < value < head_dim):
            raise fields.fail(key, f"is {quoted(value)} where {head_dim}, the size of a head, is needed")
    values = {
        "architectures": [arch.model],
        "model_type": family.model_type,
        family.activation[0]: family.activation[1],
        "hidden_size": hidden,
        "intermediate_size": fields.need(inner, int),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.need("context_length", int),
        family.eps[0]: short(fields.need(arch.eps, float)),
        "rope_theta": short(fields.get("rope.freq_base", float, 10000.0)),
        "vocab_size": _shape(model, EMBEDDING)[0],
        "tie_word_embeddings": HEAD not in model.tensors,
        "dtype": "bfloat16",
        **ends,
    }
    if family.attention_bias_field:
        values["attention_bias"] = "blk.0.attn_q.bias" in model.tensors
    if family.mlp_bias_field:
        values["mlp_bias"] = "blk.0.ffn_gate.bias" in model.tensors
    if family.rope.partial:
        values["partial_rotary_factor"] = turned / max(1, head_dim)
    values |= arch.more(fields, values, model.tensors)
    scaling = _scaling(model, fields, arch, values, longrope)
    if scaling is not None:
        values["rope_scaling"] = scaling
    cfg = parse_config(values, model.path)
    if cfg.rope.rotary(cfg.head_dim) != turned:
        raise fields.fail("rope.dimension_count", f"is {quoted(turned)}, and octo-run turns an even number")
    return values, cfg


def _shape(model: GgufModel, name: str) -> tuple[int, ...]:
    if name not in model.tensors:
        raise OctoError(f"{model.path} has no tensor {name}, which every model has: {AGAIN}.")
    return model.tensors[name].shape


def _refuse_unknown(fields: Fields, arch: Architecture, read: set[str]) -> None:
    base = fields.values.get(f"{fields.prefix}rope.freq_base")
    neutral = {**_NEUTRAL, "rope.freq_base_swa": base, **arch.neutral}
    known = (_KNOWN_KEYS - arch.neutral.keys()) | arch.keys | {arch.eps} | read
    for key, value in fields.values.items():
        short = key.removeprefix(fields.prefix)
        if short == key or short in known:
            continue
        items = value if isinstance(value, list) else [value]
        if any(item != neutral.get(short, item) or (short not in neutral and item) for item in items):
            raise fields.fail(short, f"is {quoted(value)}, which this architecture does not have in octo-run")


def _scaling(
    model: GgufModel, fields: Fields, arch: Architecture, values: dict[str, Any], longrope: bool
) -> dict[str, Any] | None:
    """The ``rope_scaling`` that metadata and tensors say, given the fields without it; None: there is none."""
    if longrope:
        return _longrope(model, fields, values)
    scaling = _named_scaling(fields, arch)
    if ROPE_FREQS in model.tensors:
        if scaling is not None:
            raise fields.fail("rope.scaling.factor", f"is given, and so is the tensor {ROPE_FREQS}: they contradict")
        scaling = _llama3(model, values, parse_config(values, model.path))
    if scaling is None and FAMILIES[arch.model].rope.left_out:  # which would count
        return {"rope_type": "default"}
    return scaling


def _named_scaling(fields: Fields, arch: Architecture) -> dict[str, Any] | None:
    """The ``rope_scaling`` that the metadata name. The factors of llama3 and longrope are tensors instead."""
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
        scaling |= arch.yarn(fields)
    return scaling


def _numbers(model: GgufModel, name: str, count: int) -> np.ndarray:
    """A tensor of float32, in float64."""
    _shape(model, name)
    entry = model.tensors[name]
    if entry.shape != (count,) or entry.dtype != "F32":
        raise OctoError(f"{model.path}: {name} is {entry.dtype} {quoted(list(entry.shape))}, not F32 {[count]}.")
    with TensorFile(entry.file) as file:
        return np.frombuffer(file.read_bytes(entry.start, entry.end - entry.start), "<f4").astype(np.float64)


def _llama3(model: GgufModel, values: dict[str, Any], cfg: ModelConfig) -> dict[str, Any] | None:
    """The ``rope_scaling`` whose frequencies those of the tensor ``rope_freqs`` are: divisors, one for each pair.

    The tensor is what llama.cpp's converter computed from the ``rope_scaling`` of a ``config.json``.
    """
    divisors = _numbers(model, ROPE_FREQS, cfg.head_dim // 2)
    if np.all(divisors == 1.0):
        return None
    plain = inverse_frequencies(cfg, torch.device("cpu"))
    for scaling in _candidates(divisors, plain.numpy().astype(np.float64) / (2 * math.pi)):
        scaled = inverse_frequencies(parse_config({**values, "rope_scaling": scaling}, model.path), plain.device)
        if np.allclose((plain / scaled).numpy(), divisors, rtol=1e-5, atol=0):
            return scaling
    raise OctoError(f"{model.path}: the factors in {ROPE_FREQS} are not those of llama3, the only ones octo-run knows.")


def _longrope(model: GgufModel, fields: Fields, values: dict[str, Any]) -> dict[str, Any]:
    """The ``rope_scaling`` of two lists of factors, given the fields without it."""
    pairs = int(values["partial_rotary_factor"] * values["head_dim"]) // 2
    lists = {field: [short(one) for one in _numbers(model, name, pairs)] for field, name in _FACTORS.items()}
    scaling = {"rope_type": "longrope", **lists}
    scaling_of = parse_config({**values, "rope_scaling": scaling}, model.path).rope_scaling
    assert scaling_of is not None
    factor = fields.need("rope.scaling.attn_factor", float)
    if math.isclose(factor, scaling_of.attention_factor, rel_tol=1e-6):
        return scaling
    return {**scaling, "attention_factor": short(factor)}


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
