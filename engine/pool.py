"""The pages of the arena: which are free, who holds the others, and which tokens a page stands for.

Packed pages never change, so several sequences may hold one. A page is free when nobody holds it.
"""

from collections.abc import Iterator
from typing import Generic, TypeVar

from octo_run.errors import OctoError

#: Tokens of a page.
Holder = TypeVar("Holder")


class PoolExhausted(OctoError):
    """There are not as many free pages as were asked for. Nothing has changed: end or cut a sequence and try again."""


class PagePool:
    """Page ids with reference counts. ``held[row]`` are the pages of a row in order; only the pool changes it.

    Taking, sharing and dropping a page take constant time. An exception may strike within any of them (Ctrl-C); the
    counts are then taken anew from ``held``, which alone says who holds what.
    """

    def __init__(self, pages: int, rows: int) -> None:
        self.held: list[list[int]] = [[] for _ in range(rows)]
        self._count = pages
        self._references = [0] * pages
        self._free = list(range(pages - 1, -1, -1))
        self._torn = False

    def __len__(self) -> int:
        return self._count

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        self._mend()
        return len(self._free)

    def holders(self, page: int) -> int:
        """Rows that hold a page."""
        self._mend()
        return self._references[page]

    def take(self, row: int, count: int) -> list[int]:
        """``count`` free pages, appended to the row's. Raises :class:`PoolExhausted` if there are fewer."""
        self._mend()
        if count > len(self._free):
            raise PoolExhausted(
                f"The KV cache is full: {count} of its {self._count:,} pages are wanted and {len(self._free)} are "
                "free; end a sequence, or give a larger cache."
            )
        held = self.held[row]
        self._torn = True
        for _ in range(count):
            page = self._free.pop()
            self._references[page] = 1
            held.append(page)
        self._torn = False
        return held[len(held) - count :]

    def share(self, row: int, pages: list[int]) -> None:
        """Let the row hold ``pages``, which another holds."""
        self._mend()
        self._torn = True
        for page in pages:
            self._references[page] += 1
            self.held[row].append(page)
        self._torn = False

    def drop(self, row: int, keep: int) -> None:
        """Let the row hold its first ``keep`` pages only."""
        held = self.held[row]
        if len(held) <= keep:
            return
        self._mend()
        self._torn = True
        while len(held) > keep:
            page = held.pop()
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)
        self._torn = False

    def _mend(self) -> None:
        if not self._torn:
            return
        references = [0] * self._count
        for held in self.held:
            for page in held:
                references[page] += 1
        self._references = references
        self._free = [page for page in range(self._count - 1, -1, -1) if not references[page]]
        self._torn = False


class PrefixIndex(Generic[Holder]):
    """Which holders have a page that ends a given prefix of token ids.

    A page's key is a hash of its tokens and of the key before it, so that it stands for all tokens up to its end. Hashes
    may collide: who looks a prefix up compares the ids.
    """

    def __init__(self, page_tokens: int, sink: int) -> None:
        """Pages hold ``page_tokens`` tokens each, behind the first ``sink`` tokens, which are in no page."""
        self._page, self._sink = page_tokens, sink
        self._holders: dict[int, list[Holder]] = {}

    def keys(self, ids: list[int], known: list[int], count: int) -> Iterator[int]:
        """The keys of the pages ``len(known) .. count - 1`` of a sequence of ``ids``; ``known`` are those before."""
        key = known[-1] if known else hash(tuple(ids[: self._sink]))
        for page in range(len(known), count):
            first = self._sink + self._page * page
            key = hash((key, *ids[first : first + self._page]))
            yield key

    def add(self, key: int, holder: Holder) -> None:
        """Note that the holder has the page."""
        self._holders.setdefault(key, []).append(holder)

    def remove(self, key: int, holder: Holder) -> None:
        """Forget that the holder has the page."""
        holders = self._holders.get(key, [])
        if holder in holders:
            holders.remove(holder)
        if not holders:
            self._holders.pop(key, None)

    def find(self, ids: list[int]) -> list[Holder]:
        """Those who have, by the keys, the longest run of whole pages that ``ids`` begin with."""
        found: list[Holder] = []
        for key in self.keys(ids, [], max(0, (len(ids) - self._sink) // self._page)):
            if key not in self._holders:
                break
            found = self._holders[key]
        return list(found)
