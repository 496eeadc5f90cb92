"""What a configuration says about rotary position embedding. Nothing here imports torch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from octo_run.errors import OctoError, quoted, shown
from octo_run.models.fields import MAX_INT, Fields

THETA = (1.0, 1e30)
_FACTOR = (1.0, 1e6)
_FREQ_FACTOR = (1e-6, 1e6)
_BETA = (1e-3, 1e6)
_MSCALE = (0.0, 1e3)
_ATTENTION_FACTOR = (1e-3, 1e3)
#: Kinds of layers as ``layer_types`` and nested rotary parameters name them.
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are changed for long contexts.

    Attributes:
        kind: ``linear`` divides every frequency by ``factor``. ``llama3`` (Llama 3.1, section "RoPE scaling" of Meta's
            reference code) divides those whose wavelength exceeds
            ``original_max_position_embeddings / low_freq_factor`` tokens, leaves those below
            ``original_max_position_embeddings / high_freq_factor`` as they are, and interpolates between. ``yarn``
            (Peng et al. 2023) does so by the number of turns within the original context, from ``beta_slow`` to
            ``beta_fast``. ``longrope`` (Ding et al. 2024) divides each by a factor of its own, one list for contexts up
            to the original one and one for longer ones. ``proportional`` (Gemma 4) spaces the frequencies of a part of
            the head as those of the whole head are spaced.
        original_max_position_embeddings: Tokens of the context before the scaling; 0: the file does not say.
        attention_factor: Cosines and sines are multiplied by it.
        truncate: yarn's bounds are whole numbers.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def longest(self, context: int) -> int:
        """Tokens of the longest context, where ``max_position_embeddings`` is ``context``.

        Only ``yarn`` and ``linear`` are added to a model as it stands. The factor of ``llama3`` is no ratio of
        contexts, and ``longrope`` has lists of factors that were made for the context that the file names.
        """
        if self.kind not in ("yarn", "linear"):
            return context
        return min(MAX_INT, max(context, int(self.factor * (self.original_max_position_embeddings or context))))


def _turning(share: float, head_dim: int) -> int:
    """A part of a head in whole coordinates, as transformers rounds."""
    return int(share * head_dim)


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a kind of layers.

    Attributes:
        theta: The base of the frequencies.
        share: The part of a head's coordinates, the first ones, that turn.
        query_scaling: ``(beta, n)``: queries at position p are multiplied by ``1 + beta log(1 + floor(p / n))``.
    """

    theta: float
    scaling: RopeScaling | None = None
    share: float = 1.0
    query_scaling: tuple[float, int] | None = None

    def spacing(self, head_dim: int) -> int:
        """The number that the exponents of the frequencies are spaced by, for a head of ``head_dim``."""
        proportional = self.scaling is not None and self.scaling.kind == "proportional"
        return head_dim if proportional else _turning(self.share, head_dim)

    def rotary(self, head_dim: int) -> int:
        """Coordinates of a head of ``head_dim`` that turn: an odd number has one more, for its last frequency."""
        if self.scaling is not None and self.scaling.kind == "proportional":
            return 2 * int(self.share * head_dim // 2)
        return 2 * -(-_turning(self.share, head_dim) // 2)


@dataclass(frozen=True)
class RopeFields:
    """How a family's configuration describes its rotary embedding.

    Attributes:
        theta: The base where it is left out.
        partial: A part of a head may turn (``partial_rotary_factor``).
        share: ... this one where the field is left out.
        proportional: ... with the kind ``proportional`` alone; with others the field says nothing.
        by_kind: Layers that slide have an embedding of their own: nested ``rope_parameters``, or ``local_field``.
        local_field: Has the base of layers that slide in older files.
        local_theta: ... where that is left out; None: the other layers'.
        longrope_names: Further names of the kind ``longrope``.
        outer_original: ``original_max_position_embeddings`` where the field of the configuration itself, which comes
            first in this family, is left out; None: there is no such field.
        left_out: What ``rope_parameters`` are where nothing is said of RoPE; for each kind of layers, or for all.
        stretched: ``max_position_embeddings`` is the context after a linear scaling.
    """

    theta: float = 10_000.0
    partial: bool = False
    share: float = 1.0
    proportional: bool = False
    by_kind: bool = False
    local_field: str = "rope_local_base_freq"
    local_theta: float | None = None
    longrope_names: tuple[str, ...] = ()
    outer_original: int | None = None
    left_out: Mapping[str, Any] = field(default_factory=dict)
    stretched: bool = False

    def longest(self, scaling: RopeScaling | None, context: int) -> int:
        """See `RopeScaling.longest`."""
        if scaling is None or (self.stretched and scaling.kind == "linear"):
            return context
        return scaling.longest(context)


def read_ropes(fields: Fields, how: RopeFields, context: int, head_dim: int) -> tuple[Rope, Rope | None]:
    """The embedding, from ``rope_theta`` + ``rope_scaling`` or from ``rope_parameters`` (newer files), and that of
    layers that slide where it is another."""
    reader = _Reader(fields, how, context, head_dim)
    local = how.local_theta or reader.top
    older, newer = _given(fields, "rope_scaling"), _given(fields, "rope_parameters")
    if older is None and newer is None and FULL in how.left_out:
        newer = Fields(fields.path, how.left_out, "rope_parameters.")
    if how.by_kind and newer is not None and any(kind in newer.values for kind in (FULL, SLIDING)):
        # They win over what older files say beside them.
        bases = {FULL: reader.top, SLIDING: fields.number(how.local_field, local, low=THETA[0], high=THETA[1])}
        full, sliding = (
            reader.one(newer.sub(kind) or Fields(newer.path, {}, newer.prefix), base) for kind, base in bases.items()
        )
        if older is not None and reader.one(older, full.theta) != full:
            raise fields.fail("rope_scaling", "and rope_parameters.full_attention are both given and differ")
        return full, sliding if sliding != full else None
    readings = [reader.one(rope) for rope in (older, newer) if rope is not None]
    if len(readings) == 2 and readings[0] != readings[1]:
        raise fields.fail("rope_scaling", "and rope_parameters are both given and differ")
    if not readings and how.left_out:
        readings = [reader.one(Fields(fields.path, how.left_out, "rope_parameters."), reader.top)]
    rope = readings[0] if readings else reader.plain()
    if not how.by_kind:
        return rope, None
    local = how.local_theta or rope.theta
    share = 1.0 if how.proportional else rope.share
    slides = Rope(fields.number(how.local_field, local, low=THETA[0], high=THETA[1]), share=share)
    return rope, slides if slides != rope else None


def _given(fields: Fields, name: str) -> Fields | None:
    """An object that says something."""
    found = fields.sub(name)
    return found if found is not None and found.values else None


class _Reader:
    def __init__(self, fields: Fields, how: RopeFields, context: int, head_dim: int) -> None:
        self.fields, self.how, self.context, self.head_dim = fields, how, context, head_dim
        self.top = fields.number("rope_theta", how.theta, low=THETA[0], high=THETA[1])

    def plain(self) -> Rope:
        return Rope(self.top, share=1.0 if self.how.proportional else self._share(self.fields, self.how.share))

    def one(self, rope: Fields, base: float | None = None) -> Rope:
        """What ``rope_scaling``, ``rope_parameters`` or a part of the latter says.

        Args:
            base: Where ``rope_theta`` is left out; None: ``rope_theta`` of the configuration, which must then agree.
        """
        fields, top = self.fields, self.top
        theta = rope.number("rope_theta", top if base is None else base, low=THETA[0], high=THETA[1])
        if base is None and fields.raw("rope_theta") is not None and theta != top:
            raise rope.fail("rope_theta", f"({theta:g}) contradicts rope_theta ({top:g})")
        kind = rope.text("rope_type") or rope.text("type")
        if kind is None and _factor(rope, 1.0) != 1.0:
            raise rope.fail("rope_type", f"is missing, though the factor is {_factor(rope):g}: name the scaling")
        counts = kind == "proportional" or not self.how.proportional
        share = self._share(rope, self._share(fields, self.how.share)) if counts else 1.0
        # "dynamic" scales nothing within the file's context, beyond which it allows none. "mrope" turns by three
        # positions, which are one for text.
        if kind is None or kind in ("default", "dynamic", "mrope"):
            nested = [name for name, value in rope.values.items() if isinstance(value, dict)]
            if nested:
                raise rope.fail(
                    shown(nested[0], 60), "is an object: this family has one rotary embedding for all layers"
                )
            return Rope(theta, share=share)
        if kind in self.how.longrope_names:
            kind = "longrope"
        read = _KINDS.get(kind)
        if read is None:
            names = ", ".join(map(repr, ("default", *_KINDS)))
            raise rope.fail("rope_type", f"is {quoted(kind)}, and octo-run computes {names} only")
        if kind == "proportional" and not self.how.partial:
            raise rope.fail("rope_type", "is 'proportional', which this family has not")
        odd = _turning(share, self.head_dim)
        if odd % 2 and kind in ("yarn", "longrope"):
            problem = f"is {share:g}, so {odd} coordinates turn, and {kind!r} is not defined for an odd number"
            raise self.fields.fail("partial_rotary_factor", problem)
        beta = rope.number("llama_4_scaling_beta", 0.0, low=0.0, high=1e3)
        scaling = read(self, rope, share)
        scaled = (beta, scaling.original_max_position_embeddings or self.context) if beta else None
        return Rope(theta, scaling, share, scaled)

    def _share(self, place: Fields, default: float) -> float:
        part = place.number("partial_rotary_factor", default, low=0.0, high=1.0)
        if part != 1.0 and not self.how.partial:
            raise place.fail("partial_rotary_factor", f"is {part:g}, and octo-run rotates whole heads of this family")
        if part * self.head_dim < 2:
            raise place.fail("partial_rotary_factor", f"is {part:g}, which leaves no pair of coordinates to turn")
        return part

    def original(self, rope: Fields) -> int:
        """Tokens of the context that the model was trained with before the scaling."""
        if self.how.outer_original is not None:
            return self.fields.integer("original_max_position_embeddings", self.how.outer_original)
        return rope.integer("original_max_position_embeddings", self.context)

    def linear(self, rope: Fields, _share: float) -> RopeScaling:
        original = rope.integer("original_max_position_embeddings", 0)
        return RopeScaling("linear", _factor(rope), original_max_position_embeddings=original)

    def proportional(self, rope: Fields, _share: float) -> RopeScaling:
        return RopeScaling("proportional", rope.number("factor", 1.0, low=_FACTOR[0], high=_FACTOR[1]))

    def llama3(self, rope: Fields, _share: float) -> RopeScaling:
        low, high = (
            rope.number(name, low=_FREQ_FACTOR[0], high=_FREQ_FACTOR[1])
            for name in ("low_freq_factor", "high_freq_factor")
        )
        if high <= low:
            raise rope.fail("high_freq_factor", f"({high:g}) is not greater than low_freq_factor ({low:g})")
        return RopeScaling("llama3", _factor(rope), low, high, self.original(rope))

    def yarn(self, rope: Fields, _share: float) -> RopeScaling:
        original = self.original(rope)
        factor = rope.number("factor", max(1.0, self.context / original), low=_FACTOR[0], high=_FACTOR[1])
        scale, scale_all = (rope.number(name, 0.0, low=_MSCALE[0], high=_MSCALE[1]) for name in _MSCALES)

        def size(by: float) -> float:
            return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

        attention = size(scale) / size(scale_all) if scale and scale_all else size(1.0)
        fast, slow = (
            rope.number(name, default, low=_BETA[0], high=_BETA[1], zero=True) or default
            for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
        )
        if fast <= slow:
            raise rope.fail("beta_fast", f"({fast:g}) is not greater than beta_slow ({slow:g})")
        return RopeScaling(
            "yarn", factor, original_max_position_embeddings=original, beta_fast=fast, beta_slow=slow,
            attention_factor=_attention_factor(rope, attention), truncate=rope.boolean("truncate", True),
        )  # fmt: skip

    def longrope(self, rope: Fields, share: float) -> RopeScaling:
        original, pairs = self.original(rope), _turning(share, self.head_dim) // 2
        factor = rope.number("factor", max(1.0, self.context / original), low=_FACTOR[0], high=_FACTOR[1])
        attention = 1.0
        if factor > 1:
            if original < 2:
                raise rope.fail("original_max_position_embeddings", f"is {original}: give at least 2")
            attention = math.sqrt(1 + math.log(factor) / math.log(original))
        return RopeScaling(
            "longrope", factor, original_max_position_embeddings=original,
            attention_factor=_attention_factor(rope, attention), short_factors=_factors(rope, "short_factor", pairs),
            long_factors=_factors(rope, "long_factor", pairs),
        )  # fmt: skip


_MSCALES = ("mscale", "mscale_all_dim")
_KINDS: dict[str, Callable[[_Reader, Fields, float], RopeScaling]] = {
    "linear": _Reader.linear,
    "llama3": _Reader.llama3,
    "yarn": _Reader.yarn,
    "longrope": _Reader.longrope,
    "proportional": _Reader.proportional,
}


def _factor(rope: Fields, default: float | None = None) -> float:
    return rope.number("factor", default, low=_FACTOR[0], high=_FACTOR[1])


def _attention_factor(rope: Fields, default: float) -> float:
    return rope.number("attention_factor", default, low=_ATTENTION_FACTOR[0], high=_ATTENTION_FACTOR[1])


def _factors(rope: Fields, name: str, pairs: int) -> tuple[float, ...]:
    values = rope.raw(name)
    if not isinstance(values, list) or len(values) != pairs:
        raise rope.fail(name, f"is no list of {pairs} numbers, one for each pair of coordinates that turns")
    for value in values:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not _FREQ_FACTOR[0] <= value <= _FREQ_FACTOR[1]:
            raise _no_factor(rope, name, value)
    return tuple(map(float, values))


def _no_factor(rope: Fields, name: str, value: object) -> OctoError:
    return rope.fail(name, f"holds {quoted(value)}, not a number from {_FREQ_FACTOR[0]:g} to {_FREQ_FACTOR[1]:g}")
