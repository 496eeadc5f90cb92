"""The real program with the embedded model, started as a user starts it."""

import json
import os
import re
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octo_run.models.cache import DEMO_PATH

from .conftest import PROMPT, READY, SENT

BOOKING = "I want to book a table for two in San Jose tonight."
NEEDLE = (
    "The boats left at dawn. The special magic number for Anna is 4815162. What is the special magic number for Anna?"
)
SECONDS = 120
#: More than two chunks of a prompt on the CPU.
LONG = "The boats left at dawn, and the gulls followed them out to sea. " * 70


@pytest.fixture(scope="module")
def program() -> str:
    path = shutil.which("octo-run", path=str(Path(sys.executable).parent))
    assert path is not None, "the console script octo-run is not installed beside this Python"
    return path


@pytest.fixture
def octo(environment: dict[str, str], programs: Any) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    def run(*argv: str, text: str = "", **changes: str) -> "subprocess.CompletedProcess[str]":
        return programs.run([*argv], {**environment, **changes}, text)  # type: ignore[no-any-return]

    return run


@pytest.fixture
def installed(program: str, environment: dict[str, str]) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """The console script."""

    def run(*argv: str, text: str = "", **changes: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [program, *argv],
            input=text,
            capture_output=True,
            encoding="utf-8",
            env={**environment, **changes},
            timeout=SECONDS,
        )

    return run


@pytest.mark.few(1)
@pytest.mark.parametrize("kv", ["octopus3", "bf16"])
def test_several_turns_through_a_pipe(installed: Callable[..., "subprocess.CompletedProcess[str]"], kv: str) -> None:
    lines = [BOOKING, "Italian food, please, at 7 pm.", "Yes, that sounds good.", "/stats", "/clear", NEEDLE]
    done = installed("chat", "--kv", kv, text="\n".join(lines))
    assert done.returncode == 0, done.stderr
    first, second, third, needle = done.stdout.splitlines()
    assert re.search(r"time|restaurant|table|food|city|cuisine", first, re.I), first
    assert "7 pm" in second or "7:00" in second, second
    assert third.strip()
    assert "4815162" in needle
    assert "\x1b" not in done.stdout + done.stderr and "> " not in done.stdout
    assert f"KV cache {kv}" in done.stderr and "memory: weights 19.1 MB" in done.stderr
    assert done.stderr.count("running on the CPU") == 1
    stats = re.search(r"3 turns: ([\d,]+) prompt tokens, ([\d,]+) of them reused", done.stderr)
    assert stats is not None, done.stderr
    assert int(stats[2]) > int(stats[1]) / 3, "the later turns must reuse what the first ones left in the cache"


def test_generate_gives_one_json_object(octo: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    done = octo("generate", "--json", "-n", "5", "-p", "It was a dark and stormy night")
    answer = json.loads(done.stdout)
    assert done.returncode == 0 and len(answer["ids"]) == answer["generated_tokens"] == 5
    assert set(answer) == {
        *(
            "text",
            "ids",
            "finish_reason",
            "prompt_tokens",
            "reused_tokens",
            "read_tokens",
            "generated_tokens",
            "seconds",
        )
    }
    assert answer["finish_reason"] == "length" and answer["text"] and answer["seconds"] > 0


def test_generate_chat_from_stdin_ends_by_itself(octo: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    done = octo("generate", "--chat", "--seed", "1", "--temp", "0.1", text=NEEDLE + "\n")
    assert done.returncode == 0 and "4815162" in done.stdout


@pytest.mark.slow
def test_bench_and_doctor(octo: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    done = octo("bench", "--tests", "pp70,tg4", "--depth", "200", "--kv", "oct3,bf16", "-r", "1", "--output", "jsonl")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert [(row["kv"], row["test"]) for row in rows] == [(kv, t) for kv in ("oct3", "bf16") for t in ("pp70", "tg4")]
    assert all(row["tokens_per_s"] > 0 for row in rows) and 0 < rows[1]["of_bandwidth"] < 2
    assert octo("doctor").returncode == 0


def copy_of_the_demo(folder: Path) -> Path:
    shutil.copytree(DEMO_PATH, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def truncated_shard(folder: Path) -> list[str]:
    shard = sorted(copy_of_the_demo(folder).glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1000)
    return ["generate", "-p", "x", "-m", str(folder)]


def garbage_shard(folder: Path) -> list[str]:
    sorted(copy_of_the_demo(folder).glob("*.safetensors"))[0].write_bytes(b"\xff" * 4096)
    return ["generate", "-p", "x", "-m", str(folder)]


def missing_shard(folder: Path) -> list[str]:
    sorted(copy_of_the_demo(folder).glob("*.safetensors"))[2].unlink()
    return ["chat", "-m", str(folder)]


def unknown_architecture(folder: Path) -> list[str]:
    config = copy_of_the_demo(folder) / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "MambaForCausalLM"))
    return ["chat", "-m", str(folder)]


def unwritable_cache(folder: Path) -> list[str]:
    folder.write_text("a file where the cache should be")
    return ["pull", "org/name"]


FAILURES: dict[str, tuple[Callable[[Path], list[str]], int, str]] = {
    "truncated safetensors": (truncated_shard, 1, "model-00002-of-00003.safetensors"),
    "no safetensors at all": (garbage_shard, 1, "model-00001-of-00003.safetensors"),
    "missing shard": (missing_shard, 1, "model-00003-of-00003.safetensors"),
    "unknown architecture": (unknown_architecture, 1, "MambaForCausalLM"),
    "unwritable cache": (unwritable_cache, 1, "cannot be written"),
    "wrong kv": (lambda _: ["chat", "--kv", "octopus9"], 2, "octopus3"),
    "unknown command": (lambda _: ["gnerate"], 2, "did you mean 'generate'?"),
    "unknown model": (lambda _: ["chat", "-m", "org/none"], 1, "octo-run pull org/none"),
    "unknown folder": (lambda _: ["chat", "-m", "./none"], 2, "./none"),
    "context beyond the model": (lambda _: ["chat", "--ctx", "5000"], 2, "4096 tokens or less"),
    "prompt beyond the context": (
        lambda _: ["generate", "-p", "one two " * 50, "--ctx", "64"],
        2,
        "the context holds 64",
    ),
    "prompt beyond the model": (lambda _: ["generate", "-p", "one two " * 3000], 2, "the context holds 4,096"),
    "empty prompt": (lambda _: ["generate", "-p", ""], 2, "the prompt is empty"),
    "no cuda": (lambda _: ["generate", "-p", "x", "--device", "cuda"], 1, "CUDA"),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_one_sentence(
    octo: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path, name: str
) -> None:
    prepare, code, says = FAILURES[name]
    folder = tmp_path / "given"
    changes = {"OCTO_RUN_CACHE": str(folder), "HF_HUB_OFFLINE": "0"} if name == "unwritable cache" else {}
    done = octo(*prepare(folder), **changes)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("octo-run: ")]
    assert len(errors) == 1 and done.stderr.endswith(errors[0] + "\n") and says in errors[0], done.stderr
    assert "Traceback" not in done.stderr


WORDS = r"(?:.*?\r\n|)\r\n\w+\W+\w+\W+\w+"  # an answer, which a blank line precedes
CTRL_C, CTRL_D = "\x03", "\x04"
#: A bar, and what takes it away and shows the cursor again.
BAR, WIPED = r"prompt [^\r\n]*\d/1,\d\d\d tokens [^\r\n]* tokens/s \d:\d\d left", r"\r\n\x1b\[\?25h\r\x1b\[1A\x1b\[2K"


def test_ctrl_c_stops_an_answer_and_keeps_the_session(terminal: Callable[..., Any]) -> None:
    chat = terminal("chat", "--temp", "3", "--seed", "1")  # so hot that no answer ends by itself
    at = chat.wait_for("San Jose.*4815162.*" + READY)
    chat.type("Tell me a long story.\r")
    at = chat.wait_for(SENT + WORDS, at)
    chat.type(CTRL_C)
    at = chat.wait_for(r"\[stopped, \d+ tokens?, [\d,.-]+ tokens/s, first after \d.*?" + PROMPT, at)
    chat.type("And now another one.\r")
    at = chat.wait_for(SENT + WORDS, at)
    chat.type(CTRL_C)
    at = chat.wait_for(r"\[stopped, \d+ tokens?, [\d,.-]+ tokens/s, first after \d.*?" + PROMPT, at)
    chat.type("/stats\r")
    at = chat.wait_for(r"2 turns: \d+ prompt tokens, [1-9]\d* of them reused.*?" + PROMPT, at)
    chat.type(CTRL_D)
    assert chat.wait_for_end() == 0
    assert termios.tcgetattr(chat.slave)[3] == chat.before[3], "the terminal is left as it was"
    assert "Traceback" not in chat.screen


def test_ctrl_c_twice_at_the_prompt_leaves(terminal: Callable[..., Any]) -> None:
    chat = terminal("chat")
    at = chat.wait_for(READY)
    chat.type(BOOKING + "\r")
    at = chat.wait_for(r"\[\d+ tokens, .*?" + PROMPT, at)
    chat.type(CTRL_C)
    at = chat.wait_for("Ctrl-C again or Ctrl-D leaves.*?" + PROMPT, at)
    chat.type(CTRL_C)
    assert chat.wait_for_end() == 130
    assert "Traceback" not in chat.screen


def test_the_first_message_is_written_while_the_model_loads(terminal: Callable[..., Any]) -> None:
    """The prompt is there before PyTorch; what loading says stands above the line, which stays as it is typed."""
    chat = terminal("chat", "-n", "3", load_delay=3)
    at = chat.wait_for("/help.*" + PROMPT)
    assert "memory: weights" not in chat.screen
    chat.type("half of")
    at = chat.wait_for("half of", at)
    at = chat.wait_for("memory: weights.*" + PROMPT + ".*half of", at)  # the line is drawn anew below it
    chat.type(" a line\r")
    at = chat.wait_for(SENT + r".*first after.*?" + PROMPT, at)
    chat.type("/edit\r")
    chat.wait_for("half of a line", at)
    chat.type(CTRL_C + CTRL_D)
    assert chat.wait_for_end() == 0 and "Traceback" not in chat.screen and chat.attributes() == chat.before


def test_a_message_waits_for_the_model(terminal: Callable[..., Any]) -> None:
    """Ctrl-C takes it back; the up key brings it again, and it is answered."""
    chat = terminal("chat", "-n", "3", load_delay=5)
    at = chat.wait_for("/help.*" + PROMPT)
    chat.type("Hello.\r")
    at = chat.wait_for(r"\[octo-demo is still loading\]", at)
    chat.type(CTRL_C)
    at = chat.wait_for(r"was not sent; the up key brings it back.*?" + PROMPT, at)
    chat.type("\x1b[A")
    at = chat.wait_for(r"Hello\.", at)
    chat.type("\r")
    at = chat.wait_for(SENT + r".*memory: weights.*first after.*?" + PROMPT, at)
    chat.type(CTRL_D)
    assert chat.wait_for_end() == 0 and "Traceback" not in chat.screen and chat.attributes() == chat.before


def test_ctrl_c_twice_while_a_message_waits_leaves(terminal: Callable[..., Any]) -> None:
    chat = terminal("chat", load_delay=30)
    at = chat.wait_for("/help.*" + PROMPT)
    chat.type("Hello.\r")
    at = chat.wait_for(r"\[octo-demo is still loading\]", at)
    chat.type(CTRL_C)
    chat.wait_for(r"Ctrl-C again or Ctrl-D leaves.*?" + PROMPT, at)
    chat.type(CTRL_C)
    assert chat.wait_for_end() == 130 and "Traceback" not in chat.screen and chat.attributes() == chat.before


@pytest.mark.parametrize(("keys", "code"), [(CTRL_D, 0), ("/exit\r", 0), (CTRL_C + CTRL_C, 130)])
@pytest.mark.parametrize("delay", [0, 30])
def test_leaving_while_the_model_loads(terminal: Callable[..., Any], keys: str, code: int, delay: float) -> None:
    """At once, whether PyTorch is imported then or nothing is."""
    chat = terminal("chat", load_delay=delay)
    chat.wait_for("/help.*" + PROMPT)
    for key in keys if keys[0] != "/" else [keys]:
        chat.type(key)
        chat.read(0.3)
    begun = time.monotonic()
    assert chat.wait_for_end() == code and time.monotonic() < begun + 30
    assert "Traceback" not in chat.screen and "Fatal" not in chat.screen and chat.attributes() == chat.before


def test_a_model_that_cannot_be_loaded_ends_the_first_line(terminal: Callable[..., Any], tmp_path: Path) -> None:
    chat = terminal("chat", "-m", str(tmp_path / "none"), load_delay=1)
    chat.wait_for("/help.*" + PROMPT)
    chat.type("half of")
    chat.wait_for("octo-run: .*none")
    assert chat.wait_for_end() == 2 and "Traceback" not in chat.screen and chat.attributes() == chat.before


@pytest.mark.slow
def test_a_long_prompt_shows_its_progress_on_standard_error_alone(terminal: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "answer.json"
    with path.open("wb") as file:
        run = terminal("generate", "--json", "-n", "3", "--threads", "1", "-p", LONG, delay=0.05, stdout=file)
        at = run.wait_for(f"{BAR}.*{WIPED}")
        assert run.wait_for_end() == 0
    assert run.screen[at:] == "", "nothing follows the bar"
    assert "\x1b[?25l" in run.screen and "512/1," in run.screen
    answer = json.loads(path.read_bytes())
    assert answer["generated_tokens"] == 3 and path.read_bytes().count(b"\n") == 1


@pytest.mark.slow
def test_ctrl_c_while_a_long_prompt_is_read_keeps_the_session(terminal: Callable[..., Any]) -> None:
    chat = terminal("chat", "--system", LONG, "-n", "3", "--threads", "1", delay=0.05)
    at = chat.wait_for(READY)
    chat.type("Hello.\r")
    at = chat.wait_for(SENT + ".*" + BAR, at)
    chat.type(CTRL_C)
    at = chat.wait_for(WIPED + r"\r\n[^\r\n]*\[stopped, 0 tokens, [\d,]+ of [\d,]+ prompt tokens read.*?" + PROMPT, at)
    chat.type("/regen\r")
    at = chat.wait_for(SENT + ".* tokens/s .*" + WIPED + r".*\w.*first after.*?" + PROMPT, at)
    chat.type("/stats\r")
    at = chat.wait_for(r"2 turns: [\d,]+ prompt tokens, [1-9][\d,]* of them reused.*?" + PROMPT, at)
    chat.type(CTRL_D)
    assert chat.wait_for_end() == 0
    assert termios.tcgetattr(chat.slave)[3] == chat.before[3], "the terminal is left as it was"
    assert "Traceback" not in chat.screen


@pytest.mark.slow
def test_a_pasted_byte_that_is_no_utf8_keeps_the_line(
    terminal: Callable[..., Any], environment: dict[str, str]
) -> None:
    chat = terminal("chat", "-n", "3")
    at = chat.wait_for(READY)
    chat.type(b"\x1b[200~caf\xe9 bar\x1b[201~\r")
    at = chat.wait_for("Character 4 is not UTF-8", at)
    chat.type(CTRL_D)  # takes the character at the cursor away
    chat.type("e\r")
    at = chat.wait_for(r"tokens/s.*?" + PROMPT, at)
    chat.type(CTRL_D)
    assert chat.wait_for_end() == 0 and "Traceback" not in chat.screen
    assert "+cafe bar\n" in (Path(environment["XDG_STATE_HOME"]) / "octo-run" / "history").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("columns", "changes"),
    [(20, {"LC_ALL": "C"}), (80, {"TERM": "dumb"}), (80, {"NO_COLOR": "1", "XDG_STATE_HOME": "a/\udce9\x1b]0;x\x07"})],
)
def test_poor_terminals_and_environments(terminal: Callable[..., Any], columns: int, changes: dict[str, str]) -> None:
    chat = terminal("chat", "-n", "3", columns=columns, **changes)
    at = chat.wait_for("/help.*?>")
    chat.type("Hello.\r")
    chat.wait_for(r"tokens/s.*?>", at)
    chat.read(1)  # on a dumb terminal the prompt is there before keys are read one by one
    chat.type(CTRL_D)
    assert chat.wait_for_end() == 0 and "Traceback" not in chat.screen and "\x1b]0;x" not in chat.screen
    assert chat.attributes() == chat.before
