"""The pages of the arena: which are free, and who holds the others.

Packed pages never change, so several sequences may hold one. A page is free when nobody holds it.
"""

from octo_run.errors import OctoError

#: Stands for a page that a row does not hold any more, or never did.
GONE = -1


class PoolExhausted(OctoError):
    """There are not as many free pages as were asked for. Nothing has changed: end or cut a sequence and try again."""


class PagePool:
    """Page ids with reference counts.

    Taking, sharing and dropping a page take constant time. An exception may strike within any of them (Ctrl-C); the
    counts are then taken anew from ``held``, which alone says who holds what.

    Attributes:
        held: The pages of each row in order, `GONE` for those that were given back, then those of other holders; only
            the pool changes it.
    """

    def __init__(self, pages: int, rows: int) -> None:
        self.held: list[list[int]] = [[] for _ in range(rows)]
        self._count = pages
        self._references: dict[int, int] = {}
        #: Pages that were given back, and the first one that was never taken: a large pool costs nothing to make.
        self._free: list[int] = []
        self._fresh = 0
        self._torn = False

    def __len__(self) -> int:
        return self._count

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        self._mend()
        return len(self._free) + self._count - self._fresh

    def holders(self, page: int) -> int:
        """How many hold a page."""
        self._mend()
        return self._references.get(page, 0)

    def add_holder(self) -> int:
        """The number of one more who may hold pages as a row does."""
        self.held.append([])
        return len(self.held) - 1

    def take(self, row: int, count: int) -> list[int]:
        """Take free pages for a row; they are appended to the row's.

        Returns:
            The ``count`` pages.

        Raises:
            PoolExhausted: Fewer are free.
        """
        return self.take_some(row, [True] * count)

    def take_some(self, row: int, wanted: list[bool]) -> list[int]:
        """As :meth:`take`, a page for each of ``wanted`` that is true, and `GONE` for each other."""
        self._mend()
        count = sum(wanted)
        if count > self.free:
            raise PoolExhausted(
                f"The KV cache is full: {count} of its {self._count:,} pages are wanted and "
                f"{self.free} are free; end a sequence, or give a larger cache."
            )
        held = self.held[row]
        self._torn = True
        for one in wanted:
            held.append(self._next() if one else GONE)
        self._torn = False
        return held[len(held) - len(wanted) :]

    def _next(self) -> int:
        """A free page, which is held from now on."""
        if self._free:
            page = self._free.pop()
        else:
            page, self._fresh = self._fresh, self._fresh + 1
        self._references[page] = 1
        return page

    def share(self, row: int, pages: list[int]) -> None:
        """Let the row hold ``pages``, which another holds."""
        self._mend()
        self._torn = True
        for page in pages:
            if page != GONE:
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
            self._release(held.pop())
        self._torn = False

    def release(self, row: int, numbers: list[int]) -> None:
        """Let the row give back its pages with these numbers; the others keep theirs."""
        held = self.held[row]
        found = [number for number in numbers if held[number] != GONE]
        if not found:
            return
        self._mend()
        self._torn = True
        for number in found:
            page, held[number] = held[number], GONE
            self._release(page)
        self._torn = False

    def _release(self, page: int) -> None:
        if page == GONE:
            return
        self._references[page] -= 1
        if not self._references[page]:
            self._free.append(page)

    def grow(self, pages: int) -> None:
        """Have so many pages more."""
        self._count += pages

    def rearranged(self, rows: list[int]) -> "PagePool":
        """A pool of the same pages, in which row r holds what row ``rows[r]`` holds here."""
        pool = PagePool(self._count, 0)
        pool.held, pool._torn = [list(self.held[row]) for row in rows], True
        return pool

    def drop_first(self, count: int) -> None:
        """Let every row lose its first ``count`` pages."""
        self._torn = True
        for held in self.held:
            del held[:count]

    def _mend(self) -> None:
        if not self._torn:
            return
        references: dict[int, int] = {}
        for held in self.held:
            for page in held:
                if page == GONE:
                    continue
                references[page] = references.get(page, 0) + 1
        self._references, self._fresh = references, max(references, default=-1) + 1
        self._free = [page for page in range(self._fresh - 1, -1, -1) if page not in references]
        self._torn = False
