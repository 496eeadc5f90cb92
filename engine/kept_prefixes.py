"""Beginnings of texts that have no row any more: their pages stay until somebody needs them.

A parked sequence loses its row when another one is opened. What a later prompt may begin with is kept: the packed
pages, by reference, and what the row had besides (sinks, states of recurrent layers, pages of windows), which is copied
into free pages of the pool. So nothing is allocated for it, and the pool decides how much is kept: whoever needs a page
takes it from the prefix that is unused for longest. The row's snapshots (`RecurrentStates`, `WindowPages`) are held on,
too, where they are, as long as nobody takes their places.

A prefix is found by a hash of the ids of each page and of all before it, and its ids are then compared. An exception,
Ctrl-C's included, may strike between any two statements here: a prefix without ids is rubbish, which goes first.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Sequence_
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from octo_run.engine.pool import PagePool
from octo_run.kernels import PAGE_TOKENS as PAGE

if TYPE_CHECKING:
    from octo_run.engine.recurrent_state import RecurrentStates
    from octo_run.engine.sequence import Sequence
    from octo_run.engine.window_pages import WindowPages


def common_length(one: list[int], other: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    low, high = 0, min(len(one), len(other))
    step = 64
    while low < high and one[low : min(low + step, high)] == other[low : min(low + step, high)]:
        low, step = min(low + step, high), 2 * step
    while low < high and one[low] == other[low]:
        low += 1
    return low


class KeptPrefix:
    """Some tokens, up to a page boundary, and who holds their pages in the pool: first ``extra`` ones that have what
    is no page, then the packed ones. The same holder has snapshots.

    ``ends``: what is no page is all that belongs to the end; otherwise the sinks alone, and a snapshot has the rest.
    """

    def __init__(self, holder: int, extra: int, *, ends: bool) -> None:
        self.holder, self.extra, self.ends, self.ids = holder, extra, ends, list[int]()
        #: Where turns begin and end (``Sequence.turns``).
        self.turns: list[int] = []
        #: Where the index has it.
        self.keys: list[int] = []


class RowStore(Protocol):
    """The memory of rows and pages (``KVArena``)."""

    pages: Tensor

    def copy_row(self, donor: int, row: int) -> None:
        """Copy all that a row holds to another one."""

    def row_parts(self, row: int, length: int, packed: int, *, target: bool = False) -> list[Tensor]:
        """What a sequence of ``length`` tokens, a page boundary, needs besides its ``packed`` pages: first its sinks.

        Args:
            target: It is to be written to the row.
        """

    def sinks(self, row: int) -> list[Tensor]:
        """The sinks of a row."""

    def enter_row(self, row: int) -> None:
        """Write the ids of a row's pages to the page tables."""


class KeptPrefixes:
    """The prefixes that are kept, the longest unused first.

    Args:
        sink: Tokens before the first page.
        states, windows: Of recurrent layers and of those with windows. Where there are any, a part of a prefix is of
            use up to a snapshot.
    """

    def __init__(
        self,
        pool: PagePool,
        sink: int,
        store: RowStore,
        states: "RecurrentStates | None" = None,
        windows: "Sequence_[WindowPages]" = (),
    ) -> None:
        self._pool, self._sink, self._store, self._states, self._windows = pool, sink, store, states, windows
        self._whole = states is not None or bool(windows)
        self._kept: list[KeptPrefix] = []
        self._index: dict[int, list[KeptPrefix]] = {}
        self._holders: list[int] = []

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, ids: list[int]) -> tuple[KeptPrefix | None, int, int]:
        """The prefix that can give most of the beginning of ``ids``, how many tokens of it can be had, and how many
        tokens of the beginning any prefix has."""
        pages = dict[KeptPrefix, int]()
        for number, key in enumerate(self._keys(ids) if self._kept else (), start=1):
            if key not in self._index:
                break
            pages.update((one, number) for one in self._index[key] if one.ids)
        found, length, alike = None, 0, 0
        for one in sorted(pages, key=lambda one: (pages[one], self._kept.index(one)), reverse=True):
            if self._end(pages[one]) <= length:
                break
            common = common_length(one.ids, ids)
            reachable, alike = self._reachable(one, common), max(alike, common)
            if reachable > length:
                found, length = one, reachable
        return found, length, alike

    def _reachable(self, one: KeptPrefix, length: int) -> int:
        """How many of a prefix's first ``length`` tokens can be had."""
        pages = max(0, length - self._sink) // PAGE
        length = self._end(pages)
        if pages and self._whole and not self.has_end(one, length):
            pages = min(pages, len(self.pages_of(one, length)))
            length = self._end(pages)
            while pages and (found := self._with_snapshots(one, length, pages)) < length:
                pages = max(0, found - self._sink) // PAGE
                length = self._end(pages)
        return length if pages else 0

    def _with_snapshots(self, one: KeptPrefix, length: int, pages: int) -> int:
        """The last position up to ``length``, which has ``pages``, at which each kind of layer has a snapshot."""
        found = [window.reachable(one.holder, length, pages) for window in self._windows]
        if self._states is not None:
            found.append(self._states.reachable(one.holder, length))
        return min(found)

    def has_end(self, one: KeptPrefix, length: int) -> bool:
        """Whether a prefix has, in a copy, all that belongs to its end, and ``length`` is that."""
        return one.ends and length == len(one.ids)

    def _end(self, pages: int) -> int:
        """The position behind so many pages."""
        return self._sink + PAGE * pages

    def _keys(self, ids: list[int]) -> Iterator[int]:
        """The keys of the pages that ``ids`` fill: each stands for all tokens up to the page's end."""
        key = hash(tuple(ids[: self._sink]))
        for first in range(self._sink, len(ids) - PAGE + 1, PAGE):
            key = hash((key, *ids[first : first + PAGE]))
            yield key

    def keep(self, sequence: "Sequence", reused: int, using: KeptPrefix | None = None) -> None:
        """Keep a sequence that is about to be cut to ``reused`` tokens, if it is worth it: up to its end, or else up to
        its last snapshot, which takes no pages.

        Args:
            using: A prefix that must not go now.
        """
        for rubbish in [one for one in self._kept if not one.ids]:
            self._drop(rubbish)
        length, packed = self._last_boundary(sequence)
        # The pages take no bytes if all layers have windows; -1: `KVArena.fill` made it up.
        if not self._store.pages.shape[1] or not packed or sequence.ids[0] < 0:
            return
        if not self._keep(sequence, length, packed, reused, using, ends=True) and self._whole:
            length, packed = self._last_snapshot(sequence, min(length, self._end(packed)))
            if packed:
                self._keep(sequence, length, packed, reused, using, ends=False)

    def _keep(
        self, sequence: "Sequence", length: int, packed: int, reused: int, using: KeptPrefix | None, *, ends: bool
    ) -> bool:
        """Keep the first ``length`` tokens of a sequence, if there is room.

        It is not worth it if the cut loses less than half of the pages that keeping them takes.

        Returns:
            Whether they are kept, by this prefix or by another one.
        """
        parts = self._store.row_parts(sequence.row, length, packed) if ends else self._store.sinks(sequence.row)
        extra = -(-sum(part.nbytes for part in parts) // self._store.pages.shape[1])
        found, known, _ = self.find(sequence.ids[:length])
        if found is not None and known == length:
            self._touch(found)
            return True
        if 2 * (length - max(reused, known)) < PAGE * max(2, extra):
            return False
        self.make_room(extra, using)
        while self._pool.free < extra and not self._whole and packed > extra and length - PAGE >= reused:
            length, packed = sequence.cut(length - PAGE), packed - 1  # it gives its own last pages
        if self._pool.free < extra:
            return False
        self._add(sequence, length, packed, KeptPrefix(self._holder(), extra, ends=ends))
        return True

    def _last_snapshot(self, sequence: "Sequence", length: int) -> tuple[int, int]:
        """The last snapshot of a sequence up to ``length`` that all kinds of layers have, and the packed pages then (0:
        there is none)."""
        row = sequence.row
        if self._states is not None:
            lengths = self._states.snapshots(row)
        else:
            lengths = [self._end(pages) for pages in self._windows[0].snapshots(row)]
        for one in sorted(lengths, reverse=True):
            pages = max(0, one - self._sink) // PAGE
            if one <= length and all(window.mark(row, one) for window in self._windows):
                return one, pages
        return 0, 0

    def _last_boundary(self, sequence: "Sequence") -> tuple[int, int]:
        """The last page boundary that a sequence can be cut to, and the packed pages then (0: there is none).

        The tail is worth keeping only with a recurrent state, which stands there.
        """
        end = sequence.packed_end
        if self._states is not None:
            end += (len(sequence) - end) // PAGE * PAGE
        length, packed = sequence.after_cut(end)
        return length, packed if (length - self._sink) % PAGE == 0 else 0

    def _holder(self) -> int:
        """Who may hold the pages of one more prefix."""
        return self._holders.pop() if self._holders else self._pool.add_holder()

    def _add(self, sequence: "Sequence", length: int, packed: int, one: KeptPrefix) -> None:
        """Keep the first ``length`` tokens of a sequence."""
        self._kept.append(one)
        row, places = sequence.row, self._pool.take(one.holder, one.extra)
        parts = self._store.row_parts(row, length, packed) if one.ends else self._store.sinks(row)
        _copy(parts, self._store.pages, places, out=True)
        self._pool.share(one.holder, sequence.page_ids[:packed])
        for window in self._windows:
            window.lend(row, one.holder, packed)
        if self._states is not None:
            self._states.lend(row, one.holder, length - one.ends)  # that of the end was copied
        one.ids, one.turns = sequence.ids[:length], list(sequence.turns)
        for key in self._keys(one.ids):
            one.keys.append(key)
            self._index.setdefault(key, []).append(one)

    def pages_of(self, one: KeptPrefix, length: int) -> list[int]:
        """The packed pages of its first ``length`` tokens."""
        return self._pool.held[one.holder][one.extra :][: (length - self._sink) // PAGE]

    def give(self, one: KeptPrefix, row: int, length: int) -> None:
        """Write to a row what is no page of the prefix's first ``length`` tokens, and in no snapshot."""
        self._touch(one)
        if self.has_end(one, length):
            parts = self._store.row_parts(row, length, len(self.pages_of(one, length)), target=True)
        else:
            parts = self._store.sinks(row)
        _copy(parts, self._store.pages, self._pool.held[one.holder][: one.extra], out=False)

    def make_room(self, pages: int, using: KeptPrefix | None = None) -> None:
        """Let prefixes go, the longest unused first and from their ends, until ``pages`` are free or none is left.

        Args:
            using: One that stays.
        """
        if self._pool.free >= pages:
            return
        for one in list(self._kept):
            if one is not using:
                self._shrink(one, pages)
            if self._pool.free >= pages:
                return

    def _shrink(self, one: KeptPrefix, pages: int) -> None:
        held = self._pool.held[one.holder]
        if not self._whole:
            # Who holds the last page besides has the tokens before it, too: then the prefix can go.
            while self._pool.free < pages and len(held) > 2 * one.extra and self._pool.holders(held[-1]) == 1:
                del one.ids[-PAGE:]
                self._forget(one, one.keys.pop())
                self._pool.drop(one.holder, len(held) - 1)
        if self._pool.free < pages:
            self._drop(one)

    def _drop(self, one: KeptPrefix) -> None:
        one.ids = []
        while one.keys:
            self._forget(one, one.keys.pop())
        self._pool.drop(one.holder, 0)
        for window in self._windows:
            window.release(one.holder)
        if self._states is not None:
            self._states.release(one.holder)
        self._kept = [other for other in self._kept if other is not one]
        self._holders.append(one.holder)

    def _forget(self, one: KeptPrefix, key: int) -> None:
        """Take a prefix out of the index."""
        left = [other for other in self._index.get(key, []) if other is not one]
        if left:
            self._index[key] = left
        else:
            self._index.pop(key, None)

    def _touch(self, one: KeptPrefix) -> None:
        """It is being used: it is the last to go."""
        self._kept = [other for other in self._kept if other is not one] + [one]

    def clear(self) -> None:
        """Let all go."""
        for one in list(self._kept):
            self._drop(one)


@torch.inference_mode()
def _copy(parts: list[Tensor], pages: Tensor, places: list[int], *, out: bool) -> None:
    """Copy tensors, one after the other, to the bytes of some pages (``out``) or from there; allocates nothing."""
    at, size = 0, pages.shape[1]
    waiting = parts[::-1]
    while waiting:
        part = waiting.pop()
        number, offset = divmod(at, size)
        whole = part.nbytes <= size - offset and offset % part.element_size() == 0
        if not whole and not part.is_contiguous():
            waiting += part.unbind()[::-1]
            continue
        if not whole:
            part = part.view(-1).view(torch.uint8)
            if part.numel() > size - offset:
                waiting.append(part[size - offset :])
                part = part[: size - offset]
        if part.numel():
            place = pages[places[number], offset : offset + part.nbytes].view(part.dtype).view(part.shape)
            place.copy_(part) if out else part.copy_(place)
            at += part.nbytes
