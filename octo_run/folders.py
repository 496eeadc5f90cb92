"""Where the program keeps what it makes. Nothing here imports torch."""

import os
from pathlib import Path

from octo_run.errors import OctoError


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
