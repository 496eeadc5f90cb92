"""The kernels that `bench_attention.py` compares with: bf16 and fp8 decode attention of PyTorch and FlashInfer.

A peer is a function that prepares its inputs and returns what one call of each of its rotating layers does. FlashInfer
is used where it is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from bench_graphs import DEVICE
from torch.nn.attention import SDPBackend, sdpa_kernel

PAGE = 64
Step = Callable[[], None]


def sdpa(backend: SDPBackend, lengths: list[int], kv_heads: int, group: int, dim: int, layers: int) -> Step | None:
    """PyTorch's scaled-dot-product attention over contiguous bf16 K and V; None for sequences of several lengths."""
    if len(set(lengths)) > 1:
        return None
    batch, tokens = len(lengths), lengths[0]
    q = torch.randn(batch, kv_heads * group, 1, dim, device=DEVICE, dtype=torch.bfloat16)
    kv = [torch.randn(2, batch, kv_heads, tokens, dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(layers)]

    def step() -> None:
        with sdpa_kernel(backend):
            for k, v in kv:
                F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return step


def flashinfer(
    element: torch.dtype, lengths: list[int], kv_heads: int, group: int, dim: int, layers: int
) -> Step | None:
    """FlashInfer's paged batch decode on tensor cores, pages of 64 tokens; None where it is not installed."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    counts = torch.tensor([-(-n // PAGE) for n in lengths], dtype=torch.int32)
    total = int(counts.sum())
    ends = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0).to(torch.int32)])
    last = torch.tensor([(n - 1) % PAGE + 1 for n in lengths], dtype=torch.int32)
    scratch = torch.empty(512 << 20, dtype=torch.uint8, device=DEVICE)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(scratch, "HND", use_tensor_cores=True)
    wrapper.plan(
        ends.to(DEVICE), torch.randperm(total, device=DEVICE).int(), last.to(DEVICE), kv_heads * group, kv_heads, dim,
        PAGE, q_data_type=torch.bfloat16, kv_data_type=element,
    )  # fmt: skip
    q = torch.randn(len(lengths), kv_heads * group, dim, device=DEVICE, dtype=torch.bfloat16)
    one = torch.randn(total, 2, kv_heads, PAGE, dim, device=DEVICE, dtype=torch.bfloat16).to(element)
    kv = [one] + [one.clone() for _ in range(layers - 1)]

    def step() -> None:
        for pages in kv:
            wrapper.run(q, pages)

    return step


def compile_flashinfer(group: int, dim: int) -> None:
    """Build FlashInfer's kernels for a group size and head dimension, if it is installed."""
    for element in (torch.bfloat16, torch.float8_e4m3fn):
        try:
            step = flashinfer(element, [256], 1, group, dim, 1)
            if step is not None:
                step()
                torch.cuda.synchronize()
        except (RuntimeError, ValueError):
            return  # a shape that it does not take: said where it is timed


#: Name, bytes of a stored coordinate, how to prepare it.
PEERS: list[tuple[str, int, Callable[[list[int], int, int, int, int], Step | None]]] = [
    ("cuDNN", 2, lambda *shape: sdpa(SDPBackend.CUDNN_ATTENTION, *shape)),
    ("Flash", 2, lambda *shape: sdpa(SDPBackend.FLASH_ATTENTION, *shape)),
    ("FlashInfer", 2, lambda *shape: flashinfer(torch.bfloat16, *shape)),
    ("FlashInfer fp8", 1, lambda *shape: flashinfer(torch.float8_e4m3fn, *shape)),
]
