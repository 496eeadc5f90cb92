"""Where the program keeps what it makes. Nothing here imports torch."""

import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from octo_run.errors import OctoError, shown

T = TypeVar("T")
#: Seconds that making something may take without a word where it cannot be kept.
NOTICEABLE = 2.0


def own_folder() -> Path:
    """The folder of all that the program keeps and no other tool shares: ``$OCTO_RUN_CACHE``, else ``octo-run`` in the
    user's cache folder (``$XDG_CACHE_HOME`` counts).

    Raises:
        OctoError: The user has no home.
    """
    try:
        if value := os.environ.get("OCTO_RUN_CACHE"):
            return Path(value).expanduser()
        base = os.environ.get("XDG_CACHE_HOME")
        return (Path(base) if base else Path.home() / ".cache") / "octo-run"
    except RuntimeError as error:
        raise no_folder(error) from None


def state_folder() -> Path:
    """The folder for what the program remembers between runs (``$XDG_STATE_HOME/octo-run``).

    A relative path in that variable is ignored, as its specification asks.

    Raises:
        OctoError: There is no home.
    """
    base = Path(os.environ.get("XDG_STATE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path.home() / ".local" / "state") / "octo-run"
    except RuntimeError:
        raise OctoError("there is no home folder; set HOME or XDG_STATE_HOME.") from None


def no_folder(error: RuntimeError) -> OctoError:
    """What is raised where a path begins with a home that there is not."""
    return OctoError(f"There is no folder for models ({error}): name one in OCTO_RUN_CACHE.")


def made_and_kept(
    make: Callable[[], T],
    keep: Callable[[T], OSError | None],
    on_unkept: Callable[[str], object] | None,
    *,
    folder: Path,
    again: str,
    model: Path,
) -> T:
    """What ``make`` makes, kept for the next load by ``keep``; where that cannot be, it is told if making took long.

    Args:
        keep: Returns what keeps it from being written.
        on_unkept: Called with the sentence.
        folder: Where it is to be kept, in :func:`own_folder`.
        again: What every load does where it is not kept, in words.
        model: The model's folder: in a cache that is another one, its name would no longer be known.
    """
    begun = time.monotonic()
    made = make()
    took = time.monotonic() - begun
    error = keep(made)
    if error is not None and on_unkept is not None and took > NOTICEABLE:
        inside = model.resolve().is_relative_to(own_folder().resolve())
        by_path = f" and give the model as {shlex.quote(str(model.resolve()))}" if inside else ""
        on_unkept(
            f"{shown(str(folder), 200)} cannot be written ({shown(error.strerror or str(error), 100)}), so each load "
            f"{again}: make it writable, or name another folder in OCTO_RUN_CACHE{by_path}"
        )
    return made
