"""Times the CPU's compiled kernels beside PyTorch's operators: products with few bits, and attention over pages.

    python scripts/bench_cpu_kernels.py [--threads 1] [--repeats 9] [--markdown FILE] [--json FILE]

CPU time of this process, medians, of candidates in turn. Products: microseconds, shapes OUTxIN. Attention: nanoseconds
for one token of one KV head, K and V, three query heads, head dimension 64; results are compared with float64 first.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from bench_report import output_options, provenance, save, table
from gpu_cases import make_case
from torch import Tensor

from octo_run.kernels import AttentionSpec, attend
from octo_run.kernels.cpu import path_name
from octo_run.kernels.cpu.native import SWITCH
from octo_run.kernels.linear import packed_linear
from octo_run.models.quantisation.schemes import SCHEMES

SHAPES = ("960x576", "3072x576", "576x1536", "49152x576", "4096x4096")
FORMATS, LENGTHS = ("oct2", "oct3", "oct4", "octopus3", "bf16"), (1200, 4200)
ROWS = (1, 16)


@dataclass
class Row:
    """One measurement: microseconds of a product, or nanoseconds of a token."""

    what: str
    case: str
    time: float


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median CPU seconds of a call; as many calls are timed together as take some milliseconds."""
    begun = time.process_time()
    work()
    calls = max(1, int(5e-3 / max(1e-7, time.process_time() - begun)))
    found = []
    for _ in range(repeats):
        begun = time.process_time()
        for _ in range(calls):
            work()
        found.append((time.process_time() - begun) / calls)
    return statistics.median(found)


def products(shape: str, rows: int) -> dict[str, Callable[[], object]]:
    """Everything that multiplies ``rows`` rows with a matrix of this shape."""
    out, columns = map(int, shape.split("x"))
    weight, x = torch.randn(out, columns) / 30, torch.randn(rows, columns)
    half, x_half, y = weight.bfloat16(), x.bfloat16(), torch.empty(rows, out)
    codes, scale = torch.randint(-127, 128, (out, columns), dtype=torch.int8), torch.rand(out)
    found: dict[str, Callable[[], object]] = {
        "torch, float32": lambda: torch.nn.functional.linear(x, weight),
        "torch, bfloat16": lambda: torch.nn.functional.linear(x_half, half),
        "`_weight_int8pack_mm`, bfloat16": lambda: torch.ops.aten._weight_int8pack_mm(x_half, codes, scale.bfloat16()),
        "`_weight_int8pack_mm`, float32": lambda: torch.ops.aten._weight_int8pack_mm(x, codes, scale),
    }
    nibbles = torch.randint(0, 16, (out, columns), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)
    pairs = torch.rand(columns // 64, out, 2).bfloat16()
    found["`_weight_int4pack_mm_for_cpu`, group 64, bfloat16"] = lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(
        x_half, packed, 64, pairs
    )
    for name in ("int8", "int4"):
        ours = SCHEMES[name](weight)
        found[f"ours, {name}, float32"] = lambda ours=ours: packed_linear(x, ours, None, y)  # type: ignore[misc]
    return found


def attention(kv: str, length: int) -> Callable[[], Tensor]:
    """A decode step over so many tokens of one KV head, compared with float64."""
    case = make_case(kv, [length], 1, 3, 1, 64, torch.float32, device="cpu")
    spec = AttentionSpec(0.125)

    def step() -> Tensor:
        return attend(case.q, case.kv, case.fmt, spec=spec, max_length=length)

    error = float((step().double() - case.want).norm() / case.want.norm())
    if not error < 1e-4:
        raise SystemExit(f"{kv}, {length} tokens: relative error {error:.1e}, nothing is timed")
    return step


def report(rows: list[Row], run: str) -> str:
    """What ran where and when, then the tables."""

    def of(cases: list[str]) -> str:
        names = list(dict.fromkeys(row.what for row in rows if row.case in cases))
        times = {(row.what, row.case): f"{row.time:,.0f}" for row in rows}
        return table(["", *cases], [[name, *(times.get((name, case), "") for case in cases)] for name in names])

    cases = list(dict.fromkeys(row.case for row in rows))
    parts = [f"# The CPU's kernels\n\n{run}; instructions: {path_name()}. CPU time, medians."]
    for count in ROWS:
        mine = [case for case in cases if case.endswith(f", {count} rows")]
        parts += [f"## Products of {count} rows, microseconds", of(mine)]
    parts += ["## Attention, nanoseconds for a token of a KV head", of([c for c in cases if c.endswith("tokens")])]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    output_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run, rows = provenance(sys.argv, torch.device("cpu"), [torch]), list[Row]()
    for count in ROWS:
        for shape in SHAPES:
            for name, work in products(shape, count).items():
                rows.append(Row(name, f"{shape}, {count} rows", 1e6 * seconds(work, args.repeats)))
    for length in LENGTHS:
        for kv in FORMATS:
            step = attention(kv, length)
            rows.append(Row(kv, f"{length:,} tokens", 1e9 * seconds(step, args.repeats) / length))
            os.environ[SWITCH] = "0"
            rows.append(Row(f"PyTorch, {kv}", f"{length:,} tokens", 1e9 * seconds(step, args.repeats) / length))
            del os.environ[SWITCH]
    save(rows, report(rows, run), args.json, args.markdown)
    print(report(rows, run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
