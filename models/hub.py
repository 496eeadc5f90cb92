"""Model names, the local model cache, and pulling models from the Hub.

A name is a folder (``./my-model``), ``octo-demo`` (the embedded model), or ``org/name[@revision]`` in the cache.
"""

from pathlib import Path

from octo_run.errors import UsageError

DEMO_NAME = "octo-demo"
DEMO_PATH = Path(__file__).parent / "octo_demo"


def resolve(name: str) -> Path:
    """The folder of a model."""
    if name == DEMO_NAME:
        return DEMO_PATH
    if Path(name).is_dir():
        return Path(name)
    raise UsageError(f"{name!r} is no model folder and not {DEMO_NAME}.")
