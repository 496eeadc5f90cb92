"""The tensors of a GGUF file in bfloat16, decoded piece by piece."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from octo_run.errors import OctoError
from octo_run.models.foreign import AGAIN, parsing
from octo_run.models.gguf.header import GgufModel
from octo_run.models.safetensors_file import TensorEntry, TensorFile
from octo_run.models.safetensors_writer import Item


@dataclass(frozen=True)
class Source:
    """Where a tensor of the decoder comes from, and what llama.cpp's converter did to it, which is to be undone.

    Attributes:
        shape: The decoder's.
        entries: The tensor in the file, or several of equal columns. Without ``rows`` the rows of several take turns.
        heads: The rows of so many heads were reordered; None: of none.
        rows: Which of the entries' rows, counted from the first entry on, each of the decoder's is; None: in order.
        columns: Likewise, of the columns of the only entry.
        added: To each number.
        decay: Each number became minus its exponential.
        exact: It stays float32; else it becomes bfloat16.
    """

    shape: tuple[int, ...]
    entries: tuple[TensorEntry, ...]
    heads: int | None = None
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None
    added: float = 0.0
    decay: bool = False
    exact: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor as it is written."""
        return torch.float32 if self.exact else torch.bfloat16


#: Items that are decoded at once.
PIECE_ITEMS = 4 << 20


def item_count(entry: TensorEntry) -> int:
    """Numbers in a tensor."""
    return math.prod(entry.shape)


def check_types(model: GgufModel) -> None:
    """Refuse types that the gguf package cannot decode.

    Raises:
        OctoError: It names the tensor and the type.
    """
    seen: set[str] = set()
    for name, entry in model.tensors.items():
        if entry.dtype in seen:
            continue
        seen.add(entry.dtype)
        _, block_bytes = _block(entry)
        try:
            _decode(np.zeros((1, block_bytes), np.uint8), entry.dtype)
        except NotImplementedError:
            raise OctoError(
                f"{model.path}: the tensor {name} is quantized as {entry.dtype}, which octo-run cannot decode: take a "
                "file of the model with another quantization."
            ) from None


def bfloat16_items(found: Mapping[str, Source]) -> dict[str, Item]:
    """The tensors as they are to be written, by the decoder's names: in bfloat16, but for `Source.dtype`.

    Their pieces raise ``OctoError`` for a tensor that cannot be decoded or holds values that bfloat16 cannot, and for a
    file that changed.
    """
    return {name: Item(source.dtype, source.shape, partial(_finite, name, source)) for name, source in found.items()}


def read_tensor(name: str, source: Source) -> Tensor:
    """A whole tensor as it is to be written; errors as of :func:`bfloat16_items`."""
    return torch.cat([*_finite(name, source)]).view(source.shape)


def _finite(name: str, source: Source) -> Iterator[Tensor]:
    """The tensor's values, some rows at a time."""
    for piece in _pieces(source):
        values = piece.to(source.dtype)
        if not values.isfinite().all():
            raise OctoError(f"{source.entries[0].path}: {name} holds values that are no finite numbers: {AGAIN}.")
        yield values


def _pieces(source: Source) -> Iterator[Tensor]:
    """The tensor's values in float32, some rows at a time; whole heads where rows change places."""
    entry = source.entries[0]
    block, _ = _block(entry)
    columns = entry.shape[-1] if len(entry.shape) > 1 else 1 if block == 1 else entry.shape[0]
    rows = item_count(entry) // columns
    total = rows if source.rows is None else len(source.rows)
    unit = 1 if source.heads is None else rows // source.heads
    step = max(unit, PIECE_ITEMS // columns // unit * unit)
    for first in range(0, total, step):
        count = min(step, total - first)
        if source.rows is not None:
            values = _chosen(source.entries, source.rows[first : first + count], columns)
        else:
            parts = [_rows(each, first, count, columns) for each in source.entries]
            values = parts[0] if len(parts) == 1 else np.stack(parts, 1)
        if source.columns is not None:
            values = values[:, source.columns]
        if source.added:
            values = values - np.float32(source.added)
        if source.decay:
            with np.errstate(all="ignore"):  # what is no logarithm is refused
                values = np.log(-values)
        if source.heads is not None:  # back from pairs (0, 1), (2, 3), ... to halves of a head
            values = values.reshape(count // unit, unit // 2, 2, columns).swapaxes(1, 2)
        yield torch.from_numpy(np.ascontiguousarray(values, np.float32)).reshape(-1)


def _chosen(entries: tuple[TensorEntry, ...], rows: np.ndarray, columns: int) -> np.ndarray:
    """Some rows of tensors, which are numbered from the first tensor on; read where they follow one another."""
    ends = np.cumsum([item_count(entry) // columns for entry in entries])
    owners = np.searchsorted(ends, rows, side="right")
    breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(owners) != 0)) + 1
    found = []
    for run, of in zip(np.split(rows, breaks), np.split(owners, breaks), strict=True):
        start = int(ends[of[0] - 1]) if of[0] else 0
        found.append(_rows(entries[of[0]], int(run[0]) - start, len(run), columns))
    return np.concatenate(found)


def _rows(entry: TensorEntry, first: int, count: int, columns: int) -> np.ndarray:
    """Some rows of a tensor, float32 ``[count, columns]``."""
    data = read_rows(entry, first, count, columns)
    with parsing(entry.path, "GGUF"):
        return _decode(data, entry.dtype)


def read_rows(entry: TensorEntry, first: int, count: int, columns: int) -> np.ndarray:
    """Some rows of a tensor as they are stored, uint8 ``[count, bytes]``."""
    block, block_bytes = _block(entry)
    row_bytes = columns // block * block_bytes
    with TensorFile(entry.file) as file:
        data = file.read_bytes(entry.start + first * row_bytes, count * row_bytes)
    return np.frombuffer(data, np.uint8).reshape(count, row_bytes)


def _block(entry: TensorEntry) -> tuple[int, int]:
    """Items and bytes of a block of the tensor's type."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[entry.dtype]]


def _decode(rows: np.ndarray, kind: str) -> np.ndarray:
    """Rows of bytes as float32."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):
        return dequantize(rows, GGMLQuantizationType[kind])
