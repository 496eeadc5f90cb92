"""Writing a model folder: everything into a folder of another name, which takes its final name when it is complete."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from octo_run.errors import OctoError, UsageError
from octo_run.models.files import INDEX_NAME

#: Tensors of one shard take at most so many bytes (a larger tensor has a shard of its own).
SHARD_BYTES = 13 << 20


def check_target(target: Path) -> None:
    """Check that ``target`` is free: not there, or an empty folder, below a folder that exists.

    Raises:
        UsageError: It is not.
    """
    if target.is_dir():
        if any(target.iterdir()):
            raise UsageError(f"The output folder {target} is not empty: name a new one or empty it.")
    elif target.exists():
        raise UsageError(f"{target} is a file where the output folder would be: name another one.")
    elif not target.absolute().parent.is_dir():
        raise UsageError(f"There is no folder {target.absolute().parent} to put {target.name} into: make it first.")


@contextmanager
def new_model_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, beside ``target``, whose name it gets at the end; after an exception it is gone.

    Raises:
        UsageError: As :func:`check_target`.
        OctoError: The system refuses (a full disk).
    """
    check_target(target)
    target = target.absolute()
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise OctoError(f"Nothing can be written into {target.parent}: {error.strerror or error}.") from None
    try:
        yield folder
        mask = os.umask(0)
        os.umask(mask)
        folder.chmod(0o777 & ~mask)
        for path in folder.iterdir():  # temporary folders and safetensors files are for their owner alone
            path.chmod(0o666 & ~mask)
        folder.replace(target)  # an empty folder of that name gives way
    except OSError as error:
        raise OctoError(f"The model could not be written to {target}: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_json(path: Path, values: Mapping[str, Any], indent: int = 2) -> None:
    """Write a JSON object, with a newline at its end."""
    path.write_text(json.dumps(values, indent=indent) + "\n", encoding="utf-8")


def write_weights(folder: Path, weights: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as ``model-0000x-of-0000n.safetensors`` in their order, and the index of the shards."""
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in weights.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor.contiguous()
        room -= tensor.nbytes
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in weights.values())
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": places}, indent=1)
