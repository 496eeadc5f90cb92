"""New tokens of a sequence on their way into the arena, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octo_run import kernels
from octo_run.engine.arena.shape import PAGE
from octo_run.engine.pool import GONE
from octo_run.engine.sequence import Sequence
from octo_run.engine.window_pages import WindowPages

if TYPE_CHECKING:
    from octo_run.engine.arena.store import KVArena


def _chosen(x: Tensor, axis: int, places: list[int]) -> Tensor:
    """Some places of an axis, in order: a view where they are neighbours."""
    if not places or places[-1] - places[0] == len(places) - 1:
        return x.narrow(axis, places[0] if places else 0, len(places))
    return x.index_select(axis, torch.tensor(places, device=x.device))


class Chunk:
    """New tokens of one sequence on their way through the layers.

    ``commit`` makes them count; if it is not called, the sequence keeps what they cannot have spoilt.
    """

    #: Whether tokens attend to pages that the chunk itself fills.
    reads_its_pages = False

    def __init__(self, arena: KVArena, sequence: Sequence, ids: list[int]) -> None:
        s = arena.shape
        self.arena, self.sequence, self.ids = arena, sequence, ids
        self.count, self.row = len(ids), sequence.row
        assert not sequence.ahead
        self.start = len(sequence)
        self.end = self.start + self.count
        states = arena.states
        #: Lengths that somebody may want to go back to.
        self._marks = list(sequence.marks)
        #: Positions and places of the snapshots of recurrent states that are taken on the way.
        self.snapshots = list[tuple[int, int]]()
        if states is not None:
            assert states.stands(self.row, self.start)
            self.snapshots = states.plan(self.row, self.start, self.end, self._marks)
            states.writing(self.row)
        assert 0 < self.count <= s.chunk and self.end <= s.context
        self.to_sink = min(self.count, max(0, s.sink - self.start))
        origin = PAGE * sequence.packed
        self.old_tail = max(0, self.start - s.sink - origin)
        tail = self.old_tail + self.count - self.to_sink
        self.new_pages = max(0, (tail - s.window) // PAGE)
        first = sequence.packed
        # A turn may have ended where it starts.
        marks = [length for length in (self.start, *self._marks) if self.start <= length <= self.end]
        page_ids = sequence.take_pages(self.new_pages, None if self.reads_its_pages else self.end, marks)
        if self.new_pages:  # slots of the old tail will be written over
            sequence.hold(sequence.packed_end)
        #: Of layers without a window, and of each group: which of the new pages are stored, and their ids.
        self._ids = dict[WindowPages | None, tuple[list[int], Tensor]]()
        self._ids[None] = [*range(self.new_pages)], arena.enter_pages(self.row, first, page_ids)
        for group in arena.windows:
            found = group.pool.held[self.row][first:]
            places = [place for place, page in enumerate(found) if page != GONE]
            entered = arena.enter_pages(self.row, first, [max(0, page) for page in found], group)
            self._ids[group] = places, _chosen(entered, 0, places)
        device = arena.pages.device
        slots = torch.arange(origin, origin + tail, device=device) % s.ring + s.sink
        self._old_slots, self._left_slots = slots[: self.old_tail], slots[self.new_pages * PAGE :]
        self._coded, self._tail = self.new_pages * PAGE, tail
        #: The tails of layers whose keys and values later layers see, too.
        self._lent = dict[int, Tensor]()
        self._state = arena._chunk_state[self.row]
        arena.upload([self.start, sequence.packed, origin], self._state[:3])

    def attend(
        self,
        layer: int,
        q: Tensor,
        kv: Tensor,
        spec: kernels.AttentionSpec,
        workspace: Tensor | None,
        out: Tensor | None = None,
        coefficients: Tensor | None = None,
    ) -> Tensor:
        """Store the chunk's keys and values of a layer, and attend to them and to what came before.

        Args:
            q: Queries ``[1, C, heads, d]``.
            kv: Keys and values ``[2, C, kv_heads, d]``.
            coefficients: Of the queries, for means: float32 like ``q``.

        Returns:
            The attention of ``q``.
        """
        staging = self._stage(layer, kv)
        if layer in self.arena.shape.lent:
            self._lent[layer] = staging[:, :, :, : self._tail].clone()
        out = self._attend(layer, q, staging, spec, workspace, out, coefficients)
        self._code(layer, staging)
        self._keep(layer, staging)
        return out

    def attend_again(
        self,
        layer: int,
        q: Tensor,
        spec: kernels.AttentionSpec,
        workspace: Tensor | None,
        out: Tensor | None = None,
        coefficients: Tensor | None = None,
    ) -> Tensor:
        """Let a later layer attend to keys and values that :meth:`attend` has stored of ``layer``, one that is lent."""
        return self._attend(layer, q, self._lent[layer], spec, workspace, out, coefficients)

    def _attend(
        self, layer: int, q: Tensor, tail: Tensor, spec: kernels.AttentionSpec, workspace: Tensor | None,
        out: Tensor | None, coefficients: Tensor | None,
    ) -> Tensor:  # fmt: skip
        inputs = self.arena.chunk_inputs(layer, self.row, tail, coefficients)
        fmt = self.arena.formats[layer]
        return kernels.attend(q, inputs, fmt, spec=spec, max_length=self.end, workspace=workspace, out=out)

    def _stage(self, layer: int, kv: Tensor) -> Tensor:
        """Store new sinks; lay the old tail and the new tokens out one after the other.

        Returns:
            ``[2, 1, kv_heads, slots, d]``, good until the next chunk or layer.
        """
        a = self.arena
        whole = a._staging[a._places[layer][0]]
        new, staging, store = kv.transpose(1, 2), whole[:, 0], self._stored(layer)
        if self.to_sink:
            store[:, :, self.start : self.start + self.to_sink] = new[:, :, : self.to_sink]
        if self.old_tail:
            staging[:, :, : self.old_tail] = store.index_select(2, self._old_slots)
        if self._tail > self.old_tail:
            staging[:, :, self.old_tail : self._tail] = new[:, :, self.to_sink :]
        return whole

    def _stored(self, layer: int) -> Tensor:
        """Sinks and ring of a layer, ``[2, kv_heads, sink + ring, d]``."""
        kind, number = self.arena._places[layer]
        return self.arena._full[kind][:, number, self.row]

    def _code(self, layer: int, staging: Tensor) -> None:
        """Code the pages that the chunk fills."""
        a = self.arena
        if not self._coded:
            return
        coded = staging[:, :, :, : self._coded]
        k_pages, v_pages = coded.view(*coded.shape[:3], -1, PAGE, coded.shape[4]).transpose(2, 3)
        if a.means is not None:
            k_pages = a.means.take_out(k_pages, (layer,), self._state[1:2])
        group = a._group.get(layer)
        places, ids = self._ids[group]
        if places:
            a.encode((layer,), _chosen(k_pages, 1, places), _chosen(v_pages, 1, places), ids, group)

    def _keep(self, layer: int, staging: Tensor) -> None:
        """Store what is left of the tail."""
        if self._tail > self._coded:
            self._stored(layer).index_copy_(2, self._left_slots, staging[:, 0, :, self._coded : self._tail])

    def share(self, length: int) -> bool:
        """See to it, before the layers are run, that a sequence which begins with the same ``length`` tokens can have
        them, or all but a page of them, when this chunk is committed.

        Returns:
            Whether it can.
        """
        marked = self.sequence.mark(min(length, self.end))
        if self.arena.states is None:
            return marked
        self._marks.append(min(length, self.end))
        self.snapshots = self.arena.states.plan(self.row, self.start, self.end, self._marks)
        return marked and any(0 <= length - position < PAGE for position, _ in self.snapshots)

    def commit(self) -> None:
        """All layers are written: the chunk's tokens now belong to the sequence."""
        self.sequence.mark(self.end)
        self.sequence.advance(self.start, self.ids, self.new_pages)
        if self.arena.states is not None:
            self.arena.states.keep(self.row, self.snapshots)
