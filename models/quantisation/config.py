"""``quantization_config``: how the weights of a checkpoint are stored. Nothing here imports torch.

What each method's own library writes is read; what octo-run cannot load is refused by name. The files that belong to
each ``layout`` are described in :mod:`octo_run.models.quantisation.stored`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

from octo_run.errors import OctoError, quoted, shown
from octo_run.models.fields import Fields
from octo_run.models.quantisation import names

#: Files in which older programs say what ``quantization_config`` says, and the methods that they are of.
OLDER_NAMES: Mapping[str, str] = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}
_LOADABLE = (
    "octo-run loads compressed-tensors, GPTQ, AWQ, AutoRound, fp8, MXFP4 and ModelOpt files, and quantises "
    "unquantised ones itself"
)
#: Columns of a group: a multiple of the smallest that a packed weight has (`kernels.linear.packed.GROUPS`).
_GROUP_UNIT = 16
#: The classes that a linear layer is meant by.
_LINEAR = frozenset(("Linear", "torch.nn.Linear", "ColumnParallelLinear", "RowParallelLinear"))


class UnknownMethod(OctoError):
    """A method of quantisation that octo-run does not read, or none that is named.

    Attributes:
        named: Whether one is.
    """

    def __init__(self, message: str, named: bool) -> None:
        super().__init__(message)
        self.named = named


@dataclass(frozen=True)
class StoredScheme:
    """How a matrix ``[out, in]`` lies in a file.

    Attributes:
        layout: Which tensors there are and how codes lie in them (a key of ``layouts.LAYOUTS``).
        kind: Of the codes (`kernels.linear.packed.BITS`).
        group: Columns that share a scale; None: all.
        rows: Rows that share a scale; None: all.
        symmetric: Codes have no zeros of their own.
        zero_shift: What a stored zero is less than the code it means.
        ordered: The group of each column is stored and counts; else it may be.
    """

    layout: str
    kind: str
    group: int | None = None
    rows: int | None = 1
    symmetric: bool = True
    zero_shift: int = 0
    ordered: bool = False

    def __str__(self) -> str:
        if self.group is None:
            shared = "a tensor" if self.rows is None else "a row"
        elif self.rows == 1:
            shared = f"{self.group} columns"
        else:
            shared = f"{self.rows} x {self.group}"
        return f"{self.kind}, a scale{'' if self.symmetric else ' and a zero'} for {shared}"


@dataclass(frozen=True)
class Rule:
    """A scheme (None: not quantised) for the modules that any of its targets means."""

    targets: tuple[str, ...]
    scheme: StoredScheme | None


@dataclass(frozen=True)
class Quantisation:
    """How a checkpoint's layers are stored.

    Attributes:
        method: As a user knows it.
        rules: The most particular match counts, of equal ones the first.
        ignored: Modules that are not quantised.
        style: How names are compared: ``exact``, ``contains`` or ``glob``.
        activations: Whether inputs were meant to be quantised, too, which octo-run does not do.
        dense: Layers whose files hold a plain matrix after all (``weights.stored_config``).
        packed: Layers whose files hold a quantised one though they were left out (likewise).
        orders: Digest of the order of columns, for layers that have one (likewise).
    """

    method: str
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    style: str = "contains"
    activations: bool = False
    dense: frozenset[str] = frozenset()
    packed: frozenset[str] = frozenset()
    orders: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def kinds(self) -> set[str]:
        """Of the codes of all layers (`StoredScheme.kind`)."""
        return {rule.scheme.kind for rule in self.rules if rule.scheme is not None}

    def scheme(self, layer: str, *named: str) -> StoredScheme | None:
        """How a linear layer is stored; None: as a plain matrix.

        Args:
            layer: What octo-run calls it, without ``.weight``.
            named: What files of its kind call it (nothing: the same).
        """
        if layer in self.dense:
            return None
        if layer in self.packed:
            return self.if_quantised(*(named or (layer,)))
        return _chooser(self.rules, self.ignored, self.style)(named or (layer,))

    def if_quantised(self, *named: str) -> StoredScheme | None:
        """How a layer is stored if it is quantised at all: nothing is left out."""
        return _chooser(tuple(rule for rule in self.rules if rule.scheme is not None), (), self.style)(named)

    def __str__(self) -> str:
        kinds = dict.fromkeys(str(rule.scheme) for rule in self.rules if rule.scheme is not None)
        note = " (inputs are not quantised here)" if self.activations else ""
        return f"{self.method}: {'; '.join(kinds)}{note}"


@lru_cache(maxsize=4)
def _chooser(
    rules: tuple[Rule, ...], ignored: tuple[str, ...], style: str
) -> Callable[[tuple[str, ...]], StoredScheme | None]:
    """What chooses the scheme of a layer of some names. It remembers: a load asks for each layer of a model, of which
    there may be tens of thousands, several times."""

    def means(entries: tuple[str, ...]) -> Callable[[str], bool]:
        patterns = tuple(entry for entry in entries if entry not in _LINEAR)
        every, ready = len(patterns) < len(entries), names.Entries(patterns, style)
        return lambda name: every or ready.mean(name)

    patterns = [tuple(target for target in rule.targets if target not in _LINEAR) for rule in rules]
    whole, by_pattern, left_out = [*map(set, patterns)], [*map(means, patterns)], means(ignored)

    @cache
    def scheme(named: tuple[str, ...]) -> StoredScheme | None:
        if any(map(left_out, named)):
            return None
        exact = (not targets.isdisjoint(named) for targets in whole)
        similar = (any(map(match, named)) for match in by_pattern)
        linear = (len(targets) < len(rule.targets) for targets, rule in zip(patterns, rules, strict=True))
        for found in (exact, similar, linear):
            for rule, is_meant in zip(rules, found, strict=True):
                if is_meant:
                    return rule.scheme
        return None

    return scheme


def parse_quantisation(fields: Fields) -> Quantisation:
    """What ``quantization_config`` says.

    Raises:
        UnknownMethod: octo-run does not know how such weights are stored; it says what would work.
        OctoError: It knows, and cannot load them; likewise.
    """
    method = (fields.text("quant_method") or _unnamed(fields)).lower()
    parse = _METHODS.get(method)
    if parse is None:
        name = shown(method or "unnamed", 40)
        hint = _HINTS.get(method, "take another copy of the model")
        raise UnknownMethod(
            f"{fields.path}: the weights are quantized ({name}), which cannot be loaded: {hint}; {_LOADABLE}.",
            bool(method),
        )
    found = parse(fields)
    for rule in found.rules:
        for target in (*rule.targets, *found.ignored):
            if target.startswith("re:"):
                names.matches(target[3:], "")
    return found


def _unnamed(fields: Fields) -> str:
    """The method of a configuration that names none; empty where that cannot be told."""
    if fields.raw("load_in_4bit") or fields.raw("load_in_8bit"):
        return "bitsandbytes"
    keys = fields.values.keys()
    return "mlx" if {"bits", "group_size"} <= keys and not keys & {"sym", "desc_act", "zero_point"} else ""


def _refused(fields: Fields, field: str, problem: str, advice: str) -> OctoError:
    return OctoError(f"{fields.path}: {fields.prefix}{field} {problem}, which cannot be loaded: {advice}.")


def _names(fields: Fields, *keys: str) -> tuple[str, ...]:
    """The texts of those lists that are there."""
    found: list[str] = []
    for key in keys:
        values = fields.raw(key)
        if values is None:
            continue
        if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
            raise fields.fail(key, f"is {quoted(values)}, not a list of names")
        found += values
    return tuple(found)


def _group(fields: Fields, field: str = "group_size", default: int | None = None) -> int | None:
    """Columns of a group; None: all."""
    value = fields.integer(field, default, low=-1)
    if value == -1:
        return None
    if value < _GROUP_UNIT or value % _GROUP_UNIT:
        raise fields.fail(field, f"is {value}; groups of a multiple of {_GROUP_UNIT} columns, or -1, can be loaded")
    return value


def _bits(fields: Fields, field: str, known: tuple[int, ...]) -> int:
    bits = fields.integer(field, high=64)
    if bits not in known:
        wanted = " and ".join(map(str, known))
        advice = f"take a copy of {wanted} bits, or quantise the model with --weights"
        raise _refused(fields, field, f"is {bits}", advice)
    return bits


def _gptq(fields: Fields) -> Quantisation:
    form = (fields.text("checkpoint_format") or fields.text("format") or "gptq").lower()
    if form not in ("gptq", "gptq_v2") or fields.boolean("is_marlin_format"):
        name = "marlin" if fields.boolean("is_marlin_format") else form
        raise _refused(fields, "checkpoint_format", f"is {quoted(name)}", "take a copy in the format gptq or gptq_v2")

    def scheme(fields: Fields) -> StoredScheme:
        kind, group = f"int{_bits(fields, 'bits', (4, 8))}", _group(fields, default=128)
        symmetric, ordered = fields.boolean("sym", True), fields.boolean("desc_act") and group is not None
        shift = 1 if form == "gptq" else 0
        return StoredScheme("gptq", kind, group, symmetric=symmetric, zero_shift=shift, ordered=ordered)

    ignored = () if fields.boolean("lm_head") else ("lm_head",)
    order = ", columns reordered" if fields.boolean("desc_act") else ""
    ignored = (*ignored, *_names(fields, "modules_to_not_convert"))
    return Quantisation(f"GPTQ{order}", _with_exceptions(fields, scheme), ignored)


def _awq(fields: Fields) -> Quantisation:
    version = (fields.text("version") or fields.text("format") or "gemm").lower()
    if version != "gemm":
        raise _refused(fields, "version", f"is {quoted(version)}", "take a copy of the version gemm")

    def scheme(fields: Fields) -> StoredScheme:
        _bits(fields, "bits" if fields.raw("w_bit") is None else "w_bit", (4,))
        size = "group_size" if fields.raw("q_group_size") is None else "q_group_size"
        return StoredScheme("awq", "int4", _group(fields, size, 128), symmetric=False)

    ignored = ("lm_head", *_names(fields, "modules_to_not_convert"))
    return Quantisation("AWQ", _with_exceptions(fields, scheme), ignored)


def _with_exceptions(fields: Fields, scheme: Callable[[Fields], StoredScheme]) -> tuple[Rule, ...]:
    """The rules of a file of GPTQModel: ``dynamic`` has patterns of layers that are not quantised (``-:``), or that
    have settings of their own (``+:`` or nothing before the pattern). The first one that matches counts."""
    rules, exceptions = [], fields.sub("dynamic")
    for pattern in {} if exceptions is None else exceptions.values:
        target = f"re:{re.sub('^[-+]:', '', pattern)}"
        if pattern.startswith("-:"):
            rules.append(Rule((target,), None))
            continue
        assert exceptions is not None
        rules.append(Rule((target,), scheme(_of_layer(fields, exceptions, pattern))))
    return (*rules, Rule(("Linear",), scheme(fields)))


#: How AutoRound packs -> layout, and what a stored zero is less than the code it means.
_PACKINGS = {
    "auto_round:gptq": ("gptq", 1),
    "auto_round:auto_gptq": ("gptq", 1),
    "auto_round": ("gptq", 0),
    "auto_round:gptqmodel": ("gptq", 0),
    "auto_round:awq": ("awq", 0),
    "auto_round:auto_awq": ("awq", 0),
}


def _auto_round(fields: Fields) -> Quantisation:
    """The layers in the blocks that are named (all of the decoder where none is), and those of ``extra_config``, which
    has settings of their own by names or by parts of names; with 16 bits and more they are not quantised."""
    packing = (fields.text("packing_format") or "auto_round:gptq").lower()
    if packing not in _PACKINGS:
        advice = "take the copy that AutoRound exports as auto_gptq, auto_awq or llm_compressor"
        raise _refused(fields, "packing_format", f"is {quoted(packing)}", advice)
    layout, shift = _PACKINGS[packing]

    def scheme(fields: Fields) -> StoredScheme | None:
        if fields.integer("bits", high=64) >= 16:
            return None
        bits = _bits(fields, "bits", (4, 8) if layout == "gptq" else (4,))
        if (kind := fields.text("data_type") or "int") != "int":
            raise _refused(fields, "data_type", f"is {quoted(kind)}", "take a copy of 4 or 8 bits of type int")
        if fields.raw("act_bits") is not None and fields.integer("act_bits", high=64) < 16:
            raise _refused(fields, "act_bits", f"is {fields.raw('act_bits')}", "take a copy that packs weights alone")
        group, symmetric = _group(fields, default=128), layout == "gptq" and fields.boolean("sym", True)
        return StoredScheme(layout, f"int{bits}", group, symmetric=symmetric, zero_shift=shift)

    own = fields.sub("extra_config")
    rules = []
    for name in {} if own is None else own.values:
        assert own is not None
        if own.raw(name):
            target = f"re:.*(?:{name})" if re.search(r"[^\w.-]", name) else name
            rules.append(Rule((target,), scheme(_of_layer(fields, own, name))))
    blocks = _block_names(fields)
    within = tuple(f"re:{re.escape(block)}" for block in blocks) if blocks else ("Linear",)
    named = blocks or (own is not None and any("lm_head" in name for name in own.values))
    ignored = (*(() if named else ("lm_head",)), *_names(fields, "modules_to_not_convert"))
    return Quantisation("AutoRound", (*rules, Rule(within, scheme(fields))), ignored)


def _block_names(fields: Fields) -> list[str]:
    """What the names of quantised layers begin with: one text with commas, or a list of names or of lists of them."""
    for key in ("block_name_to_quantize", "to_quant_block_names"):
        said = fields.raw(key)
        if said is not None:
            waiting, found = [said], list[str]()
            while waiting:
                one = waiting.pop()
                if isinstance(one, list):
                    waiting += one
                elif isinstance(one, str):
                    found += filter(None, map(str.strip, one.split(",")))
                else:
                    raise fields.fail(key, f"is {quoted(said)}, not names of blocks")
            return found
    return []


def _of_layer(fields: Fields, exceptions: Fields, name: str) -> Fields:
    """The settings of a method with those that some layers have of their own."""
    own, where = exceptions.raw(name) or {}, shown(name, 60)
    if not isinstance(own, dict):
        raise exceptions.fail(where, f"is {quoted(own)}, not an object")
    return Fields(fields.path, {**fields.values, **own}, f"{exceptions.prefix}{where}.")


def _fp8(fields: Fields) -> Quantisation:
    form = (fields.text("fmt") or "e4m3").lower()
    if form != "e4m3":
        raise _refused(fields, "fmt", f"is {quoted(form)}", "take a copy in e4m3")
    block = fields.raw("weight_block_size")
    rows, group = (None, None) if block is None else _block(fields, "weight_block_size", block)
    ignored = _names(fields, "modules_to_not_convert", "ignored_layers")
    scheme = StoredScheme("fp8", "fp8", group, rows)
    return Quantisation("fp8", (Rule(("Linear",), scheme),), ("lm_head", *ignored), activations=True)


def _fbgemm(fields: Fields) -> Quantisation:
    ignored = ("lm_head", *_names(fields, "modules_to_not_convert"))
    scheme = StoredScheme("fp8", "fp8")
    return Quantisation("fbgemm_fp8", (Rule(("Linear",), scheme),), ignored, activations=True)


def _mxfp4(fields: Fields) -> Quantisation:
    ignored = ("lm_head", *_names(fields, "modules_to_not_convert"))
    return Quantisation("MXFP4", (Rule(("Linear",), StoredScheme("blocks", "fp4", 32)),), ignored, "glob")


def _modelopt(fields: Fields) -> Quantisation:
    inner = fields.sub("quantization") or fields
    algorithm = (inner.text("quant_algo") or "").upper()
    schemes = {"FP8": StoredScheme("fp8", "fp8", rows=None), "NVFP4": StoredScheme("modelopt-fp4", "fp4", 16)}
    if algorithm not in schemes:
        problem = f"is {quoted(algorithm)}" if algorithm else "is missing"
        raise _refused(inner, "quant_algo", problem, "take a copy in FP8 or NVFP4")
    if (size := inner.integer("group_size", 16, low=0)) not in (0, 16) and algorithm == "NVFP4":
        raise inner.fail("group_size", f"is {size}, and NVFP4 has groups of 16")
    ignored = _names(inner, "ignore", "exclude_modules")
    return Quantisation(f"ModelOpt {algorithm}", (Rule(("Linear",), schemes[algorithm]),), ignored, "glob", True)


def _block(fields: Fields, field: str, value: Any) -> tuple[int, int]:
    """Rows and columns of a block, given as a list or as a text like ``128x128``."""
    texts = value.split("x") if isinstance(value, str) else value if isinstance(value, list) else []
    sizes = [int(str(text)) for text in texts[:3] if re.fullmatch("[0-9]{1,7}", str(text))]
    if len(texts) == len(sizes) == 2 and min(sizes) > 0:
        if sizes[1] % _GROUP_UNIT:
            problem = f"is {quoted(value)}; blocks of a multiple of {_GROUP_UNIT} columns can be loaded"
            raise fields.fail(field, problem)
        return sizes[0], sizes[1]
    raise fields.fail(field, f"is {quoted(value)}, not the rows and columns of a block")


#: Format of compressed-tensors -> layout, and kinds of codes by type and bits.
_FORMATS: dict[str, tuple[str, dict[tuple[str, int], str]]] = {
    "pack-quantized": ("ct-packed", {("int", 4): "int4", ("int", 8): "int8"}),
    "int-quantized": ("ct-plain", {("int", 4): "int4", ("int", 8): "int8"}),
    "float-quantized": ("ct-plain", {("float", 8): "fp8"}),
    "naive-quantized": ("ct-plain", {("int", 4): "int4", ("int", 8): "int8", ("float", 8): "fp8"}),
    "nvfp4-pack-quantized": ("ct-fp4", {("float", 4): "fp4"}),
    "mxfp4-pack-quantized": ("ct-mxfp4", {("float", 4): "fp4"}),
    "mxfp8-quantized": ("ct-mxfp8", {("float", 8): "fp8"}),
}


def _compressed_tensors(fields: Fields) -> Quantisation:
    for name, part in (("sparsity_config", "format"), ("transform_config", "config_groups")):
        inner = fields.sub(name)
        if inner is not None and inner.raw(part) not in (None, "dense", {}, []):
            raise _refused(fields, name, "changes the weights or what they are multiplied by", "take a copy without")
    form = fields.text("format") or ""
    groups = fields.sub("config_groups")
    if groups is None or not groups.values:
        raise fields.fail("config_groups", "is missing or empty")
    rules, activations = [], False
    for key in groups.values:
        group = groups.sub(key)
        if group is None:
            raise groups.fail(shown(key, 60), "is null, not an object")
        weights = group.sub("weights")
        rules.append(Rule(_names(group, "targets"), _compressed(group, weights, group.text("format") or form)))
        activations |= bool(group.raw("input_activations"))
    return Quantisation("compressed-tensors", tuple(rules), _names(fields, "ignore"), "exact", activations)


def _compressed(group: Fields, weights: Fields | None, form: str) -> StoredScheme | None:
    """The scheme of a group of layers; None: only their inputs are meant to be quantised."""
    if weights is None:
        return None
    if form not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise _refused(group, "format", f"is {quoted(form)}", f"take a copy in one of {known}")
    layout, kinds = _FORMATS[form]
    bits, kind = weights.integer("num_bits", 8, high=64), weights.text("type") or "int"
    if (kind, bits) not in kinds:
        advice = "take a copy of 4 or 8 bits, or quantise the model with --weights"
        raise _refused(weights, "num_bits", f"is {bits} of type {quoted(kind)} in {form}", advice)
    columns, rows = _shared(weights, layout)
    symmetric = weights.boolean("symmetric", True)
    if not symmetric and kind == "float":
        raise _refused(weights, "symmetric", "is false for floating-point codes", "take a symmetric copy")
    return StoredScheme(layout, kinds[kind, bits], columns, rows, symmetric)


def _shared(weights: Fields, layout: str) -> tuple[int | None, int | None]:
    """Columns and rows that share a scale."""
    fixed = {"ct-fp4": 16, "ct-mxfp4": 32, "ct-mxfp8": 32}.get(layout)
    size = weights.raw("group_size")
    strategy = weights.text("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if fixed is not None:
        if size not in (None, fixed):
            raise weights.fail("group_size", f"is {quoted(size)}, and this format has groups of {fixed}")
        return fixed, 1
    if strategy == "block":
        rows, columns = _block(weights, "block_structure", weights.raw("block_structure"))
        return columns, rows
    if strategy == "group":
        return _group(weights), 1
    if strategy not in ("tensor", "channel"):
        raise _refused(weights, "strategy", f"is {quoted(strategy)}", "take a copy with scales for groups or channels")
    return None, None if strategy == "tensor" else 1


_METHODS: Mapping[str, Callable[[Fields], Quantisation]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "auto-round": _auto_round,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "mxfp4": _mxfp4,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
}
_HINTS = {
    "bitsandbytes": "take the unquantised files and give --weights",
    "mlx": "take the unquantised files and give --weights",
    "intel/auto-round": "take the copy that AutoRound exports as auto_gptq or auto_awq",
    "gemma": "take the copy in compressed-tensors (its name ends in qat-w4a16-ct)",
    "gguf": "import the GGUF file",
}
