"""`--kv` for all layers of a model, and `auto:N`: formats for each layer and side by what their errors cost."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType

import torch
from torch import Tensor

from octo_run.errors import UsageError, nearest, quoted
from octo_run.kernels.codec import KVFormat, LayerFormats, get, names, parse_kv
from octo_run.kernels.codec.formats import PLAIN
from octo_run.kernels.codec.rotation import HEAD_DIMS
from octo_run.models.config import ModelConfig
from octo_run.models.specs import layer_specs

#: The formats that are chosen from, and their relative errors: energy of the error by energy of the vector, Gaussian
#: vectors of 128 numbers (docs/formats.md). Their proportions matter; other head dimensions have these within 7 %.
ERRORS = {"oct2": 0.0554, "oct3": 0.0142, "oct4": 0.0041}
#: What budgets count: bytes of so many numbers, norm and padding included.
NUMBERS = 128
#: Layers that see at most so many of the newest tokens have no codes, whatever ``--kv`` says. The newest 64 to 127 are
#: in full precision anyway (with the usual ``--window``), so that a token would see three coded pages or fewer, however
#: long the context is: they save little, and their codes cost quality, and time in every step.
SHORT_WINDOW = 256

#: The format of a cache where none is asked for, if heads have codes.
DEFAULT = "oct3"
#: What ``--kv`` takes, in words.
CHOICES = f"{', '.join(names())}, K:V, auto:N"

#: A sensitivity for keys and one for values.
Pair = Sequence[float]
_AUTO = re.compile(r"auto:([0-9]{1,4})")


@dataclass(frozen=True)
class AutoFormats(LayerFormats):
    """Formats that were chosen within a budget of bytes.

    Attributes:
        budget: Bytes of 128 numbers, on average over the layers that have codes.
    """

    budget: int

    @classmethod
    def within(
        cls,
        budget: int,
        sensitivities: Sequence[Pair],
        head_dim: int,
        seed: int = 0,
        plain: Mapping[int, KVFormat] = MappingProxyType({}),
    ) -> AutoFormats:
        """See ``allocate``.

        Args:
            sensitivities: Of each layer.
            plain: The formats of layers that have no codes, by their numbers; their sensitivities do not count.
        """
        coded = [pair for layer, pair in enumerate(sensitivities) if layer not in plain]
        found = iter(allocate(coded, Fraction(budget * head_dim, NUMBERS), head_dim, seed))
        layers = (plain[layer] if layer in plain else next(found) for layer in range(len(sensitivities)))
        return cls(f"auto:{budget}", tuple(layers), budget)

    @property
    def plain(self) -> dict[int, KVFormat]:
        """The formats of layers that have no codes, by their numbers."""
        return {layer: fmt for layer, fmt in enumerate(self.layers) if not fmt.k.bits}

    @property
    def measured_with(self) -> KVFormat:
        """The format that sensitivities are measured with."""
        codec = self.layers[0].k
        return parse_kv(next(iter(ERRORS)), codec.head_dim, codec.seed)

    def chosen(self, sensitivities: Tensor | None) -> AutoFormats:
        """The formats for a model, of as many bytes.

        Args:
            sensitivities: ``[layers, 2]`` (see ``sensitivity.measure``); None: they stay what they are.
        """
        if sensitivities is None:
            return self
        codec = self.layers[0].k
        return type(self).within(self.budget, sensitivities.tolist(), codec.head_dim, codec.seed, self.plain)

    def __str__(self) -> str:
        return f"{self.name} ({self.counts}; {self.average:.2f} bytes on average)"

    @property
    def average(self) -> float:
        """Bytes of 128 numbers that are used, on average over the layers that have codes."""
        coded = [self.layer_bytes(layer) for layer in range(len(self)) if layer not in self.plain]
        return sum(coded) / (2 * len(coded)) * NUMBERS / self.layers[0].k.head_dim


def allocate(sensitivities: Sequence[Pair], budget: Fraction, head_dim: int, seed: int = 0) -> tuple[KVFormat, ...]:
    """Formats of keys and values of each layer that let the expected loss be least.

    The loss of a layer and side is its sensitivity times the format's error; they add up. From a format to the next
    better one it is as many bytes everywhere, and the first such step gains more than the second one: taking the steps
    by their gain, the largest first, gives the least loss that the bytes allow.

    Args:
        sensitivities: Of each layer, for keys and for values: how much is lost by an error of a given size.
        budget: Bytes of a vector, on average over layers and sides.

    Returns:
        As many steps as the budget has bytes for are taken, also where they gain nothing: which formats are chosen
        depends on the sensitivities, how many bytes they take does not.

    Raises:
        ValueError: Sensitivities that are negative or not finite, or a budget that the least format is above.
        UsageError: A head dimension without codes.
    """
    names = tuple(ERRORS)
    codecs = [get(name, head_dim, seed) for name in names]
    flat = [float(value) for pair in sensitivities for value in pair]
    if not all(math.isfinite(value) and value >= 0 for value in flat):
        raise ValueError(f"sensitivities must be finite and not negative: {flat}")
    least, step = codecs[0].bytes_per_vector, codecs[1].bytes_per_vector - codecs[0].bytes_per_vector
    steps = (budget - least) * len(flat) // step
    if steps < 0:
        raise ValueError(f"{budget} bytes are fewer than {least}, those of {names[0]}")
    gains = [ERRORS[worse] - ERRORS[better] for worse, better in itertools.pairwise(names)]
    # By gain; among equals lower steps first, then earlier layers, then keys.
    order = sorted(
        (-value * gain, level, place) for level, gain in enumerate(gains) for place, value in enumerate(flat)
    )
    levels = [0] * len(flat)
    for _, _, place in order[:steps]:
        levels[place] += 1
    pairs = [(names[k], names[v]) for k, v in zip(levels[::2], levels[1::2], strict=True)]
    made = {(k, v): parse_kv(k if k == v else f"{k}:{v}", head_dim, seed) for k, v in pairs}
    return tuple(made[pair] for pair in pairs)


def default_format(cfg: ModelConfig) -> str:
    """The format of a model's cache where none is asked for: without a code where heads have sizes for which there is
    none."""
    return DEFAULT if all(heads.size in HEAD_DIMS for heads in cfg.cached_heads) else PLAIN


def parse_formats(
    text: str, cfg: ModelConfig, seed: int = 0, plain_dtype: torch.dtype = torch.bfloat16
) -> LayerFormats:
    """The formats of a model's layers that ``--kv`` names; layers with a short window (`SHORT_WINDOW`) have no codes.

    Args:
        text: "NAME", "KNAME:VNAME", or "auto:N": the formats are then those for layers and sides that are alike, until
            ``AutoFormats.chosen`` knows better.
        plain_dtype: The dtype that ``bf16`` stores, and layers without codes.

    Raises:
        UsageError: Any other text; the message names the choices.
    """

    @functools.cache
    def named(name: str, head_dim: int) -> KVFormat:
        return parse_kv(name, head_dim, seed, plain_dtype)

    text = text.strip().lower()
    parts = text.split(":")
    unknown = None if "auto" in parts else next((name for name in parts[:2] if name not in names()), None)
    if unknown is not None:
        near = nearest(unknown, [*names(), "auto"])
        if near == "auto":
            raise UsageError(f"unknown KV format {quoted(unknown)}: did you mean auto:N, with N bytes of 128 numbers?")
        hint = f"did you mean {near}, of {CHOICES}?" if near else f"choose one of {CHOICES}."
        raise UsageError(f"unknown KV format {quoted(unknown)}: {hint}")
    if "auto" not in parts:
        given = [named(text, heads.size) for heads in cfg.cached_heads]
        short = short_layers(cfg)
        return LayerFormats(
            text, tuple(named(PLAIN, fmt.k.head_dim) if layer in short else fmt for layer, fmt in enumerate(given))
        )
    if not cfg.plain_layers:
        raise UsageError(
            f"--kv {quoted(text)}: auto measures layers that have heads of one size, and keys and values of their own, "
            "which this model's have not: give a format, bf16 say."
        )
    sizes = [get(name, cfg.head_dim, seed).bytes_per_vector * NUMBERS for name in ERRORS]
    least, most = -(-sizes[0] // cfg.head_dim), sizes[-1] // cfg.head_dim
    match = _AUTO.fullmatch(text)
    if match is None or not least <= int(match[1]) <= most:
        raise UsageError(
            f"--kv {quoted(text)}: auto chooses formats of keys and values by itself; give auto:N with N = {least} to "
            f"{most}, the bytes of 128 numbers on average."
        )
    plain = dict.fromkeys(short_layers(cfg), named(PLAIN, cfg.head_dim))
    if len(plain) == len(cfg.attention_layers):  # there is nothing to choose
        return LayerFormats(text, tuple(plain.values()))
    return AutoFormats.within(int(match[1]), [(1.0, 1.0)] * len(cfg.attention_layers), cfg.head_dim, seed, plain)


def short_layers(cfg: ModelConfig) -> tuple[int, ...]:
    """The numbers, among the layers that have keys and values of their own, of those with a short window."""
    windows = (layer_specs(cfg)[index].attention.window for index in cfg.attention_layers)
    return tuple(number for number, window in enumerate(windows) if window is not None and window <= SHORT_WINDOW)
