"""Packed weights of a CPU in a file: the first load of a model packs them and keeps them, the next ones map them.

The file is one of safetensors in the cache folder, private to the machine and to this version: its name is made of all
that decides its content, so a file that is there is right or damaged, and is never changed. A decoder is made of shapes
alone and gets the tensors of the file in the order in which they are met in it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from octo_run import folders
from octo_run.errors import OctoError
from octo_run.kernels.cpu import path_name
from octo_run.models.cache import name_of, packed_folder
from octo_run.models.config import ModelConfig
from octo_run.models.files import weight_files
from octo_run.models.safetensors_file import read_headers
from octo_run.models.safetensors_writer import TYPES, Item, Shard
from octo_run.models.weights import Weights
from octo_run.unfinished import unfinished

#: Counts changes of how weights are packed, or of what a decoder holds.
_VERSION = 2
#: Files that are kept: of the models that were loaded last.
MOST = 4
_ALIGNMENT = 64  # bytes: what PyTorch gives to tensors of its own
T = TypeVar("T")


class KeptWeights:
    """The file of one model, packed in one way."""

    def __init__(self, path: Path, about: tuple[object, ...], on_unkept: Callable[[str], object] | None = None) -> None:
        """Nothing is read yet.

        Args:
            path: The model's folder.
            about: What decides how its weights are packed, beside the files; ``repr`` must tell all of it.
            on_unkept: Called with a sentence if packing took long and its result cannot be kept.
        """
        self._model, self._path, self._on_unkept = str(path.resolve()), path, on_unkept
        files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in weight_files(path)]
        known = hashlib.sha256(repr((_VERSION, torch.__version__, path_name(), files, about)).encode())
        self._file = packed_folder() / f"{name_of(path)}-{known.hexdigest()[:20]}.safetensors"

    def decoder(self, make: Callable[[Weights], T], shapes: Weights, stored: Weights) -> T:
        """What ``make`` makes of weights: with the tensors of the file, or of ``stored``, and then they are kept.

        Args:
            shapes: Those of ``stored`` on ``meta``.
        """
        found = self.load(lambda: make(shapes))
        if found is None:
            found = folders.made_and_kept(
                lambda: make(stored), self.keep, self._on_unkept, folder=self._file.parent,
                again="packs the weights again", model=self._path,
            )  # fmt: skip
        return found

    def load(self, shapes: Callable[[], T]) -> T | None:
        """What ``shapes`` makes on ``meta``, with the tensors of the file; None if there is none that fits.

        The tensors are mapped: a page is read when it is first used, and nothing is written back.
        """
        try:
            entries, about = read_headers(self._file)
            size = self._file.stat().st_size
            mapped = torch.from_file(str(self._file), shared=False, size=size, dtype=torch.uint8)
        except (OctoError, OSError, RuntimeError):
            return None
        made = shapes()
        found = [*_places(made)]
        numbers, scalars = _numbered(found), about.get("numbers", "").split()
        if sum(not name.startswith("pad") for name in entries) != len(numbers):
            return None
        if len(scalars) != sum(isinstance(old, float) for _, _, old in found):
            return None
        for container, key, old in found:
            if isinstance(old, torch.device):
                container[key] = torch.device("cpu")
            elif isinstance(old, float):
                container[key] = float(scalars.pop(0))
            else:
                entry = entries.get(str(numbers[id(old)]))
                if entry is None or entry.dtype != TYPES.get(old.dtype) or entry.shape != tuple(old.shape):
                    return None
                container[key] = mapped[entry.start : entry.end].view(old.dtype).view(old.shape)
        with suppress(OSError):
            os.utime(self._file)  # used last
        return made

    def keep(self, made: object) -> OSError | None:
        """Write the tensors of ``made``; what keeps them from being written is returned, and the next load packs again.

        Tensors of a kind that no file holds are passed over without an error.
        """
        found = [*_places(made)]
        tensors = {id(old): old for _, _, old in found if isinstance(old, Tensor)}
        if not all(one.is_contiguous() and one.is_cpu and one.dtype in TYPES for one in tensors.values()):
            return None
        numbers = " ".join(repr(old) for _, _, old in found if isinstance(old, float))
        shard = _shard([*tensors.values()], {"format": "pt", "model": self._model, "numbers": numbers})
        folder = self._file.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with unfinished(self._file) as part:  # what killed programs left goes before the room is looked at
                if shard.size > shutil.disk_usage(folder).free // 2:
                    return OSError(
                        errno.ENOSPC, f"{shard.size / 1e9:,.1f} GB would take more than half of what is free"
                    )
                with part.open("wb") as out:
                    shard.write(out.write)
                part.replace(self._file)
        except OSError as error:
            return error
        forget()
        return None


def forget() -> None:
    """Delete the files of models that are gone, and all but the ``MOST`` that were used last."""
    with suppress(OSError):
        kept = sorted(packed_folder().glob("*.safetensors"), key=lambda file: -file.stat().st_mtime)
        for number, file in enumerate(kept):
            try:
                gone = not Path(read_headers(file)[1].get("model", "")).is_dir()
            except OctoError:
                gone = True
            if gone or number >= MOST:
                file.unlink(missing_ok=True)


def _places(root: object) -> Iterator[tuple[Any, Any, Any]]:
    """Where a decoder has tensors, numbers that may be weights, and devices: container, key, what is there; always in
    the same order, and a tensor of several places is told at each."""
    seen, waiting = set[int](), [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, dict):
            inside: Any = [*thing.items()]
        elif isinstance(thing, (list, tuple)):
            inside = [*enumerate(thing)]
        elif isinstance(thing, ModelConfig):  # what is asked for, not what was read
            continue
        elif type(thing).__module__.startswith("octo_run.") and hasattr(thing, "__dict__"):
            late = {name for name, one in vars(type(thing)).items() if isinstance(one, cached_property)}
            thing = vars(thing)
            inside = [each for each in thing.items() if each[0] not in late]  # which may have been asked for, or not
        else:
            continue
        for key, value in inside:
            if isinstance(value, (Tensor, torch.device)) or (type(value) is float and not isinstance(thing, tuple)):
                yield thing, key, value
            else:
                waiting.append(value)


def _numbered(found: list[tuple[Any, Any, Any]]) -> dict[int, int]:
    """A number for each tensor by its ``id``, in the order of ``found``."""
    ids = dict.fromkeys(id(old) for _, _, old in found if isinstance(old, Tensor))
    return {one: number for number, one in enumerate(ids)}


def _shard(tensors: list[Tensor], about: dict[str, str]) -> Shard:
    """A file in which each tensor begins where a tensor of its own would, as kernels may count on it."""
    items: dict[str, Item] = {}
    for number, tensor in enumerate(tensors):
        items[str(number)] = Item(tensor.dtype, tuple(tensor.shape), partial(lambda one: [one], tensor))
        if rest := -tensor.nbytes % _ALIGNMENT:
            zeros = torch.zeros(rest, dtype=torch.uint8)
            items[f"pad{number}"] = Item(torch.uint8, (rest,), partial(lambda one: [one], zeros))
    about = about | {"fill": ""}
    about["fill"] = " " * (-len(Shard("", items, about).header) % _ALIGNMENT)
    return Shard("", items, about)
