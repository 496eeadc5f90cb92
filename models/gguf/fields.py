"""Typed access to the metadata of a GGUF file."""

from pathlib import Path
from typing import Any

import numpy as np

from octo_run.errors import OctoError, quoted
from octo_run.models.foreign import AGAIN


class Fields:
    """Typed access to metadata; every complaint names the file and the entry."""

    def __init__(self, path: Path, values: dict[str, Any], prefix: str = "") -> None:
        self.path, self.values, self.prefix = path, values, prefix

    def fail(self, key: str, problem: str) -> OctoError:
        return OctoError(f"{self.path}: the metadata {self.prefix}{key} {problem}.")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of the type ``kind`` (float: a whole number, too). A list with one value throughout counts as it."""
        value = self.values.get(self.prefix + key)
        if isinstance(value, list) and kind is not list and value and all(item == value[0] for item in value):
            value = value[0]
        if value is None:
            return default
        good = isinstance(value, (int, float) if kind is float else kind)
        if not good or (isinstance(value, bool) and kind is not bool):
            raise self.fail(key, f"is {quoted(value)}, which octo-run does not understand")
        return value

    def need(self, key: str, kind: type) -> Any:
        value = self.get(key, kind)
        if value is None:
            raise self.fail(key, f"is missing: {AGAIN}, or make the file again")
        return value


def short(value: float) -> float:
    """A number that a GGUF file holds in float32 as the shortest decimal that means it: 1e-05."""
    return float(str(np.float32(value)))
