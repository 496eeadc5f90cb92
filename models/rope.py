"""Rotary position embedding: the frequencies of a configuration and their application (Su et al. 2021, RoFormer)."""

import math

import torch
from torch import Tensor

from octo_run.kernels.step.reference import cos_sin as cos_sin
from octo_run.models.config import ModelConfig
from octo_run.models.rope_config import Rope, RopeScaling


def inverse_frequencies(cfg: ModelConfig, device: torch.device) -> Tensor:
    """Those of the layers that see the whole context: see :func:`frequencies`."""
    return frequencies(cfg.rope, cfg.head_dim, device, cfg.context_limit)


def frequencies(rope: Rope | None, head_dim: int, device: torch.device, context: int) -> Tensor:
    """Angular frequencies in radians per position, float32 ``[head_dim / 2]``, scaled as the configuration says.

    Pairs of coordinates that do not turn have the frequency 0.

    Args:
        rope: None: nothing turns.
        context: Tokens of the longest sequence; it decides which factors of ``longrope`` count.
    """
    if rope is None:
        return torch.zeros(head_dim // 2, device=device)
    rotary, scaling = rope.rotary(head_dim), rope.scaling
    # The power is taken in float32, as every published implementation does: the rounding is part of the model.
    exponents = torch.arange(0, rotary, 2, dtype=torch.int64).to(torch.float32) / rope.spacing(head_dim)
    powers = rope.theta**exponents
    freq = 1.0 / powers if scaling is None else _scaled(powers, scaling, rope.theta, context)
    return torch.cat((freq, freq.new_zeros(head_dim // 2 - len(freq)))).to(device)


def _scaled(powers: Tensor, scaling: RopeScaling, theta: float, context: int) -> Tensor:
    freq = 1.0 / powers
    if scaling.kind in ("linear", "proportional"):
        return freq / scaling.factor
    if scaling.kind == "yarn":
        return _yarn(powers, scaling, theta)
    if scaling.kind == "longrope":
        long = context > scaling.original_max_position_embeddings
        return 1.0 / (torch.tensor(scaling.long_factors if long else scaling.short_factors) * powers)
    # llama3: wavelengths beyond the original context are stretched by `factor`, short ones kept, those between blended.
    original = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / freq
    low, high = original / scaling.low_freq_factor, original / scaling.high_freq_factor
    share = (original / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - share) * freq / scaling.factor + share * freq
    return torch.where(wavelength > low, freq / scaling.factor, torch.where(wavelength < high, freq, blended))


def _yarn(powers: Tensor, scaling: RopeScaling, theta: float) -> Tensor:
    """Frequencies of many turns within the original context stay, those of few are divided by ``factor``."""
    dim, original = 2 * len(powers), scaling.original_max_position_embeddings

    def place(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta)) if theta > 1 else 0.0

    low, high = place(scaling.beta_fast), place(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0.0
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept


def attention_factor(rope: Rope | None) -> float:
    """What cosines and sines are multiplied by, where coordinates turn."""
    return 1.0 if rope is None or rope.scaling is None else rope.scaling.attention_factor


def query_factors(rope: Rope | None, positions: Tensor) -> Tensor | None:
    """What queries at ``positions`` are multiplied by, float32 of their shape; None: nothing."""
    if rope is None or rope.query_scaling is None:
        return None
    beta, original = rope.query_scaling
    return 1 + beta * torch.log(1 + torch.floor(positions / original))


def apply(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [B, C, heads, d]`` (channel i pairs with i + d / 2) by ``cos, sin [B, C, d / 2]``."""
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def halves_first(head_dim: int, rotary: int, interleaved: bool) -> Tensor | None:
    """The order of a head's coordinates in which channel i pairs with i + d / 2, the kernels' way.

    A product of a query and a key does not change when both are reordered, so that one kind of RoPE is enough: rows of
    the projections (and weights of norms) are put in this order when they are loaded.

    Args:
        rotary: The first coordinates that turn.
        interleaved: Coordinates 2 i and 2 i + 1 are a pair, not i and i + rotary / 2.

    Returns:
        int64 ``[head_dim]``; None: it is the order as it stands.
    """
    turning = torch.arange(rotary).view(-1, 2).T if interleaved else torch.arange(rotary).view(2, -1)
    still = torch.arange(rotary, head_dim).view(2, -1)
    order = torch.cat((turning, still), 1).flatten()
    return None if torch.equal(order, torch.arange(head_dim)) else order
