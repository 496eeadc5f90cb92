"""Grammars: every answer is what it must be, alone and beside others, after a break, and with words that do not fit."""

import builtins
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from octo_run.engine import Engine, SamplingParams, Session
from octo_run.engine.grammar import Grammar
from octo_run.errors import OctoError, UsageError

pytest.importorskip("llguidance", reason="grammars need llguidance")
HOT = {"temperature": 1.5, "seed": 3, "max_tokens": 300}
PERSON = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 9},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


def answer(engine: Engine, grammar: Grammar, **rules: Any) -> tuple[str, str | None]:
    generation = engine.generate("A line:", SamplingParams(grammar=grammar, **{**HOT, **rules}))
    return "".join(token.text for token in generation), generation.finish_reason


@pytest.mark.few(1)
@pytest.mark.parametrize("seed", range(3))
def test_answers_are_what_they_must_be(demo: Callable[..., Engine], seed: int) -> None:
    engine = demo("oct3")
    text, reason = answer(engine, Grammar("json", PERSON), seed=seed)
    person = json.loads(text)
    assert reason == "stop" and person.keys() == {"name", "age"} and 0 <= person["age"] <= 99
    text, _ = answer(engine, Grammar("regex", "(yes|no), [0-9]{3}!"), seed=seed)
    assert re.fullmatch("(yes|no), [0-9]{3}!", text)
    text, _ = answer(engine, Grammar("lark", 'start: "hi " NAME\nNAME: /[a-z]{3,5}/'), seed=seed)
    assert re.fullmatch("hi [a-z]{3,5}", text)
    text, _ = answer(engine, Grammar("gbnf", 'root ::= "ok" [0-9] [0-9] "!"'), seed=seed)
    assert re.fullmatch("ok[0-9]{2}!", text)


def test_any_letter_can_be_forced(demo: Callable[..., Engine]) -> None:
    """Also those that the vocabulary spells byte by byte; greedy answers, too."""
    said = "你好 😀 👨\u200d👩\u200d👧 日本"
    assert answer(demo("oct3"), Grammar("regex", said), temperature=0.0) == (said, "stop")


def test_a_grammar_beside_none_and_another(demo: Callable[..., Engine]) -> None:
    """In one batch; those without one say what they say alone."""
    with Engine.load("octo-demo", max_context=512, sequences=3, device="cpu") as engine:
        plain = SamplingParams(max_tokens=20, temperature=0.8, seed=4)
        rules = [plain, SamplingParams(grammar=Grammar("regex", "[ab]{5}"), **HOT),
                 SamplingParams(grammar=Grammar("json", PERSON), **HOT)]  # fmt: skip
        together = {done.index: done.text for done in engine.generate_batch(["A line:"] * 3, rules)}
        assert re.fullmatch("[ab]{5}", together[1]) and json.loads(together[2]).keys() == {"name", "age"}
        assert together[0] == "".join(token.text for token in engine.generate("A line:", plain))


def test_a_generation_that_lost_its_place_goes_on(demo: Callable[..., Engine]) -> None:
    """Another one took the only row in between: the grammar follows what was said before."""
    engine = demo("oct3")
    first = engine.generate("A line:", SamplingParams(grammar=Grammar("regex", "[a-z]{4} [0-9]{4}"), **HOT))
    said = [next(first).text for _ in range(3)]
    assert list(engine.generate("Something else", SamplingParams(max_tokens=3)))
    said += [token.text for token in first]
    assert re.fullmatch("[a-z]{4} [0-9]{4}", "".join(said))


def test_the_end_is_allowed_where_the_grammar_may_end(demo: Callable[..., Engine]) -> None:
    engine = demo("oct3")
    text, reason = answer(engine, Grammar("regex", "a*"), temperature=20.0)
    assert reason == "stop" and set(text) <= {"a"}
    text, reason = answer(engine, Grammar("regex", "[0-9]+"), max_tokens=5, temperature=0.0)
    assert reason in ("length", "stop") and text.isdigit()


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("regex", "(", "regular expression cannot be used"),
        ("json", "{", "is no JSON"),
        ("json", "[]", "give an object"),
        ("json", '{"type": "nothing"}', "JSON schema cannot be used"),
        ("json", "[" * 100_000, "no JSON"),
        ("lark", "start: (", "grammar cannot be used"),
        ("gbnf", "root = x", "grammar cannot be used"),
        ("gbnf", "\x1b[2J", "grammar cannot be used"),
        ("nonsense", "x", "no grammar of kind 'nonsense'"),
        ("regex", "a" * 2_000_000, "characters"),
    ],
)
def test_what_is_none_is_one_sentence(kind: Any, text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as failure:
        Grammar(kind, text)
    assert "\x1b" not in str(failure.value) and len(str(failure.value)) <= 480


def test_without_the_library_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("llguidance"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(OctoError, match=r'pip install "octo-run\[grammar\]"'):
        Grammar("regex", "a")


def test_a_model_without_a_tokenizer_refuses(tiny: Callable[..., Engine]) -> None:
    engine = tiny()
    with pytest.raises(UsageError, match="no tokenizer"):
        next(engine.generate([1, 2, 3], SamplingParams(grammar=Grammar("regex", "a"))))


@pytest.mark.parametrize("kept", [True, False], ids=["in one session", "loaded in between"])
def test_an_answer_that_goes_on_follows_the_grammar_where_it_stands(demo: Callable[..., Engine], kept: bool) -> None:
    engine = demo("oct3")
    rules = SamplingParams(grammar=Grammar("json", PERSON), **{**HOT, "max_tokens": 5})
    session = Session(engine)
    reply = session.ask("Who is it?", rules)
    list(reply)
    for _ in range(80):
        if reply.finish_reason != "length":
            break
        if not kept:
            turns, session = session.messages, Session(engine)
            session.turns = turns
        reply = session.resume(rules)
        list(reply)
    assert reply.finish_reason == "stop"
    person = json.loads(session.messages[-1]["content"])
    assert person.keys() == {"name", "age"} and 0 <= person["age"] <= 99


def test_parts_of_an_answer_are_drawn_as_the_whole_would_be(demo: Callable[..., Engine]) -> None:
    """Noise and penalties go on, too."""
    engine = demo("oct3")
    rules = {"temperature": 1.0, "seed": 3, "presence_penalty": 2.0, "frequency_penalty": 1.0}
    whole, parts = Session(engine), Session(engine)
    text = "".join(whole.ask("Tell me of the sea.", SamplingParams(max_tokens=12, **rules)))
    found = "".join(parts.ask("Tell me of the sea.", SamplingParams(max_tokens=4, **rules)))
    for _ in range(2):
        found += "".join(parts.resume(SamplingParams(max_tokens=4, **rules)))
    assert found == text


def test_an_answer_that_does_not_fit_a_grammar_is_not_gone_on_with(demo: Callable[..., Engine]) -> None:
    engine = demo("oct3")
    session = Session(engine)
    list(session.ask("Hello", SamplingParams(grammar=Grammar("regex", "[a-z]{9}"), max_tokens=2)))
    before = session.messages
    with pytest.raises(OctoError, match="grammar cannot be followed"):
        list(session.resume(SamplingParams(grammar=Grammar("regex", "[0-9]{9}"))))
    assert session.messages == before
    for answered in (-1, 4):
        with pytest.raises(UsageError, match="give 0 to 3"):
            engine.generate([1, 2, 3], answered=answered)
