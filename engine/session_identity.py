"""What decides whether the pages of a saved conversation can be used: the model, its weights, formats, and keys."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from octo_run.engine.random_model import NoTokenizer
from octo_run.errors import OctoError, quoted, shown
from octo_run.kernels.codec import PageFormat
from octo_run.kernels.codec.page_format import OtherPages
from octo_run.models.fields import Fields
from octo_run.models.files import weight_files
from octo_run.models.foreign import parsing
from octo_run.models.hub import resolve

if TYPE_CHECKING:
    from octo_run.engine.engine import Engine

#: Bytes of a weight file that its fingerprint takes from each of so many places.
_SAMPLE, _SAMPLES = 4096, 18
_MOST_KINDS = 64  # of pages in one file


def fingerprint(engine: Engine) -> str:
    """What tells one model from another: its configuration, and the sizes and samples of its weight files.

    Raises:
        OctoError: Weights that were made up.
    """
    if isinstance(engine.tokenizer, NoTokenizer):
        raise OctoError("a conversation with random weights cannot be saved.")
    digest = hashlib.sha256(repr(engine.config).encode())
    for file in weight_files(resolve(engine.name)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with parsing(file, "safetensors"), file.open("rb") as data:
            for number in range(_SAMPLES):
                data.seek(number * max(0, size - _SAMPLE) // (_SAMPLES - 1))
                digest.update(data.read(_SAMPLE))
    return digest.hexdigest()


def _weights(engine: Engine) -> str:
    """How weights are quantised; the dtype of the arithmetic is the device's."""
    return re.sub(r"\b(?:bf16|fp16|fp32)\b", "dense", engine.forward.decoder.weight_format)


@dataclass(frozen=True)
class Identity:
    """What decides whether pages can be used.

    Attributes:
        formats: The tags of the layers' pages.
        rope: RoPE's list of factors, where the context chose it: keys are stored turned.
    """

    fingerprint: str
    weights: str
    formats: tuple[str, ...]
    conditioning: str
    sink: int
    window: int
    rope: str

    @classmethod
    def of(cls, engine: Engine) -> Identity:
        """That of an engine."""
        shape = engine.plan.shape
        tags = tuple(page.tag for page in engine.arena.page_formats)
        return cls(
            fingerprint(engine), _weights(engine), tags, engine.plan.conditioning, shape.sink, shape.window,
            engine.forward.decoder.rope_factors,
        )  # fmt: skip

    def difference(self, other: Identity, model: str) -> str | None:
        """Why pages of this identity are of no use to an engine of another one; ``model`` is what it is called."""
        if self.fingerprint != other.fingerprint:
            return f"it was saved with another model, {quoted(model)}"
        if self.weights != other.weights:
            return f"it was saved with weights {shown(self.weights, 40)} and these are {other.weights}"
        for tag in dict.fromkeys(self.formats):
            if _is_other(tag):
                return f"its pages, {quoted(tag)}, are of another version than this program's"
        mine, theirs = _names(self.formats), _names(other.formats)
        if mine != theirs:
            return f"it was saved with the KV cache {_short(mine)} and this is {_short(theirs)}"
        if self.conditioning != other.conditioning:
            return f"it was saved with --conditioning {self.conditioning} and this is {other.conditioning}"
        if self.rope != other.rope:
            return (
                f"it was saved with RoPE's {self.rope or 'unnamed'} factors and this context chooses the {other.rope} "
                "ones (docs/families.md)"
            )
        if (self.sink, self.window) != (other.sink, other.window):
            return (
                f"it was saved with {self.sink:,} sinks and a window of {self.window:,} tokens and these are "
                f"{other.sink:,} and {other.window:,}"
            )
        return None


def _is_other(tag: str) -> bool:
    """Whether pages are as another version of this program writes them. OctoError for what is no tag."""
    try:
        PageFormat.parse(tag)
    except OtherPages:
        return True
    return False


def _names(tags: tuple[str, ...]) -> list[tuple[str, str, int, int]]:
    """Formats of keys and values, head_dim and seed of each layer: what no conversion changes."""
    found = [PageFormat.parse(tag).kv for tag in tags]
    return [(kv.k.name, kv.v.name, kv.k.head_dim, kv.k.seed) for kv in found]


def _short(names: list[tuple[str, str, int, int]]) -> str:
    """Formats in words: one where all layers have it, else how many kinds there are."""
    kinds = dict.fromkeys(k if k == v else f"{k}:{v}" for k, v, _, _ in names)
    seeds = dict.fromkeys(seed for *_, seed in names)
    seed = "" if [*seeds] == [0] else f" of the seed {quoted(next(iter(seeds)))}"
    where = "" if len(kinds) == 1 else f" in {len(names):,} layers"
    return f"{' and '.join([*kinds][:3])}{where}{seed}"


#: Those that were found, as long as somebody has the engine.
_found: WeakKeyDictionary[Engine, Identity] = WeakKeyDictionary()


def identity_of(engine: Engine) -> Identity:
    """That of an engine, found once."""
    if engine not in _found:
        _found[engine] = Identity.of(engine)
    return _found[engine]


def read_identity(fields: Fields) -> Identity:
    """The identity in a header.

    Raises:
        OctoError: It is none.
    """
    values = fields.sub("identity")
    if values is None:
        raise fields.fail("identity", "is missing")
    tags = values.raw("formats")
    if not isinstance(tags, list) or not 1 <= len(tags) <= 10_000 or not all(isinstance(tag, str) for tag in tags):
        raise values.fail("formats", f"is {quoted(tags)}, no list of page formats")
    kinds = dict.fromkeys(tags)
    if len(kinds) > _MOST_KINDS:
        raise values.fail("formats", f"has {len(kinds):,} kinds of pages")
    for tag in kinds:
        _is_other(tag)
    return Identity(
        fingerprint=values.text("fingerprint") or "",
        weights=values.text("weights") or "",
        formats=tuple(tags),
        conditioning=shown(values.text("conditioning") or "", 40),
        sink=values.integer("sink", low=0),
        window=values.integer("window", low=0),
        rope=shown(values.text("rope") or "", 40),
    )
