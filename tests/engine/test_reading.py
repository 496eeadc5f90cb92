"""Reading texts as decoding would: the same keys are coded for every token, however many are read at once."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octo_run.engine import Engine, SamplingParams
from octo_run.engine.evaluation import reading
from octo_run.engine.evaluation.reading import Piece, Reader, pack, rows_at_once
from octo_run.engine.parts import held_bytes

Tiny = Callable[..., Engine]
#: What rounding may change, relative to the largest logit.
ROUNDING = 1e-5


def read(engine: Engine, texts: Sequence[list[int]], step: int) -> list[Tensor]:
    """The logits ``[n, vocab]`` of texts that are read together, ``step`` tokens of each at once."""
    reader = Reader(engine, rows_at_once(engine.plan, engine.config))
    opened = [engine.sequence() for _ in texts]
    parts: list[list[Tensor]] = [[] for _ in texts]
    with torch.inference_mode():
        for pieces in pack([len(ids) for ids in texts], rows_at_once(engine.plan, engine.config), step):
            logits = reader.logits(reader.read(opened, texts, pieces))
            split = logits.split([piece.end - piece.first for piece in pieces])
            for piece, rows in zip(pieces, split, strict=True):
                parts[piece.text].append(rows)
    for sequence in opened:
        sequence.discard()
    return [torch.cat(rows) for rows in parts]


def difference(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"conditioning": "off"},
        {},
        {"conditioning": "mean"},
        {"sink": 5, "window": 128},
        {"sink": 0, "window": 0},
        {"sink": 200},
    ],
    ids=["off", "usual", "key mean", "uneven sink", "neither", "long sink"],
)
@pytest.mark.parametrize("kv", ["oct2", "octopus3", "bf16"])
def test_any_number_of_tokens_at_once_reads_what_one_at_a_time_reads(
    kv: str, options: dict[str, Any], tiny: Tiny, random_ids: Callable[..., list[int]]
) -> None:
    engine = tiny(kv, context=600, **options)
    # Where two codes are equally near, rounding decides between them, and the text goes on differently: one in a dozen
    # texts has such a place. What is read wrongly is wrong in every text.
    texts = [random_ids(520, seed=seed) for seed in range(3)]
    exact = functools.cache(lambda text: engine.logits(texts[text], 1))
    for step in (7, 64, 100, 512):
        found = (difference(read(engine, [texts[text]], step)[0], exact(text)) for text in range(3))
        assert any(one < ROUNDING for one in found), step
    if kv != "bf16":  # chunks of a prompt see more in full precision: the figures above can tell
        assert difference(engine.logits(texts[0], 512), exact(0)) > 1e-2


@pytest.mark.parametrize("kv", ["oct2", "bf16"])
def test_reading_is_decoding(kv: str, tiny: Tiny, random_ids: Callable[..., list[int]]) -> None:
    """The engine's own decode steps, each fed the text's token instead of the drawn one."""
    engine = tiny(kv, context=400)
    ids, rows = random_ids(330), []
    with engine.sequence() as sequence:
        for token in ids:
            engine.step.start(sequence, token, SamplingParams())
            engine.step.launch([sequence])
            rows.append(engine.step.logits[:1].clone())
            engine.step.read(sequence)
    engine.arena.table.give_back(sequence)
    assert difference(read(engine, [ids], 400)[0], torch.cat(rows)) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("conditioning", ["off", "full"])
def test_texts_that_are_read_together_are_read_as_alone(
    conditioning: str, tiny: Tiny, random_ids: Callable[..., list[int]]
) -> None:
    engine = tiny("oct3", context=300, sequences=4, conditioning=conditioning)
    texts = [random_ids(count, seed=count) for count in (300, 1, 257, 64)]
    for step in (300, 100):
        for ids, rows in zip(texts, read(engine, texts, step), strict=True):
            assert difference(rows, engine.logits(ids, 1)) < ROUNDING


def test_the_cache_is_left_as_decoding_leaves_it(tiny: Tiny, random_ids: Callable[..., list[int]]) -> None:
    """What was read can be continued: the same pages, the same ring."""
    engine = tiny("octopus3", context=500, sequences=2)
    ids = random_ids(415)
    alone, together = engine.sequence(), engine.sequence()
    for token in ids:
        engine.prefill(alone, [token])
    Reader(engine, 500).read([together], [ids], [Piece(0, 0, 415)])
    assert together.ids == alone.ids and together.packed == alone.packed == 4
    pages = [engine.arena.pages[sequence.page_ids] for sequence in (alone, together)]
    assert torch.equal(*pages)
    full = [engine.arena.row_state(sequence.row)[0] for sequence in (alone, together)]
    slots = [*range(64), *(engine.arena.place(position) for position in range(64 + 4 * 64, 415))]
    assert torch.allclose(*(part[:, :, :, slots] for part in full), atol=1e-5)


@pytest.mark.slow
def test_a_long_text_takes_several_chunks(tiny: Tiny, random_ids: Callable[..., list[int]]) -> None:
    engine = tiny("oct2", context=1400)
    assert engine.plan.shape.chunk == 512
    ids = random_ids(1400)
    assert difference(read(engine, [ids], 512)[0], engine.logits(ids, 1)) < 10 * ROUNDING  # longer sums


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 40), max_size=6), st.integers(1, 30), st.integers(1, 30))
def test_passes_hold_all_tokens_in_order_and_no_text_twice(lengths: list[int], step: int, rows: int) -> None:
    passes = pack(lengths, max(rows, step), step)
    read: list[list[int]] = [[] for _ in lengths]
    for pieces in passes:
        assert 0 < sum(piece.end - piece.first for piece in pieces) <= max(rows, step)
        assert len({piece.text for piece in pieces}) == len(pieces)
        for piece in pieces:
            assert 0 < piece.end - piece.first <= step
            read[piece.text] += range(piece.first, piece.end)
    assert read == [list(range(length)) for length in lengths]


@pytest.mark.slow
def test_formats_are_loaded_as_memory_allows(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Engine] = []

    def load(kv: str) -> Engine:
        loaded.append(tiny(kv, context=128))
        return loaded[-1]

    def names() -> list[list[str]]:
        return [[kv for kv, _ in group] for group in reading.groups(load, ["oct4", "oct3", "bf16", "oct2", "oct3"])]

    assert names() == [["bf16", "oct4", "oct3", "oct2"]]
    assert hasattr(loaded[0], "arena"), "bf16 stays loaded"
    for engine in loaded[1:]:
        with pytest.raises(Exception, match="was closed"):
            _ = engine.arena
    monkeypatch.setattr(reading, "free_memory", lambda _device: 2**28)
    assert names() == [["bf16", "oct4"], ["bf16", "oct3"], ["bf16", "oct2"]]
    rooms = itertools.cycle([2**40, 2**28])
    monkeypatch.setattr(reading, "free_memory", lambda _device: next(rooms))
    assert names() == [["bf16", "oct4", "oct3"], ["bf16", "oct2"]]


def test_a_plan_counts_what_a_reader_holds(tiny: Tiny) -> None:
    engine = tiny("oct3", context=128, sequences=4)
    plan, cfg = engine.plan, engine.config
    assert (plan.shape.chunk, rows_at_once(plan, cfg)) == (128, 512)
    reader = Reader(engine, 512)
    forward = reader._forward
    assert reading.reader_bytes(plan, cfg) == sum(held_bytes(forward, but=(forward.decoder, forward.arena)))
    held = plan.total + reading.reader_bytes(plan, cfg) + reading.slice_rows(plan, cfg) * 16 * cfg.vocab_size
    assert reading.fits(plan, cfg, held) and not reading.fits(plan, cfg, held - 1)
