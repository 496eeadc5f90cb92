"""What formats of weights do to perplexity, beside plain rounding to nearest: docs/results/weights-quality.md.

    python scripts/report_weights.py -o docs/results/weights-quality.md octo-demo=TEXT SmolLM2=FOLDER=TEXT

The tables go behind those that the file has. Every model reads its text with all formats in lockstep, and its table is
written anew after each window. Products are those of the dequantised matrices on a CPU: the same numbers, read faster.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from octo_run.engine import Engine
from octo_run.engine.evaluation.perplexity import Comparison, Row
from octo_run.models.linear import AnyLinear, Linear, PackedLinear
from octo_run.models.quantisation.schemes import SCHEMES, Scheme

#: The schemes that are shown: what ``--weights`` offers, and what it is measured against.
SHOWN = {
    "nearest-128": Scheme("nearest-128", "int4", 128),
    "nearest-64": Scheme("nearest-64", "int4", 64),
    "unweighted-64": Scheme("unweighted-64", "int4", 64, fitted=True),
    **{name: SCHEMES[name] for name in ("int4-128", "int4", "fp8", "int8")},
    "int4-experts": SCHEMES["int4"].in_files.experts,
}
MEANINGS = {
    "nearest-128": "4 bits, groups of 128, the range of a group, rounded to nearest",
    "nearest-64": "the same in groups of 64",
    "unweighted-64": "4 bits, groups of 64, scales of the least squared error of the weights",
    "int4-128": "4 bits, groups of 128, errors weighted by what columns are multiplied by",
    "int4": "the same in groups of 64",
    "fp8": "E4M3, a factor for each row",
    "int8": "8 bits, a factor for each row",
    "int4-experts": "what files of int4 have for experts: symmetric groups of 32, with a scale and no zero",
}
CONTEXT, STRIDE = 1024, 960
KVS = ("bf16", "oct4", "oct3", "oct2")
LABELS = [*KVS[1:], *(f"{name}/{kv}" for name in ("int8", "int4") for kv in KVS)]
LABELS += [f"{name}/bf16" for name in SHOWN if name not in ("int8", "int4", "int4-experts")]


def dense(linear: AnyLinear) -> AnyLinear:
    """The layer with its matrix dequantised."""
    if not isinstance(linear, PackedLinear):
        return linear
    return Linear(linear.weight.dequantised().to(torch.get_default_dtype()), linear.bias)


def load(model: str, label: str) -> Engine:
    """The engine of ``KV`` or ``WEIGHTS/KV``."""
    weights, _, kv = label.rpartition("/")
    engine = Engine.load(model, kv=kv, weights=SHOWN.get(weights), max_context=CONTEXT)
    if engine.device.type == "cpu":
        layers = engine.forward.decoder.layers
        layers[:] = [
            replace(
                layer,
                mixer=replace(layer.attention, qkv=dense(layer.attention.qkv), out=dense(layer.attention.out)),
                mlp=replace(layer.mlp, gate_up=dense(layer.mlp.gate_up), down=dense(layer.mlp.down)),
            )
            for layer in layers
        ]
    return engine


def measure(model: str, text: str, tokens: int, labels: list[str]) -> Iterator[list[Row]]:
    """All rows of a model, over the windows that are done, whenever there is one more of these."""
    with Engine.load(model, kv="bf16", max_context=CONTEXT) as engine:
        ids = engine.tokenizer.encode(text)[:tokens]
    comparison, done = Comparison(lambda label: load(model, label), labels, [ids], stride=STRIDE), 0
    for _ in comparison.run():
        rows = comparison.rows()
        if (now := sum(row.tokens for row in rows)) != done:
            done = now
            yield rows
    yield comparison.rows()


def place(row: Row) -> tuple[int, int]:
    """By weights, the best first, then by the cache."""
    weights, _, kv = row.kv.rpartition("/")
    return -1 if not weights else [*SHOWN][::-1].index(weights), KVS.index(kv) if kv in KVS else len(KVS)


def table(name: str, source: str, rows: list[Row]) -> str:
    """The rows of a model in Markdown."""
    found = {row.kv: row for row in rows}
    base = found.get("nearest-128/bf16")
    part = " (not all)" if any(row.partial for row in rows) else ""
    lines = [
        f"## {name}",
        f"{rows[0].tokens:,} tokens of `{source}` scored{part}, windows of {CONTEXT} tokens {STRIDE} apart.",
        "| weights | KV cache | perplexity | change % | ± | by the cache % | share of nearest-128's loss | KL mean "
        "| top-1 % |\n|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=place):
        weights, _, kv = row.kv.rpartition("/")
        share = f"{100 * row.delta_percent / base.delta_percent:.0f} %" if base and weights else "-"
        plain = found.get(f"{weights}/bf16" if weights else "bf16")
        by_cache = "-" if kv == "bf16" or plain is None else f"{100 * (row.perplexity / plain.perplexity - 1):+.2f}"
        lines[-1] += (
            f"\n| {weights or 'bf16'} | {kv} | {row.perplexity:.3f} | {row.delta_percent:+.2f} | "
            f"{row.delta_stderr or 0:.2f} | {by_cache} | {share} | {row.kl_mean:.4f} | {100 * row.top1_agreement:.1f} |"
        )
    return "\n\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What formats of weights do to perplexity.")
    parser.add_argument("models", nargs="+", metavar="NAME[=MODEL]=TEXT")
    parser.add_argument("--tokens", type=int, default=20_600, help="of each text")
    parser.add_argument(
        "--formats", default=",".join(LABELS), metavar="KV|WEIGHTS/KV,...", help="[default: %(default)s]"
    )
    parser.add_argument("--output", "-o", type=Path, required=True)
    args = parser.parse_args()
    meanings = "\n".join(f"- {name}: {what}" for name, what in MEANINGS.items())
    head = [
        "# Quality of quantised weights",
        "Perplexity with each format of weights, against weights and cache in full precision; ± is one standard error, "
        "paired by token. By the cache: against the same weights with a bf16 cache. KL: mean divergence of the "
        "next-token distribution, in nats.",
        meanings,
    ]
    for item in args.models:
        name, *model, text = item.split("=")
        folder = model[0] if model else name
        options = f" --formats {args.formats}" if args.formats != ",".join(LABELS) else ""
        wanted = shlex.quote(f"{name}{'=MODEL' if model else ''}=TEXT")
        command = f"python scripts/report_weights.py --tokens {args.tokens}{options} {wanted}"
        device = "a CPU" if not torch.cuda.is_available() else torch.cuda.get_device_name()
        made = f"`{command}`, torch {torch.__version__} on {device}, {datetime.date.today()}."
        before = args.output.read_text("utf-8").rstrip() if args.output.exists() else "\n\n".join(head)
        for rows in measure(folder, Path(text).read_text("utf-8"), args.tokens, args.formats.split(",")):
            args.output.write_text("\n\n".join([before, table(name, Path(text).name, rows), made]) + "\n", "utf-8")


if __name__ == "__main__":
    main()
