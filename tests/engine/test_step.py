"""Decode steps of several sequences, tokens drawn ahead of what was read: on the CPU, where nothing is recorded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from octo_run.engine import Engine, SamplingParams
from octo_run.engine.sequence import Sequence
from octo_run.engine.step import AHEAD, batch_buckets, length_bound
from octo_run.errors import OctoError, UsageError

from .conftest import only

Tiny = Callable[..., Engine]
GREEDY = SamplingParams()


def answer(engine: Engine, ids: list[int], **params: Any) -> list[int]:
    return [token.id for token in engine.generate(ids, SamplingParams(**params))]


Started = list[tuple[Sequence, list[int]]]


def begin(engine: Engine, prompts: list[list[int]], params: SamplingParams = GREEDY) -> Started:
    """Sequences that hold the prompts, each with the first token of its answer."""
    started = []
    for ids in prompts:
        sequence = engine.sequence()
        token = int(engine.prefill(sequence, ids).argmax())
        engine.step.start(sequence, token, params)
        started.append((sequence, [token]))
    return started


def follow(engine: Engine, started: Started, count: int, ahead: int = 2) -> None:
    """Append ``count`` tokens to each answer."""
    sequences, launched = [sequence for sequence, _ in started], 0
    for taken in range(count):
        while launched < min(count, taken + ahead):
            engine.step.launch(sequences)
            launched += 1
        for sequence, tokens in started:
            tokens.append(engine.step.read(sequence)[0])


def test_buckets() -> None:
    assert batch_buckets(1) == [1]
    assert batch_buckets(6) == [1, 2, 4, 6]
    assert batch_buckets(64) == [1, 2, 4, 8, 16, 32, 64]
    assert [length_bound(n, 5000) for n in (1, 1024, 1025, 2048, 4097, 5000)] == [1024, 1024, 2048, 2048, 5000, 5000]
    assert length_bound(7, 500) == 500
    assert [length_bound(n, 5000, 128) for n in (1, 128, 129, 1025)] == [128, 128, 1024, 2048]
    assert length_bound(7, 64, 128) == 64


@pytest.mark.few(1)
@pytest.mark.parametrize("kv", ["bf16", "oct3"])
def test_sequences_of_different_lengths_answer_as_if_alone(kv: str, tiny: Tiny, random_ids: Any) -> None:
    """Across several pages of each, at different steps."""
    prompts = [random_ids(130), random_ids(5, seed=1), random_ids(300, seed=2)]
    alone, engine = tiny(kv), tiny(kv, sequences=3)
    alone.end_ids = frozenset()
    started = begin(engine, prompts)
    follow(engine, started, 150)
    assert [tokens for _, tokens in started] == [answer(alone, ids, max_tokens=151) for ids in prompts]
    assert [len(sequence) for sequence, _ in started] == [130 + 150, 5 + 150, 300 + 150]


def test_any_set_in_any_order_joins_and_leaves(tiny: Tiny, random_ids: Any) -> None:
    """Three run in a bucket of four; the fourth, whose ring is full, is written to by nobody."""
    engine, alone = tiny(sequences=4), tiny()
    alone.end_ids = frozenset()
    prompts = [random_ids(20 + i, seed=i) for i in range(3)] + [random_ids(64 + 128, seed=9)]
    started = begin(engine, prompts)
    for members in ((2, 0, 1), (1,), (3, 1, 0, 2), (0, 3), (2,)):
        follow(engine, [started[i] for i in members], 9)
    assert [len(tokens) for _, tokens in started] == [28, 28, 28, 19]
    assert [tokens for _, tokens in started] == [
        answer(alone, ids, max_tokens=len(tokens)) for ids, (_, tokens) in zip(prompts, started, strict=True)
    ]


def test_a_sequence_may_leave_with_steps_unread_and_come_back(tiny: Tiny, random_ids: Any) -> None:
    """Tokens that the host has not read stay on the device, whatever runs in between."""
    engine, alone = tiny(sequences=3), tiny()
    alone.end_ids = frozenset()
    prompts = [random_ids(50 + i, seed=i) for i in range(3)]
    started = begin(engine, prompts)
    (a, _), (b, _), (c, _) = started
    for members in ([a, b], [b], [c, a], [a], [c, b, a]):
        engine.step.launch(members)
    for sequence, tokens in reversed(started):
        while sequence.unread:
            tokens.append(engine.step.read(sequence)[0])
    assert [len(tokens) for _, tokens in started] == [5, 4, 3]
    assert [tokens for _, tokens in started] == [
        answer(alone, ids, max_tokens=len(tokens)) for ids, (_, tokens) in zip(prompts, started, strict=True)
    ]
    assert [sequence.ids for sequence, _ in started] == [
        ids + tokens[:-1] for ids, (_, tokens) in zip(prompts, started, strict=True)
    ]


def test_a_prompt_read_between_steps_disturbs_nobody(tiny: Tiny, random_ids: Any) -> None:
    """A prefill used to cancel every running step, and its tokens were in the cache while nobody knew their ids."""
    engine, alone = tiny(sequences=2), tiny()
    alone.end_ids = frozenset()
    first, second = random_ids(90), random_ids(140, seed=1)
    started = begin(engine, [first])
    follow(engine, started, 7)
    engine.step.launch([started[0][0]])
    started += begin(engine, [second])
    started[0][1].append(engine.step.read(started[0][0])[0])
    follow(engine, started, 5)
    assert [tokens for _, tokens in started] == [
        answer(alone, first, max_tokens=14),
        answer(alone, second, max_tokens=6),
    ]


def test_what_steps_fed_is_known_when_a_prefix_is_reused(tiny: Tiny, random_ids: Any) -> None:
    """Seven steps, then more of a prompt, then an answer to all of it: it is that of an engine that never stepped."""
    engine, fresh = tiny(), tiny()
    engine.end_ids = fresh.end_ids = frozenset()
    first, second, third = random_ids(10), random_ids(9, seed=1), random_ids(8, seed=2)
    ((sequence, tokens),) = begin(engine, [first])
    follow(engine, [(sequence, tokens)], 7)
    engine.prefill(sequence, second)
    assert sequence.ids == first + tokens[:7] + second
    sequence.close()
    ids = first + second + third
    generation = engine.generate(ids, SamplingParams(max_tokens=9))
    assert [token.id for token in generation] == answer(fresh, ids, max_tokens=9)
    assert generation.reused_tokens in (10, 11)  # the first drawn token may be the prompt's next one


@pytest.mark.few(1)
@pytest.mark.parametrize(("kv", "window"), [("oct3", 0), ("oct3", 64), ("bf16", 64)])
def test_what_was_not_read_is_taken_back(kv: str, window: int, tiny: Tiny, random_ids: Any) -> None:
    """Also when a page was coded for a step that is taken back: ids and length are equal whatever is left. Such a page
    stays coded, which only uncompressed ones do without a trace."""
    ids = random_ids(64 + 64 + window - 4)
    engine, alone = tiny(kv, window=window), tiny(kv, window=window)
    alone.end_ids = frozenset()
    started = begin(engine, [ids])
    ((sequence, tokens),) = started
    follow(engine, started, 2)
    for _ in range(5):
        engine.step.launch([sequence])
    assert sequence.packed == 1 and sequence.ahead == 4
    kept = sequence.cancel()
    assert kept == len(sequence) == len(sequence.ids)
    assert sequence.ids == (ids + tokens)[:kept]
    assert kept == (len(ids) + 3 if window else 64), "the first of the launches fed a token that was known"
    if window:
        sequence.cut(kept - 1)
        engine.step.start(sequence, tokens[-1], GREEDY)
        follow(engine, started, 70, ahead=AHEAD)
        same = 73 if kv == "bf16" else 2
        assert len(tokens) == 73 and tokens[:same] == answer(alone, ids, max_tokens=73)[:same]


def test_misuse_is_refused(tiny: Tiny, random_ids: Any) -> None:
    engine = tiny(context=70, sequences=2)
    sequence, other = engine.sequence(), engine.sequence()
    with pytest.raises(UsageError, match="has no token to go on with: start it first"):
        engine.step.launch([sequence])
    engine.prefill(sequence, random_ids(60))
    for members in ([], [sequence, sequence], [sequence, other, sequence]):
        with pytest.raises(UsageError, match="give 1 to 2, each once"):
            engine.step.launch(members)
    for token in (260, -1, 10**6):
        with pytest.raises(UsageError, match=f"id {token} is not in the vocabulary of 260"):
            engine.step.start(sequence, token, GREEDY)
    engine.step.start(sequence, 5, GREEDY)
    with pytest.raises(UsageError, match="start it first"):
        engine.step.launch([sequence, other])
    with pytest.raises(UsageError, match="no step to read"):
        engine.step.read(sequence)
    for _ in range(AHEAD):
        engine.step.launch([sequence])
    with pytest.raises(UsageError, match=f"{AHEAD} steps of a sequence are launched and unread"):
        engine.step.launch([sequence])
    assert len([engine.step.read(sequence) for _ in range(AHEAD)]) == AHEAD
    for _ in range(2):
        engine.step.launch([sequence])
    with pytest.raises(UsageError, match="context of 70 tokens"):
        engine.step.launch([sequence])
    with pytest.raises(OctoError, match="All 2 sequences"):
        engine.sequence()
    with pytest.raises(UsageError, match="holds 69 tokens: 3 more do not fit"):
        engine.prefill(sequence, [1, 2, 3])
    other.discard()
    with pytest.raises(UsageError, match="has ended"):
        engine.prefill(other, [1])


def test_logits_that_are_not_finite_are_an_error(tiny: Tiny) -> None:
    engine = tiny()
    sequence = engine.sequence()
    engine.prefill(sequence, [1, 2])
    with torch.inference_mode():
        engine.forward.decoder.final_norm.fill_(torch.nan)
    engine.step.start(sequence, 5, GREEDY)
    engine.step.launch([sequence])
    with pytest.raises(OctoError, match="logits are not finite"):
        engine.step.read(sequence)


# Generation that runs ahead


def runs_ahead(tiny: Tiny, *args: Any, **options: Any) -> Engine:
    engine = tiny(*args, **options)
    engine.depth = 2
    return engine


def test_an_answer_ahead_is_the_answer(tiny: Tiny, random_ids: Any) -> None:
    """Ends by count, by context, by a stop token; the cache then holds what it would without running ahead, and maybe
    a stop token, which the step ahead has fed already."""
    engine, plain = runs_ahead(tiny, "oct3", context=400), tiny("oct3", context=400)
    engine.end_ids = plain.end_ids = frozenset()
    ids = random_ids(250)
    full = answer(plain, ids)
    assert answer(engine, ids) == full and len(full) == 151
    assert len(only(engine)) == len(only(plain)) == 400
    stop = full[40]
    for params in ({"max_tokens": 1}, {"max_tokens": 77}, {"stop_ids": (stop,)}):
        wanted, got = answer(plain, ids, **params), answer(engine, ids, **params)
        assert got == wanted
        held = list(only(engine).ids)
        if held and held[-1] == stop and len(held) > len(only(plain).ids):
            held.pop()
        assert held == only(plain).ids
        assert only(engine).packed - only(plain).packed in (0, 1)


def test_generations_ahead_may_take_turns(tiny: Tiny, random_ids: Any) -> None:
    """With noise: it depends on seed and place, not on what ran in between."""
    engine = runs_ahead(tiny)
    engine.end_ids = frozenset()
    prompts = [random_ids(100, seed=1), random_ids(140, seed=2)]
    rules = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 5, "max_tokens": 12}
    alone = [answer(engine, ids, **rules) for ids in prompts]
    both = [engine.generate(ids, SamplingParams(**rules)) for ids in prompts]
    together: list[list[int]] = [[], []]
    for turn in range(12):
        for which in (0, 1):
            together[which].append(next(both[which]).id)
        if turn == 5:
            engine.logits(random_ids(30, seed=3))
    assert together == alone


def test_leaving_early_leaves_the_cache_as_read(tiny: Tiny, random_ids: Any) -> None:
    engine = runs_ahead(tiny)
    engine.end_ids = frozenset()
    ids = random_ids(50)
    generation = engine.generate(ids)
    said = [next(generation).id for _ in range(5)]
    generation.close()
    assert only(engine).ids == ids + said
    again = engine.generate(ids + said)
    assert [next(again).id for _ in range(1)] and again.reused_tokens == 54


def test_seeds_give_the_same_answers_whatever_runs_beside(tiny: Tiny, random_ids: Any) -> None:
    engine = tiny(sequences=3)
    hot = [SamplingParams(temperature=1.0, seed=seed) for seed in (3, 4, 3)]
    runs = []
    for order in ((0, 1, 2), (2, 1, 0)):
        started: Started = []
        for which in order:
            sequence = engine.sequence()
            engine.prefill(sequence, random_ids(40))
            engine.step.start(sequence, 7, hot[which])
            started.append((sequence, []))
        follow(engine, started, 30)
        runs.append([started[i][1] for i in order])
        for sequence, _ in started:
            sequence.discard()
    assert runs[0] == runs[1]
    assert runs[0][0] == runs[0][2] != runs[0][1]


# Synthetic depth and shapes without weights


@pytest.mark.few("0-oct3", "193-bf16", "1900-oct2:oct4/oct3")
@pytest.mark.parametrize("kv", ["bf16", "oct3", "oct2:oct4/oct3"])
@pytest.mark.parametrize("length", [0, 10, 192, 193, 1900])
def test_fill(kv: str, length: int, tiny: Tiny) -> None:
    engine = tiny(kv, context=2000, sequences=2)
    sequences = [engine.sequence() for _ in range(2)]
    for seed, sequence in enumerate(reversed(sequences)):
        engine.fill(sequence, length, seed=seed)
    assert [len(sequence) for sequence in sequences] == [length, length]
    assert sequences[0].packed == max(0, (length - 128) // 64)
    held = engine.arena.pages[sequences[0].page_ids]
    assert len(held) == 0 or bool(held.any(-1).all())
    for sequence in sequences:
        engine.step.start(sequence, 5, GREEDY)
    for _ in range(3):
        engine.step.launch(sequences)
        assert all(0 <= engine.step.read(sequence)[0] < 260 for sequence in sequences)
        sequences.reverse()
    for sequence in sequences:
        sequence.close()
    generation = engine.generate([1, 2, 3], SamplingParams(max_tokens=2))
    assert len(list(generation)) <= 2 and generation.reused_tokens == 0


def test_fill_out_of_range(tiny: Tiny) -> None:
    engine = tiny()
    with pytest.raises(UsageError, match="depth is 501 tokens; give 0 to 500"):
        engine.fill(engine.sequence(), 501)


def test_random_weights(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint()
    engine = Engine.load("shape", random_weights=folder / "config.json", device="cpu", kv="octopus2", sequences=2)
    assert engine.name == "shape" and engine.plan.shape.sequences == 2
    assert engine.config == Engine.load("again", random_weights=engine.config, device="cpu", kv="octopus2").config
    assert len(answer(engine, [1, 2, 3], max_tokens=4)) == 4
    with pytest.raises(OctoError, match="no tokenizer"):
        engine.tokenizer.encode("text")
    with pytest.raises(UsageError, match=r"no config\.json, no folder with one and no shape"):
        Engine.load(random_weights=tmp_path / "nothing.json", device="cpu")
    with pytest.raises(UsageError, match="sequences is 65; give 1 to 64"):
        Engine.load(sequences=65, device="cpu")
