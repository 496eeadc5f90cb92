"""The tensors of an arena, and where a sequence's tokens lie in them."""

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Iterator
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from octo_run import kernels
from octo_run.engine.arena.chunk import Chunk
from octo_run.engine.arena.shape import PAGE, ArenaShape
from octo_run.engine.pool import GONE
from octo_run.engine.recurrent_state import RecurrentStates
from octo_run.engine.sequence import Sequence, SequenceTable
from octo_run.engine.window_pages import WindowPages, WindowShape
from octo_run.errors import OctoError, UsageError
from octo_run.kernels.codec import LayerFormats, PageFormat
from octo_run.kernels.codec.layer_formats import LayerRun

if TYPE_CHECKING:
    from octo_run.engine.key_means import KeyMeans
    from octo_run.engine.step import StepState

#: Does a piece of work, which is the same for one key: at once, or from a recording.
Run = Callable[[Hashable, Callable[[], None]], None]


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

    @property
    def takes_snapshots(self) -> bool:
        """Whether there are layers that cannot go back to any length at all times."""
        return self.states is not None or bool(self.windows)

    @torch.inference_mode()
    def open(self, ids: list[int] | None = None, shared: Iterable[int] = ()) -> Sequence:
        """A sequence that holds as much of the beginning of ``ids`` as the arena has (see ``SequenceTable.open``)."""
        return self.table.open(ids, shared)

    def upload(self, values: list[Any], into: Tensor) -> None:
        """Copy numbers into a tensor of the device, without waiting for it."""
        host = torch.tensor(values, dtype=into.dtype)
        into.copy_(host.pin_memory() if into.is_cuda else host, non_blocking=True)

    @torch.inference_mode()
    def prefill(self, sequence: Sequence, ids: list[int]) -> Chunk:
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
        parts = [full[:, :, :, some] for some in slots for full in self.row_state(row)]
        if self.states is not None:
            parts += self.states.of(row, 0 if target else length)
        for group in self.windows:
            seen = slice(group.shape.first_seen(length, sink), packed)
            parts += [group.pages[page] for page in group.pool.held[row][seen]]
        return parts

    def sinks(self, row: int) -> list[Tensor]:
        """The sinks of a row, for each kind of layers."""
        return [full[:, :, :, : self.shape.sink] for full in self.row_state(row)]

    def enter_row(self, row: int) -> None:
        """Write the ids of a row's pages to the page tables."""
        self.enter_pages(row, 0, self.table.pool.held[row])
        for group in self.windows:
            self.enter_pages(row, 0, [max(0, page) for page in group.pool.held[row]], group)
