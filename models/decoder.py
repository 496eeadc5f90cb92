"""The decoder: one definition of the Llama-shaped transformer that a ``ModelConfig`` turns into Llama, Mistral, Qwen2
or Qwen3.

The decoder owns weights and arithmetic and knows nothing of caches: for each layer it hands query, key and value to the
``attention`` function it was given and goes on with what that returns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from octo_run.models import rope
from octo_run.models.config import ModelConfig

#: ``attention(layer, q [B, C, heads, d], k [B, C, kv_heads, d], v [B, C, kv_heads, d]) -> [B, C, heads, d]``
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """One layer's weights, fused at load: q, k, v in one matrix, gate and up in another."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, in float32, returned in ``x``'s dtype (Zhang & Sennrich 2019)."""
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotate_rows(weight: Tensor, rotation: Tensor, heads: int) -> Tensor:
    """``R W`` for each head's block of rows; ``weight [heads * d, ...]``."""
    blocks = weight.to(torch.float32).reshape(heads, rotation.shape[0], -1)
    return (rotation.to(blocks) @ blocks).reshape(weight.shape).to(weight.dtype)


def _rotate_columns(weight: Tensor, rotation: Tensor, heads: int) -> Tensor:
    """``W R^T`` for each head's block of columns; ``weight [n, heads * d]``."""
    blocks = weight.to(torch.float32).reshape(-1, heads, rotation.shape[0])
    return (blocks @ rotation.to(blocks).T).reshape(weight.shape).to(weight.dtype)


class Decoder:
    """The model on one device. Consumes ``weights`` (Hugging Face names), so that fused copies never double the memory.

    ``k_rotation`` and ``v_rotation`` (``[head_dim, head_dim]`` or None) are the codec's: queries and keys are rotated
    after RoPE; the values' rotation is folded into the value and output projections, which is exact.
    """

    def __init__(
        self, cfg: ModelConfig, weights: dict[str, Tensor], k_rotation: Tensor | None, v_rotation: Tensor | None
    ) -> None:
        self.cfg = cfg
        self.embedding = weights.pop("model.embed_tokens.weight")
        self.final_norm = weights.pop("model.norm.weight")
        self.head = weights.pop("lm_head.weight", self.embedding)
        self.layers = [self._layer(weights, f"model.layers.{i}.", v_rotation) for i in range(cfg.num_layers)]
        self.k_rotation = None if k_rotation is None else k_rotation.to(self.embedding).T.contiguous()
        self.inv_freq = rope.inverse_frequencies(cfg, self.embedding.device)

    def _layer(self, weights: dict[str, Tensor], prefix: str, v_rotation: Tensor | None) -> Layer:
        cfg = self.cfg

        def take(name: str) -> Tensor:
            return weights.pop(prefix + name)

        def fused(names: list[str], present: bool) -> Tensor | None:
            return torch.cat([take(n) for n in names]) if present else None

        v, out = take("self_attn.v_proj.weight"), take("self_attn.o_proj.weight")
        v_bias = take("self_attn.v_proj.bias") if cfg.qkv_bias else None
        if v_rotation is not None:
            v = _rotate_rows(v, v_rotation, cfg.num_kv_heads)
            out = _rotate_columns(out, v_rotation, cfg.num_heads)
            v_bias = None if v_bias is None else _rotate_rows(v_bias, v_rotation, cfg.num_kv_heads)
        qkv_bias = None
        if v_bias is not None:
            qkv_bias = torch.cat([take("self_attn.q_proj.bias"), take("self_attn.k_proj.bias"), v_bias])
        gate_up = fused(["mlp.gate_proj.weight", "mlp.up_proj.weight"], True)
        assert gate_up is not None
        return Layer(
            input_norm=take("input_layernorm.weight"),
            qkv=torch.cat([take("self_attn.q_proj.weight"), take("self_attn.k_proj.weight"), v]),
            qkv_bias=qkv_bias,
            q_norm=take("self_attn.q_norm.weight") if cfg.qk_norm else None,
            k_norm=take("self_attn.k_norm.weight") if cfg.qk_norm else None,
            out=out,
            out_bias=take("self_attn.o_proj.bias") if cfg.o_bias else None,
            mlp_norm=take("post_attention_layernorm.weight"),
            gate_up=gate_up,
            gate_up_bias=fused(["mlp.gate_proj.bias", "mlp.up_proj.bias"], cfg.mlp_bias),
            down=take("mlp.down_proj.weight"),
            down_bias=take("mlp.down_proj.bias") if cfg.mlp_bias else None,
        )

    def hidden(self, ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Hidden states ``[B, C, hidden]`` after the last layer, before the final norm.

        ``ids`` and ``positions`` are int64 ``[B, C]``.
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
        return F.linear(rms_norm(hidden, self.final_norm, self.cfg.rms_norm_eps), self.head).to(torch.float32)

    def _qkv(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cfg = self.cfg
        qkv = F.linear(rms_norm(x, layer.input_norm, cfg.rms_norm_eps), layer.qkv, layer.qkv_bias)
        heads = qkv.view(*x.shape[:2], cfg.num_heads + 2 * cfg.num_kv_heads, cfg.head_dim)
        q, k, v = torch.split(heads, [cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads], dim=2)
        return *self._turn(layer, q, k, cos, sin), v

    def _turn(self, layer: Layer, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if layer.q_norm is not None and layer.k_norm is not None:
            eps = self.cfg.rms_norm_eps
            q, k = rms_norm(q, layer.q_norm, eps), rms_norm(k, layer.k_norm, eps)
        q, k = rope.apply(q, cos, sin), rope.apply(k, cos, sin)
        if self.k_rotation is not None:
            q, k = q @ self.k_rotation, k @ self.k_rotation
        return q, k

    def _out(self, layer: Layer, mixed: Tensor) -> Tensor:
        return F.linear(mixed.flatten(2), layer.out, layer.out_bias)

    def _mlp(self, layer: Layer, x: Tensor) -> Tensor:
        gate, up = F.linear(
            rms_norm(x, layer.mlp_norm, self.cfg.rms_norm_eps), layer.gate_up, layer.gate_up_bias
        ).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, layer.down, layer.down_bias)
