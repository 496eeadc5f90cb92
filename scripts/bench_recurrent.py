"""Times the kernels of Gated DeltaNet on a GPU: steps of batches, and chunks of a prompt.

Beside them it times flash-linear-attention's delta rule where that is installed.

    python scripts/bench_recurrent.py [--heads 16x32x128x128] [--batches 1,8,32] [--tokens 64,512,4096]
        [--json FILE] [--markdown FILE]

Heads are key heads x value heads x key dim x value dim, by default those of a 9B model. Each case is first compared
with the reference in float32; nothing is timed if one is wrong. Steps rotate over layers whose states are larger than
the L2 cache and are replayed from CUDA graphs. Ours has convolution, norms, gates and the output's norm in it;
flash-linear-attention's rule has not: it is given queries, keys, values, decays and strengths.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from bench_graphs import in_turn, recorded
from bench_report import output_options, provenance, save, table
from torch import Tensor

from octo_run.kernels import recurrent
from octo_run.kernels.recurrent import DeltaShape, DeltaWeights, LayerState, launch, reference

DEVICE, KIND, REPEATS, BOUND, ROTATE_BYTES = torch.device("cuda"), torch.bfloat16, 41, 3e-2, 2**28


@dataclass
class Row:
    """One case: microseconds of a layer.

    Attributes:
        gb_per_s: Bytes of the states, read and written, by time (steps alone).
        peer: Of flash-linear-attention's rule, None without it.
    """

    what: str
    count: int
    us: float
    gb_per_s: float | None
    peer: float | None
    error: float


class Layers:
    """Random weights and inputs of a shape, and the states of ``rows`` sequences in ``count`` layers."""

    def __init__(self, shape: DeltaShape, rows: int, count: int, tokens: int) -> None:
        torch.manual_seed(0)
        self.shape = shape
        self.weights = DeltaWeights(
            shape,
            (0.5 * torch.randn(shape.taps, shape.channels, device=DEVICE)).to(KIND),
            -torch.rand(shape.value_heads, device=DEVICE),
            torch.randn(shape.value_heads, device=DEVICE),
            torch.ones(shape.value_dim, device=DEVICE, dtype=KIND),
            1e-6,
        )
        memory = shape.value_heads, shape.key_dim, shape.value_dim
        self.states = [
            LayerState(
                torch.zeros(rows, shape.taps, shape.channels, device=DEVICE, dtype=KIND),
                torch.zeros(rows, *memory, device=DEVICE),
            )
            for _ in range(count)
        ]
        self.projected = torch.randn(tokens, shape.channels + shape.values, device=DEVICE).to(KIND)
        self.gates = torch.randn(tokens, 2 * shape.value_heads, device=DEVICE).to(KIND)
        self.out = torch.full((tokens, shape.values), torch.nan, device=DEVICE, dtype=KIND)
        self.scratch = torch.empty(recurrent.scratch_bytes(shape, tokens, 2), dtype=torch.uint8, device=DEVICE)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The relative error; infinite for NaN, which no comparison of errors finds."""
    error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
    return error if error == error else math.inf


def time_step(shape: DeltaShape, batch: int) -> Row:
    """A step of ``batch`` sequences."""
    state = 2 * 4 * shape.value_heads * shape.key_dim * shape.value_dim * batch
    on = Layers(shape, batch, ROTATE_BYTES // state + 1, batch)
    rows = torch.randperm(batch, device=DEVICE).to(torch.int32)
    positions = torch.full((batch,), 9, dtype=torch.int32, device=DEVICE)
    same = LayerState(on.states[0].conv.clone(), on.states[0].memory.clone())
    want = torch.empty_like(on.out)
    reference.step(on.projected, on.gates, on.weights, same, positions, rows, want)
    launch.step(on.projected, on.gates, on.weights, on.states[0], positions, rows, on.out)
    error = max(relative(on.out, want), relative(on.states[0].memory, same.memory))

    def ours() -> None:
        for layer in on.states:
            launch.step(on.projected, on.gates, on.weights, layer, positions, rows, on.out)

    (us,) = (time / len(on.states) for time in in_turn([recorded(ours)], REPEATS))
    return Row("step", batch, us, state / us / 1e3, None, error)


def time_chunk(shape: DeltaShape, tokens: int) -> Row:
    """A chunk of a prompt."""
    on = Layers(shape, 1, 1, tokens)
    want, same = torch.empty_like(on.out), LayerState(on.states[0].conv.clone(), on.states[0].memory.clone())
    reference.chunk(on.projected, on.gates, on.weights, same, 0, 0, want)
    launch.chunk(on.projected, on.gates, on.weights, on.states[0], 0, 0, on.out, on.scratch)
    error = max(relative(on.out, want), relative(on.states[0].memory, same.memory))

    def ours() -> None:
        launch.chunk(on.projected, on.gates, on.weights, on.states[0], 0, 64, on.out, on.scratch)

    graphs = [recorded(ours)]
    peer = peer_chunk(shape, tokens)
    if peer is not None:
        graphs.append(recorded(peer))
    times = in_turn(graphs, REPEATS)
    return Row("chunk", tokens, times[0], None, times[1] if len(times) > 1 else None, error)


def peer_chunk(shape: DeltaShape, tokens: int) -> Callable[[], object] | None:
    """flash-linear-attention's rule for such a chunk."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # type: ignore[import-not-found]
    except ImportError:
        return None
    q, k = (torch.randn(1, tokens, shape.value_heads, shape.key_dim, device=DEVICE).to(KIND) for _ in range(2))
    v = torch.randn(1, tokens, shape.value_heads, shape.value_dim, device=DEVICE).to(KIND)
    beta = torch.rand(1, tokens, shape.value_heads, device=DEVICE).to(KIND)
    start = torch.zeros(1, shape.value_heads, shape.key_dim, shape.value_dim, device=DEVICE)

    @torch.inference_mode()
    def run() -> object:
        return chunk_gated_delta_rule(
            q, k, v, -beta.float(), beta, initial_state=start, output_final_state=True, use_qk_l2norm_in_kernel=True
        )

    return run


def report(rows: list[Row], run: str) -> str:
    """What ran where and when, then the table."""
    header = ["what", "sequences or tokens", "us a layer", "GB/s of states", "flash-linear-attention, us", "error"]
    cells = [
        (r.what, f"{r.count:,}", f"{r.us:.1f}", "" if r.gb_per_s is None else f"{r.gb_per_s:,.0f}",
         "" if r.peer is None else f"{r.peer:.1f}", f"{r.error:.1e}")
        for r in rows
    ]  # fmt: skip
    about = f"{run}. bf16, medians of {REPEATS} graph replays; errors against the reference in PyTorch."
    return f"# Gated DeltaNet's kernels\n\n{about}\n\n{table(header, cells)}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", default="16x32x128x128")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--tokens", default="64,512,4096")
    output_options(parser)
    args = parser.parse_args()
    shape = DeltaShape(*(int(n) for n in args.heads.split("x")))
    run, rows = provenance(sys.argv, DEVICE, [torch, triton]), list[Row]()
    cases: list[tuple[Callable[[DeltaShape, int], Row], str]] = [(time_step, args.batches), (time_chunk, args.tokens)]
    for measure, counts in cases:
        for count in map(int, counts.split(",")):
            rows.append(measure(shape, count))
            if not rows[-1].error < BOUND:
                print(f"{rows[-1].what} of {count}: relative error {rows[-1].error:.2e}", file=sys.stderr)
                return 1
            save(rows, report(rows, run), args.json, args.markdown)
    print(report(rows, run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
