"""Time prefill attention over the arena, coding of the pages included, against SDPA in plain PyTorch (one GPU).

One layer of an 8B shape (32 query and 8 KV heads of 128 coordinates, hidden 4096, MLP 14336), bf16. Every format is
first checked against float64. Then, as medians of CUDA events:

* a chunk with and without packed past, attention alone, against the fastest SDPA backend over the same keys in bf16;
* a prompt through a whole layer: its products, and its attention either by SDPA or by the arena of the engine in
  chunks (copies to the staging buffer, attention, coding of the pages).
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import triton
from bench_graphs import DEVICE, event
from bench_report import output_options, provenance, save, table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import linear, scaled_dot_product_attention

from octo_run.engine.arena import ArenaShape, KVArena
from octo_run.engine.benchmark import wait
from octo_run.kernels import (
    PAGE_TOKENS,
    AttentionInputs,
    AttentionSpec,
    attend,
    attend_reference,
    encode_pages,
    page_bytes,
)
from octo_run.kernels.attention.key_mean import AngleTables, KeyMean, coefficients, mean_maps
from octo_run.kernels.codec import KVFormat, LayerFormats, parse_kv
from octo_run.models.config import KVHeads

HEADS, KV_HEADS, DIM, HIDDEN, MLP = 32, 8, 128, 4096, 14336
SINK, PAGE, WINDOW = 64, PAGE_TOKENS, 64
SPEC = AttentionSpec(DIM**-0.5)
BOUND = 6e-3  # bf16 outputs are themselves rounded to 2e-3, what comes from packed pages twice
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


@dataclass
class Row:
    """One measurement.

    Attributes:
        ratio: The fastest SDPA's time divided by this one.
    """

    case: str
    kernel: str
    milliseconds: float
    ratio: float


def median_ms(step: Callable[[], object], repeats: int = 7) -> float:
    """Median milliseconds of a call."""
    step()
    step()
    times = []
    for _ in range(repeats):
        start, end = event(), event()
        start.record()
        step()
        end.record()
        times.append((start, end))
    wait(DEVICE)
    return statistics.median(a.elapsed_time(b) for a, b in times)


def inputs(fmt: KVFormat, past: int, chunk: int, heads: tuple[int, int], mean: bool,
           distinct: int = 16) -> tuple[torch.Tensor, AttentionInputs, torch.Tensor]:  # fmt: skip
    """What the attention of a chunk takes, at random.

    Returns:
        Queries [1, chunk, H, d], an arena with ``past`` packed tokens, sinks and a tail of ``chunk`` tokens, and what
        its pages were made of: K and V [2, pages, Hkv, 64, d].
    """
    device, pages = torch.device("cuda"), past // PAGE
    total, kv_heads = heads
    k, v = (torch.randn(1, distinct, kv_heads, PAGE, DIM, device=device, dtype=torch.bfloat16) for _ in range(2))
    few = torch.zeros(distinct, 1, kv_heads, page_bytes(fmt), dtype=torch.uint8, device=device)
    encode_pages(k, v, few, torch.arange(distinct, device=device), fmt)
    full = [torch.randn(1, kv_heads, n, DIM, device=device, dtype=torch.bfloat16) for n in (SINK, SINK, chunk, chunk)]
    q = torch.randn(1, chunk, total, DIM, device=device, dtype=torch.bfloat16)
    which = torch.randint(0, distinct, (pages,), device=device)
    start, zero = (torch.full((1,), n, dtype=torch.int32, device=device) for n in (SINK + pages * PAGE, 0))
    kv = AttentionInputs(
        pages=few[which, 0],
        page_table=torch.randperm(max(1, pages), device=device).int()[None],
        rows=zero,
        num_packed=zero + pages, starts=start, sink_k=full[0], sink_v=full[1], tail_k=full[2], tail_v=full[3],
        tail_origin=zero + pages * PAGE, sink=SINK,
    )  # fmt: skip
    if mean:
        inv_freq = 500000.0 ** (-torch.arange(0, DIM, 2, device=device) / DIM)
        maps = mean_maps(means(kv_heads).to(device), fmt.k.rotation.to(device).T)
        kv = replace(kv, mean=KeyMean(maps, AngleTables.build(inv_freq, SINK, pages)))
    return q, kv, torch.cat([k, v])[:, which]


def means(kv_heads: int) -> torch.Tensor:
    """Means of keys ``[kv_heads, DIM]``, the same at every call."""
    return torch.randn(kv_heads, DIM, generator=torch.Generator().manual_seed(11))


def check(kv_name: str, chunk: int) -> float:
    """Relative error of a chunk over 37 pages against float64 on the CPU, whose pages the reference encoder makes."""
    fmt = parse_kv(kv_name.removesuffix("+mean"), DIM)
    q, kv, sources = inputs(fmt, 37 * PAGE, chunk, (8, 2), kv_name.endswith("+mean"))
    out = torch.full_like(q, float("nan"))
    attend(q, kv, fmt, spec=SPEC, max_length=SINK + 37 * PAGE + chunk, out=out)
    moved = {name: x.cpu() for name, x in vars(kv).items() if isinstance(x, torch.Tensor)}
    moved |= {name: moved[name].double() for name in ("sink_k", "sink_v", "tail_k", "tail_v")}
    k, v = sources.cpu()[:, None]
    pages = torch.zeros(37, 1, 2, page_bytes(fmt), dtype=torch.uint8)
    encode_pages(k, v, pages, torch.arange(37), fmt)  # on a CPU pages are rows of vectors
    moved["pages"] = pages[:, 0]
    if kv.mean is not None:
        of_queries = coefficients(q.float().cpu() @ fmt.k.rotation.float(), means(2))
        moved["mean"] = KeyMean(kv.mean.maps.cpu(), kv.mean.tables.to("cpu"), of_queries)
    want = attend_reference(q.double().cpu(), replace(kv, **moved), fmt, spec=SPEC)
    error = float((out.double().cpu() - want).norm() / want.norm())
    return error if error == error else math.inf


def time_sdpa(past: int, chunk: int) -> dict[str, float]:
    """Milliseconds of SDPA, keys of all heads and ``past`` tokens in bf16."""
    q, k, v = (
        torch.randn(1, HEADS, n, DIM, device="cuda", dtype=torch.bfloat16) for n in (chunk, past + chunk, past + chunk)
    )
    bias = causal_lower_right(chunk, past + chunk) if past else None
    found = {}
    for name, backend in BACKENDS.items():
        if past and name == "cuDNN":  # it takes no mask that is aligned to the end
            continue
        with sdpa_kernel(backend):
            found[name] = median_ms(
                lambda: scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)
            )
    return found


def time_chunk(formats: list[str], chunk: int, past: int) -> list[Row]:
    """Attention of a chunk alone."""
    case = f"{chunk:,} tokens after {past:,}"
    peers = time_sdpa(past + SINK if past else 0, chunk)
    best = min(peers.values())
    rows = [Row(case, f"SDPA {name}", ms, best / ms) for name, ms in peers.items()]
    for name in formats if past else formats[:1]:
        fmt = parse_kv(name.removesuffix("+mean"), DIM)
        q, kv, _ = inputs(fmt, past, chunk, (HEADS, KV_HEADS), name.endswith("+mean"))
        out = torch.empty_like(q)
        length = SINK + past + chunk if past else chunk
        if not past:  # a prompt's beginning: the first tokens are the sinks
            kv = replace(kv, starts=torch.zeros_like(kv.starts))
        ms = median_ms(lambda: attend(q, kv, fmt, spec=SPEC, max_length=length, out=out))  # noqa: B023
        rows.append(Row(case, f"ours, {name if past else 'no pages'}", ms, best / ms))
    return rows


def time_layer(formats: list[str], tokens: int, chunk: int) -> list[Row]:
    """A prompt through the products and the attention of a layer."""
    shapes = ((HEADS + 2 * KV_HEADS) * DIM, HIDDEN), (HIDDEN, HEADS * DIM), (2 * MLP, HIDDEN), (HIDDEN, MLP)
    weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02 for shape in shapes]
    xs = [torch.randn(tokens, shape[1], device="cuda", dtype=torch.bfloat16) for shape in shapes]

    def products(size: int) -> None:
        for first in range(0, tokens, size):
            for x, weight in zip(xs, weights, strict=True):
                linear(x[first : first + size], weight)

    whole, parts = median_ms(lambda: products(tokens)), median_ms(lambda: products(chunk))
    peers = {name: ms + whole for name, ms in time_sdpa(0, tokens).items()}
    best, case = min(peers.values()), f"layer, prompt of {tokens:,}"
    rows = [Row(case, f"products alone, chunks of {n:,}", ms, best / ms) for n, ms in ((tokens, whole), (chunk, parts))]
    rows += [Row(case, f"products, SDPA {name}", ms, best / ms) for name, ms in peers.items()]
    for name in formats:
        if name.endswith("+mean"):
            continue
        fmt = parse_kv(name, DIM)
        formats = LayerFormats.uniform(fmt, 1)
        shape = ArenaShape(
            (KVHeads(KV_HEADS, DIM),), KV_HEADS * formats.vector_bytes, torch.bfloat16, tokens, SINK, WINDOW, chunk
        )
        arena = KVArena(shape, formats, torch.device("cuda"))
        q = torch.randn(1, chunk, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(1, chunk, KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(q)

        def prompt(arena: KVArena = arena, q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> None:
            sequence = arena.open()
            for _ in range(0, tokens, chunk):
                step = arena.prefill(sequence, [0] * chunk)
                step.attend(0, q, k, v, AttentionSpec(DIM**-0.5), None, out=out)  # noqa: B023
                step.commit()
            sequence.discard()

        ms = parts + median_ms(prompt)
        rows.append(Row(case, f"products, ours {name}, coded in chunks of {chunk:,}", ms, best / ms))
        pages = (tokens - SINK - WINDOW) // PAGE
        rows_k = torch.randn(1, pages, KV_HEADS, PAGE, DIM, device="cuda", dtype=torch.bfloat16)
        ids = torch.arange(pages, device="cuda", dtype=torch.int32)
        ms = median_ms(lambda: encode_pages(rows_k, rows_k, arena.layer_pages[0][:, None], ids, fmt))  # noqa: B023
        rows.append(Row(case, f"of this coding, {name}", ms, best / ms))
    return rows


def report(rows: list[Row], errors: dict[str, float], run: str) -> str:
    """The report: what ran where and when (``run``), what the rows are, the errors found before, and the rows."""
    cells = [(row.case, row.kernel, f"{row.milliseconds:.3f}", f"{row.ratio:.2f}") for row in rows]
    parts = [
        "# Prefill attention and coding, one layer of an 8B shape",
        f"{run}. {HEADS} query and {KV_HEADS} KV heads of {DIM} coordinates, hidden {HIDDEN}, MLP {MLP}, bf16; medians"
        f" of CUDA events. SDPA runs over bf16 keys of all heads, ours over packed pages, {SINK} sinks and the chunk"
        " itself. The ratio is to the fastest SDPA backend that takes the case (cuDNN takes no mask that is aligned to"
        " the end); in a layer to the sum of its products and that. `of this coding`: how long the coding of a prompt's"
        " pages takes, which the row above it includes.",
        "Checked first against float64 attention over the decoded pages (bf16 outputs, 37 pages, 100 and 300 or 4,500"
        f" queries), relative errors: {', '.join(f'{name} {error:.1e}' for name, error in errors.items())}.",
        table(["case", "kernel", "ms", "SDPA's time / this"], cells),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="oct3,oct3+mean,oct2,oct4,octopus3,bf16")
    parser.add_argument("--past", default="0,8192,32768,131072", help="packed tokens before the chunk")
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=8192, help="of the prompt through a layer")
    output_options(parser)
    args = parser.parse_args()
    formats = args.formats.split(",")
    errors: dict[str, float] = {}
    for name in formats:
        for chunk in (100, 4500 if name == formats[0] else 300):
            error = check(name, chunk)
            print(f"{name}, {chunk} queries: relative error {error:.1e}", flush=True)
            if not error < BOUND:
                print("wrong result: nothing is timed", file=sys.stderr)
                return 1
            errors[name] = max(errors.get(name, 0.0), error)
    run = provenance(sys.argv, torch.device("cuda"), [torch, triton])
    parts = [partial(time_layer, formats, args.tokens, args.chunk)]
    parts += [partial(time_chunk, formats, args.chunk, int(past)) for past in args.past.split(",")]
    rows: list[Row] = []
    for part in parts:
        rows += part()
        text = report(rows, errors, run)
        save(rows, text, args.json, args.markdown)
    print(f"\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
