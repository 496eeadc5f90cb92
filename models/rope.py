"""Rotary position embedding: the frequencies of a configuration and their application (Su et al. 2021, RoFormer)."""

import math

import torch
from torch import Tensor

from octo_run.models.config import ModelConfig


def inverse_frequencies(cfg: ModelConfig, device: torch.device) -> Tensor:
    """Angular frequencies in radians per position, float32 ``[head_dim / 2]``, scaled as the configuration says."""
    # The power is taken in float32, as every published implementation does: the rounding is part of the model.
    exponents = torch.arange(0, cfg.head_dim, 2, dtype=torch.int64).to(torch.float32) / cfg.head_dim
    freq = 1.0 / (cfg.rope_theta**exponents)
    scaling = cfg.rope_scaling
    if scaling is None:
        return freq.to(device)
    if scaling.kind == "linear":
        return (freq / scaling.factor).to(device)
    # llama3: wavelengths beyond the original context are stretched by `factor`, short ones kept, those between blended.
    original = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / freq
    low, high = original / scaling.low_freq_factor, original / scaling.high_freq_factor
    share = (original / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - share) * freq / scaling.factor + share * freq
    freq = torch.where(wavelength > low, freq / scaling.factor, torch.where(wavelength < high, freq, blended))
    return freq.to(device)


def cos_sin(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[..., head_dim / 2]`` of int ``positions [...]``, computed in float32, given in ``dtype``."""
    angles = positions.to(torch.float32)[..., None] * inv_freq
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [B, C, heads, d]`` (channel i pairs with i + d / 2) by ``cos, sin [B, C, d / 2]``."""
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
