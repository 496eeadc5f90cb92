"""Writing safetensors files: tensors that are made when their turn comes, piece by piece.

The format is that of :mod:`octo_run.models.safetensors_file`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from octo_run.models.files import SINGLE_NAME

#: Bytes at most of one file, unless a single tensor is larger.
SHARD_BYTES = 5_000_000_000
#: The names of what can be written.
TYPES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int32: "I32", torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8",
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """A tensor to be written.

    Attributes:
        pieces: Makes its numbers, in order, in contiguous tensors on the CPU.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Shard:
    """One file to be written: its name, its tensors by name, and what the header says beside them."""

    name: str
    items: dict[str, Item]
    metadata: dict[str, str] = field(default_factory=lambda: {"format": "pt"})

    @property
    def header(self) -> bytes:
        """Everything before the data."""
        entries: dict[str, object] = {"__metadata__": self.metadata}
        position = 0
        for name, item in self.items.items():
            end = position + item.nbytes
            entries[name] = {"dtype": TYPES[item.dtype], "shape": list(item.shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(item.nbytes for item in self.items.values())

    def write(self, write: Callable[[bytes | memoryview], object]) -> None:
        """Give the file's content, piece by piece, to ``write``; what an item's pieces raise comes through."""
        write(self.header)
        for name, item in self.items.items():
            written = 0
            for piece in item.pieces():
                if piece.dtype != item.dtype:
                    raise ValueError(f"{name} is {piece.dtype}, not {item.dtype}")
                if piece.numel():
                    write(piece.reshape(-1).view(torch.uint8).numpy().data)
                written += piece.nbytes
            if written != item.nbytes:
                raise ValueError(f"{name} has {written:,} bytes, not the {item.nbytes:,} of {item.shape}")


def plan_shards(items: dict[str, Item]) -> list[Shard]:
    """The files that the tensors make: one, or several with numbers in their names."""
    groups: list[dict[str, Item]] = [{}]
    filled = 0
    for name, item in items.items():
        if groups[-1] and filled + item.nbytes > SHARD_BYTES:
            groups.append({})
            filled = 0
        groups[-1][name] = item
        filled += item.nbytes
    if len(groups) == 1:
        return [Shard(SINGLE_NAME, groups[0])]
    return [Shard(f"model-{i:05}-of-{len(groups):05}.safetensors", group) for i, group in enumerate(groups, 1)]


def index_of(shards: Sequence[Shard]) -> bytes:
    """The content of ``model.safetensors.index.json``."""
    weight_map = {name: shard.name for shard in shards for name in shard.items}
    total = sum(item.nbytes for shard in shards for item in shard.items.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1).encode()
