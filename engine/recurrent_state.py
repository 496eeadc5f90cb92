"""States of recurrent layers: one for each row of the arena, and snapshots that rows go back to (docs/recurrent.md).

Host and device agree in this way: what is written to a row's state or to a snapshot is written in the order of the
device's work, and a list of the host names it only when all of it has been launched. An exception, Ctrl-C's included,
may strike between any two statements here.
"""

from dataclasses import dataclass

import torch

from octo_run.kernels import PAGE_TOKENS as PAGE
from octo_run.kernels.recurrent import DeltaShape, LayerState

#: Of the snapshots that are taken while tokens are drawn, one at each page boundary, the so-manieth ones stay.
EVERY = 4


@dataclass(frozen=True)
class RecurrentShape:
    """What decides the bytes of the states.

    Attributes:
        layers: Recurrent layers.
        snapshots: How many are kept at most, of all sequences.
    """

    delta: DeltaShape
    layers: int
    snapshots: int

    def state_bytes(self, itemsize: int) -> int:
        """Bytes of one sequence's states, and of a snapshot; ``itemsize`` is that of the compute dtype."""
        return self.layers * self.delta.state_bytes(itemsize)


class RecurrentStates:
    """The states of all recurrent layers, for ``rows`` sequences, and their snapshots.

    Args:
        sink: Tokens before the first page: page boundaries are ``sink + 64 n``.
        dtype: The compute dtype.
    """

    def __init__(self, shape: RecurrentShape, rows: int, sink: int, dtype: torch.dtype, device: torch.device) -> None:
        self._sink, self._rows, d = sink, rows, shape.delta
        places = rows + shape.snapshots  # the rows' own first
        self._conv = torch.zeros(shape.layers, places, d.taps, d.channels, dtype=dtype, device=device)
        sizes = (d.value_heads, d.key_dim, d.value_dim)
        self._memory = torch.zeros(shape.layers, places, *sizes, dtype=torch.float32, device=device)
        #: Of each row the position that its state stands at: it has seen so many tokens. -1: it is being written.
        self._at = [0] * rows
        #: Of each row its snapshots: positions in order, and places.
        self._held: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
        #: Of each row the place of a snapshot that is being written.
        self._taken: dict[int, int] = {}
        #: Of each row the position of a snapshot that the next page boundary makes needless.
        self._passing: dict[int, int] = {}

    def layer(self, index: int) -> LayerState:
        """The states of recurrent layer number ``index``: those of the rows, then snapshots."""
        return LayerState(self._conv[index], self._memory[index])

    def snapshots(self, row: int) -> list[int]:
        """The positions of a row's snapshots."""
        return [position for position, _ in self._held[row]]

    def stands(self, row: int, position: int) -> bool:
        """Whether the row's state has seen the first ``position`` tokens and no more."""
        return position in (0, self._at[row])

    def reachable(self, row: int, length: int) -> int:
        """The last position up to ``length`` that the row's state can be brought to."""
        found = (position for position in (0, self._at[row], *self.snapshots(row)) if position <= length)
        return max(found, default=0)

    def writing(self, row: int) -> None:
        """Until :meth:`stand`, the row's state counts for nothing."""
        self._at[row] = -1

    def stand(self, row: int, position: int) -> None:
        """The row's state has seen the first ``position`` tokens."""
        self._at[row] = position

    def cut(self, row: int, length: int) -> None:
        """Bring a row's state to ``length``, which is :meth:`reachable`, and drop its snapshots behind that."""
        self._held[row] = [one for one in self._held[row] if one[0] <= length]
        if self._at[row] != length:
            self._bring(row, row, length)

    def share(self, donor: int, row: int, length: int) -> None:
        """Let a row hold the snapshots of another one, and bring its state to ``length``, :meth:`reachable` there."""
        self._at[row] = -1
        self._held[row] = [one for one in self._held[donor] if one[0] <= length]
        self._bring(donor, row, length)

    def _bring(self, donor: int, row: int, length: int) -> None:
        """Copy the state of ``donor`` at ``length`` to a row."""
        self._at[row], place = -1, donor
        if length and self._at[donor] != length:
            place = next(place for position, place in self._held[donor] if position == length)
        if length:
            self._copy(place, row)
        self._at[row] = length

    @torch.inference_mode()
    def _copy(self, source: int, target: int) -> None:
        if source != target:
            self._conv[:, target].copy_(self._conv[:, source])
            self._memory[:, target].copy_(self._memory[:, source])

    def boundary(self, length: int) -> int:
        """The last page boundary before the token at ``length - 1``, 0 if there is none."""
        return max(0, length - 1 - (length - 1 - self._sink) % PAGE)

    def plan(self, row: int, start: int, end: int) -> tuple[int, int] | None:
        """A place for the snapshot of a chunk.

        Where the boundary is the chunk's first position, the snapshot is taken at once.

        Returns:
            Position, which is inside the chunk, and place; None if there is nothing to be taken. It counts from
            :meth:`keep` on.
        """
        position = self.boundary(end)
        self._passing.pop(row, None)  # what was drawn ends here: the boundary before it counts from now on
        if position == start:
            self.take(row, position)
        if position <= start:
            return None
        place = self._place(row)
        return None if place is None else (position, place)

    def keep(self, row: int, snapshot: tuple[int, int] | None) -> None:
        """A planned snapshot was written."""
        if snapshot is not None:
            self._held[row] = [*self._held[row], snapshot]
            self._taken.pop(row, None)

    def passing(self, row: int, position: int) -> None:
        """Before a step feeds the token at ``position``: take a snapshot at a page boundary, in place of the last one
        that was taken so, or beside it."""
        if position <= self._sink or (position - self._sink) % PAGE:
            return
        last = self._passing.pop(row, None)
        if last is not None and (last - self._sink) % (EVERY * PAGE):
            self._held[row] = [one for one in self._held[row] if one[0] != last]
        self.take(row, position)
        self._passing[row] = position

    def take(self, row: int, position: int) -> None:
        """Take a snapshot of a row's state, which stands at ``position``, unless there is one or nothing to keep."""
        if not position or position in self.snapshots(row):
            return
        place = self._place(row)
        if place is not None:
            self._copy(row, place)
            self.keep(row, (position, place))

    def _place(self, row: int) -> int | None:
        """A place for a snapshot: a free one, else that of the one that is missed least."""
        self._taken.pop(row, None)
        busy = {place for held in self._held for _, place in held} | set(self._taken.values())
        place = next((place for place in range(self._rows, self._conv.shape[1]) if place not in busy), None)
        if place is None:
            worth = self._worth()
            if not worth:
                return None
            place = min(worth, key=lambda one: worth[one])
            for other, held in enumerate(self._held):
                self._held[other] = [one for one in held if one[1] != place]
        self._taken[row] = place
        return place

    def _worth(self) -> dict[int, tuple[bool, int]]:
        """Of each snapshot's place: whether it is the newest of a row, and tokens between its neighbours."""
        worth: dict[int, tuple[bool, int]] = {}
        for held in self._held:
            positions = [0, *(position for position, _ in held), held[-1][0] if held else 0]
            for number, (_, place) in enumerate(held):
                mine = number == len(held) - 1, positions[number + 2] - positions[number]
                worth[place] = max(mine, worth.get(place, mine))
        return worth
