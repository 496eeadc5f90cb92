"""The KV arena: one preallocated store for all layers and sequences, packed pages plus full-precision sinks and
windows.

Where a token at position ``j`` of a sequence of ``n`` tokens with ``P`` packed pages lives:

- ``j < sink``: in its own full-precision sink slot (attention sinks ruin quantizers);
- ``sink <= j < sink + 64 P``: row ``(j - sink) % 64`` of packed page ``page_table[row, (j - sink) // 64]``;
- the rest, the *tail*: slot ``(j - sink) % ring`` of a full-precision ring of ``window + 64`` tokens.

``row`` is the sequence's (``engine.sequence``). A full ring's oldest 64 tokens are coded into a page before the next
token is written, so at least ``window`` of the last tokens are in full precision. (After a cut there may be fewer,
until new ones have come: what is coded stays coded.) Keys and queries are stored in the codec's rotated basis, values
too (see ``models.decoder``).

A page of the pool holds the pages of all layers and KV heads one after the other; layers may differ in format, hence in
bytes. Every one begins at a multiple of 128 bytes, as vectors have an even number of them.

An exception, Ctrl-C's included, may strike between any two statements here: what is being written lies beyond the end
of its sequence, which moves only when all of it is there.
"""

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from octo_run import kernels
from octo_run.engine.pool import GONE
from octo_run.engine.recurrent_state import RecurrentShape, RecurrentStates
from octo_run.engine.sequence import Sequence, SequenceTable
from octo_run.engine.window_pages import WindowPages, WindowShape
from octo_run.errors import OctoError, UsageError
from octo_run.kernels.codec import LayerFormats, PageFormat
from octo_run.kernels.codec.layer_formats import LayerRun
from octo_run.models.config import KVHeads

if TYPE_CHECKING:
    from octo_run.engine.key_means import KeyMeans
    from octo_run.engine.step import StepState

#: Does a piece of work, which is the same for one key: at once, or from a recording.
Run = Callable[[Hashable, Callable[[], None]], None]

PAGE = kernels.PAGE_TOKENS


@dataclass(frozen=True)
class ArenaShape:
    """What decides the bytes of an arena.

    Attributes:
        heads: Keys and values of each layer.
        token_bytes: Of a packed token: its keys and values of all layers without a window.
        dtype: The full-precision one.
        context: Tokens that one sequence can hold.
        chunk: Tokens that ``KVArena.prefill`` takes at most (0: it is not used, and nothing is staged).
        sequences: Rows.
        mean_heads: The number of query heads if key means are kept out of the codes (``key_means``), else 0.
        on_gpu: Whether they are for a GPU.
        pool_pages: Pages that all sequences share (None: as many as all of them hold at full context).
        recurrent: The states of recurrent layers, which are not among ``layers``; None: there are none.
        windows: Groups of layers that have a window, and pages of their own.
        lent: Layers whose keys and values later layers of the model see, too.
    """

    heads: tuple[KVHeads, ...]
    token_bytes: int
    dtype: torch.dtype
    context: int
    sink: int = 64
    window: int = 64
    chunk: int = 512
    sequences: int = 1
    mean_heads: int = 0
    on_gpu: bool = False
    pool_pages: int | None = None
    recurrent: RecurrentShape | None = None
    windows: tuple[WindowShape, ...] = ()
    lent: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.sink < 0:
            raise UsageError(f"The number of sink tokens is {self.sink}; give 0 or more.")
        if self.window < 0 or self.window % PAGE:
            raise UsageError(f"The window is {self.window} tokens; give a multiple of {PAGE}.")
        if self.context < 1:
            raise UsageError(f"The context is {self.context} tokens; give at least 1.")

    @property
    def ring(self) -> int:
        """Slots of a sequence's full-precision ring: the window and the page being filled."""
        return self.window + PAGE

    @property
    def max_pages(self) -> int:
        """Packed pages of one sequence at full context."""
        return max(0, (self.context - self.sink - self.window) // PAGE)

    @property
    def pages(self) -> int:
        """Packed pages of all sequences together."""
        return self.sequences * self.max_pages if self.pool_pages is None else self.pool_pages

    def with_pages(self, pages: int, limit: int) -> "ArenaShape":
        """The shape with so many pages for all sequences, and a context that takes all of them, at most ``limit``."""
        context = min(limit, self.sink + self.window + PAGE * pages + PAGE - 1)
        return replace(self, pool_pages=pages, context=context, chunk=min(self.chunk, context))

    @property
    def layers(self) -> int:
        """Layers that have keys and values of their own."""
        return len(self.heads)

    @cached_property
    def kinds(self) -> dict[KVHeads, tuple[int, ...]]:
        """The layers whose keys and values have one shape: they lie in one tensor."""
        found = dict[KVHeads, list[int]]()
        for layer, heads in enumerate(self.heads):
            found.setdefault(heads, []).append(layer)
        return {heads: tuple(layers) for heads, layers in found.items()}

    def place(self, layer: int) -> tuple[int, int]:
        """The number of a layer's kind, and its own number among the layers of that."""
        heads = self.heads[layer]
        return [*self.kinds].index(heads), self.kinds[heads].index(layer)

    def coefficients_shape(self, rows: int) -> tuple[int, int, int, int]:
        """Of the means' coefficients of ``rows`` queries, float32, in the layers with the largest heads: on a GPU only
        a step's, for prefill needs none."""
        count = min(rows, self.sequences) if self.on_gpu else rows
        return count if self.mean_heads else 0, 1, self.mean_heads, max(heads.size for heads in self.heads)


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Bytes, all 0. On a CPU the system gives them when they are written: a long context takes no time and no memory
    before it is used."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(prod(shape), np.uint8)).view(shape)
    return torch.zeros(shape, dtype=torch.uint8, device=device)


class KVArena:
    """Allocates everything of ``shape`` on ``device`` once; afterwards only writes into it."""

    def __init__(
        self, shape: ArenaShape, formats: LayerFormats, device: torch.device, means: "KeyMeans | None" = None
    ) -> None:
        self.shape, self.formats, self.means = shape, formats, means
        #: What the pages of each layer hold and how; its tag says which bytes they are.
        self.page_formats = [PageFormat.on(fmt, device) for fmt in formats]
        s = shape
        self.pages = _zeros((s.pages, PAGE * s.token_bytes), device)
        #: The same as ``[pages, layers, kv_heads, page_bytes]`` of layers of one format, and of each layer.
        self._run_pages = [*self._views()]
        #: The pages of layers that have a window, and which group a layer is of.
        self.windows = [self._window_pages(window, device) for window in s.windows]
        self._group = {layer: group for group in self.windows for layer in group.shape.layers}
        runs = [*self._run_pages, *(run for group in self.windows for run in group.runs)]
        found = {run.first + n: one for run, pages in runs for n, one in enumerate(pages.unbind(1))}
        self.layer_pages = [found[layer] for layer in range(s.layers)]
        if device.type == "cuda":
            for fmt in dict.fromkeys(formats):
                kernels.prepare(fmt, self.pages.device)  # with its number, by which kernels look for what they keep
        #: For each kind of layers sinks and rings: K and V, layers, rows, KV heads, slots, d; and the tail of the chunk
        #: at hand.
        slots, staged = s.sink + s.ring, s.ring + s.chunk if s.chunk else 0
        self._full = [
            torch.zeros(2, len(layers), s.sequences, heads.number, slots, heads.size, dtype=s.dtype, device=device)
            for heads, layers in s.kinds.items()
        ]
        self._staging = [
            torch.zeros(2, 1, heads.number, staged, heads.size, dtype=s.dtype, device=device) for heads in s.kinds
        ]
        #: For each layer its kind, and its number among the layers of that.
        self._places = [s.place(layer) for layer in range(s.layers)]
        self.page_table = torch.zeros(s.sequences, max(1, s.max_pages), dtype=torch.int32, device=device)
        #: For each row the first position of its chunk, packed pages, the tail's origin, and 0: its row among the one
        #: row that attention is given.
        self._chunk_state = torch.zeros(s.sequences, 4, dtype=torch.int32, device=device)
        #: For each row the id and the number of the page that is coded between two steps, then its ids in the windows.
        self._coding = torch.zeros(2 + len(self.windows), s.sequences, dtype=torch.int32, device=device)
        self.states: RecurrentStates | None = None
        if s.recurrent is not None:
            self.states = RecurrentStates(s.recurrent, s.sequences, s.sink, s.dtype, device)
        self.table = SequenceTable(s.sequences, s.pages, s.sink, self, self.states, self.windows)

    @property
    def full_precision(self) -> list[Tensor]:
        """Sinks, rings and the staging buffers, K and V."""
        return [*self._full, *self._staging]

    @torch.inference_mode()
    def open(self, ids: list[int] | None = None) -> Sequence:
        """A sequence that holds as much of the beginning of ``ids`` as the arena has (see ``SequenceTable.open``)."""
        return self.table.open(ids)

    def upload(self, values: list[Any], into: Tensor) -> None:
        """Copy numbers into a tensor of the device, without waiting for it."""
        host = torch.tensor(values, dtype=into.dtype)
        into.copy_(host.pin_memory() if into.is_cuda else host, non_blocking=True)

    @torch.inference_mode()
    def prefill(self, sequence: Sequence, ids: list[int]) -> "Chunk":
        """Open the way for new tokens of one sequence.

        Args:
            ids: At most ``chunk`` new tokens.

        Raises:
            PoolExhausted: There are too few pages for them.
        """
        return Chunk(self, sequence, ids)

    def enter_pages(self, row: int, first: int, ids: list[int], group: WindowPages | None = None) -> Tensor:
        """Write page ids to the page table, that of a group if there is one, from page number ``first`` of a row on.

        Returns:
            Where they stand in the table: int32.
        """
        table = self.page_table if group is None else group.page_table
        places = table[row, first : first + len(ids)]
        if len(ids) == 1:
            places.fill_(ids[0])
        elif ids:
            self.upload(ids, places)
        return places

    def _views(self) -> Iterator[tuple[LayerRun, Tensor]]:
        """Runs of layers of one format without a window, and their pages."""
        windowed = {layer for window in self.shape.windows for layer in window.layers}
        return self._run_views(self.pages, [layer for layer in range(self.shape.layers) if layer not in windowed])

    def _run_views(self, pages: Tensor, layers: list[int]) -> Iterator[tuple[LayerRun, Tensor]]:
        """Runs of some layers, in order, that have ``pages``: of one format and one kind."""
        at, (count, size) = 0, pages.shape
        for whole in self.formats.runs_of(layers):
            for run in self._of_one_kind(whole):
                page, number = self.page_formats[run.first].page_bytes, run.end - run.first
                heads = self.shape.heads[run.first].number
                yield run, pages.as_strided((count, number, heads, page), (size, heads * page, page, 1), at)
                at += number * heads * page
        assert at == size

    def _of_one_kind(self, run: LayerRun) -> Iterator[LayerRun]:
        """A run cut where the number of heads changes."""
        first, heads = run.first, self.shape.heads
        for layer in range(run.first + 1, run.end + 1):
            if layer == run.end or heads[layer] != heads[first]:
                yield run._replace(first=first, end=layer)
                first = layer

    def _window_pages(self, shape: WindowShape, device: torch.device) -> WindowPages:
        s = self.shape
        pages = _zeros((shape.pages(s.sequences, s.max_pages, s.chunk), PAGE * shape.token_bytes), device)
        table = torch.zeros(s.sequences, max(1, s.max_pages), dtype=torch.int32, device=device)
        return WindowPages(shape, s.sink, pages, table, [*self._run_views(pages, [*shape.layers])])

    def encode(
        self, layers: tuple[int, ...], k: Tensor, v: Tensor, ids: Tensor, group: WindowPages | None = None
    ) -> None:
        """Code keys and values, by one call for all neighbours of one format: of layers without a window, or of those
        of a group.

        Args:
            layers: Of one kind, in order; those that are not meant stay as they are.
            k, v: ``[L, N, kv_heads, 64, d]``.
            ids: Of N pages.

        Raises:
            OctoError: Keys or values that overflowed.
        """
        try:
            for run, pages in self._run_pages if group is None else group.runs:
                first, end = (bisect_left(layers, edge) for edge in (run.first, run.end))
                if first < end:
                    theirs = slice(layers[first] - run.first, layers[end - 1] + 1 - run.first)
                    kernels.encode_pages(k[first:end], v[first:end], pages[:, theirs], ids, run.fmt)
        except ValueError:
            if bool(k.isfinite().all()) and bool(v.isfinite().all()):
                raise
            raise OctoError(
                f"The keys or values are not finite in {str(k.dtype).removeprefix('torch.')}: choose another --dtype."
            ) from None

    def ring_is_full(self, sequence: Sequence) -> bool:
        """Whether a page must be coded before the next token is written."""
        return len(sequence) - sequence.packed_end >= self.shape.ring

    def code_oldest(self, sequence: Sequence, run: "Run | None" = None) -> None:
        """Code the oldest page of the ring, for all layers in one call. Waits for nothing.

        Args:
            run: ``run(key, work)`` does the work, which is the same for one key.

        Raises:
            PoolExhausted: There is no page for it.
        """
        s, row, number = self.shape, sequence.row, sequence.packed
        slot = s.sink + (PAGE * number) % s.ring
        (page,) = sequence.take_pages(1)
        self.enter_pages(row, number, [page])
        self._coding[0, row].fill_(page)
        self._coding[1, row].fill_(number)
        for coding, group in zip(self._coding[2:], self.windows, strict=True):
            (page,) = group.pool.held[row][number:]
            self.enter_pages(row, number, [page], group)
            coding[row].fill_(page)
        if run is None:
            self._code_slots(row, slot)
        else:
            run(("page", row, slot), lambda: self._code_slots(row, slot))
        sequence.add_page()

    def _code_slots(self, row: int, slot: int) -> None:
        """Code the page that begins in ``slot``; its id and number are in ``_coding``."""
        for layers, full in zip(self.shape.kinds.values(), self._full, strict=True):
            k, v = full[:, :, row : row + 1, :, slot : slot + PAGE]
            if self.means is not None:
                k = self.means.take_out(k, layers, self._coding[1, row : row + 1])
            self.encode(layers, k, v, self._coding[0, row : row + 1])
            for coding, group in zip(self._coding[2:], self.windows, strict=True):
                self.encode(layers, k, v, coding[row : row + 1], group)

    def fill(self, sequence: Sequence, length: int, seed: int = 0) -> None:
        """Make the sequence hold ``length`` tokens of Gaussian keys and values, to measure at a depth.

        Eight pages are coded; the others are copies of them.

        Raises:
            UsageError: A length beyond the context.
        """
        s = self.shape
        if not 0 <= length <= s.context:
            raise UsageError(f"The depth is {length:,} tokens; give 0 to {s.context:,}, the context.")
        sequence.cut(0)
        row = sequence.row
        generator = torch.Generator(self.pages.device).manual_seed(seed)
        count = max(0, (length - s.sink - s.window) // PAGE)
        ids = sequence.take_pages(count, length)
        self.enter_pages(row, 0, ids)
        held = [(self.pages, ids)]
        for group in self.windows:
            found = group.pool.held[row][:]
            self.enter_pages(row, 0, [max(0, page) for page in found], group)
            held.append((group.pages, [page for page in found if page != GONE]))
        for number in range(min(8, count)):
            for part in self.row_state(row):
                part.normal_(generator=generator)
            for coding, (_, some) in zip((self._coding[0], *self._coding[2:]), held, strict=True):
                coding[row].fill_(some[number % len(some)])
            self._coding[1, row].fill_(number)
            self._code_slots(row, s.sink)
        for pages, some in held:
            for number, page in enumerate(some[8:], start=8):
                pages[page].copy_(pages[some[number % 8]])
        for part in self.row_state(row):
            part.normal_(generator=generator)
        sequence.advance(0, [-1] * length, count)  # no prompt has them

    def place(self, position: int) -> int:
        """The full-precision slot that a new token at ``position`` is written to."""
        s = self.shape
        return position if position < s.sink else s.sink + (position - s.sink) % s.ring

    def full(self, layer: int) -> tuple[Tensor, Tensor]:
        """Full-precision K and V of a layer: ``[rows, kv_heads, sink + ring, d]``."""
        kind, number = self._places[layer]
        return self._full[kind][0, number], self._full[kind][1, number]

    def _table_of(self, layer: int) -> Tensor:
        """The page table of a layer."""
        group = self._group.get(layer)
        return self.page_table if group is None else group.page_table

    def row_state(self, row: int) -> list[Tensor]:
        """Sinks and ring of a row, for each kind of layers: ``[2, layers, kv_heads, sink + ring, d]``."""
        return [full[:, :, row] for full in self._full]

    def inputs(self, layer: int, state: "StepState", coefficients: Tensor | None) -> kernels.AttentionInputs:
        """What the attention kernels read for one token in each sequence of a step; for means its queries'
        coefficients."""
        sink = self.shape.sink
        full_k, full_v = self.full(layer)
        return kernels.AttentionInputs(
            pages=self.layer_pages[layer],
            page_table=self._table_of(layer),
            rows=state.rows,
            num_packed=state.packed,
            starts=state.positions,
            sink_k=full_k[:, :, :sink],
            sink_v=full_v[:, :, :sink],
            tail_k=full_k[:, :, sink:],
            tail_v=full_v[:, :, sink:],
            tail_origin=state.origins,
            sink=sink,
            mean=None if self.means is None else self.means.of_queries(layer, coefficients),
        )

    def chunk_inputs(self, layer: int, row: int, tail: Tensor, coefficients: Tensor | None) -> kernels.AttentionInputs:
        """What the attention kernels read for a chunk of the sequence in ``row``; for means its queries' coefficients.

        Args:
            tail: Keys and values, ``[2, 1, kv_heads, slots, d]``.
        """
        sink, state = self.shape.sink, self._chunk_state[row]
        full_k, full_v = (part[row : row + 1] for part in self.full(layer))
        return kernels.AttentionInputs(
            pages=self.layer_pages[layer],
            page_table=self._table_of(layer)[row : row + 1],
            rows=state[3:],
            num_packed=state[1:2],
            starts=state[:1],
            sink_k=full_k[:, :, :sink],
            sink_v=full_v[:, :, :sink],
            tail_k=tail[0],
            tail_v=tail[1],
            tail_origin=state[2:3],
            sink=sink,
            mean=None if self.means is None else self.means.of_queries(layer, coefficients),
        )

    # For the table of sequences (``RowStore``)

    def copy_row(self, donor: int, row: int) -> None:
        """Copy all that a row holds: what a sequence that begins like another one needs besides the shared pages."""
        for mine, theirs in zip(self.row_state(row), self.row_state(donor), strict=True):
            mine.copy_(theirs)
        self.page_table[row].copy_(self.page_table[donor])
        for group in self.windows:
            group.copy_table(donor, row)

    def row_parts(self, row: int, length: int, packed: int, *, target: bool = False) -> list[Tensor]:
        """Sinks, the tail, states of recurrent layers, pages that a window sees (see ``RowStore``)."""
        sink = self.shape.sink
        slots = [slice(0, sink)]
        for first in map(self.place, range(sink + PAGE * packed, length, PAGE)):
            slots.append(slice(first, first + PAGE))
        parts = [full[:, :, :, some] for full in self.row_state(row) for some in slots]
        if self.states is not None:
            parts += self.states.of(row, 0 if target else length)
        for group in self.windows:
            seen = slice(group.shape.first_seen(length, sink), packed)
            parts += [group.pages[page] for page in group.pool.held[row][seen]]
        return parts

    def enter_row(self, row: int) -> None:
        """Write the ids of a row's pages to the page tables."""
        self.enter_pages(row, 0, self.table.pool.held[row])
        for group in self.windows:
            self.enter_pages(row, 0, [max(0, page) for page in group.pool.held[row]], group)


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
        #: Position and place of the snapshot of recurrent states that is taken on the way.
        self.snapshot: tuple[int, int] | None = None
        if states is not None:
            assert states.stands(self.row, self.start)
            self.snapshot = states.plan(self.row, self.start, self.end)
            states.writing(self.row)
        assert 0 < self.count <= s.chunk and self.end <= s.context
        self.to_sink = min(self.count, max(0, s.sink - self.start))
        origin = PAGE * sequence.packed
        self.old_tail = max(0, self.start - s.sink - origin)
        tail = self.old_tail + self.count - self.to_sink
        self.new_pages = max(0, (tail - s.window) // PAGE)
        first = sequence.packed
        sequence.mark(self.start)  # a turn may have ended here
        page_ids = sequence.take_pages(self.new_pages, None if self.reads_its_pages else self.end)
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
        self.snapshot = self.arena.states.plan_for(self.row, self.start, min(length, self.end), self.snapshot)
        return marked and self.snapshot is not None and length - self.snapshot[0] < PAGE

    def commit(self) -> None:
        """All layers are written: the chunk's tokens now belong to the sequence."""
        self.sequence.mark(self.end)
        self.sequence.advance(self.start, self.ids, self.new_pages)
        if self.arena.states is not None:
            self.arena.states.keep(self.row, self.snapshot)
