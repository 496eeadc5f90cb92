"""Sequences of tokens in the arena: one object owns the ids, the pages and the row of each; nobody else changes them.

A *row* of the arena holds a sequence's full-precision part (sinks and ring) and its line of the page table. Rows are
few, pages are shared: when a sequence ends it stays in its row, *parked*, until another one needs the row or the pages,
so that a prompt that begins with the same tokens can go on from there. When another one takes the row, its packed pages
are still kept (``engine.kept_prefixes``).
"""

from collections import deque
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from octo_run.engine.kept_prefixes import KeptPrefix, KeptPrefixes, RowStore, common_length
from octo_run.engine.pool import PagePool
from octo_run.engine.recurrent_state import RecurrentStates
from octo_run.engine.window_pages import WindowPages
from octo_run.errors import OctoError, UsageError
from octo_run.kernels import PAGE_TOKENS as PAGE

if TYPE_CHECKING:
    from octo_run.engine.sampling import Sampling
    from octo_run.engine.step import Result


class Sequence:
    """Tokens whose keys and values the arena holds.

    Steps may run ahead of what the host has read: ``ahead`` tokens more are then in the arena, whose ids come with
    :meth:`drawn`.

    Attributes:
        ids: These tokens; there are as many of them as there are positions, whatever interrupts what: a change first
            writes beyond the end and then moves it, in one assignment.
    """

    def __init__(self, table: "SequenceTable", row: int) -> None:
        self._table, self._row = table, row
        self._ids: list[int] = []
        #: Tokens and pages that count; what the lists hold beyond is rubbish.
        self._end = (0, 0)
        self._ahead = 0
        #: Whether nobody may take the row.
        self.pinned = False
        #: Results of launched steps that were not read, the oldest first.
        self.unread: deque[Result] = deque()
        #: How tokens are drawn; None before ``Stepper.begin``.
        self.sampling: Sampling | None = None
        #: Lengths at which other texts part from this one, or will: somebody may want to go back to them.
        self.marks: list[int] = []
        #: Lengths at which prompts began to be new and at which they ended, so turns begin and end there.
        self.turns: list[int] = []
        #: A drawn token that was read and not fed yet.
        self.following: int | None = None
        #: Whether the device holds a drawn token that was not fed yet.
        self.ready = False

    def __repr__(self) -> str:
        return f"<Sequence of {len(self):,} tokens{'' if self.alive else ', closed'}>"

    def __len__(self) -> int:
        """Positions in the arena: those of ``ids``, and those of tokens that the host has not read."""
        return self._end[0] + self._ahead

    @property
    def ids(self) -> list[int]:
        """A copy of the token ids in the arena, as far as they are known."""
        return self._ids[: self._end[0]]

    @property
    def row(self) -> int:
        """The row of the arena.

        Raises:
            UsageError: Another sequence has taken it.
        """
        if not self.alive:
            raise UsageError("The sequence has ended, and another one has taken its place: open a new one.")
        return self._row

    @property
    def alive(self) -> bool:
        """Whether it still has its row."""
        return self._table.rows[self._row] is self

    @property
    def ahead(self) -> int:
        """Tokens in the arena whose ids the host has not read."""
        return self._ahead

    @property
    def packed(self) -> int:
        """Packed pages."""
        return self._end[1]

    @property
    def packed_end(self) -> int:
        """First position that is neither in a sink slot nor in a packed page."""
        return self._table.sink + PAGE * self.packed

    @property
    def page_ids(self) -> list[int]:
        """The packed pages in order of position."""
        return self._table.pool.held[self.row][: self.packed]

    def common(self, ids: list[int]) -> int:
        """How many of the first tokens are those of ``ids``."""
        return min(self._end[0], common_length(self._ids, ids))

    def after_cut(self, length: int) -> tuple[int, int]:
        """What a cut to ``length`` leaves.

        A cut inside packed pages leaves no full-precision tail, so it falls back to the page's first position. Where
        there are recurrent layers, it falls back to a position that their state can be brought to, and where there are
        layers with a window to one whose window is still held.

        Returns:
            Tokens and packed pages.
        """
        length, keep = self._pages_after_cut(min(length, self._end[0]))
        while (reachable := self._reachable(length, keep)) < length:
            length, keep = self._pages_after_cut(reachable)
        return length, keep

    def _reachable(self, length: int, keep: int) -> int:
        """The last position up to ``length``, which has ``keep`` pages, that every kind of layer can be cut to."""
        table, row = self._table, self._row
        found = [window.reachable(row, length, keep) for window in table.windows]
        if table.states is not None:
            found.append(table.states.reachable(row, length))
        return min(found, default=length)

    def _pages_after_cut(self, length: int) -> tuple[int, int]:
        sink, keep = self._table.sink, self._end[1]
        if length < sink + PAGE * keep:
            keep = max(0, (length - sink) // PAGE)
            length = min(length, sink + PAGE * keep)
        return length, keep

    def cut(self, length: int) -> int:
        """Forget the positions from ``length`` on, and all tokens that were not read.

        Returns:
            How many tokens remain (see :meth:`after_cut`).
        """
        self.following, self.ready = None, False
        self.unread.clear()
        self._end = self.after_cut(length)
        self._ahead = 0
        self._trim()
        if self._table.states is not None:
            self._table.states.cut(self._row, self._end[0])
        return self._end[0]

    def cancel(self) -> int:
        """Forget what was launched and not read.

        Returns:
            How many tokens remain (see :meth:`cut`).
        """
        return self.cut(self._end[0])

    def close(self) -> None:
        """End the sequence.

        It stays parked, to be continued by a prompt that begins with its tokens, until its row or its pages are needed.
        """
        if self.alive:
            self.cancel()
            self.pinned = False

    def discard(self) -> None:
        """End the sequence and give its row and its pages back at once."""
        if self.alive:
            self._table.give_back(self)

    def __enter__(self) -> "Sequence":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # For the arena and the steps alone

    def take_pages(self, count: int, end: int | None = None, marks: Iterable[int] = ()) -> list[int]:
        """``count`` pages behind the packed ones; they count as packed from :meth:`advance` on.

        Args:
            end: The length that the sequence will have then, if nobody reads the pages before (``WindowPages.take``).
            marks: Lengths up to then that :meth:`mark` is to keep.
        """
        self._trim()
        for length in marks:
            self.mark(length)
        self._table.make_room(count, self)
        for window in self._table.windows:
            window.take(self.row, count, end)
        return self._table.pool.take(self.row, count)

    def take_stored(self, count: int, numbers: Iterable[Collection[int]]) -> list[int]:
        """As :meth:`take_pages`, of a sequence without pages; of each group of layers with a window those with some
        numbers."""
        self._trim()
        self._table.make_room(count, self)
        for window, some in zip(self._table.windows, numbers, strict=True):
            window.take_these(self.row, count, some)
        return self._table.pool.take(self.row, count)

    def hold(self, length: int) -> None:
        """Until :meth:`advance`, count only the first ``length`` tokens: the others may be spoilt."""
        self._end = (min(length, self._end[0]), self._end[1])

    def advance(self, start: int, ids: list[int], pages: int) -> None:
        """From position ``start`` on, ``ids`` are in the arena now, and ``pages`` more pages are packed."""
        self._ids[start:] = ids
        self._end = (start + len(ids), self._end[1] + pages)
        self._stand()
        self._forget()

    def add_page(self) -> None:
        """One more page is packed."""
        self._end = (self._end[0], self._end[1] + 1)
        self._forget()

    def mark(self, length: int) -> bool:
        """Let layers with a window hold what a cut to ``length``, or to the page boundary before it, needs.

        Returns:
            Whether they have it.
        """
        kept = [window.mark(self.row, length) for window in self._table.windows]
        return all(kept)

    def _forget(self) -> None:
        """Give back pages behind the windows of layers."""
        for window in self._table.windows:
            window.forget(self._row, self._end[0])

    def launched(self) -> None:
        """A step that feeds one more token was launched."""
        if self.following is None:
            self._ahead += 1
        else:
            token, self.following = self.following, None
            self._ids[self._end[0] :] = [token]
            self._end = (self._end[0] + 1, self._end[1])
        self._stand()

    def _stand(self) -> None:
        if self._table.states is not None:
            self._table.states.stand(self._row, len(self))

    def drawn(self, token: int) -> None:
        """A drawn token was read: it has been fed already, or will be by the next step."""
        if not self._ahead:
            self.following = token
            return
        self._ids[self._end[0] :] = [token]
        self._ahead, self._end = self._ahead - 1, (self._end[0] + 1, self._end[1])

    def become(self, donor: "Sequence", length: int) -> None:
        """Hold what a cut of ``donor`` to ``length`` would leave.

        Its full-precision part was copied, its pages are shared.
        """
        tokens, pages = donor.after_cut(length)
        self._table.pool.share(self.row, donor.page_ids[:pages])
        for window in self._table.windows:
            window.share(donor.row, self.row, pages)
        if self._table.states is not None:
            self._table.states.share(donor.row, self.row, tokens)
        self._ids[:] = donor._ids[:tokens]
        self.turns = list(donor.turns)
        self._end = (tokens, pages)

    def inherit(self, parked: "Sequence") -> None:
        """Hold what another sequence has in the same row."""
        self._ids[:], self._end, self.turns = parked._ids, parked._end, list(parked.turns)

    def begin_with(self, prefix: KeptPrefix, length: int) -> None:
        """Hold the first ``length`` tokens of a prefix that was kept."""
        table, row = self._table, self.row
        pages = table.kept.pages_of(prefix, length)
        table.pool.share(row, pages)
        ends, states = table.kept.has_end(prefix, length), table.states
        for window in table.windows:
            first = min(len(pages), window.shape.first_seen(length, table.sink)) if ends else None
            window.share(prefix.holder, row, len(pages), first)
        if states is not None:
            states.writing(row)
        table.kept.give(prefix, row, length)
        if states is not None and ends:
            states.lend(prefix.holder, row, length)
        elif states is not None:
            states.share(prefix.holder, row, length)
        table.store.enter_row(row)
        self._ids[:] = prefix.ids[:length]
        self.turns = list(prefix.turns)
        self._end = (length, len(pages))
        self._stand()

    def _trim(self) -> None:
        """Drop what lies beyond the end."""
        tokens, pages = self._end
        del self._ids[tokens:]
        self._table.drop_pages(self.row, pages, tokens)


class SequenceTable:
    """The rows of an arena and the sequences in them.

    Args:
        store: The memory of rows and pages.
        states: Those of recurrent layers, if there are any.
        windows: The pages of layers with windows.
    """

    def __init__(
        self,
        rows: int,
        pages: int,
        sink: int,
        store: RowStore,
        states: RecurrentStates | None = None,
        windows: Iterable[WindowPages] = (),
    ) -> None:
        self.sink, self.store, self.states, self.windows = sink, store, states, list(windows)
        self.pool = PagePool(pages, rows)
        self.kept = KeptPrefixes(self.pool, sink, store, states, self.windows)
        self.rows: list[Sequence | None] = [None] * rows
        self._used: list[int] = []  # rows, the longest unused first

    def open(self, ids: list[int] | None = None, shared: Iterable[int] = ()) -> Sequence:
        """Open a pinned sequence that holds as much of the beginning of ``ids`` as can be had without computing it.

        At least one of them is left to be fed. A parked sequence that the prompt continues goes on in its row.
        Otherwise the new sequence shares the pages of whoever holds the most, a sequence or a prefix that was kept, and
        gets a copy of what else is needed, in a free row or in that of the longest unused parked sequence. What that
        one loses is kept. Where less can be had than is known to others, the sequence is told where they part, so that
        a third one finds a snapshot there.

        Args:
            shared: How many of the first tokens others will begin with, too, some this many and some that: the sequence
                is told likewise.

        Raises:
            OctoError: All rows are pinned.
        """
        ids = [] if ids is None else ids[:-1]
        prefix, length, alike = self.kept.find(ids)
        alike = max(alike, *(seq.common(ids) for seq in self.rows if seq is not None), 0)
        sequence = self._opened(ids, prefix, length)
        held = len(sequence)
        sequence.marks = [length for length in (alike, *shared) if length > held]
        sequence.turns = sorted({*(length for length in sequence.turns if length < held), held, len(ids)})
        return sequence

    def _opened(self, ids: list[int], prefix: KeptPrefix | None, length: int) -> Sequence:
        """See :meth:`open`; of the prefix ``length`` tokens can be had."""
        held = self._held(ids)
        donor = max(held, key=lambda seq: (held[seq], not seq.pinned), default=None)
        reused = 0 if donor is None else held[donor]
        if length > reused:
            donor, reused = None, 0
        else:
            prefix = None
        if not reused:
            donor = None
        if donor is not None and not donor.pinned and reused == len(donor):
            return self._go_on(donor, reused)  # nothing is lost; a recurrent state may have to come back
        row = self._free_row(donor)
        before = self.rows[row]
        if before is not None:
            self.kept.keep(before, reused if before is donor else 0, prefix)
            if before is donor:
                return self._go_on(donor, reused)
            self.give_back(before)
        self.drop_pages(row, 0)
        sequence = self.rows[row] = Sequence(self, row)
        self.touch(sequence)
        if donor is not None:
            self.store.copy_row(donor.row, row)
            sequence.become(donor, reused)
        elif prefix is not None:
            sequence.begin_with(prefix, length)
        return self._pin(sequence)

    def _go_on(self, parked: Sequence, length: int) -> Sequence:
        """A new sequence in the row of a parked one, with its first ``length`` tokens.

        Whoever had the parked one may still hold it, a generation that was left say: for them it has ended, so that
        they neither go on in the new one nor close it.
        """
        parked.cut(length)
        sequence = Sequence(self, parked.row)
        sequence.inherit(parked)
        self.rows[parked.row] = sequence
        return self._pin(sequence)

    def _held(self, ids: list[int]) -> dict[Sequence, int]:
        """How much of the beginning of ``ids`` each sequence could give."""
        return {seq: seq.after_cut(seq.common(ids))[0] for seq in self.rows if seq is not None}

    def reusable(self, ids: list[int]) -> int:
        """How much of the beginning of ``ids`` a new sequence would hold at once."""
        return max(self.kept.find(ids[:-1])[1], *self._held(ids[:-1]).values(), 0)

    def make_room(self, pages: int, asking: Sequence | None = None) -> None:
        """Let kept prefixes and then parked sequences lose pages, the longest unused first, until ``pages`` are free or
        none is left."""
        self.kept.make_room(pages)
        for row in list(self._used):
            sequence = self.rows[row]
            if self.pool.free >= pages:
                return
            if sequence is None or sequence.pinned or sequence is asking:
                continue
            while sequence.packed and self.pool.free < pages:
                sequence.cut(self.sink + PAGE * (sequence.packed - 1))

    def drop_pages(self, row: int, keep: int, length: int = 0) -> None:
        """Let the row hold its first ``keep`` pages only, of all layers: its sequence has ``length`` tokens."""
        self.pool.drop(row, keep)
        for window in self.windows:
            window.drop(row, keep, length)

    def has_row(self) -> bool:
        """Whether a sequence can be opened."""
        return any(seq is None or not seq.pinned for seq in self.rows)

    def room(self) -> int:
        """Pages that could be had: free ones, and those that no running sequence holds."""
        pinned = {page for seq in self.rows if seq is not None and seq.pinned for page in self.pool.held[seq.row]}
        return len(self.pool) - len(pinned)

    def give_back(self, sequence: Sequence) -> None:
        """Free a sequence's row and pages."""
        sequence.cut(0)
        self.rows[sequence.row] = None

    def _free_row(self, donor: Sequence | None) -> int:
        """A row without a sequence, else that of the longest unused parked one, the donor's last."""
        if None in self.rows:
            return self.rows.index(None)
        parked = [row for row in self._used if (seq := self.rows[row]) is not None and not seq.pinned]
        parked.sort(key=lambda row: self.rows[row] is donor)
        if not parked:
            count = len(self.rows)
            raise OctoError(
                f"All {count} sequences that the engine was loaded for are in use: close one, or load it for more."
            )
        return parked[0]

    def _pin(self, sequence: Sequence) -> Sequence:
        sequence.pinned = True
        self.touch(sequence)
        return sequence

    def touch(self, sequence: Sequence) -> None:
        """The sequence is being used: of all it is the last to lose its row."""
        row = sequence.row
        self._used = [other for other in self._used if other != row] + [row]
