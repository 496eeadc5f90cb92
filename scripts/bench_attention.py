"""Times one decode step's attention, packed pages, full-precision parts and merge, against the best bf16 and fp8
kernels.

    python scripts/bench_attention.py [--formats oct2,oct3+mean,oct3+general,...] [--cases 8x4x128@1x8192,...]
        [--peers cuDNN,...] [--json FILE] [--markdown FILE] [--plot FILE]

A case is KV heads x group x head_dim @ batch x tokens, or @ mixed: sixteen sequences of 1,024 to 65,536 tokens. A
format runs in the kernel that the engine would choose; +general puts the general kernel in its place, +mean adds the
key mean. Refuses to time a wrong kernel: every format, head count and dimension is first compared with float64
attention over the decoded pages. Everything runs in one process, by CUDA-graph replay over rotating layers larger than
the L2 cache; medians of 50. Peers are PyTorch's cuDNN and Flash attention over contiguous K and V (which pay for no
page table) and FlashInfer's paged decode in bf16 and fp8 where it is installed; the format bf16 is our own kernel on
plain pages. Prints the machine's copy bandwidth first, then a markdown table: microseconds, the share of that bandwidth
that the stored bytes reach, and the ratios to the fastest bf16 kernel (ours included) and to fp8.
"""

import argparse
import math
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from attention_peers import PEERS, compile_flashinfer
from bench_graphs import DEVICE, in_turn, recorded
from bench_report import output_options, provenance, save, table

from octo_run.engine.benchmark import wait
from octo_run.engine.evaluation.figure import log_ticks, page, set_ticks, styles
from octo_run.kernels import PAGE_TOKENS, AttentionInputs, AttentionSpec, encode_pages, page_bytes
from octo_run.kernels.attention import dispatch
from octo_run.kernels.attention.dispatch import Kernel
from octo_run.kernels.attention.key_mean import AngleTables, KeyMean, coefficients, mean_maps, page_bias
from octo_run.kernels.attention.launch import launch
from octo_run.kernels.attention.workspace import workspace_bytes
from octo_run.kernels.codec import KVFormat, PageFormat, parse_kv

SINK, RING, PAGE, NEW = 64, 128, PAGE_TOKENS, 100
ROTATE_BYTES = 200_000_000  # four times the L2 cache
REPEATS = 50
DISTINCT = 5  # pages of a check: their codes come from the CPU too, which takes its time
CHECKED = [37, 5, 300]  # pages of the sequences of a check
BOUND = 4e-3  # bf16 outputs are themselves rounded to 2e-3
MIXED = [1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 16384, 24576, 32768, 32768, 49152, 65536, 65536]
CONTEXTS = "1x4096,1x8192,1x32768,1x131072,1x1048576,8x8192,8x32768,16x32768,64x4096,mixed"
OTHERS = "8x1x128,4x7x128,2x8x128,1x16x128,8x4x64,8x4x256"
CASES = [f"8x4x128@{context}" for context in CONTEXTS.split(",")]
CASES += [f"{heads}@{context}" for heads in OTHERS.split(",") for context in ("1x131072", "16x32768")]
CASES += ["4x7x128@1x65536"]


@dataclass(frozen=True)
class Shape:
    """One case."""

    kv_heads: int
    group: int
    dim: int
    context: str

    @classmethod
    def parse(cls, text: str) -> "Shape":
        heads, context = text.split("@")
        return cls(*(int(n) for n in heads.split("x")), context)

    @property
    def lengths(self) -> list[int]:
        """Packed tokens of every sequence."""
        if self.context == "mixed":
            return MIXED
        batch, tokens = (int(n) for n in self.context.split("x"))
        return [tokens] * batch


@dataclass
class Row:
    """One measurement: microseconds of a step, and GB/s of the bytes that its format stores."""

    shape: str
    heads: str
    head_dim: int
    kernel: str
    microseconds: float
    gb_per_s: float
    share_of_copy: float
    ratio_to_bf16: float
    ratio_to_fp8: float | None


def median_us(step: Callable[[], object], calls: int, repeats: int) -> float:
    """Median microseconds of one of the ``calls`` calls that ``step`` makes, replayed as a CUDA graph."""
    step()
    return in_turn([recorded(step)], repeats)[0] / calls


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of an elementwise pass over 2 GiB."""
    source = torch.empty(1 << 29, dtype=torch.int32, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / (median_us(lambda: torch.add(source, 1, out=target), 1, 20) * 1e-6)


def form(kv: str, dim: int) -> KVFormat:
    """The format of a name, whatever is added to it."""
    return parse_kv(kv.partition("+")[0], dim)


def adds(kv: str, what: str) -> bool:
    """Whether a name has ``mean`` or ``general`` added to its format."""
    return what in kv.split("+")[1:]


def kernel_for(call: dispatch.Call, general: bool) -> Kernel:
    """The kernel that the engine would choose, or the general one."""
    return Kernel.GENERAL_DECODE if general else dispatch.choose(call)


def attended(
    q: torch.Tensor,
    kv: AttentionInputs,
    fmt: KVFormat,
    out: torch.Tensor,
    length: int,
    workspace: torch.Tensor | None = None,
    general: bool = False,
) -> None:
    """A decode step's attention into ``out``; ``length``: a bound on the sequences' lengths."""
    call = dispatch.describe(q, kv, fmt, length, dispatch.kind_of_gpu(q.device))
    spec = AttentionSpec(q.shape[-1] ** -0.5)
    launch(kernel_for(call, general), call, q, kv, fmt, spec=spec, max_length=length, out=out, workspace=workspace)


def coded(fmt: KVFormat, count: int, kv_heads: int, dim: int) -> torch.Tensor:
    """Pages ``[count, kv_heads, bytes]`` of Gaussian vectors, as they lie on a GPU."""
    k, v = (torch.randn(1, count, kv_heads, PAGE, dim, device=DEVICE) for _ in range(2))
    if DEVICE.type == "cpu":
        return PageFormat(fmt, "lanes").encode_rotated(k[0], v[0])
    pages = torch.zeros(count, 1, kv_heads, page_bytes(fmt), dtype=torch.uint8, device=DEVICE)
    encode_pages(k, v, pages, torch.arange(count, device=DEVICE), fmt)
    return pages[:, 0]


def key_mean(fmt: KVFormat, q: torch.Tensor, kv_heads: int, pages: int, theta: float = 5e5) -> KeyMean:
    """The mean's part for queries, of random means."""
    dim = q.shape[-1]
    inv_freq = theta ** (-torch.arange(0, dim, 2, device=DEVICE) / dim)
    means, rotation = torch.randn(kv_heads, dim, device=DEVICE), fmt.k.rotation.to(DEVICE, torch.float32)
    of_queries = coefficients(q.float() @ rotation, means)
    return KeyMean(mean_maps(means, rotation.T), AngleTables.build(inv_freq, SINK, pages), of_queries)


def inputs(fmt: KVFormat, lengths: list[int], kv_heads: int, dim: int, layers: int) -> list[AttentionInputs]:
    """``layers`` arenas whose packed pages hold ``lengths`` tokens of the sequences, coded from Gaussian vectors."""
    counts, few, result = [n // PAGE for n in lengths], coded(fmt, 16, kv_heads, dim), []
    packed = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    for _ in range(layers):
        pages = few[torch.randint(0, 16, (sum(counts),), device=DEVICE)]
        full = [
            torch.randn(len(lengths), kv_heads, size, dim, device=DEVICE, dtype=torch.bfloat16)
            for size in (SINK, RING) * 2
        ]
        places = iter(torch.randperm(sum(counts), device=DEVICE).int().split(counts))
        table = torch.zeros(len(lengths), max(counts), dtype=torch.int32, device=DEVICE)
        for row, count in zip(table, counts, strict=True):
            row[:count] = next(places)
        result.append(
            AttentionInputs(
                pages=pages,
                page_table=table,
                rows=torch.arange(len(lengths), dtype=torch.int32, device=DEVICE),
                num_packed=packed,
                starts=SINK + packed * PAGE + NEW - 1,
                sink_k=full[0],
                sink_v=full[2],
                tail_k=full[1],
                tail_v=full[3],
                tail_origin=torch.zeros_like(packed),
                sink=SINK,
            )
        )
    return result


def check(kv: str, group: int, dim: int, heads: int = 2, theta: float = 5e5) -> float:
    """Relative error of a decode step against float64 attention over the decoded pages (3 sequences).

    Args:
        heads: KV heads.
        theta: Of the key mean's frequencies.
    """
    fmt, lengths = form(kv, dim), [count * PAGE for count in CHECKED]
    pages, kv_in = coded(fmt, DISTINCT, heads, dim), inputs(fmt, lengths, heads, dim, 1)[0]
    kv_in = replace(kv_in, pages=pages, page_table=kv_in.page_table % DISTINCT)
    q = torch.randn(3, 1, heads * group, dim, device=DEVICE, dtype=torch.bfloat16)
    if adds(kv, "mean"):
        kv_in = replace(kv_in, mean=key_mean(fmt, q, heads, max(CHECKED), theta))
    out = torch.full_like(q, float("nan"))
    attended(q, kv_in, fmt, out, SINK + max(lengths) + NEW, general=adds(kv, "general"))
    exact = [part.cpu() for part in PageFormat(fmt, "lanes").decode_rotated(pages, torch.float64)]
    worst = 0.0
    for b, count in enumerate(CHECKED):
        ids = kv_in.page_table[b, :count].long().cpu()
        sides = []
        for rows, sink, tail in ((exact[0], kv_in.sink_k, kv_in.tail_k), (exact[1], kv_in.sink_v, kv_in.tail_v)):
            packed = rows[ids].transpose(0, 1).reshape(heads, -1, dim)
            slots = (torch.arange(NEW) + count * PAGE) % RING
            sides.append(torch.cat([sink[b].cpu().double(), packed, tail[b].cpu().double()[:, slots]], 1))
        scores = torch.einsum("hgd,hnd->hgn", q[b, 0].cpu().double().view(heads, group, dim), sides[0]) * dim**-0.5
        if kv_in.mean is not None:
            of_queries, tables = kv_in.mean.coefficients[b, 0].cpu().double(), kv_in.mean.tables.to("cpu")
            bias = page_bias(of_queries, tables, 0, count) * dim**-0.5
            scores[:, :, SINK : SINK + count * PAGE] += bias.view(heads, group, -1)
        want = torch.einsum("hgn,hnd->hgd", scores.softmax(-1), sides[1]).reshape(-1, dim)
        error = float((out[b, 0].cpu().double() - want).norm() / want.norm())
        worst = max(worst, error) if error == error else math.inf
    return worst


def time_peers(shape: Shape, peers: list[str]) -> list[tuple[str, float, int]]:
    """(name, microseconds, stored bytes) of the kernels of others that are wanted."""
    rows = []
    for name, size, prepare in [peer for peer in PEERS if peer[0] in peers]:
        stored = 2 * size * sum(shape.lengths) * shape.kv_heads * shape.dim
        layers = ROTATE_BYTES // stored + 1
        try:
            step = prepare(shape.lengths, shape.kv_heads, shape.group, shape.dim, layers)
            if step is not None:
                rows.append((name, median_us(step, layers, REPEATS), stored))
        except (RuntimeError, ValueError) as error:  # a shape that a peer does not take is no reason to stop
            print(f"{name} does not take {shape}: {str(error).splitlines()[0]}", file=sys.stderr)
        step = None
        torch.cuda.empty_cache()
    return rows


def prepare_ours(kv: str, shape: Shape, layers: int) -> Callable[[], None]:
    """What one step of ``layers`` layers does."""
    fmt = form(kv, shape.dim)
    arenas = inputs(fmt, shape.lengths, shape.kv_heads, shape.dim, layers)
    return calls(adds(kv, "mean"), fmt, shape, arenas, general=adds(kv, "general"))


def calls(
    mean: bool,
    fmt: KVFormat,
    shape: Shape,
    arenas: list[AttentionInputs],
    theta: float = 5e5,
    general: bool = False,
) -> Callable[[], None]:
    """One call for each layer."""
    batch, heads = len(shape.lengths), shape.kv_heads * shape.group
    q = torch.randn(batch, 1, heads, shape.dim, device=DEVICE, dtype=torch.bfloat16)
    if mean:
        common = key_mean(fmt, q, shape.kv_heads, max(shape.lengths) // PAGE, theta)
        arenas = [replace(arena, mean=common) for arena in arenas]
    out = torch.empty_like(q)
    size = workspace_bytes(DEVICE, batch, heads, shape.kv_heads, shape.dim)
    workspace = torch.zeros(size // 4, dtype=torch.float32, device=DEVICE)
    longest = SINK + max(shape.lengths) + NEW

    def step() -> None:
        for arena in arenas:
            attended(q, arena, fmt, out, longest, workspace, general)

    return step


def run_once(kv: str, shape: Shape) -> None:
    """Compile what the shape's measurement needs."""
    prepare_ours(kv, shape, 1)()
    wait(DEVICE)


def time_ours(kv: str, shape: Shape) -> tuple[str, float, int]:
    """(format, microseconds of our step, its packed bytes)."""
    fmt = form(kv, shape.dim)
    stored = sum(shape.lengths) * shape.kv_heads * (fmt.k.bytes_per_vector + fmt.v.bytes_per_vector)
    layers = ROTATE_BYTES // stored + 1
    return kv, median_us(prepare_ours(kv, shape, layers), layers, REPEATS), stored


def measure(shape: Shape, formats: list[str], peers: list[str], bandwidth: float) -> list[Row]:
    """All kernels at one shape."""
    found = time_peers(shape, peers) + [time_ours(kv, shape) for kv in formats]
    bf16 = {"bf16", *(name for name, size, _ in PEERS if size == 2)}
    best = min((time for name, time, _ in found if name in bf16), default=math.nan)
    fp8 = next((time for name, time, _ in found if name.endswith("fp8")), None)
    return [
        Row(shape.context, f"{shape.kv_heads} x {shape.group}", shape.dim, name, time, stored / time * 1e-3,
            stored / time * 1e6 / bandwidth, best / time, None if fp8 is None else fp8 / time)
        for name, time, stored in found
    ]  # fmt: skip


def by_case(rows: list[Row]) -> str:
    """The microseconds alone: a line for each case, a column for each kernel."""
    kernels = [*dict.fromkeys(r.kernel for r in rows)]
    cases = dict.fromkeys((r.heads, r.head_dim, r.shape) for r in rows)
    found = {(r.heads, r.head_dim, r.shape, r.kernel): f"{r.microseconds:.1f}" for r in rows}
    lines = [
        (f"{heads} @ {shape}", str(dim), *(found.get((heads, dim, shape, name), "") for name in kernels))
        for heads, dim, shape in cases
    ]
    return table(["heads x group @ batch x tokens, us", "head_dim", *kernels], lines)


def report(rows: list[Row], bandwidth: float, errors: dict[str, float], run: str) -> str:
    """What ran where and when (``run``), then the table."""
    header = ["batch x tokens", "heads x group", "head_dim", "kernel", "us", "GB/s stored", "of copy speed", "to bf16",
              "to fp8"]  # fmt: skip
    cells = [
        (r.shape, r.heads, str(r.head_dim), r.kernel, f"{r.microseconds:.1f}", f"{r.gb_per_s:,.0f}",
         f"{r.share_of_copy:.0%}", f"{r.ratio_to_bf16:.2f}", "" if r.ratio_to_fp8 is None else f"{r.ratio_to_fp8:.2f}")
        for r in rows
    ]  # fmt: skip
    parts = [
        "# Decode attention, one step of one layer",
        f"{run}; copy bandwidth measured in the same run: {bandwidth * 1e-12:.2f} TB/s. Medians of {REPEATS}"
        f" graph replays over rotating buffers; merge and full-precision parts ({SINK} sinks, {NEW} newest tokens) are"
        " included in ours. Ratios are to the fastest bf16 kernel and to FlashInfer's fp8 kernel at the same shape."
        f" `mixed`: sequences of {', '.join(f'{n:,}' for n in MIXED)} tokens.",
        "Relative errors against float64 attention over the decoded pages (bf16 outputs; worst of three lengths): "
        f"{', '.join(f'{name} {error:.1e}' for name, error in errors.items())}.",
        by_case(rows),
        table(header, cells),
    ]
    return "\n\n".join(parts) + "\n"


def plot(rows: list[Row], bandwidth: float, path: Path, about: str) -> None:
    """Roofline: time against stored bytes, with the line that the copy bandwidth allows; ``about`` is for the title."""
    names = [*dict.fromkeys(row.kernel for row in rows)]
    own = styles(names)
    with page(path, "Decode attention, one step of one layer", about, (11.0, 6.4)) as (_, (axes,)):
        for name in names:
            points = sorted((r.gb_per_s * r.microseconds * 1e-3, r.microseconds) for r in rows if r.kernel == name)
            axes.plot(*zip(*points, strict=True), linestyle="none", markersize=6, label=name, **own[name].points())
        sizes = [r.gb_per_s * r.microseconds * 1e-3 for r in rows]
        ends = [min(sizes), max(sizes)]
        axes.plot(ends, [size * 1e12 / bandwidth for size in ends], "k-", linewidth=1, label="copy bandwidth")
        axes.set(xscale="log", yscale="log", xlabel="stored K and V, MB", ylabel="microseconds")
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            set_ticks(axis, log_ticks(*limits, (1,)), ",g")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=12)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="oct2,oct3,oct4,oct3+mean,octopus3,bf16")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--peers", default=",".join(name for name, *_ in PEERS), help="of other projects; '' for none")
    parser.add_argument("--processes", type=int, default=max(1, min(16, os.cpu_count() or 1)), help="of the checks")
    output_options(parser)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(argv)
    formats, peers = args.formats.split(","), args.peers.split(",")
    for kv in formats:
        if unknown := {*kv.split("+")[1:]} - {"mean", "general"}:
            parser.error(f"{kv} adds {', '.join(sorted(unknown))} to a format; it can be mean or general")
    if unknown := {*peers} - {"", *(name for name, *_ in PEERS)}:
        parser.error(f"there are no peers {', '.join(sorted(unknown))}; there are {', '.join(n for n, *_ in PEERS)}")
    shapes = [Shape.parse(case) for case in args.cases.split(",")]
    kinds = [*dict.fromkeys((shape.group, shape.dim) for shape in shapes)]
    errors: dict[str, float] = {}
    # Most of the time before the first measurement is compilation, whose results the processes share through caches on
    # the disk.
    with ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        groups = {dim: group for group, dim in kinds} if any("FlashInfer" in name for name in peers) else {}
        others = [pool.submit(compile_flashinfer, group, dim) for dim, group in groups.items()]
        launches = {(shape.kv_heads, shape.group, shape.dim, len(shape.lengths) > 1): shape for shape in shapes}
        others += [pool.submit(run_once, kv, shape) for kv in formats for shape in launches.values()]
        checks = {(kv, *kind): pool.submit(check, kv, *kind) for kv in formats for kind in kinds}
        for (kv, group, dim), done in checks.items():
            error = done.result()
            errors[kv] = max(errors.get(kv, 0.0), error)
            if not error < BOUND:
                print(f"{kv}, group {group}, head_dim {dim}: relative error {error:.2e}", file=sys.stderr)
                print("wrong result: nothing is timed", file=sys.stderr)
                return 1
        for other in others:
            other.result()
    print("all formats are right: " + ", ".join(f"{kv} {error:.1e}" for kv, error in errors.items()), flush=True)
    bandwidth, run = copy_bandwidth(), provenance(sys.argv, DEVICE, [torch, triton])
    rows: list[Row] = []
    for shape in shapes:
        rows += measure(shape, formats, peers, bandwidth)
        torch.cuda.empty_cache()
        text = report(rows, bandwidth, errors, run)
        save(rows, text, args.json, args.markdown)
        if args.plot:
            plot(rows, bandwidth, args.plot, run.replace("`", ""))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
