"""How decode attention is divided over the context, and the workspace that this takes. No Triton needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octo_run.kernels.attention.page_size import PAGE_TOKENS

MAX_SPLITS = 512
PROGRAMS_PER_PROCESSOR = 8
TOKENS_PER_SPLIT = 64
"""A split shorter than this costs more in the merge than it saves."""


SLAB_BYTES = 64 * 2**20
"""Of the workspace: packed keys and values that prefill has decoded at a time."""


def processors() -> int:
    """Multiprocessors of the current CUDA device (a fixed number where there is none: the interpreter)."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    return 4


def most_splits(batch: int, kv_heads: int) -> int:
    """Programs along the context for one sequence and KV head that the workspace has room for."""
    return max(1, processors() * PROGRAMS_PER_PROCESSOR // (batch * kv_heads))


def count_splits(batch: int, kv_heads: int, max_length: int) -> int:
    """Programs along the context for one decode step, a function of shapes alone (so that graphs can be captured)."""
    useful = -(-max_length // TOKENS_PER_SPLIT)
    return max(1, min(most_splits(batch, kv_heads), useful, MAX_SPLITS))


def counter_words() -> int:
    """Words at the workspace's start that count finished programs: zero before the first use and after every call."""
    return processors() * PROGRAMS_PER_PROCESSOR


def _words(batch: int, heads: int, kv_heads: int, head_dim: int, queries: int, length: int | None) -> tuple[int, int]:
    """32-bit words of a workspace: its first part, and the slab."""
    parts = max(processors() * PROGRAMS_PER_PROCESSOR, 2 * batch * kv_heads)  # splits * batch * kv_heads stays within
    first = counter_words() + max(parts * (heads // kv_heads) * (head_dim + 1), queries * heads)
    page = 2 * batch * kv_heads * PAGE_TOKENS * head_dim  # of each sequence and head, in float32
    slab = max(SLAB_BYTES // 4, page)
    if length is not None:
        slab = min(slab, page * max(1, length // PAGE_TOKENS))
    return -(-first // 64) * 64, slab if queries > 1 else 0


def workspace_bytes(
    batch: int, heads: int, kv_heads: int, head_dim: int, queries: int = 1, length: int | None = None
) -> int:
    """Bytes of workspace: counters, then float32 partial outputs and log-sum-exps of decode steps of up to `batch`
    sequences, or one log-sum-exp for each of up to `queries` query tokens of prefill and each head; for prefill also
    the slab, for sequences of up to `length` tokens (None: of any length)."""
    return 4 * sum(_words(batch, heads, kv_heads, head_dim, queries, length))


@dataclass(frozen=True)
class Workspace:
    """A workspace cut into its parts: counters int32, the rest float32; the slab is empty for decode steps."""

    counters: Tensor
    rest: Tensor
    slab: Tensor

    @classmethod
    def of(cls, whole: Tensor | None, batch: int, heads: int, kv_heads: int, head_dim: int, device: torch.device,
           queries: int = 1, length: int | None = None) -> Workspace:  # fmt: skip
        """Cut a workspace (None: a new one). Raises ValueError for one that is too small or of another kind."""
        first, slab = _words(batch, heads, kv_heads, head_dim, queries, length)
        size = first + slab
        if whole is None:
            whole = torch.zeros(size, dtype=torch.float32, device=device)
        if whole.dtype != torch.float32 or not whole.is_contiguous() or whole.numel() < size:
            raise ValueError(
                f"the workspace must be contiguous float32 with at least {size} elements, "
                f"not {whole.dtype} with {whole.numel()}"
            )
        flat, words = whole.view(-1), counter_words()
        return cls(flat[:words].view(torch.int32), flat[words:first], flat[first:size])

    def partials(self, splits: int, batch: int, heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """Room for the splits' outputs and log-sum-exps."""
        rows = batch * heads * splits
        return self.rest[: rows * head_dim], self.rest[rows * head_dim : rows * (head_dim + 1)]
