"""``generate``: where the prompt comes from, what is printed, what ends it."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from octo_run.cli import checks
from octo_run.cli.options import DEFAULT_MODEL, EngineOptions

KEYS = {"text", "ids", "finish_reason", "prompt_tokens", "reused_tokens", "read_tokens", "generated_tokens", "seconds"}


def text_of(ids: list[int]) -> str:
    return "".join(chr(i) for i in ids[1:])


def test_raw_continuation_of_p(octo: Callable[..., Any], engine: Any) -> None:
    engine.answers(" the end")
    shown = octo("generate", "-p", "This is")
    assert (shown.code, shown.out, shown.err) == (0, " the end\n", "")
    assert engine.prompts[0][0] == 1 and text_of(engine.prompts[0]) == "This is"


@pytest.mark.parametrize(
    ("data", "prompt"), [(b"one\ntwo\n", "one\ntwo"), (b"one\r\n", "one"), (b"one\n\n", "one\n"), ("é".encode(), "é")]
)
def test_prompt_from_stdin_loses_one_final_line_feed(
    octo: Callable[..., Any], engine: Any, data: bytes, prompt: str
) -> None:
    engine.answers("x\n")
    assert octo("generate", data=data).out == "x\n"
    assert text_of(engine.prompts[0]) == prompt


@pytest.mark.parametrize("how", ["--chat", "--raw"])
def test_stdin_and_files_beside_p_are_documents(
    octo: Callable[..., Any], engine: Any, tmp_path: Path, how: str
) -> None:
    """Neither is dropped: files, then standard input, then the question."""
    engine.answers("y", "y", "y")
    path = tmp_path / "a.txt"
    path.write_text("from a file\n")
    assert octo("generate", how, "-p", "Q", data=b"X\n").code == 0
    assert octo("generate", how, "-f", str(path), "-p", "Q", data=b"X\n").code == 0
    assert octo("generate", how, "-f", str(path)).code == 0
    assert [text_of(ids) for ids in engine.prompts] == ["X\n\nQ", "from a file\n\nX\n\nQ", "from a file"]
    shown = octo("generate", "-f", str(tmp_path / "none"), "-p", "Q")
    assert shown.code == 2 and "there is no such file" in shown.err


def test_chat_uses_the_template_and_the_system_prompt(octo: Callable[..., Any], engine: Any) -> None:
    engine.answers("yes")
    assert octo("generate", "--chat", "--system", "S", "-p", "Q").code == 0
    assert engine.prompts[0][0] == 2 and text_of(engine.prompts[0]) == "SQ"


def test_json_is_one_object_with_exactly_these_keys(octo: Callable[..., Any], engine: Any) -> None:
    engine.answers("naïve ☃")
    shown = octo("generate", "--json", "-p", "x")
    answer = json.loads(shown.out)
    assert shown.out.count("\n") == 1 and "☃" in shown.out
    assert set(answer) == KEYS
    assert answer["text"] == "naïve ☃" and answer["finish_reason"] == "stop" and answer["ids"] == [0]
    assert (answer["prompt_tokens"], answer["reused_tokens"], answer["generated_tokens"]) == (12, 0, 1)
    assert answer["seconds"] == 0.75


def test_ctrl_c_prints_what_is_there_and_ends_with_130(octo: Callable[..., Any], engine: Any) -> None:
    engine.answers("")
    engine.replies[0].pieces = ["half", "^C", "never"]
    shown = octo("generate", "-p", "x")
    assert (shown.code, shown.out, shown.err) == (130, "half\n", "")
    engine.answers("")
    engine.replies[0].pieces = ["half", "^C", "never"]
    shown = octo("generate", "--json", "-p", "x")
    assert shown.code == 130 and json.loads(shown.out)["finish_reason"] == "interrupted"


@pytest.mark.parametrize("argv", [("generate", "-p", ""), ("generate", "-p", " \n"), ("generate",)])
def test_empty_prompt(octo: Callable[..., Any], engine: Any, argv: tuple[str, ...]) -> None:
    shown = octo(*argv)
    assert shown.code == 2 and "the prompt is empty" in shown.err and shown.err.count("\n") == 1
    assert engine.loaded is None


def test_stdin_that_is_no_utf8_is_refused(octo: Callable[..., Any], engine: Any) -> None:
    shown = octo("generate", data=b"abc\xff")
    assert shown.code == 2 and "standard input is not UTF-8 text: byte 3" in shown.err


def test_system_needs_chat(octo: Callable[..., Any], engine: Any) -> None:
    shown = octo("generate", "--system", "S", "-p", "x")
    assert shown.code == 2 and "--system needs --chat" in shown.err


def test_a_model_without_template_is_named(octo: Callable[..., Any], engine: Any) -> None:
    engine.tokenizer.has_chat_template = False
    shown = octo("generate", "--chat", "-p", "x")
    assert shown.code == 2 and "use --raw" in shown.err


def test_options_reach_the_engine(octo: Callable[..., Any], engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "loadable", lambda _options: SimpleNamespace(vocab_size=9))
    engine.answers("x")
    assert octo("generate", "-p", "x").code == 0
    assert engine.loaded == EngineOptions(DEFAULT_MODEL, None, None, None, None, None, False, None)
    assert all(value in (None, ()) for value in vars(engine.sampling).values())
    engine.answers("x")
    load = "-m org/name --kv oct3:oct2 --conditioning mean --ctx 2048 --device cuda:1 --dtype float16"
    load += " --offline --threads 3"
    sample = "--temp 0.5 --top-k 4 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.1 --seed 7 -n 9 --stop A --stop B"
    sample += " --presence-penalty 0.4 --frequency-penalty -0.2"
    assert octo("generate", "-p", "x", *shlex.split(f"{load} {sample}")).code == 0
    assert engine.loaded == EngineOptions("org/name", "oct3:oct2", "mean", 2048, "cuda:1", "float16", True, 3)
    given = [value for value in vars(engine.sampling).values() if value not in (None, ())]
    assert given == [0.5, 4, 0.9, 0.1, 1.1, 0.4, -0.2, 7, 9, ("A", "B")]
