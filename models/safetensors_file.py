"""Reading safetensors files: the header checked against the file before a single byte of data is used.

The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian header length, that many bytes
of JSON (name -> dtype, shape, data_offsets), then the data. What the safetensors library accepts is accepted, and no
more; but for a name that occurs twice and for what the limits in :mod:`octo_run.models.foreign` exclude.

Data is read, not mapped: a mapped file that shrinks would end the process. It is read piece by piece straight into the
tensor, so that loading never holds the model twice, and only as long as the file is the one whose header was read.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from octo_run.errors import OctoError, quoted
from octo_run.models.foreign import (
    AGAIN,
    MAX_DIMENSIONS,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    json_object,
    open_regular,
    parsing,
)

ITEM_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "BF16": 16, "F16": 16, "F32": 32, "F64": 64, "C64": 64}
ITEM_BITS |= dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
ITEM_BITS |= {f"{sign}{bits}": bits for bits in (8, 16, 32, 64) for sign in "IU"}
"""Bits of an item of every dtype of the format; those of ``FLOAT_DTYPES`` can be read as weights."""

FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORED_DTYPES = FLOAT_DTYPES | {
    "I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.uint8,
}  # fmt: skip
"""What can be read as it is stored, too; exponents of E8M0 as uint8."""
PIECE_ITEMS = 2 << 20
"""Items that are read at once when they have to be converted or copied to another device."""


@dataclass(frozen=True)
class StoredFile:
    """A file as it was when its header was read: another inode, size or time of change (ns) makes it another file."""

    path: Path
    device: int
    inode: int
    size: int
    changed: int


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        start: Position of its first byte in the file.
        end: Position behind its last byte, inside the file's bounds as ``start`` is.
        turned: A matrix whose columns lie one after the other.
    """

    file: StoredFile
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    turned: bool = False

    @property
    def path(self) -> Path:
        """The file's path."""
        return self.file.path


def _broken(path: Path, problem: str) -> OctoError:
    return OctoError(f"{path} is no complete safetensors file ({problem}): {AGAIN}.")


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name.

    Raises:
        OctoError: An entry does not lie inside the file or has not as many bytes as its shape and dtype need, or the
            entries do not cover the data without gap or overlap; it names the file.
    """
    with open_regular(path) as data, parsing(path, "safetensors"):
        file = stored_file(path, data)
        length = int.from_bytes(data.read(8), "little")
        if file.size < 8:
            raise _broken(path, f"it has {file.size} bytes")
        if not 2 <= length <= min(MAX_HEADER_BYTES, file.size - 8):
            raise _broken(path, f"its header claims {length:,} bytes and the file has {file.size:,}")
        text = bytearray(length)
        _fill(data, memoryview(text), 8, file)
    header = json_object(bytes(text), f"The header of {path}", strict=True)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise _broken(path, "its __metadata__ is no object of texts")
    if len(header) > MAX_TENSORS:
        raise OctoError(f"{path} has {len(header):,} tensors, and octo-run reads {MAX_TENSORS:,} at most.")
    entries = {name: _entry(file, name, value, 8 + length) for name, value in header.items()}
    _check_cover(file, entries, 8 + length)
    return entries


def stored_file(path: Path, data: BinaryIO) -> StoredFile:
    """The open file as it is now."""
    now = os.fstat(data.fileno())
    return StoredFile(path, now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns)


def _fill(data: BinaryIO, target: memoryview, start: int, file: StoredFile) -> None:
    """Read bytes from position ``start`` on until ``target`` is full."""
    data.seek(start)
    done = 0
    while done < len(target):
        count = data.readinto(target[done:])  # type: ignore[attr-defined]  # unbuffered: a FileIO
        if not count:
            raise _changed(file)
        done += count


def _changed(file: StoredFile) -> OctoError:
    return OctoError(f"{file.path} was changed or replaced while it was read: load it again when it is at rest.")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64


def _entry(file: StoredFile, name: str, value: Any, data_start: int) -> TensorEntry:
    path = file.path
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise _broken(path, f"the entry of {quoted(name)} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise OctoError(
            f"{path}: the tensor {quoted(name)} has the dtype {quoted(dtype)}, which octo-run does not know."
        )
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise _broken(path, f"the shape of {quoted(name)} is {quoted(shape)}")
    if len(shape) > MAX_DIMENSIONS:
        raise OctoError(f"{path}: the tensor {quoted(name)} has {len(shape):,} dimensions, more than {MAX_DIMENSIONS}.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _broken(path, f"the data_offsets of {quoted(name)} are {quoted(offsets)}")
    start, end = data_start + offsets[0], data_start + offsets[1]
    if not start <= end <= file.size:
        raise _broken(path, f"{quoted(name)} ends at byte {end:,} and the file at {file.size:,}")
    items = 1
    for size in shape:  # as the library multiplies: a 0 behind an overflow does not mend it
        items *= size
        if items >= 2**64:
            break
    if (end - start) * 8 != items * ITEM_BITS[dtype]:
        raise _broken(path, f"{quoted(name)} has {end - start:,} bytes, not those of {dtype} {quoted(shape)}")
    return TensorEntry(file, dtype, tuple(shape), start, end)


def _check_cover(file: StoredFile, entries: dict[str, TensorEntry], data_start: int) -> None:
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise _broken(file.path, f"{quoted(name)} starts at byte {entry.start:,} where {position:,} is due")
        position = entry.end
    if position != file.size:
        raise _broken(file.path, f"its tensors end at byte {position:,} and the file at {file.size:,}")


class TensorFile:
    """An open file of weights whose tensors are read one by one; a context manager.

    Raises:
        OctoError: The file is not the one whose header was read, or stops being it.
    """

    def __init__(self, file: StoredFile) -> None:
        self.file = file
        self._data = open_regular(file.path)
        try:
            self._check()
        except OctoError:
            self._data.close()
            raise

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._data.close()

    def _check(self) -> None:
        if stored_file(self.file.path, self._data) != self.file:
            raise _changed(self.file)

    def read(self, entry: TensorEntry, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A tensor of its own on ``device`` in ``dtype``, of an entry whose dtype is one of ``STORED_DTYPES``."""
        if math.prod(max(1, size) for size in entry.shape) >= 2**60:  # next to a 0
            raise OctoError(f"{entry.path}: no tensor can have the shape {quoted(entry.shape)}.")
        if entry.turned:
            return self.read(replace(entry, shape=entry.shape[::-1], turned=False), device, dtype).T.contiguous()
        result = torch.empty(entry.shape, device=device, dtype=dtype)
        flat = result.view(-1)
        if device.type == "cpu" and dtype == STORED_DTYPES[entry.dtype]:
            self._read_into(flat, entry.start)
        else:
            position = 0
            for piece in self.pieces(entry, pinned=device.type == "cuda"):
                flat[position : position + len(piece)].copy_(piece)
                position += len(piece)
        self._check()
        return result

    def pieces(self, entry: TensorEntry, pinned: bool = False) -> Iterator[Tensor]:
        """The tensor's items in order, as stored.

        Args:
            pinned: Put them in page-locked memory, for copies to a GPU.

        Yields:
            ``PIECE_ITEMS`` items at most; a piece is gone with the next.
        """
        source = STORED_DTYPES[entry.dtype]
        count = (entry.end - entry.start) // source.itemsize
        buffer = torch.empty(min(count, PIECE_ITEMS), dtype=source, pin_memory=pinned)
        for first in range(0, count, PIECE_ITEMS):
            piece = buffer[: min(PIECE_ITEMS, count - first)]
            self._read_into(piece, entry.start + first * source.itemsize)
            self._check()
            yield piece

    def read_bytes(self, start: int, count: int) -> bytearray:
        """``count`` bytes from position ``start`` on."""
        data = bytearray(count)
        with parsing(self.file.path, "weight data"):
            _fill(self._data, memoryview(data), start, self.file)
        self._check()
        return data

    def _read_into(self, flat: Tensor, start: int) -> None:
        if len(flat):
            with parsing(self.file.path, "safetensors"):
                _fill(self._data, flat.view(torch.uint8).numpy().data, start, self.file)
