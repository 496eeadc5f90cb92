"""Times the coding of pages: 65,536 tokens of 4 KV heads; d = 128 is the setting of the paper's encoder (4.6 ms there).

    python scripts/bench_encode.py [--formats oct2,...] [--dims 128,64] [--tokens N] [--heads N] [--json FILE]
        [--markdown FILE]

Keys alone: K and V take twice as long. Both searches of the trellis formats are measured, `encode_fields` (portable)
and `encode_fields_by_lanes` (NVIDIA). Before anything is timed all their fields are compared with each other, and a
part of them with the codec's on the CPU, bit for bit; a difference ends the run with exit code 1.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from bench_graphs import DEVICE
from bench_prefill import median_ms
from bench_report import output_options, provenance, save, table

from octo_run.kernels import PAGE_TOKENS, encode_pages, page_bytes
from octo_run.kernels.codec import TrellisCodec, parse_kv
from octo_run.kernels.encode.arguments import BlockPlaces
from octo_run.kernels.encode.trellis_launch import encode_fields, encode_fields_by_lanes, pack_blocks

PAGE = PAGE_TOKENS
COMPARED = 4  # pages that the CPU codes too
PAPER_MS = 4.6


@dataclass
class Row:
    """A measurement; milliseconds for all vectors, million vectors a second."""

    kv: str
    head_dim: int
    what: str
    milliseconds: float
    vectors_per_us: float


def differing(kv: str, y: torch.Tensor) -> int:
    """Fields of vectors [1, N, H, 64, d] on which the two searches, or a search and the codec, disagree."""
    codec = parse_kv(kv, y.shape[-1]).k
    assert isinstance(codec, TrellisCodec)
    portable, lanes = encode_fields(y, codec).int(), encode_fields_by_lanes(y, codec).int()
    want = codec.encode_fields(y[:, :COMPARED].cpu())
    return int((portable != lanes).sum()) + int((lanes[:, :COMPARED].cpu() != want).sum())


def measure(kv: str, y: torch.Tensor) -> list[Row]:
    """All steps of coding the vectors [1, N, H, 64, d] as keys."""
    fmt = parse_kv(kv, dim := y.shape[-1])
    count, heads = y.shape[1:3]
    ids = torch.arange(count, dtype=torch.int32, device=y.device)
    pages = torch.zeros(count, 1, heads, page_bytes(fmt), dtype=torch.uint8, device=y.device)
    steps: dict[str, Callable[[], object]] = {}
    if isinstance(codec := fmt.k, TrellisCodec):
        fields, places = encode_fields(y, codec), BlockPlaces(pages, ids, "k", at_byte=0)
        steps |= {"search": lambda: encode_fields(y, codec)}
        steps |= {"search by lanes": lambda: encode_fields_by_lanes(y, codec)}
        steps |= {"packing": lambda: pack_blocks(fields, codec, places)}
    rows = [Row(kv, dim, what, median_ms(step), 0.0) for what, step in steps.items()]
    both = median_ms(lambda: encode_pages(y, y, pages, ids, fmt))
    rows.append(Row(kv, dim, "all, as the engine does it", both / 2, 0.0))
    for row in rows:
        row.vectors_per_us = y[..., 0].numel() / row.milliseconds * 1e-3
    return rows


def report(rows: list[Row], vectors: int, run: str) -> str:
    """What ran where and when (``run``), and the rows."""
    cells = [(r.kv, str(r.head_dim), r.what, f"{r.milliseconds:.3f}", f"{r.vectors_per_us:,.0f}") for r in rows]
    parts = [
        "# Coding of pages",
        f"{run}. {vectors:,} keys in bf16, medians of CUDA events; the paper's encoder takes {PAPER_MS} ms for 262,144"
        " of 128 coordinates. `all`: half of what `encode_pages` takes for K and V; it searches by lanes. Both searches"
        " found the same fields, and those of the codec on the CPU.",
        table(["format", "head_dim", "step", "ms", "vectors a microsecond"], cells),
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="oct2,oct3,oct4,octopus3")
    parser.add_argument("--dims", default="128,64", help="numbers of a key")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--heads", type=int, default=4)
    output_options(parser)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    shape = (1, args.tokens // PAGE, args.heads, PAGE)
    keys = {int(dim): torch.randn(*shape, int(dim), device=DEVICE).bfloat16() for dim in args.dims.split(",")}
    cases = [(dim, kv) for dim in keys for kv in args.formats.split(",")]
    for dim, kv in cases:
        if isinstance(parse_kv(kv, dim).k, TrellisCodec) and (wrong := differing(kv, keys[dim])):
            print(f"{kv}, head_dim {dim}: {wrong:,} fields differ, nothing is timed", file=sys.stderr)
            return 1
    rows: list[Row] = []
    for dim, kv in cases:
        rows += measure(kv, keys[dim])
        text = report(rows, math.prod(shape), provenance(sys.argv, DEVICE, [torch, triton]))
        save(rows, text, args.json, args.markdown)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
