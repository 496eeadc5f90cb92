"""Conversations in files: their text and settings, and what the KV cache holds of them, page by page.

A session file is a safetensors file. Its ``__metadata__`` has ``format`` (``octo-run session``) and ``session``, a JSON
object: version, model, settings, the conversation, and what decides whether the pages can be used. Its tensors:

- ``ids`` int32 ``[n]``: the tokens that the cache holds;
- ``pages`` uint8 ``[P, bytes]``: the packed pages as the arena has them, a row has all layers without a window and KV
  heads of a page; ``window0``, ``window1`` and so on those of layers with a window: the last ones, which the next token
  sees, and some before them;
- ``full0`` ``[2, layers, kv_heads, sink + ring, d]``: the sinks and the ring, K and V; ``full1`` and so on of layers
  whose heads differ from these in number or size;
- ``conv`` and ``memory``: the states of recurrent layers behind the last token, where there are such layers;
- ``key_maps0`` ``[layers, 2, kv_heads, d, d]`` and ``key_means0`` float32 ``[layers, kv_heads, d]``: what queries and
  keys are multiplied by and what is kept out of the code, where there is such; ``key_maps1`` as ``full1``. They are
  measured, so each machine has its own; an engine takes those of the file.

Pages go from one layout to the other where they were written on another kind of device. Nothing but the codec
compresses them. A file is written beside its name, brought to the disk, and then given its name: whoever is interrupted
leaves the older one.

A conversation that is saved after each turn has a second file for some turns, its *tail* (``.NAME.tail``): all that a
session file has, but of the pages only those that the first file lacks. Its header names the first file by its ``id``,
which each file has anew, and says how many of its pages count. A tail of another first file counts for nothing.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from octo_run.engine.kept_prefixes import common_length
from octo_run.engine.sampling import SamplingParams
from octo_run.engine.sequence import Sequence
from octo_run.engine.session import Session
from octo_run.engine.session_identity import Identity, identity_of, read_identity
from octo_run.errors import OctoError, UsageError, quoted, shown
from octo_run.kernels import PAGE_TOKENS as PAGE
from octo_run.kernels.codec import PageFormat
from octo_run.kernels.codec.plain import PlainCodec
from octo_run.models.fields import Fields
from octo_run.models.foreign import json_object
from octo_run.models.safetensors_file import STORED_DTYPES, TensorEntry, TensorFile, read_headers
from octo_run.models.safetensors_writer import Item, Shard

if TYPE_CHECKING:
    from octo_run.engine.arena import KVArena
    from octo_run.engine.engine import Engine
    from octo_run.models.decoder import AttentionWeights

FORMAT = "octo-run session"
#: Of the header: a change of what it says makes a new one.
VERSION = 2
#: Bytes of pages that are read, or written, at once.
PIECE_BYTES = 32 << 20
_ADVICE = "its file is damaged, delete it"
#: The states of recurrent layers: what convolutions remember, and the memories.
_STATES = ("conv", "memory")
_ROLES = ("user", "assistant")


class SessionMismatch(OctoError):
    """The pages of a session cannot be used with an engine; its text can."""


def tail_of(path: Path) -> Path:
    """Where the tail of a session file lies."""
    return path.with_name(f".{path.name}.tail")


@dataclass(frozen=True)
class Base:
    """A session file that a tail may continue.

    Attributes:
        engine: Whose pages were written.
        ids, page_ids: What it has, as in a snapshot.
    """

    file_id: str
    engine: weakref.ref[Engine]
    ids: list[int]
    page_ids: list[int]


@dataclass(frozen=True)
class Snapshot:
    """A conversation at one moment, ready to be written; only the pages still lie in the arena.

    Attributes:
        engine: Whose pages they are.
        rows: What the row of the sequence holds, by its names in the file; none where nothing is held.
        page_ids: The pages, by the names that they have in the file; they must stay what they are until ``write`` says
            that they were read.
    """

    engine: Engine
    header: dict[str, Any]
    ids: list[int]
    page_ids: dict[str, list[int]]
    rows: dict[str, Tensor]

    @classmethod
    def take(
        cls, session: Session, settings: SamplingParams, options: dict[str, str | int | None] | None = None
    ) -> Snapshot:
        """The conversation of a session, and what the cache holds of it.

        Args:
            options: What the engine was loaded with, to be kept with it.

        Raises:
            OctoError: A model with random weights.
        """
        engine, messages = session.engine, session.messages
        sequence, length, pages = _held(engine, session.rendered(messages) if messages else [])
        header = {
            "id": os.urandom(16).hex(),
            "version": VERSION,
            "model": _lasting(engine.name),
            "saved": time.time(),
            "identity": dataclasses.asdict(identity_of(engine)),
            "settings": dataclasses.asdict(settings),
            "options": options or {},
            "variables": session.variables,
            "system": session.system,
            "turns": session.turns,
        }
        if sequence is None:
            return cls(engine, header, [], {name: [] for name in _stores(engine.arena)}, {})
        row, page_ids = sequence.row, {"pages": sequence.page_ids[:pages]}
        for number, group in enumerate(engine.arena.windows):
            first = group.first_held(row, length, pages)
            page_ids[f"window{number}"] = group.pool.held[row][first:pages]
        parts_of = engine.arena.row_state(sequence.row)
        rows = {f"full{kind}": part.to("cpu", copy=True) for kind, part in enumerate(parts_of)}
        if engine.arena.states is not None:
            parts = engine.arena.states.of(sequence.row, length)
            rows |= {name: part.to("cpu", copy=True) for name, part in zip(_STATES, parts, strict=True)}
        return cls(engine, header, sequence.ids[:length], page_ids, rows)

    @property
    def as_base(self) -> Base:
        """The file of this snapshot, to be continued."""
        return Base(self.header["id"], weakref.ref(self.engine), self.ids, self.page_ids["pages"])

    def shared(self, base: Base | None) -> int:
        """How many of the first pages a file has already: those with the same numbers and the same tokens up to them.

        A page that was given back and taken again for the same tokens is not told from the former one; it differs by
        rounding at most. Whoever lets the engine store keys in another way must forget the file.
        """
        if base is None or base.engine() is not self.engine:
            return 0
        alike = max(0, common_length(base.ids, self.ids) - self.engine.plan.shape.sink) // PAGE
        return min(alike, common_length(base.page_ids, self.page_ids["pages"]))

    def items(self, were_read: Callable[[], None], first_page: int = 0) -> dict[str, Item]:
        """The tensors of the file, with the pages of all tokens from one on; ``were_read`` is called when the arena is
        needed no more."""
        found = {"ids": _item(torch.tensor(self.ids, dtype=torch.int32))}
        stores = _stores(self.engine.arena)
        unread = {*stores}

        def pieces(name: str, pages: Tensor, ids: list[int]) -> Iterator[Tensor]:
            count = max(1, PIECE_BYTES // max(1, pages.shape[1]))
            for first in range(0, len(ids), count):
                chosen = torch.tensor(ids[first : first + count], device=pages.device)
                with torch.inference_mode():
                    piece = pages.index_select(0, chosen).cpu()
                yield piece
            unread.discard(name)
            if not unread:
                were_read()

        for name, (pages, _) in stores.items():
            ids = self.page_ids[name][first_page if name == "pages" else 0 :]
            found[name] = Item(torch.uint8, (len(ids), pages.shape[1]), partial(pieces, name, pages, ids))
        if self.rows:
            found |= {name: _item(part) for name, part in self.rows.items()}
            found |= {name: _item(torch.stack(parts).cpu()) for name, parts in _key_tensors(self.engine).items()}
        return found

    def write(self, path: Path, were_read: Callable[[], None] = lambda: None) -> None:
        """Write the file, whole or not at all; a tail that it had is gone then.

        Args:
            were_read: Called when the arena's pages may change again.

        Raises:
            OctoError: It cannot be written.
        """
        self._write(path, path, self.header, self.items(were_read))
        with suppress(OSError):  # it continues no file any more
            tail_of(path).unlink(missing_ok=True)

    def write_tail(self, path: Path, base: Base, were_read: Callable[[], None] = lambda: None) -> None:
        """Write what the session file at ``path``, which is ``base``, lacks, as its tail; see :meth:`write`."""
        pages = self.shared(base)
        header = self.header | {"base": {"id": base.file_id, "pages": pages}}
        self._write(path, tail_of(path), header, self.items(were_read, pages))

    def _write(self, path: Path, target: Path, header: dict[str, Any], items: dict[str, Item]) -> None:
        metadata = {"format": FORMAT, "session": json.dumps(header)}
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _remove_left_behind(path)
            part = path.with_name(f".{path.name}.{os.urandom(6).hex()}.part")
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as out:
                    fcntl.flock(out, fcntl.LOCK_EX)  # says that somebody writes it
                    Shard(target.name, items, metadata).write(out.write)
                    out.flush()
                    os.fsync(out.fileno())
                    part.replace(target)
                _sync_folder(path.parent)
            finally:
                with suppress(OSError):
                    part.unlink(missing_ok=True)
        except OSError as error:
            raise OctoError(f"{target} cannot be written: {error.strerror or error}.") from None


def _remove_left_behind(path: Path) -> None:
    """Remove parts of this session that killed programs left: nobody holds their lock."""
    for part in path.parent.glob(f".{path.name}.*.part"):
        with suppress(OSError), part.open("rb") as data:
            fcntl.flock(data, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def _sync_folder(folder: Path) -> None:
    """Bring the new name to the disk, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _lasting(model: str) -> str:
    """What a model is called, from whatever folder: the whole path of a folder."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _item(tensor: Tensor) -> Item:
    tensor = tensor.contiguous()
    return Item(tensor.dtype, tuple(tensor.shape), lambda: [tensor])


def _held(engine: Engine, ids: list[int]) -> tuple[Sequence | None, int, int]:
    """The sequence that holds most of a conversation, and how many of its tokens and pages that are."""
    rows = [sequence for sequence in engine.arena.table.rows if sequence is not None]
    best = max(rows, key=lambda sequence: sequence.common(ids), default=None)
    if best is None or not best.common(ids):
        return None, 0, 0
    return best, *best.after_cut(best.common(ids))


def _key_tensors(engine: Engine) -> dict[str, list[Tensor]]:
    """The maps and means of all layers whose keys are conditioned, by their names in a file; none that follow from the
    rotation alone."""
    every, found = _attention_layers(engine), dict[str, list[Tensor]]()
    for kind, numbers in enumerate(engine.plan.shape.kinds.values()):
        layers = [every[number] for number in numbers]
        maps = [layer.maps for layer in layers if layer.maps is not None]
        if engine.plan.conditioning == "full" and len(maps) == len(layers):
            found[f"key_maps{kind}"] = maps
        means = [layer.key_mean for layer in layers if layer.key_mean is not None]
        if len(means) == len(layers):
            found[f"key_means{kind}"] = means
    return found


def _stores(arena: KVArena) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """What holds pages, by its name in a file: ``[pages, bytes]``, and the layers of which these are, in order."""
    windowed = {layer for group in arena.windows for layer in group.shape.layers}
    found = {"pages": (arena.pages, tuple(layer for layer in range(arena.shape.layers) if layer not in windowed))}
    return found | {f"window{n}": (group.pages, group.shape.layers) for n, group in enumerate(arena.windows)}


def _attention_layers(engine: Engine) -> list[AttentionWeights]:
    """The layers with a KV cache, in order."""
    decoder = engine.forward.decoder
    return [decoder.layers[index].attention for index in decoder.cfg.attention_layers]


@dataclass(frozen=True)
class SavedSession:
    """A session file whose header was read and checked; its tensors are read by :meth:`restore`.

    Attributes:
        saved: When, in seconds since 1970.
        settings: How answers were drawn.
        options: What the engine was loaded with: texts, numbers, None.
        variables: What the chat template saw beside the messages.
        tokens, pages: What the cache held.
        shared: Where the first pages lie, and how many of them count, if there is a tail.
    """

    path: Path
    version: int
    model: str
    saved: float
    identity: Identity | None
    settings: SamplingParams
    options: dict[str, str | int | None]
    variables: dict[str, Any]
    system: str | None
    turns: tuple[dict[str, str], ...]
    entries: dict[str, TensorEntry]
    file_id: str = ""
    shared: tuple[TensorEntry, int] | None = None

    @property
    def tokens(self) -> int:
        return self._size("ids", 0)

    @property
    def pages(self) -> int:
        return self._size("pages", 0) + (self.shared[1] if self.shared is not None else 0)

    def _size(self, name: str, axis: int) -> int:
        entry = self.entries.get(name)
        return entry.shape[axis] if entry is not None and len(entry.shape) > axis else 0

    @classmethod
    def read(cls, path: Path) -> SavedSession:
        """The header of a session file, or of its tail if it has one.

        Raises:
            OctoError: It is none, or damaged.
        """
        first, tail = cls._read(path)[0], tail_of(path)
        if not os.path.lexists(tail):
            return first
        later, fields = cls._read(tail)
        base = fields.sub("base")
        if base is None or not first.file_id or base.text("id") != first.file_id:
            return first
        pages = base.integer("pages", low=0)
        if pages > first.pages:
            raise base.fail("pages", f"is {pages:,} and {path} has {first.pages:,}")
        return dataclasses.replace(later, path=path, shared=(first.entries["pages"], pages) if pages else None)

    @classmethod
    def _read(cls, path: Path) -> tuple[SavedSession, Fields]:
        entries, metadata = read_headers(path)
        if metadata.get("format") != FORMAT or "session" not in metadata:
            raise OctoError(f"{path} is no session of octo-run.")
        values = json_object(metadata["session"].encode(), f"The session in {path}", _ADVICE, strict=True)
        fields = Fields(path, values)
        version = fields.integer("version")
        settings = fields.sub("settings")
        known = {field.name for field in dataclasses.fields(SamplingParams)}
        try:
            params = SamplingParams(**{k: v for k, v in (settings.values if settings else {}).items() if k in known})
        except UsageError as error:
            raise OctoError(f"The settings in {path} cannot be used: {error}") from None
        found = cls(
            path=path,
            file_id=fields.text("id") or "",
            version=version,
            model=fields.text("model") or "",
            saved=fields.number("saved", 0.0, low=0.0, high=1e11),
            identity=read_identity(fields) if version == VERSION else None,
            settings=params,
            options=_read_options(fields),
            variables=_object(fields, "variables"),
            system=fields.text("system"),
            turns=_read_turns(fields),
            entries=entries,
        )
        return found, fields

    def session(self, engine: Engine) -> Session:
        """The conversation, to be continued with an engine; what the cache does not hold is read with the next
        question."""
        session = Session(engine, self.system, variables=self.variables)
        session.turns = [dict(turn) for turn in self.turns]
        return session

    def check(self, engine: Engine) -> None:
        """Check that the pages can be used with an engine.

        Raises:
            SessionMismatch: They cannot.
        """
        problem = self._problem(engine)
        if problem is not None:
            raise SessionMismatch(f"the KV cache of this session cannot be used: {problem}.")

    def _problem(self, engine: Engine) -> str | None:
        if self.identity is None:
            return f"it is of version {self.version} and this program reads version {VERSION}"
        found = self.identity.difference(identity_of(engine), self.model)
        if found is not None:
            return found
        if not self.tokens:
            return None
        if self.tokens > engine.max_context:
            return f"it holds {self.tokens:,} tokens and the context {engine.max_context:,}"
        first, count = self.shared or (None, 0)
        rows = {"pages": self.pages - count}
        for number, group in enumerate(engine.arena.windows):
            held, allowed = self._size(f"window{number}", 0), group.most_held(self.tokens, self.pages)
            rows[f"window{number}"] = min(max(held, allowed.start), allowed.stop - 1)
        expected = _expected(engine, self.identity, self.tokens, rows)
        if first is not None and (first.dtype != "U8" or first.shape[1:] != expected["pages"][1][1:]):
            return f"its file is damaged (the first pages are {first.dtype} {quoted(list(first.shape))})"
        for name, (dtypes, shape) in expected.items():
            entry = self.entries.get(name)
            if entry is None or STORED_DTYPES.get(entry.dtype) not in dtypes or entry.shape != shape:
                found = "is missing" if entry is None else f"is {entry.dtype} {quoted(list(entry.shape))}"
                return f"its file is damaged ({name} {found}, not {quoted(list(shape))})"
        kept = engine.plan.shape
        tail = self.tokens - kept.sink - PAGE * self.pages
        if (self.pages and tail < 0) or tail > kept.ring or self.pages > kept.max_pages:
            return f"its file is damaged ({self.pages:,} pages do not fit {self.tokens:,} tokens)"
        return None

    @torch.inference_mode()
    def restore(self, engine: Engine) -> int:
        """Put what the file has of the KV cache into an engine's arena, as a parked sequence that the next prompt
        continues.

        Returns:
            Tokens that are held now.

        Raises:
            SessionMismatch: The pages cannot be used with this engine, or are damaged.
        """
        self.check(engine)
        assert self.identity is not None
        if not self.tokens:
            return 0
        with TensorFile(self.entries["ids"].file) as data:
            ids = data.read(self.entries["ids"], torch.device("cpu"), torch.int32).tolist()
            if not all(0 <= token < engine.config.vocab_size for token in ids):
                raise SessionMismatch("the KV cache of this session cannot be used: it has tokens that there are not.")
            self._adopt_keys(engine, data)
            sequence = engine.arena.open([])
            try:
                groups = engine.arena.windows
                first = [self.pages - self._size(f"window{number}", 0) for number in range(len(groups))]
                pages = sequence.take_stored(self.pages, first)
                self._read_pages(engine, data, "pages", pages)
                for number, (group, start) in enumerate(zip(groups, first, strict=True)):
                    found = group.pool.held[sequence.row][start:]
                    self._read_pages(engine, data, f"window{number}", found)
                    engine.arena.enter_pages(sequence.row, start, found, group)
                for kind, part in enumerate(engine.arena.row_state(sequence.row)):
                    part.copy_(self._stored(data, f"full{kind}"))
                engine.arena.enter_pages(sequence.row, 0, pages)
                if engine.arena.states is not None:
                    engine.arena.states.load(sequence.row, *(self._stored(data, name) for name in _STATES))
                sequence.advance(0, ids, len(pages))
            except BaseException:
                sequence.discard()
                raise
            sequence.close()
        return len(ids)

    def _stored(self, data: TensorFile, name: str) -> Tensor:
        """A tensor as the file has it, on the CPU."""
        entry = self.entries[name]
        return data.read(entry, torch.device("cpu"), STORED_DTYPES[entry.dtype])

    def _adopt_keys(self, engine: Engine, data: TensorFile) -> None:
        """Let the engine store keys as the file's are stored. What was measured elsewhere differs a little; then
        nothing else that the cache holds is of use any more."""
        changes = list[tuple[Tensor, Tensor]]()
        for name, parts in _key_tensors(engine).items():
            found = self._stored(data, name)
            if not bool(found.isfinite().all()):
                raise SessionMismatch(f"the KV cache of this session cannot be used: its {name} are no finite numbers.")
            stored = torch.stack(parts)
            new = found.to(stored)
            if not torch.equal(stored, new):
                changes += zip(parts, new, strict=True)
        if not changes:
            return
        rows = [sequence for sequence in engine.arena.table.rows if sequence is not None]
        if any(sequence.pinned for sequence in rows):
            raise UsageError("A session cannot be loaded while other sequences of the engine run: close them first.")
        for sequence in rows:
            sequence.discard()
        engine.arena.table.kept.clear()
        for old, new in changes:
            old.copy_(new)  # in place: recorded steps read them there
        if engine.arena.means is not None:
            for number, layer in enumerate(_attention_layers(engine)):
                assert layer.key_mean is not None and layer.maps is not None
                engine.arena.means.adopt(number, layer.key_mean, layer.maps[1])

    def _read_pages(self, engine: Engine, data: TensorFile, name: str, ids: list[int]) -> None:
        """Read pages into those of the arena that are ``ids``.

        Args:
            name: Of what holds them (``_stores``).
        """
        entry, count = self.shared if self.shared is not None and name == "pages" else (None, 0)
        if entry is not None:
            with TensorFile(entry.file) as first:
                self._read_some(engine, first, entry, name, ids[:count])
        self._read_some(engine, data, self.entries[name], name, ids[count:])

    def _read_some(self, engine: Engine, data: TensorFile, entry: TensorEntry, name: str, ids: list[int]) -> None:
        assert self.identity is not None
        arena = engine.arena
        pages, layers = _stores(arena)[name]
        row = entry.shape[1]
        here = [PageFormat.parse(self.identity.formats[layer]) for layer in layers]
        there = [arena.page_formats[layer] for layer in layers]
        heads = [arena.shape.heads[layer].number for layer in layers]
        as_they_are = here == there
        in_order = ids == [*range(ids[0], ids[0] + len(ids))] if ids else False
        straight = as_they_are and in_order and pages.device.type == "cpu"
        count = max(1, PIECE_BYTES // max(1, row))
        for first in range(0, len(ids), count):
            places = ids[first : first + count]
            if straight:
                data.fill(entry, pages[places[0] : places[0] + len(places)], first * row)
                continue
            piece = torch.empty(len(places), row, dtype=torch.uint8)
            data.fill(entry, piece, first * row)
            if not as_they_are:
                piece = self._converted(piece, here, there, heads)
            pages.index_copy_(0, torch.tensor(places, device=pages.device), piece.to(pages.device))

    def _converted(self, piece: Tensor, here: list[PageFormat], there: list[PageFormat], heads: list[int]) -> Tensor:
        """Rows of pages as the arena has them."""
        out, at = list[Tensor](), 0
        for one, other, count in zip(here, there, heads, strict=True):
            size = count * one.page_bytes
            block = piece[:, at : at + size].reshape(len(piece), count, one.page_bytes)
            at += size
            try:
                out.append(_convert(block, one, other).reshape(len(piece), -1))
            except ValueError:
                raise SessionMismatch("the KV cache of this session cannot be used: its pages are damaged.") from None
        return torch.cat(out, 1)


def _convert(pages: Tensor, one: PageFormat, other: PageFormat) -> Tensor:
    """Pages of a format as another one has them, which differs in its layout, and in the dtype of what is not coded.

    Raises:
        ValueError: Pages that no writer made.
    """
    blocks = torch.split(pages, [one.kv.k.block_bytes, one.kv.v.block_bytes], -1)
    sides = ((one.kv.k, other.kv.k), (one.kv.v, other.kv.v))
    cast = [
        block.contiguous().view(old.dtype).to(new.dtype).view(torch.uint8)
        if isinstance(old, PlainCodec) and isinstance(new, PlainCodec)
        else block
        for block, (old, new) in zip(blocks, sides, strict=True)
    ]
    return PageFormat(other.kv, one.layout).convert(torch.cat(cast, -1), other)


def _expected(
    engine: Engine, identity: Identity, tokens: int, rows: dict[str, int]
) -> dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]]:
    """The tensors that a file must have: their dtypes and shapes.

    Args:
        rows: Of each store of pages (``_stores``).
    """
    floats = (torch.bfloat16, torch.float16, torch.float32)
    found: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {"ids": ((torch.int32,), (tokens,))}
    for name, (_, layers) in _stores(engine.arena).items():
        sizes = (PageFormat.parse(identity.formats[layer]).page_bytes for layer in layers)
        heads = (engine.plan.shape.heads[layer].number for layer in layers)
        found[name] = (torch.uint8,), (rows[name], sum(map(mul, heads, sizes)))
    if tokens:
        for kind, part in enumerate(engine.arena.row_state(0)):
            found[f"full{kind}"] = (floats, tuple(part.shape))
        if engine.arena.states is not None:
            for name, part in zip(_STATES, engine.arena.states.of(0, 0), strict=True):
                found[name] = (floats, tuple(part.shape))
        for name, parts in _key_tensors(engine).items():
            found[name] = (floats, (len(parts), *parts[0].shape))
    return found


def _object(fields: Fields, name: str) -> dict[str, Any]:
    """The object of this name, an empty one where there is none."""
    found = fields.sub(name)
    return {} if found is None else dict(found.values)


def _read_options(fields: Fields) -> dict[str, str | int | None]:
    """What the engine was loaded with.

    Raises:
        OctoError: Values of other kinds.
    """
    options = _object(fields, "options")
    for name, value in options.items():
        if isinstance(value, bool) or not (value is None or isinstance(value, (str, int))):
            raise fields.fail(f"options.{shown(name, 40)}", f"is {quoted(value)}, no text or whole number")
    return options


def _read_turns(fields: Fields) -> tuple[dict[str, str], ...]:
    """The conversation in a header.

    Raises:
        OctoError: It is none.
    """
    turns = fields.raw("turns")
    if not isinstance(turns, list):
        raise fields.fail("turns", "is no list")
    for number, turn in enumerate(turns):
        good = isinstance(turn, dict) and turn.keys() == {"role", "content"} and turn["role"] in _ROLES
        if not good or not isinstance(turn["content"], str):
            raise fields.fail(f"turns[{number}]", f"is {quoted(turn)}, no message")
    return tuple(turns)
