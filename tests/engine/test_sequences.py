"""Random programs on sequences and pages: whatever joins, leaves, shares, is cut, fails or runs out of pages, every
answer is that of a fresh engine with the same history, and no page is lost or freed twice."""

import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from octo_run.engine import Engine, SamplingParams
from octo_run.engine.kept_prefixes import KeptPrefix
from octo_run.engine.pool import PoolExhausted
from octo_run.engine.sequence import Sequence
from octo_run.errors import OctoError

Tiny = Callable[..., Engine]
GREEDY = SamplingParams()
SETTINGS: dict[str, Any] = {"context": 460, "sink": 16, "window": 64}
#: Rows, pages, and how often sequences are opened, fed, run, cut and ended: with few pages they run out, with few rows
#: what ended loses its row, and is found again if there are pages for it.
FEW_PAGES, FEW_ROWS = (4, 7, [4, 5, 6, 1, 2]), (1, 12, [6, 2, 3, 1, 5])


class Struck(BaseException):
    """An interrupt."""


def check_pages(engine: Engine) -> None:
    """Every page is free or held, and counted right."""
    pool, table = engine.arena.table.pool, engine.arena.table
    held = Counter(page for pages in pool.held for page in pages)
    assert pool.free + len(held) == len(pool)
    assert all(pool.holders(page) == held[page] for page in range(len(pool)))
    for row, sequence in enumerate(table.rows):
        if sequence is None:
            assert pool.held[row] == []
        else:
            assert len(sequence.ids) == len(sequence) - sequence.ahead
            assert sequence.packed <= len(pool.held[row]) and len(set(sequence.page_ids)) == sequence.packed
            assert sequence.packed_end <= len(sequence) or not sequence.packed
    holders = [one.holder for one in table.kept._kept]
    for row in range(len(table.rows), len(pool.held)):
        assert bool(pool.held[row]) == (row in holders)
    for one in table.kept._kept:
        assert len(one.ids) == 16 + 64 * (len(pool.held[one.holder]) - one.extra) == 16 + 64 * len(one.keys)
        assert all(one in table.kept._index[key] for key in one.keys)


class Program:
    """Runs random operations and keeps, for each sequence, what a fresh engine has to do to come to the same."""

    def __init__(self, engine: Engine, fresh: Engine, seed: int, tolerance: float, weights: list[int]) -> None:
        self.engine, self.fresh, self.tolerance, self.weights = engine, fresh, tolerance, weights
        self.source = random.Random(seed)
        base = [self.source.randrange(256) for _ in range(300)]
        self.texts = [base, base[:150] + [self.source.randrange(256) for _ in range(200)], base[:40] + base[100:]]
        self.history: dict[Sequence, list[tuple[str, Any, Any]]] = {}
        self.at: dict[Sequence, tuple[int, int]] = {}
        self.copied: list[int] = []
        self.given: list[KeptPrefix] = []
        self.kept_histories: dict[KeptPrefix, list[tuple[str, Any, Any]]] = {}
        table, arena = engine.arena.table, type(engine.arena)
        copy, give, add = arena.copy_row, type(table.kept).give, type(table.kept)._add

        def added(sequence: Sequence, *sizes: int) -> None:
            add(table.kept, sequence, *sizes)
            self.kept_histories[table.kept._kept[-1]] = list(self.history[sequence])

        engine.arena.copy_row = lambda *rows: (self.copied.append(rows[0]), copy(engine.arena, *rows))[1]  # type: ignore[method-assign]
        table.kept.give = lambda one, *to: (self.given.append(one), give(table.kept, one, *to))[1]  # type: ignore[method-assign]
        table.kept._add = added  # type: ignore[method-assign]
        self.fail_in: int | None = None
        self.struck = self.found = 0

    def strike(self) -> None:
        """Called wherever the engine computes; raises when its time has come."""
        if self.fail_in is not None:
            self.fail_in -= 1
            if self.fail_in < 0:
                self.fail_in = None
                self.struck += 1
                raise Struck

    def run(self, count: int) -> None:
        for _ in range(count):
            self.fail_in = self.source.randrange(12) if self.source.random() < 0.2 else None
            (work,) = self.source.choices([self.open, self.feed, self.step, self.cut, self.end], weights=self.weights)
            with contextlib.suppress(PoolExhausted, Struck):
                work()
            self.fail_in = None
            self.settle()
            check_pages(self.engine)
        self.replay()

    def live(self) -> list[Sequence]:
        return [seq for seq in self.engine.arena.table.rows if seq is not None and seq.pinned]

    def settle(self) -> None:
        """Note what was lost: pages taken from a parked sequence, the end of one that was struck."""
        for sequence, history in self.history.items():
            if sequence.alive and not sequence.ahead and (len(sequence), sequence.packed) != self.at[sequence]:
                assert len(sequence) <= self.at[sequence][0]
                self.note(sequence, "cut", len(sequence), sequence.packed)
            elif not sequence.alive:
                history.clear()

    def note(self, sequence: Sequence, kind: str, what: Any, result: Any) -> None:
        self.history[sequence].append((kind, what, result))
        self.at[sequence] = len(sequence) - sequence.ahead, sequence.packed

    def open(self) -> None:
        text = self.source.choice(self.texts)
        ids = text[: self.source.choice([self.source.randrange(1, len(text)), len(text)])]
        rows = enumerate(self.engine.arena.table.rows)
        donors = {row: list(self.history.get(seq, [])) for row, seq in rows if seq is not None}
        self.copied.clear()
        self.given.clear()
        try:
            sequence = self.engine.arena.open(ids)
        except OctoError:
            assert len(self.live()) == len(self.engine.arena.table.rows)
            return
        if self.given:
            history = list(self.kept_histories[self.given[0]])
            self.found += 1
        else:
            history = donors.get(self.copied[0] if self.copied else sequence.row, [])
        self.history[sequence] = history
        if len(sequence):
            assert sequence.ids == ids[: len(sequence)] and len(sequence) < len(ids)
        self.note(sequence, "cut", len(sequence), sequence.packed)
        self._feed(sequence, ids[len(sequence) :])

    def feed(self) -> None:
        """More tokens for a sequence, or for several in one pass through the layers."""
        if live := self.live():
            parts = []
            for sequence in self.source.sample(live, self.source.randrange(1, min(3, len(live)) + 1)):
                sequence.cancel()
                self.settle()
                if room := 460 - len(sequence):
                    count = self.source.randrange(1, min(room, 90) + 1)
                    parts.append((sequence, self.source.choices(range(256), k=count)))
            if len(parts) == 1:
                self._feed(*parts[0])
            elif parts:
                hidden = self.engine.read_chunks([self.engine.arena.prefill(*part) for part in parts])
                ends = itertools.accumulate(len(ids) for _, ids in parts)
                for (sequence, ids), end in zip(parts, ends, strict=True):
                    self.note(sequence, "feed", ids, self.engine._logits(hidden[end - 1 : end])[0])

    def _feed(self, sequence: Sequence, ids: list[int]) -> None:
        logits = self.engine.prefill(sequence, ids)
        self.note(sequence, "feed", ids, logits)

    def step(self) -> None:
        """Several launches of a random set, in random order, each sequence up to three ahead; then reading, or not."""
        able = [seq for seq in self.live() if 0 < len(seq) < 440]
        if not able:
            return
        chosen = self.source.sample(able, self.source.randrange(1, len(able) + 1))
        for sequence in chosen:
            if not sequence.ready:
                token = self.source.randrange(256)
                self.engine.step.start(sequence, token, GREEDY)
                self.settle()
            else:
                while sequence.unread:
                    self._read(sequence)
        for _ in range(self.source.randrange(1, 4)):
            self.source.shuffle(chosen)
            first = {seq: seq.following for seq in chosen}
            self.engine.step.launch(chosen)
            for sequence in chosen:
                if first[sequence] is not None:
                    self.note(sequence, "token", first[sequence], None)
            check_pages(self.engine)
        for sequence in chosen:
            for _ in range(self.source.randrange(len(sequence.unread) + 1)):
                self._read(sequence)

    def _read(self, sequence: Sequence) -> None:
        ahead = sequence.ahead
        drawn = self.engine.step.read(sequence)
        self.note(sequence, "drawn", None, drawn)
        if ahead:
            self.note(sequence, "token", drawn[0], None)

    def cut(self) -> None:
        if live := self.live():
            sequence = self.source.choice(live)
            kept = sequence.cut(self.source.randrange(len(sequence) + 1))
            assert kept == len(sequence) == len(sequence.ids)
            self.note(sequence, "cut", kept, sequence.packed)

    def end(self) -> None:
        if live := self.live():
            sequence = self.source.choice(live)
            if self.source.random() < 0.85:
                sequence.close()
            else:
                sequence.discard()

    def replay(self) -> None:
        """A fresh engine does the same for each sequence by itself, token by token where steps did."""
        for sequence, history in self.history.items():
            if not sequence.alive:
                continue
            alone = self.fresh.sequence()
            alone.cut(0)
            ready = False
            for kind, what, result in history:
                if kind == "feed":
                    found = self.fresh.prefill(alone, what)
                    assert (found - result).abs().max() < self.tolerance
                    ready = False
                elif kind == "cut":
                    alone.cut(what)
                    while alone.packed < result:  # coded for a step that was taken back
                        self.fresh.arena.code_oldest(alone)
                    assert (len(alone), alone.packed) == (what, result)
                    ready = False
                elif kind == "token":
                    if not ready or alone.following != what:
                        self.fresh.step.start(alone, what, GREEDY)
                    self.fresh.step.launch([alone])
                    ready = True
                    drawn = self.fresh.step.read(alone)
                else:
                    assert abs(drawn[1] - result[1]) < self.tolerance
                    assert drawn[0] == result[0] or self.tolerance > 1e-3
            assert alone.ids == sequence.ids
            alone.discard()


@pytest.fixture
def struck_kernels(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """Programs in this list may strike wherever attention or coding is computed."""
    from octo_run import kernels

    programs: list[Program] = []
    for name in ("attend", "encode_pages"):
        whole = getattr(kernels, name)

        def struck(*args: Any, whole: Any = whole, **kwargs: Any) -> Any:
            for program in programs:
                program.strike()
            return whole(*args, **kwargs)

        monkeypatch.setattr(kernels, name, struck)
    return programs


def run_programs(
    tiny: Tiny, programs: list[Program], kv: str, seeds: range, setting: tuple[int, int, list[int]]
) -> tuple[int, int]:
    """Run programs.

    Returns:
        How often they were struck, and how often a prefix was found that had no row any more.
    """
    rows, pages, weights = setting
    fresh = tiny(kv, sequences=1, pages=7, **SETTINGS)
    engine = tiny(kv, sequences=rows, pages=pages, **SETTINGS)
    struck = found = 0
    for seed in seeds:
        for row in list(engine.arena.table.rows):
            if row is not None:
                row.discard()
        engine.arena.table.kept.clear()
        program = Program(engine, fresh, seed, 1e-4 if kv == "bf16" else 5e-2, weights)
        programs[:] = [program]
        with torch.inference_mode():
            program.run(20)
        struck, found = struck + program.struck, found + program.found
    return struck, found


@pytest.mark.few("oct3")
@pytest.mark.parametrize("kv", ["bf16", "oct3", "oct2:oct4/oct3"])
def test_random_programs_answer_as_fresh_engines_do(tiny: Tiny, struck_kernels: list[Program], kv: str) -> None:
    assert run_programs(tiny, struck_kernels, kv, range(12), FEW_PAGES)[0] > 1
    assert run_programs(tiny, struck_kernels, kv, range(12), FEW_ROWS)[1] > 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kv", ["bf16", "oct3"])
def test_a_thousand_random_programs(tiny: Tiny, struck_kernels: list[Program], kv: str) -> None:
    assert run_programs(tiny, struck_kernels, kv, range(1000, 1250), FEW_PAGES)[0] > 50
    assert run_programs(tiny, struck_kernels, kv, range(1250, 1500), FEW_ROWS)[1] > 30
