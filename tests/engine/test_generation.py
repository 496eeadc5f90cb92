"""Generation: why it ends, what fits, prefixes reused, interrupts, interleaving; and the codec in the path."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from octo_run.engine import Engine, Reply, SamplingParams
from octo_run.engine import engine as engine_module
from octo_run.engine.generation import PromptWatch
from octo_run.errors import OctoError, UsageError
from octo_run.kernels import step as ops
from octo_run.models import rope

from .conftest import only

Tiny = Callable[..., Engine]


def ids_of(engine: Engine, ids: list[int], **params: Any) -> list[int]:
    return [token.id for token in engine.generate(ids, SamplingParams(**params))]


def forget(engine: Engine) -> None:
    """Nothing can be reused any more."""
    if engine.arena.table.rows[0] is not None:
        only(engine).discard()


def more(engine: Engine, ids: list[int]) -> Tensor:
    """Append to the engine's only sequence; the last token's logits."""
    sequence = engine.arena.table.rows[0] or engine.sequence()
    logits = engine.prefill(sequence, ids)
    sequence.close()
    return logits


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


# Chunks, edges, reuse


@pytest.mark.few(1)
@pytest.mark.parametrize(("sink", "window"), [(64, 64), (0, 0), (5, 128), (200, 0)])
def test_plain_cache_chunks_equal_single_steps(sink: int, window: int, tiny: Tiny, random_ids: Any) -> None:
    engine = tiny(sink=sink, window=window)
    ids = random_ids(333)
    whole = tiny(sink=512).logits(ids)
    for step in (None, 200, 64, 13, 1):
        assert relative(engine.logits(ids, step), whole) < 1e-4, f"step {step}"


def test_a_reused_prefix_gives_the_logits_of_a_fresh_prefill(tiny: Tiny, random_ids: Any) -> None:
    """Cuts in the sinks, at page edges, inside pages, in the tail."""
    engine, fresh = tiny(), tiny()
    base, other = random_ids(340), random_ids(60, seed=1)
    for common in (0, 1, 30, 64, 65, 127, 128, 200, 256, 270, 339, 340):
        forget(engine)
        more(engine, base)
        ids = base[:common] + [256] + other
        generation = engine.generate(ids, SamplingParams(max_tokens=1))
        token = next(generation)
        expected = fresh.logits(ids)[-1]
        assert token.id == int(expected.argmax())
        assert token.logprob == pytest.approx(float(expected.log_softmax(-1)[token.id]), abs=1e-4)
        assert generation.reused_tokens == (common if common <= 64 or common >= 256 else common // 64 * 64)
        assert relative(more(engine, [1]), fresh.logits(ids + [1])[-1]) < 1e-4


def test_the_whole_prompt_again_computes_one_token(tiny: Tiny, random_ids: Any) -> None:
    engine = tiny()
    ids = random_ids(150)
    first = ids_of(engine, ids, max_tokens=5)
    generation = engine.generate(ids, SamplingParams(max_tokens=5))
    assert [token.id for token in generation] == first
    assert (generation.prompt_tokens, generation.reused_tokens, generation.generated_tokens) == (150, 149, 5)
    assert generation.prefill_seconds > 0 and generation.decode_seconds > 0


def test_generations_may_take_turns(tiny: Tiny, random_ids: Any) -> None:
    engine = tiny()
    a, b = random_ids(100, seed=1), random_ids(140, seed=2)
    alone = [ids_of(engine, ids, max_tokens=12) for ids in (a, b)]
    both = [engine.generate(ids, SamplingParams(max_tokens=12)) for ids in (a, b)]
    together: list[list[int]] = [[], []]
    for turn in range(12):
        for which in (0, 1):
            together[which].append(next(both[which]).id)
        if turn == 5:
            engine.logits(random_ids(30, seed=3))
    assert together == alone


def test_a_generation_whose_tokens_another_one_goes_on_from(tiny: Tiny, random_ids: Any) -> None:
    """It neither draws from the other one's sequence nor ends it."""
    engine, fresh = tiny(), tiny()
    engine.end_ids = fresh.end_ids = frozenset()
    first, rule = random_ids(80), SamplingParams(max_tokens=8, temperature=1.0, seed=5)
    one = engine.generate(first, rule)
    said = [next(one).id, next(one).id]
    second = [*first, said[0], 7, 8, 9]
    other = engine.generate(second, rule)
    answer = [next(other).id, next(other).id]
    assert other.reused_tokens == 81  # all that there was: the row goes on
    said += [next(one).id, next(one).id]
    answer += [token.id for token in other]
    said += [token.id for token in one]
    wanted = [[token.id for token in fresh.generate(ids, rule)] for ids in (first, second)]
    assert [said, answer] == wanted


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_an_exception_inside_the_layers_leaves_a_usable_engine(
    layer: int, failure: type[BaseException], tiny: Tiny, random_ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny()
    ids = random_ids(400)
    expected = engine.logits(ids)[-1]
    forget(engine)
    more(engine, ids[:150])
    mlp, calls = ops.swiglu, iter(range(100))

    def failing(*args: Any) -> None:
        if next(calls) == layer:
            raise failure
        mlp(*args)

    monkeypatch.setattr(ops, "swiglu", failing)
    with pytest.raises(failure):
        next(engine.generate(ids))
    monkeypatch.setattr(ops, "swiglu", mlp)
    assert only(engine).ids == ids[: len(only(engine))]
    generation = engine.generate(ids, SamplingParams(max_tokens=1))
    token = next(generation)
    assert generation.reused_tokens == 64
    assert token.logprob == pytest.approx(float(expected.log_softmax(-1)[token.id]), abs=1e-4)
    assert engine.arena.table.pool.free + only(engine).packed == engine.arena.pages.shape[0]


def test_an_exception_in_a_decode_step_costs_nothing(scripted: Any) -> None:
    engine, decoder = scripted()
    decoder.say(200, "a" * 30)
    generation = engine.generate([1] * 200)
    for _ in range(5):
        next(generation)
    decoder.fail_at = (204, 1)
    with pytest.raises(KeyboardInterrupt):
        next(generation)
    assert list(generation) == [] and generation.prefill_seconds > 0
    again = engine.generate([1] * 200 + [97] * 4 + [2])
    next(again)
    assert again.reused_tokens == 204


# Progress of the prompt


@pytest.mark.parametrize("ahead", [False, True])
def test_reading_a_prompt_is_told_chunk_by_chunk(ahead: bool, tiny: Tiny, random_ids: Any) -> None:
    """Chunks are of 512 tokens; steps are not told, nor what was reused."""
    engine = tiny(context=1300)
    engine.depth, engine.end_ids = 1 + ahead, frozenset()
    told: list[tuple[int, int]] = []
    ids = random_ids(1100)
    generation = engine.generate(ids, SamplingParams(max_tokens=5), lambda *figures: told.append(figures))
    assert told == []
    first = next(generation)
    assert told == [(0, 1100), (512, 1100), (1024, 1100), (1100, 1100)]
    answer = [first.id, *(token.id for token in generation)]
    assert len(told) == 4
    assert answer == ids_of(engine, ids, max_tokens=5), "telling changes no token"
    told.clear()
    ids += answer[:2] + random_ids(40, seed=1)
    generation = engine.generate(ids, SamplingParams(max_tokens=5), lambda *figures: told.append(figures))
    list(generation)
    fresh = len(ids) - generation.reused_tokens
    assert fresh < 100 and told == [(0, fresh), (fresh, fresh)]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_prompt_that_is_read_again_is_told_again(ahead: bool, kept: bool, tiny: Tiny, random_ids: Any) -> None:
    """Another text had its row: what its pages do not have is read again, all of it if others needed these, too."""
    engine = tiny(context=1300)
    engine.depth, engine.end_ids = 1 + ahead, frozenset()
    told: list[tuple[int, int]] = []
    generation = engine.generate(random_ids(600), None, lambda *figures: told.append(figures))
    next(generation)
    engine.logits(random_ids(30, seed=1))
    if not kept:
        engine.arena.table.kept.clear()
    told.clear()
    next(generation)
    assert told == ([(0, 89), (89, 89)] if kept else [(0, 601), (512, 601), (601, 601)])


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("at", [0, 512, 1024, 1100])
def test_an_exception_while_a_prompt_is_told_keeps_what_was_fed(
    at: int, ahead: bool, tiny: Tiny, random_ids: Any
) -> None:
    engine = tiny(context=1300)
    engine.depth, engine.end_ids = 1 + ahead, frozenset()
    ids = random_ids(1100)
    expected = next(engine.generate(ids))
    forget(engine)

    def told(read: int, _total: int) -> None:
        if read == at:
            raise KeyboardInterrupt

    generation = engine.generate(ids, None, told)
    with pytest.raises(KeyboardInterrupt):
        next(generation)
    assert list(generation) == [] and generation.prefill_seconds > 0
    assert only(engine).ids == ids[:at] and len(only(engine)) == at
    assert engine.arena.table.pool.free + only(engine).packed == engine.arena.pages.shape[0]
    again = engine.generate(ids)
    token = next(again)
    assert again.reused_tokens == min(at, 1099)
    assert token.id == expected.id and token.logprob == pytest.approx(expected.logprob, abs=1e-4)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("at", "read"), [(0, 0), (512, 512), (1024, 1024), (1100, 1100)])
def test_an_interrupted_prompt_counts_what_was_read(
    at: int, read: int, ahead: bool, tiny: Tiny, random_ids: Any
) -> None:
    engine = tiny(context=1300)
    engine.depth, engine.end_ids = 1 + ahead, frozenset()

    def told(count: int, _total: int) -> None:
        if count == at:
            raise KeyboardInterrupt

    answer = Reply(engine.generate(random_ids(1100), on_prompt=told))
    with pytest.raises(KeyboardInterrupt):
        next(answer)
    answer.close()
    assert (answer.prompt_tokens, answer.reused_tokens, answer.read_tokens) == (1100, 0, read)
    assert (answer.generated_tokens, answer.decoded_tokens, answer.decode_seconds) == (0, 0, 0.0)
    assert answer.prefill_seconds > 0 and answer.finish_reason == "interrupted"


def test_an_exception_inside_a_prompt_counts_the_chunks_before_it(scripted: Any) -> None:
    """In the third chunk, with nothing told to anybody; then the rest of the prompt is read and counted alone."""
    engine, decoder = scripted(context=1300)
    decoder.fail_at = (1050, 1)
    generation = engine.generate([1] * 1100)
    with pytest.raises(KeyboardInterrupt):
        next(generation)
    assert generation.read_tokens == 1024
    again = engine.generate([1] * 1100)
    next(again)
    assert again.read_tokens == 1100 - again.reused_tokens < 1100


def test_a_prompt_whose_logits_are_not_finite_was_read(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, decoder = scripted()
    monkeypatch.setattr(decoder, "logits", lambda hidden, out: out.fill_(torch.nan))
    generation = engine.generate([1] * 100)
    with pytest.raises(OctoError, match="not finite"):
        next(generation)
    assert (generation.read_tokens, generation.generated_tokens) == (100, 0)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_what_is_read_again_counts_as_read_and_not_as_decoded(
    ahead: bool, kept: bool, tiny: Tiny, random_ids: Any
) -> None:
    engine = tiny(context=1300)
    engine.depth, engine.end_ids = 1 + ahead, frozenset()
    generation = engine.generate(random_ids(600))
    for _ in range(3):
        next(generation)
    assert (generation.read_tokens, generation.decoded_tokens) == (600, 2)
    reading, decoding = generation.prefill_seconds, generation.decode_seconds
    engine.logits(random_ids(30, seed=1))
    if not kept:
        engine.arena.table.kept.clear()
    next(generation)
    read = 600 + (91 if kept else 603)
    assert (generation.read_tokens, generation.generated_tokens, generation.decoded_tokens) == (read, 4, 2)
    assert generation.decode_seconds == decoding and generation.prefill_seconds > reading
    next(generation)
    assert (generation.read_tokens, generation.decoded_tokens, generation.reused_tokens) == (read, 3, 0)
    assert generation.decode_seconds > decoding


def test_on_cuda_the_host_waits_one_chunk_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """With events that only say what is done with them: the device always has a chunk to work on meanwhile."""
    log: list[tuple[str, int]] = []

    class Event:
        def record(self, _stream: None) -> None:
            self.after = [count for what, count in log if what == "launched"][-1]

        def synchronize(self) -> None:
            log.append(("waited", self.after))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: None)

    def watched(*chunks: int) -> list[tuple[str, int]]:
        log.clear()
        watch = PromptWatch(lambda read, _total: log.append(("told", read)), chunks[-1], torch.device("cuda"))
        for fed in chunks:
            log.append(("launched", fed))
            watch.fed(fed)
        return list(log)

    assert watched(300) == [("told", 0), ("launched", 300)], "nobody waits for the last chunk"
    assert watched(512, 1024, 1100) == [
        *(("told", 0), ("launched", 512), ("launched", 1024)),
        *(("waited", 512), ("told", 512), ("launched", 1100)),
        *(("waited", 1024), ("told", 1024)),
    ]


# Ends


def test_ends_of_the_model_and_of_the_caller(scripted: Any) -> None:
    engine, decoder = scripted()
    decoder.say(10, "hello")
    tokens = list(engine.generate([1] * 10))
    assert [t.id for t in tokens] == [*b"hello", 257]
    assert [t.finish_reason for t in tokens] == [None] * 5 + ["stop"]
    assert list(engine.generate([1] * 10, SamplingParams(stop_ids=(ord("l"),))))[-1].id == ord("l")
    cut = list(engine.generate([1] * 10, SamplingParams(max_tokens=3)))
    assert [t.finish_reason for t in cut] == [None, None, "length"]
    both = list(engine.generate([1] * 10, SamplingParams(max_tokens=6)))
    assert both[-1].finish_reason == "stop"


@pytest.mark.few(2)
@pytest.mark.parametrize("context", [70, 128, 200, 257])
def test_as_many_tokens_as_fit_and_one_more(context: int, scripted: Any) -> None:
    """The last token needs no place: nothing follows it. The arena is full to the last token."""
    for prompt in (1, 60, context - 1, context):
        engine, decoder = scripted(context=context)
        decoder.say(prompt, [98] * 300)
        tokens = list(engine.generate([1] * prompt))
        assert len(tokens) == context - prompt + 1
        assert tokens[-1].finish_reason == "context"
        assert len(only(engine)) == context


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["bf16", "oct3"])
def test_full_context_of_a_real_model(kv: str, tiny: Tiny, random_ids: Any) -> None:
    engine = tiny(kv, context=200, sink=5, window=0)
    engine.end_ids = frozenset()
    assert len(ids_of(engine, random_ids(190))) == 11
    assert engine.logits(random_ids(200), 1).shape == (200, 260)


@pytest.mark.parametrize(
    ("ids", "text"),
    [([], "empty"), ([1] * 201, "201 tokens .* 200"), ([5, 260], "260 is not in the vocabulary"), ([-1], "-1 is not")],
)
def test_prompts_that_cannot_be_answered(ids: list[int], text: str, tiny: Tiny) -> None:
    engine = tiny(context=200)
    for call in (engine.generate, engine.logits, engine.logit_rows):
        with pytest.raises(UsageError, match=text):
            call(ids)


@pytest.mark.few(1)
@pytest.mark.parametrize("step", [None, 300, 64, 1])
def test_logits_in_blocks_are_the_logits(step: int | None, tiny: Tiny, random_ids: Any) -> None:
    engine = tiny("oct3", context=700)
    ids = random_ids(620)
    blocks = list(engine.logit_rows(ids, step))
    assert all(1 <= len(block) <= min(256, step or 512) for block in blocks)
    assert torch.equal(torch.cat(blocks), engine.logits(ids, step))
    sequence = engine.sequence()
    with torch.inference_mode():
        whole = torch.cat(
            [engine._logits(engine._forward(sequence, ids[i : i + (step or 512)])) for i in range(0, 620, step or 512)]
        )
    assert relative(torch.cat(blocks), whole) < 1e-5


def test_blocks_of_logits_have_a_sequence_of_their_own(tiny: Tiny, random_ids: Any) -> None:
    engine = tiny(sequences=2)
    ids = random_ids(200)
    whole = engine.logits(ids, 64)
    for other in (lambda: next(engine.generate([1, 2])), lambda: engine.logits([1, 2])):
        blocks = engine.logit_rows(ids, 64)
        read = [next(blocks)]
        other()
        assert torch.equal(torch.cat([*read, *blocks]), whole)
    alone = tiny()
    blocks = alone.logit_rows(ids, 64)
    next(blocks)
    with pytest.raises(OctoError, match="sequence"):
        alone.logits([1, 2])
    blocks.close()
    assert len(alone.logits([1, 2])) == 2


def test_logits_that_do_not_fit_are_refused(tiny: Tiny, random_ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny()
    ids = random_ids(300)
    needed = 4 * 260 * (300 + 256)
    monkeypatch.setattr(engine_module, "free_memory", lambda _device: needed)
    assert engine.logits(ids).shape == (300, 260)
    monkeypatch.setattr(engine_module, "free_memory", lambda _device: needed - 1)
    with pytest.raises(
        OctoError, match=r"^The logits of 300 tokens take 0\.00 GiB and cpu has 0\.00 GiB free: give .*\.$"
    ):
        engine.logits(ids)
    assert sum(len(block) for block in engine.logit_rows(ids)) == 300


@pytest.mark.parametrize("step", [0, -1, 201])
def test_steps_out_of_range(step: int, tiny: Tiny) -> None:
    with pytest.raises(UsageError, match="step"):
        tiny(context=200).logits([1, 2], step)


# Text


def reply(scripted: Any, said: str | bytes, **params: Any) -> tuple[Reply, list[str]]:
    engine, decoder = scripted()
    decoder.say(4, said)
    answer = Reply(engine.generate([1, 2, 3, 4], SamplingParams(**params)))
    return answer, list(answer)


def test_pieces_make_up_the_text(scripted: Any) -> None:
    answer, pieces = reply(scripted, "grüß dich 🐙!")
    assert "".join(pieces) == answer.text == "grüß dich 🐙!"
    assert "🐙" in pieces and "" not in pieces
    assert (answer.finish_reason, answer.generated_tokens) == ("stop", len("grüß dich 🐙!".encode()) + 1)


def test_half_a_character_at_the_end_is_replaced(scripted: Any) -> None:
    answer, _ = reply(scripted, b"ab\xf0\x9f")
    assert answer.text == "ab\ufffd"
    answer, _ = reply(scripted, b"ab\xf0\x9f\x90\x99", max_tokens=4)
    assert (answer.text, answer.finish_reason) == ("ab\ufffd", "length")


@pytest.mark.parametrize(
    ("said", "stop", "text"),
    [
        ("one END two", ("END",), "one "),
        ("one EN two", ("END",), "one EN two"),
        ("one EEND two", ("END",), "one E"),
        ("aabaabab", ("aabab",), "aab"),
        ("first.second", (".", "second"), "first"),
        ("xyz", ("yzz", "z"), "xy"),
        ("xyz", ("y", "xyz"), "x"),
        ("ENDless", ("END",), ""),
        ("the 🐙🐙 two", ("🐙🐙",), "the "),
        ("ends in EN", ("END",), "ends in EN"),
    ],
)
def test_stop_strings_across_pieces(said: str, stop: tuple[str, ...], text: str, scripted: Any) -> None:
    answer, pieces = reply(scripted, said, stop=stop)
    assert answer.text == "".join(pieces) == text
    assert answer.finish_reason == "stop"
    assert (answer.generated_tokens == len(said.encode()) + 1) == (text == said)


def test_a_stop_string_at_the_last_token_allowed(scripted: Any) -> None:
    answer, _ = reply(scripted, "abcd", stop=("cd",), max_tokens=4)
    assert (answer.text, answer.finish_reason) == ("ab", "stop")
    answer, _ = reply(scripted, "abcd", stop=("cde",), max_tokens=4)
    assert (answer.text, answer.finish_reason) == ("abcd", "length")


def test_closing_early(scripted: Any) -> None:
    engine, decoder = scripted()
    decoder.say(4, "hello world")
    answer = Reply(engine.generate([1, 2, 3, 4]))
    assert [next(answer) for _ in range(3)] == ["h", "e", "l"]
    answer.close()
    assert (answer.text, answer.finish_reason, list(answer)) == ("hel", "interrupted", [])
    whole = Reply(engine.generate([1, 2, 3, 4]))
    list(whole)
    whole.close()
    assert whole.finish_reason == "stop"


# The codec in the path


def test_corrupting_a_packed_page_changes_the_logits(tiny: Tiny, random_ids: Any) -> None:
    engine = tiny("oct3")
    ids = random_ids(300)
    k = engine.kv[0].k
    for byte in (0, 5 * k.bytes_per_vector + 3, k.block_bytes + 1):  # a key of the first token, of a later one, a value
        forget(engine)
        more(engine, ids)
        before = more(engine, [7])
        forget(engine)
        more(engine, ids)
        assert torch.equal(more(engine, [7]), before)
        forget(engine)
        more(engine, ids)
        with torch.inference_mode():
            engine.arena.layer_pages[0][only(engine).page_ids[1], 0, byte] ^= 0x55
        assert not torch.equal(more(engine, [7]), before)


def test_the_same_prompt_gives_the_same_bytes(tiny: Tiny, random_ids: Any) -> None:
    ids = random_ids(400)
    stores = []
    for _ in range(2):
        engine = tiny("oct3")
        for _ in range(2):
            list(engine.generate(ids, SamplingParams(max_tokens=40)))
            stores.append(engine.arena.pages[only(engine).page_ids].clone())
            forget(engine)
    assert stores[0].shape[0] == 4
    assert all(torch.equal(store, stores[0]) for store in stores)


@pytest.mark.few("oct3-full", "oct4:oct2-off", "oct4:oct2/oct2:octopus4-mean")
@pytest.mark.parametrize("conditioning", ["off", "mean", "full"])
@pytest.mark.parametrize("kv", ["oct3", "oct4:oct2", "oct2/oct3:oct4", "oct4:oct2/oct2:octopus4"])
def test_attention_of_a_step_is_that_over_the_decoded_pages(
    kv: str, conditioning: str, tiny: Tiny, random_ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model gets from the cache, against float64 attention over ``codec.decode`` of the pages' rows and the
    full-precision rest, everything in the original basis."""
    from octo_run import kernels

    engine = tiny(kv, conditioning=conditioning)
    more(engine, random_ids(300))
    calls: list[tuple[Tensor, Any, Tensor]] = []
    attend = kernels.attend

    def spy(q: Tensor, inputs: Any, fmt: Any, **options: Any) -> Tensor:
        out = attend(q, inputs, fmt, **options)
        calls.append((q.clone(), inputs, out.clone()))
        return out

    monkeypatch.setattr(kernels, "attend", spy)
    engine.step.start(only(engine), 9, SamplingParams())
    engine.step.launch([only(engine)])
    assert len(calls) == engine.config.num_layers
    for number, (q, inputs, out) in enumerate(calls):
        expected = attention_over_decoded(engine, number, inputs, q[0, 0])
        assert relative(engine.kv[number].v.unrotate(out[0, 0].double()), expected) < 1e-4


def attention_over_decoded(engine: Engine, number: int, inputs: Any, q: Tensor) -> Tensor:
    """Float64 attention ``[heads, d]`` of the stored query ``[heads, d]`` in the original basis (one KV head)."""
    fmt, arena, sequence = engine.kv[number], engine.arena, only(engine)
    pages = inputs.pages[inputs.page_table[0, : sequence.packed].long(), 0]
    packed_k, _ = (part.flatten(0, 1) for part in arena.page_formats[number].decode_rotated(pages, torch.float64))
    _, packed_v = (part.flatten(0, 1) for part in arena.page_formats[number].decode(pages, torch.float64))
    layer = engine.forward.decoder.layers[number]
    assert layer.attention.maps is not None
    of_q, of_k = (torch.linalg.inv(one[0].double()) for one in layer.attention.maps)
    packed_k = packed_k @ of_k
    if layer.attention.key_mean is not None:
        positions = arena.shape.sink + torch.arange(len(packed_k))
        cos, sin = rope.cos_sin(positions, engine.forward.decoder.inv_freq(0).double(), torch.float64)
        mean = layer.attention.key_mean.double().expand(len(packed_k), 1, -1)
        packed_k = packed_k + rope.apply(mean[None], cos[None], sin[None])[0, :, 0]
    count = len(sequence) - sequence.packed_end
    slots = (torch.arange(count) + 64 * sequence.packed) % arena.shape.ring
    keys, values = (
        torch.cat((back(sink[0, 0].double()), packed, back(tail)))
        for back, sink, packed, tail in (
            (lambda x: x @ of_k, inputs.sink_k, packed_k, inputs.tail_k[0, 0, slots].double()),
            (fmt.v.unrotate, inputs.sink_v, packed_v, inputs.tail_v[0, 0, slots].double()),
        )
    )
    assert len(keys) == len(sequence)
    scores = q.double() @ of_q @ keys.T * engine.config.head_dim**-0.5
    return scores.softmax(-1) @ values


# Loading


def test_load_from_a_folder(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = make_checkpoint()
    plans = []
    engine = Engine.load(path, kv="oct3", max_context=300, dtype="bfloat16", on_plan=plans.append, device="cpu")
    assert plans == [engine.plan]
    assert (engine.dtype, engine.max_context, engine.device.type) == (torch.bfloat16, 300, "cpu")
    assert engine.name == str(path)
    assert len(ids_of(engine, [5, 6, 7], max_tokens=4)) <= 4
    by_seed = [Engine.load(path, kv="oct3", device="cpu", seed=seed).logits([*range(250)], 50) for seed in (0, 0, 1)]
    assert torch.equal(by_seed[0], by_seed[1]) and not torch.equal(by_seed[0], by_seed[2])


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"kv": "octopus5"}, UsageError, "octopus5"),
        ({"kv": "oct3:oct3:bf16"}, UsageError, "too many parts"),
        ({"device": "gpu"}, UsageError, "There is no device 'gpu'"),
        ({"device": "cuda:"}, UsageError, "There is no device 'cuda:'"),
        ({"device": "cpu:1"}, UsageError, "There is no device 'cpu:1'"),
        ({"device": "cuda:99"}, OctoError, "sees [0-9]+ CUDA devices"),
        ({"dtype": "int8"}, UsageError, "There is no dtype 'int8'"),
        ({"dtype": torch.float64}, UsageError, "There is no dtype torch.float64"),
        ({"max_context": 2049}, UsageError, "2,049 tokens is beyond the model's: choose one of 2048"),
        ({"max_context": 0}, UsageError, "context is 0"),
        ({"sink": -1}, UsageError, "sink"),
        ({"window": 32}, UsageError, "window"),
    ],
)
def test_wrong_arguments_are_refused_before_any_weight_is_read(
    arguments: dict[str, Any],
    error: type[OctoError],
    text: str,
    make_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = make_checkpoint()
    (path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(error, match=text) as caught:
        Engine.load(path, **({"device": "cpu"} | arguments))
    assert str(caught.value).count("\n") == 0


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(OctoError):
        Engine.load(tmp_path, device="cpu")


def test_half_precision_that_overflows_is_explained(make_checkpoint: Callable[..., Path]) -> None:
    path = make_checkpoint(rms_norm_eps=1e-5)
    engine = Engine.load(path, kv="oct3", device="cpu", dtype="float16", max_context=300)
    with torch.inference_mode():
        engine.forward.decoder.layers[0].mlp.down.weight.mul_(torch.inf)
    with pytest.raises(OctoError, match="not finite"):
        next(engine.generate([5] * 10))
    with pytest.raises(OctoError, match="not finite"):
        next(engine.generate([5] * 250))
