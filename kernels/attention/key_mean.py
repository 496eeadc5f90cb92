"""What all keys of a head have in common, kept out of the code: a mean before RoPE, taken out of packed keys and given
back in attention.

A norm-and-direction code spends its bits on a large common part. Softmax ignores a vector taken from all keys, but RoPE
turns a constant mean mu into R_j mu at position j. So R_j mu is subtracted before coding. Prefill on a GPU, which
decodes a key for many queries, adds it to the decoded key again. Otherwise q . R_j mu is added to the logit of token j.
Keys are stored times a matrix (`kernels.step.HeadTransform`), so R_j mu is taken out times the same matrix.
With the halves q = (q1, q2) and mu = (m1, m2), pair by pair,

    q . R_j mu = A cos(j w) + B sin(j w),   A = q1 m1 + q2 m2,   B = q2 m1 - q1 m2,

summed over the frequencies w. For a page that begins at position j0 the coefficients are turned by j0 once, A' = A
cos(j0 w) + B sin(j0 w), B' = B cos(j0 w) - A sin(j0 w), and multiplied with one table of the 64 offsets. The angle
tables are the definition of R_j here: both sides use them, so what they differ from the model's own RoPE by only stays
in the coded part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from octo_run.kernels.attention.arguments import strides
from octo_run.kernels.attention.dispatch import head_blocks
from octo_run.kernels.devices import on_device_of
from octo_run.kernels.page_size import PAGE_TOKENS

HALF_OFFSETS = 48
"""Offsets 0.5, 1.5, ... that `AngleTables` holds: up to a page's last centre, 47.5."""


@dataclass(frozen=True)
class AngleTables:
    """Cosines, then sines, float32.

    Attributes:
        base: ``[pages, d]``, of the positions that pages begin at.
        offset: ``[64, d]``, of the offsets within a page.
        half: ``[HALF_OFFSETS, d]``, of the offsets 0.5, 1.5, ...
    """

    base: Tensor
    offset: Tensor
    half: Tensor

    @classmethod
    def build(cls, inv_freq: Tensor, sink: int, pages: int) -> AngleTables:
        """The tables for frequencies ``inv_freq [d / 2]`` (radians a position); page p begins at ``sink + 64 p``."""
        freq = inv_freq.to(torch.float64)

        def table(positions: Tensor) -> Tensor:
            angles = positions.to(torch.float64)[:, None] * freq
            return torch.cat((angles.cos(), angles.sin()), -1).to(torch.float32)

        steps = torch.arange(PAGE_TOKENS, device=freq.device)
        starts = sink + PAGE_TOKENS * torch.arange(max(1, pages), device=freq.device)
        return cls(table(starts), table(steps), table(steps[:HALF_OFFSETS] + 0.5))

    def to(self, device: torch.device | str) -> AngleTables:
        """The same tables on a device."""
        return AngleTables(self.base.to(device), self.offset.to(device), self.half.to(device))

    @cached_property
    def _made(self) -> dict[int, LaneTables]:
        return {}

    def for_lanes(self, centres: int) -> LaneTables:
        """The tables of the table-decode kernel for pages with 1 or 2 centres, made once."""
        if centres not in self._made:
            self._made[centres] = LaneTables.of(self, centres)
        return self._made[centres]

    def of_pages(self, first: int, count: int) -> Tensor:
        """Cosines, then sines, of all positions of ``count`` pages from page ``first`` on: float32 [count, 64, d]."""
        cos, sin = self.base[first : first + count, None].chunk(2, -1)
        o_cos, o_sin = self.offset.chunk(2, -1)
        return torch.cat((cos * o_cos - sin * o_sin, sin * o_cos + cos * o_sin), -1)


@dataclass(frozen=True)
class LaneTables:
    """What the table-decode kernel reads for a page whose tokens lie evenly around one centre or two.

    One centre is 31.5; two are 15.5 and 47.5. Frequencies are in four runs, one for each t of a lane 4 g + t, each
    filled up with zeros to whole steps of four.

    Attributes:
        angles: float32 [pages, 2, steps, centres, 4 (t), 4]: cosines, then sines of the centres' positions.
        offsets: int32 [tiles, 2, steps, 32, 4]: operand registers for the sixteen offsets 16 tile + 0.5, ... and four
            frequencies a lane; offsets g and g + 8 in turn, the first two frequencies, then the others; a register
            holds two in fp16, first cos - 1, then sin. (The 1 goes in float32.)
    """

    angles: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, tables: AngleTables, centres: int) -> LaneTables:
        """From the tables in float32, by way of float64 on the CPU."""
        pages, dim = tables.base.shape
        if tables.base.is_meta:
            steps, tiles = -(-dim // 32), PAGE_TOKENS // 32 // centres
            angles = tables.base.new_empty(pages, 2, steps, centres, 4, 4)
            return cls(angles, angles.new_empty(tiles, 2, steps, 32, 4, dtype=torch.int32))
        reach = PAGE_TOKENS // 2 // centres  # offsets on either side of a centre
        base, half = tables.base.cpu().to(torch.float64), tables.half.cpu()
        rows = [reach - 1 + 2 * reach * centre for centre in range(centres)]
        (cos, sin), (c_cos, c_sin) = base[:, None].chunk(2, -1), half[rows].to(torch.float64).chunk(2, -1)
        parts = torch.stack((cos * c_cos - sin * c_sin, sin * c_cos + cos * c_sin), 1)  # [pages, 2, centres, d / 2]
        angles = _in_runs(parts).permute(0, 1, 4, 2, 3, 5).to(torch.float32)
        near_cos, near_sin = half[:reach].chunk(2, -1)
        near = _in_runs(torch.stack((near_cos - 1, near_sin)).to(torch.float16))  # [2, reach, t, steps, 4]
        near = near.reshape(2, reach // 16, 2, 8, 4, -1, 2, 2)
        pairs = near.view(torch.int32)[..., 0]  # part, tile, half of 16, g, t, step, second two
        offsets = pairs.permute(1, 0, 5, 3, 4, 6, 2).reshape(reach // 16, 2, -1, 32, 4)
        device = tables.base.device
        return cls(angles.contiguous().to(device), offsets.contiguous().to(device))


def page_centres(group: int, head_dim: int) -> int:
    """Centres of a page for ``group`` query heads a KV head: a program with one block of heads has room for two."""
    return 2 // head_blocks(group, head_dim)[0]


def _in_runs(x: Tensor) -> Tensor:
    """Frequencies [..., d / 2] in four runs of whole steps: [..., 4, steps, 4]."""
    runs = x.reshape(*x.shape[:-1], 4, -1)
    return torch.nn.functional.pad(runs, (0, -runs.shape[-1] % 4)).reshape(*runs.shape[:-1], -1, 4)


@dataclass(frozen=True)
class KeyMean:
    """What attention gives back to keys and to logits, all float32.

    Attributes:
        maps: ``[Hkv, d, d]``, contiguous, to keys: see `mean_maps`.
        of_queries: ``[B, C, H, d]``, to logits: A, then B, of every query of the batch; None will do for several
            queries on a GPU.
    """

    maps: Tensor
    tables: AngleTables
    of_queries: Tensor | None = None

    @property
    def coefficients(self) -> Tensor:
        """``of_queries``.

        Raises:
            ValueError: There are none.
        """
        if self.of_queries is None:
            raise ValueError("the key mean needs the coefficients of the queries here")
        return self.of_queries


def coefficients(q: Tensor, mean: Tensor) -> Tensor:
    """A and B of queries and means.

    Args:
        q: ``[..., H, d]``, after RoPE, not in the basis that keys are stored in.
        mean: ``[Hkv, d]``, before RoPE.

    Returns:
        float32 ``[..., H, d]``.
    """
    q1, q2 = q.to(torch.float32).reshape(*q.shape[:-2], len(mean), -1, q.shape[-1]).chunk(2, -1)
    m1, m2 = mean.to(torch.float32)[:, None].chunk(2, -1)
    return torch.cat((q1 * m1 + q2 * m2, q2 * m1 - q1 * m2), -1).flatten(-3, -2)


def page_bias(coefficient: Tensor, tables: AngleTables, first: int, count: int) -> Tensor:
    """``q . R_j mu`` for the tokens of pages: ``[..., count * 64]`` of coefficients ``[..., d]`` (their dtype)."""
    angles = tables.of_pages(first, count).flatten(0, 1).to(coefficient.dtype)
    return coefficient @ angles.T


def mean_maps(means: Tensor, key_maps: Tensor) -> Tensor:
    """What turns angles into ``R_j mu`` as keys are stored, so that the positions cost one product.

    Args:
        means: ``[..., d]``, before RoPE.
        key_maps: ``[..., d, d]``: keys after RoPE times them are stored.

    Returns:
        float32 ``[..., d, d]``, contiguous: ``R_j mu`` as stored are the angles ``[n, d]`` of positions
        (``AngleTables.of_pages``) times it.
    """
    m1, m2 = means.to(torch.float32)[..., None].chunk(2, -2)
    first, second = key_maps.to(torch.float32).chunk(2, -2)
    return torch.cat((m1 * first + m2 * second, m1 * second - m2 * first), -2)


def take_out(k: Tensor, maps: Tensor, first: Tensor, tables: AngleTables, out: Tensor) -> Tensor:
    """Write pages of stored keys less the mean to ``out``.

    Args:
        k: ``[L, N, Hkv, 64, d]``, any strides but the last.
        maps: float32 ``[L, Hkv, d, d]``, contiguous: see `mean_maps`.
        first: int32 [1] on the same device: the number of the first page in its sequence.
        out: Like k, contiguous.
    """
    layers, count, kv_heads, _, dim = k.shape
    if k.device.type == "cpu":
        begin = int(first)
        angles = tables.of_pages(begin, count).flatten(0, 1)
        rows = (angles @ maps).view(layers, kv_heads, count, PAGE_TOKENS, dim).transpose(1, 2)
        return torch.sub(k, rows, out=out) if out.dtype == rows.dtype else out.copy_(k - rows)
    from octo_run.kernels.attention.general.key_mean_kernels import take_out_kernel

    with on_device_of(k):
        take_out_kernel[(count, kv_heads, layers)](
            K=k, OUT=out, MAPS=maps, FIRST=first, BASE=tables.base, OFFSET=tables.offset,
            **strides("sk", k, l=0, n=1, h=2, t=3), **strides("so", out, l=0, n=1, h=2),
            **launch_options(dim))  # fmt: skip
    return out


def launch_options(dim: int) -> dict[str, int]:
    """Of the kernels that add rotated means to pages of keys: hardly spilled registers (sm_90)."""
    return {"D": dim, "WIDTH": 1 << (dim - 1).bit_length(), "num_warps": 4 if dim <= 128 else 8, "num_stages": 2}


def put_back(slab: Tensor, packed: Tensor, first: int, mean: KeyMean) -> None:
    """Add the mean to decoded pages of keys, by Triton.

    Args:
        slab: ``[B, Hkv, 64 * N, d]``, contiguous: the pages from number ``first`` on. What lies beyond the packed pages
            stays.
        packed: int32 [B], pages that the sequences have.
    """
    from octo_run.kernels.attention.general.key_mean_kernels import put_back_kernel

    batch, kv_heads, tokens, dim = slab.shape
    pages = tokens // PAGE_TOKENS
    with on_device_of(slab):
        put_back_kernel[(pages, kv_heads, batch)](
            SLAB=slab, MAPS=mean.maps, NUM_PACKED=packed, BASE=mean.tables.base, OFFSET=mean.tables.offset,
            first_page=first, pages=pages, **launch_options(dim))  # fmt: skip
