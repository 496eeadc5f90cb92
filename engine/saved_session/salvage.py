"""The text of a session file that is damaged: what of the conversation can still be read, up to the damage."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octo_run.engine.saved_session.layout import FORMAT, tail_of
from octo_run.engine.saved_session.reading import is_message
from octo_run.errors import OctoError
from octo_run.models.foreign import MAX_HEADER_BYTES, open_regular, parsing

_STRING = re.compile(r'(?:[^"\\]|\\(?:[^u]|u[0-9a-fA-F]{4}))*')
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class SavedText:
    """A conversation without its settings and its cache.

    Attributes:
        turns: Its messages up to the first one that cannot be read, at least one.
        whole: Whether these are all that were saved.
    """

    system: str | None
    turns: tuple[dict[str, str], ...]
    whole: bool

    @classmethod
    def read(cls, path: Path) -> SavedText | None:
        """The text of a session file, or of its tail if it has one; None where nothing can be read."""
        header, later, lost = _header(path), _header(tail_of(path)), False
        if tail_of(path).exists():
            base = None if later is None else _value(later, "base")
            continues = isinstance(base, dict) and (header is None or base.get("id") == _value(header, "id"))
            lost = later is None
            header = later if continues else header
        if header is None:
            return None
        system, (turns, whole) = _value(header, "system"), _turns(header)
        return cls(system if isinstance(system, str) else None, turns, whole and not lost) if turns else None


def _header(path: Path) -> str | None:
    """The JSON text that says what the conversation is, as much of it as is there, whatever is around it."""
    try:
        with open_regular(path) as data, parsing(path, "safetensors"):
            length = int.from_bytes(data.read(8), "little")
            text = data.read(min(length, MAX_HEADER_BYTES)).decode("utf-8", "replace")
            begin = re.search(r'"session"\s*:\s*"', text)
            if begin is None or FORMAT not in text:
                return None
            found = _STRING.match(text, begin.end())
            assert found is not None
            return str(json.loads(f'"{found.group()}"', strict=False))
    except OctoError:
        return None


def _value(header: str, name: str) -> Any:
    """A value of the header; None where it is not there or damaged."""
    begin = re.search(f'"{name}"' + r"\s*:\s*", header)
    try:
        return None if begin is None else _DECODER.raw_decode(header, begin.end())[0]
    except (ValueError, RecursionError):
        return None


def _turns(header: str) -> tuple[tuple[dict[str, str], ...], bool]:
    """The messages up to the first one that is damaged, and whether these are all."""
    begin = re.search(r'"turns"\s*:\s*\[\s*', header)
    found, at = list[dict[str, str]](), len(header) if begin is None else begin.end()
    while at < len(header) and header[at] != "]":
        try:
            turn, at = _DECODER.raw_decode(header, at)
            if not is_message(turn):
                return (*found,), False
            "".join(turn.values()).encode()  # no half of a surrogate pair
        except (ValueError, RecursionError):
            return (*found,), False
        found.append(turn)
        behind = re.compile(r"\s*,?\s*").match(header, at)
        at = at if behind is None else behind.end()
    return (*found,), at < len(header)
