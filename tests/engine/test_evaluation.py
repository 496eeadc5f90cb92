"""Measurements of quality: what is scored, how sure it is, where needles stand, which answers count."""

import math
import random
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from octo_run.engine import Engine, SamplingParams
from octo_run.engine.evaluation import needle, perplexity, reading, tasks
from octo_run.engine.evaluation.figure import check_figure_path
from octo_run.engine.evaluation.perplexity import windows
from octo_run.engine.evaluation.plots import plot_perplexity, plot_recall
from octo_run.engine.evaluation.reading import Reader
from octo_run.engine.evaluation.statistics import standard_error, wilson
from octo_run.engine.window_pages import WindowPages
from octo_run.errors import OctoError, UsageError
from octo_run.models.cache import DEMO_PATH
from octo_run.tokenizer import load_tokenizer

PROSE = "The boats left at dawn. Gulls followed them out to sea! Was it cold? It was, and nobody spoke of it. " * 6


# Statistics


def test_wilson_gives_the_published_values() -> None:
    """Newcombe (1998), table I, method 3."""
    for successes, trials, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20)[1] == 1.0 and wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="no share"):
        wilson(3, 2)


def test_standard_error_of_independent_and_of_repeated_values() -> None:
    values = torch.randn(64 * 400, generator=torch.Generator().manual_seed(0))
    assert standard_error(values) == pytest.approx(1 / math.sqrt(len(values)), rel=0.15)
    repeated = values[: 64 * 40].repeat_interleave(10)  # ten equal neighbours: a tenth of the observations
    assert standard_error(repeated) == pytest.approx(math.sqrt(10 / len(repeated)), rel=0.25)
    assert standard_error(torch.ones(1)) is None and standard_error(torch.ones(2)) == 0.0


# Windows


@settings(deadline=None, max_examples=200)
@given(st.integers(2, 300), st.integers(3, 64), st.integers(1, 63), st.booleans())
def test_every_token_is_scored_once_with_a_past(tokens: int, context: int, stride: int, begin: bool) -> None:
    room = context - begin
    if tokens < room or stride >= context:
        with pytest.raises(UsageError):
            windows(tokens, context, stride, begin=begin)
        return
    found = windows(tokens, context, stride, begin=begin)
    assert [i for w in found for i in range(w.first, w.end)] == list(range(0 if begin else 1, tokens))
    for w in found:
        assert w.end - w.start == room and w.start >= 0
        assert w.first - w.start + begin >= 1  # something comes before the first that is scored
    for w in found[1:]:
        assert w.first - w.start + begin >= context - stride


def test_windows_say_what_is_wrong() -> None:
    with pytest.raises(UsageError, match="A text has 99 tokens and a window of --ctx 128 takes 127"):
        windows(99, 128, 64, begin=True)
    with pytest.raises(UsageError, match="--stride is 128 and the context 128: give 1 to 127"):
        windows(500, 128, 128, begin=True)


# Perplexity


@pytest.mark.slow
def test_the_perplexity_is_that_of_transformers(demo: Callable[..., Engine]) -> None:
    """The same windows, scored by an independent implementation: within 0.1 %."""
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(DEMO_PATH)
    ids = tokenizer.encode(PROSE + "The keeper wrote eleven letters, and in none of them did he blame the bird.")[:230]
    places = windows(len(ids), 128, 64, begin=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_PATH, dtype=torch.float32).eval()
    losses = []
    with torch.inference_mode():
        for w in places:
            fed = torch.tensor([[tokenizer.bos_id, *ids[w.start : w.end]]])
            logprobs = model(fed).logits[0].log_softmax(-1)
            for index in range(w.first, w.end):
                losses.append(-float(logprobs[index - w.start, ids[index]]))
    assert len(losses) == len(ids)
    load: Callable[[str], Engine] = lambda kv: Engine.load("octo-demo", kv=kv, device="cpu", max_context=128)  # noqa: E731
    (row,) = perplexity.evaluate(load, ["bf16"], [ids], stride=64, step=17)
    assert row.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-3)
    assert (row.tokens, row.delta_percent, row.kl_mean, row.top1_agreement) == (len(ids), 0, 0, 1)


def test_rows_against_a_direct_computation(tiny: Callable[..., Engine], random_ids: Callable[..., list[int]]) -> None:
    ids = random_ids(255)
    first, row = perplexity.evaluate(lambda kv: tiny(kv, context=256), ["octopus2", "bf16"], [ids], stride=100)
    fed, targets = [256, *ids[:-1]], torch.tensor(ids)
    exact, coded = (tiny(kv, context=256).logits(fed, 64).double().log_softmax(-1) for kv in ("bf16", "octopus2"))
    losses = [-x.gather(1, targets[:, None])[:, 0] for x in (exact, coded)]
    kl = (exact.exp() * (exact - coded)).sum(-1)
    assert (first.kv, row.kv) == ("bf16", "octopus2")
    assert first.perplexity == pytest.approx(float(losses[0].mean().exp()), rel=1e-5)
    change = 100 * (float((losses[1] - losses[0]).mean().exp()) - 1)
    assert row.delta_percent == pytest.approx(change, abs=2e-4) and change != 0
    assert row.delta_stderr is not None and 0 < row.delta_stderr < 1
    assert row.kl_mean == pytest.approx(float(kl.mean()), rel=1e-2)
    assert row.kl_p99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-2)
    assert row.top1_agreement == pytest.approx(float((exact.argmax(-1) == coded.argmax(-1)).double().mean()))
    assert row.bytes_per_token < first.bytes_per_token


@pytest.fixture
def vocabulary_bytes() -> Any:
    """A dispatch mode whose ``most`` is the largest sum of bytes of tensors ``[..., vocab]`` that lived together."""

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self._held: dict[int, tuple[StorageWeakRef, int]] = {}
            self.most = 0

        def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            for x in made if isinstance(made, (tuple, list)) else [made]:
                if isinstance(x, torch.Tensor) and x.is_floating_point() and x.shape[-1:] == (260,):
                    storage = x.untyped_storage()
                    self._held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
            self.most = max(self.most, sum(count for _, count in self._held.values()))
            return made

    return Watch()


@pytest.mark.slow
def test_logits_are_held_of_a_few_tokens_only(
    tiny: Callable[..., Engine], random_ids: Callable[..., list[int]], vocabulary_bytes: Any
) -> None:
    """4,000 tokens in windows of 128: what is held of the vocabulary's size is of a few windows, however long the text.

    The engines' own weights and buffers of that size are not counted: they are made outside.
    """
    engines = {kv: tiny(kv, context=128) for kv in ("bf16", "oct4")}
    ids = random_ids(4000)
    with vocabulary_bytes as watch:
        rows = list(perplexity.evaluate(engines.__getitem__, ["oct4"], [ids], stride=120, step=64))
    assert [row.tokens for row in rows] == [4000, 4000]
    window = 4 * 128 * 260
    assert window / 4 < watch.most <= 6 * window


def test_slices_of_logits_are_as_large_as_they_may_be(
    tiny: Callable[..., Engine], random_ids: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    made = Reader.logits
    monkeypatch.setattr(Reader, "logits", lambda self, hidden: sizes.append(len(hidden)) or made(self, hidden))
    ids = random_ids(400)

    def rows() -> list[perplexity.Row]:
        sizes.clear()
        return perplexity.evaluate(lambda kv: tiny(kv, context=128, sequences=3), ["oct4"], [ids], stride=100)

    whole = rows()
    assert max(sizes) == 127 + 2 * 100  # of three windows, what is scored
    monkeypatch.setitem(reading.SLICE_BYTES, "cpu", 50 * 16 * 260)
    for cut, row in zip(rows(), whole, strict=True):
        assert (cut.perplexity, cut.kl_mean, cut.kl_p99) == pytest.approx(
            (row.perplexity, row.kl_mean, row.kl_p99), rel=1e-4, abs=1e-7
        )
    assert max(sizes) == 50


@pytest.fixture(scope="module")
def token_by_token(tiny: Callable[..., Engine], random_ids: Callable[..., list[int]]) -> tuple[Any, Tensor, Tensor]:
    """Two texts; losses and divergences ``[formats, n]`` of windows of 256 tokens, 200 apart, read one by one."""
    texts = [random_ids(420), random_ids(300, seed=1)]
    found = []
    for text in texts:
        for place in windows(len(text), 256, 200, begin=True):
            ids = [256, *text[place.start : place.end]]
            targets = torch.tensor(ids[1:])[place.first - place.end :]
            exact, *coded = (
                tiny(kv, context=256).logits(ids[:-1], 1)[place.first - place.end :].double().log_softmax(-1)
                for kv in ("bf16", "oct2", "oct3")
            )
            losses = [-x.gather(1, targets[:, None])[:, 0] for x in (exact, *coded)]
            kl = [(exact.exp() * (exact - x)).sum(-1) for x in (exact, *coded)]
            found.append(torch.stack((torch.stack(losses), torch.stack(kl))))
    return texts, *torch.cat(found, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "sequences"), [(1, 4), (30, 1), (64, 3), (None, 1), (None, 3)])
def test_figures_do_not_depend_on_what_is_read_at_once(
    step: int | None, sequences: int, tiny: Callable[..., Engine], token_by_token: tuple[Any, Tensor, Tensor]
) -> None:
    """One window at a time or several, by one token, by many, or whole."""
    texts, losses, kl = token_by_token
    load = lambda kv: tiny(kv, context=256, sequences=sequences)  # noqa: E731
    rows = perplexity.evaluate(load, ["oct2", "oct3"], texts, stride=200, step=step)
    for row, loss, divergence in zip(rows, losses, kl, strict=True):
        assert row.tokens == 720 and not row.partial
        assert row.perplexity == pytest.approx(float(loss.mean().exp()), rel=1e-4)  # a code may change
        assert row.stderr == pytest.approx(row.perplexity * (standard_error(loss) or 0), rel=1e-3)
        assert row.kl_mean == pytest.approx(float(divergence.mean()), rel=1e-3, abs=1e-9)
        change = standard_error(loss - losses[0]) or 0
        assert row.delta_stderr == pytest.approx(100 * (1 + row.delta_percent / 100) * change, rel=1e-2, abs=1e-9)


@pytest.mark.slow
def test_windows_longer_than_a_chunk(tiny: Callable[..., Engine], random_ids: Callable[..., list[int]]) -> None:
    """Several of them, each in three passes through the layers, against a page at a time."""
    ids = random_ids(1900)
    engines = {kv: tiny(kv, context=1100) for kv in ("bf16", "octopus2")}
    places = windows(1900, 1100, 500, begin=True)
    assert len(places) == 3 and engines["bf16"].plan.shape.chunk == 512
    losses: dict[str, list[Tensor]] = {kv: [] for kv in engines}
    for place in places:
        fed = [256, *ids[place.start : place.end]]
        targets = torch.tensor(ids[place.first : place.end])
        for kv, engine in engines.items():
            logits = engine.logits(fed[:-1], 64)[place.first - place.end :].double().log_softmax(-1)
            losses[kv].append(-logits.gather(1, targets[:, None])[:, 0])
    for row in perplexity.evaluate(engines.__getitem__, ["octopus2"], [ids], stride=500):
        assert row.perplexity == pytest.approx(float(torch.cat(losses[row.kv]).mean().exp()), rel=1e-5)
        assert (row.tokens, row.partial) == (1900, False)
    assert row.delta_percent != 0


@pytest.mark.slow
def test_formats_that_do_not_fit_together_follow_each_other(
    tiny: Callable[..., Engine], random_ids: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def figures() -> list[tuple[Any, ...]]:
        rows = perplexity.evaluate(lambda kv: tiny(kv, context=128), ["oct4", "oct2"], [random_ids(300)], stride=64)
        return [(row.kv, row.perplexity, row.delta_percent, row.kl_mean, row.partial) for row in rows]

    together = figures()
    monkeypatch.setattr(reading, "free_memory", lambda _device: 0)
    assert figures() == together and [row[0] for row in together] == ["bf16", "oct4", "oct2"]


@pytest.mark.slow
def test_what_is_done_is_kept_whatever_comes_in_between(
    tiny: Callable[..., Engine], random_ids: Callable[..., list[int]]
) -> None:
    """And it is what all formats have read: never a window of one that another lacks."""
    ids = random_ids(700)
    comparison = perplexity.Comparison(
        lambda kv: tiny(kv, context=128, sequences=2), ["oct4", "oct2"], [ids], stride=100
    )
    assert comparison.rows() == [] and comparison.tokens == 0
    seen = set()
    for state in comparison.run():
        rows = comparison.rows()
        assert 0 <= state.done <= state.to_do and len({row.tokens for row in rows}) <= 1
        seen |= {row.tokens for row in rows}
        assert all(row.partial == (row.tokens < 700) for row in rows)
        if seen == {127 + 100, 127 + 3 * 100}:
            break
    assert comparison.tokens == 700
    short = perplexity.evaluate(lambda kv: tiny(kv, context=128), ["oct4", "oct2"], [ids[:427]], stride=100)
    for row, wanted in zip(comparison.rows(), short, strict=True):
        assert row.partial and not wanted.partial and row.tokens == wanted.tokens == 427
        assert row.perplexity == pytest.approx(wanted.perplexity, rel=1e-5)
        assert row.kl_mean == pytest.approx(wanted.kl_mean, rel=1e-3, abs=1e-9)


@pytest.mark.slow
def test_progress_ends_at_the_end(
    tiny: Callable[..., Engine], random_ids: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for free in (2**40, 0):
        monkeypatch.setattr(reading, "free_memory", lambda _device, free=free: free)
        comparison = perplexity.Comparison(lambda kv: tiny(kv, context=128), ["oct4"], [random_ids(300)], stride=64)
        states = [(state.done, state.to_do) for state in comparison.run()]
        assert states[0][0] == 0 and states[-1][0] == states[-1][1]
        assert [done for done, _ in states] == sorted(done for done, _ in states)


def test_steps_that_are_too_long_are_refused(tiny: Callable[..., Engine], random_ids: Callable[..., list[int]]) -> None:
    load = lambda kv: tiny(kv, context=128)  # noqa: E731
    for step in (0, 129):
        with pytest.raises(UsageError, match=f"--step is {step}; give 1 to 128 tokens"):
            perplexity.evaluate(load, ["oct4"], [random_ids(300)], stride=64, step=step)


@pytest.mark.slow
def test_a_corrupt_page_raises_the_perplexity(demo: Callable[..., Engine]) -> None:
    """What is scored was read from the packed pages: other bytes there, another perplexity."""
    engine = Engine.load("octo-demo", kv="octopus4", device="cpu", max_context=320, conditioning="off")
    ids = load_tokenizer(DEMO_PATH).encode(2 * PROSE)[:319]
    score = lambda: perplexity.evaluate(lambda _kv: engine, ["bf16"], [ids], stride=160, step=64)  # noqa: E731
    (good,) = score()
    encode = engine.arena.encode

    def encode_and_corrupt(
        layers: tuple[int, ...], k: Tensor, v: Tensor, ids: Tensor, group: WindowPages | None = None
    ) -> None:
        encode(layers, k, v, ids, group)
        ids = ids.long()
        for pages in (engine.arena.layer_pages[layer] for layer in layers):
            rows = pages[ids].unflatten(-1, (128, -1))  # 64 tokens' keys, then their values
            pages[ids] = rows.flip(-2).flatten(-2)

    engine.arena.encode = encode_and_corrupt  # type: ignore[method-assign]
    (bad,) = score()
    assert bad.perplexity > 1.05 * good.perplexity
    engine.arena.encode = lambda *args: (encode(*args), engine.arena.pages.fill_(0xFF))  # type: ignore[method-assign, assign]
    with pytest.raises(OctoError, match="The logits with --kv bf16 are not finite"):
        score()


# Needles


@pytest.mark.parametrize("form", needle.FORMS)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needles_stand_where_they_should(form: str, depth: float) -> None:
    tokenizer = load_tokenizer(DEMO_PATH)
    filler = needle.Filler(PROSE, tokenizer)
    (hay,) = needle.build(
        tokenizer, filler, length=400, depths=[depth], distractors=3, form=form, source=random.Random(str(depth))
    )
    assert 400 - needle.ANSWER_TOKENS - 40 <= len(hay.ids) <= 400 - needle.ANSWER_TOKENS
    text = tokenizer.decode(hay.ids)
    assert text.count("The special magic number for") == 4 + (form == "raw")
    assert text.count(needle.statement(hay.key, hay.value)) == 1 and len(hay.value) == 7
    assert hay.depth == pytest.approx(depth, abs=0.06)
    place = text.index(needle.statement(hay.key, hay.value)) / text.rindex("special magic number")
    assert place == pytest.approx(depth, abs=0.25)
    question = f"What is the special magic number for {hay.key}?"
    assert (question in text) == (form != "raw")


def test_prompts_are_the_same_for_the_same_seed_and_refuse_what_does_not_fit() -> None:
    tokenizer = load_tokenizer(DEMO_PATH)
    make: Callable[..., Any] = lambda **changes: needle.prompts(  # noqa: E731
        tokenizer,
        PROSE,
        **{"lengths": [256], "depths": [0.5], "questions": 3, "distractors": 1, "form": "message", "seed": 0} | changes,
    )
    assert make() == make() and make() != make(seed=1)
    assert len({question.hay.value for question in make()}) == 3
    assert make(depths=[0.5, 1.0], questions=5)[0] == make()[0]
    with pytest.raises(UsageError, match="do not fit into 64 tokens"):
        make(lengths=[64])
    with pytest.raises(UsageError, match="--distractors is 42; give 0 to 41"):
        make(distractors=42)
    with pytest.raises(UsageError, match="--distractors is 3; give 0 to 2"):
        make(distractors=3, per_text=40)
    with pytest.raises(UsageError, match="--per-text is 43; give 1 to 42"):
        make(per_text=43)
    with pytest.raises(UsageError, match="is empty"):
        needle.Filler("  \n", tokenizer)


@pytest.mark.parametrize("form", needle.FORMS)
def test_questions_about_one_text_differ_in_nothing_else(form: str) -> None:
    tokenizer = load_tokenizer(DEMO_PATH)
    made = needle.prompts(tokenizer, PROSE, lengths=[400, 300], depths=[0.0, 0.5, 1.0], questions=5, per_text=3,
                          distractors=1, form=form, seed=0)  # fmt: skip
    assert [(question.length, question.depth, question.text) for question in made] == [
        (400, 0.0, 0), (400, 0.5, 0), (400, 1.0, 0), (300, 0.0, 1), (300, 0.5, 1), (300, 1.0, 1),
        (400, 0.0, 2), (400, 0.5, 2), (300, 0.0, 3), (300, 0.5, 3),
    ]  # fmt: skip
    for number, hidden in enumerate([4, 4, 3, 3]):
        own = [question.hay for question in made if question.text == number]
        texts = [tokenizer.decode(hay.ids) for hay in own]
        ends = [text.rindex("special magic number for") + len("special magic number for") for text in texts]
        assert len({text[:end] for text, end in zip(texts, ends, strict=True)}) == 1  # up to the name that is asked
        assert len({hay.key for hay in own}) == len(own) and texts[0].count("magic number for") == hidden + 1
        for hay, text in zip(own, texts, strict=True):
            assert needle.statement(hay.key, hay.value) in text and hay.key in text[ends[0] :]
        places = [texts[0].index(needle.statement(hay.key, hay.value)) for hay in own]
        assert places == sorted(places)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("It is 4815162.", True),
        ("4815162 or 1234567", True),
        ("1234567, not 4815162", False),
        ("48151620", False),
        ("", False),
    ],
)
def test_the_first_number_of_an_answer_counts(answer: str, right: bool) -> None:
    assert needle.found(answer, "4815162") is right


def search(kvs: Sequence[str], questions: list[needle.Question], **options: Any) -> needle.Search:
    return needle.Search(
        lambda kv: Engine.load("octo-demo", kv=kv, device="cpu", max_context=300, **options), kvs, questions
    )


def ask_questions(count: int, lengths: Sequence[int] = (300,)) -> list[needle.Question]:
    return needle.prompts(
        load_tokenizer(DEMO_PATH), PROSE, lengths=lengths, depths=[0.4, 0.9], questions=count, distractors=2,
        form="text", seed=0,
    )  # fmt: skip


@pytest.mark.slow
def test_the_demo_model_finds_needles_by_way_of_packed_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of unequal prompts; every format is asked the same, and no page is what it was for another."""
    questions = ask_questions(3, lengths=(220, 300))
    packed: list[tuple[str, list[int]]] = []
    answer = needle._answer

    def watched(engine: Engine, prompts: Sequence[list[int]]) -> list[str]:
        packed.append((engine.kv.name, [row.packed for row in engine.arena.table.rows if row is not None]))
        return answer(engine, prompts)

    monkeypatch.setattr(needle, "_answer", watched)
    asked = search(["octopus4"], questions, sequences=4)
    states = [(state.done, state.to_do) for state in asked.run()]
    assert states[-1][0] == states[-1][1] == 2 * sum(len(question.hay.ids) - 1 for question in questions)
    assert [kv for kv, _ in packed] == ["bf16", "octopus4"] * 2
    assert [len(pages) for _, pages in packed] == [4, 4, 2, 2] and all(max(pages) >= 2 for _, pages in packed)
    found = asked.cells()
    assert [(cell.kv, cell.length, cell.depth, cell.trials) for cell in found] == [
        (kv, length, depth, trials)
        for kv in ("bf16", "octopus4")
        for length, depth, trials in ((220, 0.4, 2), (220, 0.9, 1), (300, 0.4, 2), (300, 0.9, 1),
                                      (220, None, 3), (300, None, 3))
    ]  # fmt: skip
    total = found[-1]
    assert total.recall >= 2 / 3 and (total.low, total.high) == wilson(total.correct, 3)


@pytest.mark.slow
def test_answers_are_those_to_questions_asked_alone() -> None:
    """The text of every answer, not only whether it is right: batches change nothing."""
    questions = ask_questions(4)
    prompts = [question.hay.ids for question in questions]
    with Engine.load("octo-demo", kv="oct2", device="cpu", max_context=300, sequences=4) as engine:
        list(needle._read(Reader(engine, 300), [[ids] for ids in prompts], 300, 300))
        together = needle._answer(engine, prompts)
    alone = []
    with Engine.load("octo-demo", kv="oct2", device="cpu", max_context=300) as engine:
        for ids in prompts:
            with engine.sequence() as sequence:
                for first in range(0, len(ids) - 1, 64):
                    engine.prefill(sequence, ids[first : min(first + 64, len(ids) - 1)])
            alone.append(engine.tokenizer.decode([t.id for t in engine.generate(ids, SamplingParams(max_tokens=32))]))
    assert together == alone and any(re.search("[0-9]{7}", text) for text in together)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_a_text_is_read_once_for_all_its_questions(rows: int) -> None:
    """As many answers as questions asked each with its own reading give, by way of shared pages."""
    questions = needle.prompts(load_tokenizer(DEMO_PATH), PROSE, lengths=[300], depths=[0.1, 0.5, 0.9], questions=5,
                               per_text=3, distractors=1, form="message", seed=0)  # fmt: skip
    with Engine.load("octo-demo", kv="oct2", device="cpu", max_context=300, sequences=rows) as engine:
        reader, together, tokens = Reader(engine, 300), [], 0
        for batch in needle._batches(questions, rows):
            prompts = [[question.hay.ids for question in about] for about in batch]
            tokens += (read := sum(needle._read(reader, prompts, 300, 100)))
            assert read == needle._tokens(batch)
            flat = [question.hay.ids for about in batch for question in about]
            assert len(flat) <= rows
            pages = [row.page_ids[0] for row in engine.arena.table.rows if row is not None]
            assert len(set(pages)) == len(batch)  # one text's questions have its first page in common
            together += needle._answer(engine, flat)
        alone = []
        for question in questions:
            list(needle._read(reader, [[question.hay.ids]], 300, 100))
            alone += needle._answer(engine, [question.hay.ids])
    assert together == alone and any(re.search("[0-9]{7}", text) for text in together)
    whole = [len(question.hay.ids) - 1 for question in questions]
    shared = [whole[1], whole[2], whole[4]]  # read before, but for the question
    assert tokens == sum(whole) if rows == 1 else tokens < sum(whole) - 0.8 * sum(shared[: 3 if rows > 2 else 2])


@pytest.mark.slow
def test_questions_that_were_asked_so_far_make_cells() -> None:
    asked = search(["octopus4"], ask_questions(3))
    assert asked.cells() == []
    for _ in asked.run():
        if asked.cells():
            break
    assert [(cell.kv, cell.depth, cell.trials, cell.partial) for cell in asked.cells()] == [
        (kv, depth, 1, True) for kv in ("bf16", "octopus4") for depth in (0.4, None)
    ]


def test_cells_count_what_is_found_beside_the_reference() -> None:
    hay = needle.Haystack([1, 2], "Adam", "1234567", 0.5)
    questions = [needle.Question(512, depth, hay, text) for text, depth in enumerate((0.0, 1.0) * 4)]
    reference = [True] * 7 + [False]
    coded = [True, False, True, True, True, False, True, True]
    low, high, total = needle.cells("oct2", questions, coded, reference)
    assert (low.trials, low.correct, low.delta, low.delta_stderr) == (4, 4, 0.0, 0.0)
    assert (high.trials, high.correct, high.depth, high.delta) == (4, 2, 1.0, -0.25)
    assert (total.depth, total.trials, total.correct, total.partial) == (None, 8, 6, False)
    assert (total.low, total.high) == wilson(6, 8) and total.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 8))
    changes = torch.tensor([0.0, -1, 0, 0, 0, -1, 0, 1])
    assert total.delta == float(changes.mean())
    assert total.delta_stderr == pytest.approx(float(changes.std()) / math.sqrt(8))
    (one, alone) = needle.cells("oct2", questions, coded[:1], reference[:1])
    assert one.partial and alone.trials == 1 and alone.delta_stderr is None


def test_questions_about_one_text_count_as_one_where_they_are_alike() -> None:
    hay = needle.Haystack([1, 2], "Adam", "1234567", 0.5)
    questions = [needle.Question(512, 0.5, hay, text) for text in range(8) for _ in range(4)]
    reference = [True] * 32
    alike = [text % 2 == 0 for text in range(8) for _ in range(4)]  # all of a text's numbers or none
    *_, total = needle.cells("oct2", questions, alike, reference)
    assert (total.trials, total.texts, total.recall) == (32, 8, 0.5)
    assert total.stderr == pytest.approx(math.sqrt(0.25 / 7)) and total.delta_stderr == pytest.approx(total.stderr)
    assert (total.low, total.high) == pytest.approx(wilson(3.5, 7.0))
    unlike = [place % 2 == 0 for _ in range(8) for place in range(4)]  # half of every text's
    *_, total = needle.cells("oct2", questions, unlike, reference)
    assert total.stderr == 0.0 and (total.low, total.high) == wilson(16, 32)
    *_, total = needle.cells("oct2", questions[:4], alike[:4], reference)
    assert (total.texts, total.stderr, total.delta_stderr) == (1, None, None)


def cell(kv: str, length: int, depth: float | None, trials: int, correct: int) -> needle.Cell:
    return needle.Cell(kv, length, depth, trials, trials, correct, correct / trials, 0.1, 0.0, 1.0, 0.0, 0.1)


# Tasks


@pytest.mark.parametrize(
    ("rule", "text", "wanted"),
    [
        ("last-number", "3 + 4 = <<3+4=7>>7\n#### 1,207.50", "1207.5"),
        ("last-number", "It costs $12, so -3 remain.", "-3"),
        ("last-number", "none", None),
        ("first-number", "12 of 13", "12"),
        ("last-number", "0.00", "0"),
        ("last-line", "first\n  B  or\tC \n\n", "B or C"),
        ("first-line", "\n one\ntwo", "one"),
        ("whole", " a\n b ", "a b"),
        ("last-line", " \n", None),
    ],
)
def test_what_is_taken_out_of_an_answer(rule: str, text: str, wanted: str | None) -> None:
    assert tasks.extractor(rule)(text) == wanted


def test_the_regex_rule_and_case() -> None:
    assert tasks.extractor("regex", r"\(([A-D])\)")("(A) no, (C)") == "C"
    assert tasks.extractor("regex", r"[A-D]")("nothing") is None
    assert tasks.extractor("whole", ignore_case=True)("YES") == "yes"
    for rule, pattern, says in (
        ("regex", None, "go together"),
        ("whole", "x", "go together"),
        ("regex", "(", "no regular"),
    ):
        with pytest.raises(UsageError, match=says):
            tasks.extractor(rule, pattern)
    with pytest.raises(UsageError, match="no rule 'odd'"):
        tasks.extractor("odd")


def test_tasks_are_read_with_the_line_of_what_is_wrong() -> None:
    text = '{"question": "a", "answer": "1"}\n\n{"prompt": "b", "target": 2}\n'
    assert tasks.read_tasks(text, "f") == [tasks.Task(1, "a", "1"), tasks.Task(3, "b", "2")]
    assert tasks.read_tasks('{"x": "a", "y": "1"}', "f", "x", "y") == [tasks.Task(1, "a", "1")]
    good = '{"prompt": "a", "answer": "1"}\n'
    for line, says in (
        ("{oops}", "f, line 2: this is no JSON"),
        ("[1]", "f, line 2: this is no JSON object"),
        ('{"prompt": "a"}', "f, line 2: there is no field 'answer' or 'target' or 'output'; name it with --answer-key"),
        ('{"prompt": ["a"], "answer": "1"}', "line 2: the field 'prompt' is neither"),
        ('{"prompt": " ", "answer": "1"}', "line 2: the field 'prompt' is empty"),
    ):
        with pytest.raises(UsageError, match=says):
            tasks.read_tasks(good + line, "f")
    with pytest.raises(UsageError, match="f has no tasks"):
        tasks.read_tasks("\n \n", "f")
    with pytest.raises(UsageError, match="line 1: the rule takes nothing out of the answer 'x'"):
        tasks.wanted_answers([tasks.Task(1, "a", "x")], tasks.extractor("last-number"))


def test_tasks_are_answered_and_scored(scripted: Callable[..., Any]) -> None:
    engine, decoder = scripted(context=200)
    prompts = [tasks.Task(1, "abc", "4"), tasks.Task(2, "xyz", "5")]
    decoder.say(4, "so 4\n#")
    rule = tasks.extractor("last-number")
    ids = tasks.prompts(engine.tokenizer, prompts, as_chat=False)
    outcomes = [*tasks.run(engine, prompts, ids, ["4", "5"], rule, max_tokens=20, stop=("#",))]
    assert [(o.line, o.response, o.got, o.correct) for o in outcomes] == [
        (1, "so 4\n", "4", True),
        (2, "so 4\n", "4", False),
    ]
    score = tasks.score("bf16", outcomes, 2)
    assert (score.tasks, score.correct, score.accuracy) == (2, 1, 0.5)
    assert (score.low, score.high) == wilson(1, 2)
    long = [tasks.Task(7, "a" * 300, "1")]
    with pytest.raises(UsageError, match="line 7: The prompt has 301 tokens"):
        tasks.check_lengths(engine.plan, long, tasks.prompts(engine.tokenizer, long, as_chat=False))
    with pytest.raises(OctoError, match="nothing to score"):
        tasks.score("bf16", [], 1)
    base = SimpleNamespace(has_chat_template=False)
    with pytest.raises(UsageError, match="no chat template: use --raw"):
        tasks.prompt_ids(base, "a", as_chat=True)  # type: ignore[arg-type]


def test_losses_beyond_all_exponents_are_infinite_figures() -> None:
    none = torch.zeros(100, dtype=torch.float64)
    found = perplexity.row("oct2", none, torch.stack([none + 800, none, none]), 1.0, 1.0, False)
    assert found.perplexity == found.delta_percent == math.inf


# Plots


def test_figures_are_written(tmp_path: Any) -> None:
    row = perplexity.Row("oct3", 10.0, 0.1, 0.3, 0.1, 0.01, 0.1, 0.9, 2000.0, 100.0, 500)
    plot_perplexity([row], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    cells = [cell(kv, 512, depth, 1, 1) for kv in ("bf16", "oct3") for depth in (0.0, 1.0)]
    plot_recall(cells, tmp_path / "b.svg")
    assert "<svg" in (tmp_path / "b.svg").read_text()
    for name, says in (("a.gif", "ends in .png"), ("no/a.png", "there is no folder")):
        with pytest.raises(UsageError, match=says):
            check_figure_path(tmp_path / name)
