"""Many answers: the prompts of a file, or several answers to one prompt, some of them at a time."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from octo_run.cli import console, runtime
from octo_run.cli.options import EngineOptions
from octo_run.cli.output import OutputFile, check_writable, write_file
from octo_run.cli.progress import Running
from octo_run.cli.sampling_options import SamplingOptions
from octo_run.errors import OctoError, UsageError, quoted
from octo_run.models.foreign import parsing
from octo_run.process import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from octo_run.engine import Completion, Engine, SamplingParams, Token

#: Answers that are made at a time.
SEQUENCES = 8
#: What a line of a batch may set of its own, by the names of ``SamplingParams``.
_LINE_SETTINGS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "penalty_range", "typical_p", "top_n_sigma", "xtc_probability", "xtc_threshold", "dry_multiplier", "dry_base",
    "dry_allowed_length", "dry_range", "seed", "max_tokens", "stop",
)  # fmt: skip


@dataclass(frozen=True)
class Prompts:
    """How texts become prompts.

    Attributes:
        bos: Whether raw texts begin with the model's first token; None: as it wants it.
        variables: What the chat template sees beside the messages.
        template: The text of another chat template, and its file.
    """

    as_chat: bool
    system: str | None
    bos: bool | None
    variables: dict[str, Any]
    template: tuple[str, str] | None

    def ids(self, engine: "Engine", text: str) -> list[int]:
        """Token ids of a text: through the chat template, or as it is."""
        tokenizer = engine.tokenizer
        if not self.as_chat:
            if self.bos is None:
                return tokenizer.prompt(text)
            if self.bos and tokenizer.bos_id is None:
                raise UsageError("--bos is given, and this model has no first token.")
            return tokenizer.encode(text, add_bos=self.bos)
        head = [{"role": "system", "content": self.system}] if self.system else []
        return self.chat(engine, [*head, {"role": "user", "content": text}])

    def chat(self, engine: "Engine", messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation."""
        tokenizer = engine.tokenizer
        if self.template is not None:
            tokenizer.use_template(*self.template)
        if not tokenizer.has_chat_template:
            raise UsageError("this model has no chat template: use --raw.")
        return tokenizer.chat(messages, **self.variables)


def told_logprobs(engine: "Engine", tokens: "Iterable[Token]") -> list[dict[str, Any]]:
    """The log-probabilities of tokens and of their alternatives, for JSON."""

    def one(token: int, value: float) -> dict[str, Any]:
        text = engine.tokenizer.piece(token).decode("utf-8", "replace")
        return {"id": token, "token": text, "logprob": round(value, 6)}

    return [{**one(t.id, t.logprob), "top": [one(*other) for other in t.top]} for t in tokens]


def run_several(
    text: str,
    count: int,
    prompts: Prompts,
    load: EngineOptions,
    sampling: SamplingOptions,
    sequences: int,
    logprobs: int,
    *,
    as_json: bool,
) -> int:
    """Give several answers to one prompt, in order; a line of dashes is between two texts."""
    engine = runtime.load_engine(load, sequences=min(count, sequences))
    ids = prompts.ids(engine, text)
    params = runtime.sampling_params(engine, sampling, logprobs=logprobs)
    rules = [_with_seed(params, number) for number in range(count)]
    if params.temperature == 0:
        console.warn("without chance all answers are the same; give --temp 0.7, say")
    try:
        for done in _in_order(engine.generate_batch([ids] * count, rules)):
            if as_json:
                console.print_json(_answer(engine, done, logprobs))
                continue
            if done.index:
                console.echo("---")
            console.stream(done.text)
            if not done.text.endswith("\n"):
                console.echo()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def _with_seed(params: "SamplingParams", number: int) -> "SamplingParams":
    """The rules of answer ``number``: each has a seed of its own."""
    return params if params.seed is None else dataclasses.replace(params, seed=params.seed + number)


def _in_order(found: "Iterable[Completion]") -> "Iterator[Completion]":
    waiting, following = dict[int, "Completion"](), 0
    for done in found:
        waiting[done.index] = done
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def _answer(engine: "Engine", done: "Completion", logprobs: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "index": done.index,
        "text": done.text,
        "finish_reason": done.finish_reason,
        "prompt_tokens": done.prompt_tokens,
        "reused_tokens": done.reused_tokens,
        "generated_tokens": len(done.ids),
    }
    if logprobs:
        found["logprobs"] = told_logprobs(engine, done.tokens)
    return found


@dataclass(frozen=True)
class Line:
    """A line of a batch.

    Attributes:
        text: Of a raw prompt or a question, else None.
        messages: Of a conversation.
        settings: What it sets of its own.
    """

    number: int
    name: Any
    text: str | None
    messages: list[dict[str, str]] | None
    settings: dict[str, Any]


def read_lines(path: Path) -> list[Line]:
    """The lines of a batch.

    Raises:
        UsageError: One of them is none; the message names it.
    """
    found = list[Line]()
    for number, text in enumerate(console.read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        where = f"line {number} of {path}"
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise UsageError(f"{where} is no JSON.") from None
        if not isinstance(value, dict):
            raise UsageError(f'{where} is {quoted(value)}; give an object like {{"prompt": "text"}}.')
        found.append(_line(number, where, value))
    return found


def _line(number: int, where: str, value: dict[str, Any]) -> Line:
    unknown = [name for name in value if name not in ("id", "prompt", "messages", *_LINE_SETTINGS)]
    if unknown:
        raise UsageError(f"{where} has {quoted(unknown[0])}, which no line of a batch has.")
    text, messages = value.get("prompt"), value.get("messages")
    if (text is None) == (messages is None):
        raise UsageError(f'{where} needs "prompt" or "messages", one of them.')
    if text is not None and (not isinstance(text, str) or not text):
        raise UsageError(f"{where}: the prompt is {quoted(text)}; give a text.")
    if messages is not None:
        good = isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)
        if not good:
            raise UsageError(f"{where}: the messages are {quoted(messages)}; give a list of objects.")
    settings = {name: value[name] for name in _LINE_SETTINGS if value.get(name) is not None}
    if isinstance(settings.get("stop"), str):
        settings["stop"] = [settings["stop"]]
    return Line(number, value.get("id"), text, messages, settings)


class Journal:
    """The answers so far in a file beside the result, in the order in which they came; a killed batch goes on there.

    Its first line says which batch it is of; a last line that is not whole does not count.
    """

    def __init__(self, out: Path, batch: str) -> None:
        """Read what there is.

        Raises:
            OctoError: It is of another batch.
        """
        self.path = out.with_name(f".{out.name}.part")
        self.answers: dict[int, dict[str, Any]] = {}
        head = json.dumps({"batch": batch})
        whole = 0
        if self.path.exists():
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1
            lines = data[:whole].decode("utf-8", "replace").splitlines()
            if lines and lines[0] != head:
                raise OctoError(
                    f"{self.path} is of another batch (other prompts, model or settings): delete it, or give "
                    "another -o."
                )
            for line in lines[1:]:
                with parsing(self.path, "JSON lines", "delete it"):
                    value = json.loads(line)
                    self.answers[int(value["index"])] = value
        self._file: IO[bytes] = self.path.open("r+b" if whole else "wb")
        self._file.truncate(whole)
        self._file.seek(whole)
        if not whole:
            self._write(head)

    def add(self, answer: dict[str, Any]) -> None:
        """Keep an answer."""
        self.answers[answer["index"]] = answer
        self._write(json.dumps(answer, ensure_ascii=False))

    def _write(self, line: str) -> None:
        self._file.write(line.encode("utf-8", "surrogatepass") + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Let it lie."""
        self._file.close()

    def finish(self, out: Path) -> None:
        """All answers are there: write them in order, and take this file away."""
        os.fsync(self._file.fileno())
        self.close()
        lines = [json.dumps(self.answers[index], ensure_ascii=False) for index in sorted(self.answers)]
        write_file(OutputFile(out, lambda place: _write_lines(place, lines)))
        self.path.unlink()


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8", errors="backslashreplace")


def run_batch(
    batch: Path,
    out: Path | None,
    prompts: Prompts,
    load: EngineOptions,
    sampling: SamplingOptions,
    sequences: int,
    logprobs: int,
) -> int:
    """Answer the prompts of a file.

    A prompt that cannot be answered has an ``error`` in place of a text; then the exit code is 1.
    """
    lines = read_lines(batch)
    if not lines:
        raise UsageError(f"{batch} has no prompts.")
    if out is not None:
        check_writable(out)
    journal = None if out is None else Journal(out, _name_of(lines, prompts, load, sampling, logprobs))
    done = {} if journal is None else dict(journal.answers)
    if done:
        console.notice(f"{len(done):,} of {len(lines):,} answers are there already")
    try:
        engine = runtime.load_engine(load, sequences=min(sequences, len(lines)))
        failed = _answer_lines(engine, lines, done, journal, prompts, sampling, logprobs)
    except KeyboardInterrupt:
        if journal is not None:
            journal.close()
            console.notice("stopped; the same command goes on where it was")
        return EXIT_INTERRUPTED
    if journal is not None and out is not None:
        journal.finish(out)
    return 1 if failed else 0


def _name_of(lines: list[Line], prompts: Prompts, load: EngineOptions, sampling: SamplingOptions, logprobs: int) -> str:
    """What tells one batch from another."""
    return hashlib.sha256(repr((lines, prompts, load, sampling, logprobs)).encode("utf-8", "replace")).hexdigest()


def _answer_lines(
    engine: "Engine",
    lines: list[Line],
    done: dict[int, dict[str, Any]],
    journal: Journal | None,
    prompts: Prompts,
    sampling: SamplingOptions,
    logprobs: int,
) -> bool:
    """Answer what has no answer yet; whether any prompt could not be answered."""
    base = runtime.sampling_params(engine, sampling, logprobs=logprobs)
    wanted, ids, rules = list[int](), list[list[int]](), list[Any]()
    results = dict(done)
    printed = 0

    def tell(answer: dict[str, Any]) -> None:
        nonlocal printed
        results[answer["index"]] = answer
        if journal is not None:
            journal.add(answer)
            return
        while printed in results:
            console.print_json(results[printed])
            printed += 1

    for index, line in enumerate(lines):
        if index in done:
            continue
        try:
            rule = dataclasses.replace(_with_seed(base, index), **line.settings)
            found = _line_ids(engine, prompts, line)
            engine.check_prompt(found)
        except OctoError as error:
            tell({"index": index, "id": line.name, "error": f"line {line.number}: {error}"})
            continue
        wanted.append(index)
        ids.append(found)
        rules.append(rule)
    tokens = 0
    with Running("batch") as running:
        running.report(len(results), len(lines), str)
        for completion in engine.generate_batch(ids, rules):
            index = wanted[completion.index]
            answer = _answer(engine, completion, logprobs)
            tell({**answer, "index": index, "id": lines[index].name})
            tokens += len(completion.ids)
            running.report(len(results), len(lines), str)
    return any("error" in answer for answer in results.values())


def _line_ids(engine: "Engine", prompts: Prompts, line: Line) -> list[int]:
    if line.messages is not None:
        return prompts.chat(engine, line.messages)
    assert line.text is not None
    return prompts.ids(engine, line.text)
