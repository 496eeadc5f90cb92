"""The decoder: one definition of the Llama-shaped transformer that a ``ModelConfig`` turns into Llama, Mistral, Qwen2
or Qwen3.

The decoder owns weights and arithmetic and knows nothing of caches: for each layer it hands query, key and value to the
``attention`` function it was given and goes on with what that returns.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from octo_run.errors import OctoError
from octo_run.kernels import AttentionSpec
from octo_run.kernels import step as ops
from octo_run.kernels.linear import PackedWeight
from octo_run.kernels.step import reference as step_reference
from octo_run.models import rope
from octo_run.models.conditioning import Conditioning
from octo_run.models.config import ModelConfig
from octo_run.models.linear import AnyLinear, Linear, PackedLinear, SingleLinear, SplitLinear, joined
from octo_run.models.quantisation.importance import Importance, Text
from octo_run.models.quantisation.schemes import format_name
from octo_run.models.weights import EMBEDDING, HeldWeights, Weights

#: ``attention(layer, q [B, C, heads, d], k [B, C, kv_heads, d], v [B, C, kv_heads, d]) -> [B, C, heads, d]``
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
#: Packs a matrix ``[out, in]``, given the mean squares ``[in]`` of what it is multiplied by where they are known; on
#: ``meta`` it makes the tensors that it would fill.
Quantise = Callable[[Tensor, Tensor | None], PackedWeight]


@dataclass(frozen=True)
class Layer:
    """One layer's weights, fused at load: q, k, v in one matrix, gate and up in another, where they can be."""

    input_norm: Tensor
    qkv: AnyLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: SingleLinear
    mlp_norm: Tensor
    gate_up: AnyLinear
    down: SingleLinear
    #: What values are rotated by on their way into the arena (rows times it), where the weights do not do it.
    v_rotation: Tensor | None
    #: What queries and keys are multiplied by after RoPE, ``[2, kv_heads, d, d]`` (see ``Decoder.store_keys``).
    maps: Tensor | None = None
    #: The mean of keys before RoPE that stays out of their code, float32 ``[kv_heads, d]``.
    key_mean: Tensor | None = None


@dataclass(frozen=True)
class LayerSpec:
    """What kind of layer it is, beside its weights."""

    attention: AttentionSpec


def layer_specs(cfg: ModelConfig) -> tuple[LayerSpec, ...]:
    """The kinds of all layers of a model."""
    return (LayerSpec(AttentionSpec(scale=cfg.head_dim**-0.5)),) * cfg.num_layers


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, in float32, returned in ``x``'s dtype (Zhang & Sennrich 2019)."""
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class Decoder:
    """The model on one device.

    Queries and keys are mapped after RoPE (``store_keys``); the values' rotation is folded into the value and output
    projections, which is exact, where these take it (see ``Linear``).

    Args:
        weights: Taken layer by layer, so that fused copies never double the memory; a dict by Hugging Face names is
            emptied.
        k_rotation: The codec's for queries and keys, ``[head_dim, head_dim]`` or None.
        v_rotation: The codec's for values, ``[head_dim, head_dim]`` or None.
        quantise: Packs the layers' dense matrices, once the rotation of values is in them; None: they stay dense.
        text: Token ids that go through the layers before these are packed, so that it is known what their matrices are
            multiplied by; None: it is not known.
        pack_embedding: Packs the embedding and the output head, which share one copy where they are tied; None: they
            stay dense.

    The identity counts as None, so that plain formats pay nothing.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        weights: Weights | dict[str, Tensor],
        k_rotation: Tensor | None,
        v_rotation: Tensor | None,
        quantise: Quantise | None = None,
        text: list[int] | None = None,
        pack_embedding: Quantise | None = None,
    ) -> None:
        self.cfg = cfg
        weights = HeldWeights(weights) if isinstance(weights, dict) else weights
        self.final_norm = weights.take("model.norm.weight")
        self.embedding, self.head = _embedding_and_head(weights, pack_embedding)
        self.specs = layer_specs(cfg)
        self.inv_freq = rope.inverse_frequencies(cfg, self.device)
        v_rotation = None if v_rotation is None or _is_identity(v_rotation) else v_rotation
        seen = None if quantise is None or text is None or self.device.type == "meta" else Text(self, text)
        self.layers: list[Layer] = []
        for index in range(cfg.num_layers):
            layer = self._layer(weights, f"model.layers.{index}.", v_rotation)
            if quantise is not None:
                layer = _packed(
                    layer, index, quantise, Importance() if seen is None else seen.through(self, index, layer)
                )
            self.layers.append(layer)
        if k_rotation is not None:
            self.store_keys(k_rotation)

    def store_keys(self, rotation: Tensor, conditioning: Conditioning | None = None) -> None:
        """Choose the basis that keys are stored in.

        Keys are stored times ``A^T R^T`` and queries times ``A^-1 R^T``: their products stay what they are.

        Args:
            rotation: R of the codec, ``[d, d]``.
            conditioning: Has A of each layer and KV head (the identity if it has none), and means.
        """
        cfg, device = self.cfg, self.device
        if conditioning is None and _is_identity(rotation):
            return
        turned = rotation.to(device, torch.float32).T
        shared = turned.to(self.dtype).contiguous().expand(2, cfg.num_kv_heads, -1, -1)
        shapes = None if conditioning is None else conditioning.shapes
        for index, layer in enumerate(self.layers):
            maps = shared
            if shapes is not None and device.type == "meta":  # shapes alone: see linear._stacked
                maps = torch.empty(2, *shapes[index].shape, dtype=self.dtype, device=device)
            elif shapes is not None:
                a = shapes[index].to(device, torch.float64)
                both = torch.stack((torch.linalg.inv(a), a.mT)) @ turned.to(torch.float64)
                maps = both.to(self.dtype)
            mean = None if conditioning is None else conditioning.means[index].to(device, torch.float32).contiguous()
            self.layers[index] = replace(layer, maps=maps, key_mean=mean)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.final_norm.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.final_norm.dtype

    @property
    def weight_format(self) -> str:
        """What its weights are stored as: ``bf16``, ``int4``, ``int8+bf16``, ``int4, head int8``, say."""
        layers = [getattr(layer, name) for layer in self.layers for name in ("qkv", "out", "gate_up", "down")]
        names = dict.fromkeys(self._stored(part.weight) for layer in layers for part in layer.parts)
        heads = dict.fromkeys((self._stored(self.embedding), self._stored(self.head.weight)))
        head = "" if [*heads] == [self._stored(self.final_norm)] else f", head {'+'.join(heads)}"
        return "+".join(names) + head

    def _stored(self, weight: Tensor | PackedWeight) -> str:
        if isinstance(weight, PackedWeight):
            return format_name(weight)
        return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[weight.dtype]

    def embedded(self, ids: Tensor) -> Tensor:
        """The vectors ``[..., hidden]`` of token ids ``[...]``."""
        out = torch.empty(ids.numel(), self.cfg.hidden_size, dtype=self.dtype, device=ids.device)
        step_reference.embed(ids.flatten(), self.embedding, out)
        return out.view(*ids.shape, -1)

    def _layer(self, weights: Weights, prefix: str, v_rotation: Tensor | None) -> Layer:
        cfg = self.cfg

        def take(name: str) -> Tensor:
            return weights.take(prefix + name)

        def linear(name: str, bias: bool) -> SingleLinear:
            return weights.linear(prefix + name, bias)

        v = weights.linear(f"{prefix}self_attn.v_proj", cfg.qkv_bias)
        out = weights.linear(f"{prefix}self_attn.o_proj", cfg.o_bias)
        unfolded = None
        if v_rotation is not None:
            rotation = v_rotation.to(torch.float32)
            turned = v.with_rotated_outputs(rotation, cfg.num_kv_heads)
            back = out.with_rotated_inputs(rotation, cfg.num_heads)
            if turned is not None and back is not None:
                v, out = turned, back
            else:
                unfolded = v_rotation.to(self.final_norm).T.contiguous()
        q, k = linear("self_attn.q_proj", cfg.qkv_bias), linear("self_attn.k_proj", cfg.qkv_bias)
        return Layer(
            input_norm=take("input_layernorm.weight"),
            qkv=joined(q, k, v),
            q_norm=take("self_attn.q_norm.weight") if cfg.qk_norm else None,
            k_norm=take("self_attn.k_norm.weight") if cfg.qk_norm else None,
            out=out,
            mlp_norm=take("post_attention_layernorm.weight"),
            gate_up=joined(linear("mlp.gate_proj", cfg.mlp_bias), linear("mlp.up_proj", cfg.mlp_bias)),
            down=linear("mlp.down_proj", cfg.mlp_bias),
            v_rotation=unfolded,
        )

    @property
    def key_tensors(self) -> list[Tensor]:
        """What the layers hold beside their weights: maps and means of keys."""
        return [part for layer in self.layers for part in (layer.maps, layer.key_mean) if part is not None]

    def hidden(self, ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Run the tokens through all layers.

        Args:
            ids: int64 ``[B, C]``.
            positions: int64 ``[B, C]``.

        Returns:
            Hidden states ``[B, C, hidden]`` after the last layer, before the final norm.
        """
        x = self.embedded(ids)
        cos, sin = rope.cos_sin(positions, self.inv_freq, x.dtype)
        for index, layer in enumerate(self.layers):
            # Through an argument list, so that query, key and value are freed before the MLP's activations come.
            x = x + self._out(layer, attention(index, *self._qkv(layer, x, cos, sin)))
            x = x + self._mlp(layer, x)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits ``[..., vocab]`` of hidden states ``[..., hidden]``."""
        return self.head(rms_norm(hidden, self.final_norm, self.cfg.rms_norm_eps)).to(torch.float32)

    def _qkv(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cfg = self.cfg
        qkv = layer.qkv(rms_norm(x, layer.input_norm, cfg.rms_norm_eps))
        heads = qkv.view(*x.shape[:2], cfg.num_heads + 2 * cfg.num_kv_heads, cfg.head_dim)
        q, k, v = torch.split(heads, [cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads], dim=2)
        return *self._turn(layer, q, k, cos, sin), v if layer.v_rotation is None else v @ layer.v_rotation

    def _turn(self, layer: Layer, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if layer.q_norm is not None and layer.k_norm is not None:
            eps = self.cfg.rms_norm_eps
            q, k = rms_norm(q, layer.q_norm, eps), rms_norm(k, layer.k_norm, eps)
        q, k = rope.apply(q, cos, sin), rope.apply(k, cos, sin)
        if layer.maps is not None:
            both = ops.mapped(torch.cat((q, k), 2), layer.maps)
            q, k = torch.split(both, [q.shape[2], k.shape[2]], dim=2)
        return q, k

    def _out(self, layer: Layer, mixed: Tensor) -> Tensor:
        if layer.v_rotation is not None:
            mixed = mixed @ layer.v_rotation.T
        return layer.out(mixed.flatten(2))

    def _mlp(self, layer: Layer, x: Tensor) -> Tensor:
        gate, up = layer.gate_up(rms_norm(x, layer.mlp_norm, self.cfg.rms_norm_eps)).chunk(2, dim=-1)
        return layer.down(F.silu(gate) * up)


def _embedding_and_head(weights: Weights, pack: Quantise | None) -> tuple[Tensor | PackedWeight, SingleLinear]:
    """The embedding and the output head, which is the same tensors where they are tied."""
    table: Tensor | PackedWeight = weights.take(EMBEDDING)
    head = weights.linear("lm_head") if weights.has_head else None
    if pack is not None:
        if isinstance(table, Tensor):
            table = pack(table, None)
        if isinstance(head, Linear):
            head = PackedLinear(pack(head.weight, None), head.bias)
    if head is None:
        head = Linear(table) if isinstance(table, Tensor) else PackedLinear(table)
    return table, head


def _packed(layer: Layer, index: int, quantise: Quantise, seen: Importance) -> Layer:
    """The layer with its dense matrices packed.

    Raises:
        OctoError: A matrix has values that are no finite numbers.
    """

    def one(name: str, linear: SingleLinear, squares: Tensor | None) -> SingleLinear:
        if isinstance(linear, PackedLinear):
            return linear
        if not linear.weight.is_meta and not linear.weight.isfinite().all():
            raise OctoError(
                f"The weights {name} of layer {index} have values that are no finite numbers and cannot be quantised: "
                "fetch the model again, or give --weights bf16."
            )
        return PackedLinear(quantise(linear.weight, squares), linear.bias)

    def any_of(name: str, linear: AnyLinear, squares: Tensor | None) -> AnyLinear:
        if isinstance(linear, SplitLinear):
            return joined(*(one(name, part, squares) for part in linear.parts))
        return one(name, linear, squares)

    return replace(
        layer,
        qkv=any_of("q, k, v", layer.qkv, seen.qkv),
        out=one("o_proj", layer.out, seen.out),
        gate_up=any_of("gate, up", layer.gate_up, seen.gate_up),
        down=one("down_proj", layer.down, seen.down),
    )


def _is_identity(matrix: Tensor) -> bool:
    return torch.equal(matrix, torch.eye(len(matrix), dtype=matrix.dtype))
