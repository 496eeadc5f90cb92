"""llama.cpp's architectures: which family of models each is, and what of it stands where in a GGUF file.

The names of tensors and metadata are those of the ``gguf`` package (``gguf.constants``); what llama.cpp computes
without being told, and what its converter changes, is said here.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from octo_run.errors import OctoError, quoted, shown
from octo_run.models.gguf.fields import Fields, short
from octo_run.models.gguf.header import GgufModel

#: Layers of the largest Gemma 2, and of the largest Gemma 3.
_GEMMA2_27B, _GEMMA3_27B = 46, 62
#: Layers of the EXAONE 4 that has a window.
_EXAONE4_32B = 64
#: GGUF's names of a layer's tensors -> the decoder's, for most architectures.
_LAYER: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_AFTER = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_FUSED = {"ffn_up": "mlp.gate_up_proj"}
_WINDOW = frozenset(("attention.sliding_window", "attention.sliding_window_pattern"))
_EXPERT_KEYS = frozenset(("expert_count", "expert_used_count"))
EXPERT_INNER, _SHARED = "expert_feed_forward_length", "expert_shared_feed_forward_length"
#: How many of the layers, the last ones, predict further tokens; octo-run has no use for these.
PREDICTING = "nextn_predict_layers"
_DELTA = {
    "post_attention_norm": "post_attention_layernorm",
    "attn_gate": "linear_attn.in_proj_z",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_QWEN3NEXT = {
    **{ours: theirs for ours, theirs in _DELTA.items() if "in_proj" not in theirs},
    **_SHARED_EXPERT,
    "attn_qkv+attn_gate": "linear_attn.in_proj_qkvz",
    "ssm_ba": "linear_attn.in_proj_ba",
}
_DELTA_KEYS = frozenset((
    "ssm.conv_kernel", "ssm.state_size", "ssm.group_count", "ssm.time_step_rank", "ssm.inner_size",
    "full_attention_interval",
))  # fmt: skip
#: Experts are chosen by a softmax and weighted to a sum of 1.
_EXPERT_NEUTRAL = {"expert_gating_func": 1, "expert_weights_norm": True, "expert_weights_scale": 1.0}

More = Callable[[Fields, dict[str, Any], Collection[str]], dict[str, Any]]


@dataclass(frozen=True)
class Architecture:
    """What the name of an architecture settles.

    Attributes:
        model: The Hugging Face architecture.
        names: GGUF's name of a layer's tensors -> the decoder's, where it is another than that of most; ``+`` is
            between those of two tensors that are one of the decoder's.
        keys: Metadata that ``more`` and ``yarn`` read, or that change nothing, beside those of all.
        neutral: Values of metadata that change nothing, where 0, false and an empty text are not those.
        eps: Which of the metadata is the epsilon of the norms.
        reordered: The converter reorders the rows of q and k: llama.cpp turns neighbouring coordinates, not halves of
            a head.
        spread: The converter puts apart value heads that share a key head.
        longrope: RoPE may have the factors of longrope, two tensors.
        more: Further fields of ``config.json``, of the metadata, the fields so far, and the names of the tensors.
        yarn: What ``rope_scaling`` has beside the fields of all, where its kind is ``yarn``.
    """

    model: str
    names: Mapping[str, str] = field(default_factory=dict)
    keys: frozenset[str] = frozenset()
    neutral: Mapping[str, Any] = field(default_factory=dict)
    eps: str = "attention.layer_norm_rms_epsilon"
    reordered: bool = False
    spread: bool = False
    longrope: bool = False
    more: More = lambda _fields, _values, _tensors: {}
    yarn: Callable[[Fields], dict[str, Any]] = lambda _fields: {}

    @property
    def layer_names(self) -> dict[str, str]:
        """The decoder's name of a layer's tensors -> GGUF's."""
        return {theirs: ours for ours, theirs in {**_LAYER, **self.names}.items()}


def _kinds(fields: Fields, layers: int, period: int) -> list[str]:
    """The kind of each layer: which slide is a list, or all but every so many do."""
    key = "attention.sliding_window_pattern"
    value = fields.values.get(fields.prefix + key)
    if isinstance(value, list):
        if len(value) != layers or not all(item in (0, 1) for item in value):
            raise fields.fail(key, f"is {quoted(value)}, not true or false for each of {layers:,} layers")
        slide = [bool(item) for item in value]
    else:
        period = fields.get(key, int, period)
        if not 0 < period < 2**16:
            raise fields.fail(key, f"is {period}, which octo-run does not understand")
        slide = [(index + 1) % period != 0 for index in range(min(layers, 2**16))]
    return ["sliding_attention" if one else "full_attention" for one in slide]


def _window(fields: Fields, values: dict[str, Any], period: int) -> dict[str, Any]:
    return {
        "sliding_window": fields.need("attention.sliding_window", int),
        "layer_types": _kinds(fields, values["num_hidden_layers"], period),
    }


def _head_or_share(values: dict[str, Any], layers: int) -> int:
    """By what llama.cpp scales Gemma's attention: the size of a head, but in the largest model (that of ``layers``)
    what there is of the hidden state for a head."""
    if values["num_hidden_layers"] != layers:
        return int(values["head_dim"])
    return int(values["hidden_size"] // max(1, values["num_attention_heads"]))


def _gemma2(fields: Fields, values: dict[str, Any], _tensors: Collection[str]) -> dict[str, Any]:
    return {
        "query_pre_attn_scalar": _head_or_share(values, _GEMMA2_27B),
        "attn_logit_softcapping": short(fields.need("attn_logit_softcapping", float)),
        "final_logit_softcapping": short(fields.need("final_logit_softcapping", float)),
        **_window(fields, values, 2),
    }


def _gemma3(fields: Fields, values: dict[str, Any], _tensors: Collection[str]) -> dict[str, Any]:
    return {
        "query_pre_attn_scalar": _head_or_share(values, _GEMMA3_27B),
        "sliding_window": fields.need("attention.sliding_window", int),
        "sliding_window_pattern": fields.get("attention.sliding_window_pattern", int, 6),
        "rope_local_base_freq": short(fields.get("rope.freq_base_swa", float, 10000.0)),
    }


def _qwen3moe(fields: Fields, _values: dict[str, Any], _tensors: Collection[str]) -> dict[str, Any]:
    return {
        "num_experts": fields.need("expert_count", int),
        "num_experts_per_tok": fields.need("expert_used_count", int),
        "moe_intermediate_size": fields.need(EXPERT_INNER, int),
        "norm_topk_prob": True,
    }


def _mixtral(fields: Fields, _values: dict[str, Any], _tensors: Collection[str]) -> dict[str, Any]:
    return {
        "num_local_experts": fields.need("expert_count", int),
        "num_experts_per_tok": fields.need("expert_used_count", int),
        "sliding_window": None,
    }


def _gpt_oss(fields: Fields, values: dict[str, Any], _tensors: Collection[str]) -> dict[str, Any]:
    return {
        "num_local_experts": fields.need("expert_count", int),
        "num_experts_per_tok": fields.need("expert_used_count", int),
        "intermediate_size": fields.need(EXPERT_INNER, int),
        **_window(fields, values, 2),
    }


def _phi3(fields: Fields, _values: dict[str, Any], _tensors: Collection[str]) -> dict[str, Any]:
    return {
        "sliding_window": fields.need("attention.sliding_window", int) or None,
        "original_max_position_embeddings": fields.need("rope.scaling.original_context_length", int),
    }


def _granite(fields: Fields, values: dict[str, Any], _tensors: Collection[str]) -> dict[str, Any]:
    """Without a factor llama.cpp leaves things as they are, and attention as it is everywhere."""
    plain = {"embedding_scale": 1.0, "residual_scale": 1.0, "attention.scale": max(1, values["head_dim"]) ** -0.5}
    embedding, residual, attention = (fields.get(key, float) or default for key, default in plain.items())
    return {
        "embedding_multiplier": short(embedding),
        "residual_multiplier": short(residual),
        "attention_multiplier": short(attention),
        "logits_scaling": short(fields.need("logit_scale", float)),
    }


def _olmo3(fields: Fields, values: dict[str, Any], _tensors: Collection[str]) -> dict[str, Any]:
    return _window(fields, values, 4)


def _olmo3_yarn(fields: Fields) -> dict[str, Any]:
    factor = fields.get("rope.scaling.yarn_attn_factor", float)
    return {} if factor is None else {"attention_factor": short(factor)}


def _exaone4(fields: Fields, values: dict[str, Any], _tensors: Collection[str]) -> dict[str, Any]:
    if not fields.get("attention.sliding_window", int):
        return {"sliding_window": None}
    if values["num_hidden_layers"] != _EXAONE4_32B:  # of other sizes llama.cpp leaves out the window
        fields.need("attention.sliding_window_pattern", list)
    return _window(fields, values, 4)


def _seed_oss(_fields: Fields, _values: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
    return {"attention_out_bias": "blk.0.attn_output.bias" in tensors}


def _cohere2(fields: Fields, values: dict[str, Any], _tensors: Collection[str]) -> dict[str, Any]:
    return {"logit_scale": short(fields.need("logit_scale", float)), **_window(fields, values, 4)}


def _ministral3_yarn(fields: Fields) -> dict[str, Any]:
    scale = short(fields.get("rope.scaling.yarn_log_multiplier", float, 0.0))
    beta = short(fields.need("attention.temperature_scale", float))
    return {"mscale": scale, "mscale_all_dim": scale, "llama_4_scaling_beta": beta}


def _delta(fields: Fields, values: dict[str, Any], _tensors: Collection[str]) -> dict[str, Any]:
    heads, inner = fields.need("ssm.time_step_rank", int), fields.need("ssm.inner_size", int)
    if heads < 1 or inner % heads:
        raise fields.fail("ssm.inner_size", f"is {inner}, no multiple of the {heads} heads of ssm.time_step_rank")
    period = fields.get("full_attention_interval", int, 4)
    if not 0 < period < 2**16:
        raise fields.fail("full_attention_interval", f"is {period}, which octo-run does not understand")
    layers = range(min(values["num_hidden_layers"], 2**16))
    return {
        "linear_conv_kernel_dim": fields.need("ssm.conv_kernel", int),
        "linear_key_head_dim": fields.need("ssm.state_size", int),
        "linear_value_head_dim": inner // heads,
        "linear_num_key_heads": fields.need("ssm.group_count", int),
        "linear_num_value_heads": heads,
        "layer_types": ["linear_attention" if (index + 1) % period else "full_attention" for index in layers],
    }


def _delta_moe(fields: Fields, values: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
    shared = {"shared_expert_intermediate_size": fields.need(_SHARED, int)}
    return _delta(fields, values, tensors) | _qwen3moe(fields, values, tensors) | shared


_LLAMA = Architecture("LlamaForCausalLM", reordered=True)
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "mistral3": _LLAMA,
    "qwen2": Architecture("Qwen2ForCausalLM"),
    "qwen3": Architecture("Qwen3ForCausalLM"),
    "qwen3moe": Architecture(
        "Qwen3MoeForCausalLM", keys=_EXPERT_KEYS | {EXPERT_INNER}, neutral=_EXPERT_NEUTRAL, more=_qwen3moe
    ),
    "qwen3next": Architecture(
        "Qwen3NextForCausalLM",
        _QWEN3NEXT,
        _DELTA_KEYS | _EXPERT_KEYS | {EXPERT_INNER, _SHARED},
        _EXPERT_NEUTRAL,
        more=_delta_moe,
    ),
    "qwen35": Architecture(
        "Qwen3_5ForCausalLM", _DELTA, _DELTA_KEYS | {PREDICTING, "rope.dimension_sections"}, spread=True, more=_delta
    ),
    "qwen35moe": Architecture(
        "Qwen3_5MoeForCausalLM",
        {**_DELTA, **_SHARED_EXPERT},
        _DELTA_KEYS | _EXPERT_KEYS | {EXPERT_INNER, _SHARED, PREDICTING, "rope.dimension_sections"},
        _EXPERT_NEUTRAL,
        spread=True,
        more=_delta_moe,
    ),
    "gpt-oss": Architecture(
        "GptOssForCausalLM",
        {"attn_sinks.weight": "self_attn.sinks", "post_attention_norm": "post_attention_layernorm"},
        _WINDOW | _EXPERT_KEYS | {EXPERT_INNER},
        more=_gpt_oss,
        yarn=lambda _fields: {"truncate": False},
    ),
    "phi3": Architecture(
        "Phi3ForCausalLM", _FUSED, frozenset(("attention.sliding_window",)), longrope=True, more=_phi3
    ),
    "gemma2": Architecture(
        "Gemma2ForCausalLM", _GEMMA, _WINDOW | {"attn_logit_softcapping", "final_logit_softcapping"}, more=_gemma2
    ),
    "gemma3": Architecture("Gemma3ForCausalLM", _GEMMA, _WINDOW | {"rope.freq_base_swa"}, more=_gemma3),
    "granite": Architecture(
        "GraniteForCausalLM",
        keys=frozenset(("embedding_scale", "residual_scale", "attention.scale", "logit_scale")),
        neutral={"rope.scaling.finetuned": True},  # false means without RoPE
        reordered=True,
        more=_granite,
    ),
    "smollm3": Architecture("SmolLM3ForCausalLM", reordered=True),
    "olmo2": Architecture("Olmo2ForCausalLM", _AFTER),
    "glm4": Architecture(
        "Glm4ForCausalLM",
        {**_FUSED, "post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm"},
    ),
    "exaone4": Architecture("Exaone4ForCausalLM", _AFTER, _WINDOW, more=_exaone4),
    "seed_oss": Architecture("SeedOssForCausalLM", {"post_attention_norm": "post_attention_layernorm"}, more=_seed_oss),
    "cohere2": Architecture(
        "Cohere2ForCausalLM", keys=_WINDOW | {"logit_scale"}, eps="attention.layer_norm_epsilon", more=_cohere2
    ),
}
#: An architecture and metadata that make it another family's, where they are not 0.
_OTHERWISE: Mapping[tuple[str, str], Architecture] = {
    ("llama", "expert_count"): Architecture(
        "MixtralForCausalLM", keys=_EXPERT_KEYS, neutral=_EXPERT_NEUTRAL, reordered=True, more=_mixtral
    ),
    ("mistral3", "attention.temperature_scale"): Architecture(
        "Ministral3ForCausalLM",
        keys=frozenset(("attention.temperature_scale", "rope.scaling.yarn_log_multiplier")),
        reordered=True,
        yarn=_ministral3_yarn,
        more=lambda _fields, _values, _tensors: {"sliding_window": None},
    ),
    ("olmo2", "attention.sliding_window"): Architecture(
        "Olmo3ForCausalLM", _AFTER, _WINDOW | {"rope.scaling.yarn_attn_factor"}, more=_olmo3, yarn=_olmo3_yarn
    ),
}


def architecture(model: GgufModel) -> tuple[str, Architecture]:
    """llama.cpp's name of the architecture, and what it means.

    Raises:
        OctoError: It is none that octo-run imports.
    """
    fields = Fields(model.path, model.metadata)
    name = fields.need("general.architecture", str)
    kind = fields.get("general.type", str, "model")
    if kind != "model":
        raise OctoError(f"{model.path} holds no model but something else ({shown(kind, 40)}): give the model's file.")
    if name not in ARCHITECTURES:
        raise OctoError(
            f"{model.path} has the architecture {quoted(name)}, and octo-run imports {', '.join(ARCHITECTURES)} only: "
            "try the model's repository of safetensors files, with `octo-run pull`."
        )
    for (which, key), other in _OTHERWISE.items():
        if which == name and model.metadata.get(f"{name}.{key}"):
            return name, other
    return name, ARCHITECTURES[name]
