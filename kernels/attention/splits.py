"""How decode attention is divided over the context, and the workspace that this takes. No Triton needed."""

from __future__ import annotations

import torch

MAX_SPLITS = 512
PROGRAMS_PER_PROCESSOR = 8
TOKENS_PER_SPLIT = 64
"""A split shorter than this costs more in the merge than it saves."""


def processors() -> int:
    """Multiprocessors of the current CUDA device (a fixed number where there is none: the interpreter)."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    return 4


def count_splits(batch: int, kv_heads: int, max_length: int) -> int:
    """Programs along the context for one decode step, a function of shapes alone (so that graphs can be captured)."""
    wanted = processors() * PROGRAMS_PER_PROCESSOR // (batch * kv_heads)
    useful = -(-max_length // TOKENS_PER_SPLIT)
    return max(1, min(wanted, useful, MAX_SPLITS))


def workspace_bytes(batch: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """Bytes of float32 workspace: partial outputs and log-sum-exps of every split, for up to `batch` sequences."""
    parts = max(processors() * PROGRAMS_PER_PROCESSOR, 2 * batch * kv_heads)  # splits * batch * kv_heads stays within
    return 4 * parts * (heads // kv_heads) * (head_dim + 1)
