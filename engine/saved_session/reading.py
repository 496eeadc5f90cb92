"""Reading a conversation back, and giving an engine what the file has of the KV cache."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from octo_run.engine.grammar import Grammar
from octo_run.engine.sampling import SamplingParams
from octo_run.engine.saved_session.earlier import (
    POSITIONS,
    are_in_order,
    fitting,
    needed_pages,
    numbers_of,
    of_state,
    of_window,
)
from octo_run.engine.saved_session.layout import (
    FORMAT,
    PIECE_BYTES,
    STATES,
    VERSION,
    attention_layers,
    key_tensors,
    page_stores,
    tail_of,
)
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
from octo_run.tokenizer.thinking import REASONING

if TYPE_CHECKING:
    from octo_run.engine.engine import Engine

_ADVICE = "its file is damaged, delete it"
_ROLES = ("user", "assistant")


class SessionMismatch(OctoError):
    """The pages of a session cannot be used with an engine; its text can."""


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
        found = cls(
            path=path,
            file_id=fields.text("id") or "",
            version=version,
            model=fields.text("model") or "",
            saved=fields.number("saved", 0.0, low=0.0, high=1e11),
            identity=read_identity(fields) if version == VERSION else None,
            settings=_read_settings(fields),
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
        rows |= {of_window(number): self._size(of_window(number), 0) for number in range(len(engine.arena.windows))}
        expected = _expected(engine, self.identity, self.tokens, rows, self._size(POSITIONS, 0))
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
                turns = self._earlier(engine, data, first)
                before = needed_pages(engine.arena, turns, self.pages, first)
                numbers = [{*some, *range(start, self.pages)} for some, start in zip(before, first, strict=True)]
                pages = sequence.take_stored(self.pages, numbers)
                self._read_pages(engine, data, "pages", pages)
                for number, (group, some, start) in enumerate(zip(groups, before, first, strict=True)):
                    held = group.pool.held[sequence.row]
                    self._read_pages(engine, data, f"window{number}", held[start:])
                    if some:  # the last ones of those in the file
                        entry = self.entries[of_window(number)]
                        last = entry.end - len(some) * entry.shape[1]
                        entry = dataclasses.replace(entry, shape=(len(some), entry.shape[1]), start=last)
                        self._read_some(engine, data, entry, f"window{number}", [held[one] for one in some])
                    engine.arena.enter_pages(sequence.row, 0, [max(0, page) for page in held], group)
                for kind, part in enumerate(engine.arena.row_state(sequence.row)):
                    part.copy_(self._stored(data, f"full{kind}"))
                engine.arena.enter_pages(sequence.row, 0, pages)
                if engine.arena.states is not None:
                    engine.arena.states.load(sequence.row, *(self._stored(data, name) for name in STATES))
                self._read_earlier(engine, data, sequence, turns)
                sequence.advance(0, ids, len(pages))
            except BaseException:
                sequence.discard()
                raise
            sequence.close()
        return len(ids)

    def _earlier(self, engine: Engine, data: TensorFile, first: list[int]) -> list[int]:
        """The positions of the snapshots in the file that the engine has room for, the newest ones.

        Args:
            first: Of each group of layers with a window the first page that the next token needs.

        Raises:
            SessionMismatch: What the file says of them cannot be.
        """
        if not self._size(POSITIONS, 0) or not engine.arena.takes_snapshots:
            return []
        positions, sink = self._stored(data, POSITIONS).tolist(), engine.plan.shape.sink
        numbers = [self._stored(data, numbers_of(number)).tolist() for number in range(len(first))]
        good = are_in_order(positions, 1, self.tokens)
        if engine.arena.states is not None:
            good = good and all((one - sink) % PAGE == 0 for one in positions)  # within the sinks, too
        if not good or numbers != needed_pages(engine.arena, positions, self.pages, first):
            raise SessionMismatch("the KV cache of this session cannot be used: its snapshots are damaged.")
        return fitting(engine.arena, positions, self.pages, first)

    def _read_earlier(self, engine: Engine, data: TensorFile, sequence: Sequence, turns: list[int]) -> None:
        """Give a sequence, whose pages are there, the newest snapshots of the file."""
        skipped = self._size(POSITIONS, 0) - len(turns)
        for number, position in enumerate(turns, start=skipped):
            sequence.mark(position)
            if engine.arena.states is not None:
                parts = (self._stored_part(data, of_state(name), number) for name in STATES)
                engine.arena.states.enter(sequence.row, position, *parts)
        sequence.turns = turns

    def _stored_part(self, data: TensorFile, name: str, number: int) -> Tensor:
        """One of the tensors that lie one after the other in one of the file, on the CPU."""
        entry = self.entries[name]
        part = torch.empty(entry.shape[1:], dtype=STORED_DTYPES[entry.dtype])
        data.fill(entry, part, number * part.numel())
        return part

    def _stored(self, data: TensorFile, name: str) -> Tensor:
        """A tensor as the file has it, on the CPU."""
        entry = self.entries[name]
        return data.read(entry, torch.device("cpu"), STORED_DTYPES[entry.dtype])

    def _adopt_keys(self, engine: Engine, data: TensorFile) -> None:
        """Let the engine store keys as the file's are stored. What was measured elsewhere differs a little; then
        nothing else that the cache holds is of use any more."""
        changes = list[tuple[Tensor, Tensor]]()
        for name, parts in key_tensors(engine).items():
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
            for number, layer in enumerate(attention_layers(engine)):
                if layer.key_mean is not None and layer.maps is not None:
                    engine.arena.means.adopt(number, layer.key_mean, layer.maps[1])

    def _read_pages(self, engine: Engine, data: TensorFile, name: str, ids: list[int]) -> None:
        """Read pages into those of the arena that are ``ids``.

        Args:
            name: Of what holds them (``page_stores``).
        """
        entry, count = self.shared if self.shared is not None and name == "pages" else (None, 0)
        if entry is not None:
            with TensorFile(entry.file) as first:
                self._read_some(engine, first, entry, name, ids[:count])
        self._read_some(engine, data, self.entries[name], name, ids[count:])

    def _read_some(self, engine: Engine, data: TensorFile, entry: TensorEntry, name: str, ids: list[int]) -> None:
        assert self.identity is not None
        arena = engine.arena
        pages, layers = page_stores(arena)[name]
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
    engine: Engine, identity: Identity, tokens: int, rows: dict[str, int], earlier: int
) -> dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]]:
    """The tensors that a file must have: their dtypes and shapes.

    Args:
        rows: Of each store of pages (``page_stores``), and of what snapshots need of them.
        earlier: Snapshots.
    """
    floats = (torch.bfloat16, torch.float16, torch.float32)
    found: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {"ids": ((torch.int32,), (tokens,))}
    for name, (_, layers) in page_stores(engine.arena).items():
        sizes = (PageFormat.parse(identity.formats[layer]).page_bytes for layer in layers)
        heads = (engine.plan.shape.heads[layer].number for layer in layers)
        found[name] = (torch.uint8,), (rows[name], sum(map(mul, heads, sizes)))
    if earlier:
        found[POSITIONS] = (torch.int32,), (earlier,)
        for number in range(len(engine.arena.windows)):
            name, (kinds, (_, size)) = of_window(number), found[f"window{number}"]
            found[name], found[numbers_of(number)] = (kinds, (rows[name], size)), ((torch.int32,), (rows[name],))
    if tokens:
        for kind, part in enumerate(engine.arena.row_state(0)):
            found[f"full{kind}"] = (floats, tuple(part.shape))
        if engine.arena.states is not None:
            for name, part in zip(STATES, engine.arena.states.of(0, 0), strict=True):
                found[name] = (floats, tuple(part.shape))
                if earlier:
                    found[of_state(name)] = (floats, (earlier, *part.shape))
        for name, parts in key_tensors(engine).items():
            found[name] = (floats, (len(parts), *parts[0].shape))
    return found


def _object(fields: Fields, name: str) -> dict[str, Any]:
    """The object of this name, an empty one where there is none."""
    found = fields.sub(name)
    return {} if found is None else dict(found.values)


def _read_settings(fields: Fields) -> SamplingParams:
    """How answers were drawn."""
    settings = fields.sub("settings")
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    values = {name: value for name, value in (settings.values if settings else {}).items() if name in known}
    try:
        if isinstance(grammar := values.get("grammar"), dict):
            values["grammar"] = Grammar(grammar.get("kind"), grammar.get("text"))  # type: ignore[arg-type]
        return SamplingParams(**values)
    except UsageError as error:
        raise OctoError(f"The settings in {fields.path} cannot be used: {error}") from None


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
        if not is_message(turn):
            raise fields.fail(f"turns[{number}]", f"is {quoted(turn)}, no message")
    return tuple(turns)


def is_message(turn: Any) -> bool:
    """Whether a value of a header is a message of a conversation."""
    return (
        isinstance(turn, dict)
        and all(isinstance(value, str) for value in turn.values())
        and turn.keys() - REASONING == {"role", "content"}
        and turn["role"] in _ROLES
    )
