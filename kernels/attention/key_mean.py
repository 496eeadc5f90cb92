"""What all keys of a head have in common, kept out of the code: a mean before RoPE, taken out of packed keys and given
back in attention.

A norm-and-direction code spends its bits on a large common part. Softmax ignores a vector taken from all keys, but RoPE
turns a constant mean mu into R_j mu at position j. So R_j mu is subtracted before coding. Prefill on a GPU, which
decodes a key for many queries, adds it to the decoded key again. Otherwise q . R_j mu is added to the logit of token j.
With the halves q = (q1, q2) and mu = (m1, m2), pair by pair,

    q . R_j mu = A cos(j w) + B sin(j w),   A = q1 m1 + q2 m2,   B = q2 m1 - q1 m2,

summed over the frequencies w. For half a page, the middle of which is at the angle a, the coefficients are turned once,
A' = A cos a + B sin a, B' = B cos a - A sin a, and multiplied with one table of the 32 offsets. The angle tables are
the definition of R_j here (`angle_tables`): both sides use them, so what they differ from the model's own RoPE by only
stays in the coded part. (Research note: key means, section 6 (a).)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octo_run.kernels.attention.angle_tables import AngleTables as AngleTables
from octo_run.kernels.attention.arguments import strides
from octo_run.kernels.devices import on_device_of
from octo_run.kernels.page_size import PAGE_TOKENS


@dataclass(frozen=True)
class KeyMean:
    """What attention gives back to keys and to logits, all float32.

    Attributes:
        means: ``[R, Hkv, d]``, to keys: before RoPE, one a row of the arena.
        rotation: ``[d, d]``, to keys: the codec's of K.
        of_queries: ``[B, C, H, d]``, to logits: A, then B, of every query of the batch; None will do for several
            queries on a GPU.
    """

    means: Tensor
    rotation: Tensor
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
        q: ``[B, C, H, d]``, after RoPE, not in the codec's rotated basis.
        mean: ``[B, Hkv, d]``.

    Returns:
        float32 ``[B, C, H, d]``.
    """
    batch, count, heads, dim = q.shape
    kv_heads = mean.shape[1]
    q1, q2 = q.to(torch.float32).view(batch, count, kv_heads, heads // kv_heads, dim).chunk(2, -1)
    m1, m2 = mean.to(torch.float32)[:, None, :, None].chunk(2, -1)
    return torch.cat((q1 * m1 + q2 * m2, q2 * m1 - q1 * m2), -1).view(batch, count, heads, dim)


def page_bias(coefficient: Tensor, tables: AngleTables, first: int, count: int) -> Tensor:
    """``q . R_j mu`` for the tokens of pages: ``[..., count * 64]`` of coefficients ``[..., d]`` (their dtype)."""
    angles = tables.of_pages(first, count).flatten(0, 1).to(coefficient.dtype)
    return coefficient @ angles.T


def mean_rows(mean: Tensor, angles: Tensor, rotation: Tensor) -> Tensor:
    """``R_j mu`` in the codec's rotated basis: float32 ``[..., n, d]`` of means ``[..., d]`` and angles ``[n, d]``.

    It goes through a d x d matrix, so that the positions cost one product.

    Args:
        rotation: ``[d, d]`` float32: the codec's, R x of row vectors x being ``x @ R.T``.
    """
    m1, m2 = mean.chunk(2, -1)
    r1, r2 = rotation.T.chunk(2, 0)
    by_cos = m1[..., None] * r1 + m2[..., None] * r2
    by_sin = m1[..., None] * r2 - m2[..., None] * r1
    return angles @ torch.cat((by_cos, by_sin), -2)


def estimate(rows: Tensor, angles: Tensor, rotation: Tensor) -> Tensor:
    """The mean before RoPE of keys.

    Args:
        rows: Keys ``[..., n, d]`` in the rotated basis.
        angles: ``[n, d]``.

    Returns:
        float32 ``[..., d]``.
    """
    k1, k2 = (rows.to(torch.float32) @ rotation).chunk(2, -1)
    cos, sin = angles.chunk(2, -1)
    return torch.cat((k1 * cos + k2 * sin, k2 * cos - k1 * sin), -1).mean(-2)


def take_out(k: Tensor, means: Tensor, first: Tensor, tables: AngleTables, rotation: Tensor, out: Tensor) -> Tensor:
    """Write pages of keys less their rotated mean to ``out``.

    Args:
        k: ``[L, N, Hkv, 64, d]`` in the codec's rotated basis, any strides but the last.
        means: float32 ``[L, Hkv, d]``.
        first: int32 [1] on the same device: the number of the first page in its sequence.
        rotation: float32 ``[d, d]``.
        out: Like k, contiguous.
    """
    layers, count, kv_heads, _, dim = k.shape
    if k.device.type == "cpu":
        begin = int(first)
        angles = tables.of_pages(begin, count).flatten(0, 1)
        rows = mean_rows(means, angles, rotation).view(layers, kv_heads, count, PAGE_TOKENS, dim).transpose(1, 2)
        return torch.sub(k, rows, out=out) if out.dtype == rows.dtype else out.copy_(k - rows)
    from octo_run.kernels.attention.general.key_mean_kernels import take_out_kernel

    with on_device_of(k):
        take_out_kernel[(count, kv_heads, layers)](
            K=k, OUT=out, MEANS=means, FIRST=first, BASE=tables.base, OFFSET=tables.offset, ROTATION=rotation,
            **strides("sk", k, l=0, n=1, h=2, t=3), **strides("so", out, l=0, n=1, h=2),
            **strides("sm", means, l=0, h=1), **launch_options(dim))  # fmt: skip
    return out


def launch_options(dim: int) -> dict[str, int]:
    """Of the kernels that add rotated means to pages of keys: hardly spilled registers (sm_90)."""
    return {"D": dim, "WIDTH": 1 << (dim - 1).bit_length(), "num_warps": 4 if dim <= 128 else 8, "num_stages": 2}


def put_back(slab: Tensor, rows: Tensor, packed: Tensor, first: int, mean: KeyMean) -> None:
    """Add the rotated mean to decoded pages of keys, by Triton.

    Args:
        slab: ``[B, Hkv, 64 * N, d]``, contiguous: the pages from number ``first`` on. What lies beyond the packed pages
            stays.
        rows: int32 [B], whose means are added, one for each sequence.
        packed: int32 [B], pages that the sequences have.
    """
    from octo_run.kernels.attention.general.key_mean_kernels import put_back_kernel

    batch, kv_heads, tokens, dim = slab.shape
    pages = tokens // PAGE_TOKENS
    with on_device_of(slab):
        put_back_kernel[(pages, kv_heads, batch)](
            SLAB=slab, MEANS=mean.means, ROWS=rows, NUM_PACKED=packed, BASE=mean.tables.base, OFFSET=mean.tables.offset,
            ROTATION=mean.rotation, first_page=first, pages=pages, **strides("sm", mean.means, r=0, h=1),
            **launch_options(dim))  # fmt: skip


def rotated_coefficients(q: Tensor, means: Tensor, rows: Tensor, rotation: Tensor, out: Tensor) -> Tensor:
    """`coefficients` of queries ``q [B, C, H, d]`` in the codec's rotated basis.

    Args:
        means: float32 ``[R, Hkv, d]``, of which query b takes ``rows[b]``.
        rows: int32 ``[B]`` (-1, filler: zeros).
        rotation: float32 ``[d, d]``.
        out: float32, contiguous: the result.
    """
    if q.device.type == "cpu":
        found = coefficients(q.to(torch.float32) @ rotation, means[rows.clamp(min=0).long()])
        return out.copy_(found.masked_fill_((rows < 0)[:, None, None, None], 0.0))
    launch_coefficients(q, means, rows, rotation, out)
    return out


def launch_coefficients(q: Tensor, means: Tensor, rows: Tensor, rotation: Tensor, out: Tensor) -> None:
    """`rotated_coefficients` by Triton."""
    import triton

    from octo_run.kernels.attention.general.key_mean_kernels import coefficients_kernel

    batch, count, heads, dim = q.shape
    lines = batch * count * heads
    with on_device_of(q):
        coefficients_kernel[(triton.cdiv(lines, 16),)](
            Q=q, OUT=out, MEANS=means, ROWS=rows, ROTATION=rotation, lines=lines, count=count,
            **strides("sq", q, b=0, c=1, h=2), **strides("sm", means, r=0, h=1), H=heads, G=heads // means.shape[1],
            D=dim, WIDTH=triton.next_power_of_2(dim), HALF=max(16, triton.next_power_of_2(dim // 2)), LINES=16,
            num_warps=4)  # fmt: skip
