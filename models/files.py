"""The files of a model folder, by their Hugging Face names. Nothing here imports torch."""

import re
from collections.abc import Iterable
from pathlib import Path

from octo_run.errors import OctoError, quoted, shown
from octo_run.models.config import CONFIG_NAME, GENERATION_CONFIG_NAME
from octo_run.models.foreign import (
    MAX_HEADER_BYTES,
    MAX_WEIGHT_FILES,
    json_object,
    open_regular,
    parsing,
    present,
    read_json_object,
)
from octo_run.models.quantisation.config import OLDER_NAMES

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("tekken.json",), ("vocab.json", "merges.txt"))
"""What a tokenizer is read from: all files of the first of these that are there."""
TOKENIZER_NAMES = "tokenizer.json or tokenizer.model or tekken.json or vocab.json with merges.txt"
SMALL_NAMES = (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    *OLDER_NAMES,
    *(name for files in TOKENIZERS for name in files),
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    INDEX_NAME,
)
"""Everything but the weights that a model folder may need. Other files are never fetched."""
_PICKLES, _PICKLED = (".bin", ".pt", ".pth"), "pickled weights such as {} are never opened"


def weight_files(model_dir: Path) -> tuple[Path, ...]:
    """The safetensors files of a model folder.

    Returns:
        The single file, or the shards its index names (which may be missing).

    Raises:
        OctoError: There is neither, or the index is not one.
    """
    model_dir = Path(model_dir)
    if present(model_dir / SINGLE_NAME):
        return (model_dir / SINGLE_NAME,)
    if present(model_dir / INDEX_NAME):
        return tuple(model_dir / name for name in sorted(set(read_index(model_dir / INDEX_NAME).values())))
    other = others_told(path.name for path in model_dir.glob("*.*"))
    raise OctoError(f"{model_dir} has neither {SINGLE_NAME} nor {INDEX_NAME}{other}, so there are no weights to load.")


def others_told(names: Iterable[str]) -> str:
    """What is told of files with weights that octo-run does not read, where there are no others; maybe nothing."""
    names = sorted(names)
    for kinds, what in ((".safetensors", "weights such as {} are not read"), (_PICKLES, _PICKLED)):
        if found := next((name for name in names if name.endswith(kinds)), None):
            return f" ({what.format(shown(found, 60))})"
    return ""


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name from ``model.safetensors.index.json``.

    Raises:
        OctoError: There is no such map, it names more than ``MAX_WEIGHT_FILES`` files, or one whose name is not plain
            (no folders).
    """
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise OctoError(f"{path}: weight_map is missing or no object with entries.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file, re.ASCII):
            raise OctoError(
                f"{path}: weight_map gives {quoted(name)} the file {quoted(file)}, not a plain .safetensors name."
            )
    if len(set(weight_map.values())) > MAX_WEIGHT_FILES:
        raise OctoError(f"{path}: weight_map names more than {MAX_WEIGHT_FILES:,} files.")
    return weight_map


def stored_dtypes(model_dir: Path) -> set[str]:
    """The dtypes of the tensors of a model folder, as the headers of its weight files name them.

    Raises:
        OctoError: There is no such file, or it is none.
    """
    found = set[str]()
    for path in weight_files(model_dir):
        with open_regular(path) as data, parsing(path, "safetensors"):
            length = int.from_bytes(data.read(8), "little")
            text = data.read(min(length, MAX_HEADER_BYTES))
        header = json_object(text, f"The header of {path}", strict=True)
        found |= {str(one.get("dtype")) for one in header.values() if isinstance(one, dict) and "shape" in one}
    return found


def has_tokenizer(names: Iterable[str]) -> bool:
    """Whether files of these names hold a tokenizer."""
    names = set(names)
    return any(names.issuperset(files) for files in TOKENIZERS)


def missing_files(model_dir: Path) -> list[str]:
    """Names of files without which the folder cannot be loaded: its config, a tokenizer, its weight files."""
    model_dir = Path(model_dir)
    missing = [] if present(model_dir / CONFIG_NAME) else [CONFIG_NAME]
    if not has_tokenizer(name for name in SMALL_NAMES if present(model_dir / name)):
        missing.append(TOKENIZER_NAMES)
    try:
        files = weight_files(model_dir)
    except OctoError:
        return [*missing, f"{SINGLE_NAME} or {INDEX_NAME}"]
    return missing + [path.name for path in files if not present(path)]
