"""Exact match on files of prompts and answers, one JSON object a line, as GSM8K and its like are published.

The same rule takes the answer out of what the model says and out of the file's answer (whose last number is the result
in GSM8K, after ``####``).
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from octo_run.engine.engine import Engine
from octo_run.engine.evaluation.statistics import wilson
from octo_run.engine.plan import MemoryPlan
from octo_run.engine.reply import Reply
from octo_run.engine.sampling import SamplingParams
from octo_run.errors import OctoError, UsageError, quoted
from octo_run.tokenizer import Tokenizer

#: What is compared: the last or first number, the last or first line that is not empty, everything, or a regex's match.
RULES = ("last-number", "first-number", "last-line", "first-line", "whole", "regex")
_PROMPT_KEYS, _ANSWER_KEYS = ("prompt", "question", "input"), ("answer", "target", "output")
_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")


@dataclass(frozen=True)
class Task:
    """A prompt and its answer as the file has them, and the line that they are from (1 is the first)."""

    line: int
    prompt: str
    answer: str


@dataclass(frozen=True)
class Outcome:
    """What became of one task.

    Attributes:
        got: What the rule took out of the response (None: nothing).
        wanted: What it took out of the file's answer.
    """

    line: int
    response: str
    got: str | None
    wanted: str
    correct: bool


@dataclass(frozen=True)
class Score:
    """The share of exact matches of one format, with its 95 % Wilson interval.

    Attributes:
        partial: Not all tasks were answered.
    """

    kv: str
    tasks: int
    correct: int
    accuracy: float
    low: float
    high: float
    partial: bool = False


def read_tasks(text: str, where: str, prompt_key: str | None = None, answer_key: str | None = None) -> list[Task]:
    """The tasks of a JSONL text; empty lines are passed over.

    Args:
        where: What errors call the text.
        prompt_key: None for the first of ``prompt``, ``question``, ``input`` that a line has.
        answer_key: None for the first of ``answer``, ``target``, ``output`` that a line has.

    Raises:
        UsageError: A line that is no such object, or no tasks; it names ``where`` and the line.
    """
    tasks = []
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UsageError(
                f"{place}: this is no JSON ({str(error) or 'too deep'}); give one object a line."
            ) from None
        if not isinstance(entry, dict):
            raise UsageError(f"{place}: this is no JSON object; give one with a prompt and an answer a line.")
        prompt = _field(entry, place, prompt_key, _PROMPT_KEYS, "--prompt-key")
        answer = _field(entry, place, answer_key, _ANSWER_KEYS, "--answer-key")
        tasks.append(Task(number, prompt, answer))
    if not tasks:
        raise UsageError(f"{where} has no tasks; give a file with one JSON object a line.")
    return tasks


def _field(entry: dict[str, Any], place: str, key: str | None, usual: Sequence[str], option: str) -> str:
    """The text or number of a field, whose name is ``key`` or one of the usual ones."""
    names = usual if key is None else (key,)
    name = next((name for name in names if name in entry), None)
    if name is None:
        raise UsageError(f"{place}: there is no field {' or '.join(map(repr, names))}; name it with {option}.")
    value = entry[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"{place}: the field {name!r} is neither a text nor a number.")
    if not str(value).strip():
        raise UsageError(f"{place}: the field {name!r} is empty.")
    return str(value)


def extractor(rule: str, pattern: str | None = None, *, ignore_case: bool = False) -> Callable[[str], str | None]:
    """The function that takes the answer out of a text (None: there is none), in the form that is compared.

    Numbers lose thousands separators and trailing zeros, texts surrounding and repeated white space.

    Args:
        pattern: For the rule ``regex``: its last match counts, its first group if it has one.

    Raises:
        UsageError: A rule that there is not, or a pattern that is missing, out of place or wrong.
    """
    if rule not in RULES:
        raise UsageError(f"There is no rule {rule!r}; give one of {', '.join(RULES)}.")
    if (rule == "regex") != (pattern is not None):
        raise UsageError("--extract regex and --pattern go together: give both or neither.")
    try:
        expression = re.compile(pattern or "")
    except re.error as error:
        raise UsageError(f"--pattern {pattern!r} is no regular expression: {error}.") from None

    def extract(text: str) -> str | None:
        raw = _raw(rule, expression, text)
        if raw is None or "number" in rule:
            return raw if raw is None else _plain_number(raw)
        tidy = " ".join(raw.split())
        return tidy.casefold() if ignore_case else tidy

    return extract


def _raw(rule: str, expression: re.Pattern[str], text: str) -> str | None:
    """What the rule picks, as it stands in the text."""
    if rule == "whole":
        return text
    if rule == "regex":
        groups = [match[1] if expression.groups else match[0] for match in expression.finditer(text)]
        found = [group for group in groups if group is not None]
    elif "number" in rule:
        found = _NUMBER.findall(text)
    else:
        found = [line for line in text.splitlines() if line.strip()]
    if not found:
        return None
    return found[0] if rule.startswith("first") else found[-1]


def _plain_number(text: str) -> str:
    """A number without sign of plus, separators, leading and trailing zeros: ``+1,200.50`` is ``1200.5``."""
    try:
        value = Decimal(text.replace(",", ""))
    except InvalidOperation:  # more digits than decimals have
        return text
    return format(value.normalize() if value else Decimal(0), "f")


def prompt_ids(tokenizer: Tokenizer, prompt: str, *, as_chat: bool, system: str | None = None) -> list[int]:
    """A prompt through the chat template, or as plain text after the model's first token.

    Raises:
        UsageError: There is no template.
    """
    if not as_chat:
        return tokenizer.prompt(prompt)
    if not tokenizer.has_chat_template:
        raise UsageError("This model has no chat template: use --raw.")
    head = [{"role": "system", "content": system}] if system else []
    return tokenizer.chat([*head, {"role": "user", "content": prompt}])


def wanted_answers(tasks: Sequence[Task], extract: Callable[[str], str | None]) -> list[str]:
    """What the rule takes out of the file's answers.

    Raises:
        UsageError: That is nothing; it names the line.
    """
    wanted = []
    for task in tasks:
        answer = extract(task.answer)
        if answer is None:
            raise UsageError(
                f"line {task.line}: the rule takes nothing out of the answer {quoted(task.answer)}; give another "
                "--extract."
            )
        wanted.append(answer)
    return wanted


def prompts(
    tokenizer: Tokenizer, tasks: Sequence[Task], *, as_chat: bool, system: str | None = None
) -> list[list[int]]:
    """The token ids of the tasks' prompts (see :func:`prompt_ids`).

    Raises:
        OctoError: A prompt that cannot be used; it names the line.
    """
    found = []
    for task in tasks:
        with _line(task):
            found.append(prompt_ids(tokenizer, task.prompt, as_chat=as_chat, system=system))
    return found


def check_lengths(plan: MemoryPlan, tasks: Sequence[Task], prompts: Sequence[list[int]]) -> None:
    """Check that the context holds the prompts.

    Raises:
        UsageError: It does not hold one; it names the line.
    """
    for task, ids in zip(tasks, prompts, strict=True):
        with _line(task):
            plan.check_length(len(ids))


@contextmanager
def _line(task: Task) -> Iterator[None]:
    """Inside the block an error is told with the task's line."""
    try:
        yield
    except OctoError as error:
        kind = UsageError if isinstance(error, UsageError) else OctoError
        raise kind(f"line {task.line}: {error}") from None


def run(
    engine: Engine,
    tasks: Sequence[Task],
    prompts: Sequence[list[int]],
    wanted: Sequence[str],
    extract: Callable[[str], str | None],
    *,
    max_tokens: int = 256,
    stop: tuple[str, ...] = (),
) -> Iterator[Outcome]:
    """Answer the tasks greedily, one after the other, and compare with what is wanted.

    Args:
        prompts: The ids of the tasks' prompts (:func:`prompts`).
        wanted: See :func:`wanted_answers`.
    """
    params = SamplingParams(max_tokens=max_tokens, stop=stop)

    def outcome(task: Task, want: str, ids: list[int]) -> Outcome:
        response = "".join(Reply(engine.generate(ids, params)))
        got = extract(response)
        return Outcome(task.line, response, got, want, got == want)

    return map(outcome, tasks, wanted, prompts)


def score(kv: str, outcomes: Sequence[Outcome], tasks: int) -> Score:
    """The share of matches.

    Args:
        tasks: How many there are in all.

    Raises:
        OctoError: There are no outcomes.
    """
    if not outcomes:
        raise OctoError("There is nothing to score.")
    correct = sum(outcome.correct for outcome in outcomes)
    low, high = wilson(correct, len(outcomes))
    return Score(kv, len(outcomes), correct, correct / len(outcomes), low, high, len(outcomes) < tasks)
