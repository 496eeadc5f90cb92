"""The families of models: what an architecture's name settles that its ``config.json`` does not say.

A family is an entry of ``FAMILIES``. `CONTRIBUTING.md` says how to add one. Nothing here imports torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from octo_run.models.fields import Fields
from octo_run.models.rope_config import RopeFields

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


NORMS, _ROPE = Norms(), RopeFields()


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
        defaults: Fields of the configuration that mean something else than zero, false or nothing where they are left
            out.
        attention_bias_field: ``attention_bias`` is a field of this family (for q, k, v and o alike).
        qkv_bias: q, k and v have biases.
        out_bias_field: The field that says whether o has a bias, where it is not ``attention_bias``; "": o has none.
        qk_norm: Queries and keys have norms: ``head``: for each head; ``all``: over all heads.
        norm: ``rms``: what the RMSNorm gives is rounded, then multiplied by the weight; ``wide``: multiplied in
            float32, then rounded; ``one_plus``: so, by 1 + weight; ``layer``: a LayerNorm without bias, wide.
        activation: The field that names the activation, and what it is where the field is left out.
        sliding: Which layers have a window: ``none``: no layer; ``always``: all, wherever ``sliding_window`` is set;
            ``switch``: by ``layer_types`` or from ``max_window_layers`` on, and only with ``use_sliding_window``;
            ``kinds``: by ``layer_types``, or all but every ``sliding_window_pattern``-th; ``linear``: none, but there
            are recurrent layers: by ``layer_types``, or all but every ``full_attention_interval``-th.
        gated: Attention's heads are multiplied by the sigmoid of gates, which are rows of q.
        grouped_delta: See `delta_net.DeltaNetSpec`.
        fused_qkv, fused_gate_up: q, k and v are one matrix in the files, gate and up are.
        interleaved: RoPE turns neighbouring coordinates together.
        parallel: Attention and MLP see the same normed hidden state, and both are added to it.
        eps: The field of the norms' epsilon.
        more: Further fields of `ModelConfig`, read from the configuration; given the kinds of all layers.
    """

    model_type: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    attention_bias_field: bool = False
    qkv_bias: bool = False
    out_bias_field: str | None = None
    mlp_bias_field: bool = False
    qk_norm: str = ""
    norms: Norms = NORMS
    norm: str = "rms"
    activation: tuple[str, str] = ("hidden_act", "silu")
    sliding: str = "none"
    gated: bool = False
    grouped_delta: bool = False
    fused_qkv: bool = False
    fused_gate_up: bool = False
    interleaved: bool = False
    parallel: bool = False
    eps: tuple[str, float] = ("rms_norm_eps", 1e-6)
    rope: RopeFields = _ROPE
    more: Callable[[Fields, tuple[str, ...]], dict[str, Any]] | None = None


def _delta(fields: Fields, _kinds: tuple[str, ...]) -> dict[str, Any]:
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
    "more": _delta,
}

#: What activations are called in configurations, and what they are called in a `LayerSpec`.
ACTIVATIONS: Mapping[str, str] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama", attention_bias_field=True, mlp_bias_field=True),
    "MistralForCausalLM": Family("mistral", {"num_key_value_heads": 8, "sliding_window": 4096}, sliding="always"),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
        qkv_bias=True,
        sliding="switch",
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
        attention_bias_field=True,
        qk_norm="head",
        sliding="switch",
    ),
    "Qwen3_5ForCausalLM": Family("qwen3_5_text", {"num_key_value_heads": 4, "head_dim": 256}, **_GATED_DELTA),
}
