"""What each KV format does to answers: measures perplexity and needle recall, writes docs/results/quality.md.

    python scripts/report_quality.py ppl OUT.json --model NAME=MODEL --text FILE [--only "LABEL;LABEL"] [--tokens N]
    python scripts/report_quality.py needle OUT.json --model NAME=MODEL --text FILE [--questions N] [--ctx N]
    python scripts/report_quality.py write DOC.md PART.json [PART.json ...]

`ppl` and `needle` measure one model and leave their figures in OUT.json, together with what they were taken on, and so
does `scripts/quality_llama.py` for llama.cpp. `write` makes the report of any number of such files, each of which holds
one part or a list of them, with a plot of perplexity against bytes for each model beside it; it keeps them together in
DOC.json, which can be given to it again.
The formats of other papers (`octo_run.kernels.codec.baselines`) run with uncompressed pages into which every key and
value goes by way of its code.
"""

import argparse
import dataclasses
import datetime
import json
import re
import shlex
import sys
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_report import cpu_name

from octo_run.engine import Engine, plan
from octo_run.engine.calibration import Calibration
from octo_run.engine.evaluation import needle, perplexity
from octo_run.engine.evaluation.perplexity import Row
from octo_run.engine.evaluation.plots import plot_perplexity
from octo_run.engine.evaluation.reading import REFERENCE
from octo_run.engine.window_pages import WindowPages
from octo_run.errors import OctoError
from octo_run.kernels.codec import Codec, LayerFormats
from octo_run.models import conditioning
from octo_run.models.conditioning import Conditioning
from octo_run.models.decoder import Decoder

CONTEXT = 2048
OURS, PAPER = ("oct4", "oct3", "oct2"), ("octopus4", "octopus3", "octopus2")
MIXED = ("auto:60", "auto:52", "auto:48")  # the format of each layer's K and V by what it costs
BASELINES = ("mixed4", "mixed3", "mixed2", "turbo4", "turbo3", "turbo2", "polar4", "polar3", "polar2")
TITLES = {
    "formats": "Formats, with the defaults (64 sinks, window 64, keys conditioned)",
    "off": "Keys as they are (`--conditioning off`)",
    "mean": "The mean of each head's keys kept out of the code, and nothing else (`--conditioning mean`)",
    "llama": "llama.cpp's KV formats on an f16 file of these weights, against its own f16; all tokens are in codes",
    "weights": "Conditioning by statistics of the weights alone, without a text (no option of the program: simulated)",
    "protection": "Sinks and window, both, one or neither (`--sink 0`, `--window 0`)",
    "boundary": "First and last layer uncompressed (no option of the program: simulated)",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One setting.

    Attributes:
        group: The table that it goes to.
        label: Its name.
    """

    group: str
    label: str
    kv: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    exact_layers: tuple[int, ...] = ()  # negative ones count from the end
    of_weights: bool = False  # keys conditioned by the weights alone


def cases() -> list[Case]:
    """Every setting that is measured, the most important first."""
    every = (*OURS, *PAPER, *BASELINES)
    plain = [Case("formats", kv, kv, {"conditioning": "full"}) for kv in (*OURS, *MIXED, *PAPER, *BASELINES)]
    less = [
        Case(kind, f"{kv}, {name}", kv, {"conditioning": kind})
        for kind, name in (("off", "as they are"), ("mean", "mean out"))
        for kv in every
    ]
    off = [
        Case("protection", f"{kv}, {name}", kv, {"conditioning": "full", **settings})
        for kv in ("oct3", "oct2")
        for name, settings in (
            ("both", {}),
            ("no sinks", {"sink": 0}),
            ("no window", {"window": 0}),
            ("neither", {"sink": 0, "window": 0}),
        )
    ]
    edges = {"conditioning": "full"}
    edge = [Case("boundary", f"{kv}, edge layers exact", kv, edges, (0, -1)) for kv in ("oct3", "oct2")]
    free = [Case("weights", f"{kv}, without a text", kv, edges, of_weights=True) for kv in OURS]
    return [*plain, *less, *off, *edge, *free]


def _place(args: argparse.Namespace) -> dict[str, Any]:
    return {"max_context": args.ctx, "device": args.device, "dtype": args.dtype}


def load_case(model: str, case: Case, place: dict[str, Any]) -> Engine:
    """The engine of a setting.

    Args:
        place: The context, the device and the dtype.
    """
    if case.of_weights:
        with (
            unittest.mock.patch.object(conditioning, "measure", measure_weights),
            unittest.mock.patch.object(Calibration, "_known", lambda _self, _what, _shapes, measured: measured()),
        ):
            return Engine.load(model, kv=case.kv, **place, **case.settings)
    if case.kv not in BASELINES and not case.exact_layers:
        return Engine.load(model, kv=case.kv, **place, **case.settings)
    # Uncompressed keys are not conditioned, unless they are told to be: what codes in passing then see is what real
    # codes would.
    kind = case.settings["conditioning"]
    with (
        unittest.mock.patch.object(plan, "conditioning_kind", lambda *_: kind),
        unittest.mock.patch.object(LayerFormats, "rotations", identities),
    ):
        engine = Engine.load(model, kv=REFERENCE, **place, **case.settings)
    codec = _codec(case.kv, engine.config.head_dim)
    exact = {layer % engine.config.num_layers for layer in case.exact_layers}
    _code_in_passing(engine, codec, exact)
    return engine


def identities(formats: LayerFormats, side: str) -> tuple[torch.Tensor | None, ...]:
    """In place of ``LayerFormats.rotations``: keys are turned by the identity, so that they can be conditioned."""
    sizes = [fmt.k.head_dim for fmt in formats]
    return tuple(torch.eye(size, dtype=torch.float64) if side == "k" else None for size in sizes)


@torch.inference_mode()
def measure_weights(decoder: Decoder, _ids: list[int], states: int = 4096) -> Conditioning:
    """As `conditioning.measure`, of the weights alone: keys and queries of random states, which count alike."""
    cfg, device = decoder.cfg, decoder.device
    generator = torch.Generator(device).manual_seed(0)
    random = torch.randn(states, cfg.hidden_size, generator=generator, device=device).to(decoder.dtype)
    angles = decoder.angles(torch.zeros(1, states, dtype=torch.int64, device=device), decoder.dtype, pure=True)
    made = []
    for index in cfg.attention_layers:
        layer = decoder.layers[index]
        q, k, _ = decoder.qkv(layer, decoder.normed(random, layer.norms.before_attention)[None], angles[index])
        keys, queries = (x[0].to(torch.float64).cpu().unflatten(1, (k.shape[2], -1)) for x in (k, q))
        mean = keys.mean((0, 2))
        moments = [torch.einsum("thgi,thgj->hij", x, x) / x.shape[0] for x in (keys - mean[:, None], queries)]
        turns = decoder.inv_freq(index).cpu().to(torch.float64)
        turned = [conditioning._over_positions(one, turns, cfg.max_position_embeddings) for one in moments]
        made.append((mean.to(torch.float32), conditioning.choose(turned[0], turned[1]).to(torch.float32)))
    return Conditioning(tuple(mean for mean, _ in made), tuple(shape for _, shape in made))


def _codec(name: str, head_dim: int) -> Codec:
    from octo_run.kernels import codec

    if name not in BASELINES:
        return codec.get(name, head_dim)
    from octo_run.kernels.codec import baselines

    return baselines.get(name, head_dim)


def _code_in_passing(engine: Engine, codec: Codec, exact: set[int]) -> None:
    """Send what enters the pages of a bf16 arena through `codec`, but for the layers `exact`; count its bytes."""
    arena, encode = engine.arena, engine.arena.encode

    def through(x: torch.Tensor) -> torch.Tensor:
        return codec.decode(codec.encode(x.float()), torch.float32).to(x.dtype)

    def encode_coded(
        layers: tuple[int, ...], k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor, group: WindowPages | None = None
    ) -> None:
        k, v = k.clone(), v.clone()
        for place, layer in enumerate(layers):
            if layer not in exact:
                k[place], v[place] = through(k[place]), through(v[place])
        encode(layers, k, v, ids, group)

    arena.encode = encode_coded  # type: ignore[method-assign]
    shape, layers = engine.plan.shape, engine.config.num_layers
    heads = engine.config.num_kv_heads
    mixed = len(exact) * shape.token_bytes // layers + 2 * heads * (layers - len(exact)) * codec.bytes_per_vector
    engine.plan = dataclasses.replace(engine.plan, shape=dataclasses.replace(shape, token_bytes=mixed))


def where_measured(engine: Engine) -> str:
    """The machine, the date and the command, for the report."""
    place = cpu_name(torch.get_num_threads())
    if engine.device.type == "cuda":
        place = torch.cuda.get_device_name(engine.device)
    command = f"python scripts/report_quality.py {shlex.join(sys.argv[1:])}"
    return f"{place}, {engine.dtype}, torch {torch.__version__}, {datetime.date.today()}; `{command}`"


def measure_ppl(args: argparse.Namespace) -> dict[str, Any]:
    """Rows of every case (or those of --only) over the middle of the text."""
    name, model = args.model.split("=", 1)
    wanted = [case for case in cases() if not args.only or case.label in args.only.split(";")]
    by_label = {case.label: case for case in wanted}
    reference = Engine.load(model, kv=REFERENCE, **_place(args))
    text = args.text.read_text("utf-8")
    ids = reference.tokenizer.encode(text[args.skip : args.skip + 8 * args.tokens])[: args.tokens]

    def load(label: str) -> Engine:
        return reference if label == REFERENCE else load_case(model, by_label[label], _place(args))

    part: dict[str, Any] = {"kind": "ppl", "model": name, "where": where_measured(reference), "text": args.text.name}
    part["head_dim"] = reference.config.head_dim
    stride = args.stride or args.ctx - 1
    part |= {"tokens": args.tokens, "skip": args.skip, "context": args.ctx, "stride": stride, "rows": []}
    comparison = perplexity.Comparison(load, [*by_label], [ids], stride=stride)
    try:
        for _ in comparison.run():
            pass
    finally:  # what is done is kept, whatever comes in between
        for row in comparison.rows():
            group = "formats" if row.kv == REFERENCE else by_label[row.kv].group
            part["rows"].append({"group": group, **dataclasses.asdict(row)})
            change = f"{row.delta_percent:+.3f} % ({row.delta_stderr:.3f}){' partial' * row.partial}"
            print(f"{name:8} {row.kv:28} {row.perplexity:8.4f} {change}", flush=True)
        args.out.write_text(json.dumps(part, indent=1))
    return part


def measure_needle(args: argparse.Namespace) -> dict[str, Any]:
    """Recall at the context's length, each text being asked for --per-text of its numbers."""
    name, model = args.model.split("=", 1)
    kvs = args.only.split(";") if args.only else [*OURS]
    depths = [(place + 0.5) / args.per_text for place in range(args.per_text)]

    def load(kv: str) -> Engine:
        return Engine.load(model, kv=kv, sequences=args.per_text, **_place(args))

    with load(REFERENCE) as engine:
        text = args.text.read_text("utf-8")[args.skip : args.skip + 400_000]
        questions = needle.prompts(
            engine.tokenizer, text, lengths=[args.ctx], depths=depths, questions=args.questions,
            per_text=args.per_text, distractors=0, form="message", seed=args.seed,
        )  # fmt: skip
        part: dict[str, Any] = {"kind": "needle", "model": name, "where": where_measured(engine)}
        part |= {"text": args.text.name, "length": args.ctx, "per_text": args.per_text}
    search, shown = needle.Search(load, kvs, questions), 0
    for _ in search.run():
        cells = [cell for cell in search.cells() if cell.depth is None]
        if len(cells) <= len(kvs) or cells[-1].trials == shown:
            continue
        shown = cells[-1].trials
        part["rows"] = [dataclasses.asdict(cell) for cell in cells]
        args.out.write_text(json.dumps(part, indent=1))  # what is done is kept, whatever comes in between
        print(f"{name}:", *(f"{cell.kv} {cell.correct}/{cell.trials}" for cell in cells), flush=True)
    return part


def write(doc: Path, files: list[Path]) -> None:
    """The report, and a plot for each model beside it."""
    parts: list[dict[str, Any]] = []
    for file in files:
        found = json.loads(file.read_text("utf-8"))
        parts += found if isinstance(found, list) else [found]
    doc.with_suffix(".json").write_text(json.dumps(parts, indent=1) + "\n", "utf-8")
    lines = [*_head(parts)]
    for model in dict.fromkeys(part["model"] for part in parts):
        own = [part for part in parts if part["model"] == model]
        rows = [row for part in own if part["kind"] == "ppl" for row in part["rows"]]
        rows = [row for i, row in enumerate(rows) if row["kv"] not in {other["kv"] for other in rows[:i]}]
        lines += [f"## {model} model", "", *_summary(own, rows)]
        for group, title in TITLES.items():
            lines += _table(title, [row for row in rows if row["group"] == group], own[0].get("head_dim", 128))
        lines += _needles([part for part in own if part["kind"] == "needle"])
        if rows:
            plot = doc.with_name(f"{doc.stem}-{model}.png")
            fields = {field.name for field in dataclasses.fields(Row)}
            shown = [row for row in rows if row["group"] in PLOTTED and row["kv"] != UNCODED_PEER]
            about = "\n".join(_about(part) for part in own if part["kind"] == "ppl")
            plot_perplexity([Row(**{key: row[key] for key in fields if key in row}) for row in shown], plot, about)
            lines += [f"![perplexity against bytes, {model} model]({plot.name})", ""]
    doc.write_text("\n".join(lines).rstrip() + "\n", "utf-8")


#: Groups of rows that are plotted, and of those one that is nobody's code.
PLOTTED, UNCODED_PEER = ("formats", "off", "llama"), "llama.cpp f16"


def _about(part: dict[str, Any]) -> str:
    """What the plot of a part says below its title: model, text and command."""
    context, tokens = part.get("context", CONTEXT), part["rows"][0]["tokens"]
    command = re.search("`(.*)`", part["where"])
    line = f"{part['model']}, {part['text']}, {tokens:,} tokens, context {context:,}"
    return f"{line}\n{command[1]}" if command else line


def _head(parts: list[dict[str, Any]]) -> Iterator[str]:
    notes = Path(__file__).with_name("report_quality.md")
    yield from notes.read_text("utf-8").splitlines()
    yield ""
    yield "Measured by:"
    yield ""
    for part in parts:
        if part["kind"] == "ppl":
            yield (
                f"- perplexity, {part['model']} model: {part['text']} from character {part['skip']:,}, "
                f"{part['rows'][0]['tokens']:,} tokens scored, windows of {part.get('context', CONTEXT):,} tokens "
                f"{part['stride']:,} apart; "
                f"{part['where']}"
            )
        else:
            yield (
                f"- needle, {part['model']} model: {part['text']}, {part['rows'][0]['texts']} texts of "
                f"{part['length']:,} tokens, each asked for {part['per_text']} numbers hidden in it, the same for all "
                f"formats; {part['where']}"
            )
    yield ""


def _summary(parts: list[dict[str, Any]], rows: list[dict[str, Any]]) -> Iterator[str]:
    """The formats that octo-run offers in a short table: what is not measured is a hyphen, or has no column."""
    by_label = {row["kv"]: row for row in rows}
    needles = [row for part in parts if part["kind"] == "needle" for row in part["rows"] if row["depth"] is None]
    recalls = {row["kv"]: f"{100 * row['delta']:+.1f} ± {100 * row['delta_stderr']:.1f}" for row in needles}
    columns: dict[str, dict[str, str]] = {}
    for title, suffix in (
        ("perplexity change %", ""),
        ("keys as they are", ", as they are"),
        ("mean out", ", mean out"),
    ):
        found = {kv: by_label.get(f"{kv}{suffix}") for kv in (*OURS, *MIXED)}
        columns[title] = {kv: f"{row['delta_percent']:+.2f} ± {row['delta_stderr']:.2f}"
                          for kv, row in found.items() if row}  # fmt: skip
    columns["recall against bf16, points"] = {kv: text for kv, text in recalls.items() if kv != REFERENCE}
    shown = {title: cells for title, cells in columns.items() if cells}
    yield f"| {' | '.join(['format', *shown])} |"
    yield "|---" * (1 + len(shown)) + "|"
    for kv in (*OURS, *MIXED):
        cells = [own.get(kv, "-") for own in shown.values()]
        if any(cell != "-" for cell in cells):
            yield f"| {' | '.join([kv, *cells])} |"
    yield ""


def _table(title: str, rows: list[dict[str, Any]], head_dim: int) -> Iterator[str]:
    if not rows:
        return
    yield f"### {title}"
    yield ""
    columns = ["bytes of 128 numbers", "perplexity", "±", "change %", "±", "KL mean", "KL 99 %", "top-1 %", "tokens"]
    columns += ["bytes per token"]
    yield f"| format | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for row in rows:
        own = row["kv"] != REFERENCE
        change = (f"{row['delta_percent']:+.2f}", f"{row['delta_stderr']:.2f}") if own else ("", "")
        yield (
            f"| {row['kv']} | {_vector_bytes(row, head_dim)} | {row['perplexity']:.3f} | {row['stderr']:.3f} "
            f"| {change[0]} | {change[1]} "
            f"| {row['kl_mean']:.5f} | {row['kl_p99']:.4f} | {100 * row['top1_agreement']:.2f} "
            f"| {row['tokens']:,} | {row['bytes_per_token']:,.0f} |"
        )
    yield ""


def _vector_bytes(row: dict[str, Any], head_dim: int) -> int:
    """Bytes of 128 numbers in the format that a row's label begins with, on average."""
    label = row["kv"]
    if "number_bytes" in row:
        return round(128 * row["number_bytes"])
    if label.startswith("auto:"):
        return int(label.split(",")[0].removeprefix("auto:"))
    return _codec(label.split(",")[0], head_dim).bytes_per_vector * 128 // head_dim


def _needles(parts: list[dict[str, Any]]) -> Iterator[str]:
    for part in parts:
        yield f"### One number among {part['per_text']}, asked for at {part['length']:,} tokens"
        yield ""
        yield "| format | found | recall % | ± | 95 % interval | points | ± |"
        yield "|---|---|---|---|---|---|---|"
        for row in part["rows"]:
            own = row["kv"] != REFERENCE
            points = (f"{100 * row['delta']:+.1f}", _points(row["delta_stderr"])) if own else ("", "")
            yield (
                f"| {row['kv']} | {row['correct']}/{row['trials']} | {100 * row['recall']:.1f} "
                f"| {_points(row['stderr'])} | {100 * row['low']:.1f} - {100 * row['high']:.1f} "
                f"| {points[0]} | {points[1]} |"
            )
        yield ""


def _points(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def main() -> int:
    """Run the command line; 0, or 1 with a sentence on standard error."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"ppl": measure_ppl, "needle": measure_needle}
    for command in runs:
        sub = commands.add_parser(command)
        sub.add_argument("out", type=Path)
        sub.add_argument("--model", required=True, help="NAME=MODEL")
        sub.add_argument("--text", type=Path, required=True)
        sub.add_argument("--skip", type=int, default=200_000, help="characters of the text to pass over")
        sub.add_argument("--tokens", type=int, default=20_470)
        sub.add_argument("--ctx", type=int, default=CONTEXT, help="tokens of a window, or of a text for the needle")
        sub.add_argument("--stride", type=int, help="default: a token less than --ctx")
        sub.add_argument("--questions", type=int, default=100, help="for the needle")
        sub.add_argument("--per-text", type=int, default=10, help="questions about one text, for the needle")
        sub.add_argument("--seed", type=int, default=0, help="of the questions")
        sub.add_argument("--only", help="labels, separated by semicolons")
        sub.add_argument("--device")
        sub.add_argument("--dtype", help="default: the weights' on a GPU, float32 on a CPU")
    writer = commands.add_parser("write")
    writer.add_argument("doc", type=Path)
    writer.add_argument("parts", type=Path, nargs="+")
    args = parser.parse_args()
    try:
        if args.command == "write":
            write(args.doc, args.parts)
        else:
            runs[args.command](args)
    except (OctoError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
