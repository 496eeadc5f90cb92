"""Times layers of routed experts on one GPU: whole, the router alone, and what the experts do alone.

    python scripts/bench_experts.py [--shapes qwen3-30b-a3b,gpt-oss-20b,mixtral-8x7b] [--kinds bf16,int4,...]
        [--rows 1,4,16,64,4096] [--tilings] [--json FILE] [--markdown FILE]

Every case is first compared with float64, for two of its rows; nothing is timed that is wrong. A case runs as many
layers in turn as exceed the second-level cache several times, recorded as CUDA graphs, which are replayed in turn. The
bytes are those of the experts that were chosen, each once, and of the router; the share is that of the bandwidth of a
copy (read and written), measured beside them. For many rows TFLOP/s say more. With --tilings the experts are also timed
with the divisions of `TILINGS` or `VECTORS` for one of their two products; the one that the program chooses is marked.
The table is printed as it grows.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import triton
from bench_graphs import DEVICE, in_turn, recorded
from bench_report import output_options, provenance, save, table, table_line
from torch import Tensor

from octo_run.engine.benchmark import copy_bandwidth, wait
from octo_run.kernels.experts import Activation, ExpertWeights, Scratch, launch, reference
from octo_run.kernels.experts.launch import Tiling, VectorTiling
from octo_run.kernels.linear import PackedWeight, pack
from octo_run.kernels.linear.packed import BLOCK

REPEATS, ROTATE_BYTES, BOUND = 21, 400 << 20, 1.5e-2
#: Experts, chosen ones, hidden, inner, activation.
SHAPES = {
    "qwen3-30b-a3b": (128, 8, 2048, 768, "silu"),
    "gpt-oss-20b": (32, 4, 2880, 2880, "clamped_silu"),
    "mixtral-8x7b": (8, 2, 4096, 14336, "silu"),
}
#: Of products with packed experts: warps, tiles ahead, programs on a multiprocessor.
TILINGS = [(8, 1, 1), (8, 1, 2), (8, 1, 3), (8, 2, 1), (8, 2, 2), (16, 1, 1), (4, 1, 4)]
#: Of a few tokens' products with dense ones: outputs, columns at a time, warps.
VECTORS = [(1, 512, 4), (1, 1024, 4), (2, 1024, 4), (4, 256, 4), (4, 512, 4), (4, 1024, 4), (4, 1024, 8), (8, 256, 4)]
HEADER = ["shape", "experts", "rows", "what", "us", "GB/s", "of copy", "TFLOP/s", "error"]


@dataclass
class Row:
    """One step of a case: microseconds of a layer, GB/s of the bytes that it must read, their share of the copy
    bandwidth, TFLOP/s of the experts (None: of the router alone), and the relative error of the whole layer."""

    shape: str
    kind: str
    rows: int
    what: str
    microseconds: float
    gigabytes: float
    share: float
    tflops: float | None
    error: float

    def cells(self) -> list[str]:
        """As a line of the table."""
        return [
            self.shape, self.kind, str(self.rows), self.what, f"{self.microseconds:.1f}", f"{self.gigabytes:,.0f}",
            f"{self.share:.0%}", "" if self.tflops is None else f"{self.tflops:.0f}", f"{self.error:.1e}",
        ]  # fmt: skip


@dataclass
class Step:
    """What is timed: a call for each layer, bytes that all of these must read, flops of the experts of one."""

    what: str
    run: Callable[[], None]
    nbytes: float
    flops: float | None
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
    """The relative error of two rows, given the experts that were chosen; infinite for NaN."""
    worst = 0.0
    for row in {0, len(x) - 1}:
        exact = torch.zeros(weights.hidden, dtype=torch.float64, device=DEVICE)
        for expert, share in zip(scratch.indices[row].tolist(), scratch.weights[row].double(), strict=True):
            both = wide(weights.part("gate_up", expert)) @ x[row].double()
            exact += share * (wide(weights.part("down", expert)) @ reference.activated(both, weights.activation))
        error = float((out[row].double() - exact).norm() / exact.norm())
        worst = max(worst, error) if error == error else math.inf
    return worst


def layers_of(name: str, kind: str) -> list[tuple[Tensor, ExpertWeights]]:
    """Routers and experts of as many layers as a case reads in turn."""
    experts, chosen, hidden, inner, activation = SHAPES[name]
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
    return layers


def other_divisions(name: str, chosen: Tiling | VectorTiling, weights: ExpertWeights) -> list[Tiling | VectorTiling]:
    """What is tried for a product, the chosen one with it."""
    found: list[Tiling | VectorTiling] = [VectorTiling(*one) for one in VECTORS]
    if isinstance(chosen, Tiling):
        weight = getattr(weights, name)
        blocks = weight.padded // BLOCK
        found = [Tiling(warps, -(-blocks // warps), ahead, 1, programs) for warps, ahead, programs in TILINGS]
    return [*dict.fromkeys([*found, chosen])]


def described(how: Tiling | VectorTiling) -> str:
    """A division in words."""
    if isinstance(how, VectorTiling):
        return f"{how.outputs} outputs by {how.columns} columns, {how.warps} warps"
    return f"{how.warps} warps of {how.turns} blocks, {how.ahead} ahead, {how.programs} programs"


class Case:
    """Layers of one shape and kind, and the tokens that go through them.

    Raises:
        ValueError: The layer is wrong.
    """

    def __init__(self, name: str, kind: str, rows: int) -> None:
        experts, chosen, hidden, inner, _ = SHAPES[name]
        self.x = torch.randn(rows, hidden, dtype=torch.bfloat16, device=DEVICE)
        shapes = Scratch.shapes(rows, experts, chosen, experts, hidden, inner, self.x.dtype)
        self.scratch, self.out = Scratch.make(shapes, DEVICE), torch.empty_like(self.x)
        self.layers, self.read = layers_of(name, kind), 0.0
        self.flops = rows * chosen * 6 * hidden * inner
        self.error = self.error_with(None)
        if not self.error < BOUND:
            raise ValueError(f"relative error {self.error:.1e}")
        for router, weights in self.layers:
            launch.route(self.x, router, None, True, self.scratch)
            self.read += weights.nbytes / experts * len(self.scratch.indices.unique())

    def error_with(self, divisions: launch.Divisions | None) -> float:
        """The relative error of the first layer."""
        for part in (self.scratch.inner, self.scratch.parts, self.out):
            part.fill_(float("nan"))
        router, weights = self.layers[0]
        launch.route(self.x, router, None, True, self.scratch)
        launch.mix(self.x, weights, self.scratch, self.out, None, divisions)
        return error_of(self.x, weights, self.scratch, self.out)

    def route(self) -> None:
        for router, _ in self.layers:
            launch.route(self.x, router, None, True, self.scratch)

    def mix(self, divisions: launch.Divisions | None = None) -> None:
        for _, weights in self.layers:
            launch.mix(self.x, weights, self.scratch, self.out, None, divisions)

    def both(self) -> None:
        for router, weights in self.layers:
            launch.route(self.x, router, None, True, self.scratch)
            launch.mix(self.x, weights, self.scratch, self.out)

    def steps(self, tilings: bool) -> list[Step]:
        """Whole layers, their parts, and other divisions of a product, checked."""
        routers, error = sum(router.nbytes for router, _ in self.layers), self.error
        found = [
            Step("layer", self.both, routers + self.read, self.flops, error),
            Step("router", self.route, routers, None, error),
            Step("products and sum", self.mix, self.read, self.flops, error),
        ]
        weights = self.layers[0][1]
        chosen = launch.division(self.x, weights)
        for name, usual in chosen.items() if tilings else ():
            for how in other_divisions(name, usual, weights):
                what, divisions = f"{name}: {described(how)}", {**chosen, name: how}
                error = self.error_with(divisions)
                if not error < BOUND:
                    print(f"{what}: relative error {error:.1e}, not timed", file=sys.stderr, flush=True)
                    continue
                what += " (chosen)" if how == usual else ""
                found.append(Step(what, partial(self.mix, divisions), self.read, self.flops, error))
        return found

    def times(self, steps: list[Step]) -> list[float]:
        """Microseconds of a layer in each step.

        Raises:
            ValueError: The first step, replayed, gives something else.
        """
        graphs = [recorded(step.run) for step in steps]
        self.both()
        first = self.out.clone()
        graphs[0].replay()
        wait(DEVICE)
        if not torch.equal(first, self.out):
            raise ValueError("two replays differ")
        return [total / len(self.layers) for total in in_turn(graphs, REPEATS)]


def measure(name: str, kind: str, rows: int, bandwidth: float, tilings: bool) -> list[Row]:
    """Check and time a case."""
    case = Case(name, kind, rows)
    steps, found = case.steps(tilings), []
    for step, us in zip(steps, case.times(steps), strict=True):
        rate = step.nbytes / len(case.layers) / us * 1e-3
        tflops = None if step.flops is None else step.flops / us * 1e-6
        found.append(Row(name, kind, rows, step.what, us, rate, rate * 1e9 / bandwidth, tflops, step.error))
    return found


def report(found: list[Row], run: str, bandwidth: float) -> str:
    """What ran where and when, then the table."""
    about = (
        f"{run}. Copy bandwidth {bandwidth / 1e9:,.0f} GB/s; medians of {REPEATS} graph replays in turn; bf16 inputs."
    )
    return f"# Layers of routed experts\n\n{about}\n\n{table(HEADER, [row.cells() for row in found])}\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--kinds", default="bf16,int4,fp4,int8,fp8")
    parser.add_argument("--rows", default="1,4,16,64,4096")
    parser.add_argument("--tilings", action="store_true", help="time other divisions of the products, too")
    output_options(parser)
    args = parser.parse_args(argv)
    bandwidth, run, found = copy_bandwidth(DEVICE), provenance(sys.argv, DEVICE, [torch, triton]), list[Row]()
    print(report(found, run, bandwidth), end="", flush=True)
    for name in args.shapes.split(","):
        for kind in args.kinds.split(","):
            for rows in map(int, args.rows.split(",")):
                try:
                    some = measure(name, kind, rows, bandwidth, args.tilings)
                except ValueError as problem:
                    print(f"{name} {kind} {rows} rows: {problem}, not timed", file=sys.stderr, flush=True)
                    continue
                for row in some:
                    print(table_line(row.cells()), flush=True)
                found += some
                save(found, report(found, run, bandwidth), args.json, args.markdown)
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
