"""Beginnings of texts that have no row any more: their pages stay until somebody needs them.

A parked sequence loses its row when another one is opened. What a later prompt may begin with is kept: the packed
pages, by reference, and what the row had besides (sinks, states of recurrent layers, pages of windows), which is copied
into free pages of the pool. So nothing is allocated for it, and the pool decides how much is kept: whoever needs a page
takes it from the prefix that is unused for longest.

A prefix is found by a hash of the ids of each page and of all before it, and its ids are then compared. An exception,
Ctrl-C's included, may strike between any two statements here: a prefix without ids is rubbish, which goes first.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from octo_run.engine.pool import PagePool
from octo_run.kernels import PAGE_TOKENS as PAGE

if TYPE_CHECKING:
    from octo_run.engine.sequence import Sequence


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
    is no page, then the packed ones."""

    def __init__(self, holder: int, extra: int) -> None:
        self.holder, self.extra, self.ids = holder, extra, list[int]()
        #: Where the index has it.
        self.keys: list[int] = []


class RowStore(Protocol):
    """The memory of rows and pages (``KVArena``)."""

    pages: Tensor

    def copy_row(self, donor: int, row: int) -> None:
        """Copy all that a row holds to another one."""

    def row_parts(self, row: int, length: int, packed: int, *, target: bool = False) -> list[Tensor]:
        """What a sequence of ``length`` tokens, a page boundary, needs besides its ``packed`` pages.

        Args:
            target: It is to be written to the row.
        """

    def enter_row(self, row: int) -> None:
        """Write the ids of a row's pages to the page tables."""


class KeptPrefixes:
    """The prefixes that are kept, the longest unused first.

    Args:
        sink: Tokens before the first page.
        windows, recurrent: Whether there are such layers. Then a part of a prefix is of no use, because what is no page
            belongs to its end.
    """

    def __init__(self, pool: PagePool, sink: int, store: RowStore, *, windows: bool, recurrent: bool) -> None:
        self._pool, self._sink, self._store, self._recurrent = pool, sink, store, recurrent
        self._whole = windows or recurrent
        self._kept: list[KeptPrefix] = []
        self._index: dict[int, list[KeptPrefix]] = {}
        self._holders: list[int] = []

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, ids: list[int]) -> tuple[KeptPrefix | None, int]:
        """The prefix that has most of the beginning of ``ids``, and how many tokens of it can be had."""
        found = None
        if self._kept:
            for key in self._keys(ids):
                if key not in self._index:
                    break
                found = next((one for one in reversed(self._index[key]) if one.ids), found)
        if found is None:
            return None, 0
        common = common_length(found.ids, ids)
        length = self._end((common - self._sink) // PAGE)
        if length <= self._sink or (self._whole and length < len(found.ids)):
            return None, 0
        return found, length

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
        """Keep a sequence that is about to be cut to ``reused`` tokens, if it is worth it.

        It is not if it loses less than half of the pages that keeping it takes, or if others have its tokens.

        Args:
            using: A prefix that must not go now.
        """
        for rubbish in [one for one in self._kept if not one.ids]:
            self._drop(rubbish)
        length, packed = self._last_boundary(sequence)
        size = self._store.pages.shape[1]  # 0 if all layers have windows
        if not size or not packed or sequence.ids[0] < 0:  # -1: `KVArena.fill` made it up
            return
        extra = -(-sum(part.nbytes for part in self._store.row_parts(sequence.row, length, packed)) // size)
        found, known = self.find(sequence.ids[:length])
        if 2 * (length - max(reused, known)) < PAGE * max(2, extra):
            if found is not None and known == length:
                self._touch(found)
            return
        self.make_room(extra, using)
        while self._pool.free < extra and not self._whole and packed > extra and length - PAGE >= reused:
            length, packed = sequence.cut(length - PAGE), packed - 1  # it gives its own last pages
        if self._pool.free >= extra:
            self._add(sequence, length, packed, extra)

    def _last_boundary(self, sequence: "Sequence") -> tuple[int, int]:
        """The last page boundary that a sequence can be cut to, and the packed pages then (0: there is none).

        The tail is worth keeping only with a recurrent state, which stands there.
        """
        end = sequence.packed_end
        if self._recurrent:
            end += (len(sequence) - end) // PAGE * PAGE
        length, packed = sequence.after_cut(end)
        return length, packed if (length - self._sink) % PAGE == 0 else 0

    def _add(self, sequence: "Sequence", length: int, packed: int, extra: int) -> None:
        """Keep the first ``length`` tokens of a sequence."""
        if not self._holders:
            self._holders.append(self._pool.add_holder())
        one = KeptPrefix(self._holders.pop(), extra)
        self._kept.append(one)
        places = self._pool.take(one.holder, extra)
        _copy(self._store.row_parts(sequence.row, length, packed), self._store.pages, places, out=True)
        self._pool.share(one.holder, sequence.page_ids[:packed])
        one.ids = sequence.ids[:length]
        for key in self._keys(one.ids):
            one.keys.append(key)
            self._index.setdefault(key, []).append(one)

    def pages_of(self, one: KeptPrefix, length: int) -> list[int]:
        """The packed pages of its first ``length`` tokens."""
        return self._pool.held[one.holder][one.extra :][: (length - self._sink) // PAGE]

    def give(self, one: KeptPrefix, row: int, length: int) -> None:
        """Write to a row what is no page of the prefix's first ``length`` tokens."""
        self._touch(one)
        parts = self._store.row_parts(row, length, len(self.pages_of(one, length)), target=True)
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
