"""Times layers of routed experts, router included, on one GPU.

    python scripts/bench_experts.py [--shapes qwen3-30b-a3b,gpt-oss-20b,mixtral-8x7b] [--kinds bf16,int4,...]
        [--rows 1,4,16,64,4096] [--json FILE] [--markdown FILE]

Every case is first compared with float64, for two of its rows; nothing is timed that is wrong. A case runs as many
layers in turn as exceed the second-level cache several times, recorded as a CUDA graph. The bytes are those of the
experts that were chosen, each once, and of the router; the share is that of the bandwidth of a copy (read and written),
measured beside them. For many rows TFLOP/s say more.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from bench_graphs import in_turn, recorded
from bench_report import provenance, save, table
from torch import Tensor

from octo_run.engine.benchmark import copy_bandwidth
from octo_run.kernels import experts as routed
from octo_run.kernels.experts import Activation, ExpertWeights, Scratch, reference
from octo_run.kernels.linear import PackedWeight, pack

DEVICE = torch.device("cuda")
REPEATS, ROTATE_BYTES = 21, 400 << 20
#: Experts, chosen ones, hidden, inner, activation.
SHAPES = {
    "qwen3-30b-a3b": (128, 8, 2048, 768, "silu"),
    "gpt-oss-20b": (32, 4, 2880, 2880, "clamped_silu"),
    "mixtral-8x7b": (8, 2, 4096, 14336, "silu"),
}


@dataclass
class Row:
    """One case: microseconds of a layer, GB/s of the bytes that it must read, their share of the copy bandwidth."""

    shape: str
    kind: str
    rows: int
    microseconds: float
    gigabytes: float
    share: float
    tflops: float
    error: float


def made(kind: str, out: int, columns: int, seed: int) -> Tensor | PackedWeight:
    """A matrix of values of about ``columns ** -0.5``."""
    random = torch.Generator(DEVICE).manual_seed(seed)
    if kind == "bf16":
        weight = torch.empty(out, columns, dtype=torch.bfloat16, device=DEVICE)
        return weight.normal_(generator=random).mul_(columns**-0.5)
    high = 16 if kind in ("int4", "fp4") else 120  # no NaN of E4M3
    codes = torch.randint(0, high, (out, columns), generator=random, dtype=torch.uint8, device=DEVICE)
    spread = {"int4": 4.6, "fp4": 3.2, "int8": 69.0, "fp8": 90.0}[kind]
    rows = torch.full((out,), columns**-0.5 / spread, device=DEVICE)
    if high != 16:
        return pack(kind, codes, columns, rows)
    group = 64 if kind == "int4" else 32
    scales = torch.rand(out, -(-columns // group), generator=random, device=DEVICE) + 0.5
    offsets = torch.randint(-2, 3, scales.shape, generator=random, device=DEVICE) if kind == "int4" else None
    return pack(kind, codes, group, rows, scales, offsets)


def wide(part: tuple[Tensor | PackedWeight, Tensor | None]) -> Tensor:
    return part[0].double() if isinstance(part[0], Tensor) else part[0].dequantised(torch.float64)


def error_of(x: Tensor, weights: ExpertWeights, scratch: Scratch, out: Tensor) -> float:
    """The relative error of two rows, given the experts that were chosen."""
    worst = 0.0
    for row in {0, len(x) - 1}:
        exact = torch.zeros(weights.hidden, dtype=torch.float64, device=DEVICE)
        for expert, share in zip(scratch.indices[row].tolist(), scratch.weights[row].double(), strict=True):
            both = wide(weights.part("gate_up", expert)) @ x[row].double()
            exact += share * (wide(weights.part("down", expert)) @ reference.activated(both, weights.activation))
        worst = max(worst, float((out[row].double() - exact).norm() / exact.norm()))
    return worst


def case(name: str, kind: str, rows: int, bandwidth: float) -> Row:
    """Check and time one."""
    experts, chosen, hidden, inner, activation = SHAPES[name]
    x = torch.randn(rows, hidden, dtype=torch.bfloat16, device=DEVICE)
    scratch = Scratch.make(Scratch.shapes(rows, experts, chosen, experts, hidden, inner, x.dtype), DEVICE)
    out = torch.full_like(x, float("nan"))
    layers: list[tuple[Tensor, ExpertWeights]] = []
    size = 0
    while size < ROTATE_BYTES or len(layers) < 2:
        seed = 10 * len(layers)
        router = made("bf16", experts, hidden, seed)
        assert isinstance(router, Tensor)
        gate_up = made(kind, experts * 2 * inner, hidden, seed + 1)
        down = made(kind, experts * hidden, inner, seed + 2)
        layers.append((router, ExpertWeights(experts, gate_up, down, activation=Activation(activation))))
        size += layers[-1][1].nbytes * chosen // experts

    def run(router: Tensor, weights: ExpertWeights) -> None:
        routed.route(x, router, None, True, scratch)
        routed.mix(x, weights, scratch, out)

    run(*layers[0])
    error = error_of(x, layers[0][1], scratch, out)
    if not error < 1.5e-2:
        raise ValueError(f"relative error {error:.1e}")
    read = 0.0
    for router, weights in layers:
        routed.route(x, router, None, True, scratch)
        read += router.nbytes + weights.nbytes / experts * len(scratch.indices.unique())

    def step() -> None:
        for layer in layers:
            run(*layer)

    graph = recorded(step)
    first = out.clone()
    graph.replay()
    torch.cuda.synchronize()
    if not torch.equal(first, out):
        raise ValueError("two replays differ")
    each = in_turn([graph], REPEATS)[0] / len(layers)
    rate = read / len(layers) / each * 1e-3
    flops = rows * chosen * 6 * hidden * inner / each * 1e-6
    return Row(name, kind, rows, each, rate, rate * 1e9 / bandwidth, flops, error)


def report(found: list[Row], run: str, bandwidth: float) -> str:
    """What ran where and when, then the table."""
    header = ["shape", "experts", "rows", "us a layer", "GB/s", "of copy", "TFLOP/s", "error"]
    cells = [
        (r.shape, r.kind, str(r.rows), f"{r.microseconds:.1f}", f"{r.gigabytes:,.0f}", f"{r.share:.0%}",
         f"{r.tflops:.0f}", f"{r.error:.1e}")
        for r in found
    ]  # fmt: skip
    about = f"{run}. Copy bandwidth {bandwidth / 1e9:,.0f} GB/s; medians of {REPEATS} graph replays; bf16 inputs."
    return f"# Layers of routed experts\n\n{about}\n\n{table(header, cells)}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--kinds", default="bf16,int4,fp4,int8,fp8")
    parser.add_argument("--rows", default="1,4,16,64,4096")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    bandwidth, run, found = copy_bandwidth(DEVICE), provenance(sys.argv, DEVICE, [torch, triton]), list[Row]()
    print(f"copy bandwidth {bandwidth / 1e9:,.0f} GB/s", flush=True)
    for name in args.shapes.split(","):
        for kind in args.kinds.split(","):
            for rows in map(int, args.rows.split(",")):
                try:
                    row = case(name, kind, rows, bandwidth)
                except ValueError as problem:
                    print(f"{name} {kind} {rows} rows: {problem}, not timed", file=sys.stderr, flush=True)
                    continue
                found.append(row)
                speed = f"{row.gigabytes:,.0f} GB/s {row.share:.0%} {row.tflops:.0f} TFLOP/s"
                print(f"{name} {kind} {rows} rows: {row.microseconds:.1f} us {speed} error {row.error:.1e}", flush=True)
                save(found, report(found, run, bandwidth), args.json, args.markdown)
                torch.cuda.empty_cache()
    print(report(found, run, bandwidth))
    return 0


if __name__ == "__main__":
    sys.exit(main())
