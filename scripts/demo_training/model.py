"""The model in plain PyTorch, with the parameter names of a Llama checkpoint, and its optimizers."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octo_run.models import rope
from octo_run.models.config import ModelConfig


class Attention(nn.Module):
    """Causal attention with grouped key-value heads and RoPE."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, self.kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, self.kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``[B, n, hidden]`` to the same.

        Args:
            cos: ``[1, n, d / 2]``.
            sin: ``[1, n, d / 2]``.
        """
        q = self.q_proj(x).unflatten(-1, (self.heads, self.dim))
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, self.dim))
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.dim))
        q, k = rope.apply(q, cos, sin).to(v.dtype), rope.apply(k, cos, sin).to(v.dtype)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, n, hidden]`` to the same."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One layer, normed before each part."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = nn.RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = Mlp(cfg)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``[B, n, hidden]`` to the same."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Body(nn.Module):
    """Everything before the output matrix, which is the embedding."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        self.norm = nn.RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)


class LanguageModel(nn.Module):
    """A Llama-shaped model with tied embeddings; ``state_dict`` has the names of a checkpoint."""

    inv_freq: Tensor

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.model = Body(cfg)
        self.register_buffer("inv_freq", rope.inverse_frequencies(cfg, torch.device("cpu")), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * cfg.num_layers if last else 1))

    def logits(self, ids: Tensor) -> Tensor:
        """Float32 ``[B, n, vocab]`` of int64 ids ``[B, n]``."""
        cos, sin = rope.cos_sin(torch.arange(ids.shape[1], device=ids.device)[None], self.inv_freq, torch.float32)
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight).float()

    def forward(self, ids: Tensor) -> Tensor:
        """Losses in nats, float32 ``[B, n]``, of each token of ``[B, n + 1]`` but the first."""
        logits = self.logits(ids[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


class Optimizers:
    """Muon (Jordan 2024) for the matrices of the layers, AdamW for the embedding and the norms."""

    def __init__(self, model: LanguageModel, matrix_lr: float, other_lr: float) -> None:
        matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name]
        others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed_tokens" in name]
        muon = torch.optim.Muon(matrices, lr=matrix_lr, momentum=0.95, nesterov=True, weight_decay=0.03)
        self._all: list[torch.optim.Optimizer] = [
            muon,
            torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self._peaks = [matrix_lr, other_lr]

    def step(self, factor: float) -> None:
        """One update with both learning rates times ``factor``; gradients are forgotten."""
        for optimizer, peak in zip(self._all, self._peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def schedule(step: int, steps: int, warmup: int) -> float:
    """The factor of the learning rates at ``step`` (from 0): linear to 1 over ``warmup``, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
