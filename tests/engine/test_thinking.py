"""Chats with models that think between marks of their own: what is told and kept of an answer, and the next prompt."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from octo_run.engine import Engine, Reply, SamplingParams, Session
from octo_run.engine.saved_session import SavedSession, Snapshot
from octo_run.errors import OctoError
from octo_run.models.config import GenerationDefaults
from octo_run.tokenizer import load_tokenizer

SPECIAL = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>"]
THOUGHT = "<|channel|>analysis<|message|>The user says hi. Greet."
SAID = f"{THOUGHT}<|end|><|start|>assistant<|channel|>final<|message|>Hello!<|return|>"
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.content is string %}{{ m.content }}</s>"
    "{% else %}{% for part in m.content %}"
    "{% if part['type'] == 'thinking' %}[THINK]{{ part['thinking'] }}[/THINK]{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}</s>{% endif %}{% endfor %}"
)
GREEDY = SamplingParams()


class Talk:
    """A session with a model that says what it is told, and what transformers makes of its messages."""

    def __init__(self, scripted: Any, folder: Path, end_ids: tuple[int, ...] = ()) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.engine, self.decoder = scripted(
            context=1500, tokenizer=self.tokenizer, defaults=GenerationDefaults(eos_token_ids=end_ids)
        )
        self.session, self.folder = Session(self.engine), folder

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, allow_special=True)

    def open(self, question: str, answer: str, **options: Any) -> Reply:
        reply = self.session.ask(question, GREEDY, **options)
        self.decoder.say(reply.prompt_tokens, self.ids(answer))
        return reply

    def ask(self, question: str, answer: str, **options: Any) -> Reply:
        reply = self.open(question, answer, **options)
        assert "".join(reply) == reply.text
        return reply

    def reference(self, messages: Any) -> list[int]:
        transformers = pytest.importorskip("transformers")
        tok = transformers.PreTrainedTokenizerFast(tokenizer_file=str(self.folder / "tokenizer.json"))
        template = self.tokenizer.template_source
        found = tok.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, return_dict=False)
        return list(found)


@pytest.fixture
def harmony(scripted: Any, byte_tokenizer: Callable[..., Path], shared_dir: Path) -> Callable[..., Talk]:
    """``harmony(*end_ids)``: a chat with the template of gpt-oss; ``end_ids`` are listed by the model's files."""
    template = (shared_dir / "data/chat_templates/openai-gpt-oss-120b.jinja").read_text()
    return lambda *end_ids: Talk(scripted, byte_tokenizer(template, SPECIAL), end_ids)


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize("listed", [False, True], ids=["known", "listed"])
def test_the_second_prompt_of_harmony_is_the_reference(listed: bool, harmony: Any) -> None:
    """Also where the model's files list the end of a message as one of an answer."""
    talk = harmony(*([257] if listed else []))
    assert talk.tokenizer.special_id("<|end|>") == 257
    first = talk.ask("Hi", SAID)
    assert first.text == "<think>\nThe user says hi. Greet.\n</think>\n\nHello!" and first.finish_reason == "stop"
    assert first.ids == talk.ids(SAID)
    assert "".join(text for thought, text in first.parts if not thought) == "Hello!"
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!", "thinking": "The user says hi. Greet."},
    ]
    assert talk.session.messages == messages
    second = talk.ask("More", SAID)
    assert list(second.prompt_ids) == talk.reference([*messages, {"role": "user", "content": "More"}])
    before = [*first.prompt_ids, *first.ids]
    assert second.reused_tokens == common(before, list(second.prompt_ids)) > first.prompt_tokens
    assert talk.tokenizer.decode(list(second.prompt_ids), skip_special=False).endswith(
        "<|start|>assistant<|channel|>final<|message|>Hello!<|end|><|start|>user<|message|>More<|end|><|start|>assistant"
    )


def test_an_answer_ends_where_its_final_message_does(harmony: Any) -> None:
    talk = harmony()
    reply = talk.ask("Hi", SAID.replace("<|return|>", "<|end|><|start|>user<|message|>No!"))
    assert (reply.finish_reason, talk.session.messages[-1]["content"]) == ("stop", "Hello!")
    assert reply.ids == talk.ids(SAID.replace("<|return|>", "<|end|>"))
    more = talk.session.resume(GREEDY)
    assert list(more.prompt_ids) == [*reply.prompt_ids, *reply.ids[:-1]], "it goes on before the token that ended it"


def test_a_stopped_thought_goes_on_as_one(harmony: Any) -> None:
    talk = harmony()
    reply = talk.open("Hi", SAID)
    said = 0
    for piece in reply:
        said += len(piece)
        if "says" in reply.text:
            break
    reply.close()
    cut = {"role": "assistant", "content": "", "thinking": "The user says"}
    assert talk.session.messages[-1] == cut
    rest = " hi.<|end|><|start|>assistant<|channel|>final<|message|>Hello!<|return|>"
    more = talk.session.resume(GREEDY)
    talk.decoder.say(more.prompt_tokens, talk.ids(rest))
    assert "".join(more) == " hi.\n</think>\n\nHello!" and more.parts[-1] == (False, "!")
    assert talk.session.messages[-1] == {**cut, "content": "Hello!", "thinking": "The user says hi."}
    talk.session.undo()
    assert talk.session.messages == []


def test_the_budget_ends_a_thought_as_the_model_does(harmony: Any) -> None:
    talk = harmony()
    reply = talk.open("Hi", "<|channel|>analysis<|message|>" + "m" * 100, think_budget=20)
    closing = talk.ids("<|end|><|start|>assistant<|channel|>final<|message|>")
    begin = reply.prompt_tokens + 20 + len(closing)
    talk.decoder.script |= {begin + i: token for i, token in enumerate(talk.ids("Yes.<|return|>"))}
    assert "".join(reply) == f"<think>\n{'m' * 10}\n</think>\n\nYes.", reply.text
    assert reply.ids[20 : 20 + len(closing)] == closing
    assert talk.session.messages[-1] == {"role": "assistant", "content": "Yes.", "thinking": "m" * 10}


def test_a_budget_is_for_thoughts_alone(harmony: Any) -> None:
    reply = harmony().ask("Hi", SAID, think_budget=50)
    assert reply.text.endswith("Greet.\n</think>\n\nHello!")


def test_a_conversation_in_a_file_keeps_its_thoughts(demo: Callable[..., Engine], tmp_path: Path) -> None:
    session = Session(demo("bf16"))
    session.turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!", "thinking": "Greet."},
    ]
    path = tmp_path / "talk.safetensors"
    Snapshot.take(session, GREEDY).write(path)
    assert SavedSession.read(path).session(session.engine).messages == session.turns
    for wrong in ({"thinking": 1}, {"mood": "good"}):
        session.turns[1] = {"role": "assistant", "content": "Hello!", **wrong}  # type: ignore[dict-item]
        Snapshot.take(session, GREEDY).write(path)
        with pytest.raises(OctoError, match="no message"):
            SavedSession.read(path)


def test_an_answer_that_was_loaded_goes_on(harmony: Any) -> None:
    talk = harmony()
    turn = {"role": "assistant", "content": "Hel", "thinking": "Greet."}
    talk.session.turns = [{"role": "user", "content": "Hi"}, turn]
    more = talk.session.resume(GREEDY)
    talk.decoder.say(more.prompt_tokens, talk.ids("lo!<|return|>"))
    assert "".join(more) == "lo!" and talk.session.messages[-1] == {**turn, "content": "Hello!"}
    assert talk.tokenizer.decode(list(more.prompt_ids), skip_special=False).endswith(
        "<|channel|>analysis<|message|>Greet.<|end|><|start|>assistant<|channel|>final<|message|>Hel"
    )


def test_a_batch_has_texts_of_the_same_form(harmony: Any) -> None:
    talk = harmony()
    prompt = talk.tokenizer.chat([{"role": "user", "content": "Hi"}])
    talk.decoder.say(len(prompt), talk.ids(SAID))
    done = list(talk.engine.generate_batch([prompt], GREEDY))
    assert [(one.text, one.finish_reason) for one in done] == [
        ("<think>\nThe user says hi. Greet.\n</think>\n\nHello!", "stop")
    ]


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("final", "<think>\nThe user says hi. Greet.\n</think>\n\nHello!"),
        ("an", "<think>\nThe user says hi. Greet.\n</think>\n\nHello!"),
        ("<|channel|>final", "<think>\nThe user says hi. Greet.\n</think>"),
        ("message", "<think>\nThe user says hi. Greet.\n</think>\n\nHello!"),
        ("says", "<think>\nThe user "),
        ("ll", "<think>\nThe user says hi. Greet.\n</think>\n\nHe"),
    ],
)
def test_stop_strings_do_not_stop_at_the_names_of_channels(stop: str, text: str, harmony: Any) -> None:
    talk = harmony()
    prompt = talk.tokenizer.chat([{"role": "user", "content": "Hi"}])
    talk.decoder.say(len(prompt), talk.ids(SAID))
    tokens = list(talk.engine.generate(prompt, SamplingParams(stop=(stop,))))
    assert "".join(token.text for token in tokens) == text and tokens[-1].finish_reason == "stop"


def test_a_grammar_is_followed_from_the_first_token_on(harmony: Any) -> None:
    """As with other models: it leaves no room for a thought."""
    pytest.importorskip("llguidance", reason="grammars need llguidance")
    from octo_run.engine.grammar import Grammar

    talk = harmony()
    rules = dataclasses.replace(GREEDY, grammar=Grammar("json", '{"type": "integer", "minimum": 10, "maximum": 99}'))
    reply = talk.session.ask("How many?", rules)
    talk.decoder.say(reply.prompt_tokens, talk.ids(SAID))
    text = "".join(reply)
    assert text.isdigit() and reply.finish_reason == "stop", reply
    assert talk.session.messages[-1] == {"role": "assistant", "content": text}


TWO_DIGITS = '{"type": "integer", "minimum": 10, "maximum": 99}'


def test_a_grammar_begins_behind_a_thought(scripted: Any, byte_tokenizer: Any) -> None:
    """One that the template begins, and one that goes on; wherever it ends, by itself or by the budget."""
    pytest.importorskip("llguidance", reason="grammars need llguidance")
    from octo_run.engine.grammar import Grammar

    rules = dataclasses.replace(GREEDY, grammar=Grammar("json", TWO_DIGITS))
    asked = "{% for m in messages %}[INST]{{ m.content }}{% endfor %}"
    for opening, marks in (("<think>", []), ("[THINK]", ["[THINK]", "[/THINK]"])):
        closing = opening[0] + "/" + opening[1:]
        template = f"{asked}{{% if add_generation_prompt %}}{opening}{{% endif %}}"
        talk = Talk(scripted, byte_tokenizer(template, ["[INST]", *marks, "</s>"]))
        for budget in (None, 3):
            reply = talk.session.ask("How many?", rules, think_budget=budget)
            talk.decoder.say(reply.prompt_tokens, talk.ids(f"So many.{closing}No!</s>"))
            text = "".join(reply)
            thought = "".join(text for thought, text in reply.parts if thought)
            said = "".join(text for thought, text in reply.parts if not thought).strip()
            assert thought.strip() == "So many."[:budget].strip() and said.isdigit() and len(said) == 2, (opening, text)
            assert reply.finish_reason == "stop"
        reply = talk.session.ask("How many?", dataclasses.replace(rules, max_tokens=3))
        talk.decoder.say(reply.prompt_tokens, talk.ids("So many."))
        list(reply)
        more = talk.session.resume(rules)
        talk.decoder.say(more.prompt_tokens, talk.ids(f"many.{closing}No!</s>"))
        assert "".join(more).startswith("many.") and more.parts[-1][1].strip().isdigit(), (opening, more)


def test_a_thought_in_a_channel_goes_on_free_of_the_grammar(harmony: Any) -> None:
    pytest.importorskip("llguidance", reason="grammars need llguidance")
    from octo_run.engine.grammar import Grammar

    talk = harmony()
    reply = talk.open("Hi", SAID)
    while "says" not in reply.text:
        next(reply)
    reply.close()
    more = talk.session.resume(dataclasses.replace(GREEDY, grammar=Grammar("json", TWO_DIGITS)))
    talk.decoder.say(more.prompt_tokens, talk.ids(" hi.<|end|><|start|>assistant<|channel|>final<|message|>Hello!"))
    text = "".join(more)
    assert text.startswith(" hi.\n</think>\n\n") and text[-2:].isdigit() and more.finish_reason == "stop", text


def test_thoughts_that_a_template_keeps_are_not_read_again(scripted: Any, byte_tokenizer: Any) -> None:
    """Mistral's templates write them as they were, so that the cache holds the whole answer."""
    talk = Talk(scripted, byte_tokenizer(MISTRAL, ["[INST]", "[/INST]", "[THINK]", "[/THINK]", "</s>"]))
    first = talk.ask("Hi", "[THINK]Greet.[/THINK]Hello!</s>")
    assert first.text == "<think>\nGreet.\n</think>\n\nHello!"
    message = {"role": "assistant", "content": "Hello!", "thinking": "Greet."}
    assert talk.session.messages[-1] == message
    second = talk.ask("More", "No.</s>")
    parts = [{"type": "thinking", "thinking": "Greet."}, {"type": "text", "text": "Hello!"}]
    assert list(second.prompt_ids) == talk.reference(
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": parts},
            {"role": "user", "content": "More"},
        ]
    )
    assert second.reused_tokens == first.prompt_tokens + first.generated_tokens - 1
    assert second.text == "No."


def test_the_second_prompt_of_seed_oss_is_the_reference(scripted: Any, byte_tokenizer: Any, shared_dir: Path) -> None:
    """Its template repeats thoughts, without the lines around them."""
    template = (shared_dir / "data/chat_templates/ByteDance-Seed-OSS.jinja").read_text()
    talk = Talk(scripted, byte_tokenizer(template, ["<seed:bos>", "<seed:think>", "</seed:think>", "<seed:eos>"]))
    first = talk.ask("Hi", "<seed:think>Greet.</seed:think>\nHello!<seed:eos>")
    assert first.text == "<think>\nGreet.\n</think>\n\nHello!"
    message = {"role": "assistant", "content": "\nHello!", "reasoning_content": "Greet."}
    assert talk.session.messages[-1] == message
    second = talk.ask("More", "No.<seed:eos>")
    messages = [{"role": "user", "content": "Hi"}, message, {"role": "user", "content": "More"}]
    assert list(second.prompt_ids) == talk.reference(messages)
    assert second.reused_tokens == first.prompt_tokens + first.generated_tokens - 1, "all but the token that ended it"


def test_thoughts_in_the_text_stay_where_they_are(scripted: Any) -> None:
    """Templates of such models look for ``</think>`` in a message's content."""
    engine, decoder = scripted()
    session = Session(engine)
    reply = session.ask("Hi", GREEDY)
    said = "<think>\nGreet.\n</think>\n\nHello!"
    decoder.say(reply.prompt_tokens, said)
    assert "".join(reply) == said and session.messages[-1] == {"role": "assistant", "content": said}
    assert "".join(text for thought, text in reply.parts if thought) == "\nGreet.\n"


def test_a_stopped_thought_in_the_text_goes_on_as_one(scripted: Any) -> None:
    engine, decoder = scripted()
    session = Session(engine)
    reply = session.ask("Hi", SamplingParams(max_tokens=12))
    decoder.say(reply.prompt_tokens, "<think>Greet.</think>Hello!")
    assert "".join(reply) == "<think>Greet"
    more = session.resume(GREEDY)
    assert "".join(more) == ".</think>Hello!"
    assert "".join(text for thought, text in more.parts if thought) == "."
    assert "".join(text for thought, text in more.parts if not thought) == "Hello!"


def test_an_engine_of_another_kind_of_tokenizer_has_its_own_ends(demo: Callable[..., Engine]) -> None:
    engine = demo("bf16")
    assert engine.end_ids == frozenset(
        (*engine.defaults.eos_token_ids, *engine.config.eos_token_ids, *engine.tokenizer.eos_ids)
    )


def test_what_may_have_become_a_mark_is_part_of_a_stopped_answer(scripted: Any) -> None:
    engine, decoder = scripted()
    reply = Session(engine).ask("Hi", GREEDY)
    decoder.say(reply.prompt_tokens, "<think>a </think>")
    while not reply.text.endswith("</th"):
        next(reply)
    assert reply.parts[-1] == (True, " ")
    reply.close()
    assert reply.parts[-1] == (True, "</th")


@pytest.mark.parametrize(
    ("template", "content", "answer"),
    [
        ("", "plain", "plain"),
        ("", "<think>\nso\n</think>\n\nyes", "yes"),
        ("", "a </think> in an answer", "a </think> in an answer"),
        ("x</think>y", "so\n</think>\n\nyes", "yes"),
        ("x</think>y", "no thought", "no thought"),
    ],
)
def test_the_answer_without_its_thought(template: str, content: str, answer: str) -> None:
    session = Session.__new__(Session)
    session.engine = SimpleNamespace(tokenizer=SimpleNamespace(template_source=template))  # type: ignore[assignment]
    session._open = None
    session.turns = [{"role": "assistant", "content": "older"}, {"role": "assistant", "content": content}]
    assert session.answer == answer
    session.turns.append({"role": "user", "content": "?"})
    assert session.answer == answer
    session.turns = []
    assert session.answer is None
