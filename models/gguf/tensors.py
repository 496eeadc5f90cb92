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
class Change:
    """What llama.cpp's converter did to a tensor, to be undone.

    Attributes:
        heads: It reordered the rows of so many heads; None: of none.
        added: To each number.
    """

    heads: int | None = None
    added: float = 0.0


UNCHANGED = Change()
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


def bfloat16_items(found: dict[str, TensorEntry], changes: Mapping[str, Change]) -> dict[str, Item]:
    """The tensors as they are to be written.

    Their pieces raise ``OctoError`` for a tensor that cannot be decoded or holds values that bfloat16 cannot, and for a
    file that changed.

    Args:
        found: The decoder's name -> where it comes from.
        changes: Those of the tensors that were changed.
    """
    return {
        name: Item(torch.bfloat16, entry.shape, partial(_bfloat16, name, entry, changes.get(name, UNCHANGED)))
        for name, entry in found.items()
    }


def read_tensor(name: str, entry: TensorEntry, change: Change) -> Tensor:
    """A whole tensor in bfloat16; errors as of :func:`bfloat16_items`."""
    return torch.cat([*_bfloat16(name, entry, change)]).view(entry.shape)


def _bfloat16(name: str, entry: TensorEntry, change: Change) -> Iterator[Tensor]:
    """The tensor's values, some rows at a time."""
    for piece in _pieces(entry, change):
        values = piece.to(torch.bfloat16)
        if not values.isfinite().all():
            raise OctoError(f"{entry.path}: {name} holds values that are no finite numbers: {AGAIN}.")
        yield values


def _pieces(entry: TensorEntry, change: Change) -> Iterator[Tensor]:
    """The tensor's values in float32, some rows at a time; whole heads where rows change places."""
    block, block_bytes = _block(entry)
    columns = entry.shape[-1] if len(entry.shape) > 1 else 1 if block == 1 else entry.shape[0]
    rows = item_count(entry) // columns
    row_bytes = columns // block * block_bytes
    unit = 1 if change.heads is None else rows // change.heads
    step = max(unit, PIECE_ITEMS // columns // unit * unit)
    with TensorFile(entry.file) as file:
        for first in range(0, rows, step):
            count = min(step, rows - first)
            data = file.read_bytes(entry.start + first * row_bytes, count * row_bytes)
            with parsing(entry.path, "GGUF"):
                values = _decode(np.frombuffer(data, np.uint8).reshape(count, row_bytes), entry.dtype)
            if change.added:
                values = values - np.float32(change.added)
            if change.heads is not None:  # back from pairs (0, 1), (2, 3), ... to halves of a head
                values = values.reshape(count // unit, unit // 2, 2, columns).swapaxes(1, 2)
            yield torch.from_numpy(np.ascontiguousarray(values, np.float32)).reshape(-1)


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
