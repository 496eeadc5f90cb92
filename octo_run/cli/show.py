"""``octo-run show``: what a model is, what it weighs, and how many tokens fit for every KV cache format."""

from dataclasses import asdict, dataclass
from typing import Any

import click

from octo_run.cli import completion, console, debug_option, runtime
from octo_run.cli.options import DEFAULT_MODEL, device_option, dtype_option
from octo_run.errors import OctoError, UsageError, shown
from octo_run.models.config import HEADS


@dataclass(frozen=True)
class FormatRow:
    """One ``--kv`` choice for one model: bytes that a token takes, and the longest context that fits.

    Attributes:
        bytes_per_token: Codes and norms of all KV heads and of all layers that have no window.
        all_in_bytes_per_token: These with the sinks, windows, recurrent states and staging buffer, spread over the
            context (None where the model does not fit at all).
        conditioning: What is done to its keys, unless ``--conditioning`` says otherwise.
        windows: Of each group of layers with a window its ``layers``, ``window`` in tokens, ``bytes_per_token``, and
            the ``bytes`` that its pages take however long the context is.
    """

    kv: str
    bytes_per_token: int
    all_in_bytes_per_token: float | None
    tokens_that_fit: int
    conditioning: str
    windows: list[dict[str, int]]


@click.command("show")
@click.argument("model", default=DEFAULT_MODEL, shell_complete=completion.models)
@device_option
@dtype_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@debug_option
def command(model: str, device: str | None, dtype: str | None, as_json: bool) -> None:
    """Describe a model and what fits with it.

    MODEL is a folder, ORG/NAME[@REV], imported/NAME or octo-demo (the default). Its weights are not loaded.
    """
    facts = describe(model, device, dtype)
    if as_json:
        console.print_json(facts)
    else:
        console.echo(_text(facts))


def describe(model: str, device: str | None, dtype: str | None) -> dict[str, Any]:
    """Facts about ``model`` as a JSON-ready dictionary.

    Raises:
        OctoError: The model cannot be read.
    """
    cfg = runtime.model_config(model)
    from octo_run.engine.engine import choose_device, choose_dtype
    from octo_run.engine.plan import free_memory, recurrent_shape, weight_bytes
    from octo_run.engine.sampling import SamplingParams
    from octo_run.models.cache import resolve
    from octo_run.models.config import load_generation_defaults
    from octo_run.models.decoder import Decoder
    from octo_run.models.specs import layer_kinds, layer_specs
    from octo_run.models.tensors import active_parameters, num_parameters, stored_config
    from octo_run.models.weights import RandomWeights

    path = resolve(model)
    if any(path.glob("*.safetensors")):  # a folder with a configuration alone can be described, too
        cfg = stored_config(path, cfg)
    where = choose_device(device)
    kind, states = choose_dtype(dtype, cfg, where), recurrent_shape(cfg)
    return {
        "model": model,
        "path": str(path),
        "architecture": cfg.architecture,
        "parameters": num_parameters(cfg),
        "active_parameters": active_parameters(cfg),
        "experts": 0 if cfg.experts is None else cfg.experts.count,
        "experts_per_token": 0 if cfg.experts is None else cfg.experts.chosen,
        "file_bytes": sum(file.stat().st_size for file in path.glob("*.safetensors")),
        "weight_bytes": weight_bytes(Decoder(cfg, RandomWeights(cfg, "meta", kind), None, None)),
        "weight_format": "not quantised" if cfg.quantisation is None else str(cfg.quantisation),
        "dtype": str(kind).removeprefix("torch."),
        "part_of": cfg.wrapper or None,
        "layers": cfg.num_layers,
        "layer_kinds": layer_kinds(cfg),
        "recurrent_layers": sum(spec.mixer is not None for spec in layer_specs(cfg)),
        "state_bytes": 0 if states is None else states.state_bytes(kind.itemsize),
        "heads": cfg.num_heads,
        "kv_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "vocabulary": cfg.vocab_size,
        "max_context": cfg.context_limit,
        "usual_context": cfg.max_position_embeddings,
        "rope_switch": cfg.rope_switch,
        "sampling": SamplingParams.own(load_generation_defaults(path)),
        "device": str(where),
        "free_bytes": free_memory(where),
        "weights": _weight_rows(cfg, where, kind),
        "kv": [asdict(row) for row in _format_rows(cfg, where, kind)],
    }


def _weight_rows(cfg: Any, device: Any, dtype: Any) -> list[dict[str, Any]]:
    """Bytes in memory with every choice of ``--weights`` and ``--head``; none for files that are quantised already."""
    from octo_run.engine.plan import weight_bytes
    from octo_run.models.decoder import Decoder
    from octo_run.models.quantisation.schemes import WEIGHTS, head_scheme, matrix_dtype, scheme_of
    from octo_run.models.weights import RandomWeights

    rows = []
    for name in WEIGHTS if cfg.quantisation is None else ():
        try:
            matrices = matrix_dtype(name, cfg, device, dtype)
        except UsageError:  # not with this arithmetic
            continue
        row: dict[str, Any] = {"weights": name}
        for head in HEADS:
            source = RandomWeights(cfg, "meta", dtype, matrices=matrices)
            decoder = Decoder(cfg, source, None, None, scheme_of(name), None, head_scheme(head))
            row[f"bytes_head_{head}"] = weight_bytes(decoder)
        rows.append(row)
    return rows


def _format_rows(cfg: Any, device: Any, dtype: Any) -> list[FormatRow]:
    """One row for every format that can store vectors of this head dimension, ``bf16`` first."""
    from octo_run.engine.allocation import parse_formats
    from octo_run.engine.plan import conditioning_kind, plan_memory, token_bytes
    from octo_run.kernels import codec

    rows = []
    for name in dict.fromkeys(("bf16", *codec.names(), "auto:56")):
        try:
            fmt = parse_formats(name, cfg, 0, dtype)
        except UsageError:  # no such code for this head dimension
            continue
        per_token, keys = token_bytes(cfg, fmt), conditioning_kind(fmt, None)
        try:
            plan = plan_memory(cfg, fmt, device=device, dtype=dtype)
        except OctoError:  # the weights alone do not fit
            rows.append(FormatRow(name, per_token, None, 0, keys, []))
        else:
            all_in = round(plan.all_in_bytes_per_token, 1)
            rows.append(FormatRow(name, per_token, all_in, plan.tokens_that_fit(), keys, plan.windows))
    return rows


def _weight_table(rows: list[dict[str, Any]]) -> list[str]:
    """The lines that say what ``--weights`` and ``--head`` take; none for files that are quantised already."""
    if not rows:
        return []
    header = ["--weights", "bytes in memory", "with --head int8"]
    cells = [[row["weights"], f"{row['bytes_head_bf16']:,}", f"{row['bytes_head_int8']:,}"] for row in rows]
    return ["", console.table(header, cells)]


def _experts(facts: dict[str, Any]) -> list[str]:
    """The line about routed experts, where there are any."""
    if not facts["experts"]:
        return []
    given = f"{facts['experts']} of a layer, {facts['experts_per_token']} for a token"
    return [f"experts       {given}, which meets {facts['active_parameters']:,} parameters"]


def _sampling(own: dict[str, Any]) -> str:
    """What the model's own files say about how its answers are drawn."""
    if not own:
        return "temperature 0, as the model's files ask for no chance; options change it"
    if "temperature" not in own:
        own = {"temperature": 0, **own}
    return ", ".join(f"{name} {value:g}" for name, value in own.items()) + " (the model's own; options change it)"


def _unasked(facts: dict[str, Any]) -> str:
    """The context without ``--ctx`` where RoPE's scaling allows a longer one."""
    usual = facts["usual_context"]
    return "" if usual == facts["max_context"] else f", {usual:,} unless --ctx asks for more (RoPE is scaled)"


def _rope_lines(facts: dict[str, Any]) -> list[str]:
    """The line on models whose context chooses RoPE's factors."""
    switch = facts["rope_switch"]
    if switch is None:
        return []
    mine = "long" if facts["max_context"] > switch else "short"
    short = f"the short factors with --ctx {switch:,} or less, the long ones with more"
    return [f"rope          {short}: {mine} ones without --ctx, as far as memory allows"]


def _recurrent_lines(facts: dict[str, Any]) -> list[str]:
    """The line on recurrent layers, if there are any."""
    if not facts["recurrent_layers"]:
        return []
    size = console.human_bytes(facts["state_bytes"])
    return [f"states        {facts['recurrent_layers']} recurrent layers: {size} a sequence, whatever its length"]


def _kinds(facts: dict[str, Any]) -> list[str]:
    """The lines about layers of several kinds, and about a checkpoint of which this is a part."""
    lines, kinds = [], facts["layer_kinds"]
    if len(kinds) > 1:
        lines.append(f"layers        {'; '.join(f'{count} {name}' for name, count in kinds.items())}")
    if facts["part_of"] is not None:
        lines.append(f"part of       {shown(facts['part_of'])}: its text; what belongs to images or sound is not read")
    return lines


def _conditioning_lines(facts: dict[str, Any]) -> list[str]:
    """The line on what is done to keys, if a format of this model does anything."""
    kinds = dict.fromkeys(row["conditioning"] for row in facts["kv"] if row["conditioning"] != "off")
    return [f"conditioning  {kind}, of keys with a code; --conditioning off, mean or full chooses" for kind in kinds]


def _window_lines(facts: dict[str, Any]) -> list[str]:
    """A line on each group of layers with a window, by the first format whose pages are given back behind it."""
    from octo_run.engine.allocation import SHORT_WINDOW

    row: dict[str, Any] = next((row for row in facts["kv"] if row["windows"]), {"windows": []})
    lines = []
    for one in row["windows"]:
        kv = "without codes, whatever --kv says," if one["window"] <= SHORT_WINDOW else f"with {row['kv']}"
        size = f"{one['bytes_per_token']:,} bytes a token, {console.human_bytes(one['bytes'])} however many there are"
        lines.append(f"windows       {one['layers']} layers see {one['window']:,} tokens: {kv} {size}")
    return lines


def _short_windows(facts: dict[str, Any]) -> list[str]:
    """Why layers have no codes, if there are such."""
    from octo_run.engine.allocation import SHORT_WINDOW

    if all(one["window"] > SHORT_WINDOW for row in facts["kv"] for one in row["windows"]):
        return []
    return [
        f"windows      of {SHORT_WINDOW} tokens or fewer are stored as with bf16: the newest tokens have no codes in "
        "any layer, so that codes would save little there, and cost quality and time"
    ]


def _text(facts: dict[str, Any]) -> str:
    alike = not any("KV head" in kind for kind in facts["layer_kinds"])
    shape = (
        f"{facts['layers']} layers, {facts['heads']} heads"
        + (f" over {facts['kv_heads']} KV heads of {facts['head_dim']}" if alike else "")
        + f", vocabulary {facts['vocabulary']:,}"
    )
    rows = [
        [
            row["kv"],
            f"{row['bytes_per_token']:,}",
            "-" if row["all_in_bytes_per_token"] is None else f"{row['all_in_bytes_per_token']:,.0f}",
            f"{row['tokens_that_fit']:,}",
        ]
        for row in facts["kv"]
    ]
    lines = [
        f"model         {shown(facts['model'])} ({shown(facts['path'])})",
        f"architecture  {shown(facts['architecture'])}: {shape}",
        *_kinds(facts),
        f"parameters    {facts['parameters']:,}",
        *_experts(facts),
        f"bytes         {facts['file_bytes']:,} in files, {facts['weight_bytes']:,} in memory as {facts['dtype']}",
        f"weights       {facts['weight_format']}",
        f"context       {facts['max_context']:,} tokens at most" + _unasked(facts),
        *_rope_lines(facts),
        *_recurrent_lines(facts),
        *_window_lines(facts),
        *_conditioning_lines(facts),
        f"sampling      {_sampling(facts['sampling'])}",
        f"device        {facts['device']}, {console.human_bytes(facts['free_bytes'])} free",
        *_weight_table(facts["weights"]),
        "",
        console.table(["--kv", "bytes/token", "all-in", "tokens that fit in the free memory"], rows),
        "",
        "bytes/token  codes and norms, K and V, of all KV heads and all layers that see every token",
        "all-in       with sinks, windows, recurrent states and the staging buffer, spread over the longest context "
        "that the model supports and the memory holds",
        f"bf16         the uncompressed cache; it takes the dtype of the arithmetic, {facts['dtype']} here",
        "auto:N       chooses one of oct2, oct3 and oct4 for the keys and the values of each layer, N bytes of 128 "
        "numbers on average; which need the better ones is measured at load",
        *_short_windows(facts),
        "",
        "Tokens past the model's own context are of no use, however many would fit.",
    ]
    return "\n".join(lines)
