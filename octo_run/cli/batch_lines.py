"""The lines of a batch: what each may hold, all of it checked before a model is loaded."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octo_run.cli import console
from octo_run.cli.hints import nearest_setting
from octo_run.errors import OctoError, UsageError, quoted

#: What a line may set of its own, by the names of ``SamplingParams``.
SETTINGS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "penalty_range", "typical_p", "top_n_sigma", "xtc_probability", "xtc_threshold", "dry_multiplier", "dry_base",
    "dry_allowed_length", "dry_range", "seed", "max_tokens", "stop",
)  # fmt: skip
_KEYS = ("id", "prompt", "messages", *SETTINGS)
_EXAMPLE = '{"prompt": "text"}'


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
    messages: list[dict[str, Any]] | None
    settings: dict[str, Any]


def read_lines(path: Path) -> list[Line]:
    """The lines of a batch.

    Raises:
        UsageError: One of them is none, or there is none; the message names it.
    """
    found = list[Line]()
    for number, text in enumerate(console.read_text(path).removeprefix("\ufeff").split("\n"), start=1):
        if text.strip():
            try:
                found.append(_line(number, _object(text)))
            except OctoError as error:
                raise UsageError(f"line {number} of {path}: {error}") from None
    if not found:
        raise UsageError(f"{path} has no prompts; give a file with one {_EXAMPLE} in each line.")
    return found


def _object(text: str) -> dict[str, Any]:
    """The JSON object that a line is."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"{quoted(twice)} is there twice; give each name once.")
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UsageError(f"this is no JSON ({error.msg}, column {error.colno}); give one {_EXAMPLE} a line.") from None
    except (ValueError, RecursionError):
        raise UsageError(f"this is no JSON that can be read; give one {_EXAMPLE} a line.") from None
    if not isinstance(value, dict):
        raise UsageError(f"this is {quoted(value)}; give an object like {_EXAMPLE}.")
    return value


def _line(number: int, value: dict[str, Any]) -> Line:
    unknown = next((name for name in value if name not in _KEYS), None)
    if unknown is not None:
        near = nearest_setting(unknown, _KEYS)
        hint = f"did you mean {quoted(near)}?" if near else f"there are {', '.join(_KEYS)}."
        raise UsageError(f"no line has {quoted(unknown)}; {hint}")
    text, messages = value.get("prompt"), value.get("messages")
    if (text is None) == (messages is None):
        raise UsageError('give "prompt" or "messages", one of them.')
    if text is not None and (not isinstance(text, str) or not text):
        raise UsageError(f"prompt is {quoted(text)}; give a text that is not empty.")
    if messages is not None:
        _check_messages(messages)
    given = text if text is not None else json.dumps(messages, ensure_ascii=False)
    if any("\ud800" <= letter <= "\udfff" for letter in given):
        raise UsageError("the text holds half of a surrogate pair, which is no letter; take it out.")
    settings = {name: value[name] for name in SETTINGS if value.get(name) is not None}
    _check_settings(settings)
    return Line(number, value.get("id"), text, messages, settings)


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise UsageError(f'messages is {quoted(messages)}; give a list like [{{"role": "user", "content": "text"}}].')
    for number, message in enumerate(messages, start=1):
        where = f"message {number}"
        if not isinstance(message, dict):
            raise UsageError(
                f'{where} is {quoted(message)}; give an object like {{"role": "user", "content": "text"}}.'
            )
        if not isinstance(message.get("role"), str):
            raise UsageError(f"the role of {where} is {quoted(message.get('role'))}; give user, assistant or system.")
        content = message.get("content")
        parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
        if not isinstance(content, str) and not parts and not message.get("tool_calls"):
            raise UsageError(f"the content of {where} is {quoted(content)}; give a text.")


def _check_settings(settings: dict[str, Any]) -> None:
    """Check values as ``SamplingParams`` does; one text that ends an answer becomes a list."""
    if isinstance(settings.get("stop"), str):
        settings["stop"] = [settings["stop"]]
    stop = settings.get("stop", ["x"])
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise UsageError(f"stop is {quoted(stop)}; give a text or a list of texts, none of them empty.")
    if settings:
        from octo_run.cli.runtime import import_torch

        import_torch()
        from octo_run.engine import SamplingParams

        SamplingParams(**settings)
