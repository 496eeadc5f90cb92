"""``octo-run bench``: how fast prompts are read and answers written, and what memory that takes."""

import random
import statistics
from typing import TYPE_CHECKING, Any

import click

from octo_run.cli import console, debug_option, runtime
from octo_run.cli.options import EngineOptions, engine_options
from octo_run.errors import UsageError

if TYPE_CHECKING:
    from octo_run.engine import Engine


@click.command("bench")
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of the prompt."
)
@click.option("--tokens", type=click.IntRange(min=2), default=128, show_default=True, help="Tokens to generate.")
@click.option("--depth", type=click.IntRange(min=0), default=0, show_default=True, help="Tokens in the cache before.")
@click.option("--repetitions", "-r", type=click.IntRange(min=1), default=5, show_default=True, help="Measured rounds.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@engine_options
@debug_option
def command(prompt_tokens: int, tokens: int, depth: int, repetitions: int, as_json: bool, load: EngineOptions) -> None:
    """Measure prompt and generation speed.

    One round that is not counted warms up; then every round puts --depth random tokens in the cache, reads
    --prompt-tokens new ones and generates --tokens greedily, whatever the model says. Shown are the median and the
    range over the rounds.
    """
    engine = runtime.load_engine(load)
    needed = depth + prompt_tokens + tokens
    if needed > engine.max_context:
        raise UsageError(
            f"--depth {depth} + --prompt-tokens {prompt_tokens} + --tokens {tokens} are {needed:,} tokens and the"
            f" context holds {engine.max_context:,}; choose less or raise --ctx."
        )
    report = measure(engine, load, prompt_tokens=prompt_tokens, tokens=tokens, depth=depth, repetitions=repetitions)
    if as_json:
        console.print_json(report)
    else:
        click.echo(_text(report))


def measure(
    engine: "Engine", load: EngineOptions, *, prompt_tokens: int, tokens: int, depth: int, repetitions: int
) -> dict[str, Any]:
    """Time ``repetitions`` rounds after one for warming up; rates are in tokens per second, memory in bytes."""
    engine.end_ids = frozenset()  # no token ends a measured answer early
    prompt_rates, generation_rates = [], []
    for number in range(repetitions + 1):
        prompt_rate, generation_rate = _round(engine, number, prompt_tokens, tokens, depth)
        if number:
            prompt_rates.append(prompt_rate)
            generation_rates.append(generation_rate)
    return {
        "model": load.model,
        "kv": load.kv,
        "device": _device_name(engine),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "depth": depth,
        "repetitions": repetitions,
        "prompt_tokens_per_second": _spread(prompt_rates),
        "generation_tokens_per_second": _spread(generation_rates),
        "memory_plan": engine.memory_plan(),
        "memory_now": engine.memory_now(),
    }


def _round(engine: "Engine", number: int, prompt_tokens: int, tokens: int, depth: int) -> tuple[float, float]:
    """One round on tokens of its own (no earlier round's prefix helps): tokens per second of prompt and answer."""
    source = random.Random(number)
    ordinary = [i for i in range(engine.config.vocab_size) if i not in engine.tokenizer.special_ids]
    ids = [ordinary[number % len(ordinary)], *source.choices(ordinary, k=depth + prompt_tokens - 1)]
    if depth:
        runtime.run_to_end(engine, ids[:depth], max_tokens=1)
    generation = runtime.run_to_end(engine, ids, max_tokens=tokens)
    fresh = generation.prompt_tokens - generation.reused_tokens
    return fresh / generation.prefill_seconds, (generation.generated_tokens - 1) / generation.decode_seconds


def _spread(rates: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(rates), 2),
        "least": round(min(rates), 2),
        "most": round(max(rates), 2),
    }


def _device_name(engine: "Engine") -> str:
    """The device with the name of the chip, so that a figure says where it was taken."""
    import torch

    if engine.device.type == "cuda":
        return f"{engine.device} ({torch.cuda.get_device_name(engine.device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


def _text(report: dict[str, Any]) -> str:
    rows = []
    for label, count, key in (("prompt", "prompt_tokens", "prompt"), ("generation", "tokens", "generation")):
        rates = report[f"{key}_tokens_per_second"]
        rows.append([label, f"{report[count]:,}", *(f"{rates[name]:,.1f}" for name in ("median", "least", "most"))])
    plan, now = report["memory_plan"], report["memory_now"]
    parts = [f"{label} {console.human_bytes(plan[key])}" for key, label in runtime.PLAN_PARTS.items()]
    actual = [f"{name.replace('_', ' ')} {console.human_bytes(size)}" for name, size in now.items()]
    return "\n".join(
        [
            f"{report['model']}, KV cache {report['kv']}, {report['dtype']} on {report['device']},"
            f" {report['repetitions']} rounds at depth {report['depth']:,}",
            console.table(["", "tokens", "median tokens/s", "least", "most"], rows),
            f"memory planned: {', '.join(parts)}, total {console.human_bytes(plan['total'])}",
            f"memory in use: {', '.join(actual)}",
        ]
    )
