"""The decoder: one definition of a transformer that a ``ModelConfig`` turns into the families of ``models.families``.

The decoder owns weights and arithmetic and knows nothing of caches: for each layer of attention it hands query, key and
value to the ``attention`` function it was given and goes on with what that returns.

The kernels know one kind of RoPE: channel i of a head pairs with i + d / 2. Families that pair others have the
coordinates of their queries and keys put in that order when they are loaded (``rope.halves_first``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from octo_run.kernels import step as ops
from octo_run.kernels.linear import PackedWeight
from octo_run.kernels.step import reference as step_reference
from octo_run.models import rope
from octo_run.models.conditioning import Conditioning
from octo_run.models.config import ModelConfig
from octo_run.models.families import ACTIVATIONS
from octo_run.models.linear import (
    AnyLinear,
    Linear,
    PackedLinear,
    Quantise,
    SingleLinear,
    head_order,
    joined,
    pack_any,
    pack_one,
    parts_first,
    widened,
)
from octo_run.models.mlp import mean_squares
from octo_run.models.per_layer import PerLayerEmbedding, PerLayerInput
from octo_run.models.quantisation.importance import Text
from octo_run.models.quantisation.schemes import Scheme, format_name
from octo_run.models.specs import FeedForward, LayerSpec, layer_specs
from octo_run.models.tensors import EMBEDDING, FINAL_NORM, LAYER_SCALE
from octo_run.models.weights import HeldWeights, Weights

if TYPE_CHECKING:
    from octo_run.engine.arena import Chunk
    from octo_run.engine.recurrent_state import RecurrentStates
    from octo_run.engine.step import StepState

#: Of each layer that has keys and values of its own an orthogonal matrix ``[d, d]``, one for all heads of one size.
#: None: what the layer stores stays as it is.
Rotations = Sequence[Tensor | None]
#: ``attention(layer, q [B, C, heads, d], k [B, C, kv_heads, d], v [B, C, kv_heads, d]) -> [B, C, heads, d]``
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Angles(NamedTuple):
    """What RoPE does to heads at some positions.

    Attributes:
        cos, sin: ``[..., d / 2]``.
        queries: What queries are multiplied by beside it, float32 ``[...]``; None: nothing.
    """

    cos: Tensor
    sin: Tensor
    queries: Tensor | None = None

    def part(self, rows: slice) -> Angles:
        """Those of some of the positions ``[B, C]``."""
        return Angles(self.cos[:, rows], self.sin[:, rows], None if self.queries is None else self.queries[:, rows])


class Mixer(Protocol):
    """What lets tokens see each other in place of attention (`specs.MixerSpec`), with its weights."""

    @property
    def joined_bytes(self) -> int:
        """See `specs.FeedForward`."""

    @property
    def parts(self) -> tuple[SingleLinear, ...]:
        """The layers with a matrix of their own that it is made of."""

    def chunks(self, normed: Tensor, out: Tensor, buffers: Mapping[str, Tensor], chunks: Sequence[Chunk]) -> None:
        """Write what it gives for chunks of several sequences, one after the other, to ``out``.

        Args:
            normed, out: ``[R, hidden]``.
            buffers: Those of `specs.MixerSpec.shapes`.
        """

    def step(
        self, normed: Tensor, out: Tensor, buffers: Mapping[str, Tensor], state: StepState, states: RecurrentStates
    ) -> None:
        """Write what it gives for one token in each of B sequences to ``out [B, hidden]``; recorded on CUDA."""

    def __call__(self, x: Tensor) -> Tensor:
        """What it gives for whole sequences ``[B, C, hidden]``, in plain PyTorch, for tests to compare with."""

    def packed(self, quantise: Quantise, index: int, seen: Tensor | None) -> Mixer:
        """See `specs.FeedForward`."""


@dataclass(frozen=True)
class AttentionWeights:
    """The weights of a layer's attention, fused at load: q, k, v in one matrix, where they can be."""

    qkv: AnyLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: SingleLinear
    #: What values are rotated by on their way into the arena (rows times it), where the weights do not do it.
    v_rotation: Tensor | None
    #: What queries and keys are multiplied by after RoPE, ``[2, kv_heads, d, d]`` (see ``Decoder.store_keys``).
    maps: Tensor | None = None
    #: The mean of keys before RoPE that stays out of their code, float32 ``[kv_heads, d]``.
    key_mean: Tensor | None = None
    #: What the heads are multiplied by, after a sigmoid.
    gate: AnyLinear | None = None

    @property
    def joined_bytes(self) -> int:
        """See `specs.FeedForward`."""
        return self.qkv.nbytes

    @property
    def parts(self) -> tuple[SingleLinear, ...]:
        """The layers with a matrix of their own that it is made of."""
        return (*self.qkv.parts, *(() if self.gate is None else self.gate.parts), *self.out.parts)


@dataclass(frozen=True)
class LayerNorms:
    """Weights of the norms around attention and MLP; None: there is none. In float32 where they multiply in it."""

    before_attention: Tensor | None
    after_attention: Tensor | None
    before_mlp: Tensor | None
    after_mlp: Tensor | None


@dataclass(frozen=True)
class Layer:
    """One layer's weights, and what kind of layer it is.

    Attributes:
        per_layer: What is done with each token's vector for this layer; None: there are no such vectors.
        scale: What the hidden state behind the layer is multiplied by.
    """

    spec: LayerSpec
    norms: LayerNorms
    mixer: AttentionWeights | Mixer
    mlp: FeedForward
    per_layer: PerLayerInput | None = None
    scale: float = 1.0

    @property
    def attention(self) -> AttentionWeights:
        """Its attention, where it has one."""
        assert isinstance(self.mixer, AttentionWeights)
        return self.mixer

    @property
    def has_attention(self) -> bool:
        """Whether it has attention, hence keys and values."""
        return isinstance(self.mixer, AttentionWeights)


@dataclass
class Passing:
    """What goes with tokens through the layers, beside their hidden states.

    Attributes:
        per_layer: Their vectors for each layer, ``[layers, B, C, size]``.
        lent: Keys and values of layers, ``[B, C, kv_heads, d]``, that later layers see, too.
    """

    per_layer: Tensor | None
    lent: dict[int, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, decoder: Decoder, ids: Tensor, embedded: Tensor) -> Passing:
        """That of tokens ``[B, C]`` with these embeddings."""
        return cls(None if decoder.per_layer is None else decoder.per_layer(ids, embedded), {})

    def borrowed(self, cfg: ModelConfig, index: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of a layer with the keys and values that it sees."""
        source = cfg.kv_source(index)
        if source != index:
            k, v = self.lent[source]
        elif index in cfg.kv_sources[index + 1 :]:
            self.lent[index] = k, v
        return q, k, v


class Decoder:
    """The model on one device.

    Queries and keys are mapped after RoPE (``store_keys``); the values' rotation is folded into the value and output
    projections, which is exact, where these take it (see ``Linear`` and ``Scheme.takes_rotation``).

    Args:
        weights: Taken layer by layer, so that fused copies never double the memory; a dict by Hugging Face names is
            emptied.
        k_rotations: The codecs' for queries and keys; None: none anywhere.
        v_rotations: The codecs' for values; None: none anywhere.
        quantise: Packs the layers' dense matrices, once the rotation of values is in them if they take it; None: they
            stay dense.
        text: Token ids that go through the layers before these are packed, so that it is known what their matrices are
            multiplied by; None: it is not known.
        pack_embedding: Packs the embedding and the output head, which share one copy where they are tied; None: they
            stay dense.
        context: Tokens of the longest sequence (None: the model's limit). It alone decides which of two lists of RoPE
            factors counts where a model has one for short and one for long contexts: one choice for all tokens, so that
            what is cached stays right.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        weights: Weights | dict[str, Tensor],
        k_rotations: Rotations | None,
        v_rotations: Rotations | None,
        quantise: Quantise | None = None,
        text: list[int] | None = None,
        pack_embedding: Quantise | None = None,
        context: int | None = None,
    ) -> None:
        self.cfg = cfg
        self.context = cfg.context_limit if context is None else context
        weights = HeldWeights(weights) if isinstance(weights, dict) else weights
        final_norm = weights.take(FINAL_NORM)
        #: The compute dtype, and where the weights are.
        self.dtype, self.device = final_norm.dtype, final_norm.device
        self.final_norm = self._norm_weight(final_norm)
        self.embedding, self.head = _embedding_and_head(weights, pack_embedding)
        self.per_layer: PerLayerEmbedding | None = None
        if cfg.per_layer_input:
            self.per_layer = PerLayerEmbedding.load(cfg, weights, self._norm_weight)
        #: The kinds of the layers, with their logits of sinks once these are there.
        self.specs = list(layer_specs(cfg))
        kinds = [(spec.rope, spec.head_dim) for spec in self.specs]
        #: The different rotary embeddings, and which of them each layer has.
        self.ropes = list(dict.fromkeys(kinds))
        self.rope_of = [self.ropes.index(kind) for kind in kinds]
        self._frequencies = [rope.frequencies(*kind, self.device, self.context) for kind in self.ropes]
        self._folds = not isinstance(quantise, Scheme) or quantise.takes_rotation
        #: Of each layer with attention the place among ``cfg.attention_layers`` (its number in an arena) of the one
        #: whose keys and values it sees.
        self.places = _places(cfg)
        seen = None if quantise is None or text is None or self.device.type == "meta" else Text(self, text)
        self.layers: list[Layer] = []
        for index, spec in enumerate(self.specs):
            place = self.places.get(index)
            turned = None if v_rotations is None or place is None else v_rotations[place]
            layer = self._layer(weights, spec, f"model.layers.{index}.", turned)
            self.specs[index] = layer.spec
            if quantise is not None:
                layer = self._packed(layer, index, quantise, seen)
            self.layers.append(layer)
        if k_rotations is not None:
            self.store_keys(k_rotations)

    def store_keys(self, rotations: Rotations, conditioning: Conditioning | None = None) -> None:
        """Choose the basis that keys are stored in.

        Keys are stored times ``A^T R^T`` and queries times ``A^-1 R^T``: their products stay what they are.

        Args:
            rotations: R of the codecs. Where there is none, keys have no code: they stay as they are, whatever the
                conditioning says.
            conditioning: Has A of each layer and KV head (the identity if it has none), and means.
        """
        device, alike = self.device, dict[int, Tensor]()
        shapes = None if conditioning is None else conditioning.shapes
        for number, layer in enumerate(self.layers):
            if not layer.has_attention:
                continue
            spec, index = layer.spec, self.places[number]
            if spec.kv_source is not None:  # the same tensors, so that a change in place is one of both
                source = self.layers[spec.kv_source].attention
                mixer = replace(layer.attention, maps=source.maps, key_mean=source.key_mean)
                self.layers[number] = replace(layer, mixer=mixer)
                continue
            rotation = rotations[index]
            if rotation is None:
                self.layers[number] = replace(layer, mixer=replace(layer.attention, maps=None, key_mean=None))
                continue
            turned = rotation.to(device, torch.float32).T
            if spec.head_dim not in alike:
                alike[spec.head_dim] = turned.to(self.dtype).contiguous()
            maps = alike[spec.head_dim].expand(2, spec.kv_heads, -1, -1)
            if shapes is not None and device.type == "meta":  # shapes alone: see linear._stacked
                maps = torch.empty(2, *shapes[index].shape, dtype=self.dtype, device=device)
            elif shapes is not None:
                a = shapes[index].to(device, torch.float64)
                both = torch.stack((torch.linalg.inv(a), a.mT)) @ turned.to(torch.float64)
                maps = both.to(self.dtype)
            mean = None if conditioning is None else conditioning.means[index].to(device, torch.float32).contiguous()
            self.layers[number] = replace(layer, mixer=replace(layer.attention, maps=maps, key_mean=mean))

    @property
    def rope_factors(self) -> str:
        """Which of RoPE's lists of factors the context chose: see `ModelConfig.rope_factors`."""
        return self.cfg.rope_factors(self.context)

    def inv_freq(self, index: int) -> Tensor:
        """The frequencies of a layer's RoPE, radians a position, float32 ``[d / 2]``; 0 where nothing turns."""
        return self._frequencies[self.rope_of[index]]

    def angles(self, positions: Tensor, dtype: torch.dtype, *, pure: bool = False) -> list[Angles]:
        """What RoPE does at int ``positions [...]``, for each layer; layers of one kind share tensors.

        Args:
            pure: A rotation alone: without the attention factor and without what only queries are multiplied by.
        """
        found = [self.angles_of(number, positions, dtype, pure=pure) for number in range(len(self.ropes))]
        return [found[number] for number in self.rope_of]

    def angles_of(self, number: int, positions: Tensor, dtype: torch.dtype, *, pure: bool = False) -> Angles:
        """What one of ``ropes`` does at ``positions``."""
        kind, frequencies = self.ropes[number][0], self._frequencies[number]
        factor = 1.0 if pure else rope.attention_factor(kind)
        queries = None if pure else rope.query_factors(kind, positions)
        return Angles(*rope.cos_sin(positions, frequencies, dtype, factor), queries)

    def write_angles(self, number: int, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
        """Write what one of ``ropes`` does at ``positions`` int32 ``[R]``: ``cos, sin [R, d / 2]``.

        Returns:
            What queries are multiplied by, float32 ``[R]``; None: nothing.
        """
        kind = self.ropes[number][0]
        ops.angles(positions, self._frequencies[number], rope.attention_factor(kind), cos, sin)
        return rope.query_factors(kind, positions)

    @property
    def weight_format(self) -> str:
        """What its weights are stored as: ``bf16``, ``int4``, ``int8+bf16``, ``int4, head int8``, say."""
        parts = [part for layer in self.layers for part in (*layer.mixer.parts, *layer.mlp.parts)]
        names = dict.fromkeys(self._stored(part.weight) for part in parts)
        heads = dict.fromkeys((self._stored(self.embedding), self._stored(self.head.weight)))
        alike = {_DTYPE_NAMES[self.dtype]}
        if [*names] == [*heads] and {*names} <= {*_DTYPE_NAMES.values()}:
            alike |= {*names}
        head = "" if len(heads) == 1 and {*heads} <= alike else f", head {'+'.join(heads)}"
        return "+".join(names) + head

    def _stored(self, weight: Tensor | PackedWeight) -> str:
        return format_name(weight) if isinstance(weight, PackedWeight) else _DTYPE_NAMES[weight.dtype]

    def embedded(self, ids: Tensor) -> Tensor:
        """The vectors ``[..., hidden]`` of token ids ``[...]``."""
        out = torch.empty(ids.numel(), self.cfg.hidden_size, dtype=self.dtype, device=ids.device)
        step_reference.embed(ids.flatten(), self.embedding, out, self.embedding_scale)
        return out.view(*ids.shape, -1)

    @functools.cached_property
    def embedding_scale(self) -> float:
        """What embeddings are multiplied by: a number of the compute dtype, which is part of the published models."""
        return float(torch.tensor(self.cfg.embedding_scale, dtype=self.dtype))

    def _norm_weight(self, weight: Tensor) -> Tensor:
        """The weight of a norm as the kernels take it: in float32 where it multiplies in float32."""
        kind = self.cfg.family.norm
        if kind == "rms":
            return weight
        wide = widened(weight)
        return wide + 1 if kind == "one_plus" and not wide.is_meta else wide

    def _layer(self, weights: Weights, spec: LayerSpec, prefix: str, v_rotation: Tensor | None) -> Layer:
        def norm(name: str | None) -> Tensor | None:
            return None if name is None else self._norm_weight(weights.take(f"{prefix}{name}.weight"))

        names = spec.norms
        if self.cfg.family.sinks:
            sinks = widened(weights.take(f"{prefix}self_attn.sinks"))
            spec = replace(spec, attention=replace(spec.attention, sink_logits=sinks))
        return Layer(
            spec=spec,
            norms=LayerNorms(
                norm(names.before_attention), norm(names.after_attention), norm(names.before_mlp), norm(names.after_mlp)
            ),
            mixer=self._attention(weights, spec, prefix, v_rotation)
            if spec.mixer is None
            else spec.mixer.load(weights, prefix),
            mlp=spec.mlp.load(weights, prefix),
            per_layer=self._per_layer(weights, spec, prefix),
            scale=self._scale(weights, prefix),
        )

    def _per_layer(self, weights: Weights, spec: LayerSpec, prefix: str) -> PerLayerInput | None:
        if not spec.per_layer_input:
            return None
        return PerLayerInput.load(weights, prefix, self._norm_weight, ACTIVATIONS[self.cfg.hidden_act])

    def _scale(self, weights: Weights, prefix: str) -> float:
        if not self.cfg.family.layer_scale:
            return 1.0
        scale = weights.take(f"{prefix}{LAYER_SCALE}")
        return 1.0 if scale.is_meta else float(scale)

    def _attention(self, weights: Weights, spec: LayerSpec, prefix: str, v_rotation: Tensor | None) -> AttentionWeights:
        cfg = self.cfg
        if spec.kv_source is not None:
            return self._borrowing(weights, spec, prefix, v_rotation)
        q, k, v = self._projections(weights, spec, f"{prefix}self_attn.")
        gate: AnyLinear | None = None
        if spec.gated:  # in the files each head's queries come first, then its gates
            size = spec.heads * spec.head_dim
            q = q.reordered(parts_first(spec.heads, (spec.head_dim, spec.head_dim)))
            q, gate = q.part(0, size), joined(q.part(size, 2 * size))
        out = weights.linear(f"{prefix}self_attn.o_proj", cfg.o_bias)
        unfolded = None
        if v_rotation is not None:
            rotation = v_rotation.to(torch.float32)
            turned = v.with_rotated_outputs(rotation, spec.kv_heads)
            back = out.with_rotated_inputs(rotation, spec.heads)
            # Matrices stored in fewer bits than the arithmetic has would lose some: they stay what they are.
            wide = all(isinstance(part, Linear) and part.weight.dtype == self.dtype for part in (v, out))
            if turned is not None and back is not None and wide and self._folds and not spec.gated:
                v, out = turned, back
            else:
                unfolded = v_rotation.to(self.device, self.dtype).T.contiguous()
        order = spec_order(cfg, spec)
        norms: list[Tensor | None] = [None, None]
        for place, (name, heads) in enumerate((("q_norm", spec.heads), ("k_norm", spec.kv_heads))):
            if spec.qk_norm:
                weight = self._norm_weight(weights.take(f"{prefix}self_attn.{name}.weight"))
                if order is not None and not weight.is_meta:
                    weight = weight[head_order(order, heads if spec.qk_norm == "all" else 1).to(weight.device)]
                norms[place] = weight
        if order is not None:
            q, k = q.reordered(head_order(order, spec.heads)), k.reordered(head_order(order, spec.kv_heads))
        return AttentionWeights(joined(q, k, v), norms[0], norms[1], out, unfolded, gate=gate)

    def _borrowing(self, weights: Weights, spec: LayerSpec, prefix: str, v_rotation: Tensor | None) -> AttentionWeights:
        """The attention of a layer that sees another one's keys and values, rotated as that one stores them."""
        q = weights.linear(f"{prefix}self_attn.q_proj", self.cfg.qkv_bias)
        out, unfolded = weights.linear(f"{prefix}self_attn.o_proj", self.cfg.o_bias), None
        norm = self._norm_weight(weights.take(f"{prefix}self_attn.q_norm.weight")) if spec.qk_norm else None
        if v_rotation is not None:
            back = out.with_rotated_inputs(v_rotation.to(torch.float32), spec.heads) if self._folds else None
            if back is None:
                unfolded = v_rotation.to(self.device, self.dtype).T.contiguous()
            out = out if back is None else back
        assert spec_order(self.cfg, spec) is None and spec.qk_norm != "all" and not spec.gated
        return AttentionWeights(q, norm, norm, out, unfolded)

    def _projections(
        self, weights: Weights, spec: LayerSpec, prefix: str
    ) -> tuple[SingleLinear, SingleLinear, SingleLinear]:
        bias = self.cfg.qkv_bias
        if not self.cfg.family.fused_qkv:
            q, k = (weights.linear(f"{prefix}{name}_proj", bias) for name in "qk")
            return q, k, k if spec.values_are_keys else weights.linear(f"{prefix}v_proj", bias)
        fused = weights.linear(f"{prefix}qkv_proj", bias)
        q, k, v = (fused.part(first, last) for first, last in pairwise((0, *spec.edges)))
        return q, k, v

    @property
    def key_tensors(self) -> list[Tensor]:
        """What the layers hold beside their weights: maps and means of keys."""
        layers = [layer.attention for layer in self.layers if layer.has_attention]
        return [part for layer in layers for part in (layer.maps, layer.key_mean) if part is not None]

    def hidden(self, ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Run the tokens through all layers.

        Args:
            ids: int64 ``[B, C]``.
            positions: int64 ``[B, C]``.

        Returns:
            Hidden states ``[B, C, hidden]`` after the last layer, before the final norm.
        """
        x = self.embedded(ids)
        passing = Passing.of(self, ids, x)
        angles = self.angles(positions, x.dtype)
        for index, layer in enumerate(self.layers):
            x = self.through(index, layer, x, angles[index], attention, passing)
        return x

    def through(
        self, index: int, layer: Layer, x: Tensor, angles: Angles, attention: Attention, passing: Passing,
        seen: Callable[[str, Tensor], None] = lambda _name, _x: None,
    ) -> Tensor:  # fmt: skip
        """Run hidden states ``[B, C, hidden]`` through a layer.

        Args:
            passing: What goes with them.
            seen: Is given what ``mixer``, ``out`` and ``mlp`` are given, by these names.
        """
        normed = self.normed(x, layer.norms.before_attention)
        seen("mixer", normed)
        if isinstance(layer.mixer, AttentionWeights):
            # Through an argument list, so that query, key and value are freed before the MLP's activations come.
            mixed = self.mixed(
                layer, normed, attention(index, *passing.borrowed(self.cfg, index, *self.qkv(layer, normed, angles)))
            )
            seen("out", mixed)
            mixed = layer.mixer.out(mixed)
        else:
            mixed = layer.mixer(normed)
        x = self.rest(layer, x, normed, mixed, seen)
        if layer.per_layer is not None and passing.per_layer is not None:
            x = x + self.normed(layer.per_layer(x, passing.per_layer[index]), layer.per_layer.norm)
        return x if layer.scale == 1.0 else x * layer.scale

    def rest(
        self, layer: Layer, x: Tensor, normed: Tensor, mixed: Tensor,
        seen: Callable[[str, Tensor], None] = lambda _name, _x: None,
    ) -> Tensor:  # fmt: skip
        """The rest of a layer: what its mixer gave for the ``normed`` hidden states is added, then comes the MLP."""
        x = self.added(x, mixed, layer, layer.norms.after_attention)
        if not layer.spec.parallel:
            normed = self.normed(x, layer.norms.before_mlp)
        seen("mlp", normed)
        return self.added(x, layer.mlp(normed), layer, layer.norms.after_mlp)

    def normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """The norm of hidden states; None: there is none."""
        layer_norm = self.cfg.family.norm == "layer"
        return x if weight is None else step_reference.normed(x, weight, self.cfg.rms_norm_eps, centred=layer_norm)

    def added(self, x: Tensor, more: Tensor, layer: Layer, norm: Tensor | None) -> Tensor:
        """Hidden states and what attention or the MLP gives."""
        more = self.normed(more, norm)
        multiplier = layer.spec.residual_multiplier
        return x + (more if multiplier == 1.0 else more * multiplier)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits ``[..., vocab]`` of hidden states ``[..., hidden]``."""
        out = self.head(self.normed(hidden, self.final_norm))
        self.finish(out)
        return out.to(torch.float32)

    def finish(self, logits: Tensor) -> None:
        """Make, in place, the model's logits of what the output head gives."""
        cfg = self.cfg
        if cfg.logit_multiplier != 1.0:
            logits.mul_(cfg.logit_multiplier)
        if cfg.logit_cap is not None:
            logits.div_(cfg.logit_cap).tanh_().mul_(cfg.logit_cap)

    def qkv(self, layer: Layer, normed: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[B, C, ., d]`` of ``normed [B, C, hidden]``, as attention takes them; keys and
        values of a layer that has none of its own are anything."""
        spec, weights, eps = layer.spec, layer.attention, self.cfg.rms_norm_eps
        qkv = weights.qkv(normed)
        if spec.kv_source is not None:
            qkv = torch.cat((qkv, qkv.new_zeros(*qkv.shape[:-1], spec.edges[2] - spec.edges[0])), -1)
        q, k, v = (qkv[..., first:last] for first, last in pairwise((0, *spec.edges)))
        whole = spec.qk_norm == "all"
        if whole and weights.q_norm is not None and weights.k_norm is not None:
            q, k = step_reference.normed(q, weights.q_norm, eps), step_reference.normed(k, weights.k_norm, eps)
        q, k, v = (x.reshape(*x.shape[:-1], -1, spec.head_dim) for x in (q, k, v))
        if not whole and weights.q_norm is not None and weights.k_norm is not None:
            q, k = step_reference.normed(q, weights.q_norm, eps), step_reference.normed(k, weights.k_norm, eps)
        if spec.v_norm:
            v = step_reference.normed(v, None, eps)
        q, k = (rope.apply(x, angles.cos, angles.sin) for x in (q, k))
        if angles.queries is not None:
            q = q * angles.queries[..., None, None].to(q.dtype)
        if weights.maps is not None:
            both = ops.mapped(torch.cat((q, k), 2), weights.maps)
            q, k = torch.split(both, [q.shape[2], k.shape[2]], dim=2)
        return q, k, v if weights.v_rotation is None else v @ weights.v_rotation

    def mixed(self, layer: Layer, normed: Tensor, mixed: Tensor) -> Tensor:
        """What the output projection takes, ``[B, C, heads d]``, of what attention gives, ``[B, C, heads, d]``.

        Args:
            normed: What attention was given, ``[B, C, hidden]``.
        """
        rotation, gate = layer.attention.v_rotation, layer.attention.gate
        mixed = (mixed if rotation is None else mixed @ rotation.T).flatten(2)
        return mixed if gate is None else mixed * gate(normed).sigmoid()

    def _packed(self, layer: Layer, index: int, quantise: Quantise, seen: Text | None) -> Layer:
        """The layer with its dense matrices packed.

        Raises:
            OctoError: A matrix has values that are no finite numbers.
        """
        inputs = {} if seen is None else seen.through(self, index, layer)

        def squares(name: str) -> Tensor | None:
            return mean_squares(inputs[name]) if name in inputs else None

        mixer = layer.mixer
        if isinstance(mixer, AttentionWeights):
            qkv = pack_any("q, k, v", index, mixer.qkv, quantise, squares("mixer"))
            gate = None if mixer.gate is None else pack_any("gate", index, mixer.gate, quantise, squares("mixer"))
            packed: AttentionWeights | Mixer = replace(
                mixer, qkv=qkv, gate=gate, out=pack_one("o_proj", index, mixer.out, quantise, squares("out"))
            )
        else:
            packed = mixer.packed(quantise, index, inputs.get("mixer"))
        return replace(layer, mixer=packed, mlp=layer.mlp.packed(quantise, index, inputs.get("mlp")))


_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def spec_order(cfg: ModelConfig, spec: LayerSpec) -> Tensor | None:
    """The order that the coordinates of a layer's queries and keys are kept in (``rope.halves_first``)."""
    kind = spec.rope
    if kind is None or (kind.scaling is not None and kind.scaling.kind == "proportional"):
        return None
    return rope.halves_first(spec.head_dim, kind.rotary(spec.head_dim), cfg.family.interleaved)


def _embedding_and_head(weights: Weights, pack: Quantise | None) -> tuple[Tensor | PackedWeight, SingleLinear]:
    """The embedding and the output head, which is the same tensors where they are tied."""
    table: Tensor | PackedWeight = weights.matrix(EMBEDDING)
    head = weights.linear("lm_head") if weights.has_head else None
    if pack is not None:
        if isinstance(table, Tensor):
            table = pack(table, None)
        if isinstance(head, Linear):
            head = PackedLinear(pack(head.weight, None), head.bias)
    if head is None:
        head = Linear(table) if isinstance(table, Tensor) else PackedLinear(table)
    return table, head


def _places(cfg: ModelConfig) -> dict[int, int]:
    """Of each layer with attention the place among ``cfg.attention_layers`` of the one whose keys it sees."""
    own = {layer: place for place, layer in enumerate(cfg.attention_layers)}
    sources = {layer: cfg.kv_source(layer) for layer in range(cfg.num_layers)}
    return {layer: own[source] for layer, source in sources.items() if source in own}
