"""How answers are drawn and told by the real program: grammars, samplers, several answers, batches that are killed."""

import fcntl
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octo_run.models.cache import DEMO_PATH

from .conftest import READY, SENT

LETTERS = "你好 😀 👨\u200d👩\u200d👧 中文字符, naïve Ωμέγα 日本語 🇩🇪!"


@pytest.fixture
def octo(environment: dict[str, str], programs: Any) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    def run(*argv: str, text: str | None = None) -> "subprocess.CompletedProcess[str]":
        return programs.run([*argv], environment, text)  # type: ignore[no-any-return]

    return run


@pytest.mark.slow
def test_emoji_and_chinese_are_streamed_whole(terminal: Callable[..., Any], octo: Any) -> None:
    """Forced letter by letter: whatever moment the screen is looked at, no letter of it is half there."""
    chat = terminal("chat", "--regex", LETTERS, "--temp", "0", columns=100)
    at = chat.wait_for(READY)
    chat.type("Say it.\r")
    at = chat.wait_for(SENT, at)
    chat.wait_for(r"first after", at)
    assert LETTERS in chat.screen and "\ufffd" not in chat.screen
    narrow = terminal("chat", "--regex", LETTERS, "--temp", "0", "--single", "-p", "x", columns=30)
    narrow.wait_for_end()
    assert "".join(narrow.screen.split()).endswith("".join(LETTERS.split())) and "\ufffd" not in narrow.screen
    assert octo("generate", "-p", "x", "--regex", LETTERS).stdout == LETTERS + "\n"


@pytest.mark.slow
def test_grammars_from_files(octo: Any, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    (tmp_path / "a.json").write_text(json.dumps(schema | {"additionalProperties": False}))
    (tmp_path / "a.lark").write_text('start: "one " /[0-9]{2}/')
    (tmp_path / "a.gbnf").write_text('root ::= "two " [a-c] [a-c]')
    (tmp_path / "wrong.lark").write_text("start: (")
    hot = ("generate", "-p", "x", "--temp", "1.5", "--seed", "3", "-n", "60")
    assert json.loads(octo(*hot, "--json-schema", str(tmp_path / "a.json")).stdout).keys() == {"ok"}
    assert re.fullmatch(r"one \d\d\n", octo(*hot, "--grammar", str(tmp_path / "a.lark")).stdout)
    assert re.fullmatch(r"two [abc]{2}\n", octo(*hot, "--grammar", str(tmp_path / "a.gbnf")).stdout)
    asked = octo("chat", "--regex", "(yes|no)", "--temp", "2", text="Well?\nSure?\n")
    assert re.fullmatch(r"((yes|no)\n){2}", asked.stdout), asked
    for argv, says in (
        (("--grammar", str(tmp_path / "wrong.lark")), "cannot be used"),
        (("--grammar", str(tmp_path / "none")), "no such file"),
        (("--regex", "("), "cannot be used"),
        (("--regex", "a", "--grammar", "b"), "--regex and --grammar are given"),
    ):
        done = octo(*hot, *argv)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done


@pytest.mark.slow
def test_samplers_are_options(octo: Any) -> None:
    """Each changes what is drawn at the same seed, or is refused out of its range."""
    plain = ("generate", "-p", "The captain looked at the sea and", "--temp", "1.5", "--seed", "3", "-n", "24")
    first = octo(*plain).stdout
    for argv in (
        ("--typical-p", "0.3"),
        ("--top-n-sigma", "0.5"),
        ("--xtc-probability", "1", "--xtc-threshold", "0.02"),
        ("--logit-bias", "5=100"),
    ):
        done = octo(*plain, *argv)
        assert done.returncode == 0 and done.stdout != first, argv
    lowered = octo(*plain, "--repetition-penalty", "3").stdout
    assert lowered != first and octo(*plain, "--repetition-penalty", "3", "--penalty-range", "2").stdout != lowered
    greedy = ("generate", "-p", "The number is", "--temp", "0", "-n", "60")
    again = "The second of these 100."
    assert octo(*greedy).stdout.count(again) > 1 and octo(*greedy, "--dry-multiplier", "5").stdout.count(again) <= 1
    for argv in (("--typical-p", "2"), ("--xtc-threshold", "0.9"), ("--logit-bias", "x=1"), ("--logit-bias", "5=101")):
        assert octo(*plain, *argv).returncode == 2


@pytest.mark.slow
def test_several_answers_and_alternatives(octo: Any) -> None:
    argv = ("generate", "-p", "The captain", "--temp", "1", "--seed", "5", "-n", "8")
    done = octo(*argv, "--n", "3")
    assert done.returncode == 0 and done.stdout.count("---\n") == 2
    answers = [json.loads(line) for line in octo(*argv, "--n", "3", "--json").stdout.splitlines()]
    assert [answer["index"] for answer in answers] == [0, 1, 2]
    assert "---\n".join(answer["text"] + "\n" for answer in answers) == done.stdout
    assert len({answer["text"] for answer in answers}) == 3
    alone = json.loads(octo(*argv, "--json", "--logprobs", "3").stdout)
    assert alone["text"] == answers[0]["text"], "the first is what one answer says"
    told = alone["logprobs"]
    assert len(told) == 8 and all(len(token["top"]) == 3 and token["logprob"] <= 0 for token in told)
    assert [token["id"] for token in told] == alone["ids"]
    assert all(token["top"][0]["logprob"] >= token["logprob"] - 1e-4 for token in told)
    assert octo(*argv, "--logprobs", "3").returncode == 2


@pytest.mark.slow
def test_the_first_token_and_spaces_of_a_raw_text(octo: Any) -> None:
    argv = ("generate", "-n", "2", "--json", "--temp", "0")
    count = {
        option: json.loads(octo(*argv, *([option] if option else []), "-p", "captain").stdout)["prompt_tokens"]
        for option in ("", "--bos", "--no-bos")
    }
    assert count["--bos"] == count["--no-bos"] + 1 and count[""] in (count["--bos"], count["--no-bos"])
    spaced = json.loads(octo(*argv, "-p", "   captain").stdout)["prompt_tokens"]
    assert spaced > count[""], "spaces in front count"
    piped = json.loads(octo(*argv, text="   captain\n").stdout)["prompt_tokens"]
    assert piped == spaced
    assert octo(*argv, "--chat", "--bos", "-p", "x").returncode == 2


@pytest.fixture
def letters_only(tmp_path: Path) -> Path:
    """The embedded model with a vocabulary of small letters and no bytes: it spells nothing else."""
    from tokenizers import Tokenizer, decoders, models

    folder = tmp_path / "letters"
    folder.mkdir()
    for file in DEMO_PATH.iterdir():
        if file.suffix in (".json", ".safetensors") and not file.name.startswith("tokenizer"):
            (folder / file.name).symlink_to(file)
    pieces = [*"abcdefghijklmnopqrstuvwxyz", *(f"<{number}>" for number in range(26, 8192))]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_stop_text_that_never_stops_is_said(octo: Any, letters_only: Path, tmp_path: Path) -> None:
    """Of an option, in a measurement, of a line of a batch, in a chat, and after another model was loaded there."""
    plain = octo("generate", "-p", "The captain", "-n", "2", "--stop", "\n\n", "--stop", "the")
    assert plain.returncode == 0 and "never stops" not in plain.stderr, "bytes spell everything"
    folder, says = str(letters_only), "'Z!' never stops an answer: the tokens of this model cannot spell it"
    done = octo("generate", "-m", folder, "-p", "the", "-n", "2", "--stop", "Z!", "--stop", "the")
    assert done.returncode == 0 and done.stderr.count("never stops") == 1 and f"--stop {says}" in done.stderr
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "the", "answer": "1"}\n')
    argv = ("eval", "tasks", str(tmp_path / "tasks.jsonl"), "--raw", "--kv", "bf16,oct3", "-n", "2")
    done = octo(*argv, "-m", folder, "--stop", "Z!", "--stop", "the")
    assert done.returncode == 0 and done.stderr.count("never stops") == 1 and f"--stop {says}" in done.stderr
    batch = write_batch(tmp_path / "in.jsonl", [{"prompt": "the", "stop": stop} for stop in ("a", "Z!", "Z!")])
    done = octo("generate", "-m", folder, "--batch", str(batch), "-n", "2")
    assert done.returncode == 0 and done.stderr.count("never stops") == 1 and f"stop {says}" in done.stderr
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    argv = ("chat", "-n", "1", "--chat-template", str(tmp_path / "plain.jinja"))
    done = octo(*argv, text=f"/set stop Z!\n/model {folder}\n/set stop Z!\n/set stop ab\n")
    assert done.returncode == 0 and done.stderr.count(f"stop {says}") == 2, done.stderr


BATCH = [
    {"prompt": "The captain looked at the sea and", "id": "a"},
    {"messages": [{"role": "user", "content": "I want to book a table for two."}], "max_tokens": 5},
    {"prompt": "In the morning", "temperature": 1.0, "seed": 3, "max_tokens": 4},
    {"prompt": "word " * 5000, "id": 7},
    {"prompt": "The old man", "stop": "a"},
]


def write_batch(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_batch_has_its_answers_in_order(octo: Any, tmp_path: Path) -> None:
    batch, out = write_batch(tmp_path / "in.jsonl", BATCH), tmp_path / "out.jsonl"
    done = octo("generate", "--batch", str(batch), "-o", str(out), "-n", "12", "--ctx", "512", "--sequences", "2")
    assert done.returncode == 1 and done.stdout == "", "one prompt is too long"
    answers = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [answer["index"] for answer in answers] == [0, 1, 2, 3, 4]
    assert [answer["id"] for answer in answers] == ["a", None, None, 7, None]
    assert "line 4: The prompt has" in answers[3]["error"] and answers[1]["generated_tokens"] == 5
    assert "a" not in answers[4]["text"]
    alone = octo("generate", "-p", BATCH[0]["prompt"], "-n", "12", "--ctx", "512").stdout
    assert alone == answers[0]["text"] + "\n", "as it is alone"
    assert not [*tmp_path.glob(".*")]
    printed = octo("generate", "--batch", str(batch), "-n", "12", "--ctx", "512")
    assert [json.loads(line)["index"] for line in printed.stdout.splitlines()] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_a_killed_batch_goes_on_where_it_was(octo: Any, environment: dict[str, str], tmp_path: Path) -> None:
    """kill -9 after some answers: these are not made again, and the result is that of an undisturbed run."""
    lines = [{"prompt": f"Story number {number}:", "id": number} for number in range(12)]
    batch, out, whole = write_batch(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    argv = [
        "generate",
        "--batch",
        str(batch),
        "-n",
        "40",
        "--ctx",
        "256",
        "--sequences",
        "2",
        "--temp",
        "1",
        "--seed",
        "1",
        "--threads",
        "1",
    ]
    assert octo(*argv, "-o", str(whole)).returncode == 0
    program = subprocess.Popen([sys.executable, "-m", "octo_run", *argv, "-o", str(out)], env=environment,
                               stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    journal, deadline = tmp_path / ".out.jsonl.part", time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
        time.sleep(0.02)
    program.send_signal(signal.SIGKILL)
    program.wait()
    assert not out.exists()
    had = journal.read_bytes().count(b"\n") - 1
    assert 3 <= had < 12
    with journal.open("ab") as torn:
        torn.write(b'{"index": 11, "text": "half')
    with journal.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another process is writing" in octo(*argv, "-o", str(out)).stderr
    done = octo(*argv, "-o", str(out))
    assert done.returncode == 0 and f"{had} of 12 answers are there already" in done.stderr
    keys = ("index", "id", "text", "finish_reason")
    one, other = (
        [{key: json.loads(line)[key] for key in keys} for line in path.read_text("utf-8").splitlines()]
        for path in (whole, out)
    )
    assert one == other and not journal.exists()
    assert "is there already" in octo(*argv, "-o", str(out)).stderr and not journal.exists()


@pytest.mark.slow
def test_ctrl_c_in_a_batch_keeps_its_answers(terminal: Callable[..., Any], tmp_path: Path) -> None:
    """A bar with the time that is left is on the terminal meanwhile."""
    lines = [{"prompt": f"Story number {number}:"} for number in range(40)]
    batch, out = write_batch(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    run = terminal(
        "generate", "--batch", str(batch), "-o", str(out), "-n", "60", "--temp", "2", "--seed", "1", columns=100
    )
    run.wait_for(r"batch.*?\d+ %.*?\d:\d\d left")
    run.type("\x03")
    assert run.wait_for_end() == 130 and "goes on where it was" in run.screen and "Traceback" not in run.screen
    assert run.attributes() == run.before and (tmp_path / ".out.jsonl.part").exists() and not out.exists()
