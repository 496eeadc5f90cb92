"""The public names, and what they say to arguments of a wrong kind."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import octo_run
from octo_run import Engine, SamplingParams, Session
from octo_run.errors import OctoError, UsageError, expect

NAMES = {
    "Completion", "Engine", "Generation", "MemoryPlan", "OctoError", "Reply", "SamplingParams", "Session", "Token",
    "UsageError",
}  # fmt: skip
QUESTION = [{"role": "user", "content": "abc"}]


def test_every_public_name_is_there_and_seen() -> None:
    assert set(octo_run.__all__) >= NAMES and set(dir(octo_run)) >= NAMES
    for name in NAMES:
        assert getattr(octo_run, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        octo_run.Motor  # noqa: B018


def test_a_conversation_is_answered(scripted: Any) -> None:
    engine, script = scripted()
    prompt = len(engine.tokenizer.chat(QUESTION))
    script.say(prompt, "hello")
    reply = engine.chat(QUESTION)
    assert isinstance(reply, octo_run.Reply) and "".join(reply) == reply.text == "hello"
    assert (reply.finish_reason, reply.prompt_tokens) == ("stop", prompt)
    assert "".join(engine.chat(QUESTION, SamplingParams(max_tokens=2))) == "he"
    engine.tokenizer.has_chat_template = False
    with pytest.raises(OctoError, match="no chat template"):
        engine.chat(QUESTION)


def test_text_and_ids_are_one_prompt(scripted: Any) -> None:
    engine, script = scripted()
    script.say(4, "def")
    for prompt in ("abc", engine.tokenizer.prompt("abc"), torch.tensor(engine.tokenizer.prompt("abc"))):
        assert "".join(token.text for token in engine.generate(prompt)) == "def"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda e: e.generate(5), "A prompt is a text or one list of token ids"),
        (lambda e: e.generate([1.5]), "A prompt is a text or one list of token ids"),
        (lambda e: e.generate(b"abc"), "A prompt is a text or one list of token ids"),
        (lambda e: e.generate("abc", {"seed": 1}), "params is {'seed': 1} (dict); give SamplingParams or None"),
        (lambda e: e.chat("abc"), "messages is 'abc' (str); give a list or"),
        (lambda e: e.chat(["abc"]), "messages[0] is 'abc' (str); give a dict"),
        (lambda e: e.generate_batch("abc"), "prompts is 'abc'; give a list of prompts"),
        (lambda e: e.generate_batch(5), "prompts is 5; give a list of prompts"),
        (lambda e: e.generate_batch(["abc"], 5), "params is 5 (int); give SamplingParams, a list, a tuple or None"),
        (lambda e: e.generate_batch(["abc", None]), "Prompt 1: A prompt is a text"),
        (lambda e: e.generate_batch(["abc"], [5]), "Prompt 0: params is 5 (int); give SamplingParams"),
        (lambda e: Session(e, 5), "system is 5 (int); give a text or None"),
        (lambda e: Session("octo-demo"), "engine is 'octo-demo' (str); give Engine"),
        (lambda e: Session(e).ask(None), "text is None (NoneType); give a text"),
        (lambda e: Session(e).ask("abc", 0.7), "params is 0.7 (float); give SamplingParams or None"),
    ],
)
def test_wrong_kinds_of_arguments(call: Callable[[Engine], Any], text: str, tiny: Callable[..., Engine]) -> None:
    with pytest.raises(UsageError, match=re.escape(text)):
        call(tiny())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"model": 5}, "model is 5 (int); give a text or a path"),
        ({"kv": 3}, "kv is 3 (int); give a text"),
        ({"device": 0}, "device is 0 (int); give a text"),
        ({"max_context": "4096"}, "max_context is '4096' (str); give a whole number or None"),
        ({"max_context": 1e3}, "max_context is 1000.0 (float); give a whole number or None"),
        ({"seed": "x"}, "seed is 'x' (str); give a whole number"),
        ({"sink": 1.5}, "sink is 1.5 (float)"),
        ({"sequences": True}, "sequences is True (bool); give a whole number"),
        ({"conditioning": 1}, "conditioning is 1 (int)"),
        ({"cache_bytes": "1G"}, "cache_bytes is '1G' (str); give a whole number or None"),
    ],
)
def test_wrong_kinds_of_arguments_of_load(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(text)):
        Engine.load(**({"device": "cpu"} | arguments))


def test_expect_says_what_is_wanted() -> None:
    expect("n", 5, int)
    expect("n", None, int, none=True)
    with pytest.raises(UsageError, match=r"^n is None \(NoneType\); give a whole number, a number or a text\.$"):
        expect("n", None, int, float, str)


def test_a_closed_engine_gives_its_memory_back_and_says_so() -> None:
    with Engine.load("octo-demo", kv="oct3", device=torch.device("cpu"), max_context=300) as engine:
        weights = engine.forward.decoder.embedding
        assert len(list(engine.generate("Hello", SamplingParams(max_tokens=3)))) == 3
        kept = torch.multiprocessing.reductions.StorageWeakRef(weights.untyped_storage())
        del weights
    assert kept.expired()
    for use in (lambda: list(engine.generate("Hello")), lambda: engine.logits([1]), engine.sequence):
        with pytest.raises(UsageError, match="The engine was closed: load it again"):
            use()
    engine.close()
    with pytest.raises(AttributeError, match="no attribute 'motor'"):
        engine.motor  # type: ignore[attr-defined]  # noqa: B018


def test_figures_without_matplotlib_are_refused_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from octo_run.engine.evaluation import figure

    monkeypatch.setattr(figure, "find_spec", lambda _name: None)
    with pytest.raises(OctoError, match="Figures need matplotlib: install it"):
        figure.check_figure_path(tmp_path / "a.png")
