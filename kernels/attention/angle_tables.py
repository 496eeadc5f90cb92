"""The angles by which the key mean is turned: R_j at the positions j of packed pages, as tables.

A page has two halves of 32 tokens. At offset x from the middle of a half, whose own angle is a,

    cos(a + w x) = cos a C(x) - sin a S(x),   sin(a + w x) = sin a C(x) + cos a S(x).

No frequency w exceeds one radian a position, so 32 offsets see little of it: the cosines C of all frequencies are
combinations of eight even functions of x, the sines S of seven odd ones. For the slow frequencies, which are most of
them, the first three functions will do: 1, x, x^2. The tables hold these combinations, not the exact C and S: they are
the definition of R_j wherever a mean is taken out or given back. What R_j differs from the model's own RoPE by (less
than `RESIDUAL` of a pair's energy) stays in the coded part. Frequencies that the functions do not fit (above one
radian, or slow ones in front) leave more there, but never more than the mean itself: the fit is a projection.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from octo_run.kernels.page_size import PAGE_TOKENS

HALF_TOKENS = PAGE_TOKENS // 2
FUNCTIONS = 15
"""Functions of the offset; an even number, an even function."""
SLOW_FUNCTIONS, MIDDLE_FUNCTIONS = 3, 7
"""Of them, those of the slow frequencies, and of the middle ones; the fastest have all."""
STEP = 8
"""Frequencies of a step of a matrix product."""
RESIDUAL = 3e-3
"""The largest part of the energy of a pair of channels that the functions may miss."""


@dataclass(frozen=True)
class AngleTables:
    """Cosines, then sines, float32, and what they are made of.

    Attributes:
        base: ``[pages, 2, d]``, of the middles of pages' halves, rounded to fp16.
        offset: ``[32, d]``, C and S of the offsets -15.5, -14.5, ...: ``functions @ weights`` of even functions, of
            odd ones.
        functions: ``[32, FUNCTIONS]``, rounded to fp16.
        weights: ``[FUNCTIONS, d / 2]``, of the frequencies.
        fast: Steps of frequencies that have more than the slow frequencies' functions.
    """

    base: Tensor
    offset: Tensor
    functions: Tensor
    weights: Tensor
    fast: int

    @classmethod
    def build(cls, inv_freq: Tensor, sink: int, pages: int) -> AngleTables:
        """The tables for frequencies ``inv_freq [d / 2]`` (radians a position); page p begins at ``sink + 64 p``."""
        device, pages = inv_freq.device, max(1, pages)
        if inv_freq.is_meta:  # sizes alone are wanted
            half = len(inv_freq)
            base, offset = inv_freq.new_empty(pages, 2, 2 * half), inv_freq.new_empty(HALF_TOKENS, 2 * half)
            functions, weights = inv_freq.new_empty(HALF_TOKENS, FUNCTIONS), inv_freq.new_empty(FUNCTIONS, half)
            return cls(base.float(), offset.float(), functions.float(), weights.float(), half // STEP)
        freq = inv_freq.to("cpu", torch.float64)
        middles = sink + HALF_TOKENS * torch.arange(2 * pages, dtype=torch.float64) + (HALF_TOKENS - 1) / 2
        angles = (middles[:, None] * freq).view(pages, 2, -1)
        base = torch.cat((angles.cos(), angles.sin()), -1).to(torch.float16).to(torch.float32)
        functions, weights, fast = _fit(freq)
        exact = functions.to(torch.float64), weights.to(torch.float64)
        offset = torch.cat([exact[0][:, odd::2] @ exact[1][odd::2] for odd in (0, 1)], -1).to(torch.float32)
        return cls(base, offset, functions, weights, fast).to(device)

    def to(self, device: torch.device | str) -> AngleTables:
        """The same tables on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("base", "offset", "functions", "weights")}
        return replace(self, **moved)

    @cached_property
    def lanes(self) -> LaneTables:
        """The tables of the table-decode kernel, made once."""
        return LaneTables.of(self)

    def of_pages(self, first: int, count: int) -> Tensor:
        """Cosines, then sines, of all positions of ``count`` pages from page ``first`` on: float32 [count, 64, d]."""
        cos, sin = self.base[first : first + count, :, None].chunk(2, -1)
        o_cos, o_sin = self.offset.chunk(2, -1)
        return torch.cat((cos * o_cos - sin * o_sin, sin * o_cos + cos * o_sin), -1).flatten(1, 2)


@dataclass(frozen=True)
class LaneTables:
    """What the table-decode kernel reads (`hopper.mean_bias`): `AngleTables` in the order of matrix operands.

    Sixteen slots of the products over functions: 0 and 1 are function 0 and what rounding leaves of its sum, slot s is
    function s - 1 else. Registers of two fp16 numbers are int32.

    Attributes:
        angles: int32 ``[pages, 2, steps of two, 4 (t), 4]``: cosine and sine of the frequencies t and 4 + t of a step,
            then of the next step.
        weights: float32 ``[steps, 4, 2, 4 (t), 4]``: of four slots a tile, two a row of eight lanes; the two slots for
            frequency t, then for 4 + t.
        functions: int32 ``[2, 32, 4]``: the operand of sixteen offsets a tile, and all slots.
        fast: See `AngleTables`.
    """

    angles: Tensor
    weights: Tensor
    functions: Tensor
    fast: int

    @classmethod
    def of(cls, tables: AngleTables) -> LaneTables:
        """From the tables, on their device."""
        pages, _, dim = tables.base.shape
        steps = dim // (2 * STEP)
        pairs = torch.stack(tables.base.to(torch.float16).chunk(2, -1), -1)  # [pages, 2, d / 2, 2]
        pairs = torch.nn.functional.pad(pairs, (0, 0, 0, steps % 2 * STEP))
        angles = pairs.view(pages, 2, -1, 2, 2, 4, 2).permute(0, 1, 2, 5, 3, 4, 6).contiguous().view(torch.int32)
        slots = [0, *range(FUNCTIONS)]
        weights = tables.weights[slots].view(4, 2, 2, steps, 2, 4)  # tile, row, slot; step, half of it, t
        weights = weights.permute(3, 0, 1, 5, 4, 2).contiguous().view(steps, 4, 2, 4, 4)
        # Column 8 s + 2 t + e of the operand is slot e of row t / 2 of the tile 2 (t % 2) + s.
        columns = [[[4 * (2 * (t % 2) + s) + 2 * (t // 2) + e for e in (0, 1)] for t in range(4)] for s in (0, 1)]
        functions = tables.functions[:, slots].to(torch.float16)[:, torch.tensor(columns, device=tables.base.device)]
        functions = functions.view(2, 2, 8, 2, 4, 2)  # tile, half of its offsets, g; s, t, e
        functions = functions.permute(0, 2, 4, 3, 1, 5).contiguous().view(torch.int32)
        return cls(angles.view(pages, 2, -1, 4, 4), weights, functions.view(2, 32, 4), tables.fast)


def fastest_steps(fast: int) -> int:
    """Of ``fast`` steps of frequencies, the first ones, that have all functions."""
    return (fast + 1) // 2


def _fit(freq: Tensor) -> tuple[Tensor, Tensor, int]:
    """Functions, weights (float32) and fast steps for frequencies (float64): as few steps as `RESIDUAL` allows."""
    offsets = torch.arange(HALF_TOKENS, dtype=torch.float64) - (HALF_TOKENS - 1) / 2
    angles = freq[:, None] * offsets
    steps = len(freq) // STEP
    for fast in range(1, steps + 1):
        functions, weights = _fit_with(fast, offsets, angles)
        missed = torch.zeros_like(freq)
        for odd, exact in ((0, angles.cos()), (1, angles.sin())):
            fitted = weights[odd::2].T.to(torch.float64) @ functions[:, odd::2].T.to(torch.float64)
            missed += (fitted - exact).square().mean(-1)
        if float(missed.max()) <= RESIDUAL:
            break
    return functions, weights, fast


def _fit_with(fast: int, offsets: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Functions and weights with ``fast`` fast steps.

    The first three functions are polynomials, the next four what is common to the middle frequencies beside them, the
    others what is common to the fastest. Functions are at most 1.
    """
    fastest, fast = STEP * fastest_steps(fast), STEP * fast
    middle = slice(fastest, fast) if fast > fastest else slice(fast)
    x = offsets / (HALF_TOKENS / 2)
    functions = torch.empty(len(x), FUNCTIONS, dtype=torch.float64)
    weights = torch.zeros(FUNCTIONS, len(angles), dtype=torch.float64)
    for odd, values in ((0, angles.cos()), (1, angles.sin())):
        found = x[:, None] if odd else torch.stack((torch.ones_like(x), x.square() - x.square().mean()), -1)
        counts = [len(range(odd, end, 2)) for end in (SLOW_FUNCTIONS, MIDDLE_FUNCTIONS, FUNCTIONS)]
        for some, end in ((middle, counts[1]), (slice(fastest), counts[2])):
            known = torch.linalg.qr(found)[0]
            left = values[some] - values[some] @ known @ known.T
            common = torch.linalg.svd(left)[2][: end - found.shape[1]].T
            found = torch.cat((found, common), -1)
        found = (found / found.abs().amax(0)).to(torch.float16).to(torch.float64)
        functions[:, odd::2] = found
        for begin, stop, count in ((0, fastest, counts[2]), (fastest, fast, counts[1]), (fast, None, counts[0])):
            weights[odd : 2 * count : 2, begin:stop] = torch.linalg.pinv(found[:, :count]) @ values[begin:stop].T
    return functions.to(torch.float32), weights.to(torch.float32)
