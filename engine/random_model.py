"""A model's shape without its weights: what measuring a shape needs in place of a folder."""

from pathlib import Path
from typing import Any, NoReturn

from octo_run.engine.shapes import SHAPES
from octo_run.errors import OctoError, UsageError, nearest, quoted
from octo_run.models.config import CONFIG_NAME, ModelConfig, load_config, parse_config
from octo_run.models.foreign import json_object, present, read_bytes


class NoTokenizer:
    """Stands where a tokenizer would: there is no text to a shape. Its token ids are all ordinary ones."""

    eos_ids: frozenset[int] = frozenset()
    special_ids: frozenset[int] = frozenset()
    has_chat_template = False

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse what a tokenizer would do.

        Raises:
            OctoError: Always.
        """
        raise OctoError("A model with random weights has no tokenizer: give it token ids, or load a real model.")

    decode = stream = chat = prompt = encode


def read_shape(shape: ModelConfig | str | Path) -> ModelConfig:
    """Find the configuration that ``shape`` means.

    Args:
        shape: The configuration itself, a name in `SHAPES`, or the path of a ``config.json`` or of the folder it lies
            in.

    Raises:
        UsageError: A path that is not there.
        OctoError: A file that is no configuration.
    """
    if isinstance(shape, ModelConfig):
        return shape
    path = Path(shape)
    if str(shape) in SHAPES:
        return parse_config(SHAPES[str(shape)], path)
    if present(path / CONFIG_NAME) or (present(path) and path.is_dir()):
        return load_config(path)
    if not present(path):
        near = nearest(str(shape), SHAPES)
        hint = f"did you mean {near}?" if near else f"the shapes are {', '.join(SHAPES)}."
        raise UsageError(
            f"--random-weights {quoted(str(shape))} is no config.json, no folder with one and no shape; {hint}"
        )
    return parse_config(json_object(read_bytes(path), path, "give a config.json"), path)
