"""Batches of sequences in an arena on the GPU, with what attention over them is in float64, for `gpu_check.py`.

Sequences own rows of the arena in no order. What must not be read is NaN or an invalid page.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octo_run.kernels import PAGE_TOKENS, AttentionInputs, AttentionSpec, attend, attention_workspace_bytes, page_bytes
from octo_run.kernels.attention.key_mean import AngleTables, KeyMean, coefficients, mean_maps
from octo_run.kernels.attention.workspace import counter_words
from octo_run.kernels.codec import KVFormat, PageFormat, parse_kv

SINK, WINDOW, PAGE = 64, 64, PAGE_TOKENS


@dataclass
class Case:
    """A batch of sequences in an arena, and the float64 result."""

    q: Tensor
    kv: AttentionInputs
    fmt: KVFormat
    want: Tensor
    max_length: int


def dense(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float) -> Tensor:
    """Causal attention in float64: q [C, H, d] at positions start + c, k and v [Hkv, n, d]."""
    count, heads, dim = q.shape
    grouped = q.double().view(count, k.shape[0], -1, dim)
    scores = torch.einsum("chgd,hnd->hgcn", grouped, k) * scale
    late = torch.arange(k.shape[1], device=q.device) > torch.arange(start, start + count, device=q.device)[:, None]
    weights = scores.masked_fill(late, float("-inf")).softmax(-1)
    return torch.einsum("hgcn,hnd->chgd", weights, v).reshape(count, heads, dim)


def arena_inputs(pages: Tensor, table: Tensor, index: list[Tensor], sinks: Tensor, tails: Tensor) -> AttentionInputs:
    """Inputs from `index` = (rows, packed pages, starts, tail origins) and stacked K and V of sinks and tails."""
    rows, packed, starts, origin = index
    return AttentionInputs(
        pages=pages, page_table=table, rows=rows, num_packed=packed, starts=starts, sink_k=sinks[0], sink_v=sinks[1],
        tail_k=tails[0], tail_v=tails[1], tail_origin=origin, sink=SINK,
    )  # fmt: skip


def make_case(
    kv: str, lengths: list[int], count: int, group: int, kv_heads: int, dim: int, dtype: torch.dtype, mean: float = 0.0,
    device: str = "cuda",
) -> Case:  # fmt: skip
    """Sequences of `lengths` tokens, the last `count` are queries. They own rows of the arena in no order.

    What must not be read is NaN or an invalid page.

    Args:
        lengths: Tokens of each sequence; 0 is filler.
        mean: Size of the means that packed keys get back.
    """
    fmt = parse_kv(kv, dim, plain_dtype=dtype)
    page_format = PageFormat.on(fmt, torch.device(device))
    owned = len(lengths) + 2
    rows = [row if n else -1 for row, n in zip(torch.randperm(owned).tolist(), lengths, strict=False)]
    starts = [max(0, n - count) for n in lengths]
    packed = [max(0, s - SINK - WINDOW) // PAGE for s in starts]
    capacity = WINDOW + PAGE + (count if count > 1 else 0)
    order = iter(torch.randperm(sum(packed)).tolist())
    pages = torch.full((sum(packed) + 1, 2, kv_heads, page_bytes(fmt)), 255, dtype=torch.uint8, device=device)
    table = torch.full((owned, max(packed) + 1), 2**30, dtype=torch.int32, device=device)
    full = (2, owned, kv_heads)
    sinks = torch.full((*full, SINK, dim), float("nan"), device=device).to(dtype)
    tails = torch.full((*full, capacity, dim), float("nan"), device=device).to(dtype)
    origin = [PAGE * p if count > 1 else 0 for p in packed]
    q = (3 * torch.randn(len(lengths), count, group * kv_heads, dim, device=device)).to(dtype)
    want = torch.empty(q.shape, dtype=torch.float64, device=device)
    tables = AngleTables.build(1e4 ** (-torch.arange(0, dim, 2, device=device) / dim), SINK, max(packed) + 1)
    means = mean * torch.randn(kv_heads, dim, device=device)
    rotation = fmt.k.rotation.to(device, torch.float32)
    maps = mean_maps(means, rotation.T)
    for b, (n, row) in enumerate(zip(lengths, rows, strict=True)):
        if row < 0:
            want[b] = 0
            continue
        gain = 0.2 + torch.rand(2, kv_heads, n, 1, device=device)
        vectors = (torch.randn(2, kv_heads, n, dim, device=device) * gain).to(dtype)
        values = vectors.double()
        top, done = min(n, SINK), SINK + PAGE * packed[b]
        sinks[:, row, :, :top] = vectors[:, :, :top]
        if packed[b]:
            ids = [next(order) for _ in range(packed[b])]
            table[row, : packed[b]] = torch.tensor(ids, dtype=torch.int32, device=device)
            made = page_format.encode_rotated(*vectors[:, :, SINK:done].reshape(2, kv_heads, -1, PAGE, dim))
            pages[ids, 1] = made.transpose(0, 1)
            values[:, :, SINK:done] = torch.stack(page_format.decode_rotated(made, torch.float64)).flatten(2, 3)
            values[0, :, SINK:done] += tables.of_pages(0, packed[b]).flatten(0, 1) @ maps
        if n > done:
            slots = (torch.arange(done, n, device=device) - SINK - origin[b]) % capacity
            tails[:, row, :, slots] = vectors[:, :, done:]
        want[b] = dense(q[b], values[0], values[1], starts[b], dim**-0.5)
    index = [torch.tensor(x, dtype=torch.int32, device=device) for x in (rows, packed, starts, origin)]
    inputs = arena_inputs(pages[:, 1], table, index, sinks, tails)
    if mean:
        of_queries = coefficients(q.float() @ rotation, means) if count == 1 else None
        inputs = replace(inputs, mean=KeyMean(maps, tables, of_queries))
    return Case(q, inputs, fmt, want, max(lengths))


def workspace_for(q: Tensor, kv: AttentionInputs) -> Tensor:
    """A workspace full of NaN, but for the counters at its start."""
    batch, count, heads, dim = q.shape
    size = attention_workspace_bytes(batch, heads, kv.pages.shape[1], dim, q.device, batch * count) // 4
    workspace = torch.full((size,), float("nan"), device=q.device)
    workspace[: counter_words(q.device)] = 0
    return workspace


def error_of(case: Case) -> float:
    """Largest relative error of a sequence (NaN if anything was left unwritten); of filler, what is not zero."""
    out = torch.full_like(case.q, float("nan"))
    spec = AttentionSpec(case.q.shape[-1] ** -0.5)
    workspace = workspace_for(case.q, case.kv)
    torch.cuda.synchronize()
    attend(case.q, case.kv, case.fmt, spec=spec, max_length=case.max_length, out=out, workspace=workspace)
    torch.cuda.synchronize()
    size = case.want.flatten(1).norm(dim=1)
    difference = (out.double() - case.want).flatten(1).norm(dim=1) / size.where(size > 0, 1.0)
    return float(difference.max())
