"""Writing a conversation, and what the KV cache holds of it, to a file."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from octo_run.engine.kept_prefixes import common_length
from octo_run.engine.sampling import SamplingParams
from octo_run.engine.saved_session.earlier import Earlier, of_window, store_of
from octo_run.engine.saved_session.layout import FORMAT, PIECE_BYTES, STATES, VERSION, key_tensors, page_stores, tail_of
from octo_run.engine.sequence import Sequence
from octo_run.engine.session import Session
from octo_run.engine.session_identity import identity_of
from octo_run.errors import OctoError
from octo_run.kernels import PAGE_TOKENS as PAGE
from octo_run.models.safetensors_writer import Item, Shard

if TYPE_CHECKING:
    from octo_run.engine.engine import Engine


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
        earlier: Snapshots where turns begin and end, which must stay likewise.
    """

    engine: Engine
    header: dict[str, Any]
    ids: list[int]
    page_ids: dict[str, list[int]]
    rows: dict[str, Tensor]
    earlier: Earlier = field(default_factory=Earlier)

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
            "variables": dict(session.variables),
            "system": session.system,
            "turns": [dict(turn) for turn in session.turns],  # which may go on while they are written
        }
        if sequence is None:
            return cls(engine, header, [], {name: [] for name in page_stores(engine.arena)}, {})
        row, page_ids = sequence.row, {"pages": sequence.page_ids[:pages]}
        first = [group.first_held(row, length, pages) for group in engine.arena.windows]
        earlier = Earlier.of(engine.arena, sequence, length, pages, first)
        for number, group in enumerate(engine.arena.windows):
            held = group.pool.held[row]
            page_ids[f"window{number}"] = held[first[number] : pages]
            if earlier.positions:
                page_ids[of_window(number)] = [held[one] for one in earlier.numbers[number]]
        parts_of = engine.arena.row_state(sequence.row)
        rows = {f"full{kind}": part.to("cpu", copy=True) for kind, part in enumerate(parts_of)}
        if engine.arena.states is not None:
            parts = engine.arena.states.of(sequence.row, length)
            rows |= {name: part.to("cpu", copy=True) for name, part in zip(STATES, parts, strict=True)}
        return cls(engine, header, sequence.ids[:length], page_ids, rows, earlier)

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
        stores = page_stores(self.engine.arena)
        unread = {*self.page_ids}

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

        found |= self.earlier.items()  # before the pages: when these were read, so were the states
        for name, ids in self.page_ids.items():
            pages, _ = stores[store_of(name)]
            some = ids[first_page if name == "pages" else 0 :]
            found[name] = Item(torch.uint8, (len(some), pages.shape[1]), partial(pieces, name, pages, some))
        if self.rows:
            found |= {name: _item(part) for name, part in self.rows.items()}
            found |= {name: _item(torch.stack(parts).cpu()) for name, parts in key_tensors(self.engine).items()}
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
        """Write what the session file at ``path``, which is ``base``, lacks, as its tail; see :meth:`write`. A tail has
        fewer snapshots of earlier turns."""
        pages = self.shared(base)
        header = self.header | {"base": {"id": base.file_id, "pages": pages}}
        self._write(path, tail_of(path), header, self._with_few_snapshots().items(were_read, pages))

    def _with_few_snapshots(self) -> Snapshot:
        """What a tail holds."""
        arena, packed = self.engine.arena, len(self.page_ids["pages"])
        if not self.earlier.positions:
            return self
        first = [packed - len(self.page_ids[f"window{number}"]) for number in range(len(arena.windows))]
        few, page_ids = self.earlier.of_tail(arena, packed, first), dict(self.page_ids)
        for number, (all_numbers, numbers) in enumerate(zip(self.earlier.numbers, few.numbers, strict=True)):
            ids = dict(zip(all_numbers, page_ids[of_window(number)], strict=True))
            page_ids[of_window(number)] = [ids[one] for one in numbers]
        return dataclasses.replace(self, page_ids=page_ids, earlier=few)

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
    """The sequence that can give most of a conversation, and how many of its tokens and pages that are."""
    rows = [sequence for sequence in engine.arena.table.rows if sequence is not None]
    held = [(*sequence.after_cut(sequence.common(ids)), sequence) for sequence in rows]
    length, pages, best = max(held, key=lambda one: one[0], default=(0, 0, None))
    return (best, length, pages) if length else (None, 0, 0)
