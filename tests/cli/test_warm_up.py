"""What a GPU does while a chat's model is loaded: only there, told if kernels are compiled, stopped as loading is."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from octo_run.cli import checks, console, reload, runtime
from octo_run.engine import Engine, warm_up
from octo_run.errors import OctoError

NOTICE = "compiling the GPU's kernels, once for this machine and model\n"
CTRL_C, CTRL_D, ENTER = "\x03", "\x04", "\r"


@pytest.fixture(autouse=True)
def _state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def warmed(engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The rules of sampling of each warm-up, which compiles kernels; the fake engine is one of a GPU."""
    found = list[Any]()

    def warm(given: Any, params: Any, on_compile: Callable[[], object]) -> None:
        assert given is engine
        found.append(params)
        on_compile()

    engine.device = torch.device("cuda")
    monkeypatch.setattr(warm_up, "warm_up", warm)
    return found


def fails(error: BaseException) -> Callable[..., None]:
    def warm(*_: object) -> None:
        raise error

    return warm


def test_a_chat_warms_a_gpu_up_and_says_what_takes_long(octo: Callable[..., Any], engine: Any, warmed: Any) -> None:
    engine.answers("a", "b")
    shown = octo("chat", "--temp", "0.5", data=b"one\ntwo\n")
    assert (shown.code, shown.out, shown.err) == (0, "a\nb\n", NOTICE)
    assert [params.temperature for params in warmed] == [0.5], "as the answers will be drawn"
    engine.answers("a")
    shown = octo("chat", "--quiet", data=b"one\n")
    assert (shown.code, shown.out, shown.err, len(warmed)) == (0, "a\n", "", 2)


def test_a_cpu_is_not_warmed_up(octo: Callable[..., Any], engine: Any, warmed: Any) -> None:
    engine.device = torch.device("cpu")
    engine.answers("a")
    shown = octo("chat", data=b"one\n")
    assert (shown.code, shown.out, shown.err, warmed) == (0, "a\n", "", [])


def test_it_comes_before_a_saved_conversation(octo: Callable[..., Any], warmed: Any, monkeypatch: Any) -> None:
    """Which has the cache afterwards."""
    order = list[int]()
    monkeypatch.setattr("octo_run.cli.chat._resume", lambda *_: order.append(len(warmed)))
    assert octo("chat", "--session", "new", data=b"").code == 0 and order == [1]


def test_generate_warms_up_when_it_is_known_that_it_can_answer(
    octo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real engine."""
    found = list[Engine]()

    def warm(engine: Engine, *_: object) -> None:
        found.append(engine)

    monkeypatch.setattr(runtime, "warm_up", warm)
    argv = ("generate", "-n", "2", "--ctx", "64", "--device", "cpu")
    assert octo(*argv, "-p", "Once").code == 0 and len(found) == 1
    shown = octo(*argv, "-p", "Once upon a time. " * 40)
    assert shown.code == 2 and "the context holds 64" in shown.err and len(found) == 1


@pytest.mark.parametrize("at_a_terminal", [False, True])
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("Failed to find C compiler.\nPlease specify one via CC."),
         "cuda cannot run the model (RuntimeError: Failed to find C compiler. Please specify one via CC): "
         "`octo-run doctor` looks at the machine, and --device cpu does without."),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "the GPU's memory ran out; choose "),
        (OctoError("The pool is empty."), "The pool is empty."),
    ],
)  # fmt: skip
def test_a_failure_is_one_of_loading(
    octo: Callable[..., Any], warmed: Any, terminal: Any, monkeypatch: pytest.MonkeyPatch,
    error: Exception, says: str, at_a_terminal: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(warm_up, "warm_up", fails(error))
    if at_a_terminal:
        terminal(["one"])
    shown = octo("chat", data=b"one\n")
    assert shown.code == 1 and shown.err.startswith(f"octo-run: {says}") and shown.err.count("\n") == 1


def test_another_model_is_warmed_up_too(
    octo: Callable[..., Any], engine: Any, warmed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If that fails, the former one comes back."""
    monkeypatch.setattr(checks, "loadable", lambda _: SimpleNamespace())
    monkeypatch.setattr(reload, "_params", lambda *_: "params")
    monkeypatch.setattr(runtime, "open_session", lambda *_, **__: engine.session)
    engine.session = type("Session", (), {"system": None, "variables": {}, "drops": True, "turns": []})()
    shown = octo("chat", data=b"/kv bf16\n")
    assert shown.code == 0 and shown.err.count(NOTICE) == 2 and warmed[1:] == ["params"] and engine.kv == "bf16"
    load = runtime.load_engine

    def load_failing(options: Any, **check: Any) -> Any:
        if options.kv == "bf16":
            monkeypatch.setattr(warm_up, "warm_up", fails(RuntimeError("no compiler")))
        return load(options, **check)

    monkeypatch.setattr(runtime, "load_engine", load_failing)
    shown = octo("chat", data=b"/kv bf16\n")
    assert shown.code == 1 and "cannot run the model (RuntimeError: no compiler)" in shown.err and engine.kv == "oct3"


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[PipeInput]:
    """The keyboard of a person at a terminal."""
    monkeypatch.setattr(console, "interactive", lambda: True)
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


@pytest.mark.parametrize("leaves", [False, True])
def test_ctrl_c_meanwhile(
    octo: Callable[..., Any], engine: Any, warmed: Any, keys: PipeInput, monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    """As while a model is loaded: the first one is answered by advice, the second one leaves, and a message that is
    written waits. The notice stands above the line."""
    begun, goes_on, warm = threading.Event(), threading.Event(), warm_up.warm_up

    def slow(*given: Any) -> None:
        warm(*given)
        begun.set()
        goes_on.wait(60)

    def person() -> None:
        begun.wait(20)
        keys.send_text(CTRL_C)
        if leaves:
            keys.send_text(CTRL_C)
        else:
            keys.send_text(f"one{ENTER}")
            goes_on.set()
            keys.send_text(CTRL_D)

    monkeypatch.setattr(warm_up, "warm_up", slow)
    engine.answers("hello")
    typing = threading.Thread(target=person)
    typing.start()
    shown = octo("chat")
    goes_on.set()
    typing.join()
    assert "Ctrl-C again or Ctrl-D leaves." in shown.out and shown.err == NOTICE
    if leaves:
        assert shown.code == 130 and engine.session.asked == [] and "hello" not in shown.out
    else:
        assert shown.code == 0 and engine.session.asked == ["one"] and "hello" in shown.out
