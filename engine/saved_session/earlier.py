"""What a session file has of earlier positions: snapshots where turns begin and end.

A conversation whose layers are recurrent or see a window can be cut only where there is a snapshot. With those of its
turns in the file, an answer that is written again, or a question that is taken back or edited, costs no second reading.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octo_run.engine.saved_session.layout import STATES
from octo_run.kernels import PAGE_TOKENS as PAGE
from octo_run.models.safetensors_writer import Item

if TYPE_CHECKING:
    from octo_run.engine.arena import KVArena
    from octo_run.engine.sequence import Sequence

#: Bytes that the snapshots of a file take at most, beside the newest ones; and those of a tail, which is written after
#: most turns of a conversation.
MOST_BYTES, MOST_OF_TAIL = 128 << 20, 16 << 20
#: Snapshots that are saved whatever they take: where the last question begins and where it ends.
ALWAYS = 2
#: The positions of the snapshots, by their name in a file.
POSITIONS = "earlier"


def of_state(name: str) -> str:
    """What the states of the snapshots are called in a file: ``[snapshots, ...]``."""
    return f"{POSITIONS}_{name}"


def of_window(number: int) -> str:
    """What the pages of a group of layers with a window are called that snapshots alone need."""
    return f"{POSITIONS}_window{number}"


def store_of(name: str) -> str:
    """The store of pages (``page_stores``) that pages of this name in a file are of."""
    return name.removeprefix(f"{POSITIONS}_")


def numbers_of(number: int) -> str:
    """What the numbers of these pages are called."""
    return f"{of_window(number)}_numbers"


def needed_pages(arena: KVArena, positions: Iterable[int], packed: int, first: list[int]) -> list[list[int]]:
    """Of each group of layers with a window the numbers of the pages, before ``first`` ones, that snapshots need."""
    found = [set[int]() for _ in arena.windows]
    for position in positions:
        for numbers, group, start in zip(found, arena.windows, first, strict=True):
            seen = group.seen_from(position, packed)
            numbers.update(range(seen.start, min(seen.stop, start)))
    return [sorted(numbers) for numbers in found]


@dataclass(frozen=True)
class Earlier:
    """Snapshots of a sequence; states and pages still lie in the arena.

    Attributes:
        positions: In order.
        states: At each position, as ``RecurrentStates.of`` gives them; none without recurrent layers.
        numbers: Of each group of layers with a window the numbers of the pages that are to be written.
    """

    positions: list[int] = field(default_factory=list)
    states: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    numbers: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(cls, arena: KVArena, sequence: Sequence, length: int, packed: int, first: list[int]) -> Earlier:
        """Those of a sequence's first ``length`` tokens, the newest that `MOST_BYTES` hold.

        Args:
            packed: Its pages.
            first: Of each group of layers with a window the first page that the file has anyway.
        """
        if not arena.takes_snapshots:
            return cls()
        ends = (sequence.after_cut(turn)[0] for turn in sequence.turns if turn < length)
        found = sorted(end for end in {*ends} if 0 < end < length)
        positions, states = _newest(arena, found, packed, first, MOST_BYTES), arena.states
        parts = [] if states is None else [states.of(sequence.row, position) for position in positions]
        return cls(positions, parts, needed_pages(arena, positions, packed, first))

    def of_tail(self, arena: KVArena, packed: int, first: list[int]) -> Earlier:
        """The newest of them that `MOST_OF_TAIL` hold; see :meth:`of`."""
        positions = _newest(arena, self.positions, packed, first, MOST_OF_TAIL)
        states = self.states[len(self.positions) - len(positions) :] if self.states else []
        return Earlier(positions, states, needed_pages(arena, positions, packed, first))

    def items(self) -> dict[str, Item]:
        """The tensors of the file, but for the pages; states are read when their turn comes."""
        if not self.positions:
            return {}
        found = {POSITIONS: _integers(self.positions)}
        for kind, name in enumerate(STATES if self.states else ()):
            parts = [state[kind] for state in self.states]
            shape = (len(parts), *parts[0].shape)
            found[of_state(name)] = Item(parts[0].dtype, shape, partial(_on_the_host, parts))
        return found | {numbers_of(n): _integers(numbers) for n, numbers in enumerate(self.numbers)}


def _newest(arena: KVArena, positions: list[int], packed: int, first: list[int], most: int) -> list[int]:
    """Of snapshots in order the newest that so many bytes hold, `ALWAYS` at least."""
    found = list(positions)
    while len(found) > ALWAYS and _bytes_of(arena, found, packed, first) > most:
        del found[0]
    return found


def _bytes_of(arena: KVArena, positions: list[int], packed: int, first: list[int]) -> int:
    """Bytes of some snapshots in a file."""
    recurrent = arena.shape.recurrent
    states = 0 if recurrent is None else recurrent.state_bytes(arena.shape.dtype.itemsize)
    pages = needed_pages(arena, positions, packed, first)
    windows = zip(pages, arena.windows, strict=True)
    return states * len(positions) + sum(len(one) * PAGE * group.shape.token_bytes for one, group in windows)


def _on_the_host(parts: list[Tensor]) -> Iterator[Tensor]:
    for part in parts:
        yield part.to("cpu").contiguous()


def _integers(values: list[int]) -> Item:
    tensor = torch.tensor(values, dtype=torch.int32)
    return Item(tensor.dtype, tuple(tensor.shape), lambda: [tensor])


def fitting(arena: KVArena, positions: list[int], packed: int, first: list[int]) -> list[int]:
    """The newest snapshots that an arena has room for."""
    found = list(positions)
    if arena.states is not None:
        found = found[len(found) - min(len(found), arena.states.room) :]
    while found and any(
        len(pages) > group.room
        for pages, group in zip(needed_pages(arena, found, packed, first), arena.windows, strict=True)
    ):
        del found[0]
    return found


def are_in_order(values: list[int], start: int, stop: int) -> bool:
    """Whether numbers grow, from ``start`` on and before ``stop``."""
    return all(one < other for one, other in pairwise([start - 1, *values, stop]))
