"""The families of models: what an architecture's name settles that its ``config.json`` does not say.

A family is an entry of ``FAMILIES``. `CONTRIBUTING.md` says how to add one. Nothing here imports torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from octo_run.errors import quoted
from octo_run.models.expert_config import gpt_oss_experts, local_experts, olmoe_experts, qwen_experts
from octo_run.models.fields import Fields
from octo_run.models.gemma4 import ROPE as GEMMA4_ROPE
from octo_run.models.gemma4 import gemma4
from octo_run.models.rope_config import SLIDING, RopeFields

_MULTIPLIER = (1e-6, 1e6)
_CAP = (1e-3, 1e6)


@dataclass(frozen=True)
class Norms:
    """The norms of a layer, by the names of their tensors behind the layer's prefix; None: there is none.

    Attributes:
        after_attention, after_mlp: Of what attention and MLP give, before it is added to the hidden state.
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclass(frozen=True)
class MLPNames:
    """The linear layers of a dense MLP, by their names behind the layer's prefix.

    Attributes:
        gate_up: Of gate and up, or the one that is both.
        inner: The field of the columns between the two products.
    """

    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    inner: str = "intermediate_size"


NORMS, MLP, _ROPE = Norms(), MLPNames(), RopeFields()
_FUSED = MLPNames(("mlp.gate_up_proj",))


@dataclass(frozen=True)
class DeltaFields:
    """Heads and sizes of Gated DeltaNet layers (`kernels.recurrent.DeltaShape`)."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int


@dataclass(frozen=True)
class Family:
    """What an architecture's name settles.

    Attributes:
        defaults: What fields mean where they are left out and that is not zero, false or nothing. Sizes are among them
            only where published files leave them out.
        attention_bias_field: ``attention_bias`` is a field of this family (for q, k, v and o alike).
        qkv_bias: q, k and v have biases.
        qkv_bias_field: ``qkv_bias`` is a field of this family: they have them unless it says no.
        out_bias_field: The field that says whether o has a bias; None: it has none.
        qk_norm: Queries and keys have norms: ``head``: for each head; ``all``: over all heads.
        norm: ``rms``: what the RMSNorm gives is rounded, then multiplied by the weight; ``wide``: multiplied in
            float32, then rounded; ``one_plus``: so, by 1 + weight; ``layer``: a LayerNorm without bias, wide.
        activation: The field that names the activation, and what it is where the field is left out.
        gelu_is_tanh: ``gelu`` means the tanh form: Gemma was published so.
        sliding: Which layers have a window: ``none``: no layer; ``always``: all, wherever ``sliding_window`` is set;
            ``switch``: by ``layer_types`` or from ``max_window_layers`` on, and only with ``use_sliding_window``;
            ``kinds``: by ``layer_types``, or all but every ``sliding_window_pattern``-th; ``linear``: none, but there
            are recurrent layers: by ``layer_types``, or all but every ``full_attention_interval``-th.
        pattern_field: ``sliding_window_pattern`` is a field of this family; else what `defaults` says of it counts.
        spelt_pattern: ``sliding_window_pattern`` may be a text, ``LLLG``, say.
        gated: Attention's heads are multiplied by the sigmoid of gates, which are rows of q.
        grouped_delta: See `delta_net.DeltaNetSpec`.
        fused_qkv: q, k and v are one matrix in the files.
        interleaved: RoPE turns neighbouring coordinates together.
        parallel: Attention and MLP see the same normed hidden state, and both are added to it.
        v_norm: Values have a norm without weights.
        layer_scale: The hidden state behind each layer is multiplied by a number (``layer_scalar``).
        sinks: Each head of attention has a learned logit without a value (``self_attn.sinks``).
        eps: The field of the norms' epsilon.
        saved_as: Another architecture's name that transformers writes for this ``model_type``.
        embedding_scaled: Embeddings are multiplied by the square root of their size.
        more: Further fields of `ModelConfig`, read from the configuration; given the kinds of all layers.
    """

    model_type: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    attention_bias_field: bool = False
    qkv_bias: bool = False
    qkv_bias_field: bool = False
    out_bias_field: str | None = "attention_bias"
    mlp_bias_field: bool = False
    qk_norm: str = ""
    norms: Norms = NORMS
    norm: str = "rms"
    activation: tuple[str, str] = ("hidden_act", "silu")
    gelu_is_tanh: bool = False
    sliding: str = "none"
    pattern_field: bool = False
    spelt_pattern: bool = False
    gated: bool = False
    grouped_delta: bool = False
    fused_qkv: bool = False
    mlp: MLPNames = MLP
    interleaved: bool = False
    parallel: bool = False
    v_norm: bool = False
    layer_scale: bool = False
    sinks: bool = False
    eps: tuple[str, float] = ("rms_norm_eps", 1e-6)
    rope: RopeFields = _ROPE
    embedding_scaled: bool = False
    saved_as: str = ""
    more: Callable[[Fields, tuple[str, ...]], dict[str, Any]] | None = None


def _delta(fields: Fields) -> dict[str, Any]:
    act = fields.text("hidden_act") or "silu"
    if ACTIVATIONS.get(act) != "silu":  # it is that of the convolution, too
        raise fields.fail("hidden_act", f"is {quoted(act)}, and octo-run computes recurrent layers with silu only")
    sizes = [
        fields.integer(f"linear_{name}", default, high=high)
        for name, default, high in (
            ("num_key_heads", 16, 2**16), ("num_value_heads", 32, 2**16), ("key_head_dim", 128, 256),
            ("value_head_dim", 128, 256), ("conv_kernel_dim", 4, 16),
        )
    ]  # fmt: skip
    if sizes[1] % sizes[0]:
        problem = f"({sizes[1]}) is no multiple of linear_num_key_heads ({sizes[0]})"
        raise fields.fail("linear_num_value_heads", problem)
    return {"delta": DeltaFields(*sizes)}


#: Of Qwen3-Next and Qwen3.5.
_GATED_DELTA: dict[str, Any] = {
    "attention_bias_field": True,
    "qk_norm": "head",
    "norm": "one_plus",
    "sliding": "linear",
    "gated": True,
    "rope": RopeFields(partial=True, share=0.25),
}


def _multiplier(fields: Fields, name: str, default: float = 1.0) -> float:
    return fields.number(name, default, low=_MULTIPLIER[0], high=_MULTIPLIER[1])


def _cap(fields: Fields, name: str, default: float | None) -> float | None:
    """A soft cap; left out it is the family's, null is none."""
    if fields.values.get(name, default) is None:
        return None
    return fields.number(name, default, low=_CAP[0], high=_CAP[1])


def _gemma(attention_cap: float | None, logit_cap: float | None) -> Callable[[Fields, tuple[str, ...]], dict[str, Any]]:
    def more(fields: Fields, _kinds: tuple[str, ...]) -> dict[str, Any]:
        if fields.raw("use_bidirectional_attention"):
            raise fields.fail("use_bidirectional_attention", "is true, and octo-run computes decoders only")
        return {
            "attention_scale": _multiplier(fields, "query_pre_attn_scalar", 256.0) ** -0.5,
            "attention_cap": _cap(fields, "attn_logit_softcapping", attention_cap),
            "logit_cap": _cap(fields, "final_logit_softcapping", logit_cap),
        }

    return more


def _gemma3(fields: Fields, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Gemma's fields; but nothing is computed of a soft cap of attention, which its files name as null."""
    return _gemma(None, None)(fields, kinds) | {"attention_cap": None}


def _granite(fields: Fields, _kinds: tuple[str, ...]) -> dict[str, Any]:
    return {
        "embedding_scale": _multiplier(fields, "embedding_multiplier"),
        "attention_scale": _multiplier(fields, "attention_multiplier"),
        "residual_multiplier": _multiplier(fields, "residual_multiplier"),
        "logit_multiplier": 1.0 / _multiplier(fields, "logits_scaling"),
    }


def _granite4(fields: Fields, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Granite's multipliers; of the family only what has attention and a dense MLP in all layers."""
    if fields.raw("layer_types") is None:
        raise fields.fail("layer_types", "is missing, which means Mamba layers, and octo-run does not compute these")
    if fields.integer("num_local_experts", 8, low=0):
        raise fields.fail("num_local_experts", "is not 0, and octo-run computes models of this family without experts")
    turned = fields.raw("position_embedding_type") == "rope"
    return _granite(fields, kinds) | {"no_rope": frozenset() if turned else frozenset(range(len(kinds)))}


def _hyperclovax(fields: Fields, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Granite's multipliers, but that of the logits multiplies, and that of attention may be left out."""
    if not fields.boolean("use_post_norm", True):
        raise fields.fail("use_post_norm", "is false, and octo-run computes models of this family with it only")
    scale = None if fields.raw("attention_multiplier") is None else _multiplier(fields, "attention_multiplier")
    multiplier = _multiplier(fields, "logits_scaling")
    return _granite(fields, kinds) | {"attention_scale": scale, "logit_multiplier": multiplier}


def _internlm3(fields: Fields, _kinds: tuple[str, ...]) -> dict[str, Any]:
    for name in ("qkv_bias", "bias", "attention_bias", "mlp_bias"):
        if fields.boolean(name):
            raise fields.fail(name, "is true, and octo-run computes models of this family without biases only")
    return {}


def _iquestcoder(fields: Fields, _kinds: tuple[str, ...]) -> dict[str, Any]:
    if fields.raw("clip_qkv") is not None:
        raise fields.fail("clip_qkv", "is set, and octo-run does not clip q, k and v")
    if fields.boolean("use_sliding_window"):
        raise fields.fail("use_sliding_window", "is true, and octo-run computes models of this family without it only")
    return {}


def _ernie(fields: Fields, _kinds: tuple[str, ...]) -> dict[str, Any]:
    if fields.boolean("use_bias"):
        raise fields.fail("use_bias", "is true, and octo-run computes models of this family without biases only")
    return {}


def _rope_where_it_slides(fields: Fields, kinds: tuple[str, ...]) -> frozenset[int]:
    """The layers without RoPE where only those with a window have it."""
    windows = fields.values.get("sliding_window", 0) is not None
    return frozenset(index for index, kind in enumerate(kinds) if kind != SLIDING or not windows)


def _cohere2(fields: Fields, kinds: tuple[str, ...]) -> dict[str, Any]:
    return {
        "logit_multiplier": _multiplier(fields, "logit_scale", 0.0625),
        "no_rope": _rope_where_it_slides(fields, kinds),
    }


def _cohere(fields: Fields, _kinds: tuple[str, ...]) -> dict[str, Any]:
    if fields.boolean("use_qk_norm"):
        raise fields.fail("use_qk_norm", "is true, and octo-run computes models of this family without it only")
    return {"logit_multiplier": _multiplier(fields, "logit_scale", 0.0625)}


def _exaone4(fields: Fields, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Without a window every layer has RoPE, with one only those that slide."""
    windows = fields.values.get("sliding_window", 0) is not None
    return {"no_rope": _rope_where_it_slides(fields, kinds) if windows else frozenset()}


def _smollm3(fields: Fields, kinds: tuple[str, ...]) -> dict[str, Any]:
    if fields.boolean("use_sliding_window") and fields.raw("sliding_window") is not None:
        raise fields.fail("use_sliding_window", "is true, and octo-run computes models of this family without it only")
    marks = fields.raw("no_rope_layers")  # 1 where a layer has RoPE
    if marks is None:
        every = fields.integer("no_rope_layer_interval", 4)
        marks = [int((index + 1) % every != 0) for index in range(len(kinds))]
    if not isinstance(marks, list) or len(marks) != len(kinds) or any(mark not in (0, 1) for mark in marks):
        raise fields.fail("no_rope_layers", f"is no list of num_hidden_layers ({len(kinds)}) numbers 0 or 1")
    return {"no_rope": frozenset(index for index, mark in enumerate(marks) if not mark)}


#: What activations are called in configurations, and what they are called in a `LayerSpec`.
ACTIVATIONS: Mapping[str, str] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

_SANDWICH = Norms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
_AFTER = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_GEMMA = {"tie_word_embeddings": True, "head_dim": 256}
_GELU = ("hidden_activation", "gelu_pytorch_tanh")
#: Sizes that the text part of published Gemma 3 files leaves out.
_GEMMA3 = {
    **_GEMMA, "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4,
    "max_position_embeddings": 131_072, "sliding_window": 4096, "sliding_window_pattern": 6,
}  # fmt: skip

#: As of Gemma 3, in Gemma 4.
_GEMMA4 = {
    **_GEMMA, "vocab_size": 262_144, "num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window_pattern": 6,
}  # fmt: skip

_MINISTRAL3_ROPE = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384, "mscale": 1.0,
    "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip

_GPT_OSS_ROPE = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}

_GEMMA4_LAYERS: dict[str, Any] = {
    "attention_bias_field": True,
    "qk_norm": "head",
    "v_norm": True,
    "layer_scale": True,
    "norms": _SANDWICH,
    "norm": "wide",
    "activation": _GELU,
    "embedding_scaled": True,
    "sliding": "kinds",
    "rope": RopeFields(by_kind=True, partial=True, proportional=True, left_out=GEMMA4_ROPE),
}

FAMILIES: Mapping[str, Family] = {
    "GptOssForCausalLM": Family(
        "gpt_oss",
        {
            "attention_bias": True,
            "head_dim": 64,
            "num_key_value_heads": 8,
            "sliding_window": 128,
            "sliding_window_pattern": 2,
        },
        attention_bias_field=True,
        norm="wide",
        sliding="kinds",
        sinks=True,
        eps=("rms_norm_eps", 1e-5),
        rope=RopeFields(150_000.0, left_out=_GPT_OSS_ROPE),
        more=lambda fields, _kinds: gpt_oss_experts(fields),
    ),
    "LlamaForCausalLM": Family("llama", attention_bias_field=True, mlp_bias_field=True),
    "InternLM3ForCausalLM": Family(
        "internlm3",
        {"num_key_value_heads": 2, "head_dim": 128},
        eps=("rms_norm_eps", 1e-5),
        saved_as="LlamaForCausalLM",
        more=_internlm3,
    ),
    "IQuestCoderForCausalLM": Family(
        "iquestcoder",
        {"num_key_value_heads": 8, "head_dim": 128},
        attention_bias_field=True,
        mlp_bias_field=True,
        eps=("rms_norm_eps", 1e-5),
        saved_as="LlamaForCausalLM",
        more=_iquestcoder,
    ),
    "MistralForCausalLM": Family("mistral", {"num_key_value_heads": 8, "sliding_window": 4096}, sliding="always"),
    "MixtralForCausalLM": Family(
        "mixtral",
        {"num_key_value_heads": 8},
        sliding="always",
        eps=("rms_norm_eps", 1e-5),
        rope=RopeFields(theta=1e6),
        more=lambda fields, _kinds: local_experts(fields, "w123"),
    ),
    "OlmoeForCausalLM": Family(
        "olmoe",
        attention_bias_field=True,
        qk_norm="all",
        eps=("rms_norm_eps", 1e-5),
        more=lambda fields, _kinds: olmoe_experts(fields),
    ),
    "Qwen2MoeForCausalLM": Family(
        "qwen2_moe",
        {"num_key_value_heads": 16},
        qkv_bias_field=True,
        out_bias_field=None,
        more=lambda fields, _kinds: qwen_experts(fields, 60, 4, 1408, 5632),
    ),
    "MinistralForCausalLM": Family("ministral", {"num_key_value_heads": 8, "sliding_window": 4096}, sliding="kinds"),
    "Ministral3ForCausalLM": Family(
        "ministral3",
        {"num_key_value_heads": 8, "head_dim": 128},
        sliding="always",
        eps=("rms_norm_eps", 1e-5),
        rope=RopeFields(left_out=_MINISTRAL3_ROPE),
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
        qkv_bias=True,
        out_bias_field=None,
        sliding="switch",
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        {"num_key_value_heads": 4},
        attention_bias_field=True,
        qk_norm="head",
        more=lambda fields, _kinds: qwen_experts(fields, 128, 8, 768, 0),
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
        attention_bias_field=True,
        qk_norm="head",
        sliding="switch",
    ),
    "Qwen3NextForCausalLM": Family(
        "qwen3_next",
        {"num_key_value_heads": 2, "head_dim": 256, "intermediate_size": 5632},
        **_GATED_DELTA,
        grouped_delta=True,
        more=lambda fields, _kinds: _delta(fields) | qwen_experts(fields, 512, 10, 512, 512, normalised=True),
    ),
    "Qwen3_5ForCausalLM": Family(
        "qwen3_5_text",
        {"num_key_value_heads": 4, "head_dim": 256},
        **_GATED_DELTA,
        more=lambda fields, _kinds: _delta(fields),
    ),
    "Qwen3_5MoeForCausalLM": Family(
        "qwen3_5_moe_text",
        {"num_key_value_heads": 2, "head_dim": 256, "intermediate_size": 512},
        **_GATED_DELTA,
        more=lambda fields, _kinds: _delta(fields) | qwen_experts(fields, 256, 8, 512, 512, normalised=True),
    ),
    "GemmaForCausalLM": Family(
        "gemma",
        {**_GEMMA, "num_key_value_heads": 16},
        attention_bias_field=True,
        norm="one_plus",
        activation=("hidden_act", "gelu_pytorch_tanh"),
        gelu_is_tanh=True,
        embedding_scaled=True,
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        {**_GEMMA, "num_key_value_heads": 4, "sliding_window": 4096, "sliding_window_pattern": 2},
        attention_bias_field=True,
        norms=_SANDWICH,
        norm="one_plus",
        activation=_GELU,
        embedding_scaled=True,
        sliding="kinds",
        more=_gemma(50.0, 30.0),
    ),
    "VaultGemmaForCausalLM": Family(
        "vaultgemma",
        {**_GEMMA, "num_key_value_heads": 4, "sliding_window": 4096, "sliding_window_pattern": 2},
        attention_bias_field=True,
        norms=Norms(before_mlp="pre_feedforward_layernorm"),
        norm="one_plus",
        activation=_GELU,
        embedding_scaled=True,
        sliding="kinds",
        more=_gemma(50.0, 30.0),
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        _GEMMA3,
        attention_bias_field=True,
        qk_norm="head",
        norms=_SANDWICH,
        norm="one_plus",
        activation=_GELU,
        embedding_scaled=True,
        sliding="kinds",
        pattern_field=True,
        rope=RopeFields(1_000_000.0, by_kind=True, local_theta=10_000.0, stretched=True),
        more=_gemma3,
    ),
    "Gemma4ForCausalLM": Family(
        "gemma4_text",
        {**_GEMMA4, "max_position_embeddings": 131_072, "sliding_window": 512},
        **_GEMMA4_LAYERS,
        more=lambda fields, kinds: gemma4(fields, kinds, per_layer_input=256),
    ),
    "Gemma4UnifiedForCausalLM": Family(
        "gemma4_unified_text",
        {**_GEMMA4, "max_position_embeddings": 262_144, "sliding_window": 1024},
        **_GEMMA4_LAYERS,
        more=lambda fields, kinds: gemma4(fields, kinds, per_layer_input=0),
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        sliding="always",
        fused_qkv=True,
        mlp=_FUSED,
        eps=("rms_norm_eps", 1e-5),
        rope=RopeFields(partial=True, longrope_names=("su", "yarn"), outer_original=4096),
    ),
    "Olmo2ForCausalLM": Family(
        "olmo2", attention_bias_field=True, qk_norm="all", norms=_AFTER, norm="wide", eps=("rms_norm_eps", 1e-5)
    ),
    "Olmo3ForCausalLM": Family(
        "olmo3",
        {"sliding_window": 4096, "sliding_window_pattern": 4},
        attention_bias_field=True,
        qk_norm="all",
        norms=_AFTER,
        norm="wide",
        sliding="kinds",
        eps=("rms_norm_eps", 1e-5),
        rope=RopeFields(500_000.0, by_kind=True),
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        attention_bias_field=True,
        mlp_bias_field=True,
        rope=RopeFields(2_000_000.0),
        more=_smollm3,
    ),
    "GraniteForCausalLM": Family("granite", attention_bias_field=True, mlp_bias_field=True, more=_granite),
    "GraniteMoeHybridForCausalLM": Family(
        "granitemoehybrid",
        attention_bias_field=True,
        mlp=MLPNames(("shared_mlp.input_linear",), "shared_mlp.output_linear", "shared_intermediate_size"),
        more=_granite4,
    ),
    "HyperCLOVAXForCausalLM": Family(
        "hyperclovax",
        attention_bias_field=True,
        mlp_bias_field=True,
        norms=Norms("input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2"),
        more=_hyperclovax,
    ),
    "GraniteMoeForCausalLM": Family(
        "granitemoe",
        attention_bias_field=True,
        more=lambda fields, kinds: _granite(fields, kinds) | local_experts(fields, "stacked"),
    ),
    "Ernie4_5ForCausalLM": Family(
        "ernie4_5",
        {"num_key_value_heads": 2, "head_dim": 128, "tie_word_embeddings": True},
        interleaved=True,
        eps=("rms_norm_eps", 1e-5),
        rope=RopeFields(500_000.0),
        more=_ernie,
    ),
    "HeliumForCausalLM": Family(
        "helium",
        {"num_key_value_heads": 20, "head_dim": 128},
        attention_bias_field=True,
        out_bias_field=None,
        mlp_bias_field=True,
        norm="wide",
        interleaved=True,
        eps=("rms_norm_eps", 1e-8),
        rope=RopeFields(100_000.0),
    ),
    "GlmForCausalLM": Family(
        "glm",
        {"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True},
        attention_bias_field=True,
        out_bias_field=None,
        mlp=_FUSED,
        interleaved=True,
        eps=("rms_norm_eps", 1.5625e-7),
        rope=RopeFields(partial=True, share=0.5),
    ),
    "Glm4ForCausalLM": Family(
        "glm4",
        {"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True},
        attention_bias_field=True,
        out_bias_field=None,
        norms=Norms("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
        mlp=_FUSED,
        interleaved=True,
        eps=("rms_norm_eps", 1.5625e-7),
        rope=RopeFields(partial=True, share=0.5),
    ),
    "Exaone4ForCausalLM": Family(
        "exaone4",
        {"num_key_value_heads": 32, "sliding_window": 4096, "sliding_window_pattern": 4},
        qk_norm="head",
        norms=_AFTER,
        sliding="kinds",
        pattern_field=True,
        spelt_pattern=True,
        eps=("rms_norm_eps", 1e-5),
        more=_exaone4,
    ),
    "SeedOssForCausalLM": Family(
        "seed_oss",
        {"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True},
        attention_bias_field=True,
        out_bias_field="attention_out_bias",
        mlp_bias_field=True,
    ),
    "CohereForCausalLM": Family(
        "cohere",
        {"tie_word_embeddings": True},
        attention_bias_field=True,
        norms=Norms(before_mlp=None),
        norm="layer",
        interleaved=True,
        parallel=True,
        eps=("layer_norm_eps", 1e-5),
        rope=RopeFields(500_000.0),
        more=_cohere,
    ),
    "Cohere2ForCausalLM": Family(
        "cohere2",
        {"tie_word_embeddings": True, "sliding_window": 4096, "sliding_window_pattern": 4},
        attention_bias_field=True,
        norms=Norms(before_mlp=None),
        norm="layer",
        interleaved=True,
        parallel=True,
        sliding="kinds",
        pattern_field=True,
        eps=("layer_norm_eps", 1e-5),
        more=_cohere2,
    ),
}
