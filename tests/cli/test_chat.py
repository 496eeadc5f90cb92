"""``chat``: piped and at a terminal, slash commands, Ctrl-C, notices."""

import base64
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octo_run.cli import chat
from octo_run.cli.chat import EXAMPLES
from octo_run.cli.chat_commands import HELP
from octo_run.cli.conversation import Conversation
from octo_run.cli.keeper import Keeper

LINE = b"one\n"


def test_piped_lines_are_turns_and_only_answers_come_out(octo: Callable[..., Any], engine: Any) -> None:
    engine.answers("first", "second\nline")
    shown = octo("chat", "--system", "S", data=b"one\n\n  two \r\n")
    assert (shown.code, shown.out, shown.err) == (0, "first\nsecond\nline\n", "")
    assert engine.session.asked == ["one", "two"] and engine.session.system == "S"


def test_piped_without_input_ends_at_once(octo: Callable[..., Any], engine: Any) -> None:
    assert octo("chat").code == 0


def test_last_line_without_line_feed_counts(octo: Callable[..., Any], engine: Any) -> None:
    engine.answers("yes")
    assert octo("chat", data="é".encode()).out == "yes\n"
    assert engine.session.asked == ["é"]


def test_piped_failure_ends_with_its_exit_code(octo: Callable[..., Any], engine: Any) -> None:
    engine.answers("first")
    shown = octo("chat", data=b"one\ntoo long\nthree\n")
    assert shown.code == 2 and shown.out == "first\n"
    assert (
        shown.err == "octo-run: The prompt has 5,000 tokens and the context holds 4,096; shorten it or raise --ctx.\n"
    )


def test_piped_bad_utf8_names_the_line(octo: Callable[..., Any], engine: Any) -> None:
    engine.answers("first")
    shown = octo("chat", data=b"one\na\xff\n")
    assert shown.code == 2 and "line 2 of standard input is not UTF-8 text: byte 1" in shown.err


def test_piped_ctrl_c_ends_with_130_and_what_was_said(octo: Callable[..., Any], engine: Any) -> None:
    engine.answers("")
    engine.replies[0].pieces = ["half", "^C", " more", " never"]
    shown = octo("chat", data=b"one\ntwo\n")
    assert shown.code == 130 and shown.out == "half more\n"


def test_piped_commands_write_to_stderr(octo: Callable[..., Any], engine: Any) -> None:
    engine.answers("a", "b")
    shown = octo("chat", data=b"one\n/help\n/stats\n/clear\n/system New\n//slash\n/exit\nnever\n")
    assert shown.code == 0 and shown.out == "a\nb\n"
    assert HELP in shown.err and "1 turn: 12 prompt tokens" in shown.err and "planned memory 1.24 kB" in shown.err
    assert engine.session.asked == ["/slash"] and engine.session.cleared == 1 and engine.session.system == "New"


@pytest.mark.parametrize("line", ["/etc/passwd says?", "/ is the root", "1/2"])
def test_text_with_slashes_is_text(octo: Callable[..., Any], engine: Any, line: str) -> None:
    engine.answers("a")
    assert octo("chat", data=line.encode()).code == 0
    assert engine.session.asked == [line]


def test_dropped_turns_are_said(octo: Callable[..., Any], engine: Any) -> None:
    engine.answers("a", "b")
    engine.replies[0].dropped_turns, engine.replies[1].dropped_turns = 1, 3
    shown = octo("chat", data=b"one\ntwo\n")
    assert shown.out == "a\nb\n"
    assert "the context is full: 1 old turn was dropped\n" in shown.err
    assert "the context is full: 3 old turns were dropped\n" in shown.err


@pytest.mark.parametrize(
    ("reason", "says"), [("context", "the context is full: the answer"), ("length", "--max-tokens")]
)
def test_an_answer_that_was_cut_is_said(octo: Callable[..., Any], engine: Any, reason: str, says: str) -> None:
    engine.answers("a")
    engine.replies[0].reason = reason
    assert says in octo("chat", data=LINE).err


def test_terminal_greets_answers_and_reports(octo: Callable[..., Any], engine: Any, terminal: Any) -> None:
    engine.answers("hello", "again")
    engine.replies[1].reused_tokens = 8
    terminal(["one", "", "two"])
    shown = octo("chat")
    assert shown.code == 0
    assert all(example in shown.out for example in EXAMPLES)
    assert "\nhello\n[1 token, first after 0.25 s]\n\n" in shown.out, "the answer is set off from question and prompt"
    assert " = " not in shown.out and "reused" not in shown.out


def test_terminal_greeting_for_other_models_is_short(octo: Callable[..., Any], engine: Any, terminal: Any) -> None:
    terminal([])
    shown = octo("chat", "-m", "org/name")
    assert EXAMPLES[0] not in shown.out and "/help" in shown.out


def test_terminal_ctrl_c_stops_the_answer_and_keeps_the_session(
    octo: Callable[..., Any], engine: Any, terminal: Any
) -> None:
    engine.answers("", "after")
    stopped = engine.replies[0]
    stopped.pieces = ["half", "^C", " more", " never"]
    terminal(["one", "two"])
    shown = octo("chat")
    assert shown.code == 0 and "half more\n[stopped, " in shown.out and "after" in shown.out
    assert "never" not in shown.out and stopped.finish_reason == "interrupted"
    assert engine.session.asked == ["one", "two"]


def test_ctrl_c_before_the_answer_interrupts_at_once(octo: Callable[..., Any], engine: Any, terminal: Any) -> None:
    engine.answers("", "after")
    engine.replies[0].pieces = ["^C", "never"]
    terminal(["one", "two"])
    shown = octo("chat")
    assert shown.code == 0 and "stopped" in shown.out and "never" not in shown.out and "after" in shown.out
    assert "12 of 12 prompt tokens read" in shown.out


def test_a_second_ctrl_c_leaves(octo: Callable[..., Any], engine: Any, terminal: Any) -> None:
    """During the answer, or at the prompt within two seconds of the first one."""
    engine.answers("")
    engine.replies[0].pieces = ["half", "^C", "^C", "never"]
    terminal(["one", "two"])
    shown = octo("chat")
    assert shown.code == 130 and "[stopped, " in shown.out and "never" not in shown.out
    assert engine.session.asked == ["one"]
    engine.answers("", "after")
    engine.replies[0].pieces = ["half", "^C", " more", "never"]
    terminal(["one", KeyboardInterrupt, "two"])
    shown = octo("chat")
    assert shown.code == 130 and "Ctrl-C again leaves]" in shown.out and engine.session.asked == ["one"]


def test_later_than_two_seconds_ctrl_c_is_the_first_one_again(
    octo: Callable[..., Any], engine: Any, terminal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "TWICE", 0.0)
    engine.answers("", "after")
    engine.replies[0].pieces = ["half", "^C", " more", "never"]
    terminal(["one", KeyboardInterrupt, "two"])
    shown = octo("chat")
    assert shown.code == 0 and engine.session.asked == ["one", "two"]
    assert shown.out.count("Ctrl-C again or Ctrl-D leaves.") == 1


@pytest.mark.parametrize("line", ["/clear xyz", "/undo 3", "/REGEN x", "/edit x", "/continue x", "/sessions x",
                                  "/copy x", "/tokens x", "/stats\t x", "/exit now"])  # fmt: skip
def test_what_a_command_does_not_take_is_refused(octo: Callable[..., Any], engine: Any, line: str) -> None:
    engine.answers("a", "b")
    shown = octo("chat", data=f"one\n{line}\n".encode())
    name = line.split()[0].lower()
    assert shown.code == 2 and shown.out == "a\n" and engine.session.asked == ["one"] and not engine.session.cleared
    assert f"{name} takes no argument, and " in shown.err and f"; {name}: " in shown.err


def test_the_help_of_one_command(octo: Callable[..., Any], engine: Any) -> None:
    for line in ("/help read", "/help /read", "/? READ"):
        assert octo("chat", data=line.encode()).err.startswith("/read FILE: send the text of a file"), line


def test_leaving_as_other_programs_do(octo: Callable[..., Any], engine: Any, terminal: Any) -> None:
    """Is told how it is done here; in a pipe a word is a question."""
    for line in ("/quit", "/q", "/bye", "/QUIT"):
        shown = octo("chat", data=line.encode())
        assert shown.code == 2 and "did you mean /exit?" in shown.err, line
    engine.answers("a", "b")
    assert octo("chat", data=b"quit\n").code == 0 and engine.session.asked == ["quit"]
    terminal(["quit", "exit", ":q", '"""quit"""'])
    shown = octo("chat")
    assert shown.code == 0 and shown.err.count("/exit or Ctrl-D leaves") == 3 and engine.session.asked == ["quit"]


@pytest.mark.parametrize("line", ["/", "/?", "/ help", "/HELP", "/help me"])
def test_questions_about_commands_are_no_messages(octo: Callable[..., Any], engine: Any, line: str) -> None:
    shown = octo("chat", data=line.encode())
    assert shown.code == 0 and HELP in shown.err and engine.session.asked == []


@pytest.mark.parametrize(
    ("line", "near"),
    [
        ("/hlep", "/help"),
        ("/ststs", "/stats"),
        ("/show info", "/stats"),
        ("/reed x", "/read"),
        ("/sytem none", "/system"),
    ],
)
def test_the_nearest_command_is_named(octo: Callable[..., Any], engine: Any, line: str, near: str) -> None:
    shown = octo("chat", data=line.encode())
    assert shown.code == 2 and f"did you mean {near}?" in shown.err and engine.session.asked == []


def test_nothing_is_near_for_its_slash_alone(octo: Callable[..., Any], engine: Any) -> None:
    shown = octo("chat", data=b"/nope\n")
    assert shown.code == 2 and "there is no command /nope; /help lists the commands" in shown.err


def test_a_block_of_lines_is_one_message(octo: Callable[..., Any], engine: Any) -> None:
    engine.answers("a", "b")
    shown = octo("chat", data=b'"""one\n\n/two\nthree"""\n"""four"""\n')
    assert shown.code == 0 and engine.session.asked == ["one\n\n/two\nthree", "four"]
    shown = octo("chat", data=b'"""one\ntwo\n')
    assert shown.code == 2 and "line 1 of standard input begins a block that no line" in shown.err


def test_the_first_message_may_be_an_option(octo: Callable[..., Any], engine: Any, terminal: Any) -> None:
    engine.answers("a", "b")
    assert octo("chat", "-p", "one", data=b"two\n").out == "a\nb\n"
    engine.answers("a", "b")
    terminal(["two"])
    assert octo("chat", "-p", "one").code == 0 and engine.session.asked == ["one", "two"]


def test_a_full_context_is_warned_of(octo: Callable[..., Any], engine: Any) -> None:
    engine.answers("a", "b")
    engine.replies[0].prompt_tokens, engine.replies[1].prompt_tokens = 3684, 3686
    shown = octo("chat", data=b"one\n")
    assert "% full" not in shown.err
    assert "the context is 90 % full: the oldest turns will be dropped" in octo("chat", data=b"one\n").err


def test_a_file_goes_with_the_next_message(octo: Callable[..., Any], engine: Any, tmp_path: Path) -> None:
    engine.answers("a", "b")
    (tmp_path / "note.txt").write_text("the text\n")
    lines = f"/read {tmp_path}/note.txt\nWhat does it say?\nAnd now?\n"
    shown = octo("chat", data=lines.encode())
    assert shown.code == 0 and "note.txt: 8 characters go with the next message" in shown.err
    assert engine.session.asked == ["the text\n\nWhat does it say?", "And now?"]
    for wrong, says in (
        ("/read", "give one: /read FILE"),
        ("/read /none", "no such file"),
        (f"/read {tmp_path}", "is a folder"),
    ):
        shown = octo("chat", data=wrong.encode())
        assert shown.code == 2 and says in shown.err


def test_terminal_second_ctrl_c_at_the_prompt_leaves(octo: Callable[..., Any], engine: Any, terminal: Any) -> None:
    engine.answers("a")
    terminal([KeyboardInterrupt, "one", KeyboardInterrupt, KeyboardInterrupt, "never"])
    shown = octo("chat")
    assert shown.code == 130 and engine.session.asked == ["one"]
    assert shown.out.count("Ctrl-C again or Ctrl-D leaves.") == 2


def test_terminal_failures_keep_the_session(octo: Callable[..., Any], engine: Any, terminal: Any) -> None:
    engine.answers("a")
    terminal(["too long", "/bogus", "one", "/exit", "never"])
    shown = octo("chat")
    assert shown.code == 0 and engine.session.asked == ["one"]
    assert "The prompt has 5,000 tokens" in shown.err and "there is no command /bogus" in shown.err


def test_regen_asks_again_and_says_when_little_will_differ(
    octo: Callable[..., Any], engine: Any, terminal: Any
) -> None:
    engine.answers("a", "b")
    terminal(["/regen", "one", "/regen"])
    shown = octo("chat")
    assert "there is no question to answer again" in shown.err
    assert "without chance the answer will hardly differ" in shown.out
    assert engine.session.asked == ["one"]
    for argv, says in ((["--seed", "1"], "with --seed the answer will hardly differ"), ([], None)):
        engine.answers("a", "b")
        terminal(["one", "/regen"])
        out = octo("chat", "--temp", "0.5", *argv).out
        assert "hardly differ" not in out if says is None else says in out


def test_control_characters_do_not_reach_a_terminal(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    from octo_run.cli import console

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen, pipe = Terminal(), io.StringIO()
    for stream in (screen, pipe):
        monkeypatch.setattr(sys, "stdout", stream)
        console.stream("a\x1b[2Jb\x9bc\td\r\n\x07")
    assert screen.getvalue() == "a[2Jbc\td\n" and pipe.getvalue() == "a\x1b[2Jb\x9bc\td\r\n\x07"


def test_dim_only_where_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from octo_run.cli import console

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert console.dim("x") == "\x1b[2mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.dim("x") == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert console.dim("x") == "x"


def test_a_system_prompt_can_be_taken_back(octo: Callable[..., Any], engine: Any) -> None:
    shown = octo("chat", "--system", "Old", data=b"/system\n/system none\n/system\n/system None of it\n")
    assert shown.code == 0
    says = ["Old", "(none)", "(none)", "None of it"]
    assert shown.err.splitlines() == [f"system prompt: {text}" for text in says]


def test_a_system_prompt_that_the_template_refuses_does_not_stick(
    octo: Callable[..., Any], terminal: Any, make_checkpoint: Callable[..., Path], shared_dir: Path
) -> None:
    """With Gemma's real template, which takes none."""
    folder = make_checkpoint()
    path = folder / "tokenizer_config.json"
    template = (shared_dir / "data" / "chat_templates" / "google-gemma-2-2b-it.jinja").read_text("utf-8")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    argv = ("chat", "-m", str(folder), "--device", "cpu", "-n", "2")
    terminal(["/system Be kind.", "/system", "Hello.", "/system none", "Hello."])
    shown = octo(*argv)
    assert shown.code == 0 and shown.err.count("System role not supported") == 1, shown.err
    assert shown.out.count("[system prompt: (none)") == 3 and "(none), as before]" in shown.out
    assert shown.out.count("stopped after --max-tokens") + shown.out.count(" tokens/s") >= 2, "both are answered"
    terminal([])
    shown = octo(*argv, "--system", "Be kind.")
    assert shown.code == 1 and "System role not supported" in shown.err


def test_ctrl_c_leaves_as_soon_as_it_is_said_that_it_does(
    octo: Callable[..., Any], engine: Any, terminal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.answers("")
    engine.replies[0].pieces = ["half", "^C", " more", " never"]
    say, close, unsaved = Conversation._say_cost, Keeper.close, []

    def say_and_interrupt(self: Conversation, reply: Any) -> None:
        say(self, reply)
        signal.raise_signal(signal.SIGINT)

    def see(self: Keeper, chat: Conversation) -> None:
        unsaved.append(self._behind)
        close(self, chat)

    monkeypatch.setattr(Conversation, "_say_cost", say_and_interrupt)
    monkeypatch.setattr(Keeper, "close", see)
    terminal(["one", "two"])
    shown = octo("chat")
    assert shown.code == 130 and "Ctrl-C again leaves]" in shown.out
    assert unsaved == [True], "an answer that was stopped is saved at the end"


def test_a_failure_that_nobody_expected_keeps_the_conversation(
    octo: Callable[..., Any], terminal: Callable[[list[Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Conversation.take

    def failing(chat: Conversation, text: str) -> None:
        if text == "two":
            raise ZeroDivisionError("of a fault")
        take(chat, text)

    monkeypatch.setattr(Conversation, "take", failing)
    terminal(["one", "two", "three"])
    result = octo("chat")
    assert result.code == 0 and result.err.count("unexpected failure (ZeroDivisionError: of a fault)") == 1
    terminal(["one", "two"])
    assert "Traceback" in octo("--debug", "chat").err


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(
    octo: Callable[..., Any], terminal: Callable[[list[Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is a question, an answer that goes on, or one that is given again."""
    from octo_run.engine.step import Stepper

    fails, read, take = False, Stepper.read_with_tops, Conversation.take

    def failing(*given: Any) -> Any:
        if fails:
            raise ZeroDivisionError("of a fault")
        return read(*given)

    def taken(chat: Conversation, text: str) -> None:
        nonlocal fails
        before, fails = chat.session.messages, text in ("two", "/regen", "/continue")
        try:
            take(chat, text)
        finally:
            assert not fails or chat.session.messages == before

    monkeypatch.setattr(Stepper, "read_with_tops", failing)
    monkeypatch.setattr(Conversation, "take", taken)
    terminal(["one", "two", "/regen", "/continue", "three", "/tokens"])
    shown = octo("chat", "-n", "4", "--device", "cpu", "--ctx", "512")
    assert shown.err.count("unexpected failure (ZeroDivisionError: of a fault)") == 3 and "Assertion" not in shown.err
    assert "2 questions: " in shown.out


def test_ctrl_c_before_a_message_is_sent_keeps_its_file(
    octo: Callable[..., Any], engine: Any, terminal: Any, tmp_path: Path
) -> None:
    """Rendering a long text takes a while."""
    (tmp_path / "note.txt").write_text("the text\n")
    engine.answers("a")
    pressed = False

    def ask(text: str, *given: Any) -> Any:
        nonlocal pressed
        if not pressed:
            pressed = True
            signal.raise_signal(signal.SIGINT)
        return FakeSession.ask(engine.session, text, *given)

    def watched(fake: Any, system: str | None, **options: Any) -> Any:
        session = FakeSession(fake, system, **options)
        session.ask = ask  # type: ignore[method-assign]
        return session

    from octo_run.cli import runtime

    from .conftest import FakeSession

    runtime.open_session = watched  # type: ignore[assignment]  # which the engine's fixture puts back
    terminal([f"/read {tmp_path}/note.txt", "one", "two"])
    shown = octo("chat")
    assert shown.code == 0 and "[stopped, nothing was sent" in shown.out
    assert engine.session.asked == ["the text\n\ntwo"]


REAL = ("chat", "--device", "cpu", "--ctx", "256", "-n", "3")


@pytest.mark.parametrize(
    ("line", "near"),
    [
        ("/kv oct33", "oct3"), ("/kv oct4:otc3", "oct3"), ("/model octo-dmeo", "octo-demo"),
    ],
)  # fmt: skip
def test_the_nearest_model_and_format_are_named(octo: Callable[..., Any], line: str, near: str) -> None:
    shown = octo(*REAL, "-q", data=line.encode())
    assert shown.code == 2 and re.search(f"did you mean '?{near}'?[?,]", shown.err)


def test_every_setting_that_is_listed_can_be_set_or_is_fixed(octo: Callable[..., Any]) -> None:
    listed = octo(*REAL, "-q", "--regex", "[a-z ]*", data=b"/set\n").err.splitlines()
    assert "grammar             a regular expression of 7 characters  (fixed: by --json-schema" in listed[-1]
    values = {"stop": "x", "logit_bias": "5=3 7=-100", "xtc_threshold": "0.2", "min_p": "0.5"}
    lines = list[str]()
    for line in listed[:-1]:
        name = line.split()[0]
        lines += [f"/set {name} {values.get(name, 1)}", f"/set {name}"]
    shown = octo(*REAL, "-q", data="\n".join(lines).encode())
    told = shown.err.splitlines()
    assert shown.code == 0 and told[::2] == told[1::2] and len(told) == len(lines), shown.err
    shown = octo(*REAL, "-q", data=b"/set grammar x")
    assert shown.code == 2 and "grammar is fixed while a chat runs" in shown.err


def test_settings_as_other_programs_write_them(octo: Callable[..., Any]) -> None:
    """``/set NAME=VALUE`` is understood; their names are told with ours."""
    lines = ("temperature=0.5", "logit_bias 5=3", "stop ===", "stop==", "max-tokens=1k", "temp 2")
    shown = octo(*REAL, "-q", data="".join(f"/set {line}\n" for line in lines).encode())
    told = ["temperature 0.5", "logit_bias 5=3", "stop '==='", "stop '='", "max_tokens 1024", "temperature 2.0"]
    assert shown.code == 0 and shown.err.splitlines() == told, shown
    cases = {
        "num_predict 5": "did you mean max_tokens?", "repeat_penalty=1": "did you mean repetition_penalty?",
        "num_ctx 4096": "--max-context says it when the chat begins.",
        "parameter top_k 5": "did you mean /set NAME VALUE?",
        "system x": "did you mean /system TEXT?", "nothink": "did you mean /think off?",
        "tempe 1": "did you mean temperature?",
        "x" * 500 + " 1": "... xxx",
    }  # fmt: skip
    for line, says in cases.items():
        shown = octo(*REAL, "-q", data=f"/set {line}\n".encode())
        assert shown.code == 2 and says in shown.err and len(shown.err) < 420, (line, shown)


def test_an_answer_of_nothing_is_told(octo: Callable[..., Any], engine: Any, terminal: Any) -> None:
    engine.answers("", "A word.")
    terminal(["one", "two"])
    out = octo("chat").out
    assert out.count("the model ends the answer here, ") == 1, out
    assert out.index("the model ends the answer here") < out.index("A word.")


def test_a_bias_on_a_token_that_there_is_not(octo: Callable[..., Any]) -> None:
    """Is refused when it is set, and nothing has changed."""
    for argv in (REAL, ("generate", "-p", "x", "-n", "2", "--device", "cpu")):
        shown = octo(*argv, "-q", "--logit-bias", "8192=1", data=b"")
        refused = "names the token 8192 and the vocabulary has 8,192", "the model has the tokens 0 to 8191"
        assert shown.code == 2 and any(text in shown.err for text in refused), argv
    for value in ("8192=1", "1=200", "x", "-1=3", "1=nan", "1"):
        shown = octo(*REAL, "-q", data=f"/set logit_bias {value}".encode())
        assert shown.code == 2 and shown.err.count("\n") == 1 and "logit_bias" in shown.err, value
    bias, anew = "/set logit_bias", "/clear\nHello.\n"
    said = octo(*REAL, "-q", data=f"Hello.\n{bias} 5=100\n{anew}{bias} none\n{anew}".encode())
    first, second, third = said.out.splitlines()
    assert first == third != second


@pytest.mark.parametrize(
    ("lines", "counts"),
    [
        (["/edit", "changed", "/tokens"], [1]),
        (["/edit", "/tokens", "two", "/tokens"], [1, 2]),
        (["/edit", KeyboardInterrupt, "two", "/tokens"], [2]),
        (["/edit", '"""changed"""', "/tokens"], [1]),
        (["/edit", "x " * 400, "/tokens", "two", "/tokens"], [1, 2]),
    ],
    ids=["sent", "a command in between", "given up", "a block", "too long"],
)
def test_a_question_that_is_edited_stays_until_the_changed_one_is_sent(
    octo: Callable[..., Any], terminal: Any, lines: list[Any], counts: list[int]
) -> None:
    terminal(["one", *lines])
    shown = octo(*REAL)
    assert [int(line.split()[0]) for line in shown.out.splitlines() if "of the context" in line] == counts


def test_an_edited_question_has_its_files_apart(octo: Callable[..., Any], terminal: Any, tmp_path: Path) -> None:
    """Nobody wants a long file in the input line. It goes along again, unless it is another question that is edited."""
    (tmp_path / "a.txt").write_text("The boats left at dawn.")
    drafts = list[str]()

    def changed(draft: str) -> str:
        drafts.append(draft)
        return f"{draft}!"

    one, two = tmp_path / "one.json", tmp_path / "two.json"
    edit = ["/edit", changed]
    terminal([f"/read {tmp_path / 'a.txt'}", "one", *edit, f"/export {one}", *edit, "two", *edit, f"/export {two}"])
    shown = octo(*REAL)
    asked = [
        [turn["content"] for turn in json.loads(path.read_text())["messages"] if turn["role"] == "user"]
        for path in (one, two)
    ]
    assert drafts == ["one", "one!", "two"] and "the file that was read for it goes along again" in shown.out
    assert asked == [["The boats left at dawn.\n\none!"], ["The boats left at dawn.\n\none!!", "two!"]]


def test_what_is_copied_is_the_last_answer_of_the_conversation(
    octo: Callable[..., Any], terminal: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of one that was gone on with, also of a conversation that was loaded; none of one that is forgotten."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    def copied() -> list[str]:
        said = octo(*REAL, "--session", "kept").out
        return [base64.b64decode(text).decode() for text in re.findall("]52;c;(.*?)\x07", said)]

    terminal(["I want to book a table for two.", "/copy", "/continue", "/copy", f"/export {tmp_path / 'a.json'}"])
    first, both = copied()
    assert both == json.loads((tmp_path / "a.json").read_text())["messages"][-1]["content"]
    assert both.startswith(first) and len(both) > len(first)
    terminal(["/copy", "/clear", "/copy"])
    assert copied() == [both]


def test_a_dropped_file_has_the_path_that_a_shell_would_read(
    octo: Callable[..., Any], engine: Any, tmp_path: Path
) -> None:
    """Terminals paste it with quotes or backslashes; a file that is really called so comes first."""
    (tmp_path / "a b.txt").write_text("text")
    (tmp_path / "'q'").write_text("quoted")
    for written in (f"'{tmp_path}/a b.txt'", f'"{tmp_path}/a b.txt"', f"{tmp_path}/a\\ b.txt", f"{tmp_path}/a b.txt"):
        shown = octo("chat", data=f"/read {written}\n".encode())
        assert shown.code == 0 and "a b.txt: 4 characters go with" in shown.err, written
    assert "6 characters" in octo("chat", data=f"/read {tmp_path}/'q'".encode()).err
    for wrong in ("'", "'a' 'b'", "\\"):
        assert octo("chat", data=f"/read {wrong}\n".encode()).code == 2


def test_what_is_there_is_not_loaded_again(octo: Callable[..., Any]) -> None:
    shown = octo(*REAL, data=b"/kv OCT3\n/model octo-demo\n")
    assert shown.code == 0 and "the KV cache is oct3 already" in shown.err and "is octo-demo already" in shown.err


def test_a_command_alone_says_what_is_set(octo: Callable[..., Any], tmp_path: Path) -> None:
    """And is no failure, which would end a chat in a pipe."""
    (tmp_path / "note").write_text("text")
    lines = ("/system", "/think", "/model", "/kv", f"/read {tmp_path}/note", "/read", "/read NONE")
    shown = octo(*REAL, "-q", "--think-budget", "1", "--hide-thinking", data="\n".join(lines).encode())
    told = shown.err.splitlines()
    assert shown.code == 0 and len(told) == 5, shown
    assert told[0] == "system prompt: (none)"
    assert told[1] == (
        "this model's chat template cannot switch thinking on or off; a thought ends after 1 token (--think-budget); "
        "thoughts are not shown (--hide-thinking)"
    )
    assert told[2].startswith("the model is octo-demo; ") and "on this machine: octo-demo" in told[2]
    assert told[3].startswith("the KV cache is oct3; /kv FORMAT takes oct2, ") and told[3].endswith("K:V, auto:N")
    assert told[4] == "1 file will be sent with the next message; /read FILE adds one"
    for line in ("/read", "/load", "/save", "/export"):
        assert octo(*REAL, "-q", data=line.encode()).code == 2, "there is nothing to show"


def test_a_session_that_is_in_use_is_told_of_before_a_model_is_loaded(
    octo: Callable[..., Any], engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from octo_run.cli import session_files

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with session_files.in_use("mine"):
        shown = octo("chat", "--session", "mine", data=b"one\n")
    assert shown.code == 1 and "another octo-run uses the session 'mine'" in shown.err and engine.loads == []


def test_regen_that_is_stopped_before_a_word_keeps_the_former_answer(octo: Callable[..., Any], terminal: Any) -> None:
    """While the prompt is made, and while it is read."""
    from octo_run.engine import Engine

    for name in ("prompt_ids", "feed"):
        whole, calls = getattr(Engine, name), [0]

        def interrupted(*given: Any, whole: Any = whole, calls: list[int] = calls, **more: Any) -> Any:
            calls[0] += 1
            if calls[0] == 2:
                signal.raise_signal(signal.SIGINT)
            return whole(*given, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, name, interrupted)
            terminal(["one", "/copy", "/regen", "/tokens", "two", "/tokens"])
            shown = octo(*REAL)
        counts = [line.partition(" tokens")[0] for line in shown.out.splitlines() if "of the context" in line]
        assert shown.code == 0 and counts[0].startswith("1 question") and counts[1].startswith("2 questions"), shown.out
        assert "[stopped, " in shown.out
        terminal(["one", "/tokens"])
        assert counts[0] in octo(*REAL).out, "with its answer"
