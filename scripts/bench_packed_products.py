"""Times products of a few rows with packed weights against dense ones and other libraries', in turn, on one GPU.

    python scripts/bench_packed_products.py [--shapes 4096x14336,...] [--rows 1,4,8,16] [--kinds int4,...] [--tilings]
        [--json FILE] [--markdown FILE]

Every case is first compared with the float64 product of the dequantised weight; nothing is timed that is wrong. A case
reads as many different weights in turn as exceed the second-level cache several times, recorded as a CUDA graph; the
graphs of all candidates are replayed in turn, and of each the median is taken. GB/s are those of the weight's own
bytes, scales included; the share is that of the bandwidth of a copy (read and written), measured beside them. Shapes
are OUTxIN. With --tilings each kind is also timed in the divisions of the work that `TILINGS` gives; the one that the
program chooses is marked. Other libraries are timed where they are installed: gemlite, humming, and PyTorch's own int4
kernel. The table is printed as it grows.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from bench_graphs import DEVICE, in_turn, recorded
from bench_report import output_options, provenance, save, table, table_line
from torch import Tensor

from octo_run.engine.benchmark import copy_bandwidth
from octo_run.kernels.devices import runs_ptx
from octo_run.kernels.linear import PackedWeight, launch, pack, packed_linear
from octo_run.kernels.linear.packed import BLOCK

REPEATS, ROTATE_BYTES, GROUP = 31, 400 << 20, 128
#: Warps, blocks of columns of a warp at most, tiles ahead, programs on a multiprocessor.
TILINGS = [
    (warps, most, ahead, programs)
    for programs in (1, 2)
    for warps, most in ((8, 4), (8, 2), (16, 2))
    for ahead in (1, 2)
]
HEADER = ["out x in", "rows", "what", "us", "GB/s", "of copy", "error"]


@dataclass
class Row:
    """One candidate of a case: microseconds, GB/s of the weight's bytes, and their share of the copy bandwidth."""

    shape: str
    rows: int
    what: str
    microseconds: float
    gigabytes: float
    share: float
    error: float

    def cells(self) -> list[str]:
        """As a line of the table."""
        return [
            self.shape, str(self.rows), self.what, f"{self.microseconds:.2f}", f"{self.gigabytes:,.0f}",
            f"{self.share:.0%}", f"{self.error:.1e}" if self.error else "",
        ]  # fmt: skip


def made(kind: str, out: int, columns: int, seed: int) -> PackedWeight:
    """A packed weight of random codes: int4 and fp4 in groups, the others by row."""
    random = torch.Generator(DEVICE).manual_seed(seed)
    high = 16 if kind in ("int4", "fp4") else 120  # no NaN of E4M3
    codes = torch.randint(0, high, (out, columns), generator=random, dtype=torch.uint8, device=DEVICE)
    rows = torch.rand(out, generator=random, device=DEVICE) + 0.5
    if high != 16:
        return pack(kind, codes, columns, rows / 100)
    group = GROUP if kind == "int4" else 32
    scales = torch.rand(out, columns // group, generator=random, device=DEVICE) / 50
    offsets = torch.randint(-8, 8, scales.shape, generator=random, device=DEVICE) if kind == "int4" else None
    return pack(kind, codes, group, rows, scales, offsets)


def relative_error(out: Tensor, x: Tensor, weight: PackedWeight) -> float:
    """The largest error of an output, in units of |x| |row of W|."""
    dense = weight.dequantised(torch.float64)
    exact, size = x.double() @ dense.T, x.double().norm(dim=1)[:, None] * dense.norm(dim=1)
    return float(((out.double() - exact) / size).abs().max())


def humming(out: int, columns: int, copies: int) -> list[Callable[[Tensor], Tensor]]:
    """humming's layers of int4 in groups, offsets included."""
    from humming.layer import HummingLayer

    layers = []
    for _ in range(copies):
        config = {"dtype": "uint4", "group_size": GROUP, "has_zero_point": True}
        layer = HummingLayer(shape_n=out, shape_k=columns, weight_config=config, torch_dtype=torch.bfloat16).cuda()
        layer.load_from_unquantized(torch.randn(out, columns, dtype=torch.bfloat16, device=DEVICE))
        layer.transform()
        layers.append(layer)
    return layers


def tinygemm(out: int, columns: int, copies: int) -> list[Callable[[Tensor], Tensor]]:
    """PyTorch's own int4 kernel."""
    packed = []
    for _ in range(copies):
        codes = torch.randint(0, 256, (out, columns // 2), dtype=torch.uint8, device=DEVICE)
        weight = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        scales = torch.rand(columns // GROUP, out, 2, dtype=torch.bfloat16, device=DEVICE)
        packed.append((weight, scales))

    def product(one: tuple[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.ops.aten._weight_int4pack_mm(x, one[0], GROUP, one[1])

    return [product(one) for one in packed]


def gemlite(out: int, columns: int, copies: int) -> list[Callable[[Tensor], Tensor]]:
    """gemlite's layers."""
    from gemlite import DType, GemLiteLinear

    layers = []
    for _ in range(copies):
        layer = GemLiteLinear(4, group_size=GROUP, in_features=columns, out_features=out, input_dtype=DType.BF16,
                              output_dtype=DType.BF16)  # fmt: skip
        codes = torch.randint(0, 16, (out, columns), dtype=torch.uint8, device=DEVICE)
        scales = torch.rand(out * columns // GROUP, 1, dtype=torch.bfloat16, device=DEVICE)
        zeros = torch.full_like(scales, 8)
        layer.pack(codes, scales, zeros, None)
        layers.append(layer)
    return layers


PEERS = {"tinygemm int4": tinygemm, "humming int4": humming, "gemlite int4": gemlite}


def divisions(x: Tensor, weight: PackedWeight) -> tuple[list[launch.Tiling], launch.Tiling | None]:
    """The divisions of a product, without those whose slices or programs have no room to meet, and the one of them that
    the program chooses (None: it decodes the weight first)."""
    blocks, found = weight.padded // BLOCK, []
    for warps, most, ahead, programs in TILINGS:
        slices = -(-blocks // (warps * most))
        if slices == 1 or (programs <= slices and slices * len(x) * weight.shape[0] <= launch.PARTS):
            found.append(launch.Tiling(warps, -(-blocks // (warps * slices)), ahead, slices, programs))
    chosen = launch.tiling(blocks, len(x)) if launch.fits(x, weight) else None
    return [*dict.fromkeys([*found, *([] if chosen is None else [chosen])])], chosen


def described(how: launch.Tiling) -> str:
    """A division in words."""
    return f"{how.warps} warps of {how.turns} blocks, {how.ahead} ahead, {how.slices} slices, {how.programs} programs"


def candidates(kinds: list[str], peers: list[str], out: int, columns: int, rows: int, tilings: bool) -> list[
        tuple[str, int, float, Callable[[], None]]]:  # fmt: skip
    """Name, bytes of a weight, error, and the step over all copies, of everything that multiplies this shape."""
    x = torch.randn(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    found = []
    dense = [torch.randn(out, columns, dtype=torch.bfloat16, device=DEVICE) for _ in range(_copies(2 * out * columns))]
    y = x.new_empty(rows, out)

    def by_library() -> None:
        for weight in dense:
            torch.mm(x, weight.t(), out=y)

    found.append(("bf16 library", 2 * out * columns, 0.0, by_library))
    for kind in kinds:
        first = made(kind, out, columns, 0)
        weights = [first] + [made(kind, out, columns, seed) for seed in range(1, _copies(first.nbytes))]
        ways: list[tuple[str, Callable[[PackedWeight], None]]]
        ways = [(kind, lambda w: packed_linear(x, w, None, y))]
        hows, chosen = divisions(x, first) if tilings else ([], None)
        for how in hows:
            ways.append((f"{kind}, {described(how)}{' (chosen)' if how == chosen else ''}", _by(how, x, y)))
        for name, way in ways:
            y.fill_(float("nan"))
            way(first)
            error = relative_error(y, x, first)

            def step(way: Callable[[PackedWeight], None] = way, weights: list[PackedWeight] = weights) -> None:
                for weight in weights:
                    way(weight)

            found.append((name, first.nbytes, error, step))
    for name in peers:
        size = out * columns // 2 + out * columns // GROUP * 4
        try:
            layers = PEERS[name](out, columns, _copies(size))

            def run(layers: list[Callable[[Tensor], Tensor]] = layers) -> None:
                for layer in layers:
                    layer(x)

            run()
        except Exception as problem:  # a library that does not work here is named
            print(f"{name}: {type(problem).__name__}: {str(problem)[:200]}", file=sys.stderr, flush=True)
            continue
        found.append((name, size, 0.0, run))
    return found


def _by(how: launch.Tiling, x: Tensor, y: Tensor) -> Callable[[PackedWeight], None]:
    return lambda weight: launch.fused(x, weight, None, y, how)


def _copies(size: int) -> int:
    return max(2, -(-ROTATE_BYTES // size))


def report(rows: list[Row], run: str, bandwidth: float) -> str:
    """What ran where and when, then the table."""
    about = (
        f"{run}. Copy bandwidth {bandwidth / 1e9:,.0f} GB/s; medians of {REPEATS} graph replays in turn; bf16 inputs."
    )
    return f"# Products with packed weights\n\n{about}\n\n{table(HEADER, [row.cells() for row in rows])}\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="6144x4096,4096x4096,28672x4096,4096x14336")
    parser.add_argument("--rows", default="1,4,8,16")
    parser.add_argument("--kinds", default="int4,int8,fp8,fp4")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--tilings", action="store_true", help="time other divisions of the work, too")
    output_options(parser)
    args = parser.parse_args(argv)
    if args.tilings and not runs_ptx(DEVICE):
        parser.error("--tilings needs an NVIDIA GPU: the kernel that it divides runs nowhere else")
    bandwidth, run, found = copy_bandwidth(DEVICE), provenance(sys.argv, DEVICE, [torch, triton]), list[Row]()
    print(report(found, run, bandwidth), end="", flush=True)
    for shape in args.shapes.split(","):
        out, columns = map(int, shape.split("x"))
        for rows in map(int, args.rows.split(",")):
            peers = [name for name in args.peers.split(",") if name]
            some = candidates(args.kinds.split(","), peers, out, columns, rows, args.tilings)
            right = [one for one in some if one[2] < 4e-3]
            for name, _, error, _ in some:
                if error >= 4e-3 or error != error:
                    print(f"{shape}, {rows} rows, {name}: relative error {error:.1e}, not timed", file=sys.stderr)
            graphs = [recorded(step) for *_, step in right]
            for (name, size, error, _), total in zip(right, in_turn(graphs, REPEATS), strict=True):
                each = total / _copies(size)
                rate = size / each * 1e-3
                found.append(Row(shape, rows, name, each, rate, rate * 1e9 / bandwidth, error))
                print(table_line(found[-1].cells()), flush=True)
            save(found, report(found, run, bandwidth), args.json, args.markdown)
            del some, right, graphs
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
