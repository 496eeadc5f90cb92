"""How decode attention is divided over the context, and the workspace that this takes. No Triton needed."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from octo_run.kernels.attention.page_size import PAGE_TOKENS

PROGRAMS_PER_PROCESSOR = 8
"""Partial results that the workspace has room for."""
TOKENS_PER_SPLIT = 64
"""A split shorter than this costs more in the merge than it saves."""
START_TOKENS = 128
"""Tokens that take as long as the beginning and the end of a program."""

SLAB_BYTES = 64 * 2**20
"""Of the workspace: packed keys and values that prefill has decoded at a time."""


INTERPRETED_PROCESSORS = 4
"""Multiprocessors where there are none: the interpreter's."""


def processors(device: torch.device) -> int:
    """Multiprocessors of a device (``INTERPRETED_PROCESSORS`` for other devices than a GPU)."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return _processors(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _partials(device: torch.device, batch: int, kv_heads: int) -> int:
    """Partial results of a KV head's queries that the workspace has room for."""
    return max(processors(device) * PROGRAMS_PER_PROCESSOR, 2 * batch * kv_heads)


def count_splits(device: torch.device, batch: int, kv_heads: int, max_length: int, at_once: int) -> int:
    """Parts of a context in one decode step, if all are equally long, of programs of which `at_once` share a
    multiprocessor: a function of shapes and the device alone (so that graphs can be captured)."""
    lanes = batch * kv_heads
    most = min(_partials(device, batch, kv_heads) // lanes, -(-max_length // TOKENS_PER_SPLIT))
    return _best_splits(lanes, max_length, processors(device) * at_once, max(1, most), 1.08 if batch > 1 else 1)


@functools.cache
def _best_splits(lanes: int, length: int, slots: int, most: int, tolerance: float) -> int:
    """The most parts whose time, by a model, is at most `tolerance` times the least: several sequences, which may be
    unequal, had better have more."""

    def cost(splits: int) -> float:
        return -(-lanes * splits // slots) * (length / splits + START_TOKENS)

    costs = {splits: cost(splits) for splits in range(1, most + 1)}
    bound = min(costs.values()) * tolerance
    return max(splits for splits, time in costs.items() if time <= bound)


def head_blocks(group: int, head_dim: int) -> tuple[int, int]:
    """(blocks of four heads in a program of the table-decode kernel, programs) that serve the query heads of a KV
    head."""
    blocks = 1 if group <= 4 or head_dim > 128 else 2  # registers allow no more
    return blocks, -(-group // (4 * blocks))


def counter_words(device: torch.device) -> int:
    """Words at the workspace's start that count finished programs: zero before the first use and after every call."""
    return processors(device) * PROGRAMS_PER_PROCESSOR


def _words(device: torch.device, batch: int, heads: int, kv_heads: int, head_dim: int, queries: int,
           length: int | None) -> tuple[int, int]:  # fmt: skip
    """32-bit words of a workspace: its first part, and the slab."""
    parts = _partials(device, batch, kv_heads)
    rows = max(parts * (heads // kv_heads), queries * heads if queries > 1 else 0)
    first = counter_words(device) + rows * (head_dim + 1)
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
    """Bytes of workspace on a device: counters, then float32 partial outputs and log-sum-exps of decode steps of up to
    `batch` sequences, or an output and a log-sum-exp for each of up to `queries` query tokens of prefill and each head;
    for prefill also the slab, for sequences of up to `length` tokens (None: of any length)."""
    return 4 * sum(_words(device, batch, heads, kv_heads, head_dim, queries, length))


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
        """Room for the outputs and log-sum-exps of `parts` parts of contexts, or of as many query tokens."""
        rows = parts * heads
        return self.rest[: rows * head_dim], self.rest[rows * head_dim : rows * (head_dim + 1)]
