"""octo-run: LLM inference with an octahedral-coded KV cache.

The public names are loaded on first use, so that importing the package (and ``octo-run --help``) does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from octo_run.errors import OctoError, UsageError

if TYPE_CHECKING:
    from octo_run.engine import Engine as Engine
    from octo_run.engine import SamplingParams as SamplingParams
    from octo_run.engine import Session as Session

__version__ = "0.1.0"
_LAZY = {"Engine": "octo_run.engine", "SamplingParams": "octo_run.engine", "Session": "octo_run.engine"}
__all__ = ["Engine", "OctoError", "SamplingParams", "Session", "UsageError", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'octo_run' has no attribute {name!r}")
