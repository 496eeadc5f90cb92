"""What all keys of a head have in common, kept out of the code: a mean before RoPE, taken out of packed keys and given
back in attention.

A norm-and-direction code spends its bits on a large common part. Softmax ignores a vector taken from all keys, but RoPE
turns a constant mean mu into R_j mu at position j. So R_j mu is subtracted before coding. Prefill on a GPU, which
decodes a key for many queries, adds it to the decoded key again. Otherwise q . R_j mu is added to the logit of token j.
Keys are stored times a matrix (`kernels.step.HeadTransform`), so R_j mu is taken out times the same matrix.
With the halves q = (q1, q2) and mu = (m1, m2), pair by pair,

    q . R_j mu = A cos(j w) + B sin(j w),   A = q1 m1 + q2 m2,   B = q2 m1 - q1 m2,

summed over the frequencies w. For half a page, the middle of which is at the angle a, the coefficients are turned once,
A' = A cos a + B sin a, B' = B cos a - A sin a, and multiplied with one table of the 32 offsets. The angle tables are
the definition of R_j here (`angle_tables`): both sides use them, so what they differ from the model's own RoPE by only
stays in the coded part.
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
    if means.is_meta:  # the shape alone: PyTorch would import a compiler to find it
        return torch.empty(key_maps.shape, dtype=torch.float32, device=means.device)
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


def put_back(
    slab: Tensor, packed: Tensor, first: int, mean: KeyMean, seen: tuple[Tensor, int, int | None] | None = None
) -> None:
    """Add the mean to decoded pages of keys, by Triton.

    Args:
        slab: ``[B, Hkv, 64 * N, d]``, contiguous: the pages from number ``first`` on. What lies beyond the packed pages
            stays.
        packed: int32 [B], pages that the sequences have.
        seen: Positions of the first queries, sinks and window, if pages are counted from the first one that these see.
    """
    from octo_run.kernels.attention.general.key_mean_kernels import put_back_kernel

    batch, kv_heads, tokens, dim = slab.shape
    pages = tokens // PAGE_TOKENS
    starts, sink, window = seen or (packed, 0, None)
    with on_device_of(slab):
        put_back_kernel[(pages, kv_heads, batch)](
            SLAB=slab, MAPS=mean.maps, NUM_PACKED=packed, STARTS=starts, BASE=mean.tables.base,
            OFFSET=mean.tables.offset, first_page=first, pages=pages, sink=sink, WINDOW=window or 0,
            **launch_options(dim))  # fmt: skip
