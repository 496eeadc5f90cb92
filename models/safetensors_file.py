"""Reading safetensors files: the header checked against the file before a single byte of data is used.

The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian header length, that many bytes
of JSON (name -> dtype, shape, data_offsets), then the data. The file is memory-mapped; a tensor's pages are handed
back as soon as it has been copied, so that loading never holds the model twice.
"""

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octo_run.errors import OctoError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1} | {
    f"{sign}{8 * size}": size for size in (1, 2, 4, 8) for sign in "IU"
}
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: ``start`` and ``end`` are byte positions in the file, inside its bounds."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def _broken(path: Path, problem: str) -> OctoError:
    return OctoError(f"{path} is no complete safetensors file ({problem}): fetch the model again.")


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name. OctoError, naming the file, unless every entry lies inside the file,
    has as many bytes as its shape and dtype need, and the entries cover the data without gap or overlap."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8:
                raise _broken(path, f"it has {size} bytes")
            if length > MAX_HEADER_BYTES or 8 + length > size:
                raise _broken(path, f"its header claims {length:,} bytes and the file has {size:,}")
            text = file.read(length)
    except FileNotFoundError:
        raise OctoError(f"{path} is missing: fetch the model again.") from None
    except OSError as error:
        raise OctoError(f"{path} cannot be read: {error.strerror or error}.") from None
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_names)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not valid JSON, {error}") from None
    if not isinstance(header, dict):
        raise _broken(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length, size) for name, value in header.items()}
    _check_cover(path, entries, 8 + length, size)
    return entries


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _entry(path: Path, name: str, value: Any, data_start: int, size: int) -> TensorEntry:
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise _broken(path, f"the entry of {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise OctoError(f"{path}: the tensor {name!r} has the dtype {dtype!r}, which octo-run does not know.")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise _broken(path, f"the shape of {name!r} is {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _broken(path, f"the data_offsets of {name!r} are {offsets!r}")
    start, end = data_start + offsets[0], data_start + offsets[1]
    if not start <= end <= size:
        raise _broken(path, f"{name!r} ends at byte {end:,} and the file at {size:,}")
    if end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise _broken(path, f"{name!r} has {end - start:,} bytes, not those of {dtype} {shape}")
    return TensorEntry(path, dtype, tuple(shape), start, end)


def _check_cover(path: Path, entries: dict[str, TensorEntry], data_start: int, size: int) -> None:
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise _broken(path, f"{name!r} starts at byte {entry.start:,} where {position:,} is due")
        position = entry.end
    if position != size:
        raise _broken(path, f"its tensors end at byte {position:,} and the file at {size:,}")


class MappedFile:
    """A memory-mapped safetensors file whose tensors are copied out one by one."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                # A private writable mapping: torch warns about read-only buffers, and nothing is ever written.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise OctoError(f"{path} cannot be mapped into memory: {error}.") from None

    def read(self, entry: TensorEntry, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A copy of the tensor on ``device`` in ``dtype``; the pages it came from are given back."""
        if entry.end > len(self._map):
            raise _broken(entry.path, f"it shrank to {len(self._map):,} bytes while it was read")
        if entry.start == entry.end:
            return torch.empty(entry.shape, device=device, dtype=dtype)
        source = FLOAT_DTYPES[entry.dtype]
        count = math.prod(entry.shape)
        view = torch.frombuffer(self._map, dtype=source, count=count, offset=entry.start).view(entry.shape)
        result = view.to(device=device, dtype=dtype, copy=True)
        del view
        first = entry.start // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, entry.end - first)
        return result
