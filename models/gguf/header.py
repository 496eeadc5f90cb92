"""The header of a GGUF file: everything in it checked against the file before it is used.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): the magic ``GGUF``, a version, the numbers of
tensors and of metadata entries, the metadata (name, type, value), the tensors (name, dimensions, type, offset), then
the data, which begins at a multiple of ``general.alignment``. All numbers are little-endian.

A model may be split into files ``NAME-00001-of-0000N.gguf``: the first has the metadata, each its own tensors.
"""

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from octo_run.errors import OctoError, quoted, shown
from octo_run.models.foreign import (
    AGAIN,
    MAX_FILE_BYTES,
    MAX_JSON_ITEMS,
    MAX_TENSORS,
    MAX_WEIGHT_FILES,
    open_regular,
    parsing,
    present,
)
from octo_run.models.safetensors_file import StoredFile, TensorEntry, stored_file

Metadata = dict[str, Any]
MAGIC = b"GGUF"
VERSIONS = (2, 3)
#: Dimensions at most of a tensor (a limit of llama.cpp).
MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 1 << 20
_STRING, _ARRAY = 8, 9
#: Type number -> numpy's name of a number of it.
_NUMBERS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))) | {10: "<u8", 11: "<i8", 12: "<f8"}
_SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GgufModel:
    """The headers of one model's files.

    Attributes:
        path: Its first file.
        metadata: Of the first file: numbers, texts, and lists of either.
        tensors: Name -> place. The dtype is the name of a GGML type; the shape begins with the outermost dimension.
        files: How many files there are.
    """

    path: Path
    metadata: Metadata
    tensors: dict[str, TensorEntry]
    files: int = 1


def broken(path: Path, problem: str) -> OctoError:
    """The refusal of a damaged file."""
    return OctoError(f"{path} is no complete GGUF file ({problem}): {AGAIN}.")


def read_model(path: Path) -> GgufModel:
    """The model in a GGUF file, or in the splits of which ``path`` is the first.

    Raises:
        OctoError: A file is damaged or missing, ``path`` is another split than the first, or splits do not fit
            together.
    """
    first = read_header(path)
    name = _SPLIT_NAME.fullmatch(path.name)
    count = _split_number(first, "split.count", 1)
    if name is None:
        if count > 1:
            raise OctoError(
                f"{path} is one of {count:,} files of a model and not called NAME-00001-of-{count:05}.gguf: give them "
                "the names again that they were published with."
            )
        return first
    if (number := int(name[2])) != 1:
        raise OctoError(f"{path} is file {number} of a model: give the first, {name[1]}-00001-of-{name[3]}.gguf.")
    _check_split(first, 0, int(name[3]))
    if count > MAX_WEIGHT_FILES:
        raise OctoError(f"{path} is the first of {count:,} files, and octo-run reads {MAX_WEIGHT_FILES:,} at most.")
    paths = [path.with_name(f"{name[1]}-{index + 1:05}-of-{name[3]}.gguf") for index in range(count)]
    missing = [part.name for part in paths if not present(part)]
    if missing:
        raise OctoError(
            f"{len(missing)} of the {count} files of {path.name} are not beside it (such as {shown(missing[0], 80)}): "
            f"{AGAIN}."
        )
    tensors = dict(first.tensors)
    for index, part in enumerate(paths[1:], 1):
        header = read_header(part)
        _check_split(header, index, count)
        for tensor, entry in header.tensors.items():
            if tensor in tensors:
                raise OctoError(
                    f"The tensor {quoted(tensor)} is in {tensors[tensor].path.name} and in {part}: {AGAIN}."
                )
            tensors[tensor] = entry
    if (total := _split_number(first, "split.tensors.count", len(tensors))) != len(tensors):
        raise OctoError(
            f"{path} says that the model's files hold {total:,} tensors and they hold {len(tensors):,}: {AGAIN}."
        )
    return GgufModel(path, first.metadata, tensors, count)


def _split_number(header: GgufModel, key: str, default: int) -> int:
    value = header.metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise OctoError(f"{header.path}: the metadata {key} is {quoted(value)}, which is no count: {AGAIN}.")
    return value


def _check_split(header: GgufModel, index: int, count: int) -> None:
    says = _split_number(header, "split.no", 0), _split_number(header, "split.count", 1)
    if says != (index, count):
        raise OctoError(
            f"{header.path} is called file {index + 1} of {count} and says that it is {says[0] + 1} of {says[1]}: "
            f"{AGAIN}."
        )


def read_header(path: Path) -> GgufModel:
    """The metadata and the tensors of one file.

    Raises:
        OctoError: The file is no GGUF, of a version or byte order that is not read, beyond a limit, or damaged: every
            count, text and tensor must lie inside the file.
    """
    with open_regular(path) as data, parsing(path, "GGUF"):
        file = stored_file(path, data)
        reader = _Reader(data, file)
        magic = reader.take(4, "the magic")
        if magic != MAGIC:
            raise OctoError(f"{path} is no GGUF file: it begins with {quoted(magic)}.")
        version = reader.number("<u4", "the version")
        if version not in VERSIONS:
            order = " (or of big-endian byte order)" if version & 0xFFFF == 0 else ""
            raise OctoError(f"{path} is GGUF of version {version:,}{order}, and octo-run reads version 2 and 3.")
        tensors, entries = reader.number("<u8", "a count"), reader.number("<u8", "a count")
        if tensors > MAX_TENSORS:
            raise OctoError(f"{path} has {tensors:,} tensors, and octo-run reads {MAX_TENSORS:,} at most.")
        metadata = _read_metadata(reader, entries)
        return GgufModel(path, metadata, _read_tensors(reader, tensors, _alignment(path, metadata)))


class _Reader:
    """A file read from its beginning on; nothing is read, and no memory taken, that the file does not have."""

    def __init__(self, data: BinaryIO, file: StoredFile) -> None:
        self.file, self.position = file, 0
        self._data = data
        self._buffer, self._offset = b"", 0
        self._items = 0

    def take(self, count: int, what: str) -> bytes:
        """The next bytes."""
        end = self.position + count
        if end > self.file.size:
            raise broken(self.file.path, f"{what} ends at byte {end:,} and the file at {self.file.size:,}")
        if end > MAX_FILE_BYTES:
            raise broken(self.file.path, f"its header has more than {MAX_FILE_BYTES:,} bytes")
        while len(self._buffer) - self._offset < count:
            part = self._data.read(max(1 << 20, count))
            if not part:
                raise broken(self.file.path, "it was cut off while it was read")
            self._buffer, self._offset = self._buffer[self._offset :] + part, 0
        self._offset += count
        self.position = end
        return self._buffer[self._offset - count : self._offset]

    def count(self, items: int, size: int, what: str) -> int:
        """``items``, of which the file has room for as many of ``size`` bytes."""
        self._items += items
        if self._items > MAX_JSON_ITEMS:
            raise broken(self.file.path, f"its header has more than {MAX_JSON_ITEMS:,} items")
        if items * size > self.file.size - self.position:
            raise broken(self.file.path, f"{what} claims {items:,} items and the file has {self.file.size:,} bytes")
        return items

    def number(self, kind: str, what: str) -> Any:
        """A number of numpy's type ``kind``."""
        dtype = np.dtype(kind)
        return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()

    def text(self, what: str) -> str:
        """A text with its length before it."""
        (length,) = struct.unpack("<Q", self.take(8, what))
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise broken(self.file.path, f"{what} is not UTF-8 text") from error

    def value(self, kind: int, what: str) -> Any:
        """A value of a type of the metadata."""
        if kind == _STRING:
            return self.text(what)
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind], what)
        if kind != _ARRAY:
            raise broken(self.file.path, f"{what} has the unknown type {kind}")
        item, length = self.number("<u4", what), self.number("<u8", what)
        if item == _STRING:
            return [self.text(what) for _ in range(self.count(length, 8, what))]
        if item not in _NUMBERS:
            raise broken(self.file.path, f"{what} is a list of the type {item}")
        dtype = np.dtype(_NUMBERS[item])
        return np.frombuffer(self.take(self.count(length, dtype.itemsize, what) * dtype.itemsize, what), dtype).tolist()


def _read_metadata(reader: _Reader, entries: int) -> Metadata:
    metadata: Metadata = {}
    for _ in range(reader.count(entries, 8 + 4 + 1, "the list of metadata")):
        key = reader.text("a name in the metadata")
        if key in metadata:
            raise broken(reader.file.path, f"its metadata have {quoted(key)} twice")
        what = f"the metadata {quoted(key)}"
        metadata[key] = reader.value(reader.number("<u4", what), what)
    return metadata


def _alignment(path: Path, metadata: Metadata) -> int:
    value = metadata.get("general.alignment", 32)
    if not isinstance(value, int) or not 0 < value <= _MAX_ALIGNMENT or value & (value - 1):
        raise broken(path, f"its general.alignment is {quoted(value)}, no power of two")
    return value


def _read_tensors(reader: _Reader, count: int, alignment: int) -> dict[str, TensorEntry]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    found: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    path = reader.file.path
    for _ in range(reader.count(count, 8 + 4 + 8 + 4 + 8, "the list of tensors")):
        name = reader.text("a tensor's name")
        what = f"the tensor {quoted(name)}"
        dimensions = reader.number("<u4", what)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise broken(path, f"{what} has {dimensions:,} dimensions")
        sizes = [reader.number("<u8", what) for _ in range(dimensions)]
        number, offset = reader.number("<u4", what), reader.number("<u8", what)
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise OctoError(f"{path}: {what} is of the GGML type {number}, which octo-run does not know.") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if name in found:
            raise broken(path, f"it has {what} twice")
        if 0 in sizes or sizes[0] % block:
            raise broken(path, f"{what} has the dimensions {quoted(sizes)}, not those of {kind.name}")
        if offset % alignment:
            raise broken(path, f"{what} begins at {offset:,}, no multiple of {alignment}")
        found[name] = kind.name, tuple(reversed(sizes)), offset, math.prod(sizes) // block * block_bytes
    return _placed(reader.file, found, -(-reader.position // alignment) * alignment)


def _placed(
    file: StoredFile, found: dict[str, tuple[str, tuple[int, ...], int, int]], start: int
) -> dict[str, TensorEntry]:
    """The entries, whose data begin at ``start``: inside the file, and none over another."""
    tensors: dict[str, TensorEntry] = {}
    end = start
    for name, (kind, shape, offset, size) in sorted(found.items(), key=lambda item: item[1][2]):
        begin = start + offset
        if begin + size > file.size:
            raise broken(
                file.path, f"the tensor {quoted(name)} ends at byte {begin + size:,} and the file at {file.size:,}"
            )
        if begin < end:
            raise broken(file.path, f"the tensor {quoted(name)} begins at byte {begin:,} inside another")
        end = begin + size
        tensors[name] = TensorEntry(file, kind, shape, begin, end)
    return tensors
