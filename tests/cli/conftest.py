"""A small in-memory engine in place of the real one, so that the command line is tested without a model."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from octo_run.cli import console, main, runtime
from octo_run.engine.benchmark import Row
from octo_run.engine.generation import OnPrompt
from octo_run.engine.profiling import KernelTime, PartTime, Profile
from octo_run.errors import UsageError


@dataclass
class FakeReply:
    """An answer of prepared pieces; ``"^C"`` among them stands for the key pressed at that moment.

    ``reading`` is what happens before the first piece, given the callback for the progress of the prompt.
    """

    pieces: list[str]
    prompt_tokens: int = 12
    reused_tokens: int = 0
    dropped_turns: int = 0
    reason: str = "stop"
    text: str = ""
    ids: list[int] = field(default_factory=list)
    parts: list[tuple[bool, str]] = field(default_factory=list)
    finish_reason: str | None = None
    prefill_seconds: float = 0.25
    decode_seconds: float = 0.5
    reading: Callable[[OnPrompt], None] | None = None
    on_prompt: OnPrompt | None = None

    read: int | None = None  # None: the whole prompt

    @property
    def read_tokens(self) -> int:
        return self.prompt_tokens - self.reused_tokens if self.read is None else self.read

    @property
    def generated_tokens(self) -> int:
        return len(self.ids)

    @property
    def decoded_tokens(self) -> int:
        return max(0, len(self.ids) - 1)

    def __iter__(self) -> Iterator[str]:
        if self.reading is not None:
            assert self.on_prompt is not None
            self.reading(self.on_prompt)
        for number, piece in enumerate(self.pieces):
            if piece == "^C":
                signal.raise_signal(signal.SIGINT)
                continue
            self.ids.append(number)
            self.text += piece
            self.parts.append((False, piece))
            yield piece
        self.finish_reason = self.reason

    def close(self) -> None:
        self.finish_reason = self.finish_reason or "interrupted"


class FakeTokenizer:
    bos_id = 1
    has_chat_template = True
    special_ids = frozenset({0, 1, 2})

    def prompt(self, text: str) -> list[int]:
        return [1, *(ord(letter) for letter in text)]

    def count(self, text: str, _most: int) -> int:
        return len(text)

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        return [2, *(ord(letter) for message in messages for letter in message["content"])]


class FakeEngine:
    """Holds what the commands read from an engine, and the answers that it will give, in order."""

    def __init__(self) -> None:
        self.tokenizer = FakeTokenizer()
        self.max_context, self.device = 4096, SimpleNamespace(type="cpu")
        self.config = SimpleNamespace(wrapper="")
        self.dtype = "torch.float32"
        self.replies: list[FakeReply] = []
        self.prompts: list[list[int]] = []
        self.runs: list[tuple[Any, ...]] = []  # kv, test, tokens, depth, batch
        self.profiled: list[tuple[str, str, int, int, int]] = []  # likewise
        self.traces: list[Any] = []  # name, profiles, about
        self.loads: list[str] = []  # kv
        self.weights: list[str | None] = []  # likewise
        self.loaded: Any = None
        self.cache: dict[str, Any] = {}
        self.sampling: Any = None
        self.session: FakeSession | None = None
        self.closed = False
        self.on_round: Callable[[], None] = lambda: None  # called in every round of a measurement

    def answers(self, *texts: str) -> None:
        self.replies += [FakeReply([text]) for text in texts]

    def close(self) -> None:
        self.closed = True

    def check_params(self, params: Any) -> None:
        pass

    def next_reply(self, on_prompt: OnPrompt) -> FakeReply:
        reply = self.replies.pop(0)
        reply.on_prompt = on_prompt
        return reply

    @property
    def kv(self) -> str:
        return str(self.loaded.kv or "oct3")

    @property
    def plan(self) -> SimpleNamespace:
        loaded = self.loaded or SimpleNamespace(kv="", weights=None)
        return SimpleNamespace(
            kv=loaded.kv or "oct3", weight_format=loaded.weights or "fp32", context=self.max_context,
            check_length=lambda _tokens: None, shorten="shorten it",
        )  # fmt: skip

    def memory_plan(self) -> dict[str, int]:
        parts = {
            "weights": 1000,
            "arena": 200,
            "full_precision": 30,
            "recurrent": 0,
            "workspace": 4,
            "graphs": 0,
            "logits": 5,
        }
        return {**parts, "total": 1239, "bytes_per_token": 7, "context": self.max_context}

    def memory_now(self) -> dict[str, int]:
        return {"process_peak": 4_000_000}


class FakeSession:
    def __init__(self, engine: FakeEngine, system: str | None, **options: Any) -> None:
        self.engine, self.system, self.options = engine, system, options
        self.asked: list[str] = []
        self.cleared = 0
        engine.session = self

    def rendered(self, messages: list[dict[str, str]]) -> list[int]:
        return self.engine.tokenizer.chat(messages)

    def ask(self, text: str, _params: Any, on_prompt: OnPrompt, _budget: int | None = None) -> FakeReply:
        if text == "too long":
            raise UsageError("The prompt has 5,000 tokens and the context holds 4,096; shorten it or raise --ctx.")
        self.asked.append(text)
        return self.engine.next_reply(on_prompt)

    def room(self) -> int:
        return self.engine.max_context

    def mark(self) -> list[str]:
        return [*self.asked]

    def restore(self, mark: list[str]) -> None:
        self.asked = [*mark]

    @property
    def question(self) -> str | None:
        return self.asked[-1] if self.asked else None

    def undo(self) -> str | None:
        return self.asked.pop() if self.asked else None

    def clear(self) -> None:
        self.cleared += 1
        self.asked.clear()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """The fake engine, put behind all that the commands use of the real one."""
    fake = FakeEngine()

    def load(options: Any, check: Any = None, **cache: Any) -> FakeEngine:
        if check is not None:
            check(fake.tokenizer, fake.plan)
        fake.loaded, fake.cache, fake.closed = options, cache, False
        fake.loads.append(options.kv)
        fake.weights.append(options.weights)
        return fake

    def params(_engine: FakeEngine, options: Any, **_more: Any) -> Any:
        fake.sampling = options
        return SimpleNamespace(temperature=options.temp or 0.0, seed=options.seed)

    def reply(_engine: FakeEngine, ids: list[int], options: Any, on_prompt: OnPrompt, _logprobs: int = 0) -> FakeReply:
        fake.prompts.append(ids)
        params(fake, options)
        return fake.next_reply(on_prompt)

    def measure(_engine: FakeEngine, test: tuple[Any, ...], **settings: Any) -> Row:
        fake.runs.append((fake.loaded.kv, *test, settings["depth"], settings["batch"]))
        read = None if test[0] == "pp" else 80.0
        for _ in range(settings["repetitions"] + 1):
            fake.on_round()
            settings["on_round"]()
        return Row(
            weights=fake.plan.weight_format, kv=fake.loaded.kv, test=f"{test[0]}{'+'.join(map(str, test[1:]))}",
            depth=settings["depth"], batch=settings["batch"], tokens_per_s=1234.5, mean=1240.0, stdev=33.0,
            least=1200.0, most=1300.0, first_token_ms=None if test[0] == "tg" else 414.7, ms_per_token=0.81,
            gb_per_s=read, of_bandwidth=None if read is None else 0.8, joules_per_token=0.5,
        )  # fmt: skip

    def profile(_engine: FakeEngine, test: tuple[str, int], *, depth: int, batch: int) -> Profile:
        fake.profiled.append((fake.loaded.kv, *test, depth, batch))
        parts = [PartTime("mlp", 0.75, 0.75), PartTime("gaps", 0.25, 0.25)]
        names = ["void at::native::" + "x" * 80, *(f"kernel {i}" for i in range(1, 20))]
        lines = [KernelTime(name, "mlp", 2.0, 18.75, 0.0375, 0.0375) for name in names]
        unit = "step" if test[0] == "tg" else "prompt"
        return Profile(
            fake.plan.weight_format,
            fake.loaded.kv,
            f"{test[0]}{test[1]}",
            depth,
            batch,
            unit,
            64,
            1.0,
            parts,
            lines,
            [],
        )

    monkeypatch.setattr(runtime, "measure", measure)
    monkeypatch.setattr(runtime, "profile", profile)

    def write_trace(path: Path, *written: Any) -> None:
        path.write_text("a trace")
        fake.traces.append((path.name, *written))

    monkeypatch.setattr(runtime, "write_trace", write_trace)
    monkeypatch.setattr(runtime, "copy_bandwidth", lambda _engine: 100e9)
    monkeypatch.setattr(runtime, "forget_peak", lambda _engine: None)
    monkeypatch.setattr(runtime, "device_name", lambda _engine: "cpu (1 threads)")
    monkeypatch.setattr(runtime, "load_engine", load)
    monkeypatch.setattr(runtime, "resolved", lambda options: options)
    monkeypatch.setattr(runtime, "sampling_params", params)
    monkeypatch.setattr(runtime, "open_session", FakeSession)
    monkeypatch.setattr(runtime, "open_reply", reply)
    return fake


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Put bytes on standard input."""
    import io
    import sys

    def put(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return put


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def octo(capsys: pytest.CaptureFixture[str], stdin: Callable[[bytes], None]) -> Callable[..., Outcome]:
    """Run the command line in this process: ``octo("generate", "-p", "text", stdin=b"")``."""

    def run(*argv: str, data: bytes = b"") -> Outcome:
        stdin(data)
        code = main(argv)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Any]], None]:
    """Pretend that a person sits at a terminal and types these lines; an exception class is what a key
    raises, and a function makes a line of what the line begins with."""

    def play(lines: list[Any]) -> None:
        from octo_run.cli import line_editor

        class Editor:
            cleared = False

            def __init__(self, *_: Any) -> None:
                pass

            def read(self, draft: str = "", loading: Any = None) -> str:
                if loading is not None:  # this person waits for the model
                    loading.get()
                line = lines.pop(0) if lines else EOFError
                if isinstance(line, str):
                    return line
                if not isinstance(line, type):
                    return str(line(draft))
                raise line

        monkeypatch.setattr(line_editor, "LineEditor", Editor)
        monkeypatch.setattr(console, "interactive", lambda: True)

    return play
