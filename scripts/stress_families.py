"""What the KV formats do to the keys and values of each family of models, with what is known to make these hard.

    python scripts/stress_families.py --markdown docs/results/kv-families.md

Random weights say nothing of this, and the trained ones are gigabytes. So queries, keys and values of a layer are drawn
here, with the layer's own RoPE, head size, window and norms (`octo_run.engine.shapes`), and with what trained models of
the family are known for:

* large channels: a few weights of the norms of keys are `--scale` times the others. Either the queries' weights are as
  much smaller, so that these channels take precision and matter no more than others, or they are not, and the channels
  settle what is attended to;
* biases: keys have a common part of `--energy` times their other energy, in the slowest pairs;
* a massive first token: it takes 60 % of the attention on average over queries, most often by a key several times as
  long as others, and its value is small;
* logits of sinks, which take half of the attention;
* layers without RoPE, values that are what keys are made of, a window of 128. (Gemma's windows are as long as the
  texts here: of these layers it is the heads and the RoPE that is measured.)

A draw is no model. What it shows is whether an outlier of a kind and size harms, and which of the remedies bears it.
The statistics of conditioning are measured on another draw of as many tokens, as an engine measures them on another
text. What is coded for a query is what an engine has coded by then: all but the sinks, the window of 64 tokens and the
page that is being filled. Everything else is exact: float64.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from bench_report import provenance, save, table
from torch import Tensor

from octo_run.engine.plan import conditioning_kind
from octo_run.engine.sensitivity import SINK, WINDOW
from octo_run.engine.shapes import SHAPES
from octo_run.errors import OctoError, UsageError
from octo_run.kernels import PAGE_TOKENS as PAGE
from octo_run.kernels import AttentionSpec
from octo_run.kernels.codec import LayerFormats, get, parse_kv
from octo_run.models import rope
from octo_run.models.conditioning import observe, of_moments
from octo_run.models.config import CONDITIONINGS, ModelConfig, parse_config
from octo_run.models.plain_attention import hidden_keys, weights_of
from octo_run.models.specs import LayerSpec, layer_specs

FORMATS = ("oct2", "oct3", "oct4")
#: Of what is drawn: KV heads, query heads of each, features that keys and queries are made of, tokens of a topic, and
#: the spread of logits.
HEADS, GROUP, FEATURES, TOPIC, SPREAD = 2, 4, 64, 48, 3.0
#: Of the second half of a text so many-th queries are looked at. Figures are means over so many texts.
EVERY, TEXTS = 16, 3

_SIZES = {"vocab_size": 1024, "hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 65_536}
#: Of models without a shape of their own; only what attention is made of counts.
MORE: Mapping[str, dict[str, Any]] = {
    "smollm3-3b": {
        **_SIZES, "architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 4, "rope_theta": 5e6,
    },
    "command-r7b": {
        **_SIZES, "architectures": ["Cohere2ForCausalLM"], "num_hidden_layers": 32, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 5e4, "sliding_window": 4096,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A kind of layer with what makes it hard.

    Attributes:
        model: Of `SHAPES` or `MORE`.
        layer: Its number there.
        channels: Large channels of keys.
        meant: Queries are not small there.
        bias: Keys have a common part.
        first: The share of attention that the first token takes; 0: it is as the others are.
        sinks: The share that learned logits of sinks take.
        swept: It is also measured with channels of other sizes.
    """

    name: str
    model: str
    layer: int
    channels: int = 0
    meant: bool = False
    bias: bool = False
    first: float = 0.6
    sinks: float = 0.0
    swept: bool = False


CASES = (
    Case("Llama 3, a massive first token", "llama-3.1-8b", 0),
    Case("Qwen2.5, biases of keys", "qwen2.5-7b", 0, bias=True),
    Case("Qwen3, large channels of keys", "qwen3-30b-a3b", 0, channels=4, swept=True),
    Case("Qwen3, large channels that are meant", "qwen3-30b-a3b", 0, channels=4, meant=True, swept=True),
    Case("Qwen3.5, large channels, RoPE on a quarter", "qwen3.5-9b", 3, channels=4),
    Case("Gemma 3, window, large channels", "gemma-3-12b", 0, channels=4),
    Case("Gemma 3, whole context, large channels", "gemma-3-12b", 5, channels=4, swept=True),
    Case("Gemma 3, whole context, channels that are meant", "gemma-3-12b", 5, channels=4, meant=True),
    Case("Gemma 4, window, large channels", "gemma-4-12b", 0, channels=4),
    Case("Gemma 4, heads of 512, values are keys", "gemma-4-12b", 5, channels=4),
    Case("gpt-oss, window of 128, sinks, biases", "gpt-oss-20b", 0, bias=True, first=0.0, sinks=0.5),
    Case("gpt-oss, whole context, sinks, biases", "gpt-oss-20b", 1, bias=True, first=0.0, sinks=0.5),
    Case("SmolLM3, no RoPE, a common part", "smollm3-3b", 3, bias=True),
    Case("Command R7B, no RoPE, no sinks", "command-r7b", 3, first=0.0),
)


@dataclass(frozen=True)
class Row:
    """A measurement.

    Attributes:
        logits: Root mean square of the errors of logits, in nats, of what a query sees coded; what all have in common
            is left out, since the softmax does not see it.
        keys, values: Norm of the error of attention's result to the norm of the result, if keys, or values, are coded.
        stderr: Standard error of ``keys`` by the texts.
    """

    case: str
    kv: str
    conditioning: str
    sinks: int
    scale: float
    logits: float
    keys: float
    values: float
    stderr: float


@dataclass(frozen=True)
class Drawn:
    """Attention of a layer over a text, after RoPE, float64: ``q [n, heads, d]``, ``k`` and ``v [n, kv_heads, d]``."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Stressed:
    """A layer from which texts are drawn.

    Attributes:
        frequencies: Of RoPE, ``[d / 2]``.
        attention: Logits are products of queries and keys.
    """

    cfg: ModelConfig
    spec: LayerSpec
    case: Case
    frequencies: Tensor
    parts: Mapping[str, Tensor]
    attention: AttentionSpec

    @classmethod
    def make(cls, case: Case, scale: float, energy: float, tokens: int) -> "Stressed":
        """Choose all that is the same in every text, by the case's name alone."""
        cfg = config_of(case.model)
        spec = layer_specs(cfg)[case.layer]
        d, generator = spec.head_dim, torch.Generator().manual_seed(sum(map(ord, case.name)))

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        spectrum = torch.arange(1, FEATURES + 1, dtype=torch.float64) ** -0.5
        slow = 1 + 2 * torch.arange(d // 2, dtype=torch.float64) / (d // 2)  # what turns slowly carries more
        rows = torch.cat((slow, slow))[:, None]
        of_keys = normal(HEADS, d, FEATURES) * spectrum * rows
        parts = {
            "keys": of_keys,
            "queries": of_keys[:, None] + 0.5 * normal(HEADS, GROUP, d, FEATURES) * spectrum * rows,
            "values": normal(HEADS, d, FEATURES) * spectrum,
            "norm": torch.exp(0.2 * normal(d)),
            "query_norm": torch.exp(0.2 * normal(d)),
            "bias": torch.zeros(HEADS, d, dtype=torch.float64),
            "gain": torch.ones((), dtype=torch.float64),
        }
        places = torch.randperm(d, generator=generator)[: case.channels]
        parts["norm"][places] *= scale
        if not case.meant:
            parts["query_norm"][places] /= scale
        frequencies = rope.frequencies(spec.rope, d, torch.device("cpu"), cfg.context_limit)
        plain = cls(cfg, spec, case, frequencies, parts, replace(spec.attention, scale=1.0))
        return plain._calibrated(energy, tokens, normal(HEADS, d // 8))

    def _calibrated(self, energy: float, tokens: int, direction: Tensor) -> "Stressed":
        """With a bias of the asked energy, and logits of the asked spread."""
        if self.case.bias:
            k, d = self.draw(tokens, 0, first=False).k, self.spec.head_dim
            mu = torch.zeros(HEADS, 2, d // 2, dtype=torch.float64)
            mu[..., -(d // 8) :] = direction[:, None]
            mu = mu.flatten(1)
            size = (energy * k.square().sum(-1).mean(0)).sqrt()
            self.parts["bias"].copy_(mu / mu.norm(dim=-1, keepdim=True) * size[:, None])
        text = self.draw(tokens, 0, first=False)
        seen, logits = ~_hidden(self.attention, tokens), _logits(text.q, text.k)
        mean = torch.where(seen, logits, 0.0).sum(-1) / seen.sum(-1)
        spread = (torch.where(seen, logits - mean[..., None], 0.0).square().sum(-1) / seen.sum(-1)).sqrt()
        self.parts["gain"].copy_(SPREAD / spread.mean())
        if not self.case.sinks:
            return self
        share = torch.as_tensor(self.case.sinks, dtype=torch.float64)
        masked = (logits * self.parts["gain"]).masked_fill(~seen, -torch.inf)
        sinks = masked.logsumexp(-1).mean(-1).flatten() + share.logit()
        return replace(self, attention=replace(self.attention, sink_logits=sinks))

    def draw(self, tokens: int, seed: int, *, first: bool = True) -> Drawn:
        """A text.

        Args:
            first: With its massive first token, if the case has one.
        """
        generator, parts, spec = torch.Generator().manual_seed(seed), self.parts, self.spec

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        topics = normal(-(-tokens // TOPIC), FEATURES).repeat_interleave(TOPIC, 0)[:tokens]
        features = 0.6 * topics + 0.8 * normal(tokens, FEATURES)
        # What a query looks for is a token that it sees, most often a coded one.
        furthest = torch.arange(tokens).clamp(min=WINDOW + 1, max=spec.attention.window or tokens)
        back = WINDOW + (torch.rand(tokens, generator=generator) * (furthest - WINDOW)).long()
        wanted = 0.8 * features[(torch.arange(tokens) - back).clamp_min(0)] + 0.6 * normal(tokens, FEATURES)
        k = torch.einsum("hdf,nf->nhd", parts["keys"], features) + 0.3 * normal(tokens, HEADS, spec.head_dim)
        v = torch.einsum("hdf,nf->nhd", parts["values"], features) + 0.3 * normal(tokens, HEADS, spec.head_dim)
        q = torch.einsum("hgdf,nf->nhgd", parts["queries"], wanted)
        if spec.values_are_keys:
            v = k
        if spec.v_norm:
            v = _normed(v)
        if spec.qk_norm:
            k, q = _normed(k), _normed(q)
        k, q = k * parts["norm"] + parts["bias"], (q * parts["query_norm"] * parts["gain"]).flatten(1, 2)
        q, k = (self._turned(x) for x in (q, k))
        if first and self.case.first:
            k[0], v = self._massive(q, k), torch.cat((0.05 * v[:1], v[1:]))
        return Drawn(q, k, v)

    def _turned(self, x: Tensor) -> Tensor:
        angles = torch.arange(len(x), dtype=torch.float64)[:, None] * self.frequencies.to(torch.float64)
        return rope.apply(x[None], angles.cos()[None], angles.sin()[None])[0]

    def _massive(self, q: Tensor, k: Tensor) -> Tensor:
        """The first key ``[kv_heads, d]``: along what the queries of a head have in common, and as long as needed for
        its share of the attention. Queries are given what is lacking, since drawn ones have no common part."""
        slow = torch.zeros(self.spec.head_dim, dtype=torch.float64)
        slow[[self.spec.head_dim // 2 - 1, -1]] = 1.0  # the pair that turns least
        size = k.square().sum(-1).mean().sqrt()
        q += slow * (4.0 / size)  # makes 8 of a key of four times the usual length
        hidden = _hidden(replace(self.attention, window=None), len(q))[:, 1:]
        others = _logits(q, k[1:]).masked_fill(hidden, -torch.inf).logsumexp(-1)  # [kv_heads, G, queries]
        wanted = others.mean((1, 2)) + float(numpy.log(self.case.first / (1 - self.case.first)))
        along = (q[looked_at(len(q))].unflatten(1, (HEADS, -1)) * slow).sum(-1).mean((0, 2))
        return slow * (wanted / along)[:, None]


def config_of(model: str) -> ModelConfig:
    """The configuration of a shape."""
    return parse_config({**SHAPES, **MORE}[model], Path(f"{model}.json"))


def _normed(x: Tensor) -> Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt()


def looked_at(tokens: int) -> Tensor:
    """The queries that are looked at."""
    return torch.arange(tokens // 2, tokens, EVERY)


def _hidden(spec: AttentionSpec, tokens: int) -> Tensor:
    """Which keys they do not see: bool ``[queries, n]``."""
    return hidden_keys(spec, tokens, tokens, torch.device("cpu"))[looked_at(tokens)]


def _logits(q: Tensor, k: Tensor) -> Tensor:
    """Theirs, ``[kv_heads, G, queries, n]``."""
    queries = q[looked_at(len(q))].unflatten(1, (HEADS, -1)).permute(1, 2, 0, 3)
    found = queries.flatten(1, 2) @ k.permute(1, 2, 0)
    return found.unflatten(1, (GROUP, -1))


def measure(case: Case, *, tokens: int, scale: float, energy: float, sinks: Sequence[int]) -> Iterator[Row]:
    """Rows of a case: all formats and conditionings with so many sinks."""
    layer = Stressed.make(case, scale, energy, tokens)
    other, texts = layer.draw(tokens, 1), [layer.draw(tokens, 2 + number) for number in range(TEXTS)]
    angles = torch.arange(tokens, dtype=torch.float32)[:, None] * layer.frequencies
    _, moments = observe(*(x.float() for x in (other.q, other.k, other.v)), angles.cos(), angles.sin(), layer.attention)
    mean, shapes = of_moments([moments], layer.frequencies, layer.cfg.context_limit)
    means = layer._turned(mean.to(torch.float64).expand(tokens, -1, -1))
    for name in FORMATS:
        codec = get(name, layer.spec.head_dim)
        values = [codec.decode(codec.encode(text.v.float())).to(torch.float64) for text in texts]
        for kind in CONDITIONINGS:
            taken = means if kind != "off" else torch.zeros_like(means)
            a = shapes.to(torch.float64) if kind == "full" else torch.eye(layer.spec.head_dim, dtype=torch.float64)
            found: dict[int, list[tuple[float, float, float]]] = {}
            for text, v in zip(texts, values, strict=True):
                stored = ((text.k - taken).transpose(0, 1) @ a.mT).float()
                decoded = codec.decode(codec.encode(stored)).to(torch.float64)
                k = (decoded @ torch.linalg.inv(a).mT).transpose(0, 1) + taken
                for count in sinks if name == "oct3" else sinks[:1]:
                    found.setdefault(count, []).append(_errors(text, k, v, layer.attention, count))
            for count, each in found.items():
                figures = torch.tensor(each)
                spread = float(figures[:, 1].std() / len(each) ** 0.5)
                yield Row(case.name, name, kind, count, scale, *figures.mean(0).tolist(), spread)


def _errors(text: Drawn, k: Tensor, v: Tensor, spec: AttentionSpec, sinks: int) -> tuple[float, float, float]:
    """Of logits, and of results by coded keys and by coded values: see `Row`."""
    count = len(text.k)
    query, key = looked_at(count)[:, None], torch.arange(count)
    hidden = _hidden(spec, count)
    coded = (key >= sinks) & ((key - sinks) // PAGE < (query - sinks - WINDOW) // PAGE)
    exact, other = (_logits(text.q, x) for x in (text.k, k))
    mixed = torch.where(coded, other, exact)
    seen = coded & ~hidden
    error = torch.where(seen, mixed - exact, 0.0)
    common = error.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp_min(1)
    squares = torch.where(seen, error - common, 0.0).square().sum()
    logits = float((squares / (seen.sum() * HEADS * GROUP)).sqrt())

    def weights(x: Tensor) -> Tensor:
        return weights_of(x.flatten(0, 1).clone(), hidden, spec).view(x.shape)

    def result(of: Tensor, values: Tensor) -> Tensor:
        return of.flatten(1, 2) @ values.transpose(0, 1)

    own = weights(exact)
    right = result(own, text.v)
    by_keys = result(weights(mixed), text.v) - right
    by_values = result(own * coded, v - text.v)
    return logits, float(by_keys.norm() / right.norm()), float(by_values.norm() / right.norm())


def defaults() -> list[tuple[str, str, str, str, str]]:
    """What an engine does by default, for each family and kind of layers of `CASES`: the model, the kind, conditioning,
    sinks, and whether the layers are coded."""
    found = dict[tuple[str, str], tuple[str, str, str, str, str]]()
    for case in CASES:
        cfg = config_of(case.model)
        spec = layer_specs(cfg)[case.layer]
        kind = "window" if spec.attention.window is not None else "no RoPE" if spec.rope is None else "whole context"
        formats = LayerFormats.uniform(parse_kv("oct3", spec.head_dim), cfg.num_layers)
        row = (case.model, kind, conditioning_kind(formats, None), str(SINK), "yes" if formats.coded else "no")
        found.setdefault((case.model, kind), row)
    return list(found.values())


def report(rows: Sequence[Row], facts: str) -> str:
    """The page."""
    at = {(row.case, row.kv, row.conditioning, row.sinks, row.scale): row for row in rows}
    base = rows[0].scale

    def cell(value: float) -> str:
        return f"{100 * value:.2f}"

    def found(case: Case, kv: str, kind: str, sinks: int = SINK, scale: float = base) -> Row | None:
        return at.get((case.name, kv, kind, sinks, scale))

    header = ["layer", *(f"{kv} {kind}" for kv in FORMATS for kind in CONDITIONINGS)]
    logits, keys, values, sinks, sizes = [], [], [], [], []
    for case in CASES:
        cells = [found(case, kv, kind) for kv in FORMATS for kind in CONDITIONINGS]
        if all(one is not None for one in cells):
            logits.append([case.name, *(f"{one.logits:.3f}" for one in cells if one)])
            keys.append([case.name, *(cell(one.keys) for one in cells if one)])
            values.append([case.name, *(cell(one.values) for kv in FORMATS if (one := found(case, kv, "full")))])
        pair = [found(case, "oct3", kind, count) for kind in ("off", "full") for count in (SINK, 0)]
        sinks.append([case.name, *("" if one is None else cell(one.keys) for one in pair)])
        scales = sorted({row.scale for row in rows})
        if case.swept and len(scales) > 1:
            each = [found(case, "oct3", kind, SINK, scale) for scale in scales for kind in CONDITIONINGS]
            sizes.append([case.name, *("" if one is None else cell(one.keys) for one in each)])
    parts = [
        "# KV formats and what makes families hard", "", facts + ".", "", _words(__doc__), "",
        "## Errors of logits, in nats", "", table(header, logits), "",
        "## Errors of attention's results by coded keys, in per cent", "",
        f"Standard errors over the texts are {100 * _spread(rows):.0f} % of the figures (median).", "",
        table(header, keys), "",
        "## By coded values, in per cent", "", table(["layer", *FORMATS], values), "",
        f"## With and without the {SINK} sinks: results by coded keys, oct3, in per cent", "",
        table(["layer", *(f"{kind}, {count} sinks" for kind in ("off", "full") for count in (SINK, 0))], sinks), "",
    ]  # fmt: skip
    if sizes:
        names = [f"{scale:g} times, {kind}" for scale in sorted({row.scale for row in rows}) for kind in CONDITIONINGS]
        parts += ["## Larger and smaller channels: the same, oct3", "", table(["layer", *names], sizes), ""]
    parts += [
        "## Defaults", "", *_reasons(rows, base),
        table(["shape", "layers", "conditioning", "sinks", "coded"], map(list, defaults())), "",
    ]  # fmt: skip
    return "\n".join(parts)


def _reasons(rows: Sequence[Row], base: float) -> list[str]:
    """Why the defaults are what they are, with the figures that speak for it and against it."""
    kinds: dict[tuple[str, str, float], dict[str, Row]] = {}
    for row in rows:
        if row.sinks == SINK:
            kinds.setdefault((row.case, row.kv, row.scale), {})[row.conditioning] = row
    whole = [group for group in kinds.values() if len(group) == len(CONDITIONINGS)]
    least = sum(min(group.values(), key=lambda row: row.logits).conditioning == "full" for group in whole)
    worse = [
        group["full"].case for group in whole
        for best in [min((group["off"], group["mean"]), key=lambda row: row.keys)]
        if group["full"].keys - best.keys > 2 * (group["full"].stderr ** 2 + best.stderr**2) ** 0.5
    ]  # fmt: skip
    without = {(row.case, row.kv, row.conditioning): row.keys for row in rows if row.sinks == 0}
    shown = [row for row in rows if (row.kv, row.conditioning, row.sinks, row.scale) == ("oct3", "full", SINK, base)]
    first = [
        without[row.case, row.kv, row.conditioning] / row.keys
        for row in shown
        if (row.case, row.kv, row.conditioning) in without and _case(row).first
    ]

    def span(values: Sequence[float], unit: float = 100.0) -> str:
        return f"{unit * min(values):.1f} to {unit * max(values):.1f}" if values else "not measured"

    windows, others = ([row.keys for row in shown if ("window" in row.case) == kind] for kind in (True, False))
    return [
        "They are the same for all kinds of layers, since no kind is better off with others:", "",
        f"- **Conditioning is `full`.** Its errors of logits are the least in {least} of {len(whole)} comparisons; its",
        "  errors of results are above the better of the others by more than two standard errors in "
        f"{len(worse)}. Biases and",
        "  layers without RoPE need the mean, large channels the matrices. Where keys have nothing in common, a mean",
        "  changes nothing.",
        f"- **{SINK} sinks.** Without them errors of results by coded keys are {span(first, 1.0)} times as large where",
        "  a layer sees a massive first token. Where logits of sinks take its place, they change nothing.",
        f"- **All layers are coded.** With oct3, errors of results by coded keys are {span(windows)} % in layers with",
        f"  a window and {span(others)} % in the others: no kind of layers stands out.", "",
    ]  # fmt: skip


def _case(row: Row) -> Case:
    return next(case for case in CASES if case.name == row.case)


def _spread(rows: Sequence[Row]) -> float:
    return float(torch.tensor([row.stderr / row.keys for row in rows]).median())


def _words(text: str | None) -> str:
    """The description without its command."""
    paragraphs = (text or "").strip().split("\n\n")
    return "\n\n".join(part for part in paragraphs[2:])


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit code (1: failed, 2: wrong usage), after one sentence on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="file for the page")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--tokens", type=int, default=1024, help="of a text (default: 1024)")
    parser.add_argument("--scale", type=float, default=8.0, help="of large channels (default: 8)")
    parser.add_argument("--energy", type=float, default=16.0, help="of biases, times the rest (default: 16)")
    parser.add_argument("--only", help="a word of the cases' names")
    args = parser.parse_args(argv)
    try:
        if not 512 <= args.tokens <= 8192 or not 0 < args.scale < 1e4 or not 0 < args.energy < 1e6:
            raise UsageError("Give 512 to 8192 --tokens, a --scale below 10000 and an --energy below 1000000.")
        rows = list[Row]()
        chosen = [case for case in CASES if not args.only or args.only.lower() in case.name.lower()]
        if not chosen:
            raise UsageError(f"No case has {args.only!r} in its name.")
        options = {"tokens": args.tokens, "energy": args.energy}
        facts = provenance(argv_of(argv), torch.device("cpu"), [torch, numpy])
        for scale in (args.scale, args.scale / 4, args.scale * 4):
            for case in chosen:
                if scale == args.scale or case.swept:
                    rows += measure(case, scale=scale, sinks=(SINK, 0) if scale == args.scale else (SINK,), **options)
                    save(rows, report(rows, facts), args.json, args.markdown)
        if args.markdown is None:
            print(report(rows, facts))
    except OctoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def argv_of(argv: list[str] | None) -> list[str]:
    """The command as it was given."""
    return sys.argv if argv is None else [__file__, *argv]


if __name__ == "__main__":
    raise SystemExit(main())
