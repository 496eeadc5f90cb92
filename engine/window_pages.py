"""Pages of layers whose tokens see a window of the newest ones: they are given back behind it (docs/pages.md).

Layers with one window are a group. A group has pages, a page table and a pool of its own; a page's number is the same
in all groups. A sequence holds the pages that its next token sees, and `HISTORY` before them, so that what a cut takes
away can be that long. An exception, Ctrl-C's included, may strike between any two statements here, as in the pool.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octo_run.engine.pool import GONE, PagePool
from octo_run.kernels import PAGE_TOKENS as PAGE
from octo_run.kernels.codec.layer_formats import LayerRun

#: Pages before the window that a sequence still holds.
HISTORY = 16


@dataclass(frozen=True)
class WindowShape:
    """A group of layers.

    Attributes:
        layers: Their numbers among those of the arena.
        window: Tokens that a token sees, itself included.
        token_bytes: Of a packed token: its keys and values of these layers.
    """

    layers: tuple[int, ...]
    window: int
    token_bytes: int

    @property
    def kept(self) -> int:
        """Pages that a sequence holds at most when nothing is being read: those that a window touches, the history, one
        for tokens that the host has not read yet, and one that is being written."""
        return -(-self.window // PAGE) + HISTORY + 3

    def first_seen(self, position: int, sink: int) -> int:
        """The number of the first page of which a token at ``position`` sees anything, whether it is there or not."""
        return max(0, position + 1 - self.window - sink) // PAGE

    def pages(self, sequences: int, max_pages: int, chunk: int) -> int:
        """Pages of all sequences: while a chunk is read, those that it needs and those that it leaves."""
        return min(sequences * max_pages, 2 * sequences * self.kept + chunk // PAGE + 1)


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

    def take(self, row: int, count: int, end: int | None, history: int = HISTORY) -> list[int]:
        """``count`` pages more for a row.

        Args:
            end: The sequence's length when they will be read; pages that it will be done with by then are not taken.
                None: all are taken.
            history: Pages that are taken before those.

        Returns:
            Their ids, `GONE` for those that were not taken: the first ones.
        """
        held = self.pool.held[row]
        skipped = 0 if end is None else self.shape.first_seen(end, self._sink) - history - len(held)
        skipped = max(0, min(skipped, count))
        self.pool.skip(row, skipped)
        return [GONE] * skipped + self.pool.take(row, count - skipped)

    def forget(self, row: int, length: int) -> None:
        """Give back what a sequence of ``length`` tokens is done with."""
        self.pool.forget(row, self.shape.first_seen(length, self._sink) - HISTORY)

    def reachable(self, row: int, length: int, packed: int) -> int:
        """The last length up to ``length``, which has ``packed`` pages, whose next token finds all that it sees.

        What is older needs older pages: if there is anything before it, it is what the sinks hold.
        """
        seen = self.shape.first_seen(length, self._sink)
        return length if seen >= min(packed, self.pool.gone(row)) else min(length, self._sink)

    @torch.inference_mode()
    def copy_table(self, donor: int, row: int) -> None:
        """Copy a row of the page table."""
        self.page_table[row].copy_(self.page_table[donor])
