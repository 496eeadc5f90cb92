"""Layers with windows: their pages are given back behind them, and nothing that is computed changes by it."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from octo_run.engine import Engine, SamplingParams
from octo_run.engine import plan as plan_module
from octo_run.engine.evaluation.reading import Piece, Reader, rows_at_once
from octo_run.engine.parts import held_bytes
from octo_run.engine.pool import GONE, PagePool
from octo_run.engine.sequence import Sequence
from octo_run.engine.window_pages import HISTORY, WindowPages, WindowShape
from octo_run.models.config import ModelConfig

from .conftest import TINY, Counter

pytestmark = pytest.mark.usefixtures("coded_windows")

SLIDING, FULL = "sliding_attention", "full_attention"
PATTERNS = {
    "all": (SLIDING,) * 2,
    "alternating": (SLIDING, FULL) * 2,
    "neighbours": (SLIDING, SLIDING, SLIDING, FULL),
}
IDS = torch.randint(0, 250, (3000,), generator=torch.Generator().manual_seed(3)).tolist()


def windowed(kinds: tuple[str, ...] = PATTERNS["alternating"], window: int = 100) -> ModelConfig:
    return replace(TINY, num_layers=len(kinds), layer_types=kinds, sliding_window=window, max_position_embeddings=4096)


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch, tiny: Callable[..., Engine]) -> Callable[..., Engine]:
    """An engine whose layers share the pages of all tokens, windows or not."""

    def make(kv: str, **options: Any) -> Engine:
        with monkeypatch.context() as patch:
            patch.setattr(plan_module, "window_shapes", lambda *_: ())
            engine = tiny(kv, **options)
        assert not engine.arena.windows
        return engine

    return make


def held(engine: Engine, sequence: Sequence, group: int = 0) -> list[int]:
    """The numbers of the pages that a sequence holds of a group."""
    pages = engine.arena.windows[group].pool.held[sequence.row][: sequence.packed]
    return [number for number, page in enumerate(pages) if page != GONE]


def greedy(engine: Engine, ids: list[int], count: int) -> list[tuple[int, float]]:
    engine.end_ids = frozenset()
    return [(token.id, token.logprob) for token in engine.generate(ids, SamplingParams(max_tokens=count))]


@pytest.mark.few(1)
@pytest.mark.parametrize("kinds", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("kv", ["bf16", "oct3", "octopus3:bf16"])
@pytest.mark.parametrize("options", [{}, {"sink": 5, "window": 128}, {"sink": 0, "window": 0}], ids=str)
def test_nothing_changes(
    tiny: Callable[..., Engine],
    common: Callable[..., Engine],
    kv: str,
    kinds: tuple[str, ...],
    options: dict[str, int],
) -> None:
    """Prompts in large and small chunks, and tokens that are drawn far beyond them: equal bit for bit."""
    given = {"cfg": windowed(kinds), "context": 1300, **options}
    ours, theirs = tiny(kv, **given), common(kv, **given)
    assert [group.shape.layers for group in ours.arena.windows] == [
        tuple(number for number, kind in enumerate(kinds) if kind == SLIDING)
    ]
    for step in (512, 90):
        assert torch.equal(ours.logits(IDS[:1100], step), theirs.logits(IDS[:1100], step))
    assert greedy(ours, IDS[:700], 200) == greedy(theirs, IDS[:700], 200)


@pytest.mark.gpu
@pytest.mark.parametrize("kv", ["bf16", "oct3"])
def test_nothing_changes_on_a_gpu(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kv: str
) -> None:
    """Recorded steps, whose pages are coded in between."""
    kinds = {"use_sliding_window": True, "sliding_window": 200, "max_window_layers": 1, "num_hidden_layers": 3}
    path = make_checkpoint(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", max_position_embeddings=8192, **kinds
    )
    options: dict[str, Any] = {"kv": kv, "device": "cuda", "max_context": 6000}
    found = []
    for shared in (False, True):
        with monkeypatch.context() as patch:
            if shared:
                patch.setattr(plan_module, "window_shapes", lambda *_: ())
            engine = Engine.load(path, **options)
        with engine:
            assert bool(engine.arena.windows) != shared
            found.append((greedy(engine, IDS[:2500], 400), greedy(engine, IDS[:2600], 50)))
    assert found[0] == found[1]


def test_two_windows_are_two_groups(tiny: Callable[..., Engine]) -> None:
    """Specs with another window for a layer: pages of groups have numbers of their own."""
    engine = tiny("oct3", cfg=windowed(), context=2600)
    shape = engine.plan.shape
    both = (WindowShape((0,), 100, 10), WindowShape((2,), 500, 10))
    assert [one.kept for one in both] == [2 + HISTORY + 3, 8 + HISTORY + 3]
    assert replace(shape, windows=both).token_bytes == shape.token_bytes


def test_pages_are_given_back(tiny: Callable[..., Engine]) -> None:
    """However long a sequence is, and however it got there, it holds what its window needs, the history, and what its
    snapshots need."""
    engine = tiny("oct3", cfg=windowed(), context=3000, sequences=2)
    (group,) = engine.arena.windows
    kept = group.shape.kept
    assert len(group.pool) == min(2 * engine.plan.shape.max_pages, 4 * kept + 512 // 64 + 1 + 24 * 3)

    def apart(sequence: Sequence) -> list[int]:
        """The numbers of the pages that are held for more than snapshots."""
        kept = {n for pages in group.snapshots(sequence.row) for n in group.shape.behind(pages)}
        first = group.shape.first_seen(len(sequence), 64) - HISTORY - 1  # one may not be given back yet
        numbers = held(engine, sequence)
        assert {number for number in numbers if number < first} <= kept
        assert kept - set(numbers) <= {sequence.packed, sequence.packed + 1}  # which are not packed yet
        return [number for number in numbers if number >= first]

    with engine.sequence() as sequence:
        for first in range(0, 2000, 500):
            engine.prefill(sequence, IDS[first : first + 500])
            numbers = apart(sequence)
            assert numbers == [*range(numbers[0] if numbers else 0, sequence.packed)] and len(numbers) <= kept
            assert not numbers or numbers[0] <= max(0, len(sequence) + 1 - 100 - 64) // 64
        assert len(held(engine, sequence)) < sequence.packed
        engine.step.start(sequence, 7, SamplingParams())
        for _ in range(700):
            engine.step.launch([sequence])
            engine.step.read(sequence)
            assert len(apart(sequence)) <= kept
        used = len(group.pool) - group.pool.free
        assert used == len(held(engine, sequence))
    engine.arena.table.give_back(sequence)
    assert group.pool.free == len(group.pool)


@pytest.mark.slow
def test_an_answer_is_written_again_without_reading_again(
    tiny: Callable[..., Engine], common: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as the history goes, and as an engine does that has all pages; likewise an edited question."""
    given = {"cfg": windowed(window=130), "context": 3000}
    engine, other = tiny("oct3", **given), common("oct3", **given)
    counter, cut = Counter(engine, monkeypatch), 192 + 64  # what a cut inside coded pages takes along
    first = greedy(engine, IDS[:900], 600)
    assert counter.taken() == 900 and len(first) == 600
    again = greedy(engine, IDS[:900], 600)
    assert counter.taken() < cut
    edited = greedy(engine, [*IDS[:1000], 5, 6, 7], 20)
    assert counter.taken() < cut + 103
    assert (first, again) == (greedy(other, IDS[:900], 600), greedy(other, IDS[:900], 600))
    assert edited == greedy(other, [*IDS[:1000], 5, 6, 7], 20)


@pytest.mark.few("oct3")
@pytest.mark.parametrize("kv", ["bf16", "oct3"])
def test_what_is_gone_is_read_again(tiny: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, kv: str) -> None:
    """A prompt that leaves the old one before the history begins keeps the sinks alone."""
    given = {"cfg": windowed(), "context": 3000}
    engine, fresh = tiny(kv, **given), tiny(kv, **given)
    counter = Counter(engine, monkeypatch)
    greedy(engine, IDS[:2500], 5)
    counter.taken()
    assert engine.arena.table.reusable([*IDS[:300], 1, 2, 3]) == 64
    greedy(fresh, IDS[:64], 1)  # it goes on from the sinks, too: chunks are the same
    edited = [*IDS[:300], *IDS[1000:1700]]
    got = greedy(engine, edited, 40)
    assert counter.taken() == 1000 - 64
    want = greedy(fresh, edited, 40)
    assert [token for token, _ in got] == [token for token, _ in want]
    torch.testing.assert_close([p for _, p in got], [p for _, p in want], atol=1e-4, rtol=1e-4)


def test_prefixes_are_shared(tiny: Callable[..., Engine]) -> None:
    """A second sequence holds the same pages; when the first one ends, what both held stays."""
    engine = tiny("oct3", cfg=windowed(), context=3000, sequences=3)
    (group,) = engine.arena.windows
    one = engine.sequence()
    engine.prefill(one, IDS[:1500])
    two = engine.arena.open(IDS[:2000])
    assert len(two) == 1500 and held(engine, two) == held(engine, one)
    assert all(group.pool.holders(page) == 2 for page in group.pool.held[two.row] if page != GONE)
    alone = engine.sequence()
    engine.prefill(alone, IDS[:1500])
    engine.prefill(alone, IDS[1500:1600])
    want = engine.prefill(alone, IDS[1600:1700])
    one.discard()
    engine.prefill(two, IDS[1500:1600])
    assert torch.equal(engine.prefill(two, IDS[1600:1700]), want)


def test_a_chunk_that_is_interrupted_costs_nothing_that_was_there(tiny: Callable[..., Engine]) -> None:
    engine = tiny("oct3", cfg=windowed(), context=3000)
    sequence = engine.sequence()
    engine.prefill(sequence, IDS[:1000])
    before = held(engine, sequence)
    chunk = engine.arena.prefill(sequence, IDS[1000:1400])
    assert chunk.new_pages and sequence.cancel() == sequence.packed_end
    assert held(engine, sequence) == before
    (group,) = engine.arena.windows
    assert len(group.pool) - group.pool.free == len(before)


def test_the_plan_says_what_windows_take(tiny: Callable[..., Engine]) -> None:
    engine = tiny("oct3", cfg=windowed(), context=4000)
    told, keys = engine.memory_plan(), engine.forward.decoder.key_tensors
    assert told["arena"] + told["full_precision"] == sum(held_bytes(engine.arena)) + sum(held_bytes(keys))
    vector = engine.kv[0].k.bytes_per_vector + engine.kv[0].v.bytes_per_vector
    assert told["bytes_per_token"] == 2 * vector
    (group,) = engine.plan.windows
    assert group == {
        "layers": 2,
        "window": 100,
        "bytes_per_token": 2 * vector,
        "bytes": engine.arena.windows[0].pages.nbytes,
    }
    assert engine.plan.bytes_read(50) == 50 * 4 * vector and engine.plan.bytes_read(1000) == (1000 + 100) * 2 * vector
    longer = [engine.plan.of(replace(engine.plan.shape, context=context)).windows for context in (30_000, 60_000)]
    assert longer[0] == longer[1], "the constant part"


def test_layers_that_all_have_windows_take_no_pages_of_the_context(tiny: Callable[..., Engine]) -> None:
    plans = [tiny("oct3", cfg=windowed(PATTERNS["all"]), context=context).plan for context in (2000, 4000)]
    assert [plan.bytes_per_token for plan in plans] == [0, 0]
    assert plans[1].arena - plans[0].arena < 4 * 2 * 4000 + 2000 * 64 * 4  # tables of pages and of angles


def test_formats_that_are_chosen_later_share_pages(tiny: Callable[..., Engine]) -> None:
    engine = tiny("auto:56", cfg=windowed(), context=600)
    assert not engine.arena.windows and engine.plan.windows == []


@pytest.mark.slow
def test_measurements_read_what_steps_read(tiny: Callable[..., Engine], common: Callable[..., Engine]) -> None:
    """A reader's tokens attend to pages that their own chunk fills: none of those is left out."""
    found = []
    for make in (tiny, common):
        engine = make("oct3", cfg=windowed(), context=1500)
        reader = Reader(engine, rows_at_once(engine.plan, engine.config))
        with engine.sequence() as sequence, torch.inference_mode():
            parts = [
                reader.logits(reader.read([sequence], [IDS], [Piece(0, first, first + 400)])).clone()
                for first in range(0, 1200, 400)
            ]
        found.append(torch.cat(parts))
    assert torch.equal(*found)


def test_a_filled_sequence_is_stepped_on(tiny: Callable[..., Engine]) -> None:
    engine = tiny("oct3", cfg=windowed(), context=3000)
    with engine.sequence() as sequence:
        for length in (0, 100, 300, 2900):
            engine.fill(sequence, length)
            (group,) = engine.arena.windows
            most = group.shape.kept + group.shape.seen * (length // 64 // group.shape.every)
            assert len(sequence) == length and len(held(engine, sequence)) <= most
            assert not sequence.packed or held(engine, sequence)[-1] == sequence.packed - 1
            assert bool(engine.prefill(sequence, [5]).isfinite().all())


def test_a_filled_sequence_need_not_hold_all_snapshots_on_the_way(tiny: Callable[..., Engine]) -> None:
    engine = tiny("oct3", cfg=replace(windowed(), max_position_embeddings=65_536), context=60_000)
    with engine.sequence() as sequence:
        engine.fill(sequence, 59_900)
        assert len(sequence) == 59_900 and held(engine, sequence)[-1] == sequence.packed - 1
        assert bool(engine.prefill(sequence, [5]).isfinite().all())


@pytest.mark.parametrize("seed", range(4))
def test_a_pool_of_a_group_never_runs_out(seed: int) -> None:
    """Sequences that grow, are cut, shared and dropped: snapshots go where there is no room, pages that the next token
    sees never do, and a length that is said to be reachable has them."""
    rng = random.Random(seed)
    shape = WindowShape((0,), rng.choice([64, 130, 1000]), 1, snapshots=rng.choice([0, 2, 40]))
    rows, most, sink, chunk = 3, 400, 64, 1024
    empty = torch.zeros(shape.pages(rows, most, chunk), 1, dtype=torch.uint8)
    group = WindowPages(shape, sink, empty, torch.zeros(rows, most, dtype=torch.int32), [])
    lengths, taken = [0] * rows, 0

    def cut(row: int, length: int, packed: int) -> None:
        lengths[row] = length
        group.drop(row, packed, length)

    def packed(length: int) -> int:
        return max(0, (length - sink - 64) // 64)

    for _ in range(400):
        row, what = rng.randrange(rows), rng.random()
        length, held = lengths[row], group.pool.held[row]
        assert all(held[n] != GONE for n in range(min(shape.first_seen(length, sink), len(held)), len(held)))
        if what < 0.6 and length + chunk < 64 * most:
            end = length + rng.randrange(1, chunk)
            group.mark(row, length)
            group.take(row, packed(end) - len(held), end)
            if rng.random() < 0.8:
                group.mark(row, end)
                lengths[row] = end
                group.forget(row, end)
            else:
                group.drop(row, packed(length), length)  # it was cancelled
        elif what < 0.8:
            wanted = rng.randrange(length + 1)
            pages = min(len(held), max(0, wanted - sink) // 64)
            wanted = min(wanted, sink + 64 * pages) if pages < len(held) else wanted
            found = group.reachable(row, wanted, pages)
            seen = range(min(shape.first_seen(found, sink), pages), min(pages, max(0, found - sink) // 64))
            assert found <= wanted and all(held[n] != GONE for n in seen)
            better = [one for one in group.snapshots(row) if one <= pages and sink + 64 * one > found]
            assert not better, "a snapshot that was passed over"
            taken += found < wanted
            cut(row, found, min(pages, max(0, found - sink) // 64))
        elif what < 0.9:
            other = (row + 1) % rows
            pages = len(group.pool.held[other])
            cut(row, 0, 0)
            group.share(other, row, pages)
            lengths[row] = lengths[other]
        else:
            cut(row, 0, 0)
    assert taken and group.pool.free >= 0


def test_a_pool_gives_pages_back() -> None:
    pool = PagePool(10, 2)
    pages = pool.take(0, 5)
    pool.share(1, pages)
    pool.release(0, [0, 2])
    assert pool.held[0] == [GONE, pages[1], GONE, *pages[3:]] and pool.free == 5
    pool.release(1, [0, 1])
    assert pool.free == 6 and pool.holders(pages[2]) == 1 and pool.holders(pages[3]) == 2
    pool.release(0, [0, 1, 2, 3, 4])
    assert pool.held[0] == [GONE] * 5
    taken = pool.take_some(0, [False, True, False])
    assert taken == pool.held[0][5:] and taken[0] == taken[2] == GONE and taken[1] != GONE
    pool.drop(0, 6)
    assert pool.held[0] == [GONE] * 6
    pool._torn = True  # as an exception leaves it
    assert pool.free == 7 and pool.holders(pages[2]) == 1
