"""The KV arena by itself: every cut, every edge, interrupted steps, page accounting, the bytes of pages."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from octo_run import kernels
from octo_run.engine.arena import PAGE, ArenaShape, KVArena
from octo_run.engine.pool import PagePool, PoolExhausted
from octo_run.engine.step import StepState
from octo_run.errors import OctoError, UsageError
from octo_run.kernels import AttentionSpec
from octo_run.kernels.codec import LayerFormats, PageFormat, parse_kv
from octo_run.models.config import KVHeads

HEADS, KV_HEADS, DIM, LAYERS = 6, 2, 64, 2
CPU = torch.device("cpu")


def parsed(kv: str) -> LayerFormats:
    """The formats of the layers: one, or one for each layer with slashes between."""
    layers = [parse_kv(part, DIM, plain_dtype=torch.float32) for part in kv.split("/")]
    return LayerFormats(kv, tuple(layers) if len(layers) > 1 else tuple(layers) * LAYERS)


def new_arena(kv: str = "bf16", **changes: Any) -> KVArena:
    formats = parsed(kv)
    values: dict[str, Any] = {"context": 600, "chunk": 512} | changes
    shape = ArenaShape((KVHeads(KV_HEADS, DIM),) * LAYERS, KV_HEADS * formats.vector_bytes, torch.float32, **values)
    return KVArena(shape, formats, CPU)


def vectors(layer: int, seed: int, start: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query [count, HEADS, d], key and value [count, KV_HEADS, d] of tokens that depend on position, layer and seed."""
    parts = []
    for position in range(start, start + count):
        generator = torch.Generator().manual_seed(position * 1000 + layer * 100 + seed)
        parts.append(torch.randn(HEADS + 2 * KV_HEADS, DIM, generator=generator))
    q, k, v = torch.stack(parts).split([HEADS, KV_HEADS, KV_HEADS], dim=1)  # type: ignore[no-untyped-call]
    return q, k, v


class Boom(Exception):
    pass


SPEC = AttentionSpec(DIM**-0.5)


class Sequences:
    """Several sequences with an arena beside a plain list of their keys and values."""

    def __init__(self, arena: KVArena, tolerance: float = 1e-5) -> None:
        self.arena, self.tolerance = arena, tolerance
        self.held = [arena.open() for _ in range(arena.shape.sequences)]
        self.state = StepState(torch.zeros(StepState.COLUMNS, arena.shape.sequences, dtype=torch.int32))
        empty = torch.zeros(LAYERS, 0, KV_HEADS, DIM)
        self.k = [empty for _ in range(arena.shape.sequences)]
        self.v = list(self.k)

    def length(self, seq: int) -> int:
        return self.k[seq].shape[1]

    def check(self, out: Tensor, seq: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """``out [C, HEADS, d]`` is the attention of ``q`` over what is remembered and the new ``k, v``, in float64."""
        keys = torch.cat((self.k[seq][layer], k)).double().repeat_interleave(HEADS // KV_HEADS, 1)
        values = torch.cat((self.v[seq][layer], v)).double().repeat_interleave(HEADS // KV_HEADS, 1)
        scores = torch.einsum("chd,nhd->hcn", q.double(), keys) * DIM**-0.5
        n, count = keys.shape[0], q.shape[0]
        visible = torch.arange(n)[None] <= torch.arange(n - count, n)[:, None]
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        error = (out.double() - torch.einsum("hcn,nhd->chd", weights, values)).abs().max()
        assert error < self.tolerance, f"layer {layer}, {n} tokens: off by {error}"

    def prefill(self, seq: int, count: int, seed: int, fail_after: int | None = None) -> None:
        start = self.length(seq)
        chunk = self.arena.prefill(self.held[seq], [seed] * count)
        new = [vectors(layer, seed, start, count) for layer in range(LAYERS)]
        try:
            for layer, (q, k, v) in enumerate(new):
                if layer == fail_after:
                    raise Boom
                out = chunk.attend(layer, q[None], torch.stack((k, v)), SPEC, None)
                self.check(out[0], seq, layer, q, k, v)
            if fail_after == LAYERS:
                raise Boom
        except Boom:
            self.forget(seq, len(self.held[seq]))
            return
        chunk.commit()
        self.remember(seq, new)

    def decode(self, batch: int, seed: int, fail_after: int | None = None) -> None:
        """A token for each of ``batch`` sequences, the last one first, and a filler behind them."""
        members = list(reversed(range(batch)))
        for seq in members:
            if self.arena.ring_is_full(self.held[seq]):
                self.arena.code_oldest(self.held[seq])
        self.state.upload(self.arena, [self.held[seq] for seq in members], self.arena.shape.sequences)
        state = self.state.first(batch)
        new = [[vectors(layer, seed + s, self.length(s), 1) for layer in range(LAYERS)] for s in members]
        for layer in range(LAYERS):
            if layer == fail_after:
                return
            q, k, v = (torch.stack([parts[layer][part] for parts in new]) for part in range(3))
            for full, vector in zip(self.arena.full(layer), (k, v), strict=True):
                full[state.rows.long(), :, state.places.long()] = vector[:, 0]
            inputs = self.arena.inputs(layer, state, q)
            out = kernels.attend(q, inputs, self.arena.formats[layer], spec=SPEC, max_length=self.arena.shape.context)
            for at, s in enumerate(members):
                self.check(out[at], s, layer, *new[at][layer])
        for at, s in enumerate(members):
            self.held[s].following = seed
            self.held[s].launched()
            self.remember(s, new[at])

    def remember(self, seq: int, new: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        self.k[seq] = torch.cat((self.k[seq], torch.stack([k for _, k, _ in new])), 1)
        self.v[seq] = torch.cat((self.v[seq], torch.stack([v for _, _, v in new])), 1)

    def forget(self, seq: int, length: int) -> None:
        self.k[seq], self.v[seq] = self.k[seq][:, :length], self.v[seq][:, :length]

    def truncate(self, seq: int, length: int) -> None:
        sequence, before = self.held[seq], self.length(seq)
        edge, kept, want, s = sequence.packed_end, sequence.cut(length), min(length, before), self.arena.shape
        if want >= edge or want <= s.sink:
            assert kept == want
        else:
            assert kept == s.sink + (want - s.sink) // PAGE * PAGE
        self.forget(seq, kept)

    def account(self) -> None:
        """No page lost, none in two places; no more tail than the ring holds; lengths as remembered."""
        arena, pool = self.arena, self.arena.table.pool
        assert pool.free == len(pool) - sum(map(len, pool.held))
        held = [page for pages in pool.held for page in pages]
        assert len(set(held)) == len(held)
        for seq, sequence in enumerate(self.held):
            length = len(sequence)
            assert length == self.length(seq) == len(sequence.ids) <= arena.shape.context
            assert sequence.packed == 0 or length >= sequence.packed_end
            assert length - sequence.packed_end <= arena.shape.ring
            assert arena.page_table[sequence.row, : sequence.packed].tolist() == sequence.page_ids


class ArenaMachine(RuleBasedStateMachine):
    """Random prefills, decodes, cuts and failures of two sequences; attention is checked at every step."""

    @initialize(
        sink=st.sampled_from([0, 5, 64]), window=st.sampled_from([0, 64, 128]), context=st.sampled_from([70, 300, 450])
    )
    def start(self, sink: int, window: int, context: int) -> None:
        self.all = Sequences(new_arena(sink=sink, window=window, context=context, chunk=150, sequences=2))

    def room(self, seq: int) -> int:
        return self.all.arena.shape.context - self.all.length(seq)

    @rule(seq=st.integers(0, 1), count=st.integers(1, 150), seed=st.integers(0, 9))
    def prefill(self, seq: int, count: int, seed: int) -> None:
        if self.room(seq):
            self.all.prefill(seq, min(count, self.room(seq)), seed)

    @rule(seq=st.integers(0, 1), count=st.integers(1, 150), layers=st.integers(0, LAYERS))
    def fail_to_prefill(self, seq: int, count: int, layers: int) -> None:
        if self.room(seq):
            self.all.prefill(seq, min(count, self.room(seq)), 77, fail_after=layers)

    @precondition(lambda self: self.room(0) and self.room(1))
    @rule(batch=st.integers(1, 2), seed=st.integers(0, 9), times=st.sampled_from([1, 2, 3, 70]))
    def decode(self, batch: int, seed: int, times: int) -> None:
        for _ in range(min(times, self.room(0), self.room(1))):
            self.all.decode(batch, seed)

    @precondition(lambda self: self.room(0) and self.room(1))
    @rule(batch=st.integers(1, 2), layers=st.integers(0, LAYERS - 1))
    def fail_to_decode(self, batch: int, layers: int) -> None:
        self.all.decode(batch, 55, fail_after=layers)

    @rule(seq=st.integers(0, 1), length=st.integers(0, 460))
    def truncate(self, seq: int, length: int) -> None:
        self.all.truncate(seq, length)

    @rule(seq=st.integers(0, 1))
    def lose_pages(self, seq: int) -> None:
        """Pages were taken and the step that wanted them never came to its end, nor to its clean-up."""
        self.all.held[seq].take_pages(min(1, self.all.arena.table.pool.free))
        self.all.held[seq].cut(self.all.length(seq))

    @invariant()
    def accounts_are_right(self) -> None:
        if hasattr(self, "all"):
            self.all.account()


class TestArenaMachine(ArenaMachine.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(max_examples=12, stateful_step_count=15, deadline=None)


@pytest.mark.slow
class TestMoreOfTheArenaMachine(ArenaMachine.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(max_examples=60, stateful_step_count=15, deadline=None)


@pytest.mark.few(3)
@pytest.mark.parametrize(("sink", "window"), [(64, 64), (0, 0), (5, 128), (0, 64), (64, 0)])
def test_lengths_around_every_edge(sink: int, window: int) -> None:
    """Prefill to each length around sink, ring and page edges, then decode across the next flush."""
    edges = [sink, sink + window, sink + window + PAGE, sink + window + 2 * PAGE]
    for length in sorted({edge + d for edge in edges for d in (-1, 0, 1) if edge + d > 0}):
        both = Sequences(new_arena(sink=sink, window=window))
        both.prefill(0, length, 1)
        for step in range(3):
            both.decode(1, step)
        both.account()
        n = both.length(0)
        # A full ring is flushed before the next token: the last token has not yet seen to it.
        assert both.held[0].packed in {max(0, (n - sink - window) // PAGE), max(0, (n - 1 - sink - window) // PAGE)}


def test_decode_alone_over_two_pages() -> None:
    both = Sequences(new_arena(sink=5, window=0, context=140))
    for _ in range(140):
        both.decode(1, 3)
        both.account()
    assert both.held[0].packed == 2
    assert both.arena.table.pool.free == 0
    with pytest.raises(PoolExhausted):
        both.held[0].take_pages(1)


@pytest.mark.few("64-64")
@pytest.mark.parametrize(("sink", "window"), [(64, 64), (5, 0), (0, 128)])
def test_cut_anywhere_and_go_on(sink: int, window: int) -> None:
    """In sinks, at and inside packed pages, in the tail, at the end: what is written next is attended to rightly."""
    full = sink + window + 3 * PAGE + 20
    edges = {sink + PAGE * i + d for i in range(5) for d in (-1, 0, 1)}
    for cut in sorted({0, 1, 3, full - 1, full, full + 9, sink + PAGE + 30} | {c for c in edges if 0 <= c <= full}):
        both = Sequences(new_arena(sink=sink, window=window, context=full + 40))
        both.prefill(0, full, 1)
        both.truncate(0, cut)
        both.account()
        both.prefill(0, 30, 2)
        both.decode(1, 3)
        both.account()


def test_failed_prefill_keeps_short_tails_and_whole_pages() -> None:
    """A chunk that codes no page leaves the sequence as it was; one that does costs the tail."""
    both = Sequences(new_arena())
    both.prefill(0, 150, 1)
    both.prefill(0, 20, 2, fail_after=1)
    assert both.length(0) == 150
    both.prefill(0, 200, 2, fail_after=1)
    assert both.length(0) == 64
    both.prefill(0, 230, 3)
    assert both.held[0].packed == 2
    both.prefill(0, 100, 4, fail_after=LAYERS)
    assert both.length(0) == 64 + 2 * PAGE
    both.account()
    both.prefill(0, 200, 5)
    both.decode(1, 6)
    both.account()


class Interrupted(list[int]):
    """A list that sees Ctrl-C right after it has grown and right before it shrinks."""

    def append(self, item: Any) -> None:
        list.append(self, item)
        raise KeyboardInterrupt

    def pop(self, *place: Any) -> int:
        raise KeyboardInterrupt


@contextmanager
def interrupted(arena: KVArena, name: str) -> Iterator[None]:
    """Ctrl-C in the midst of a change of the pool's free list or of a sequence's pages."""
    pool = arena.table.pool
    place, key = (pool.held, 0) if name == "held" else (vars(pool), name)
    place[key] = Interrupted(place[key])  # type: ignore[index]
    with pytest.raises(KeyboardInterrupt):
        yield
    place[key] = list(place[key])  # type: ignore[index]


@pytest.mark.parametrize("name", ["held", "_free"])
def test_interrupt_while_pages_are_taken(name: str) -> None:
    both = Sequences(new_arena())
    both.prefill(0, 330, 1)
    both.forget(0, both.held[0].cut(64))  # there are pages that were given back
    with interrupted(both.arena, name):
        both.arena.prefill(both.held[0], [2] * 200)
    both.held[0].cancel()
    both.account()
    both.prefill(0, 200, 3)
    both.decode(1, 4)
    both.account()


@pytest.mark.parametrize("name", ["held", "_free"])
@pytest.mark.parametrize("cut", [0, 10, 64, 128, 200])
def test_interrupt_in_the_middle_of_a_cut(cut: int, name: str) -> None:
    both = Sequences(new_arena())
    both.prefill(0, 330, 1)
    with interrupted(both.arena, name):
        both.held[0].cut(cut)
    both.forget(0, both.held[0].cut(600))
    assert both.length(0) == (cut if cut <= 64 else 64 + (cut - 64) // PAGE * PAGE)
    both.account()
    both.prefill(0, 200, 3)
    both.account()


def test_many_cuts_of_a_large_pool_take_no_time() -> None:
    """Each scanned the whole pool once: 64 of them took 0.3 s of the processor."""
    pool = PagePool(1_000_000, 2)
    pool.take(0, 100)
    start = time.process_time()
    for keep in range(99, 0, -1):
        pool.drop(0, keep)
        pool.take(1, 1)
    assert time.process_time() - start < 0.1
    assert pool.free == 1_000_000 - 100


def pages_of(arena: KVArena, layer: int | None = None) -> Tensor:
    """The pages of the one sequence: of a layer, ``[pages, kv_heads, page_bytes]``, or of all, ``[pages, bytes]``."""
    (sequence,) = arena.table.rows
    assert sequence is not None
    return (arena.pages if layer is None else arena.layer_pages[layer])[sequence.page_ids]


def fill(kv: str, chunks: list[int]) -> KVArena:
    """An arena with one sequence, fed by chunks; of one token by steps."""
    arena = new_arena(kv)
    both = Sequences(arena, tolerance=math.inf)
    for count in chunks:
        if count == 1:
            both.decode(1, 1)
        else:
            both.prefill(0, count, 1)
    return arena


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["bf16", "oct3", "octopus3", "oct2:octopus4", "oct3/oct4:oct2"])
def test_bytes_of_pages_depend_on_keys_and_values_alone(kv: str) -> None:
    whole = pages_of(fill(kv, [321]))
    assert len(whole) == 3
    for chunks in ([321], [64, 64, 64, 129], [100, 1, 1, 219], [7] * 45 + [6], [1] * 321):
        assert torch.equal(pages_of(fill(kv, chunks)), whole)


@pytest.mark.parametrize("kv", ["bf16", "oct3", "octopus2:octopus4", "oct2:oct4/oct3:octopus3"])
def test_pages_carry_tags(kv: str) -> None:
    """A layer's tag alone is enough to read its pages."""
    arena = fill(kv, [321])
    for layer, page_format in enumerate(arena.page_formats):
        name = kv.split("/")[layer % (1 + kv.count("/"))]
        names = {"bf16": "fp32:fp32", "oct3": "oct3:oct3"}.get(name, name)
        version = 2 if "oct" in names.replace("octopus", "") else 1
        assert page_format.tag == f"octo-page/{version} {names} rows d{DIM} seed0"
        found, pages = PageFormat.parse(page_format.tag), pages_of(arena, layer)
        assert found.page_bytes == pages.shape[-1]
        for mine, theirs in zip(page_format.decode(pages), found.decode(pages), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kv", ["oct3", "oct4:oct2", "octopus4:octopus2", "oct2/oct4", "oct4:oct2/octopus2:oct4"])
def test_a_page_holds_its_tokens_in_order(kv: str) -> None:
    """Token by token what a page decodes to is near the key and the value (rotated, as they were given)."""
    arena = fill(kv, [200, 60, 61])
    # K and V [pages, kv_heads, PAGE, d] of each layer
    decoded = [fmt.decode_rotated(pages_of(arena, layer)) for layer, fmt in enumerate(arena.page_formats)]
    for position in (64, 65, 127, 128, 255):
        page, token = divmod(position - arena.shape.sink, PAGE)
        for layer in range(LAYERS):
            _, k, v = vectors(layer, 1, position, 1)
            fmt = arena.formats[layer]
            for stored, original, codec in zip(decoded[layer], (k[0], v[0]), (fmt.k, fmt.v), strict=True):
                limit = {"oct2": 0.33, "oct3": 0.18, "oct4": 0.1, "octopus4": 0.12, "octopus2": 0.4}[codec.name]
                assert float((stored[page, :, token] - original).norm() / original.norm()) < limit


def test_keys_that_overflowed_are_refused_in_one_sentence() -> None:
    arena = new_arena("oct3")
    sequence = arena.open()
    step = arena.prefill(sequence, [0] * 300)
    q, k, v = vectors(0, 1, 0, 300)
    k[100, 0, 3] = torch.inf
    with pytest.raises(OctoError, match="not finite in float32: choose another --dtype"):
        step.attend(0, q[None], torch.stack((k, v)), SPEC, None)
    assert sequence.ids == [] and len(sequence) == 0


@pytest.mark.parametrize(
    ("changes", "text"), [({"sink": -1}, "sink"), ({"window": 63}, "window"), ({"context": 0}, "context")]
)
def test_wrong_shapes_are_refused(changes: dict[str, int], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        new_arena(**changes)
