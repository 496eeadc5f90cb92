"""The workspace of attention on a GPU: counters, partial results of parts, keys and values that prefill has decoded.

No Triton needed. What a part is: `parts`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from octo_run.kernels.attention.parts import PARTS_PER_PROCESSOR, room_for_parts
from octo_run.kernels.devices import processors
from octo_run.kernels.page_size import PAGE_TOKENS

SLAB_BYTES = 64 * 2**20
"""Of the workspace: packed keys and values that prefill has decoded at a time."""


def counter_words(device: torch.device) -> int:
    """Words at the workspace's start that count finished parts: zero before the first use and after every call."""
    return processors(device) * PARTS_PER_PROCESSOR


def _places(batch: int) -> int:
    """Words for the parts of so many sequences, whole 16 bytes."""
    return -(-2 * batch // 4) * 4


@functools.cache
def _words(device: torch.device, batch: int, heads: int, kv_heads: int, head_dim: int, queries: int,
           length: int | None) -> tuple[int, int]:  # fmt: skip
    """32-bit words of a workspace: its counters and partial results, and the slab."""
    parts = room_for_parts(device, batch, kv_heads)
    rows = max(parts * (heads // kv_heads), queries * heads if queries > 1 else 0)
    first = counter_words(device) + rows * (head_dim + 1) + (_places(batch) if head_dim > 256 else 0)
    page = 2 * batch * kv_heads * PAGE_TOKENS * head_dim  # of each sequence and head, in float32
    slab = max(SLAB_BYTES // 4, page)
    if length is not None:
        slab = min(slab, page * max(1, length // PAGE_TOKENS))
    return -(-first // 64) * 64, slab if queries > 1 else 0


def workspace_bytes(
    device: torch.device,
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    queries: int = 1,
    length: int | None = None,
) -> int:
    """Bytes of workspace on a device.

    They are counters, then float32 partial outputs and log-sum-exps of decode steps, or an output and a log-sum-exp for
    each query token of prefill and each head; for heads of more than 256 numbers also two int32 a sequence; for prefill
    also the slab.

    Args:
        batch: Sequences that a decode step has at most.
        queries: Query tokens that a prefill has at most.
        length: Tokens that a prefill's sequences have at most (None: of any length).
    """
    return 4 * sum(_words(device, batch, heads, kv_heads, head_dim, queries, length))


@dataclass(frozen=True)
class Workspace:
    """A workspace cut up: counters int32, the rest float32; the slab is empty for decode steps."""

    counters: Tensor
    rest: Tensor
    slab: Tensor

    @classmethod
    def of(cls, whole: Tensor | None, batch: int, heads: int, kv_heads: int, head_dim: int, device: torch.device,
           queries: int = 1, length: int | None = None) -> Workspace:  # fmt: skip
        """Cut a workspace (None: a new one).

        Raises:
            ValueError: It is too small or of another kind.
        """
        first, slab = _words(device, batch, heads, kv_heads, head_dim, queries, length)
        size = first + slab
        if whole is None:
            whole = torch.zeros(size, dtype=torch.float32, device=device)
        if whole.dtype != torch.float32 or not whole.is_contiguous() or whole.numel() < size:
            raise ValueError(
                f"the workspace must be contiguous float32 with at least {size} elements, "
                f"not {whole.dtype} with {whole.numel()}"
            )
        flat, words = whole.view(-1), counter_words(device)
        return cls(flat[:words].view(torch.int32), flat[words:first], flat[first:size])

    def partials(self, parts: int, heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """Room for the outputs and log-sum-exps of `parts` parts, or of as many query tokens."""
        rows = parts * heads
        return self.rest[: rows * head_dim], self.rest[rows * head_dim : rows * (head_dim + 1)]

    def places(self, batch: int) -> Tensor:
        """Room for two int32 a sequence, behind all partial results, where heads have more than 256 numbers."""
        return self.rest[-_places(batch) :].view(torch.int32)
