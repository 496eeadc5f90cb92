"""The KV arena: one preallocated store for all layers and sequences, packed pages plus full-precision sinks and
windows.

Where a token at position ``j`` of a sequence of ``n`` tokens with ``P`` packed pages lives:

- ``j < sink``: in its own full-precision sink slot (attention sinks ruin quantizers);
- ``sink <= j < sink + 64 P``: row ``(j - sink) % 64`` of packed page ``page_table[seq, (j - sink) // 64]``;
- the rest, the *tail*: slot ``(j - sink) % ring`` of a full-precision ring of ``window + 64`` tokens.

A full ring's oldest 64 tokens are coded into a page before the next token is written, so at least ``window`` of the
last tokens are in full precision. (After a cut there may be fewer, until new ones have come: what is coded stays
coded.) Keys and queries are stored in the codec's rotated basis, values too (see ``models.decoder``).

An exception, Ctrl-C's included, may strike between any two statements here. Whatever it leaves half done, the next
``truncate`` puts right, and every prompt begins with one.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from octo_run import kernels
from octo_run.errors import OctoError, UsageError
from octo_run.kernels.attention.key_mean import HALF_OFFSETS, lane_table_bytes, page_centres
from octo_run.kernels.codec import KVFormat

if TYPE_CHECKING:
    from octo_run.engine.key_means import KeyMeans

PAGE = kernels.PAGE_TOKENS


def length_bound(length: int, context: int) -> int:
    """The bound on lengths that decode attention is launched with: a power of two from 1,024 on, at most ``context``.

    The division of the work follows from it alone, so that one recorded step serves all lengths up to it.
    """
    return min(context, max(1024, 1 << (length - 1).bit_length()))


@dataclass(frozen=True)
class ArenaShape:
    """What decides the bytes of an arena; ``dtype`` is the full-precision one, ``context`` in tokens a sequence,
    ``mean_heads`` the number of query heads if key means are kept out of the codes (``key_means``), else 0, ``on_gpu``
    whether they are for a GPU."""

    layers: int
    kv_heads: int
    head_dim: int
    k_bytes: int
    v_bytes: int
    dtype: torch.dtype
    context: int
    sink: int = 64
    window: int = 64
    chunk: int = 512
    sequences: int = 1
    mean_heads: int = 0
    on_gpu: bool = False

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
    def page_bytes(self) -> int:
        """Bytes of a page for one layer and KV head: 64 rows of K, then 64 rows of V."""
        return PAGE * (self.k_bytes + self.v_bytes)

    @property
    def packed_token_bytes(self) -> int:
        """Bytes that one packed token takes over all layers and KV heads."""
        return self.layers * self.kv_heads * (self.k_bytes + self.v_bytes)

    @property
    def packed_bytes(self) -> int:
        """Bytes of all packed pages."""
        return self.sequences * self.max_pages * self.layers * self.kv_heads * self.page_bytes

    @property
    def index_bytes(self) -> int:
        """Bytes of page table, per-step state and row numbers."""
        return self.sequences * (4 * max(1, self.max_pages) + 4 * 4 + 8)

    @property
    def mean_page_bytes(self) -> int:
        """Bytes that one more page of context takes for the key means' angles."""
        if not self.mean_heads:
            return 0
        return 4 * self.head_dim + self._lane_tables[0]

    @property
    def _lane_tables(self) -> tuple[int, int]:
        """Bytes of the angles as the table-decode kernel reads them: for each page, and beside."""
        if not self.on_gpu:
            return 0, 0
        return lane_table_bytes(self.head_dim, page_centres(self.mean_heads // self.kv_heads, self.head_dim))

    @property
    def mean_queries(self) -> int:
        """Queries whose coefficients are kept at a time: on a GPU only a step's, for prefill needs none."""
        return self.sequences if self.on_gpu else max(self.chunk, self.sequences)

    @property
    def mean_bytes(self) -> int:
        """Bytes of the key means, their angles, the coefficients of queries and the pages on their way to the code."""
        if not self.mean_heads:
            return 0
        d, pages = self.head_dim, max(self.layers, (self.ring + self.chunk) // PAGE)
        numbers = d * d + (PAGE + HALF_OFFSETS) * d + self.layers * self.sequences * self.kv_heads * d
        numbers += self.mean_queries * self.mean_heads * d
        rows = pages * self.kv_heads * PAGE * d * self.dtype.itemsize
        return 4 * numbers + self._lane_tables[1] + rows + max(1, self.max_pages) * self.mean_page_bytes

    @property
    def full_precision_bytes(self) -> int:
        """Bytes of sinks and rings (all layers) and of the prefill staging buffer (one layer), K and V."""
        vector = 2 * self.kv_heads * self.head_dim * self.dtype.itemsize
        return vector * (self.layers * self.sequences * (self.sink + self.ring) + self.ring + self.chunk)


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Bytes, all 0. On a CPU the system gives them when they are written: a long context takes no time and no memory
    before it is used."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(math.prod(shape), np.uint8)).view(shape)
    return torch.zeros(shape, dtype=torch.uint8, device=device)


class KVArena:
    """Allocates everything of ``shape`` on ``device`` once; afterwards only writes into it."""

    def __init__(self, shape: ArenaShape, fmt: KVFormat, device: torch.device, means: "KeyMeans | None" = None) -> None:
        self.shape, self.fmt, self.means = shape, fmt, means
        s = shape
        self.pages = _zeros((s.sequences * s.max_pages, s.layers, s.kv_heads, s.page_bytes), device)
        if device.type == "cuda":
            kernels.prepare(fmt, self.pages.device)  # with its number, by which kernels look for what they keep
        full = (s.layers, s.sequences, s.kv_heads, s.sink + s.ring, s.head_dim)
        self._full_k = torch.zeros(full, dtype=s.dtype, device=device)
        self._full_v = torch.zeros(full, dtype=s.dtype, device=device)
        staging = (1, s.kv_heads, s.ring + s.chunk, s.head_dim)
        self._staging_k = torch.zeros(staging, dtype=s.dtype, device=device)
        self._staging_v = torch.zeros(staging, dtype=s.dtype, device=device)
        self.page_table = torch.zeros(s.sequences, max(1, s.max_pages), dtype=torch.int32, device=device)
        # Rows: first query position, packed pages, tail origin, slot of the new token; one column a sequence.
        self.state = torch.zeros(4, s.sequences, dtype=torch.int32, device=device)
        self._state_host = torch.zeros(4, s.sequences, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._state_copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._rows = torch.arange(s.sequences, device=device)
        self._page_ids: list[list[int]] = [[] for _ in range(s.sequences)]
        self.length = [0] * s.sequences
        self._free = self._unused_pages()

    def _unused_pages(self) -> list[int]:
        """Page ids that no sequence holds, the lowest last (it is the next one taken)."""
        used = set[int]().union(*self._page_ids)
        return [page for page in range(self.pages.shape[0] - 1, -1, -1) if page not in used]

    def packed(self, seq: int) -> int:
        """Packed pages of a sequence."""
        return len(self._page_ids[seq])

    def packed_end(self, seq: int) -> int:
        """First position that is neither in a sink slot nor in a packed page."""
        return self.shape.sink + PAGE * self.packed(seq)

    def page_ids(self, seq: int) -> list[int]:
        """The sequence's page ids in order of position."""
        return list(self._page_ids[seq])

    def truncate(self, seq: int, length: int) -> int:
        """Forget positions from ``length`` on; returns how many tokens remain.

        A cut inside packed pages leaves no full-precision tail, so it falls back to the page's first position.
        """
        length, keep = min(length, self.length[seq]), self.packed(seq)
        if length < self.packed_end(seq):
            keep = min(keep, max(0, (length - self.shape.sink) // PAGE))
            length = min(length, self.shape.sink + PAGE * keep)
        self.length[seq] = length
        del self._page_ids[seq][keep:]
        self._free = self._unused_pages()
        return length

    def prefill(self, seq: int, count: int) -> "Prefill":
        """Open the way for ``count`` (at most ``chunk``) new tokens of one sequence."""
        return Prefill(self, seq, count)

    def decode(self, batch: int) -> "Decode":
        """Open the way for one new token in each of the first ``batch`` sequences."""
        return Decode(self, batch)

    def take_pages(self, seq: int, count: int) -> list[int]:
        """``count`` free page ids, entered in the sequence's table. They count as packed from ``add_pages`` on; without
        it the next ``truncate`` finds them free again."""
        ids = [self._free.pop() for _ in range(count)]
        places = self.page_places(seq, count)
        if count == 1:
            places.fill_(ids[0])
        elif ids:
            host = torch.tensor(ids, dtype=torch.int32)
            places.copy_(host.pin_memory() if places.is_cuda else host, non_blocking=True)
        return ids

    def page_places(self, seq: int, count: int) -> Tensor:
        """The ids of the sequence's next ``count`` pages where they stand on the device: int32 ``[count]``."""
        return self.page_table[seq, self.packed(seq) : self.packed(seq) + count]

    def add_pages(self, seq: int, ids: list[int]) -> None:
        """Count pages that have been written as packed."""
        self._page_ids[seq] += ids

    def encode(self, k: Tensor, v: Tensor, pages: Tensor, ids: Tensor) -> None:
        """``kernels.encode_pages`` in the arena's format; ``OctoError`` for keys or values that overflowed."""
        try:
            kernels.encode_pages(k, v, pages, ids, self.fmt)
        except ValueError:
            if bool(k.isfinite().all()) and bool(v.isfinite().all()):
                raise
            raise OctoError(
                f"The keys or values are not finite in {str(k.dtype).removeprefix('torch.')}: choose another --dtype."
            ) from None

    def ring_is_full(self, seq: int) -> bool:
        """Whether a page must be coded before the next token is written."""
        return self.length[seq] - self.packed_end(seq) >= self.shape.ring

    def oldest_slot(self, seq: int) -> int:
        """First slot of the ring's oldest page."""
        return self.shape.sink + (PAGE * self.packed(seq)) % self.shape.ring

    def code_slots(self, seq: int, slot: int, ids: Tensor) -> None:
        """Code the page that begins in ``slot``, for all layers in one call. Waits for nothing, so it can be captured.

        ``ids`` is int32 [1] on the device; the page's number is the sequence's number of packed pages on the device.
        """
        k = self._full_k[:, seq : seq + 1, :, slot : slot + PAGE]
        v = self._full_v[:, seq : seq + 1, :, slot : slot + PAGE]
        if self.means is not None:
            k = self.means.take_out(k, 0, seq, self.state[1, seq : seq + 1])
        self.encode(k, v, self.pages, ids)

    def learn_means(self, seq: int, slot: int) -> None:
        """If the page in ``slot`` is the sequence's first, take the means of all layers from its keys."""
        if self.means is not None and not self.packed(seq):
            for layer in range(self.shape.layers):
                self.means.learn(layer, seq, self._full_k[layer, seq, :, slot : slot + PAGE])

    def flush(self, seq: int) -> None:
        """Code the ring's oldest page if the ring is full."""
        if not self.ring_is_full(seq):
            return
        places = self.page_places(seq, 1)
        ids = self.take_pages(seq, 1)
        slot = self.oldest_slot(seq)
        self.learn_means(seq, slot)
        self.state[1, seq] = self.packed(seq)
        self.code_slots(seq, slot, places)
        self.add_pages(seq, ids)

    def fill(self, seq: int, length: int, seed: int = 0) -> None:
        """Make the sequence hold ``length`` tokens of Gaussian keys and values, to measure at a depth.

        Eight pages are coded; the others are copies of them. Raises ``UsageError`` for more than the context.
        """
        s = self.shape
        if not 0 <= length <= s.context:
            raise UsageError(f"The depth is {length:,} tokens; give 0 to {s.context:,}, the context.")
        self.truncate(seq, 0)
        generator = torch.Generator(self.pages.device).manual_seed(seed)
        count = max(0, (length - s.sink - s.window) // PAGE)
        places = self.page_places(seq, count)
        ids = self.take_pages(seq, count)
        for i in range(min(count, 8)):
            for full in (self._full_k, self._full_v):
                full[:, seq].normal_(generator=generator)
            self.state[1, seq] = i
            self.code_slots(seq, s.sink, places[i : i + 1])
        for i in range(8, count):
            self.pages[ids[i]].copy_(self.pages[ids[i % 8]])
        for full in (self._full_k, self._full_v):
            full[:, seq].normal_(generator=generator)
        self.add_pages(seq, ids)
        self.length[seq] = length

    def set_state(self, first: int, columns: list[tuple[int, int, int, int]]) -> None:
        """Write the device's (start, packed, tail origin, slot) of consecutive sequences in one copy."""
        last = first + len(columns)
        if self._state_copied is not None:
            self._state_copied.synchronize()  # the previous step's copy may still have to read the host's buffer
        self._state_host[:, first:last] = torch.tensor(columns, dtype=torch.int32).T
        self.state[:, first:last].copy_(self._state_host[:, first:last], non_blocking=True)
        if self._state_copied is not None:
            self._state_copied.record(torch.cuda.current_stream(self.state.device))

    def decode_state(self, seq: int) -> tuple[int, int, int, int]:
        """What ``set_state`` takes for one more token of the sequence."""
        s, n = self.shape, self.length[seq]
        return n, self.packed(seq), 0, n if n < s.sink else s.sink + (n - s.sink) % s.ring

    def full(self, layer: int, batch: int) -> tuple[Tensor, Tensor]:
        """Full-precision K and V of a layer in the first ``batch`` sequences: ``[batch, kv_heads, sink + ring, d]``."""
        return self._full_k[layer, :batch], self._full_v[layer, :batch]

    def inputs(
        self, layer: int, first: int, last: int, tail: tuple[Tensor, Tensor], q: Tensor
    ) -> kernels.AttentionInputs:
        """What the attention kernels read for ``layer`` of the sequences ``first .. last - 1`` and their queries
        ``q``."""
        sink = self.shape.sink
        return kernels.AttentionInputs(
            pages=self.pages[:, layer],
            page_table=self.page_table[first:last],
            num_packed=self.state[1, first:last],
            starts=self.state[0, first:last],
            sink_k=self._full_k[layer, first:last, :, :sink],
            sink_v=self._full_v[layer, first:last, :, :sink],
            tail_k=tail[0],
            tail_v=tail[1],
            tail_origin=self.state[2, first:last],
            sink=sink,
            mean=None if self.means is None else self.means.of_queries(layer, first, q),
        )


class Prefill:
    """One chunk of one sequence on its way through the layers. ``commit`` makes it count; ``abort`` undoes it."""

    def __init__(self, arena: KVArena, seq: int, count: int) -> None:
        s = arena.shape
        self.arena, self.seq, self.count = arena, seq, count
        self.start = arena.length[seq]
        self.end = self.start + count
        assert 0 < count <= s.chunk and self.end <= s.context
        self.to_sink = min(count, max(0, s.sink - self.start))
        origin = PAGE * arena.packed(seq)
        self.old_tail = max(0, self.start - s.sink - origin)
        tail = self.old_tail + count - self.to_sink
        new_pages = max(0, (tail - s.window) // PAGE)
        self._ids = arena.page_places(seq, new_pages)
        self.page_ids = arena.take_pages(seq, new_pages)
        device = arena.pages.device
        slots = torch.arange(origin, origin + tail, device=device) % s.ring + s.sink
        self._old_slots, self._left_slots = slots[: self.old_tail], slots[new_pages * PAGE :]
        self._coded, self._tail = new_pages * PAGE, tail
        arena.set_state(seq, [(self.start, arena.packed(seq), origin, 0)])

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        workspace: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Store the chunk's ``k, v [1, C, kv_heads, d]`` and return the attention of ``q [1, C, heads, d]``."""
        a = self.arena
        parts = ((a._full_k, a._staging_k, k), (a._full_v, a._staging_v, v))
        for full, staging, new in parts:
            store, rows = full[layer, self.seq], new[0].transpose(0, 1)
            store[:, self.start : self.start + self.to_sink] = rows[:, : self.to_sink]
            staging[0, :, : self.old_tail] = store.index_select(1, self._old_slots)
            staging[0, :, self.old_tail : self._tail] = rows[:, self.to_sink :]
        inputs = a.inputs(layer, self.seq, self.seq + 1, (a._staging_k, a._staging_v), q)
        out = kernels.attend(q, inputs, a.fmt, scale=scale, max_length=self.end, workspace=workspace, out=out)
        if self._coded:
            k_pages, v_pages = (
                x[:, :, : self._coded].view(1, x.shape[1], -1, PAGE, x.shape[3]).transpose(1, 2)
                for x in (a._staging_k, a._staging_v)
            )
            if a.means is not None:
                if not a.packed(self.seq):
                    a.means.learn(layer, self.seq, k_pages[0, 0])
                k_pages = a.means.take_out(k_pages, layer, self.seq, a.state[1, self.seq : self.seq + 1])
            a.encode(k_pages, v_pages, a.pages[:, layer : layer + 1], self._ids)
        for full, staging, _ in parts:
            full[layer, self.seq].index_copy_(1, self._left_slots, staging[0, :, self._coded : self._tail])
        return out

    def commit(self) -> None:
        """All layers are written: the chunk's tokens now belong to the sequence."""
        self.arena.add_pages(self.seq, self.page_ids)
        self.arena.length[self.seq] = self.end

    def abort(self) -> None:
        """The forward pass did not finish: the sequence is what it was, less a tail that the chunk may have spoilt."""
        intact = self.arena.packed_end(self.seq) if self.page_ids else self.start
        self.arena.truncate(self.seq, min(self.start, intact))


class Decode:
    """One new token in each of the first ``batch`` sequences, on its way through the layers."""

    def __init__(self, arena: KVArena, batch: int) -> None:
        self.arena, self.batch = arena, batch
        self.starts = arena.length[:batch]
        for seq in range(batch):
            arena.flush(seq)
            assert arena.length[seq] < arena.shape.context
        arena.set_state(0, [arena.decode_state(seq) for seq in range(batch)])
        self.max_length = length_bound(max(arena.length[:batch]) + 1, arena.shape.context)
        self._slots = arena.state[3, :batch].to(torch.int64)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, workspace: Tensor | None) -> Tensor:
        """Store ``k, v [B, 1, kv_heads, d]`` and return the attention of ``q [B, 1, heads, d]``."""
        a, sink = self.arena, self.arena.shape.sink
        full_k, full_v = a.full(layer, self.batch)
        rows = a._rows[: self.batch]
        full_k[rows, :, self._slots] = k[:, 0]
        full_v[rows, :, self._slots] = v[:, 0]
        inputs = a.inputs(layer, 0, self.batch, (full_k[:, :, sink:], full_v[:, :, sink:]), q)
        return kernels.attend(q, inputs, a.fmt, scale=scale, max_length=self.max_length, workspace=workspace)

    def commit(self) -> None:
        """All layers are written: the new tokens now belong to their sequences."""
        for seq in range(self.batch):
            self.arena.length[seq] += 1

    def abort(self) -> None:
        """The step did not finish: the sequences are what they were (what it wrote lies beyond their ends)."""
        for seq, start in enumerate(self.starts):
            self.arena.truncate(seq, start)
