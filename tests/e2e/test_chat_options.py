"""Options and commands of ``chat`` by the real program: files, templates, thoughts, other models, Ctrl-C."""

import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octo_run.models.cache import DEMO_PATH

from .conftest import PROMPT, READY, SENT

CTRL_C, CTRL_D, TAB = "\x03", "\x04", "\t"
NEEDLE = "The boats left at dawn. The special magic number for Anna is 4815162."
ECHO = (  # says what it is given, as a conversation that is easily looked at
    "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}quiet;{% endif %}"
)


@pytest.fixture
def octo(environment: dict[str, str], programs: Any) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    def run(*argv: str, text: str | None = "", **changes: str) -> "subprocess.CompletedProcess[str]":
        return programs.run([*argv], {**environment, **changes}, text)  # type: ignore[no-any-return]

    return run


def prompt_tokens(done: "subprocess.CompletedProcess[str]") -> int:
    found = re.search(r"1 turn: ([\d,]+) prompt tokens", done.stderr)
    assert found is not None, done.stderr
    return int(found[1].replace(",", ""))


@pytest.mark.slow
def test_single_answers_one_message_of_all_sources(octo: Any, tmp_path: Path) -> None:
    """A file, a document on standard input and -p, in this order, are one message."""
    (tmp_path / "boats.txt").write_text(NEEDLE)
    ask = "What is the special magic number for Anna?"
    done = octo("chat", "--single", "-f", str(tmp_path / "boats.txt"), "-p", ask, text=None)
    assert done.returncode == 0 and "4815162" in done.stdout and done.stdout.count("\n") == 1, done
    done = octo("chat", "--single", "-p", ask, text=NEEDLE + "\n")
    assert done.returncode == 0 and "4815162" in done.stdout
    done = octo("chat", "--single", text=f"{NEEDLE} {ask}\n")
    assert done.returncode == 0 and "4815162" in done.stdout
    done = octo("chat", "--single", text=None)
    assert done.returncode == 2 and "--single answers one message" in done.stderr


@pytest.mark.slow
def test_a_system_prompt_from_a_file(octo: Any, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("Be very brief.\n")
    done = octo("chat", "--system-file", str(tmp_path / "system.txt"), text="/system\n")
    assert done.stderr.splitlines()[-1] == "system prompt: Be very brief."
    both = octo("chat", "--system-file", str(tmp_path / "system.txt"), "--system", "x")
    assert both.returncode == 2 and "both given" in both.stderr
    assert octo("chat", "--system-file", str(tmp_path / "none")).returncode == 2


@pytest.mark.slow
def test_another_template_and_what_it_sees(octo: Any, tmp_path: Path) -> None:
    (tmp_path / "echo.jinja").write_text(ECHO)
    argv = ("chat", "-n", "1", "--chat-template", str(tmp_path / "echo.jinja"))
    plain = octo(*argv, text="Hello.\n/stats\n")
    quiet = octo(*argv, "--template-kwargs", '{"enable_thinking": false}', text="Hello.\n/stats\n")
    assert prompt_tokens(quiet) > prompt_tokens(plain)
    switched = octo(*argv, text="/think off\nHello.\n/stats\n")
    assert prompt_tokens(switched) == prompt_tokens(quiet) and "thinking is off" in switched.stderr
    for wrong in ("{", "[1]", "true", "{'a': 1}"):
        done = octo(*argv, "--template-kwargs", wrong)
        assert done.returncode == 2 and "give a JSON object" in done.stderr
    done = octo("chat", text="/think off\n")
    assert done.returncode == 2 and "cannot switch thinking" in done.stderr
    (tmp_path / "bad.jinja").write_text("{% for %}")
    done = octo("chat", "--chat-template", str(tmp_path / "bad.jinja"), text="x\n")
    assert done.returncode == 1 and "not valid Jinja" in done.stderr and "bad.jinja" in done.stderr


THINKING = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: <think>\n"


@pytest.mark.slow
def test_a_thought_is_hidden_and_ends_after_its_budget(octo: Any, tmp_path: Path) -> None:
    """The template opens a thought; the model never ends it, so the budget does."""
    (tmp_path / "think.jinja").write_text(THINKING)
    argv = ("chat", "-n", "24", "--chat-template", str(tmp_path / "think.jinja"))
    whole = octo(*argv, text=NEEDLE).stdout
    assert "</think>" not in whole and len(whole.split()) > 3
    ended = octo(*argv, "--think-budget", "5", text=NEEDLE)
    assert ended.returncode == 0 and ended.stdout.count("</think>") == 1, ended
    hidden = octo(*argv, "--think-budget", "5", "--hide-thinking", text=NEEDLE)
    assert "</think>" not in hidden.stdout and ended.stdout.endswith(hidden.stdout) and hidden.stdout.strip()
    assert octo(*argv, "--hide-thinking", text=NEEDLE).stdout == "\n", "it is all thought"


@pytest.mark.slow
def test_a_thought_is_dim_at_a_terminal(terminal: Callable[..., Any], tmp_path: Path) -> None:
    """And the answer is not; ``NO_COLOR`` leaves the marks in place of dim letters."""
    (tmp_path / "think.jinja").write_text(THINKING)
    argv = ("chat", "-n", "24", "--chat-template", str(tmp_path / "think.jinja"), "--think-budget", "5")
    for changes, dim in (({}, True), ({"NO_COLOR": "1"}, False)):
        chat = terminal(*argv, **changes)
        at = chat.wait_for(READY)
        chat.type(NEEDLE + "\r")
        at = chat.wait_for(SENT, at)
        end = chat.wait_for(r"first after", at)
        answer = chat.screen[at:end].rpartition("[")[0]
        thought, _, rest = answer.partition("\x1b[0m" if dim else "</think>")
        assert bool(re.search(r"\x1b\[(0;)?2m", thought)) is dim and ("<think>" in thought) is not dim, repr(answer)
        assert re.search(r"\w", thought) and re.search(r"\w{2}", re.sub(r"\x1b\[[0-9;]*m", "", rest)), answer
        chat.type(CTRL_D)
        chat.wait_for_end()


@pytest.mark.slow
def test_a_full_context_stops_the_chat_if_wanted(octo: Any) -> None:
    lines = "\n".join(["Tell me a long story about the sea and the boats, please."] * 12)
    argv = ("chat", "--ctx", "256", "-n", "20")
    done = octo(*argv, "--on-full", "stop", text=lines)
    assert done.returncode == 2 and "The context is full" in done.stderr and "dropped\n" not in done.stderr
    assert done.stdout.count("\n") > 2, "what fits is answered"
    done = octo(*argv, text=lines)
    assert done.returncode == 0 and "dropped" in done.stderr
    assert re.search(r"the context is 9\d % full: the oldest turns will be dropped", done.stderr)


@pytest.mark.slow
def test_continue_goes_on_in_a_pipe(octo: Any) -> None:
    whole = octo("chat", "-n", "12", text="I want to book a table for two in San Jose tonight.\n").stdout
    parts = octo("chat", "-n", "4", text="I want to book a table for two in San Jose tonight.\n/continue\n/continue\n")
    assert parts.returncode == 0 and parts.stdout.replace("\n", "") == whole.replace("\n", ""), (parts, whole)
    done = octo("chat", text="/continue\n")
    assert done.returncode == 2 and "no answer to continue" in done.stderr


@pytest.mark.slow
def test_another_format_and_another_model(octo: Any, tmp_path: Path) -> None:
    """The conversation goes on; what does not exist changes nothing."""
    folder = tmp_path / "other"
    shutil.copytree(DEMO_PATH, folder, ignore=shutil.ignore_patterns("__pycache__"))
    lines = f"{NEEDLE} Say it.\n/kv bf16\n/model {folder}\nWhat is the special magic number for Anna?\n/tokens\n"
    done = octo("chat", "-n", "20", text=lines)
    assert done.returncode == 0 and "4815162" in done.stdout.splitlines()[-1], done
    assert "KV cache bf16" in done.stderr and f"{folder} on cpu" in done.stderr and "2 questions" in done.stderr
    for wrong, says in (("/kv nope", "nope"), ("/model no/such", "no/such")):
        done = octo("chat", text=wrong + "\n")
        assert done.returncode != 0 and says in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_model_that_fails_leaves_the_former_one(terminal: Callable[..., Any], tmp_path: Path) -> None:
    """Its weights are damaged, which is found late: the chat goes on with what it had."""
    folder = tmp_path / "other"
    shutil.copytree(DEMO_PATH, folder, ignore=shutil.ignore_patterns("__pycache__"))
    sorted(folder.glob("*.safetensors"))[0].write_bytes(b"\xff" * 4096)
    chat = terminal("chat", "-n", "5", columns=200)
    at = chat.wait_for(READY)
    chat.type(f"/model {folder}\r")
    at = chat.wait_for(r"octo-run: .*safetensors.*?" + PROMPT, at)
    chat.type("Hello there.\r")
    at = chat.wait_for("first after.*?" + PROMPT, at)
    chat.type("/kv oc" + TAB)
    at = chat.wait_for("t", at)
    chat.type(CTRL_C + CTRL_D)
    assert chat.wait_for_end() == 0 and "Traceback" not in chat.screen and chat.attributes() == chat.before


@pytest.mark.slow
def test_markdown_is_shown_at_a_terminal_and_not_in_pipes(octo: Any, terminal: Callable[..., Any]) -> None:
    """What a terminal gets is never written again: no cursor moves inside an answer, and no colour stays."""
    chat = terminal("chat", "-n", "30", "--temp", "2", "--seed", "3", columns=40)
    at = chat.wait_for(READY)
    chat.type("Tell me a long story.\r")
    begun = chat.wait_for(SENT, at)
    told = r"\[(stopped after )?\d+ tokens"
    end = chat.wait_for(told, begun)
    answer = chat.screen[begun:end]
    assert not re.search(r"\x1b\[[0-9;]*[A-HJKSTfhl]", answer), repr(answer)
    chat.type(CTRL_D)
    chat.wait_for_end()
    piped = octo("chat", "-n", "30", "--temp", "2", "--seed", "3", text="Tell me a long story.\n").stdout
    words = re.sub(r"\x1b\[[0-9;]*m", "", answer)
    words = words[: re.search(told, words).start()]  # type: ignore[union-attr]
    assert re.sub(r"[\s*_`#>•│|-]", "", words) == re.sub(r"[\s*_`#>•│|-]", "", piped)
    plain = terminal(
        "chat", "--plain", "-n", "30", "--temp", "2", "--seed", "3", "--single", "-p", "Tell me a long story."
    )
    plain.wait_for_end()
    assert piped.split("\n")[0] in plain.screen.replace("\r\n", "\n")


@pytest.mark.slow
def test_ctrl_c_at_50_random_moments(terminal: Callable[..., Any]) -> None:
    """Of start, prompt and answer, with a fixed seed: never a traceback, never lost, the terminal as it was."""
    chance = random.Random(20)
    for number in range(50):
        chat = terminal("chat", "-n", "400", "--temp", "3", "--seed", "1")
        chat.wait_until_prepared()
        if number % 3 == 0:  # while it starts
            deadline = time.monotonic() + chance.uniform(0, 2.5)
            while time.monotonic() < deadline:
                chat.read(0.01)
        else:
            at = chat.wait_for(READY)
            long = "The boats left at dawn. " * 300 if number % 3 == 1 else "Tell me a long story."
            chat.type(long + "\r")
            chat.wait_for(SENT, at)
            deadline = time.monotonic() + chance.uniform(0, 2.0)
            while time.monotonic() < deadline:
                chat.read(0.01)
        place = len(chat.screen)
        chat.type(CTRL_C)
        deadline = time.monotonic() + 10
        while chat.process.poll() is None and time.monotonic() < deadline:
            chat.read(0.05)
            if re.search(PROMPT, chat.screen[place:]):
                break
        if chat.process.poll() is None:  # it went on: it answers, then it is left
            chat.type(CTRL_C)
            chat.read(0.2)
            if chat.process.poll() is None:
                chat.type(CTRL_D)
            chat.wait_for_end(20)
        assert "Traceback" not in chat.screen, (number, chat.screen[-2000:])
        assert chat.process.returncode in (0, 130), (number, chat.process.returncode)
        assert chat.attributes() == chat.before, number
