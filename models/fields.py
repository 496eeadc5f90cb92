"""Typed access to the fields of a JSON object of a model folder. Nothing here imports torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octo_run.errors import OctoError, quoted

MAX_INT = 2**31 - 1


class Fields:
    """Typed access to a JSON object; every complaint names the file and the field."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.path, self.values, self.prefix = path, values, prefix

    def fail(self, field: str, problem: str) -> OctoError:
        return OctoError(f"{self.path}: {self.prefix}{field} {problem}.")

    def raw(self, field: str) -> Any:
        return self.values.get(field)

    def integer(self, field: str, default: int | None = None, *, low: int = 1, high: int = MAX_INT) -> int:
        value = self.raw(field)
        if value is None:
            if default is None:
                raise self.fail(field, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(field, f"is {quoted(value)}, not a whole number from {low} to {high}")
        return value

    def number(self, field: str, default: float | None = None, *, low: float, high: float, zero: bool = False) -> float:
        """A number with ``low <= value <= high``, or 0 if ``zero``."""
        value = self.raw(field)
        if value is None:
            if default is None:
                raise self.fail(field, "is missing")
            return default
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not (low <= value <= high or (zero and value == 0)):
            span = f"0 or a number from {low:g} to {high:g}" if zero else f"a number from {low:g} to {high:g}"
            raise self.fail(field, f"is {quoted(value)}, not {span}")
        return float(value)

    def boolean(self, field: str, default: bool = False) -> bool:
        value = self.raw(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(field, f"is {quoted(value)}, not true or false")
        return value

    def text(self, field: str) -> str | None:
        value = self.raw(field)
        if value is not None and not isinstance(value, str):
            raise self.fail(field, f"is {quoted(value)}, not a text")
        return value

    def sub(self, field: str) -> "Fields | None":
        value = self.raw(field)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(field, f"is {quoted(value)}, not an object")
        return Fields(self.path, value, f"{self.prefix}{field}.")

    def token_ids(self, field: str, vocab_size: int | None = None) -> tuple[int, ...]:
        """A token id, a list of them, or nothing, without repetitions. -1 means none."""
        value = self.raw(field)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        high = MAX_INT if vocab_size is None else vocab_size
        ids = [item for item in ids if item != -1]
        for item in ids:
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < high:
                raise self.fail(field, f"holds {quoted(item)}, which is no token id below {high}")
        return tuple(dict.fromkeys(ids))
