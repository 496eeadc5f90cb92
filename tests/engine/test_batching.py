"""Many prompts at once: answers as if alone, prompts that join and leave, pages that run out, what is shared."""

from collections.abc import Callable
from typing import Any

import pytest

from octo_run.engine import Completion, Engine, SamplingParams
from octo_run.errors import OctoError, UsageError

Tiny = Callable[..., Engine]


def endless(engine: Engine) -> Engine:
    engine.end_ids = frozenset()
    return engine


def alone(engine: Engine, prompt: list[int], params: SamplingParams) -> list[int]:
    for sequence in engine.arena.table.rows:
        if sequence is not None:
            sequence.discard()
    return [token.id for token in engine.generate(prompt, params)]


def nothing_is_left(engine: Engine) -> bool:
    """Whether nobody holds a row for good."""
    return all(sequence is None or not sequence.pinned for sequence in engine.arena.table.rows)


@pytest.mark.few("2-oct2:oct4/oct3")
@pytest.mark.parametrize("kv", ["bf16", "oct3", "oct2:oct4/oct3"])
@pytest.mark.parametrize("ahead", [1, 2])
def test_answers_are_those_of_prompts_alone(kv: str, ahead: int, tiny: Tiny, random_ids: Any) -> None:
    # The seeds are such that no code of a key is a near tie: products of several rows round otherwise than of one.
    prompts = [random_ids(count, seed) for seed, count in enumerate((3, 200, 70, 400, 1, 129, 30), 100)]
    rules = [SamplingParams(max_tokens=5 + 9 * i, temperature=i % 2, seed=i) for i in range(7)]
    engine = endless(tiny(kv, sequences=3))
    engine.depth = ahead
    done = list(engine.generate_batch(prompts, rules))
    assert sorted(one.index for one in done) == list(range(7))
    assert done[0].index != 6 and all(isinstance(one, Completion) for one in done)
    other = endless(tiny(kv))
    for one in done:
        assert one.ids == alone(other, prompts[one.index], rules[one.index]), one.index
        assert (one.finish_reason, one.prompt_tokens) == ("length", len(prompts[one.index]))
        assert one.text == "".join(token.text for token in other.generate(prompts[one.index], rules[one.index]))
    assert nothing_is_left(engine)


def test_prompts_are_read_together(scripted: Any) -> None:
    """In one pass through the layers, as many tokens as a chunk holds; a longer prompt is read in parts."""
    engine, script = scripted(context=500, sequences=4)
    passes: list[list[int]] = []
    whole = script.chunks
    script.chunks = lambda chunks: (passes.append([chunk.count for chunk in chunks]), whole(chunks))[1]
    prompts = [[i] * count for i, count in enumerate((100, 200, 120, 300))]
    assert len(list(engine.generate_batch(prompts, SamplingParams(max_tokens=2)))) == 4
    assert passes == [[100, 200, 120, 80], [220]]


@pytest.mark.few("oct3")
@pytest.mark.parametrize("kv", ["bf16", "oct3", "oct2:oct4/oct3"])
def test_requests_wait_when_pages_run_out(kv: str, tiny: Tiny, random_ids: Any) -> None:
    """Four sequences of six pages each in a pool of eight: some wait again, and say the same in the end."""
    prompts = [random_ids(count, seed) for seed, count in enumerate((150, 180, 160, 140, 170))]
    rule = SamplingParams(max_tokens=230)
    engine = endless(tiny(kv, context=460, sequences=4, sink=16, window=64, pages=8))
    put_back: list[int] = []
    from octo_run.engine import batching

    whole = batching._Scheduler._put_back

    def counted(self: Any, request: Any) -> None:
        put_back.append(request.index)
        whole(self, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching._Scheduler, "_put_back", counted)
        done = {one.index: one for one in engine.generate_batch(prompts, rule)}
    assert put_back and sorted(done) == list(range(5))
    other = endless(tiny(kv, context=460, sink=16, window=64))
    for index, one in done.items():
        if kv == "bf16" or index not in put_back:  # who waited reads coded keys where it had read them as they were
            assert one.ids == alone(other, prompts[index], rule), index
        assert (len(one.ids), one.finish_reason) == (230, "length")
    assert nothing_is_left(engine) and engine.arena.table.room() == 8


@pytest.mark.parametrize("kv", ["oct3", "oct2:oct4/oct3"])
def test_a_common_beginning_is_read_once(kv: str, tiny: Tiny, random_ids: Any) -> None:
    engine = endless(tiny(kv, sequences=4))
    common = random_ids(320)
    prompts = [common + random_ids(20, seed) for seed in (1, 2, 3)] + [random_ids(100, 4)]
    done = {one.index: one for one in engine.generate_batch(prompts, SamplingParams(max_tokens=30))}
    assert done[0].reused_tokens == done[3].reused_tokens == 0
    assert min(done[1].reused_tokens, done[2].reused_tokens) >= 256
    same = [random_ids(90, 9)] * 3
    done = {one.index: one for one in engine.generate_batch(same, SamplingParams(max_tokens=30))}
    assert done[0].ids == done[1].ids == done[2].ids and done[2].reused_tokens >= 64


def test_reasons_to_end(scripted: Any) -> None:
    engine, script = scripted(context=200, sequences=4)
    script.say(4, "abcdef")
    prompts = [[1, 2, 3, 4], "xyz", [5] * 4, [6] * 200]
    rules = [SamplingParams(), SamplingParams(stop=("cd",)), SamplingParams(max_tokens=3), SamplingParams()]
    done = {one.index: one for one in engine.generate_batch(prompts, rules)}
    assert [(one.text, one.finish_reason) for _, one in sorted(done.items())][:3] == [
        ("abcdef", "stop"),
        ("ab", "stop"),
        ("abc", "length"),
    ]
    assert done[3].finish_reason in ("stop", "context") and len(done[3].ids) == 1


def test_nothing_is_held_when_it_is_left_early(scripted: Any) -> None:
    engine, script = scripted(context=300, sequences=2)
    script.say(4, "a" * 100)
    prompts = [[i] * 4 for i in range(5)]
    answers = engine.generate_batch(prompts, SamplingParams(max_tokens=10))
    next(answers)
    answers.close()
    assert nothing_is_left(engine)
    script.fail_at = (3, 0)
    with pytest.raises(script.failure):
        list(engine.generate_batch([[7] * 9, [8] * 9], SamplingParams(max_tokens=10)))
    assert nothing_is_left(engine)
    assert len(list(engine.generate_batch(prompts, SamplingParams(max_tokens=10)))) == 5


def test_others_that_have_all_sequences_are_told_not_waited_for(tiny: Tiny, random_ids: Any) -> None:
    """Sequences by hand, or a batch that waits to be read, which goes on then."""
    engine, prompts = tiny(sequences=2), [random_ids(30, seed=seed) for seed in range(4)]
    engine.end_ids = frozenset()
    alone = [done.ids for done in engine.generate_batch(prompts, SamplingParams(max_tokens=4))]
    rules = [SamplingParams(max_tokens=count) for count in (4, 9, 9, 4)]
    first = engine.generate_batch(prompts, rules)
    found = [next(first)]
    with engine.sequence(), pytest.raises(OctoError, match="All 2 sequences"):
        next(engine.generate_batch(prompts))
    found += first
    by_index = {done.index: done.ids for done in found}
    assert [by_index[0], by_index[1][:4], by_index[2][:4], by_index[3]] == alone


def test_a_generation_that_was_left_ends_beside_a_batch(tiny: Tiny, random_ids: Any) -> None:
    """The batch goes on in the row that it had; so does whatever else a program closes late, or Python by itself."""
    engine, ids = tiny(sequences=2), random_ids(90)
    engine.end_ids = frozenset()
    left = engine.generate(ids, SamplingParams(max_tokens=9))
    next(left)
    alone = [token.id for token in tiny().generate([*ids, 1, 2], SamplingParams(max_tokens=9))]
    rules = [SamplingParams(max_tokens=count) for count in (9, 3)]
    answers = engine.generate_batch([[*ids, 1, 2], random_ids(20, seed=1)], rules)
    assert next(answers).index == 1
    left.close()
    assert next(answers).ids == alone


def test_prompts_and_parameters_are_checked_before_anything_runs(tiny: Tiny) -> None:
    engine = tiny(context=100)
    assert list(engine.generate_batch([])) == []
    for prompts, text in (([[1], []], "Prompt 1: The prompt is empty"), ([[1] * 101], "Prompt 0: The prompt has 101")):
        with pytest.raises(UsageError, match=text):
            engine.generate_batch(prompts)
    with pytest.raises(UsageError, match="2 prompts were given, and sampling parameters for 1"):
        engine.generate_batch([[1], [2]], [SamplingParams()])
