"""Pages of layers whose tokens see a window of the newest ones: they are given back behind it (docs/pages.md).

Layers with one window are a group. A group has pages, a page table and a pool of its own; a page's number is the same
in all groups. A sequence holds the pages that its next token sees, and `HISTORY` before them, so that what a cut takes
away can be that long. It also holds those that the token behind a snapshot sees: a snapshot is a number of pages that a
cut can leave, and nothing else, because packed pages never change.

An exception, Ctrl-C's included, may strike between any two statements here, as in the pool: which pages a row holds,
the pool alone says, and snapshots only say which of them are to stay.
"""

from bisect import insort
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octo_run.engine.pool import GONE, PagePool
from octo_run.kernels import PAGE_TOKENS as PAGE
from octo_run.kernels.codec.layer_formats import LayerRun

#: Pages before the window that a sequence still holds.
HISTORY = 16
#: A snapshot is taken every so many pages at least; where a window is longer, every two windows.
EVERY = 8


@dataclass(frozen=True)
class WindowShape:
    """A group of layers.

    Attributes:
        layers: Their numbers among those of the arena.
        window: Tokens that a token sees, itself included.
        token_bytes: Of a packed token: its keys and values of these layers.
        snapshots: How many have room, of all sequences; those that share pages take less.
    """

    layers: tuple[int, ...]
    window: int
    token_bytes: int
    snapshots: int = 0

    @property
    def seen(self) -> int:
        """Pages that a window touches at most."""
        return -(-self.window // PAGE) + 1

    @property
    def every(self) -> int:
        """Pages between two snapshots that are taken on the way."""
        return max(EVERY, 2 * -(-self.window // PAGE))

    @property
    def kept(self) -> int:
        """Pages that a sequence holds at most, beside those of snapshots, when nothing is being read: those that a
        window touches, the history, one for tokens that the host has not read yet, and one that is being written."""
        return self.seen + HISTORY + 2

    def first_seen(self, position: int, sink: int) -> int:
        """The number of the first page of which a token at ``position`` sees anything, whether it is there or not."""
        return max(0, position + 1 - self.window - sink) // PAGE

    def pages(self, sequences: int, max_pages: int, chunk: int) -> int:
        """Pages of all sequences: while a chunk is read, those that it needs and those that it leaves; and those of
        snapshots."""
        beside = chunk // PAGE + 1 + self.snapshots * self.seen
        return min(sequences * max_pages, 2 * sequences * self.kept + beside)

    def behind(self, pages: int) -> range:
        """The numbers of the pages of which the token behind so many pages sees anything."""
        return range(max(0, PAGE * pages + 1 - self.window) // PAGE, pages)


class WindowPages:
    """The pages of a group. The layout of ``pages`` is that of ``KVArena.pages``.

    Args:
        pages: uint8 ``[pages, bytes]``.
        table: int32 ``[rows, pages of a sequence]``.
        runs: Layers of one format that are neighbours, and their pages ``[pages, layers, kv_heads, page_bytes]``.
    """

    def __init__(
        self, shape: WindowShape, sink: int, pages: Tensor, table: Tensor, runs: Sequence[tuple[LayerRun, Tensor]]
    ) -> None:
        self.shape, self._sink, self.pages, self.page_table, self.runs = shape, sink, pages, table, list(runs)
        self.pool = PagePool(len(pages), len(table))
        #: Of each holder its snapshots, numbers of pages in order. The rows are the first holders; prefixes that are
        #: kept have snapshots alone.
        self._snapshots: list[list[int]] = [[] for _ in range(len(table))]
        #: Of each holder the number of the first page that no snapshot need keep: those before are given back.
        self._done = [0] * len(table)
        #: Holders, those last that were used last.
        self._order = list(range(len(table)))

    def take(self, row: int, count: int, end: int | None) -> list[int]:
        """``count`` pages more for a row.

        Args:
            end: The sequence's length when they will be read; pages that it will be done with by then, and that no
                snapshot on the way needs, are not taken. If there is no room for the snapshots either, those are not.
                None: all are taken.

        Returns:
            Their ids, `GONE` for those that were not taken.
        """
        first = len(self.pool.held[row])
        numbers = range(first, first + count)
        wanted = [end is None or self._stays(row, number, end) for number in numbers]
        self._make_room(sum(wanted))
        if end is not None and self.pool.free < sum(wanted):
            wanted = [self._needed(number, end) for number in numbers]
        return self.pool.take_some(row, wanted)

    def take_these(self, row: int, count: int, numbers: Collection[int]) -> list[int]:
        """As :meth:`take`, for a row without pages, those with these numbers."""
        self._make_room(len(numbers))
        return self.pool.take_some(row, [number in numbers for number in range(count)])

    def first_held(self, row: int, length: int, packed: int) -> int:
        """The first of ``packed`` pages from which on a row of ``length`` tokens holds all, the history included."""
        held, seen = self.pool.held[row], min(packed, self.shape.first_seen(length, self._sink))
        before = range(seen - 1, max(-1, seen - 1 - HISTORY), -1)
        gone = next((number for number in before if held[number] == GONE), before.stop)
        return gone + 1

    def most_held(self, length: int, packed: int) -> range:
        """How many pages :meth:`first_held` can leave."""
        needed = packed - min(packed, self.shape.first_seen(length, self._sink))
        return range(needed, min(packed, needed + HISTORY) + 1)

    def _needed(self, number: int, end: int) -> bool:
        """Whether a page is of use to a sequence of ``end`` tokens."""
        return number >= self.shape.first_seen(end, self._sink) - HISTORY

    def _stays(self, row: int, number: int, end: int) -> bool:
        """Whether a page is of use to a sequence of ``end`` tokens, or to a snapshot."""
        if self._needed(number, end):
            return True
        snapshots = (*self._snapshots[row], self._on_the_way(number))
        return any(number in self.shape.behind(pages) for pages in snapshots)

    def _on_the_way(self, number: int) -> int:
        """The next snapshot that is taken without being asked for, behind a page."""
        return (number // self.shape.every + 1) * self.shape.every

    def forget(self, row: int, length: int) -> None:
        """Give back what a sequence of ``length`` tokens is done with."""
        held = self.pool.held[row]
        before = min(len(held), self.shape.first_seen(length, self._sink) - HISTORY)
        for pages in dict.fromkeys(map(self._on_the_way, range(self._done[row], before))):
            if self.shape.behind(pages).start < before:  # it is passed, then
                self._keep(row, pages)
        self._give_back(row, range(self._done[row], before))
        self._done[row] = max(self._done[row], before)

    def mark(self, row: int, length: int) -> bool:
        """Take a snapshot at the last page boundary up to ``length``, unless there is one.

        Returns:
            Whether it has all pages that it needs, those included that are being written.
        """
        pages = (length - self._sink) // PAGE
        self._use(row)
        return pages < 1 or self._keep(row, pages)

    def _use(self, holder: int) -> None:
        """It is being used."""
        self._order = [other for other in self._order if other != holder] + [holder]

    def _keep(self, row: int, pages: int) -> bool:
        held, snapshots = self.pool.held[row], self._snapshots[row]
        seen = self.shape.behind(pages)
        # Pages that are not there yet will be packed before any of them is given back.
        if any(held[number] == GONE for number in seen if number < len(held)):
            return False
        if pages not in snapshots:
            insort(snapshots, pages)
        return True

    def drop(self, row: int, keep: int, length: int) -> None:
        """Let the row hold its first ``keep`` pages only: its sequence has ``length`` tokens now."""
        self.pool.drop(row, keep)
        before, most = len(self._snapshots[row]), (length - self._sink) // PAGE
        self._cut(row, self._snapshots[row], most, self._done[row])
        if len(self._snapshots[row]) < before:
            self._give_back(row, range(self._done[row]))

    def share(self, donor: int, row: int, pages: int, first: int | None = None) -> None:
        """Let a row without pages hold the first ``pages`` pages of another holder, as far as that one has them, and
        its snapshots.

        Args:
            first: From this number on, it takes free pages instead, which will be written.
        """
        first = pages if first is None else first
        self._make_room(pages - first)
        self.pool.share(row, self.pool.held[donor][:first])
        self.pool.take_some(row, [True] * (pages - first))
        self._cut(row, self._snapshots[donor], pages, self._done[donor])
        self._give_back(row, range(self._done[row]))

    def lend(self, row: int, holder: int, pages: int) -> None:
        """Let a holder that is no row, and may be a new one, hold the snapshots of a row up to ``pages`` pages."""
        while len(self.pool.held) <= holder:
            self.pool.add_holder()
        while len(self._snapshots) <= holder or len(self._done) <= holder:
            self._snapshots.append([])
            self._done.append(0)
        self._use(holder)
        self._snapshots[holder], self._done[holder] = [], pages
        self.pool.share(holder, self.pool.held[row][:pages])
        passed = map(self._on_the_way, range(self._done[row], pages))
        for one in sorted({*self._snapshots[row], *passed}):
            if one <= pages:
                self._keep(holder, one)
        self._give_back(holder, range(pages))

    def release(self, holder: int) -> None:
        """Let a holder that is no row have no snapshots."""
        if holder < len(self._snapshots):
            self._snapshots[holder], self._done[holder] = [], 0
            self.pool.drop(holder, 0)

    def _cut(self, row: int, snapshots: list[int], pages: int, done: int) -> None:
        """Let a row have those of some snapshots that so many pages hold. What the next token sees belongs to none."""
        self._done[row] = max(0, min(done, self.shape.behind(max(0, pages)).start - HISTORY))
        self._snapshots[row] = [one for one in snapshots if one <= pages]

    def seen_from(self, length: int, packed: int) -> range:
        """The numbers of those of ``packed`` pages that the snapshot at the last page boundary up to ``length`` has."""
        seen = self.shape.behind(max(0, length - self._sink) // PAGE)
        return range(seen.start, min(seen.stop, packed))

    @property
    def room(self) -> int:
        """Pages that snapshots may take, of all sequences."""
        return self.shape.snapshots * self.shape.seen

    def snapshots(self, row: int) -> list[int]:
        """The snapshots of a row, numbers of pages."""
        return list(self._snapshots[row])

    def _give_back(self, row: int, numbers: range) -> None:
        """Give back pages that no snapshot of the row needs."""
        kept = [self.shape.behind(pages) for pages in self._snapshots[row]]
        there = numbers[: max(0, len(self.pool.held[row]) - numbers.start)]
        self.pool.release(row, [number for number in there if not any(number in one for one in kept)])

    def _make_room(self, pages: int) -> None:
        """Let snapshots go until so many pages are free: those whose neighbours are nearest first, and of holders that
        were not used for long; a row's newest one last."""
        if self.pool.free < pages:  # what an exception has left
            for row, done in enumerate(self._done):
                self._give_back(row, range(done))
        while self.pool.free < pages and any(self._snapshots):
            worth = self._worth()
            row, least = min(worth, key=lambda place: worth[place])
            self._snapshots[row] = [one for one in self._snapshots[row] if one != least]
            seen = self.shape.behind(least)
            self._give_back(row, range(seen.start, min(seen.stop, self._done[row])))

    def _worth(self) -> dict[tuple[int, int], tuple[bool, float]]:
        """How much each snapshot of each holder would be missed: whether it is the newest one of a row, and the pages
        between its neighbours, divided by how manieth its holder is of those that were used last."""
        worth = dict[tuple[int, int], tuple[bool, float]]()
        holders = [row for row in reversed(self._order) if self._snapshots[row]]
        for age, row in enumerate(holders, start=1):
            found = self._snapshots[row]
            for number, one in enumerate(found):
                newest = number == len(found) - 1 and row < len(self.page_table)
                worth[row, one] = newest, ((*found, one)[number + 1] - (0, *found)[number]) / age
        return worth

    def reachable(self, row: int, length: int, packed: int) -> int:
        """The last length up to ``length``, which has ``packed`` pages, whose next token finds all that it sees: it, or
        that behind some page; if there is none, what the sinks hold."""
        held, first, pages = self.pool.held[row], self.shape.first_seen(length, self._sink), packed
        while pages:
            gone = next((number for number in range(pages - 1, first - 1, -1) if held[number] == GONE), None)
            if gone is None:
                return length
            pages, length = gone, self._sink + PAGE * gone
            first = self.shape.behind(gone).start
        return min(length, self._sink) if packed else length

    @torch.inference_mode()
    def copy_table(self, donor: int, row: int) -> None:
        """Copy a row of the page table."""
        self.page_table[row].copy_(self.page_table[donor])
