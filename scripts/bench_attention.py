"""Times one decode step's attention, packed pages and full-precision parts and merge, against the best bf16 kernels.

    python scripts/bench_attention.py [--formats oct2,oct3,...] [--shapes 1x8192,...] [--heads 8x4,...] [--json FILE]

Refuses to time a wrong kernel: every format and group size is first compared with float64 attention over the decoded
pages. Everything runs in one process, by CUDA-graph replay over rotating layers larger than the L2 cache; medians.
Peers are PyTorch's cuDNN and Flash scaled-dot-product attention over contiguous bf16 K and V (which pay for no page
table). Prints the machine's copy bandwidth first, then a markdown table: microseconds, the share of that bandwidth that
the stored bytes reach, and the ratio to the faster peer.
"""

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from octo_run.kernels import AttentionInputs, attend, attention_workspace_bytes, encode_pages, page_bytes
from octo_run.kernels.codec import KVFormat, parse_kv

SINK, RING, PAGE, DIM = 64, 128, 64, 128
ROTATE_BYTES = 200_000_000  # four times the L2 cache
BOUND = 4e-3  # bf16 outputs are themselves rounded to 2e-3
DEVICE = torch.device("cuda")


@dataclass
class Row:
    """One measurement: microseconds of a step, and GB/s of the bytes that its format stores."""

    shape: str
    kv_heads: int
    group: int
    kernel: str
    microseconds: float
    gb_per_s: float
    share_of_copy: float
    ratio_to_bf16: float


def median_us(step: Callable[[], object], calls: int, repeats: int = 50) -> float:
    """Median microseconds of one of the ``calls`` calls that ``step`` makes, replayed as a CUDA graph."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in times) * 1e3 / calls


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of an elementwise pass over 2 GiB."""
    source = torch.empty(1 << 29, dtype=torch.int32, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / (median_us(lambda: torch.add(source, 1, out=target), 1, 20) * 1e-6)


def inputs(fmt: KVFormat, batch: int, tokens: int, kv_heads: int, layers: int) -> list[AttentionInputs]:
    """``layers`` arenas whose packed pages together hold ``tokens`` tokens a sequence, coded from Gaussian vectors."""
    count = tokens // PAGE
    k, v = (torch.randn(1, 16, kv_heads, PAGE, DIM, device=DEVICE) for _ in range(2))
    few = torch.zeros(16, 1, kv_heads, page_bytes(fmt), dtype=torch.uint8, device=DEVICE)
    encode_pages(k, v, few, torch.arange(16, device=DEVICE), fmt)
    result = []
    for _ in range(layers):
        pages = few[torch.randint(0, 16, (batch * count,), device=DEVICE), 0]
        full = [
            torch.randn(batch, kv_heads, size, DIM, device=DEVICE, dtype=torch.bfloat16) for size in (SINK, RING) * 2
        ]
        length = torch.full((batch,), SINK + tokens + 100, dtype=torch.int32, device=DEVICE)
        result.append(
            AttentionInputs(
                pages=pages,
                page_table=torch.randperm(batch * count, device=DEVICE).int().view(batch, count),
                num_packed=torch.full_like(length, count),
                starts=length - 1,
                sink_k=full[0],
                sink_v=full[2],
                tail_k=full[1],
                tail_v=full[3],
                tail_origin=torch.zeros_like(length),
                sink=SINK,
            )
        )
    return result


def check(kv: str, group: int) -> float:
    """Relative error of a decode step against float64 attention over the decoded pages (2 sequences, 2 KV heads)."""
    fmt, heads = parse_kv(kv, DIM), 2
    k, v = (torch.randn(1, 37, heads, PAGE, DIM, device=DEVICE) for _ in range(2))
    pages = torch.zeros(37, 1, heads, page_bytes(fmt), dtype=torch.uint8, device=DEVICE)
    encode_pages(k, v, pages, torch.arange(37, device=DEVICE), fmt)
    kv_in = inputs(fmt, 2, 37 * PAGE, heads, 1)[0]
    kv_in = AttentionInputs(**(vars(kv_in) | {"pages": pages[:, 0], "page_table": kv_in.page_table % 37}))
    q = torch.randn(2, 1, heads * group, DIM, device=DEVICE, dtype=torch.bfloat16)
    out = torch.full_like(q, float("nan"))
    attend(q, kv_in, fmt, scale=DIM**-0.5, max_length=SINK + 37 * PAGE + 100, out=out)
    exact = [c.decode_rotated(c.encode_rotated(x[0].cpu()), torch.float64) for c, x in ((fmt.k, k), (fmt.v, v))]
    worst = 0.0
    for b in range(2):
        ids = kv_in.page_table[b].long().cpu()
        sides = []
        for rows, sink, tail in ((exact[0], kv_in.sink_k, kv_in.tail_k), (exact[1], kv_in.sink_v, kv_in.tail_v)):
            packed = rows[ids].transpose(0, 1).reshape(heads, -1, DIM)
            slots = (torch.arange(100) + 37 * PAGE) % RING
            sides.append(torch.cat([sink[b].cpu().double(), packed, tail[b].cpu().double()[:, slots]], 1))
        scores = torch.einsum("hgd,hnd->hgn", q[b, 0].cpu().double().view(heads, group, DIM), sides[0]) * DIM**-0.5
        want = torch.einsum("hgn,hnd->hgd", scores.softmax(-1), sides[1]).reshape(-1, DIM)
        error = float((out[b, 0].cpu().double() - want).norm() / want.norm())
        worst = max(worst, error) if error == error else float("inf")
    return worst


def time_peers(batch: int, tokens: int, kv_heads: int, group: int) -> dict[str, float]:
    """Microseconds of PyTorch's bf16 kernels on contiguous K and V of the same number of tokens."""
    stored = 4 * batch * tokens * kv_heads * DIM
    layers = ROTATE_BYTES // stored + 1
    q = torch.randn(batch, kv_heads * group, 1, DIM, device=DEVICE, dtype=torch.bfloat16)
    kv = [torch.randn(2, batch, kv_heads, tokens, DIM, device=DEVICE, dtype=torch.bfloat16) for _ in range(layers)]

    def step() -> None:
        for k, v in kv:
            F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    times = {}
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("Flash", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            times[name] = median_us(step, layers)
    return times


def time_ours(kv: str, batch: int, tokens: int, kv_heads: int, group: int) -> tuple[float, int]:
    """Microseconds of our step in a format, and its packed bytes."""
    fmt = parse_kv(kv, DIM)
    stored = batch * tokens * kv_heads * (fmt.k.bytes_per_vector + fmt.v.bytes_per_vector)
    arenas = inputs(fmt, batch, tokens, kv_heads, ROTATE_BYTES // stored + 1)
    q = torch.randn(batch, 1, kv_heads * group, DIM, device=DEVICE, dtype=torch.bfloat16)
    out = torch.empty_like(q)
    size = attention_workspace_bytes(batch, kv_heads * group, kv_heads, DIM, DEVICE)
    workspace = torch.empty(size // 4, dtype=torch.float32, device=DEVICE)

    def step() -> None:
        for arena in arenas:
            attend(q, arena, fmt, scale=DIM**-0.5, max_length=SINK + tokens + 100, out=out, workspace=workspace)

    return median_us(step, len(arenas)), stored


def measure(shape: str, kv_heads: int, group: int, formats: list[str], bandwidth: float) -> list[Row]:
    """All kernels at one shape "BATCHxTOKENS"."""
    batch, tokens = (int(part) for part in shape.split("x"))
    peers = time_peers(batch, tokens, kv_heads, group)
    best = min(peers.values())
    found = [(name, time, 4 * batch * tokens * kv_heads * DIM) for name, time in peers.items()]
    found += [(kv, *time_ours(kv, batch, tokens, kv_heads, group)) for kv in formats]
    return [
        Row(shape, kv_heads, group, name, time, stored / time * 1e-3, stored / time * 1e6 / bandwidth, best / time)
        for name, time, stored in found
    ]


def markdown(rows: list[Row], bandwidth: float) -> str:
    """The report: what ran where and when, then the table."""
    lines = [
        "# Decode attention, one step of one layer",
        "",
        f"`python scripts/bench_attention.py {' '.join(sys.argv[1:])}` on one {torch.cuda.get_device_name()}, torch "
        f"{torch.__version__}, triton {triton.__version__}, {datetime.date.today()}; copy bandwidth measured in the "
        f"same run: {bandwidth * 1e-12:.2f} TB/s. Medians of graph replays over rotating buffers, merge and "
        f"full-precision parts ({SINK} sinks, 100 newest tokens) included in ours. The ratio is to the faster of the "
        "two bf16 peers.",
        "",
        "| batch x tokens | KV heads x group | kernel | us | GB/s stored | of copy bandwidth | ratio to bf16 |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        numbers = f"{r.microseconds:.1f} | {r.gb_per_s:,.0f} | {r.share_of_copy:.0%} | {r.ratio_to_bf16:.2f}"
        lines.append(f"| {r.shape} | {r.kv_heads} x {r.group} | {r.kernel} | {numbers} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="oct2,oct3,oct4,octopus3,bf16")
    parser.add_argument("--shapes", default="1x8192,1x32768,1x131072,8x8192,8x32768,16x32768,64x4096")
    parser.add_argument("--heads", default="8x4", help="KV heads x group, comma-separated")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    formats = args.formats.split(",")
    heads = [tuple(int(n) for n in pair.split("x")) for pair in args.heads.split(",")]
    for kv in formats:
        for _, group in heads:
            error = check(kv, group)
            print(f"{kv}, group {group}: relative error {error:.2e}", flush=True)
            if not error < BOUND:
                print("wrong result: nothing is timed", file=sys.stderr)
                return 1
    bandwidth = copy_bandwidth()
    rows = []
    for kv_heads, group in heads:
        for shape in args.shapes.split(","):
            rows += measure(shape, kv_heads, group, formats, bandwidth)
            torch.cuda.empty_cache()
    report = markdown(rows, bandwidth)
    print(report)
    if args.markdown:
        args.markdown.write_text(report, encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
