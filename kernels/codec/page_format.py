"""Pages of the arena: their bytes, their two layouts, and the tag that says which bytes they are.

A page is the K block of `PAGE_TOKENS` vectors of one layer and KV head, then their V block. Two layouts have the same
size: in "rows", as CPUs write them, a block is one row of the codec after the other; in "lanes", as GPUs write them, a
block of a trellis format lies as `page_layout` says. Blocks of other formats are rows in both. What a page holds does
not depend on its layout: conversion moves bits and is exact both ways.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Literal

import torch

from octo_run.errors import OctoError, quoted
from octo_run.kernels.codec.base import Codec
from octo_run.kernels.codec.formats import PLAIN, KVFormat, get, names
from octo_run.kernels.codec.page_layout import Side, lane_bits, row_bits
from octo_run.kernels.codec.plain import PlainCodec
from octo_run.kernels.codec.rotation import HEAD_DIMS
from octo_run.kernels.codec.trellis import TrellisCodec
from octo_run.kernels.page_size import PAGE_TOKENS

VERSIONS = (1, 2)
"""Of the bytes: a change of what pages of a format hold, for the same keys and values, makes a new one for that format.
In version 1 all vectors of `oct2`, `oct3` and `oct4` had eight chains; those with four are of version 2."""
EXAMPLE = "octo-page/1 oct3:oct3 lanes d128 seed0"

Layout = Literal["rows", "lanes"]
LAYOUTS: tuple[Layout, Layout] = ("rows", "lanes")
SIDES: tuple[Side, Side] = ("k", "v")
_PLAIN_DTYPES = {PLAIN: torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
"""What tags call the uncompressed formats, which `--kv` calls by one name whatever the model's dtype is."""

_TAG = re.compile(r"octo-page/(0|[1-9][0-9]{0,8})(?: (.*))?", re.DOTALL)
_FIELDS = re.compile(r"([a-z0-9]+):([a-z0-9]+) ([a-z]+) d([1-9][0-9]{0,5}) seed(0|-?[1-9][0-9]{0,99})")
_CHUNK = 256  # blocks converted at a time: bounds their bits, a byte each


class OtherPages(OctoError):
    """A tag of pages as other versions of this program write them."""


def version_of(fmt: KVFormat) -> int:
    """The version of a format's pages."""
    return 2 if any(isinstance(codec, TrellisCodec) and codec.chains != 8 for codec in (fmt.k, fmt.v)) else 1


def page_bytes(fmt: KVFormat) -> int:
    """Bytes of a page, whatever its layout."""
    return fmt.k.block_bytes + fmt.v.block_bytes


@dataclass(frozen=True, eq=False)
class PageFormat:
    """The pages of a KV format in one layout. Two are equal if their tags are.

    Pages are uint8 [..., page_bytes] on any device; keys and values [..., PAGE_TOKENS, head_dim].
    """

    kv: KVFormat
    layout: Layout

    def __post_init__(self) -> None:
        k, v = self.kv.k, self.kv.v
        if self.layout not in LAYOUTS:
            raise ValueError(f"a page's layout is one of {', '.join(LAYOUTS)}, not {self.layout!r}")
        if (k.head_dim, k.seed) != (v.head_dim, v.seed):
            raise ValueError(f"K and V of a page must have one head_dim and one seed, not those of {k!r} and {v!r}")

    @classmethod
    def on(cls, kv: KVFormat, device: torch.device) -> PageFormat:
        """The pages that ``kernels.encode_pages`` writes on a device and ``kernels.attend`` reads there."""
        return cls(kv, "rows" if device.type == "cpu" else "lanes")

    @classmethod
    def parse(cls, tag: str) -> PageFormat:
        """The format that has this tag.

        Raises:
            OtherPages: A tag of another version than this program's for its format.
            OctoError: Anything else.
        """
        whole = _TAG.fullmatch(tag) if isinstance(tag, str) else None
        if whole is not None and int(whole[1]) not in VERSIONS:
            raise OtherPages(_other_version(tag, int(whole[1]), f"reads versions {_either(tuple(map(str, VERSIONS)))}"))
        fields = None if whole is None else _FIELDS.fullmatch(whole[2] or "")
        if fields is None:
            raise OctoError(f"{quoted(tag)} is not the tag of a page format, which reads like '{EXAMPLE}'.")
        head_dim, seed = int(fields[4]), int(fields[5])
        if fields[3] not in LAYOUTS:
            raise OctoError(
                f"The page tag {quoted(tag)} names the layout {quoted(fields[3])}: the layouts are {_either(LAYOUTS)}."
            )
        k, v = (_codec(tag, name, head_dim, seed) for name in (fields[1], fields[2]))
        fmt = KVFormat(k.name if k.name == v.name else f"{k.name}:{v.name}", k, v)
        if whole is not None and int(whole[1]) != version_of(fmt):
            here = f"reads {fields[1]}:{fields[2]} at head_dim {head_dim} in version {version_of(fmt)}"
            raise OtherPages(_other_version(tag, int(whole[1]), here))
        return cls(fmt, LAYOUTS[fields[3] == "lanes"])

    @functools.cached_property
    def tag(self) -> str:
        """Version, formats of K and V, layout, head_dim and the rotation's seed.

        An example is "octo-page/1 oct3:oct3 lanes d128 seed0".
        """
        k, v = self.kv.k, self.kv.v
        names = f"{_stored_name(k)}:{_stored_name(v)}"
        return f"octo-page/{version_of(self.kv)} {names} {self.layout} d{k.head_dim} seed{k.seed}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PageFormat) and self.tag == other.tag

    def __hash__(self) -> int:
        return hash(self.tag)

    def __str__(self) -> str:
        return self.tag

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of one layer and KV head."""
        return page_bytes(self.kv)

    def encode(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Pages of keys and values in the original basis.

        Raises:
            ValueError: As for ``Codec.encode``.
        """
        return self._joined(self.kv.k.encode(k), self.kv.v.encode(v))

    def encode_rotated(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Pages of keys and values in the rotated basis, in which the arena is.

        Raises:
            ValueError: As for ``Codec.encode``.
        """
        return self._joined(self.kv.k.encode_rotated(k), self.kv.v.encode_rotated(v))

    def decode(self, pages: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of pages in the original basis.

        Raises:
            ValueError: As for ``rows``.
        """
        k, v = self.rows(pages)
        return self.kv.k.decode(k, dtype), self.kv.v.decode(v, dtype)

    def decode_rotated(
        self, pages: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of pages in the rotated basis.

        Raises:
            ValueError: As for ``rows``.
        """
        k, v = self.rows(pages)
        return self.kv.k.decode_rotated(k, dtype), self.kv.v.decode_rotated(v, dtype)

    def rows(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The codecs' rows of keys and of values, uint8 [..., PAGE_TOKENS, bytes_per_vector].

        Raises:
            ValueError: As for ``convert``.
        """
        k, v = self._blocks(self.convert(pages, "rows"))
        return (
            k.reshape(*k.shape[:-1], PAGE_TOKENS, self.kv.k.bytes_per_vector),
            v.reshape(*v.shape[:-1], PAGE_TOKENS, self.kv.v.bytes_per_vector),
        )

    def convert(self, pages: torch.Tensor, to: PageFormat | Layout) -> torch.Tensor:
        """The same pages as ``to``, a format or a layout, has them.

        Returns:
            uint8 of the same shape; ``pages`` themselves where nothing is to be moved.

        Raises:
            ValueError: A format that differs in more than the layout, pages of another shape or dtype, or pages that no
                writer made: they have bits where the layout has none, which would be lost.
        """
        if not isinstance(to, PageFormat):
            to = PageFormat(self.kv, to)
        elif to != PageFormat(self.kv, to.layout):
            raise ValueError(f"pages of '{self}' hold other codes than those of '{to}': only layouts are converted")
        if pages.dtype != torch.uint8 or pages.ndim == 0 or pages.shape[-1] != self.page_bytes:
            raise ValueError(
                f"pages of '{self}' are uint8 [..., {self.page_bytes}], not {pages.dtype} {list(pages.shape)}"
            )
        codecs = (self.kv.k, self.kv.v)
        if to == self or not any(isinstance(codec, TrellisCodec) for codec in codecs):
            return pages
        return torch.cat([
            self._moved(block, codec, side, to.layout) if isinstance(codec, TrellisCodec) else block
            for block, codec, side in zip(self._blocks(pages), codecs, SIDES, strict=True)
        ], -1)  # fmt: skip

    def _blocks(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The K and V blocks of pages."""
        split = self.kv.k.block_bytes
        return pages[..., :split], pages[..., split:]

    def _joined(self, k_rows: torch.Tensor, v_rows: torch.Tensor) -> torch.Tensor:
        """Pages of the codecs' rows."""
        pages = torch.cat((k_rows.flatten(-2), v_rows.flatten(-2)), -1)
        return PageFormat(self.kv, "rows").convert(pages, self)

    def _moved(self, blocks: torch.Tensor, codec: TrellisCodec, side: Side, to: Layout) -> torch.Tensor:
        """Blocks whose bits are moved to where ``to`` has them."""
        sources, lost = _sources(codec, side, to, blocks.device)
        byte = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
        flat = blocks.reshape(-1, codec.block_bytes)
        out = torch.empty_like(flat)
        for start in range(0, len(flat), _CHUNK):
            part = flat[start : start + _CHUNK].t().contiguous()  # a bit of all blocks moves at a time
            bits = (part[:, None] >> byte & 1).flatten(0, 1)
            if bool(bits.index_select(0, lost).any()):
                raise ValueError(f"a {side.upper()} block of '{self}' has bits where the layout has none")
            moved = torch.cat((bits, torch.zeros_like(bits[:1]))).index_select(0, sources).view(-1, 8, part.shape[1])
            made = moved[:, 0]
            for n in range(1, 8):
                made |= moved[:, n] << n
            out[start : start + _CHUNK] = made.t()
        return out.view(blocks.shape)


@functools.cache
def _sources(codec: TrellisCodec, side: Side, to: Layout, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each bit of a block in the layout ``to`` its place in the other one, one behind the last for a bit that is
    always 0; the places there of which nothing is taken; int64."""
    count, rows, lanes = 8 * codec.block_bytes, row_bits(codec), lane_bits(codec, side)
    here, there = (rows, lanes) if to == "lanes" else (lanes, rows)
    sources = torch.from_numpy(here.sources(there, count)).to(device)
    taken = torch.zeros(count, dtype=torch.bool, device=device).index_fill_(0, sources[sources >= 0], True)
    return sources.where(sources >= 0, count), (~taken).nonzero().flatten()


def _other_version(tag: str, version: int, here: str) -> str:
    """That a tag is of another version; ``here``: what this program reads."""
    return (
        f"The page tag {quoted(tag)} is of version {version}, and this program {here} alone: use the program that "
        "wrote these pages, or write them anew with this one."
    )


def _stored_name(codec: Codec) -> str:
    """What a tag calls a codec."""
    if isinstance(codec, PlainCodec):
        return next(name for name, dtype in _PLAIN_DTYPES.items() if dtype == codec.dtype)
    return codec.name


def _codec(tag: str, name: str, head_dim: int, seed: int) -> Codec:
    """The codec that a tag calls ``name``. OctoError for one that there is not."""
    if name in _PLAIN_DTYPES:
        return PlainCodec(head_dim, seed, _PLAIN_DTYPES[name])
    if name not in names():
        known = _either((*(known for known in names() if known != PLAIN), *_PLAIN_DTYPES))
        raise OctoError(f"The page tag {quoted(tag)} names the format {quoted(name)}: the formats are {known}.")
    if head_dim not in HEAD_DIMS:
        dims = _either(tuple(map(str, HEAD_DIMS)))
        raise OctoError(f"The page tag {quoted(tag)} has head_dim {head_dim}, and {name} has only {dims}.")
    return get(name, head_dim, seed)


def _either(choices: tuple[str, ...]) -> str:
    return f"{', '.join(choices[:-1])} and {choices[-1]}"
