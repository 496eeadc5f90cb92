"""The tensors of a GGUF file as safetensors files in bfloat16, written piece by piece."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octo_run.errors import OctoError
from octo_run.models.files import SINGLE_NAME
from octo_run.models.foreign import AGAIN, parsing
from octo_run.models.gguf.header import GgufModel
from octo_run.models.safetensors_file import TensorEntry, TensorFile

#: Bytes at most of one safetensors file, unless a single tensor is larger.
SHARD_BYTES = 5_000_000_000
#: Items that are decoded at once.
PIECE_ITEMS = 4 << 20


@dataclass(frozen=True)
class Shard:
    """One safetensors file to be written: its name, its tensors (the decoder's name -> where it comes from)."""

    name: str
    tensors: dict[str, TensorEntry]

    @property
    def header(self) -> bytes:
        """Everything before the data."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, entry in self.tensors.items():
            end = position + item_count(entry) * 2
            entries[name] = {"dtype": "BF16", "shape": list(entry.shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + 2 * sum(map(item_count, self.tensors.values()))


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


def plan_shards(tensors: dict[str, TensorEntry]) -> list[Shard]:
    """The files that the tensors make: one, or several with numbers in their names."""
    groups: list[dict[str, TensorEntry]] = [{}]
    filled = 0
    for name, entry in tensors.items():
        size = 2 * item_count(entry)
        if groups[-1] and filled + size > SHARD_BYTES:
            groups.append({})
            filled = 0
        groups[-1][name] = entry
        filled += size
    if len(groups) == 1:
        return [Shard(SINGLE_NAME, groups[0])]
    count = len(groups)
    return [Shard(f"model-{i:05}-of-{count:05}.safetensors", group) for i, group in enumerate(groups, 1)]


def index_of(shards: list[Shard]) -> str:
    """The text of ``model.safetensors.index.json``."""
    weight_map = {name: shard.name for shard in shards for name in shard.tensors}
    total = 2 * sum(item_count(entry) for shard in shards for entry in shard.tensors.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)


def write_shard(shard: Shard, heads: dict[str, int], write: Callable[[bytes | memoryview], None]) -> None:
    """Write one safetensors file.

    Args:
        heads: Tensors whose rows llama.cpp reordered -> how many heads they have.
        write: Given the file's content, piece by piece.

    Raises:
        OctoError: A tensor cannot be decoded or holds values that bfloat16 cannot, or its file changed.
    """
    write(shard.header)
    for name, entry in shard.tensors.items():
        for values in _bfloat16(name, entry, heads.get(name)):
            write(values.view(torch.uint8).numpy().data)


def read_tensor(name: str, entry: TensorEntry, heads: int | None) -> Tensor:
    """A whole tensor in bfloat16; arguments and errors as of :func:`write_shard`."""
    return torch.cat([*_bfloat16(name, entry, heads)]).view(entry.shape)


def _bfloat16(name: str, entry: TensorEntry, heads: int | None) -> Iterator[Tensor]:
    """The tensor's values, some rows at a time."""
    for piece in _pieces(entry, heads):
        values = piece.to(torch.bfloat16)
        if not values.isfinite().all():
            raise OctoError(f"{entry.path}: {name} holds values that are no finite numbers: {AGAIN}.")
        yield values


def _pieces(entry: TensorEntry, heads: int | None) -> Iterator[Tensor]:
    """The tensor's values in float32, some rows at a time; whole heads where rows change places."""
    block, block_bytes = _block(entry)
    columns = entry.shape[-1] if len(entry.shape) > 1 else 1 if block == 1 else entry.shape[0]
    rows = item_count(entry) // columns
    row_bytes = columns // block * block_bytes
    unit = 1 if heads is None else rows // heads
    step = max(unit, PIECE_ITEMS // columns // unit * unit)
    with TensorFile(entry.file) as file:
        for first in range(0, rows, step):
            count = min(step, rows - first)
            data = file.read_bytes(entry.start + first * row_bytes, count * row_bytes)
            with parsing(entry.path, "GGUF"):
                values = _decode(np.frombuffer(data, np.uint8).reshape(count, row_bytes), entry.dtype)
            if heads is not None:  # back from pairs (0, 1), (2, 3), ... to halves of a head
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
