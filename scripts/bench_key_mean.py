"""Times decode attention with the key mean against the same without it, in turn, in one process.

    python scripts/bench_key_mean.py [--formats oct2,oct3,oct4] [--dims 64,128] [--groups 1,4,5,7,8]
        [--contexts 1x32768,16x32768] [--theta 500000] [--json FILE] [--markdown FILE]

Eight KV heads. Every format, group and dimension is first compared with float64 attention over the decoded pages, with
the mean and without; nothing is timed if one is wrong. A case's two calls read the same pages, over rotating layers
larger than the L2 cache; CUDA graphs of both are replayed in turn, and of each the median is taken.
"""

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
import triton
from bench_attention import BOUND, ROTATE_BYTES, Shape, adds, calls, check, form, inputs
from bench_graphs import DEVICE, in_turn, recorded
from bench_report import output_options, provenance, save, table

from octo_run.engine.benchmark import wait

KV_HEADS, REPEATS = 8, 41


@dataclass
class Row:
    """One case: microseconds of a call with the mean and without, and relative errors (worst of three lengths)."""

    kv: str
    head_dim: int
    group: int
    context: str
    without: float
    with_mean: float
    cost: float
    error_without: float
    error_with: float


def compared(kv: str, group: int, dim: int, theta: float, contexts: list[str]) -> float:
    """`check`, and what the timing of the contexts needs is compiled."""
    found = check(kv, group, dim, KV_HEADS, theta)
    if any(context.startswith("1x") for context in contexts):
        shape = Shape(KV_HEADS, group, dim, "1x4096")
        arenas = inputs(form(kv, dim), shape.lengths, KV_HEADS, dim, 1)
        calls(adds(kv, "mean"), form(kv, dim), shape, arenas, theta)()
        wait(DEVICE)
    return found


def report(rows: list[Row], run: str, theta: float) -> str:
    """What ran where and when, then the table."""
    header = ["format", "head_dim", "group", "batch x tokens", "without, us", "with the mean, us", "cost",
              "error without", "error with"]  # fmt: skip
    cells = [
        (r.kv, str(r.head_dim), str(r.group), r.context, f"{r.without:.1f}", f"{r.with_mean:.1f}",
         f"{r.cost:+.1%}", f"{r.error_without:.1e}", f"{r.error_with:.1e}")
        for r in rows
    ]  # fmt: skip
    about = (
        f"{run}. {KV_HEADS} KV heads, theta {theta:g}; medians of {REPEATS} graph replays in turn; errors against"
        " float64 attention over the decoded pages (bf16 outputs, worst of three lengths)."
    )
    return f"# What the key mean costs decode attention\n\n{about}\n\n{table(header, cells)}\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="oct2,oct3,oct4")
    parser.add_argument("--dims", default="64,128")
    parser.add_argument("--groups", default="1,4,5,7,8")
    parser.add_argument("--contexts", default="1x32768,16x32768")
    parser.add_argument("--theta", type=float, default=5e5)
    parser.add_argument("--processes", type=int, default=max(1, min(16, os.cpu_count() or 1)), help="of the checks")
    output_options(parser)
    args = parser.parse_args(argv)
    formats, contexts = args.formats.split(","), args.contexts.split(",")
    dims, groups = ([int(n) for n in text.split(",")] for text in (args.dims, args.groups))
    began = time.monotonic()
    with ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        cases = [
            (kv + mean, group, dim) for dim in dims for group in groups for kv in formats for mean in ("", "+mean")
        ]
        found = pool.map(compared, *zip(*cases, strict=True), [args.theta] * len(cases), [contexts] * len(cases))
        errors = dict(zip(cases, found, strict=True))
    wrong = [(case, error) for case, error in errors.items() if not error < BOUND]
    for (kv, group, dim), error in wrong:
        print(f"{kv}, group {group}, head_dim {dim}: relative error {error:.2e}", file=sys.stderr)
    if wrong:
        print("wrong results: nothing is timed", file=sys.stderr)
        return 1
    print(f"all {len(cases)} are right, after {time.monotonic() - began:.0f} s", flush=True)
    run, rows = provenance(sys.argv, DEVICE, [torch, triton]), []
    for dim in dims:
        for kv in formats:
            for context in contexts:
                fmt, lengths = form(kv, dim), Shape(KV_HEADS, 1, dim, context).lengths
                stored = sum(lengths) * KV_HEADS * (fmt.k.bytes_per_vector + fmt.v.bytes_per_vector)
                layers = ROTATE_BYTES // stored + 1
                arenas = inputs(fmt, lengths, KV_HEADS, dim, layers)
                for group in groups:
                    shape = Shape(KV_HEADS, group, dim, context)
                    steps = [calls(mean, fmt, shape, arenas, args.theta) for mean in (False, True)]
                    without, with_mean = (us / layers for us in in_turn([recorded(step) for step in steps], REPEATS))
                    rows.append(
                        Row(kv, dim, group, context, without, with_mean, with_mean / without - 1,
                            errors[kv, group, dim], errors[f"{kv}+mean", group, dim])
                    )  # fmt: skip
                    save(rows, report(rows, run, args.theta), args.json, args.markdown)
                del arenas
                torch.cuda.empty_cache()
    print(report(rows, run, args.theta))
    print(f"{time.monotonic() - began:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
