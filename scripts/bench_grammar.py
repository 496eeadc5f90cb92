"""Measure what a grammar costs a decode step: how long the device waits for masks, and what a step takes more.

    python scripts/bench_grammar.py --tokenizer FOLDER [--shape llama-3.1-8b] [--kv oct3] [--batches 1,8,32]
        [--grammars json,regex,lark] [--json FILE] [--markdown FILE]

Weights and prompts are random; the folder has a real tokenizer. A shape with fewer tokens than that gets as many.
Rounds without and with a grammar take turns, at temperature 1. A step draws a token for each sequence; as in
`Engine.generate_batch` the next one is launched before its tokens are read. Prompts are read before the clock starts.
No grammar here can end within --tokens tokens, and nothing ends an answer without one, so both have as many steps.
Every guided answer is checked; nothing is reported of one that its grammar does not allow.

One more round of each case measures directly. The wait of a step begins when its logits are there and ends when the
masks of all sequences are on the device, measured by the device's own events (on a CPU, where nothing runs beside,
all that masks take is waiting). A mask is the time of the processor that finds out which tokens may come next.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import llguidance
import torch
import triton
from bench_report import output_options, provenance, table
from torch import Tensor

from octo_run.engine import Engine, SamplingParams
from octo_run.engine.benchmark import ordinary_ids, wait
from octo_run.engine.grammar import Grammar, Guide
from octo_run.engine.random_model import read_shape
from octo_run.engine.sequence import Sequence as Held
from octo_run.engine.shapes import SHAPES
from octo_run.engine.step import Stepper
from octo_run.errors import OctoError
from octo_run.tokenizer import load_tokenizer

HEADER = ("grammar", "sequences", "free, ms a step", "guided, ms a step", "more", "wait, ms", "99 %", "of a free step",
          "a mask, us", "99 %", "masks of a step, ms")  # fmt: skip
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 16},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
LARK = r"""
start: entry{%d}
entry: NAME "=" value ";\n"
value: NUMBER | TEXT | "[" value ("," value)* "]"
NAME: /[a-z]{1,8}/
NUMBER: /[0-9]{1,9}/
TEXT: /"[^"\n]{0,40}"/
"""
#: Grammars of so many things at least, each of a token or more.
GRAMMARS: dict[str, Callable[[int], Grammar]] = {
    "json": lambda count: Grammar("json", json.dumps({"type": "array", "items": PERSON, "minItems": count})),
    "regex": lambda count: Grammar("regex", f"([a-z]{{1,9}} ){{{count}}}end"),
    "lark": lambda count: Grammar("lark", LARK % count),
}


@dataclass(frozen=True)
class Row:
    """One grammar and so many sequences at a time.

    Attributes:
        free_ms, guided_ms: Of a step without and with the grammar, the medians of the rounds.
        more_percent: What a guided step takes more, of a free one.
        wait_ms, wait_99_ms: Of a guided step for its masks: the mean, and what 99 % of the steps stay below.
        wait_percent: The mean, of a free step.
        mask_us, mask_99_us: Of one mask: the median, and what 99 % stay below.
        masks_ms: Of all masks of a step, one after the other, and of handing them to the device: the mean.
    """

    grammar: str
    sequences: int
    free_ms: float
    guided_ms: float
    more_percent: float
    wait_ms: float
    wait_99_ms: float
    wait_percent: float
    mask_us: float
    mask_99_us: float
    masks_ms: float

    def cells(self) -> list[str]:
        """The row as `HEADER` has it."""
        return [self.grammar, f"{self.sequences}", f"{self.free_ms:.3f}", f"{self.guided_ms:.3f}",
                f"{self.more_percent:+.1f} %", f"{self.wait_ms:.3f}", f"{self.wait_99_ms:.3f}",
                f"{self.wait_percent:.1f} %", f"{self.mask_us:.0f}", f"{self.mask_99_us:.0f}",
                f"{self.masks_ms:.3f}"]  # fmt: skip


@dataclass
class Watch:
    """What guided steps waited for, in milliseconds, and what each mask took, in seconds."""

    device: torch.device
    waits: list[float] = field(default_factory=list)
    masks: list[float] = field(default_factory=list)
    of_steps: list[float] = field(default_factory=list)

    @contextmanager
    def on(self, step: Stepper) -> Iterator[None]:
        """Watch the steps inside the block."""
        follow, allow, fill = step._follow, step._allow, Guide.fill
        marks = list[tuple[Any, Any]]()
        logits: Any = None  # that the logits of a step are there

        def watched_follow(sequences: list[Held]) -> None:
            nonlocal logits
            logits = self._mark()
            follow(sequences)

        def watched_allow(sequences: list[Held]) -> None:
            nonlocal logits
            begun = time.perf_counter()
            allow(sequences)
            if logits is not None:  # else it is for the first token, which no step draws
                self.of_steps.append(time.perf_counter() - begun)
                marks.append((logits, self._mark()))
                logits = None

        def watched_fill(guide: Guide, bits: Tensor) -> None:
            begun = time.perf_counter()
            fill(guide, bits)
            self.masks.append(time.perf_counter() - begun)

        step._follow, step._allow = watched_follow, watched_allow  # type: ignore[method-assign]
        Guide.fill = watched_fill  # type: ignore[method-assign]
        try:
            yield
        finally:
            step._follow, step._allow = follow, allow  # type: ignore[method-assign]
            Guide.fill = fill  # type: ignore[method-assign]
        wait(self.device)
        self.waits += [self._between(first, last) for first, last in marks]

    def _mark(self) -> Any:
        """The time when the device has done what it was given so far."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, first: Any, last: Any) -> float:
        return float(first.elapsed_time(last) if self.device.type == "cuda" else 1e3 * (last - first))


def below(values: Sequence[float], share: float = 0.99) -> float:
    """What this share of the values stays below."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def row_of(grammar: str, sequences: int, free: list[float], guided: list[float], watch: Watch) -> Row:
    """Of the milliseconds of a step in each round, and of the round that was watched."""
    without, beside, waited = statistics.median(free), statistics.median(guided), statistics.mean(watch.waits)
    return Row(
        grammar=grammar,
        sequences=sequences,
        free_ms=without,
        guided_ms=beside,
        more_percent=100 * (beside - without) / without,
        wait_ms=waited,
        wait_99_ms=below(watch.waits),
        wait_percent=100 * waited / without,
        mask_us=1e6 * statistics.median(watch.masks),
        mask_99_us=1e6 * below(watch.masks),
        masks_ms=1e3 * statistics.mean(watch.of_steps),
    )


class Bench:
    """An engine of random weights with a real tokenizer."""

    def __init__(self, args: argparse.Namespace) -> None:
        tokenizer, shape = load_tokenizer(args.tokenizer), read_shape(args.shape)
        if shape.vocab_size < tokenizer.vocab_size:
            shape = replace(shape, vocab_size=-(-tokenizer.vocab_size // 64) * 64)
        self.engine = Engine.load(
            args.shape, kv=args.kv, device=args.device, weights=args.weights, random_weights=shape,
            max_context=args.prompt_tokens + args.tokens, sequences=max(args.batches),
        )  # fmt: skip
        self.ends = frozenset(tokenizer.eos_ids)
        self.engine.step.guide = self.guide = lambda grammar, *seen: Guide(grammar, tokenizer, self.ends, *seen)
        self.tokens, self.rounds, self.prompt_tokens = args.tokens, args.rounds, args.prompt_tokens
        self._ordinary = ordinary_ids(self.engine)

    def round(self, grammar: Grammar | None, batch: int, seed: int) -> tuple[float, list[list[int]]]:
        """Milliseconds of a step, and the answers, one of ``tokens`` tokens for each sequence."""
        engine, source = self.engine, random.Random(seed)
        sequences = [engine.sequence() for _ in range(batch)]
        try:
            for number, sequence in enumerate(sequences):
                ids = source.choices(self._ordinary, k=self.prompt_tokens)
                params = SamplingParams(temperature=1.0, seed=1000 * seed + number, grammar=grammar)
                hidden = engine.feed(sequence, ids)
                engine.step.begin(sequence, params, ids)
                engine.step.first([sequence], hidden)
            answers = [[engine.step.read(sequence)[0]] for sequence in sequences]
            wait(engine.device)
            begun, steps, launched = time.perf_counter(), self.tokens - 1, 0
            for _ in range(steps):
                while launched < steps and len(sequences[0].unread) < engine.depth:
                    engine.step.launch(sequences)
                    launched += 1
                for answer, sequence in zip(answers, sequences, strict=True):
                    answer.append(engine.step.read(sequence)[0])
            wait(engine.device)
            return 1e3 * (time.perf_counter() - begun) / steps, answers
        finally:
            for sequence in sequences:
                sequence.discard()

    def check(self, grammar: Grammar, answers: list[list[int]]) -> None:
        """Follow answers on the host alone.

        Raises:
            OctoError: One that the grammar does not allow, or that it let end.
        """
        for answer in answers:
            guide = self.guide(grammar)
            bits = torch.zeros(-(-self.engine.config.vocab_size // 32), dtype=torch.int32)
            for place, token in enumerate(answer):
                guide.fill(bits)
                if token in self.ends or not int(bits[token // 32]) >> token % 32 & 1:
                    raise OctoError(f"The token {token} in place {place} is none that the grammar allows or wanted.")
                guide.advance(token)

    def measure(self, name: str, batch: int) -> Row:
        """One row.

        Raises:
            OctoError: A guided answer is wrong.
        """
        grammar, watch = GRAMMARS[name](self.tokens), Watch(self.engine.device)
        self.round(None, batch, 0)  # compiles, and records steps
        self.round(grammar, batch, 0)
        free, guided = list[float](), list[float]()
        for seed in range(1, self.rounds + 1):
            free.append(self.round(None, batch, seed)[0])
            took, answers = self.round(grammar, batch, seed)
            guided.append(took)
            self.check(grammar, answers)
        with watch.on(self.engine.step):
            self.round(grammar, batch, self.rounds + 1)
        return row_of(name, batch, free, guided, watch)


def save(args: argparse.Namespace, run: str, vocabulary: int, rows: list[Row]) -> None:
    """Write the files that were asked for, with the rows so far."""
    settings = {name: getattr(args, name) for name in ("shape", "kv", "weights", "prompt_tokens", "tokens", "rounds")}
    if args.json is not None:
        plain = {"run": run, **settings, "vocabulary": vocabulary, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    if args.markdown is not None:
        text = (
            f"# What a grammar costs a step\n\n{run}. Shape `{args.shape}`, {vocabulary:,} tokens, random weights, "
            f"{args.kv}; {args.tokens} tokens behind {args.prompt_tokens}, medians of {args.rounds} rounds in turns. "
            "The wait is what the device waits for the masks of a step; of one mask and of all masks of a step it is "
            f"said what they take the host.\n\n{table(HEADER, [row.cells() for row in rows])}\n"
        )
        args.markdown.write_text(text, encoding="utf-8")


def counts(text: str) -> list[int]:
    """Positive integers, with commas between them."""
    words = text.split(",")
    if wrong := [word for word in words if not word.isdecimal() or int(word) < 1]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is no number of at least 1")
    return [int(word) for word in words]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with the files of a tokenizer")
    parser.add_argument("--shape", default="llama-3.1-8b", help=f"a configuration, or one of {', '.join(SHAPES)}")
    parser.add_argument("--kv", default="oct3")
    parser.add_argument("--weights", help="what the layers' matrices are stored as (see Engine.load)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--grammars", default=",".join(GRAMMARS))
    parser.add_argument("--batches", type=counts, default=[1, 8, 32],
                        help="numbers of sequences that decode together (1,8,32)")  # fmt: skip
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    output_options(parser)
    args = parser.parse_args()
    if unknown := set(args.grammars.split(",")) - GRAMMARS.keys():
        parser.error(f"there is no grammar {', '.join(sorted(unknown))}; the grammars are {', '.join(GRAMMARS)}")
    if args.tokens < 2 or args.prompt_tokens < 1 or args.rounds < 1:
        parser.error("give 2 tokens or more, behind 1 or more, and 1 round or more")
    return args


def main() -> int:
    args = arguments()
    try:
        bench, rows = Bench(args), list[Row]()
        engine = bench.engine
        run = provenance(sys.argv, engine.device, [torch, triton, llguidance])
        print(f"{run}. {args.shape}, {engine.config.vocab_size:,} tokens, {args.kv}\n\n{table(HEADER, [])}", flush=True)
        for batch in args.batches:
            for name in args.grammars.split(","):
                rows.append(bench.measure(name, batch))
                print(f"| {' | '.join(rows[-1].cells())} |", flush=True)
                save(args, run, engine.config.vocab_size, rows)
    except OctoError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
