"""Measurements of quality: what is scored, how sure it is, where needles stand, which answers count."""

import math
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from octo_run.engine import Engine
from octo_run.engine.evaluation import needle, perplexity, tasks
from octo_run.engine.evaluation.perplexity import windows
from octo_run.engine.evaluation.plots import check_figure_path, plot_perplexity, plot_recall, recall_map
from octo_run.engine.evaluation.statistics import standard_error, wilson
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
    first, row = perplexity.evaluate(lambda kv: tiny(kv, context=256), ["octopus2", "bf16"], [ids], stride=100, step=64)
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


def test_a_reference_that_is_too_large_to_keep_is_computed_again(
    tiny: Callable[..., Engine], random_ids: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows() -> list[Any]:
        texts = [random_ids(200), random_ids(150, seed=1)]
        found = list(perplexity.evaluate(lambda kv: tiny(kv, context=128), ["oct4"], texts, stride=64, step=32))
        return [(row.perplexity, row.delta_percent, row.kl_mean) for row in found]

    kept = rows()
    monkeypatch.setattr(perplexity, "KEPT_BYTES", 0)
    assert rows() == kept


@pytest.mark.parametrize(("kept", "blocks"), [(0, 6), (2**30, 25)])
def test_logits_are_never_held_whole(
    kept: int,
    blocks: int,
    tiny: Callable[..., Engine],
    random_ids: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """599 tokens in steps of 32 make 19 blocks. Of each engine the last two or three are held, unless all are kept."""
    held: list[StorageWeakRef] = []
    most: list[int] = []
    made = Engine._logits

    def logits(self: Engine, hidden: torch.Tensor) -> torch.Tensor:
        rows = made(self, hidden)
        held.append(StorageWeakRef(rows.untyped_storage()))
        assert len(rows) <= 32
        most.append(sum(not ref.expired() for ref in held))
        return rows

    monkeypatch.setattr(Engine, "_logits", logits)
    monkeypatch.setattr(perplexity, "KEPT_BYTES", kept)
    list(perplexity.evaluate(lambda kv: tiny(kv, context=600), ["oct4"], [random_ids(599)], stride=300, step=32))
    assert blocks - 6 < max(most) <= blocks


def test_nothing_is_kept_that_does_not_fit(
    tiny: Callable[..., Engine], random_ids: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    rows = Engine.logit_rows
    monkeypatch.setattr(Engine, "logit_rows", lambda self, *given: read.append(self.kv.name) or rows(self, *given))
    ids = random_ids(127)
    for free, times in ((4 * 127 * 260 * 4, 1), (4 * 127 * 260 * 4 - 4, 2)):
        monkeypatch.setattr(perplexity, "free_memory", lambda _device, free=free: free)
        read.clear()
        list(perplexity.evaluate(lambda kv: tiny(kv, context=128), ["oct4"], [ids], stride=64, step=32))
        assert read.count("bf16") == times and read.count("oct4") == 1


def test_a_corrupt_page_raises_the_perplexity(demo: Callable[..., Engine]) -> None:
    """What is scored was read from the packed pages: other bytes there, another perplexity."""
    engine = Engine.load("octo-demo", kv="octopus4", device="cpu", max_context=320)
    ids = load_tokenizer(DEMO_PATH).encode(2 * PROSE)[:319]
    score = lambda: perplexity.evaluate(lambda _kv: engine, ["bf16"], [ids], stride=160, step=64)  # noqa: E731
    (good,) = score()
    encode = engine.arena.encode

    def encode_and_corrupt(layer: int, k: Tensor, v: Tensor, ids: Tensor) -> None:
        encode(layer, k, v, ids)
        pages, ids = engine.arena.layer_pages[layer], ids.long()
        rows = pages[ids].unflatten(-1, (128, -1))  # 64 tokens' keys, then their values
        pages[ids] = rows.flip(-2).flatten(-2)

    engine.arena.encode = encode_and_corrupt  # type: ignore[method-assign]
    (bad,) = score()
    assert bad.perplexity > 1.05 * good.perplexity
    engine.arena.encode = lambda *args: (encode(*args), engine.arena.pages.fill_(0xFF))  # type: ignore[method-assign, assign]
    with pytest.raises(OctoError, match="The logits with --kv bf16 are not finite"):
        list(score())


# Needles


@pytest.mark.parametrize("form", needle.FORMS)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needles_stand_where_they_should(form: str, depth: float) -> None:
    tokenizer = load_tokenizer(DEMO_PATH)
    filler = needle.Filler(PROSE, tokenizer)
    hay = needle.build(
        tokenizer, filler, length=400, depth=depth, distractors=3, form=form, source=random.Random(str(depth))
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
        **{"lengths": [256], "depths": [0.5], "trials": 3, "distractors": 1, "form": "message", "seed": 0} | changes,
    )
    assert make() == make() and make() != make(seed=1)
    assert len({trial.value for trial in make()[256, 0.5]}) == 3
    with pytest.raises(UsageError, match="do not fit into 64 tokens"):
        make(lengths=[64])
    with pytest.raises(UsageError, match="--distractors is 42; give 0 to 41"):
        make(distractors=42)
    with pytest.raises(UsageError, match="is empty"):
        needle.Filler("  \n", tokenizer)


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


def test_the_demo_model_finds_a_needle_by_way_of_packed_pages() -> None:
    engine = Engine.load("octo-demo", kv="octopus4", device="cpu", max_context=300)
    hay = needle.prompts(
        engine.tokenizer, PROSE, lengths=[300], depths=[0.4], trials=1, distractors=2, form="text", seed=0
    )
    cell, total = needle.evaluate(engine, "octopus4", hay, step=64)
    assert (cell.correct, cell.depth, total.depth, total.correct) == (1, 0.4, None, 1)
    (sequence,) = engine.arena.table.rows
    assert sequence is not None and sequence.packed >= 1
    assert (cell.low, cell.high) == wilson(1, 1)


def test_totals_and_the_map() -> None:
    cells = [
        needle.Cell("oct3", length, depth, 4, correct, correct / 4, 0.0, 1.0)
        for length, depth, correct in ((512, 0.0, 4), (512, 1.0, 2), (1024, 0.0, 0), (1024, 1.0, 3))
    ]
    assert [(t.length, t.correct, t.trials) for t in needle.totals(cells)] == [(512, 6, 8), (1024, 3, 8)]
    shown = recall_map(cells, "oct3").splitlines()
    assert shown[0].split() == ["depth", "512", "1,024"]
    assert shown[1].split() == ["0", "%", "███", "100", "%", "0", "%"] and shown[2].split()[3:5] == ["50", "%"]


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
    outcomes = tasks.run(engine, prompts, ["4", "5"], rule, as_chat=False, max_tokens=20, stop=("#",))
    assert [(o.line, o.response, o.got, o.correct) for o in outcomes] == [
        (1, "so 4\n", "4", True),
        (2, "so 4\n", "4", False),
    ]
    score = tasks.score("bf16", outcomes)
    assert (score.tasks, score.correct, score.accuracy) == (2, 1, 0.5)
    assert (score.low, score.high) == wilson(1, 2)
    long = [tasks.Task(7, "a" * 300, "1")]
    with pytest.raises(UsageError, match="line 7: The prompt has 301 tokens"):
        tasks.run(engine, long, ["1"], rule, as_chat=False)
    with pytest.raises(OctoError, match="nothing to score"):
        tasks.score("bf16", [])
    base = SimpleNamespace(has_chat_template=False)
    with pytest.raises(UsageError, match="no chat template: use --raw"):
        tasks.prompt_ids(base, "a", as_chat=True)  # type: ignore[arg-type]


# Plots


def test_figures_are_written(tmp_path: Any) -> None:
    row = perplexity.Row("oct3", 10.0, 0.1, 0.3, 0.1, 0.01, 0.1, 0.9, 2000.0, 100.0, 500)
    plot_perplexity([row], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    cells = [needle.Cell(kv, 512, depth, 1, 1, 1.0, 0.2, 1.0) for kv in ("bf16", "oct3") for depth in (0.0, 1.0)]
    plot_recall(cells, tmp_path / "b.svg")
    assert "<svg" in (tmp_path / "b.svg").read_text()
    for name, says in (("a.gif", "ends in .png"), ("no/a.png", "there is no folder")):
        with pytest.raises(UsageError, match=says):
            check_figure_path(tmp_path / name)
