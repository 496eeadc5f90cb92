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

from octo_run.kernels import AttentionSpec
from octo_run.kernels import step as ops
from octo_run.kernels.linear import PackedWeight
from octo_run.models import rope
from octo_run.models.conditioning import Conditioning
from octo_run.models.config import ModelConfig
from octo_run.models.linear import AnyLinear, Linear, PackedLinear, SingleLinear, joined
from octo_run.models.weights import EMBEDDING, HeldWeights, Weights

#: ``attention(layer, q [B, C, heads, d], k [B, C, kv_heads, d], v [B, C, kv_heads, d]) -> [B, C, heads, d]``
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
#: Packs a matrix ``[out, in]``; on ``meta`` it makes the tensors that it would fill.
Quantise = Callable[[Tensor], PackedWeight]


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

    The identity counts as None, so that plain formats pay nothing.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        weights: Weights | dict[str, Tensor],
        k_rotation: Tensor | None,
        v_rotation: Tensor | None,
        quantise: Quantise | None = None,
    ) -> None:
        self.cfg = cfg
        weights = HeldWeights(weights) if isinstance(weights, dict) else weights
        self.embedding = weights.take(EMBEDDING)
        self.final_norm = weights.take("model.norm.weight")
        self.head: SingleLinear = weights.linear("lm_head") if weights.has_head else Linear(self.embedding)
        self.specs = layer_specs(cfg)
        v_rotation = None if v_rotation is None or _is_identity(v_rotation) else v_rotation
        self.layers = [self._layer(weights, f"model.layers.{i}.", v_rotation, quantise) for i in range(cfg.num_layers)]
        self.inv_freq = rope.inverse_frequencies(cfg, self.embedding.device)
        if k_rotation is not None:
            self.store_keys(k_rotation)

    def store_keys(self, rotation: Tensor, conditioning: Conditioning | None = None) -> None:
        """Choose the basis that keys are stored in.

        Keys are stored times ``A^T R^T`` and queries times ``A^-1 R^T``: their products stay what they are.

        Args:
            rotation: R of the codec, ``[d, d]``.
            conditioning: Has A of each layer and KV head (the identity if it has none), and means.
        """
        cfg, device = self.cfg, self.embedding.device
        if conditioning is None and _is_identity(rotation):
            return
        turned = rotation.to(device, torch.float32).T
        shared = turned.to(self.embedding.dtype).contiguous().expand(2, cfg.num_kv_heads, -1, -1)
        shapes = None if conditioning is None else conditioning.shapes
        for index, layer in enumerate(self.layers):
            maps = shared
            if shapes is not None:
                a = shapes[index].to(device, torch.float64)
                both = torch.stack((torch.linalg.inv(a), a.mT)) @ turned.to(torch.float64)
                maps = both.to(self.embedding.dtype)
            mean = None if conditioning is None else conditioning.means[index].to(device, torch.float32).contiguous()
            self.layers[index] = replace(layer, maps=maps, key_mean=mean)

    def _layer(self, weights: Weights, prefix: str, v_rotation: Tensor | None, quantise: Quantise | None) -> Layer:
        cfg = self.cfg

        def take(name: str) -> Tensor:
            return weights.take(prefix + name)

        def packed(layer: SingleLinear) -> SingleLinear:
            if quantise is None or isinstance(layer, PackedLinear):
                return layer
            return PackedLinear(quantise(layer.weight), layer.bias)

        def linear(name: str, bias: bool) -> SingleLinear:
            return packed(weights.linear(prefix + name, bias))

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
                unfolded = v_rotation.to(self.embedding).T.contiguous()
        v, out = packed(v), packed(out)
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
        x = F.embedding(ids, self.embedding)
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


def _is_identity(matrix: Tensor) -> bool:
    return torch.equal(matrix, torch.eye(len(matrix), dtype=matrix.dtype))
