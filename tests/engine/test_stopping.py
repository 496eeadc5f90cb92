"""Stop strings: where an answer ends, what its tokens' texts are, special tokens by name and inside other text."""

from typing import Any

import pytest
import torch

from octo_run.engine import Engine, Reply, SamplingParams, Token
from octo_run.engine.random_model import NoTokenizer
from octo_run.engine.stopping import AnswerText, impossible
from octo_run.errors import OctoError, UsageError
from octo_run.models.config import ModelConfig
from octo_run.tokenizer.thinking import Thinking

PROMPT = [1, 2, 3, 4]
TURN, END = 258, 257


def answer(scripted: Any, said: Any, **params: Any) -> list[Token]:
    engine, decoder = scripted()
    decoder.say(len(PROMPT), said)
    return list(engine.generate(PROMPT, SamplingParams(**params)))


@pytest.mark.parametrize(
    ("said", "stop", "spoken", "text"),
    [
        ("one END two", ("END",), "one END", "one "),
        ("one EN two", ("END",), "one EN two", "one EN two"),
        ("aabaabab", ("aabab",), "aabaabab", "aab"),
        ("xyz", ("y", "xyz"), "xy", "x"),
        ("ENDless", ("END",), "END", ""),
        ("the 🐙🐙 two", ("🐙🐙",), "the 🐙🐙", "the "),
    ],
)
def test_the_engine_stops_at_a_stop_string(
    said: str, stop: tuple[str, ...], spoken: str, text: str, scripted: Any
) -> None:
    tokens = answer(scripted, said, stop=stop)
    ids, natural = [token.id for token in tokens], said == spoken
    assert ids == [*spoken.encode(), *([END] if natural and text == said else [])]
    assert [token.finish_reason for token in tokens] == [None] * (len(ids) - 1) + ["stop"]
    assert "".join(token.text for token in tokens) == text


def test_texts_are_held_back_only_while_they_may_become_a_stop_string(scripted: Any) -> None:
    tokens = answer(scripted, "aEbENc", stop=("END",))
    assert [token.text for token in tokens] == ["a", "", "Eb", "", "", "ENc", ""]
    assert [token.text for token in answer(scripted, "ü!")] == ["", "ü", "!", ""]


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_the_borders_of_tokens_change_nothing(size: int) -> None:
    """The stop string that is complete first counts, however many characters a token has."""

    class Pieces:
        special_ids: frozenset[int] = frozenset()
        template_source = ""

        def __init__(self, text: str) -> None:
            self.pieces = [text[at : at + size] for at in range(0, len(text), size)]
            self.thinking = Thinking(self)  # type: ignore[arg-type]

        def special_id(self, _text: str) -> None:
            return None

        def stream(self, _after: object) -> Any:
            return self

        def push(self, token: int) -> str:
            return self.pieces[token]

        def finish(self) -> str:
            return ""

    tokenizer: Any = Pieces("abcdefghi")
    text = AnswerText(tokenizer, SamplingParams(stop=("cdefg", "de", "defg")), frozenset(), [])
    given, ended = "", False
    for token in range(len(tokenizer.pieces)):
        piece, ended = text.push(token, last=token == len(tokenizer.pieces) - 1)
        given += piece
        if ended:
            break
    assert (given, ended) == ("abc", True)


def test_a_stop_string_at_the_last_token_allowed_counts(scripted: Any) -> None:
    whole = answer(scripted, "abcd", stop=("cd",), max_tokens=4)
    assert (whole[-1].finish_reason, "".join(token.text for token in whole)) == ("stop", "ab")
    half = answer(scripted, "abcd", stop=("cde",), max_tokens=4)
    assert (half[-1].finish_reason, "".join(token.text for token in half)) == ("length", "abcd")
    broken = answer(scripted, b"ab\xf0\x9f", stop=("b\ufffd",), max_tokens=4)
    assert (broken[-1].finish_reason, "".join(token.text for token in broken)) == ("stop", "a")


@pytest.mark.parametrize(
    ("said", "stop", "count", "text"),
    [
        ([97, TURN, 98], ("<turn>",), 2, "a"),
        ([*b"a<turn>b"], ("<turn>",), 7, "a"),
        ([97, TURN, 98], ("<s>",), 4, "ab"),
        ([97, 10, TURN, *b"user"], ("\n<turn>user",), 7, "a"),
        ([97, 10, TURN, *b"me"], ("\n<turn>user",), 6, "a\nme"),
        ([97, TURN, 98, 99], ("turn>b",), 3, "a"),
        ([97, 98, END], ("b<end>",), 3, "a"),
        ([97, TURN, *b"EN", TURN], ("END",), 6, "aEN"),
    ],
)
def test_special_tokens_in_stop_strings(
    said: list[int], stop: tuple[str, ...], count: int, text: str, scripted: Any
) -> None:
    tokens = answer(scripted, said, stop=stop)
    assert (len(tokens), "".join(token.text for token in tokens)) == (count, text)
    assert tokens[-1].finish_reason == "stop"


def test_a_named_special_token_of_a_real_tokenizer(demo: Any) -> None:
    engine = demo("bf16")
    text = next(text for text in engine.tokenizer._special)
    token = engine.tokenizer.special_id(text)
    assert token in engine.tokenizer.special_ids and engine.tokenizer.special_id("no such token") is None
    found = AnswerText(engine.tokenizer, SamplingParams(stop=(text,)), frozenset(), [])
    assert found.push(token, last=False) == ("", True)


@pytest.mark.parametrize("ahead", [False, True])
def test_steps_ahead_of_a_stop_string_are_taken_back(ahead: bool, tiny: Any, random_ids: Any) -> None:
    engine = tiny()
    engine.depth, engine.end_ids = 1 + ahead, frozenset()
    engine.tokenizer.stream = lambda skip_special=True: type(
        "Stream", (), {"push": lambda _self, token: f"[{token}]", "finish": lambda _self: ""}
    )()
    ids = random_ids(100)
    whole = [token.id for token in engine.generate(ids, SamplingParams(max_tokens=9))]
    stop = next(token for token in whole if whole.count(token) == 1)
    at = whole.index(stop)
    tokens = list(engine.generate(ids, SamplingParams(stop=(f"{stop}]",))))
    assert [token.id for token in tokens] == whole[: at + 1]
    assert "".join(token.text for token in tokens) == "".join(f"[{token}]" for token in whole[:at]) + "["
    # A step that ran ahead was fed the token that ends the string; those behind it are taken back.
    held = at + (ahead and at > 0)
    assert engine.arena.table.rows[0].ids == ids + whole[:held]
    again = engine.generate(ids + whole[: at + 1])
    next(again)
    assert again.reused_tokens == len(ids) + at


def test_an_answer_is_the_generations_text(scripted: Any) -> None:
    engine, decoder = scripted()
    decoder.say(len(PROMPT), "one END two")
    said = Reply(engine.generate(PROMPT, SamplingParams(stop=("END",))))
    assert list(said) == ["o", "n", "e", " "] and said.finish_reason == "stop"
    assert said.ids == [*b"one END"] and said.generation.finish_reason == "stop"


def test_an_engine_without_a_tokenizer_refuses_stop_strings(tiny: Any) -> None:
    engine: Engine = tiny()
    engine.tokenizer = NoTokenizer(260)  # type: ignore[assignment]
    with pytest.raises(UsageError, match=r"^A model with random weights has no tokenizer for stop strings: give "):
        engine.generate(PROMPT, SamplingParams(stop=("a",)))
    first = next(engine.generate(PROMPT))
    assert first.text == ""
    assert list(engine.generate(PROMPT, SamplingParams(stop_ids=(first.id,))))[-1].finish_reason == "stop"
    with pytest.raises(OctoError, match="no chat template"):
        engine.chat([{"role": "user", "content": "a"}])


def test_random_weights_refuse_stop_strings() -> None:
    shape = ModelConfig("LlamaForCausalLM", 50, 32, 32, 1, 1, 1, 32, 128, 1e-5, 1e4)
    engine = Engine.load("made up", kv="bf16", random_weights=shape, device="cpu", dtype=torch.float32)
    with pytest.raises(UsageError, match="stop strings"):
        engine.generate([1], SamplingParams(stop=("a",)))


class Vocabulary:
    """Tokens of these bytes, none special."""

    special_ids = frozenset[int]()

    def __init__(self, *pieces: bytes) -> None:
        self._pieces, self.vocab_size = pieces, len(pieces)

    def piece(self, token: int) -> bytes:
        return self._pieces[token]


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("stop", "never"),
    [
        ("b", False), ("abc", False), ("cab", False), ("bcab", False), ("bb", True), ("x", True), ("é", False),
        ("éé", False), ("ca", False), ("cb", True), ("abcabcab", False), ("abcab\n", True),
    ],
)  # fmt: skip
def test_a_stop_text_that_no_tokens_spell(stop: str, never: bool) -> None:
    """Alone or within more: the first token may begin before it, the last one end behind it."""
    assert impossible(Vocabulary(b"abc", "é".encode()), stop) is never  # type: ignore[arg-type]


def test_bytes_spell_every_stop_text(demo: Any) -> None:
    tokenizer = demo("oct3").tokenizer
    assert not any(impossible(tokenizer, text) for text in ("\n\n", "日本", "\U0001f600", "<end>", "\x00"))
