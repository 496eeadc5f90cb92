"""Many answers: the prompts of a file, or several answers to one prompt, some of them at a time."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octo_run.cli import console, runtime
from octo_run.cli.batch_lines import Line, read_lines
from octo_run.cli.journal import Journal, journal
from octo_run.cli.options import EngineOptions
from octo_run.cli.output import check_writable
from octo_run.cli.progress import Running
from octo_run.cli.sampling_options import SamplingOptions
from octo_run.errors import OctoError, UsageError
from octo_run.process import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from octo_run.engine import Completion, Engine, MemoryPlan, SamplingParams, Token
    from octo_run.tokenizer import Tokenizer

#: Answers that are made at a time.
SEQUENCES = 8


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

    def ids(self, tokenizer: "Tokenizer", text: str) -> list[int]:
        """Token ids of a text: through the chat template, or as it is."""
        if not self.as_chat:
            if self.bos is None:
                return tokenizer.prompt(text)
            if self.bos and tokenizer.bos_id is None:
                raise UsageError("--bos is given, and this model has no first token.")
            return tokenizer.encode(text, add_bos=self.bos)
        return self.chat(tokenizer, [*self.head, {"role": "user", "content": text}])

    @property
    def head(self) -> list[dict[str, str]]:
        """The message before all others, if there is a system prompt."""
        return [{"role": "system", "content": self.system}] if self.system else []

    def chat(self, tokenizer: "Tokenizer", messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation."""
        if self.template is not None:
            tokenizer.use_template(*self.template)
        if not tokenizer.has_chat_template:
            instead = "use --raw" if self.as_chat else "give prompt in place of messages"
            raise UsageError(f"this model has no chat template: {instead}, or name one with --chat-template.")
        return tokenizer.chat(messages, **self.variables)


def load_for(prompts: Prompts, text: str, load: EngineOptions, **cache: Any) -> "tuple[Engine, list[int]]":
    """An engine, and the ids of the text that it is to answer; one that it cannot is refused before a weight is read.

    Args:
        cache: See ``runtime.load_engine``.
    """
    ids: list[int] = []

    def check(tokenizer: "Tokenizer", plan: "MemoryPlan") -> None:
        ids.extend(prompts.ids(tokenizer, text))
        plan.check_length(len(ids))

    return runtime.load_engine(load, check=check, **cache), ids


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
    engine, ids = load_for(prompts, text, load, sequences=min(count, sequences))
    params = runtime.sampling_params(engine, sampling, logprobs=logprobs)
    rules = [_with_seed(params, number) for number in range(count)]
    if params.temperature == 0:
        console.notice("without chance all answers are the same; give --temp 0.7, say")
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


def run_batch(
    batch: Path,
    out: Path | None,
    prompts: Prompts,
    load: EngineOptions,
    sampling: SamplingOptions,
    sequences: int,
    logprobs: int,
    *,
    force: bool,
) -> int:
    """Answer the prompts of a file.

    A prompt that cannot be answered has an ``error`` in place of a text; then the exit code is 1.

    Args:
        force: Replace ``out`` if it is there.
    """
    lines = read_lines(batch)
    if out is None:
        return _run_lines(lines, None, prompts, load, sampling, sequences, logprobs)
    if out.exists() and not out.is_file() and not out.is_dir():
        raise UsageError(f"{out} is no file; leave -o out, and send the answers there with >.")
    check_writable(out)
    if out.exists() and out.samefile(batch):
        raise UsageError(f"{out} has the prompts; give another -o.")
    out = out.resolve()
    with journal(out, _head(lines, prompts, load, sampling, logprobs), len(lines), force=force) as kept:
        if kept.answers:
            console.notice(f"{len(kept.answers):,} of {len(lines):,} answers are there already")
        return _run_lines(lines, kept, prompts, load, sampling, sequences, logprobs)


def _run_lines(
    lines: list[Line],
    kept: Journal | None,
    prompts: Prompts,
    load: EngineOptions,
    sampling: SamplingOptions,
    sequences: int,
    logprobs: int,
) -> int:
    """Answer what has no answer yet, and give the exit code."""
    answers = _Answers(kept)
    try:
        if len(answers.done) < len(lines):
            engine = runtime.load_engine(load, sequences=min(sequences, len(lines)))
            _answer_lines(engine, lines, answers, prompts, sampling, logprobs)
    except KeyboardInterrupt:
        answers.print_rest()
        if kept is not None:
            console.notice("stopped; the same command goes on where it was")
        return EXIT_INTERRUPTED
    if kept is not None:
        kept.finish()
    return 1 if any("error" in answer for answer in answers.done.values()) else 0


def _head(
    lines: list[Line], prompts: Prompts, load: EngineOptions, sampling: SamplingOptions, logprobs: int
) -> dict[str, Any]:
    """What tells one batch from another: a digest of its prompts, and by the options' names what shapes the answers."""
    given = dataclasses.asdict(prompts) | dataclasses.asdict(load) | dataclasses.asdict(sampling)
    if load.kv is None:
        from octo_run.engine.allocation import default_format

        given["kv"] = default_format(runtime.model_config(load.model, offline=load.offline))
    given |= {"logprobs": logprobs, "chat": given.pop("as_chat"), "chat_template": given.pop("template")}
    given["template_kwargs"], given["temperature"] = given.pop("variables"), given.pop("temp")
    grammar = given.pop("read")
    for name in ("offline", "threads"):  # these change no answer
        del given[name]
    settings = {f"--{name.replace('_', '-')}": _plain(value) for name, value in given.items()}
    settings |= {"the grammar": _plain(grammar), "the model's folder": runtime.folder_of(load.model)}
    shown_settings = {name: value for name, value in settings.items() if value not in (None, [], {})}
    digest = hashlib.sha256(repr(lines).encode("utf-8", "backslashreplace")).hexdigest()
    return {"batch": digest, "settings": shown_settings}


def _plain(value: Any) -> Any:
    """A setting as it comes back from JSON."""
    return json.loads(json.dumps(value, default=str))


class _Answers:
    """The answers of a batch: kept in its journal, or printed in order as soon as that can be done."""

    def __init__(self, kept: Journal | None) -> None:
        self._kept, self._printed = kept, 0
        self.done: dict[int, dict[str, Any]] = {} if kept is None else kept.answers

    def add(self, answer: dict[str, Any]) -> None:
        if self._kept is not None:
            self._kept.add(answer)
            return
        self.done[answer["index"]] = answer
        while self._printed in self.done:
            console.print_json(self.done[self._printed])
            self._printed += 1

    def print_rest(self) -> None:
        """Print what waits for an earlier answer, which will not come."""
        if self._kept is None:
            for index in sorted(index for index in self.done if index >= self._printed):
                console.print_json(self.done[index])


def _answer_lines(
    engine: "Engine", lines: list[Line], answers: _Answers, prompts: Prompts, sampling: SamplingOptions, logprobs: int
) -> None:
    """Answer what has no answer yet."""
    base = runtime.sampling_params(engine, sampling, logprobs=logprobs)
    wanted, ids, rules = list[int](), list[list[int]](), list[Any]()
    for index, line in enumerate(lines):
        if index in answers.done:
            continue
        try:
            rule = dataclasses.replace(_with_seed(base, index), **line.settings)
            found = _line_ids(engine, prompts, line)
            engine.check_prompt(found)
        except OctoError as error:
            answers.add({"index": index, "id": line.name, "error": f"line {line.number}: {error}"})
            continue
        wanted.append(index)
        ids.append(found)
        rules.append(rule)
    own = dict.fromkeys(stop for rule in rules for stop in rule.stop if stop not in base.stop)
    runtime.warn_of_stops(engine.tokenizer, "stop", own)
    with Running("batch") as running:
        running.report(len(answers.done), len(lines), str)
        for completion in engine.generate_batch(ids, rules):
            index = wanted[completion.index]
            answers.add({**_answer(engine, completion, logprobs), "index": index, "id": lines[index].name})
            running.report(len(answers.done), len(lines), str)


def _line_ids(engine: "Engine", prompts: Prompts, line: Line) -> list[int]:
    if line.messages is not None:
        own = line.messages[0].get("role") == "system" or not prompts.system
        return prompts.chat(engine.tokenizer, line.messages if own else [*prompts.head, *line.messages])
    assert line.text is not None
    return prompts.ids(engine.tokenizer, line.text)
