"""Keys and values of one layer of a batch of equally long texts, in an arena of the engine that grows.

Libraries that run a model layer by layer hand over the keys and values of a layer for the whole batch at once. Each
layer has an arena here, whose rows are the texts; where a token lives in it says ``engine.arena``. What came in the
call at hand is read as it was given; it is coded for the calls that follow.
"""

import copy
import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octo_run import kernels
from octo_run.engine.arena import PAGE, ArenaShape, KVArena
from octo_run.engine.step import StepState, length_bound
from octo_run.errors import OctoError
from octo_run.kernels import AttentionInputs, AttentionSpec
from octo_run.kernels.codec import Codec, KVFormat, LayerFormats, PlainCodec
from octo_run.kernels.codec.rotation import HEAD_DIMS
from octo_run.models.config import KVHeads

#: Vectors coded at a time: bounds what coding a long prompt takes.
_CODED_AT_ONCE = 1 << 18
#: A spare share of the pages, so that a growing arena is seldom copied.
_SPARE = 8
#: Query heads of a KV head that a decode kernel is given at most when several queries see all keys.
_FOLDED = 16
#: A length that no text reaches.
_NO_CONTEXT = 1 << 40


class GrowingArena(KVArena):
    """An arena of one layer whose pages, and rows, follow what is stored."""

    @classmethod
    def make(
        cls, fmt: KVFormat, rows: int, kv_heads: int, dtype: torch.dtype, device: torch.device, sinks: int, window: int
    ) -> "GrowingArena":
        """An arena without pages."""
        formats = LayerFormats.uniform(fmt, 1)
        shape = ArenaShape(
            (KVHeads(kv_heads, fmt.k.head_dim),), kv_heads * formats.vector_bytes, dtype, context=sinks + window + PAGE,
            sink=sinks, window=window, chunk=0, sequences=rows, on_gpu=device.type == "cuda", pool_pages=0,
        )  # fmt: skip
        return cls(shape, formats, device)

    @property
    def stored(self) -> Tensor:
        """Sinks and ring, K and V: ``[2, rows, kv_heads, sink + ring, d]``."""
        return self._full[0][:, 0]

    @property
    def heads(self) -> KVHeads:
        """The layer's keys and values."""
        return self.shape.heads[0]

    def take(self, first: int, count: int) -> Tensor:
        """Give every row ``count`` pages from its page number ``first`` on.

        Returns:
            Their ids, int32 ``[rows * count]``.
        """
        pool, rows = self.table.pool, self.shape.sequences
        missing = rows * count - pool.free
        if missing > 0:
            more = max(missing, len(pool) // _SPARE)
            pool.grow(more)
            self._hold(torch.cat((self.pages, self.pages.new_zeros(more, self.pages.shape[1]))))
        width = self.page_table.shape[1]
        if first + count > width:
            more = max(first + count, 2 * width) - width
            self.page_table = torch.cat((self.page_table, self.page_table.new_zeros(rows, more)), 1)
        ids = self.page_table[:, first : first + count]
        self.upload([pool.take(row, count) for row in range(rows)], ids)
        return ids.reshape(-1).contiguous()  # a column of the table has gaps, which kernels do not look for

    def _hold(self, pages: Tensor) -> None:
        """Have these pages."""
        self.pages, self.shape = pages, replace(self.shape, pool_pages=len(pages))
        self._run_pages = [*self._views()]
        self.layer_pages = [pages for _, run in self._run_pages for pages in run.unbind(1)]

    def keep_pages(self, count: int) -> None:
        """Let every row keep its first ``count`` pages only."""
        for row in range(self.shape.sequences):
            self.table.pool.drop(row, count)

    def drop_first_pages(self, count: int) -> None:
        """Let every row lose its first ``count`` pages; the others move up."""
        self.table.pool.drop_first(count)
        self.page_table = self.page_table.roll(-count, 1)

    def selected(self, rows: list[int]) -> "GrowingArena":
        """An arena whose row r holds what row ``rows[r]`` holds here. Pages are shared; this one is used no more."""
        s, index = self.shape, torch.tensor(rows, dtype=torch.int64, device=self.pages.device)
        kv_heads, device = self.heads.number, self.pages.device
        arena = GrowingArena.make(self.formats[0], len(rows), kv_heads, s.dtype, device, s.sink, s.window)
        arena._hold(self.pages)
        arena.page_table = self.page_table.index_select(0, index)
        arena.table.pool = self.table.pool.rearranged(rows)
        torch.index_select(self._full[0], 2, index, out=arena._full[0])
        return arena

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        parts = (self.pages, self.page_table, *self.full_precision, self._chunk_state, self._coding)
        return sum(part.untyped_storage().nbytes() for part in parts)


class Scratch:
    """What the layers of a cache share: workspaces of attention, and tensors that say how long the texts are."""

    def __init__(self) -> None:
        self._workspaces: dict[torch.device, Tensor] = {}
        self._states: dict[tuple[object, ...], StepState] = {}

    def state(self, arena: KVArena, start: int, packed: int, origin: int) -> StepState:
        """The state of a step in which all rows are alike, made once for the layers that agree in it."""
        rows, device = arena.shape.sequences, arena.pages.device
        key = (device, rows, start, packed, origin)
        if key not in self._states:
            if len(self._states) > 8:  # an earlier step's
                self._states.clear()
            state = StepState(torch.empty(StepState.COLUMNS, rows, dtype=torch.int32, device=device))
            columns = [(start, packed, origin, 0, row, row, 1) for row in range(rows)]
            arena.upload([list(row) for row in zip(*columns, strict=True)], state.whole)
            self._states[key] = state
        return self._states[key]

    def workspace(self, q: Tensor, kv_heads: int) -> Tensor | None:
        """The workspace of a decode step on a GPU, None on a CPU."""
        batch, _, heads, dim = q.shape
        size = kernels.attention_workspace_bytes(batch, heads, kv_heads, dim, q.device) // 4
        if not size:
            return None
        held = self._workspaces.get(q.device)
        if held is None or held.numel() < size:
            held = self._workspaces[q.device] = torch.zeros(size, dtype=torch.float32, device=q.device)
        return held

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        states = sum(state.whole.nbytes for state in self._states.values())
        return states + sum(workspace.nbytes for workspace in self._workspaces.values())


@functools.cache
def _rotation(codec: Codec, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``R.T`` of a codec: rows times it are rotated."""
    return codec.rotation.to(device=device, dtype=dtype).T.contiguous()


def _rotate(codec: Codec, x: Tensor) -> Tensor:
    """Into the codec's basis, in x's dtype, as the decoder of the engine does it."""
    return x if isinstance(codec, PlainCodec) else x @ _rotation(codec, x.dtype, x.device)


def _unrotate(codec: Codec, y: Tensor) -> Tensor:
    """Back from the codec's basis."""
    return y if isinstance(codec, PlainCodec) else y @ _rotation(codec, y.dtype, y.device).T


class BatchPages:
    """The keys and values of a layer, ``[B, kv_heads, length, d]`` each.

    Args:
        kv_heads: Of the layer.
        dtype: The dtype of what comes and goes, and of what is stored in full precision.
        sinks: Tokens at the beginning that stay in full precision.
        window: At least so many of the newest tokens are in full precision.
        scratch: Shared with the other layers.

    Attributes:
        length: Tokens stored.
        dropped: Tokens before them that were let go of.
    """

    def __init__(
        self,
        fmt: KVFormat,
        batch: int,
        kv_heads: int,
        dtype: torch.dtype,
        device: torch.device,
        sinks: int,
        window: int,
        scratch: Scratch,
    ) -> None:
        with torch.inference_mode(False):
            self.arena = GrowingArena.make(fmt, batch, kv_heads, dtype, device, sinks, window)
        self.scratch = scratch
        self.length = self.dropped = self.packed = 0
        #: Counts changes: a view is good for one state alone.
        self.version = 0

    def __deepcopy__(self, memo: dict[int, object]) -> "BatchPages":
        """A copy that shares nothing but what never changes."""
        copied = memo[id(self)] = object.__new__(BatchPages)
        for lasting in (self.arena.formats, self.arena.page_formats):
            memo[id(lasting)] = lasting
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    @property
    def fmt(self) -> KVFormat:
        """The formats of keys and values."""
        return self.arena.formats[0]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the keys, and of the values."""
        s = self.arena.shape
        heads = self.arena.heads
        return s.sequences, heads.number, self.length, heads.size

    @property
    def packed_end(self) -> int:
        """First token that is neither in a sink slot nor in a page."""
        return self.arena.shape.sink + PAGE * self.packed

    def slots(self, first: int, last: int) -> Tensor:
        """The ring's slots of tokens ``first .. last - 1``, counted from the first slot of the sinks."""
        s = self.arena.shape
        tokens = torch.arange(first, last, device=self.arena.pages.device)
        return (tokens + self.dropped - s.sink) % s.ring + s.sink

    @torch.inference_mode(False)
    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor) -> "View":
        """Store new tokens.

        Args:
            k, v: ``[B, kv_heads, T, d]``, T at least 1.

        Returns:
            All tokens, as attention of the new ones is to see them.

        Raises:
            OctoError: Keys or values that overflowed (seen on a CPU alone).
        """
        self.version += 1
        return self._append_one(k, v) if k.shape[2] == 1 else self._append_many(k, v)

    def _append_one(self, k: Tensor, v: Tensor) -> "View":
        s, full = self.arena.shape, self.arena.stored
        if self.length - self.packed_end >= s.ring:
            slot = s.sink + (PAGE * self.packed + self.dropped) % s.ring
            self._code(full[:, :, :, slot : slot + PAGE])
        place = self.length
        if place >= s.sink:
            place = s.sink + (place - s.sink + self.dropped) % s.ring
        for side, codec, new in ((0, self.fmt.k, k), (1, self.fmt.v, v)):
            full[side, :, :, place] = _rotate(codec, new)[:, :, 0]
        self.length += 1
        return self.view((k, v))

    def _append_many(self, k: Tensor, v: Tensor) -> "View":
        s, full = self.arena.shape, self.arena.stored
        start, count = self.length, k.shape[2]
        to_sink = min(count, max(0, s.sink - start))
        old = max(0, start - self.packed_end)
        staged = k.new_empty(2, *k.shape[:2], old + count - to_sink, self.arena.heads.size)
        if old:
            staged[:, :, :, :old] = full.index_select(3, self.slots(self.packed_end, start))
        for side, codec, new in ((0, self.fmt.k, k), (1, self.fmt.v, v)):
            rotated = _rotate(codec, new)
            full[side, :, :, start : start + to_sink] = rotated[:, :, :to_sink]
            staged[side, :, :, old:] = rotated[:, :, to_sink:]
        self.length += count
        view = View(self, self.version, self.length, self.packed, PAGE * self.packed, staged, (k, v))
        coded = PAGE * max(0, (staged.shape[3] - s.window) // PAGE)
        self._code(staged[:, :, :, :coded])
        if self.length > self.packed_end:
            full.index_copy_(3, self.slots(self.packed_end, self.length), staged[:, :, :, coded:])
        return view

    def _code(self, rotated: Tensor) -> None:
        """Code the pages behind the packed ones from ``rotated [2, B, kv_heads, 64 n, d]``."""
        _, batch, kv_heads, tokens, dim = rotated.shape
        at_once = PAGE * max(1, _CODED_AT_ONCE // (2 * batch * kv_heads * PAGE))
        for first in range(0, tokens, at_once):
            part = rotated[:, :, :, first : first + at_once]
            count = part.shape[3] // PAGE
            part = part.reshape(2, batch, kv_heads, count, PAGE, dim).transpose(2, 3)
            part = part.reshape(2, 1, batch * count, kv_heads, PAGE, dim)
            ids = self.arena.take(self.packed, count)
            try:
                self.arena.encode((0,), part[0], part[1], ids)
            except OctoError:
                name = str(part.dtype).removeprefix("torch.")
                raise OctoError(
                    f"The keys or values are not finite in {name}: load the model in another dtype."
                ) from None
            self.packed += count

    def view(self, new: tuple[Tensor, Tensor] | None = None) -> "View":
        """All tokens as they are stored.

        Args:
            new: The newest of them as they were given.
        """
        s = self.arena.shape
        tail = self.arena.stored[:, :, :, s.sink :]
        return View(self, self.version, self.length, self.packed, -self.dropped % s.ring, tail, new)

    def decoded(self, first: int, last: int) -> Tensor:
        """Pages ``first .. last - 1``, in the rotated basis: ``[2, B, kv_heads, 64 (last - first), d]``."""
        arena, s = self.arena, self.arena.shape
        if arena.page_formats[0].layout == "lanes" and arena.heads.size in HEAD_DIMS:
            from octo_run.kernels.attention.general.prefill_launch import unpack_pages
            from octo_run.kernels.devices import on_device_of

            heads = arena.heads
            shape = (2, s.sequences, heads.number, PAGE * (last - first), heads.size)
            slab = torch.empty(shape, dtype=torch.float32, device=arena.pages.device)
            state = self.scratch.state(arena, self.length, last, 0)
            with on_device_of(slab):
                unpack_pages(arena.inputs(0, state, None), self.fmt, slab[0], slab[1], first, last - first)
            return slab.to(s.dtype)
        pages = arena.layer_pages[0][arena.page_table[:, first:last].long()]
        both = torch.stack(arena.page_formats[0].decode_rotated(pages, s.dtype))  # [2, B, pages, kv_heads, 64, d]
        return both.transpose(2, 3).flatten(3, 4)

    @torch.inference_mode(False)
    @torch.no_grad()
    def cut(self, length: int) -> None:
        """Keep the first ``length`` tokens. Those of a page that is cut go back into the ring, as they were coded."""
        self.version += 1
        length, s = min(length, self.length), self.arena.shape
        if length < self.packed_end and self.packed:
            keep = max(0, (length - s.sink) // PAGE)
            rest = length - s.sink - PAGE * keep
            if rest > 0:
                self.arena.stored.index_copy_(
                    3, self.slots(length - rest, length), self.decoded(keep, keep + 1)[:, :, :, :rest]
                )
            self.arena.keep_pages(keep)
            self.packed = keep
        self.length = length

    @torch.inference_mode(False)
    @torch.no_grad()
    def drop_before(self, token: int) -> None:
        """Let go of the pages whose tokens all come before ``token``. There must be no sinks."""
        count = min(self.packed, token // PAGE)
        if count > 0:
            self.version += 1
            self.arena.drop_first_pages(count)
            self.packed -= count
            self.length -= PAGE * count
            self.dropped += PAGE * count

    @torch.inference_mode(False)
    @torch.no_grad()
    def select(self, rows: list[int]) -> None:
        """Make row r hold what row ``rows[r]`` holds now."""
        if rows != list(range(self.arena.shape.sequences)):
            self.version += 1
            self.arena = self.arena.selected(rows)


@dataclass(eq=False)
class View:
    """The tokens of a layer as one call sees them. It is good until the layer changes.

    Attributes:
        length: Tokens.
        packed: Pages that are read.
        origin: The tail's, see ``AttentionInputs``.
        tail: What is read in full precision behind the pages, ``[2, B, kv_heads, slots, d]``, rotated.
        new: The newest tokens as they were given.
    """

    store: BatchPages
    version: int
    length: int
    packed: int
    origin: int
    tail: Tensor
    new: tuple[Tensor, Tensor] | None
    _dense: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the keys, and of the values."""
        batch, kv_heads, _, dim = self.store.shape
        return batch, kv_heads, self.length, dim

    @property
    def old(self) -> int:
        """Tokens that are read from what is stored."""
        return self.length - (0 if self.new is None else self.new[0].shape[2])

    def _check(self) -> None:
        if self.version != self.store.version:
            raise OctoError(
                "Keys and values of an earlier call are read, and the cache has changed since: read them before that."
            )

    @torch.inference_mode(False)
    @torch.no_grad()
    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, kv_heads, length, d]`` as the model has them. Pages are decoded.

        Raises:
            OctoError: The layer has changed.
        """
        if self._dense is None:
            self._check()
            self._dense = self.new if self.new is not None and not self.old else self._decoded(self.old)
        return self._dense

    def _decoded(self, old: int) -> tuple[Tensor, Tensor]:
        """``dense``, the first ``old`` tokens from what is stored."""
        store, s = self.store, self.store.arena.shape
        parts = [store.arena.stored[:, :, :, : min(s.sink, old)]]
        if self.packed:
            parts.append(store.decoded(0, self.packed))
        done = s.sink + PAGE * self.packed
        if old > done:
            tokens = torch.arange(done - s.sink, old - s.sink, device=self.tail.device)
            parts.append(self.tail.index_select(3, (tokens - self.origin) % self.tail.shape[3]))
        k, v = torch.cat(parts, 3)
        k, v = _unrotate(store.fmt.k, k), _unrotate(store.fmt.v, v)
        if self.new is None:
            return k, v
        return torch.cat((k, self.new[0]), 2), torch.cat((v, self.new[1]), 2)

    def hindrance(self, heads: int, queries: int, causal: bool) -> str | None:
        """Why ``attend`` cannot be called for so many queries of so many heads; None if it can."""
        store, s = self.store, self.store.arena.shape
        folded = queries > 1 and not causal
        start = self.length - (1 if folded else queries)
        if start < 0 or (self.packed and s.sink + PAGE * self.packed > start):
            return "queries at positions that are coded already"
        if folded and heads // store.arena.heads.number * queries > _FOLDED:
            return "several queries that see later keys"
        on_gpu = store.arena.pages.is_cuda
        if on_gpu and store.arena.heads.size not in HEAD_DIMS:
            return f"heads of {store.arena.heads.size} numbers"
        if on_gpu and s.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return str(s.dtype).removeprefix("torch.")
        return None

    @torch.inference_mode(False)
    @torch.no_grad()
    def attend(self, q: Tensor, scale: float, causal: bool = True) -> Tensor:
        """Attention over pages as they are.

        Args:
            q: Queries ``[B, heads, C, d]``. If ``causal``, they are the last C tokens, and each sees itself and what is
                before it; else each sees all tokens.

        Returns:
            ``[B, C, heads, d]``.

        Raises:
            OctoError: The layer has changed.
        """
        self._check()
        batch, heads, queries, dim = q.shape
        store = self.store
        folded = queries > 1 and not causal
        q = q.reshape(batch, 1, heads * queries, dim) if folded else q.transpose(1, 2)
        q = _rotate(store.fmt.k, q).contiguous()
        count = q.shape[1]
        inputs = self._inputs(self.length - count)
        out = kernels.attend(
            q, inputs, store.fmt, spec=AttentionSpec(scale),
            max_length=length_bound(self.length, _NO_CONTEXT) if count == 1 else self.length,
            workspace=store.scratch.workspace(q, store.arena.heads.number) if count == 1 else None,
        )  # fmt: skip
        out = _unrotate(store.fmt.v, out)
        return out.view(batch, heads, queries, dim).transpose(1, 2) if folded else out

    def _inputs(self, start: int) -> AttentionInputs:
        """What the kernels read for queries from position ``start`` on."""
        store = self.store
        state = store.scratch.state(store.arena, start, self.packed, self.origin)
        inputs = store.arena.inputs(0, state, None)
        if not self.tail.shape[3]:  # all are sinks: the ring is not read
            return inputs
        return replace(inputs, tail_k=self.tail[0], tail_v=self.tail[1])
