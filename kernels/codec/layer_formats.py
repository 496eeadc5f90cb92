"""The formats of all layers of a KV cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from octo_run.kernels.codec.formats import KVFormat
from octo_run.kernels.codec.plain import PlainCodec

if TYPE_CHECKING:
    from torch import Tensor

    from octo_run.kernels.codec.base import Codec


class LayerRun(NamedTuple):
    """Consecutive layers of one format: those from ``first`` on, before ``end``."""

    first: int
    end: int
    fmt: KVFormat


@dataclass(frozen=True)
class LayerFormats:
    """A format for each layer. All that are coded share a seed: the rotation of keys, and that of values, is one for
    all coded heads of one size.

    Attributes:
        name: What ``--kv`` was given.
        layers: In order, at least one.
    """

    name: str
    layers: tuple[KVFormat, ...]

    def __post_init__(self) -> None:
        for side in ("k", "v"):
            seeds = {codec.seed for codec in self._codecs(side) if not isinstance(codec, PlainCodec)}
            if len(seeds) > 1:
                raise ValueError(
                    f"the layers' codes of {side.upper()} must have one seed, not those of {sorted(seeds)}"
                )

    @classmethod
    def uniform(cls, fmt: KVFormat, layers: int) -> LayerFormats:
        """One format for so many layers."""
        return cls(fmt.name, (fmt,) * layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> KVFormat:
        return self.layers[layer]

    def __iter__(self) -> Iterator[KVFormat]:
        return iter(self.layers)

    def _codecs(self, side: str) -> list[Codec]:
        """Those of keys (``k``) or values (``v``) of the layers, in order."""
        return [getattr(fmt, side) for fmt in self.layers]

    @property
    def coded(self) -> bool:
        """Whether keys of any layer are coded."""
        return any(fmt.k.bits > 0 for fmt in self.layers)

    @cached_property
    def vector_bytes(self) -> int:
        """Bytes that a token of one KV head takes in pages: its keys and values of all layers."""
        return sum(self.layer_bytes(layer) for layer in range(len(self)))

    def layer_bytes(self, layer: int) -> int:
        """Bytes that a token of one KV head takes in pages of a layer: its keys and values."""
        return self.layers[layer].k.bytes_per_vector + self.layers[layer].v.bytes_per_vector

    def rotations(self, side: str) -> tuple[Tensor | None, ...]:
        """What keys (``k``) or values (``v``) of each layer are rotated by, ``[d, d]``; None: they have no code."""
        return tuple(None if isinstance(codec, PlainCodec) else codec.rotation for codec in self._codecs(side))

    @cached_property
    def runs(self) -> tuple[LayerRun, ...]:
        """The layers cut where the format changes."""
        return self.runs_of(range(len(self)))

    def runs_of(self, layers: Iterable[int]) -> tuple[LayerRun, ...]:
        """Some layers, in order, cut where the format changes and where they are no neighbours."""
        found = list[LayerRun]()
        for layer in layers:
            fmt, last = self.layers[layer], found[-1] if found else None
            if last is not None and last.end == layer and (last.fmt.k, last.fmt.v) == (fmt.k, fmt.v):
                found[-1] = last._replace(end=layer + 1)
            else:
                found.append(LayerRun(layer, layer + 1, fmt))
        return tuple(found)

    def __str__(self) -> str:
        """The name, and how many layers have which format where they are not alike."""
        return self.name if len(self.runs) == 1 else f"{self.name} ({self.counts})"

    @property
    def counts(self) -> str:
        """How many layers have which format, as text: ``K 2 x oct2, 1 x oct3; V 3 x oct3``."""
        sides = []
        for side in ("k", "v"):
            counts = Counter(getattr(fmt, side).name for fmt in self.layers)
            sides.append(f"{side.upper()} " + ", ".join(f"{counts[name]} x {name}" for name in sorted(counts)))
        return "; ".join(sides)
