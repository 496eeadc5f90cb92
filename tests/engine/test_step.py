"""Decode steps of several sequences, tokens drawn ahead of what was read: on the CPU, where nothing is recorded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from octo_run.engine import Engine, SamplingParams
from octo_run.engine.arena import length_bound
from octo_run.engine.step import AHEAD, batch_buckets
from octo_run.errors import OctoError, UsageError

Tiny = Callable[..., Engine]
GREEDY = SamplingParams()


def answer(engine: Engine, ids: list[int], **params: Any) -> list[int]:
    return [token.id for token in engine.generate(ids, SamplingParams(**params))]


def begin(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """Fill the sequences; the first token of each answer."""
    return [[int(engine.prefill(ids, seq).argmax())] for seq, ids in enumerate(prompts)]


def follow(engine: Engine, answers: list[list[int]], count: int, ahead: int = 2) -> None:
    """Append ``count`` tokens to each answer."""
    launched = 0
    for taken in range(count):
        while launched < min(count, taken + ahead):
            engine.step.launch()
            launched += 1
        for tokens, (token, _) in zip(answers, engine.step.read(), strict=True):
            tokens.append(token)


def test_buckets() -> None:
    assert batch_buckets(1) == [1]
    assert batch_buckets(6) == [1, 2, 4, 6]
    assert batch_buckets(64) == [1, 2, 4, 8, 16, 32, 64]
    assert [length_bound(n, 5000) for n in (1, 1024, 1025, 2048, 4097, 5000)] == [1024, 1024, 2048, 2048, 5000, 5000]
    assert length_bound(7, 500) == 500


@pytest.mark.parametrize("kv", ["bf16", "octopus3"])
def test_sequences_of_different_lengths_answer_as_if_alone(kv: str, tiny: Tiny, random_ids: Any) -> None:
    """Across several pages of each, at different steps."""
    prompts = [random_ids(130), random_ids(5, seed=1), random_ids(300, seed=2)]
    alone, engine = tiny(kv), tiny(kv, sequences=3)
    alone.end_ids = frozenset()
    answers = begin(engine, prompts)
    engine.step.start([tokens[0] for tokens in answers], [GREEDY] * 3)
    follow(engine, answers, 150)
    assert answers == [answer(alone, ids, max_tokens=151) for ids in prompts]
    assert engine.arena.length == [130 + 150, 5 + 150, 300 + 150]


def test_sequences_that_rest_keep_what_they_hold(tiny: Tiny, random_ids: Any) -> None:
    """Three run in a bucket of four; the fourth, whose ring is full, is written to by nobody."""
    engine, alone = tiny(sequences=4), tiny()
    alone.end_ids = frozenset()
    prompts = [random_ids(20 + i, seed=i) for i in range(3)] + [random_ids(64 + 128, seed=9)]
    answers = begin(engine, prompts)
    for batch in (3, 1, 4):
        engine.step.start([tokens[-1] for tokens in answers[:batch]], [GREEDY] * batch)
        follow(engine, answers[:batch], 9)
    assert [len(tokens) for tokens in answers] == [28, 19, 19, 10]
    assert answers == [answer(alone, ids, max_tokens=len(tokens)) for ids, tokens in zip(prompts, answers, strict=True)]


def test_what_was_not_read_is_taken_back(tiny: Tiny, random_ids: Any) -> None:
    """Also when a page was coded for a step that is taken back."""
    ids = random_ids(64 + 128 - 3)
    engine, alone = tiny("octopus3"), tiny("octopus3")
    alone.end_ids = frozenset()
    answers = begin(engine, [ids])
    engine.step.start(answers[0], [GREEDY])
    follow(engine, answers, 2, ahead=2)
    for _ in range(3):
        engine.step.launch()
    assert engine.arena.packed(0) == 1
    engine.step.cancel()
    assert engine.arena.length == [len(ids) + 2]
    engine.step.start(answers[0][-1:], [GREEDY])
    follow(engine, answers, 70, ahead=AHEAD)
    assert answers == [answer(alone, ids, max_tokens=73)]


def test_misuse_is_refused(tiny: Tiny, random_ids: Any) -> None:
    engine = tiny(context=70, sequences=2)
    with pytest.raises(UsageError, match="3 sequences were asked for; the engine was loaded for 1 to 2"):
        engine.step.start([1, 2, 3], [GREEDY] * 3)
    engine.prefill(random_ids(60))
    with pytest.raises(UsageError, match="start the steps first"):
        engine.step.launch()
    engine.step.start([5], [GREEDY])
    with pytest.raises(UsageError, match="no step to read"):
        engine.step.read()
    for _ in range(AHEAD):
        engine.step.launch()
    with pytest.raises(UsageError, match=f"{AHEAD} steps are launched and unread"):
        engine.step.launch()
    assert len([engine.step.read() for _ in range(AHEAD)]) == AHEAD
    for _ in range(2):
        engine.step.launch()
    with pytest.raises(UsageError, match="context of 70 tokens"):
        engine.step.launch()
    with pytest.raises(UsageError, match="no sequence 2"):
        engine.prefill([1], 2)
    with pytest.raises(UsageError, match="Sequence 0 holds 68 tokens: 3 more do not fit"):
        engine.prefill([1, 2, 3])


def test_logits_that_are_not_finite_are_an_error(tiny: Tiny) -> None:
    engine = tiny()
    engine.prefill([1, 2])
    with torch.inference_mode():
        engine._decoder.final_norm.fill_(torch.nan)
    engine.step.start([5], [GREEDY])
    engine.step.launch()
    with pytest.raises(OctoError, match="logits are not finite"):
        engine.step.read()


# Generation that runs ahead


def runs_ahead(tiny: Tiny, *args: Any, **options: Any) -> Engine:
    engine = tiny(*args, **options)
    engine.ahead = True
    return engine


def test_an_answer_ahead_is_the_answer(tiny: Tiny, random_ids: Any) -> None:
    """Ends by count, by context, by a stop token; the cache then holds what it would without running ahead."""
    engine, plain = runs_ahead(tiny, "octopus3", context=400), tiny("octopus3", context=400)
    engine.end_ids = plain.end_ids = frozenset()
    ids = random_ids(250)
    full = answer(plain, ids)
    assert answer(engine, ids) == full and len(full) == 151
    assert engine.arena.length[0] == plain.arena.length[0] == 400
    stop = full[40]
    for params in ({"max_tokens": 1}, {"max_tokens": 77}, {"stop_ids": (stop,)}):
        wanted, got = answer(plain, ids, **params), answer(engine, ids, **params)
        assert got == wanted
        assert engine._ids == plain._ids and engine.arena.length == plain.arena.length
        assert engine.arena.packed(0) - plain.arena.packed(0) in (0, 1)


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
    assert engine._ids == ids + said[:4] and engine.arena.length[0] == 54
    again = engine.generate(ids + said)
    assert [next(again).id for _ in range(1)] and again.reused_tokens == 54


def test_seeds_give_the_same_answers_whatever_runs_beside(tiny: Tiny, random_ids: Any) -> None:
    engine = tiny(sequences=3)
    hot = [SamplingParams(temperature=1.0, seed=seed) for seed in (3, 4, 3)]
    runs = []
    for order in ((0, 1, 2), (2, 1, 0)):
        for seq in range(3):
            engine.arena.truncate(seq, 0)
            engine.prefill(random_ids(40), seq)
        engine.step.start([7, 7, 7], [hot[i] for i in order])
        answers: list[list[int]] = [[], [], []]
        follow(engine, answers, 30)
        runs.append([answers[i] for i in order])
    assert runs[0] == runs[1]
    assert runs[0][0] == runs[0][2] != runs[0][1]


# Synthetic depth and shapes without weights


@pytest.mark.parametrize("kv", ["bf16", "octopus3"])
@pytest.mark.parametrize("length", [0, 10, 192, 193, 1900])
def test_fill(kv: str, length: int, tiny: Tiny) -> None:
    engine = tiny(kv, context=2000, sequences=2)
    for seq in (1, 0):
        engine.fill(seq, length, seed=seq)
    arena = engine.arena
    assert arena.length == [length, length]
    assert arena.packed(0) == max(0, (length - 128) // 64)
    held = arena.pages[arena.page_ids(0)]
    assert len(held) == 0 or bool(held.any(-1).all())
    engine.step.start([5, 6], [GREEDY] * 2)
    for _ in range(3):
        engine.step.launch()
        assert all(0 <= token < 260 for token, _ in engine.step.read())
    list(engine.generate([1, 2, 3], SamplingParams(max_tokens=2)))
    assert engine.arena.length[0] <= 5


def test_fill_out_of_range(tiny: Tiny) -> None:
    with pytest.raises(UsageError, match="depth is 501 tokens; give 0 to 500"):
        tiny().fill(0, 501)
    with pytest.raises(UsageError, match="no sequence 1"):
        tiny().fill(1, 5)


def test_random_weights(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint()
    engine = Engine.load("shape", random_weights=folder / "config.json", device="cpu", kv="octopus2", sequences=2)
    assert engine.name == "shape" and engine.plan.shape.sequences == 2
    assert engine.config == Engine.load("again", random_weights=engine.config, device="cpu", kv="octopus2").config
    assert len(answer(engine, [1, 2, 3], max_tokens=4)) == 4
    with pytest.raises(OctoError, match="no tokenizer"):
        engine.tokenizer.encode("text")
    with pytest.raises(UsageError, match="no file"):
        Engine.load(random_weights=tmp_path / "nothing.json", device="cpu")
    with pytest.raises(UsageError, match="sequences is 65; give 1 to 64"):
        Engine.load(sequences=65, device="cpu")
