"""Compare Engine.generate_batch with the same prompts answered one after the other.

    python scripts/bench_batch.py [--shape llama-3.1-8b] [--kv oct3] [--prompts 64] [--markdown FILE] [--json FILE]

The weights and the prompts are random, no prompt begins like another one, and no token ends an answer. Compiling and
recording are not timed: both ways run once before. Answers one after the other are measured on the first --alone
prompts; a rate does not need more. Tokens per second are generated tokens, the reading of the prompts included.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from bench_report import output_options, provenance, save, table

from octo_run.engine import Engine, SamplingParams
from octo_run.engine.shapes import SHAPES


@dataclass(frozen=True)
class Row:
    """One way of answering: how many prompts, how long it took, and tokens generated per second."""

    way: str
    kv: str
    prompts: int
    seconds: float
    tokens_per_s: float


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", help=f"a configuration, or one of {', '.join(SHAPES)}")
    parser.add_argument("--kv", default="oct3")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--alone", type=int, default=8, help="prompts that are answered one after the other")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    output_options(parser)
    return parser.parse_args()


def timed(work: Callable[[list[list[int]]], int], rounds: list[list[list[int]]], tokens: int) -> float:
    """The shortest time in seconds of the rounds; the first is not counted.

    Args:
        tokens: How many a round generates for each of its prompts.
    """
    best = float("inf")
    for number, prompts in enumerate(rounds):
        begun = time.perf_counter()
        made = work(prompts)
        if number:
            best = min(best, time.perf_counter() - begun)
        assert made == tokens * len(prompts), made
    return best


def main() -> None:
    args = arguments()
    context = args.prompt_tokens + args.tokens
    engine = Engine.load(
        args.shape,
        kv=args.kv,
        device=args.device,
        random_weights=args.shape,
        max_context=context,
        sequences=args.prompts,
    )
    engine.end_ids = frozenset()
    params = SamplingParams(temperature=0.0, max_tokens=args.tokens)
    generator = torch.Generator().manual_seed(0)

    def prompts(count: int) -> list[list[list[int]]]:
        shape = (args.rounds + 1, count, args.prompt_tokens)
        ids: list[list[list[int]]] = torch.randint(0, engine.config.vocab_size, shape, generator=generator).tolist()
        return ids

    def alone(given: list[list[int]]) -> int:
        return sum(len(list(engine.generate(prompt, params))) for prompt in given)

    def together(given: list[list[int]]) -> int:
        return sum(len(done.ids) for done in engine.generate_batch(given, params))

    rows: list[Row] = []
    run = provenance(sys.argv, engine.device, [torch, triton])
    for way, work, count in (("one after the other", alone, args.alone), ("generate_batch", together, args.prompts)):
        seconds = timed(work, prompts(count), args.tokens)
        rows.append(Row(way, args.kv, count, seconds, count * args.tokens / seconds))
        lines = [(r.way, r.kv, f"{r.prompts}", f"{r.seconds:.2f}", f"{r.tokens_per_s:,.0f}",
                  f"{r.tokens_per_s / rows[0].tokens_per_s:.1f}") for r in rows]  # fmt: skip
        text = (
            f"# Many prompts at once\n\n{run}. Shape `{args.shape}`, random weights, {args.prompt_tokens} tokens in, "
            f"{args.tokens} out; the best of {args.rounds} rounds, reading included.\n\n"
            + table(["way", "kv", "prompts", "seconds", "tokens/s", "times"], lines)
            + "\n"
        )
        save(rows, text, args.json, args.markdown)
    print(text)


if __name__ == "__main__":
    main()
