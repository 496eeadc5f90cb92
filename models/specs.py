"""What kind of layer each layer of a model is: made of its configuration, known before a weight is read.

A layer has two slots. Its *mixer* lets tokens see each other: attention, or what a `MixerSpec` describes. Its *MLP*
works on each token: what a `FeedForwardSpec` describes. Both write what they give to a buffer; `engine.forward` adds it
to the hidden state. A spec knows the tensors that its part needs, the buffers that it works in, and how it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from octo_run.kernels import AttentionSpec
from octo_run.kernels.recurrent import DeltaShape
from octo_run.models.config import ModelConfig
from octo_run.models.delta_net import DeltaNetSpec
from octo_run.models.dense_and_experts import DenseAndExpertsSpec
from octo_run.models.experts import ExpertsSpec
from octo_run.models.families import ACTIVATIONS, NORMS, Norms
from octo_run.models.mlp import DenseSpec
from octo_run.models.rope_config import FULL, SLIDING, Rope

if TYPE_CHECKING:
    from torch import Tensor

    from octo_run.models.decoder import Mixer
    from octo_run.models.linear import Quantise, SingleLinear
    from octo_run.models.weights import Weights

#: Buffers of the compute dtype by name.
Shapes = dict[str, tuple[int, ...]]


class FeedForward(Protocol):
    """The MLP of a layer with its weights."""

    @property
    def joined_bytes(self) -> int:
        """Bytes of the largest copy that was made when it was loaded: of matrices that were joined, say."""

    @property
    def parts(self) -> tuple[SingleLinear, ...]:
        """The layers with a matrix of their own that it is made of."""

    def apply(self, normed: Tensor, out: Tensor, buffers: Mapping[str, Tensor]) -> None:
        """Write what it gives for ``normed [R, hidden]`` to ``out [R, hidden]``.

        On CUDA it allocates nothing and waits for nothing, so that a step can be recorded.

        Args:
            buffers: Those of `FeedForwardSpec.shapes`, for R rows. They hold nothing from call to call.
        """

    def __call__(self, x: Tensor) -> Tensor:
        """The same, ``[..., hidden]`` of ``x [..., hidden]``, in plain PyTorch, for tests to compare with."""

    def packed(self, quantise: Quantise, index: int, seen: Tensor | None) -> FeedForward:
        """The same with its dense matrices packed.

        Args:
            index: The layer's number, for complaints.
            seen: What goes into it for some tokens, ``[T, hidden]``: what matrices are multiplied by tells how to pack
                them; None: it is not known.
        """


class FeedForwardSpec(Protocol):
    """What an MLP is, without its weights."""

    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of its tensors by their names behind the layer's prefix."""

    def shapes(self, rows: int) -> Shapes:
        """Buffers that it works in for so many tokens."""

    def load(self, weights: Weights, prefix: str) -> FeedForward:
        """Take its tensors; their names begin with ``prefix``."""


class MixerSpec(Protocol):
    """What lets tokens see each other in place of attention, without its weights."""

    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """As of `FeedForwardSpec`."""

    def shapes(self, rows: int) -> Shapes:
        """As of `FeedForwardSpec`."""

    def load(self, weights: Weights, prefix: str) -> Mixer:
        """As of `FeedForwardSpec`."""


@dataclass(frozen=True)
class LayerSpec:
    """What kind of layer it is, beside its weights.

    Attributes:
        kind: ``full_attention``, ``sliding_attention``, or what a family with another mixer calls it.
        heads, kv_heads, head_dim: Of its attention.
        rope: None: positions are not marked (NoPE).
        qk_norm: Of queries and keys before RoPE: "": none; ``head``: of each head; ``all``: over all heads.
        v_norm: Values have a norm without weights.
        gated: What attention gives is multiplied by the sigmoid of a gate for each number.
        norms: Which norms it has around attention and MLP, by the names of their tensors.
        layer_norm: They are LayerNorms without bias, not RMSNorms.
        parallel: Attention and MLP see the same normed hidden state; both are added to it.
        residual_multiplier: What attention and MLP give is multiplied by it before it is added.
        mixer: What there is in place of attention; None: attention.
        kv_source: The layer whose keys and values it sees; None: it has its own.
        values_are_keys: Values are what keys are made of, before norm and RoPE.
        per_layer_input: Numbers of the vector that every token has for this layer.
    """

    kind: str
    attention: AttentionSpec
    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None
    mlp: FeedForwardSpec
    qk_norm: str = ""
    v_norm: bool = False
    gated: bool = False
    norms: Norms = NORMS
    layer_norm: bool = False
    parallel: bool = False
    residual_multiplier: float = 1.0
    mixer: MixerSpec | None = None
    kv_source: int | None = None
    values_are_keys: bool = False
    per_layer_input: int = 0

    @property
    def edges(self) -> tuple[int, int, int]:
        """Where queries, keys and values end in the outputs of the projections that stand side by side."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return q, q + kv, q + 2 * kv


@lru_cache(maxsize=16)
def layer_specs(cfg: ModelConfig) -> tuple[LayerSpec, ...]:
    """The kinds of all layers of a model."""
    return tuple(_spec(cfg, index) for index in range(cfg.num_layers))


def layer_kinds(cfg: ModelConfig) -> dict[str, int]:
    """How many layers there are of each kind, in the order of the layers."""
    found: dict[str, int] = {}
    for spec in layer_specs(cfg):
        words = [spec.kind.replace("_", " ")]
        if cfg.layer_heads and spec.mixer is None:
            words.append(f"{spec.kv_heads} KV head{'s' * (spec.kv_heads > 1)} of {spec.head_dim}")
        if spec.values_are_keys:
            words.append("values are keys")
        if spec.kv_source is not None:
            words.append(f"keys and values of layer {spec.kv_source}")
        if spec.attention.window is not None and spec.mixer is None:
            words.append(f"window {spec.attention.window:,}")
        if spec.rope is None and spec.mixer is None:
            words.append("no RoPE")
        name = ", ".join(words)
        found[name] = found.get(name, 0) + 1
    return found


def _spec(cfg: ModelConfig, index: int) -> LayerSpec:
    family, kind = cfg.family, cfg.layer_types[index] if cfg.layer_types else FULL
    slides = kind == SLIDING
    rope = cfg.sliding_rope if slides and cfg.sliding_rope is not None else cfg.rope
    (kv_heads, head_dim), source = cfg.kv_heads(index), cfg.kv_source(index)
    return LayerSpec(
        kind=kind,
        attention=AttentionSpec(
            scale=head_dim**-0.5 if cfg.attention_scale is None else cfg.attention_scale,
            window=cfg.sliding_window if slides else None,
            logit_cap=cfg.attention_cap,
        ),
        heads=cfg.num_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope=None if index in cfg.no_rope else rope,
        mlp=_feed_forward(cfg, index),
        qk_norm=family.qk_norm if cfg.qk_norm else "",
        v_norm=family.v_norm,
        gated=family.gated,
        norms=_norms(cfg),
        layer_norm=family.norm == "layer",
        parallel=family.parallel,
        residual_multiplier=cfg.residual_multiplier,
        mixer=_mixer(cfg, index),
        kv_source=None if source == index else source,
        values_are_keys=source == index and index in cfg.values_are_keys,
        per_layer_input=cfg.per_layer_input,
    )


def _norms(cfg: ModelConfig) -> Norms:
    """The norms around attention and MLP: an MLP of two parts has norms of its own before them."""
    beside = cfg.experts is not None and cfg.experts.beside
    return replace(cfg.family.norms, before_mlp=None) if beside else cfg.family.norms


def _feed_forward(cfg: ModelConfig, index: int) -> FeedForwardSpec:
    """The MLP of a layer. Kinds of layers with experts are told apart here."""
    activation = ACTIVATIONS[cfg.hidden_act]
    wide = cfg.double_wide and cfg.kv_source(index) != index
    inner = cfg.intermediate_size * (2 if wide else 1)
    if cfg.experts is not None and index not in cfg.experts.dense:
        if cfg.experts.beside:
            return DenseAndExpertsSpec(cfg.hidden_size, inner, cfg.experts, activation, cfg.rms_norm_eps)
        return ExpertsSpec(cfg.hidden_size, cfg.experts, activation)
    return DenseSpec(cfg.hidden_size, inner, activation, cfg.mlp_bias, cfg.family.mlp)


def _mixer(cfg: ModelConfig, index: int) -> MixerSpec | None:
    """What a layer has in place of attention. Kinds of such layers are told apart here."""
    if cfg.kv_source(index) in cfg.attention_layers:
        return None
    number, sizes = index - sum(other < index for other in cfg.attention_layers), cfg.delta
    assert sizes is not None
    shape = DeltaShape(sizes.key_heads, sizes.value_heads, sizes.key_dim, sizes.value_dim, sizes.taps)
    return DeltaNetSpec(number, cfg.hidden_size, shape, cfg.rms_norm_eps, cfg.family.grouped_delta)
