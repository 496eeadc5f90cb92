"""Chat sessions: turns, reuse, dropped turns, interrupts, taking back, messages that do not fit."""

from typing import Any

import pytest

from octo_run.engine import SamplingParams, Session
from octo_run.errors import OctoError, UsageError


class Talk:
    """A session with a scripted model: ``ask`` says beforehand what the answer will be."""

    def __init__(self, scripted: Any, system: str | None = None, **options: Any) -> None:
        self.engine, self.decoder = scripted(**options)
        self.session = Session(self.engine, system)

    def open(self, question: str, answer: str, **params: Any) -> Any:
        reply = self.session.ask(question, SamplingParams(**params))
        self.decoder.say(reply.prompt_tokens, answer)
        return reply

    def ask(self, question: str, answer: str, **params: Any) -> Any:
        reply = self.open(question, answer, **params)
        assert "".join(reply) == answer
        return reply

    @property
    def contents(self) -> list[str]:
        return [message["content"] for message in self.session.messages]


def test_turns_are_remembered_and_reused(scripted: Any) -> None:
    talk = Talk(scripted, system="be brief")
    first = talk.ask("hello", "hi")
    assert first.reused_tokens == 0
    second = talk.ask("more", "yes")
    roles = [message["role"] for message in talk.session.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert talk.contents == ["be brief", "hello", "hi", "more", "yes"]
    # Everything but the end token of the first answer, which was never fed, is still there.
    assert second.reused_tokens == first.prompt_tokens + len("hi")
    assert talk.decoder.fed[0] == talk.engine.tokenizer.chat(
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    )


def test_no_system_prompt_no_system_message(scripted: Any) -> None:
    talk = Talk(scripted)
    talk.ask("hello", "hi")
    assert talk.contents == ["hello", "hi"]
    talk.session.system = "now with one"
    talk.ask("and", "ok")
    assert talk.contents == ["now with one", "hello", "hi", "and", "ok"]


def test_oldest_turns_are_dropped_and_announced(scripted: Any) -> None:
    """Context 200, at least a quarter kept free for the answer; the system prompt stays."""
    talk = Talk(scripted, system="S" * 20, context=200)
    for turn in range(2):
        assert talk.ask(f"{turn}" * 30, f"{turn}" * 10).dropped_turns == 0
    third = talk.ask("2" * 30, "2" * 10)
    assert third.dropped_turns == 2, "once turns must go, room is made up to three quarters of the context"
    assert talk.contents == ["S" * 20, "2" * 30, "2" * 10]
    fourth = talk.ask("3" * 90, "33")
    assert fourth.dropped_turns == 1
    assert talk.contents == ["S" * 20, "3" * 90, "33"]


def test_room_for_the_answer_follows_max_tokens(scripted: Any) -> None:
    talk = Talk(scripted, context=200)
    talk.ask("a" * 60, "b" * 60)
    assert talk.ask("c" * 50, "d", max_tokens=10).dropped_turns == 0
    assert talk.ask("e", "f").dropped_turns == 1


def test_a_message_that_does_not_fit_changes_nothing(scripted: Any) -> None:
    talk = Talk(scripted, system="S", context=200)
    talk.ask("hello", "hi")
    with pytest.raises(UsageError, match="by itself and the context holds 200") as caught:
        talk.session.ask("x" * 300)
    assert str(caught.value).count(".") == 1
    assert talk.contents == ["S", "hello", "hi"]
    assert talk.ask("and now", "yes").dropped_turns == 0
    assert talk.contents == ["S", "hello", "hi", "and now", "yes"]


def test_a_message_that_fits_with_no_room_to_spare(scripted: Any) -> None:
    """The answer is as long as the context allows, and says so."""
    talk = Talk(scripted, context=200)
    reply = talk.open("x" * 190, "y" * 50)
    assert reply.prompt_tokens == 196
    assert "".join(reply) == "y" * 5
    assert reply.finish_reason == "context"
    assert talk.ask("z", "ok").dropped_turns == 1


def test_an_empty_message_is_refused(scripted: Any) -> None:
    talk = Talk(scripted)
    with pytest.raises(UsageError, match="empty"):
        talk.session.ask(" \n")
    assert talk.contents == []


def test_a_refusal_of_the_template_leaves_the_session_as_it_was(scripted: Any) -> None:
    talk = Talk(scripted)
    talk.ask("hello", "hi")
    with pytest.raises(ValueError, match="template"):
        talk.session.ask("refuse")
    assert talk.contents == ["hello", "hi"]
    talk.ask("more", "yes")


def test_an_interrupted_answer_is_kept(scripted: Any) -> None:
    talk = Talk(scripted)
    reply = talk.open("tell me", "a long story")
    said = [next(reply) for _ in range(6)]
    reply.close()
    assert (reply.finish_reason, reply.text) == ("interrupted", "a long")
    assert talk.contents == ["tell me", "".join(said)]
    following = talk.ask("go on", " story")
    assert following.reused_tokens == reply.prompt_tokens + 5
    assert talk.contents == ["tell me", "a long", "go on", " story"]


@pytest.mark.parametrize("after", [0, 3], ids=["while the prompt is read", "during the answer"])
def test_a_turn_that_fails_leaves_the_session_as_it_was(
    scripted: Any, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Old turns that it dropped included; so does an answer that was to go on."""
    talk = Talk(scripted, context=200)
    for number in range(2):
        talk.ask(f"{number}" * 30, f"{number}" * 40)
    assert "".join(talk.open("more", "abcdefgh", max_tokens=4)) == "abcd"
    before = talk.contents

    def run_out(*_: Any, **__: Any) -> None:
        raise MemoryError("of the device")

    def go_on() -> Any:
        more = talk.session.resume(SamplingParams())
        talk.decoder.say(more.prompt_tokens, "efgh")
        return more

    for begin in (lambda: talk.open("x" * 90, "yyyyyy"), go_on):
        reply = begin()
        for _ in range(after):
            next(reply)
        with monkeypatch.context() as patch:
            patch.setattr(talk.engine.step, "read_with_tops", run_out)
            with pytest.raises(MemoryError):
                next(reply)
        assert talk.contents == before
    assert "".join(go_on()) == "efgh", "the ids that it goes on from are there, too"


def test_a_mark_is_gone_back_to(scripted: Any) -> None:
    talk = Talk(scripted)
    talk.ask("one", "1")
    mark = talk.session.mark()
    assert talk.session.question == talk.session.undo() == "one" and talk.session.question is None
    next(talk.open("two", "222"))
    talk.session.restore(mark)
    assert talk.contents == ["one", "1"]


def test_asking_again_ends_an_open_answer(scripted: Any) -> None:
    talk = Talk(scripted)
    reply = talk.open("tell me", "a long story")
    next(reply)
    talk.ask("stop", "ok")
    assert reply.finish_reason == "interrupted"
    assert list(reply) == []
    assert talk.contents == ["tell me", "a", "stop", "ok"]


@pytest.mark.parametrize("layer", [0, 1])
def test_ctrl_c_in_the_prefill(layer: int, scripted: Any) -> None:
    talk = Talk(scripted)
    talk.ask("hello", "hi")
    reply = talk.open("x" * 200, "never")
    talk.decoder.fail_at = (100, layer)
    with pytest.raises(KeyboardInterrupt):
        next(reply)
    assert talk.contents == ["hello", "hi", "x" * 200, ""]
    assert talk.session.undo() == "x" * 200
    assert talk.ask("y" * 100, "good").reused_tokens <= 64


def test_ctrl_c_while_the_progress_of_the_prompt_is_told(scripted: Any) -> None:
    """The chunk that was read is reused when the question is asked again, and other questions too are answered."""
    talk = Talk(scripted, context=1500)
    talk.ask("hello", "hi")
    told: list[tuple[int, int]] = []

    def interrupt(read: int, total: int) -> None:
        told.append((read, total))
        if read:
            raise KeyboardInterrupt

    reply = talk.session.ask("x" * 1000, SamplingParams(), interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(reply)
    held, fresh = reply.reused_tokens, reply.prompt_tokens - reply.reused_tokens
    assert told == [(0, fresh), (512, fresh)]
    reply.close()
    assert talk.contents == ["hello", "hi", "x" * 1000, ""]
    assert talk.session.undo() == "x" * 1000
    assert talk.ask("x" * 1000, "good").reused_tokens == held + 512
    assert talk.contents == ["hello", "hi", "x" * 1000, "good"]
    talk.ask("more", "yes")


def test_ctrl_c_between_tokens(scripted: Any) -> None:
    talk = Talk(scripted)
    reply = talk.open("hello", "abcdef")
    assert next(reply) == "a"
    talk.decoder.fail_at = (reply.prompt_tokens + 1, 1)
    assert next(reply) == "b"
    with pytest.raises(KeyboardInterrupt):
        next(reply)
    reply.close()
    assert talk.contents == ["hello", "ab"]
    assert talk.ask("more", "yes").reused_tokens == reply.prompt_tokens + 1


def test_undo_takes_back_the_last_question(scripted: Any) -> None:
    talk = Talk(scripted, system="S")
    assert talk.session.undo() is None
    talk.ask("one", "1")
    talk.ask("two", "2")
    assert talk.session.undo() == "two"
    assert talk.contents == ["S", "one", "1"]
    assert talk.ask("three", "3").reused_tokens > 0
    assert [talk.session.undo() for _ in range(3)] == ["three", "one", None]
    assert talk.contents == ["S"]


def test_clear_forgets_all_but_the_system_prompt(scripted: Any) -> None:
    talk = Talk(scripted, system="S")
    talk.ask("one", "1")
    next(talk.open("two", "222"))
    talk.session.clear()
    assert talk.contents == ["S"]
    assert talk.ask("three", "3").prompt_tokens < 20


def test_the_models_own_sampling_is_the_default(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(scripted)
    used = []
    monkeypatch.setattr(SamplingParams, "from_defaults", lambda defaults: used.append(defaults) or SamplingParams())
    talk.session.ask("hello")
    assert used == [talk.engine.defaults]


def test_a_model_without_a_template_cannot_chat(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = scripted()
    monkeypatch.setattr(type(engine.tokenizer), "has_chat_template", False)
    with pytest.raises(OctoError, match="octo-run generate"):
        Session(engine)


@pytest.mark.few(1)
@pytest.mark.parametrize("kv", ["bf16", "octopus3"])
def test_the_demo_model_books_a_table(kv: str, demo: Any) -> None:
    """Two turns with the real model; the second reuses all of the first but its end token."""
    session = Session(demo(kv))
    first = session.ask("I want to book a table for two in San Jose tonight.")
    answer = "".join(first)
    assert first.finish_reason == "stop"
    assert "?" in answer and len(answer) < 200
    second = session.ask("Italian food please, at 7 pm.")
    assert "".join(second)
    assert second.reused_tokens >= first.prompt_tokens
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 2


def test_an_answer_goes_on_where_it_was_stopped(scripted: Any) -> None:
    """In the cache, too; the conversation has one answer of both parts."""
    talk = Talk(scripted)
    reply = talk.open("hello", "one two three", max_tokens=4)
    assert "".join(reply) == "one " and reply.finish_reason == "length"
    assert talk.contents == ["hello", "one "]
    more = talk.session.resume(SamplingParams())
    assert "".join(more) == "two three" and more.finish_reason == "stop"
    assert more.reused_tokens == more.prompt_tokens - 1
    assert talk.contents == ["hello", "one two three"]
    assert talk.ask("next", "yes").reused_tokens > 0


def test_a_stopped_answer_goes_on_with_half_a_character(scripted: Any) -> None:
    talk = Talk(scripted)
    said = "\U0001f600!".encode()
    reply = talk.open("hello", said.decode(), max_tokens=2)
    assert "".join(reply) == "\ufffd"
    more = talk.session.resume(SamplingParams())
    assert "".join(more) == said.decode() and talk.contents == ["hello", said.decode()]


def test_what_was_held_back_when_an_answer_was_stopped_is_said_when_it_goes_on(scripted: Any) -> None:
    """The ids have it; and it may still become a stop string."""
    for rest, left, reason in (("z end", "z end", "stop"), ("zy end", "", "stop"), ("zz", "zz", "length")):
        talk = Talk(scripted)
        reply = talk.open("hello", f"ab{rest}", stop=("zy",))
        talk.decoder.fail_at = reply.prompt_tokens + 2, 0  # Ctrl-C when z is fed, which may become a stop string
        assert next(reply) + next(reply) == "ab"
        with pytest.raises(KeyboardInterrupt):
            next(reply)
        assert talk.contents == ["hello", "ab"] and bytes(reply.ids) == b"abz"
        more = talk.session.resume(SamplingParams(stop=("zy",), max_tokens=1 if reason == "length" else 9))
        assert "".join(more) == left and more.finish_reason == reason
        assert talk.contents == ["hello", f"ab{left}"]


def test_an_answer_that_was_cut_within_a_mark_goes_on(scripted: Any) -> None:
    """The mark ends the thought as it would have done."""
    talk = Talk(scripted)
    reply = talk.open("hello", "<think>hm</think>yes", max_tokens=12)
    assert "".join(reply) == "<think>hm</t" and {thought for thought, _ in reply.parts} == {True}
    more = talk.session.resume(SamplingParams())
    assert "".join(more) == "hink>yes" and {thought for thought, _ in more.parts} == {False}
    assert talk.contents == ["hello", "<think>hm</think>yes"]


def test_a_thought_that_is_ended_loses_nothing_that_was_held_back(scripted: Any) -> None:
    talk = Talk(scripted)
    reply = talk.session.ask("hello", SamplingParams(stop=("zy",)), think_budget=8)
    talk.decoder.say(reply.prompt_tokens, "<think>z" + "?" * 12 + "yes")
    assert "".join(reply) == reply.text and reply.text.startswith("<think>z\n</think>\n"), reply.text


def test_a_thought_that_the_context_has_no_room_to_end(scripted: Any) -> None:
    talk = Talk(scripted, context=200)
    reply = talk.session.ask("x" * 180, SamplingParams(), think_budget=9)
    talk.decoder.say(reply.prompt_tokens, "<think>ab and more")
    assert "".join(reply) == "<think>ab" and reply.finish_reason == "context"


def test_whoever_asks_for_the_conversation_gets_all_of_it(scripted: Any) -> None:
    """The last answer, too; one that failed is no part of it, nor of a conversation that is set in its place."""
    talk = Talk(scripted)
    talk.ask("hello", "hi")
    assert [turn["content"] for turn in talk.session.turns] == ["hello", "hi"]
    reply = talk.open("more", "yes")
    talk.decoder.fail_at, talk.decoder.failure = (reply.prompt_tokens + 1, 0), MemoryError
    with pytest.raises(MemoryError):
        "".join(reply)
    assert talk.session.question == "hello" and len(talk.session.turns) == 2
    talk.open("and", "so")
    talk.session.turns = [{"role": "user", "content": "else"}, {"role": "assistant", "content": "no"}]
    assert talk.contents == ["else", "no"]


def test_an_answer_that_was_loaded_goes_on(scripted: Any) -> None:
    """Without the ids of its reply: behind the last word, before the token that ends the turn."""
    talk = Talk(scripted)
    talk.session.turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "one "}]
    ids = talk.engine.tokenizer.chat(talk.session.turns, add_generation_prompt=False)
    talk.decoder.say(len(ids) - 1, "two")
    more = talk.session.resume(SamplingParams())
    assert "".join(more) == "two" and talk.contents == ["hello", "one two"]


def test_there_must_be_an_answer_to_go_on_with(scripted: Any) -> None:
    talk = Talk(scripted)
    with pytest.raises(UsageError, match="no answer to continue"):
        talk.session.resume()
    talk.ask("hello", "hi")
    talk.session.undo()
    with pytest.raises(UsageError, match="no answer to continue"):
        talk.session.resume()


def test_an_answer_goes_on_in_the_conversation_that_there_is(scripted: Any) -> None:
    """Not in one that was taken back and ended with the same words, nor behind a former system prompt."""
    talk = Talk(scripted, system="be brief")
    talk.ask("hello", "yes")
    talk.ask("sure?", "yes")
    mark = talk.session.mark()
    talk.session.undo()
    more = talk.session.resume(SamplingParams())
    assert bytes(i for i in more.prompt_ids if i < 256) == b"sbe briefuhelloayes"
    talk.session.restore(mark)
    talk.session.system = "be long"
    more = talk.session.resume(SamplingParams())
    assert bytes(i for i in more.prompt_ids if i < 256) == b"sbe longuhelloayesusure?ayes"


def test_a_full_context_may_stop_the_conversation(scripted: Any) -> None:
    talk = Talk(scripted, context=200)
    talk.session.drops = False
    talk.ask("hello", "A" * 90)
    with pytest.raises(UsageError, match="The context is full"):
        talk.session.ask("more " * 10, SamplingParams())
    assert talk.contents == ["hello", "A" * 90]


def test_the_template_sees_the_session_s_variables(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    talk = Talk(scripted)
    chat = talk.engine.tokenizer.chat

    def watched(messages: Any, **variables: Any) -> list[int]:
        seen.append(variables)
        return list(chat(messages))

    monkeypatch.setattr(talk.engine.tokenizer, "chat", watched)
    talk.session.variables = {"enable_thinking": False}
    talk.ask("hello", "hi")
    assert seen and all(variables == {"enable_thinking": False} for variables in seen)
