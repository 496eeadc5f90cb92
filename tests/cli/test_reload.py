"""``/kv`` and ``/model``: whatever happens while another engine is loaded, the chat goes on with an engine and with its
conversation."""

import dataclasses
import json
import shutil
import signal
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octo_run.cli import runtime
from octo_run.engine import Engine

ARGV = ("chat", "--device", "cpu", "--ctx", "512", "-n", "2")


class Half:
    """What half an engine holds."""


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What happens instead of each load after the first: a function; None: it is loaded."""
    found, load = list[Any](), runtime.load_engine
    first = True

    def loading(options: Any, **cache: Any) -> Engine:
        nonlocal first
        then = None if first or not found else found.pop(0)
        first = False
        if then is not None:
            then()
        return load(options, **cache)

    monkeypatch.setattr(runtime, "load_engine", loading)
    return found


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_brings_the_former_engine_back(octo: Callable[..., Any], terminal: Any, loads: list[Any]) -> None:
    """Pressed again while that one is loaded it loses nothing: there is nothing else to go back to."""
    loads += [press, press]
    terminal(["one", "/kv bf16", "/tokens", "two"])
    shown = octo(*ARGV)
    assert shown.code == 0 and "back to octo-demo with the KV cache oct3" in shown.out
    assert "1 question: " in shown.out and shown.out.count("stopped after --max-tokens") == 2, shown.out + shown.err
    assert "Traceback" not in shown.err and "unexpected" not in shown.err and loads == []


def test_ctrl_c_during_an_import_is_obeyed_behind_it(
    octo: Callable[..., Any], terminal: Any, loads: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_part.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\nwhole = True\n")
    monkeypatch.syspath_prepend(tmp_path)

    def load_more() -> None:
        import time

        __import__("slow_part")
        time.sleep(20)

    loads.append(load_more)
    terminal(["/kv bf16", "two"])
    shown = octo(*ARGV)
    assert shown.code == 0 and "back to octo-demo" in shown.out and "stopped after --max-tokens" in shown.out
    assert sys.modules.pop("slow_part").whole


def test_memory_that_ran_out_is_free_for_the_former_engine(
    octo: Callable[..., Any], terminal: Any, loads: list[Any]
) -> None:
    """The traceback of the failure must not keep what the failed calls held."""
    held, alive = list[Any](), list[bool]()

    def run_out() -> None:
        half = Half()
        held.append(weakref.ref(half))
        try:
            raise MemoryError("of the device")
        except MemoryError:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory") from None

    loads += [run_out, lambda: alive.append(held[0]() is not None)]
    terminal(["one", "/kv bf16", "two", "/tokens"])
    shown = octo(*ARGV)
    assert shown.code == 0 and "the memory ran out" in shown.err and alive == [False]
    assert "2 questions: " in shown.out and shown.out.count("stopped after --max-tokens") == 2


def test_without_any_engine_the_conversation_is_kept(
    octo: Callable[..., Any], terminal: Any, loads: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    def run_out() -> None:
        raise MemoryError

    loads += [run_out, run_out]
    terminal(["one", "/kv bf16", "two", "/kv bf16", "three", "/tokens"])
    shown = octo(*ARGV, "--session", "kept")
    assert shown.code == 0 and shown.err.count("the memory ran out") == 1, shown.err
    assert "octo-demo could not be loaded again: the conversation is kept" in shown.out
    assert shown.err.count("no model is loaded: /model NAME or /kv FORMAT loads one") == 1
    assert "2 questions: " in shown.out
    terminal(["/tokens"])
    assert "2 questions: " in octo(*ARGV, "--session", "kept").out


def test_a_bias_that_another_model_has_no_tokens_for(octo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    load = runtime.load_engine

    def smaller(options: Any, **cache: Any) -> Engine:
        engine = load(options, **cache)
        if options.kv == "bf16":
            engine.config = dataclasses.replace(engine.config, vocab_size=5000)
        return engine

    monkeypatch.setattr(runtime, "load_engine", smaller)
    shown = octo(*ARGV, "-q", data=b"/set logit_bias 8000=1\n/kv bf16\n")
    assert shown.code == 2 and "logit_bias names the token 8000 and the vocabulary has 5,000" in shown.err
    assert octo(*ARGV, "-q", data=b"/set logit_bias 4000=1\n/kv bf16\n").code == 0


def test_another_model_gets_the_last_answer_too(octo: Callable[..., Any], terminal: Any, tmp_path: Path) -> None:
    """It is entered into the conversation with the next question, or before the model is another one."""
    from octo_run.models.cache import DEMO_PATH

    folder = tmp_path / "other"
    shutil.copytree(DEMO_PATH, folder)
    terminal(["one", f"/model {folder}", "/continue", f"/export {tmp_path / 'talk.json'}"])
    shown = octo(*ARGV)
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert shown.code == 0 and [message["role"] for message in messages] == ["user", "assistant"], shown.err
