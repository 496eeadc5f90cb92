"""States of recurrent layers: one for each row of the arena, and snapshots that rows go back to (docs/recurrent.md).

Whoever has no row any more, a prefix that is kept, may hold snapshots, too: holders are numbered, the rows first.

Host and device agree in this way: what is written to a row's state or to a snapshot is written in the order of the
device's work, and a list of the host names it only when all of it has been launched. An exception, Ctrl-C's included,
may strike between any two statements here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from octo_run.kernels import PAGE_TOKENS as PAGE
from octo_run.kernels.recurrent import DeltaShape, LayerState

#: Of the snapshots that are taken while tokens are drawn, one at each page boundary, the so-manieth ones stay.
EVERY = 4
#: Pages between two snapshots that are taken while a prompt is read, beside the one at the end of each chunk.
READ_EVERY = 16


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
        #: Of each holder the position that its state stands at: it has seen so many tokens. -1: it is being written.
        #: Only rows have states; others stand at 0.
        self._at = [0] * rows
        #: Of each holder its snapshots: positions in order, and places.
        self._held: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
        #: Holders, those last that were used last.
        self._order = list(range(rows))
        #: Of each row the places of snapshots that are being written.
        self._taken: dict[int, list[int]] = {}
        #: Of each row the position of a snapshot that the next page boundary makes needless.
        self._passing: dict[int, int] = {}

    def layer(self, index: int) -> LayerState:
        """The states of recurrent layer number ``index``: those of the rows, then snapshots."""
        return LayerState(self._conv[index], self._memory[index])

    def snapshots(self, row: int) -> list[int]:
        """The positions of a holder's snapshots."""
        return [position for position, _ in self._held[row]]

    def stands(self, row: int, position: int) -> bool:
        """Whether the row's state has seen the first ``position`` tokens and no more."""
        return position in (0, self._at[row])

    def reachable(self, row: int, length: int) -> int:
        """The last position up to ``length`` that the row's state can be brought to."""
        found = (position for position in (0, self._at[row], *self.snapshots(row)) if position <= length)
        return max(found, default=0)

    def of(self, row: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A row's state at ``length``, which is :meth:`reachable`.

        Returns:
            What the convolutions remember, ``[layers, taps, channels]``, and the memories.
        """
        place = row
        if length and self._at[row] != length:
            place = next(place for position, place in self._held[row] if position == length)
        return self._conv[:, place], self._memory[:, place]

    @torch.inference_mode()
    def load(self, row: int, conv: torch.Tensor, memory: torch.Tensor) -> None:
        """Write a row's state as :meth:`of` gave it; it counts from :meth:`stand` on."""
        self.writing(row)
        self._held[row] = []
        self._conv[:, row].copy_(conv)
        self._memory[:, row].copy_(memory)

    @property
    def room(self) -> int:
        """How many snapshots there are at most, of all holders."""
        return self._conv.shape[1] - self._rows

    @torch.inference_mode()
    def enter(self, row: int, position: int, conv: torch.Tensor, memory: torch.Tensor) -> None:
        """Let a row hold a snapshot as :meth:`of` gave it, behind those that it has."""
        self._use(row)
        for snapshot in self._places(row, [position]):
            self._conv[:, snapshot[1]].copy_(conv)
            self._memory[:, snapshot[1]].copy_(memory)
            self.keep(row, [snapshot])

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
        """Let a row hold the snapshots of another holder, and bring its state to ``length``, which is
        :meth:`reachable` there."""
        self._at[row] = -1
        self.lend(donor, row, length)
        self._bring(donor, row, length)

    def lend(self, donor: int, holder: int, length: int) -> None:
        """Let a holder, which may be a new one, hold the snapshots of another one up to ``length`` and no more."""
        while len(self._held) <= holder:
            self._at.append(0)
            self._held.append([])
        self._held[holder] = [one for one in self._held[donor] if one[0] <= length]
        self._use(holder)

    def release(self, holder: int) -> None:
        """Let a holder that is no row have no snapshots."""
        if holder < len(self._held):
            self._held[holder] = []

    def _use(self, holder: int) -> None:
        """It is being used."""
        self._order = [other for other in self._order if other != holder] + [holder]

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

    def plan(self, row: int, start: int, end: int, marks: Iterable[int] = ()) -> list[tuple[int, int]]:
        """Places for the snapshots of a chunk: at the last boundary before its end, at the boundaries before ``marks``,
        and, where there is room for such, every `READ_EVERY` pages.

        Where one of these is the chunk's first position, the snapshot is taken at once.

        Args:
            marks: Lengths that somebody may want to go back to.

        Returns:
            Positions in order, which are inside the chunk, and places. They count from :meth:`keep` on.
        """
        self._passing.pop(row, None)  # what was drawn ends here: the boundary before it counts from now on
        self._taken.pop(row, None)
        self._use(row)
        asked = {self.boundary(end), *(self.boundary(mark + 1) for mark in marks if mark <= end)}
        if start in asked:
            self.take(row, start)
        needed = sorted(position for position in asked if position > start)
        if not needed:
            return []
        step = READ_EVERY * PAGE
        taken = [0, *self.snapshots(row), *needed]
        first = start + step - (start - self._sink) % step
        between = (place for place in range(max(first, self._sink + step), needed[-1], step))
        spare = [one for one in between if all(abs(one - other) >= step // 2 for other in taken)]
        return self._places(row, needed, spare)

    def keep(self, row: int, snapshots: Sequence[tuple[int, int]]) -> None:
        """Planned snapshots were written."""
        if snapshots:
            self._held[row] = sorted([*self._held[row], *snapshots])
            self._taken.pop(row, None)

    def passing(self, row: int, position: int) -> None:
        """Before a step feeds the token at ``position``: take a snapshot at a page boundary, in place of the last one
        that was taken so, or beside it."""
        if (position - self._sink) % PAGE:
            return
        last = self._passing.pop(row, None)
        if last is not None and (last <= self._sink or (last - self._sink) % (EVERY * PAGE)):
            self._held[row] = [one for one in self._held[row] if one[0] != last]
        self._use(row)
        if position not in self.snapshots(row):  # one that is there was asked for, and stays
            self.take(row, position)
            self._passing[row] = position

    def take(self, row: int, position: int) -> None:
        """Take a snapshot of a row's state, which stands at ``position``, unless there is one or nothing to keep."""
        if not position or position in self.snapshots(row):
            return
        for snapshot in self._places(row, [position]):
            self._copy(row, snapshot[1])
            self.keep(row, [snapshot])

    def _places(self, row: int, needed: list[int], spare: Sequence[int] = ()) -> list[tuple[int, int]]:
        """Places for snapshots of a row: free ones, else those of the ones that are missed least.

        Args:
            spare: Positions of further ones, which get a place if they are not missed least themselves.

        Returns:
            Positions in order, and their places.
        """
        wanted, free = sorted([*needed, *spare]), self._free()
        while len(wanted) > len(free):
            worth = self._worth(row, wanted, needed)
            least = min(worth, key=lambda one: worth[one])
            if least < 0:
                wanted.pop(-1 - least)
                continue
            for other, held in enumerate(self._held):
                self._held[other] = [one for one in held if one[1] != least]
            free.append(least)
        found = list(zip(wanted, free, strict=False))
        self._taken[row] = [place for _, place in found]
        return found

    def _free(self) -> list[int]:
        """The places of no snapshot."""
        busy = {place for held in self._held for _, place in held}
        busy.update(place for places in self._taken.values() for place in places)
        return [place for place in range(self._rows, self._conv.shape[1]) if place not in busy]

    def _worth(self, row: int, wanted: list[int], needed: list[int]) -> dict[int, tuple[bool, float, bool]]:
        """How much each snapshot would be missed: whether it must stay, the tokens between its neighbours, divided by
        how manieth its holder is of those that were used last, and whether it is there already.

        Returns:
            Of the places of snapshots, and of ``wanted`` ones of a row, whose numbers are -1, -2, ...
        """
        worth = dict[int, tuple[bool, float, bool]]()
        holders = [holder for holder in reversed(self._order) if self._held[holder] or holder == row]
        for age, holder in enumerate(holders, start=1):
            held = self._held[holder]
            if holder == row:
                held = sorted([*held, *((position, -1 - number) for number, position in enumerate(wanted))])
            positions = [0, *(position for position, _ in held), held[-1][0] if held else 0]
            for number, (position, place) in enumerate(held):
                newest = number == len(held) - 1 and holder < self._rows
                stays = newest or (place < 0 and position in needed)
                mine = stays, (positions[number + 2] - positions[number]) / age, place >= 0
                worth[place] = max(mine, worth.get(place, mine))
        return worth
