"""Measure what a step gains where products do what is around them: `octo_run.kernels.linear.around.WAYS`.

    python scripts/bench_folds.py [--shape llama-3.1-8b] [--weights bf16,int4] [--kv oct3] [--markdown FILE]
                                  [--json FILE]

For each format of weights a line with none of the ways, one for each that such weights know, added to those before it,
and the first one again. Tokens/s of single sequences at depth 0, the mean of --rounds of 64 steps. "logits" is the
largest difference of a step's logits from those with none, divided by their spread: rounding alone differs.
"""

import argparse
import sys
from dataclasses import dataclass

import torch
import triton
from bench_report import output_options, provenance, save, table

from octo_run.engine import Engine, benchmark
from octo_run.engine.shapes import SHAPES
from octo_run.kernels.linear.around import WAYS, taken_in


@dataclass(frozen=True)
class Row:
    """Tokens per second of a format of weights with some ways, and how far its logits are from those without."""

    weights: str
    ways: list[str]
    batch: int
    tokens_per_s: float
    gain: float
    logits: float


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", help=f"a configuration, or one of {', '.join(SHAPES)}")
    parser.add_argument("--weights", default="bf16,int4")
    parser.add_argument("--kv", default="oct3")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", default="1", help="sequences of a step, several with commas")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    output_options(parser)
    return parser.parse_args()


def of_weights(weights: str) -> list[str]:
    """The ways that products with such weights know, in the order in which they are added."""
    kind = "vector" if weights in ("bf16", "auto") else "packed"
    return [way for way in WAYS if way.startswith(kind) and way.endswith("sum")] + [
        way for way in WAYS if (way.startswith(kind) and not way.endswith("sum")) or way == "later"
    ]


def measured(args: argparse.Namespace, weights: str, ways: list[str], batch: int) -> tuple[float, torch.Tensor]:
    """Tokens per second, and the logits of one step behind 40 tokens."""
    taken_in.clear()
    taken_in.update(ways)
    with Engine.load(
        args.shape, kv=args.kv, device=args.device, random_weights=args.shape, max_context=1024, sequences=batch,
        weights=weights,
    ) as engine:  # fmt: skip
        engine.end_ids = frozenset()
        found = benchmark.measure(
            engine, ("tg", args.steps), depth=0, batch=batch, repetitions=args.rounds, bandwidth=1.0
        )
        logits = engine.logits([3 + i for i in range(40)], step=1)[-1].float().cpu()
    taken_in.clear()
    return found.tokens_per_s, logits


def main() -> None:
    args = arguments()
    rows: list[Row] = []
    run = provenance(sys.argv, torch.device(args.device), [torch, triton])
    for weights in args.weights.split(","):
        for batch in map(int, args.batches.split(",")):
            first: tuple[float, torch.Tensor] | None = None
            known = of_weights(weights)
            for ways in [known[:count] for count in range(len(known) + 1)] + [[]]:
                speed, logits = measured(args, weights, ways, batch)
                first = first or (speed, logits)
                far = float((logits - first[1]).abs().max() / first[1].std())
                rows.append(Row(weights, ways, batch, speed, speed / first[0] - 1, far))
                lines = [
                    (r.weights, f"{r.batch}", " + ".join(r.ways) or "none", f"{r.tokens_per_s:,.1f}",
                     f"{100 * r.gain:+.1f} %", f"{r.logits:.1e}") for r in rows
                ]  # fmt: skip
                text = (
                    f"# What products do beside multiplying\n\n{run}. Shape `{args.shape}`, random weights, "
                    f"`{args.kv}`, {args.steps} steps, {args.rounds} rounds.\n\n"
                    + table(["weights", "batch", "in the products", "tokens/s", "gain", "logits"], lines)
                    + "\n"
                )
                save(rows, text, args.json, args.markdown)
                print(lines[-1], flush=True)
    print(text)


if __name__ == "__main__":
    main()
