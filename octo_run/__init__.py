"""octo-run: LLM inference with a coded KV cache.

The public names are loaded on first use, so that importing the package (and ``octo-run --help``) does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from octo_run.errors import OctoError, UsageError

if TYPE_CHECKING:
    from octo_run.engine import (
        Completion,
        Engine,
        Generation,
        MemoryPlan,
        Reply,
        SamplingParams,
        Session,
        Token,
    )

__version__ = "0.1.0"
__all__ = [
    "Completion",
    "Engine",
    "Generation",
    "MemoryPlan",
    "OctoError",
    "Reply",
    "SamplingParams",
    "Session",
    "Token",
    "UsageError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("octo_run.engine"), name)
    raise AttributeError(f"module 'octo_run' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
