"""Experts of a GGUF file as published files of their family have them: one by one, or all of a layer in one tensor.

Those of gpt-oss that are MXFP4 stay so. A block of 32 numbers has one exponent and 16 bytes in both formats. GGUF has
the first half of the numbers in the lower halves of the bytes; the published files have numbers that are neighbours in
one byte.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octo_run.errors import OctoError
from octo_run.models.config import ModelConfig
from octo_run.models.expert_tensors import published_name
from octo_run.models.foreign import AGAIN
from octo_run.models.gguf.tensors import Source, bfloat16_items, read_rows, read_tensor
from octo_run.models.safetensors_writer import Item

_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.\d+\.(\w+)\.(weight|bias)")
_BLOCK, _NO_NUMBER = 32, 255
#: What ``config.json`` says of weights of which the experts alone are MXFP4.
MXFP4: Mapping[str, Any] = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
}  # fmt: skip


def packed_experts(cfg: ModelConfig, found: Mapping[str, Source]) -> bool:
    """Whether the experts stay as they are: all are MXFP4, in a family that is published so."""
    if cfg.experts is None or not cfg.experts.fused:
        return False
    matrices = [source for name, source in found.items() if (match := _EXPERT.fullmatch(name)) and match[3] == "weight"]
    return all(entry.dtype == "MXFP4" for source in matrices for entry in source.entries)


def as_published(cfg: ModelConfig, found: Mapping[str, Source]) -> dict[str, Item]:
    """All tensors as they are to be written, in bfloat16 or MXFP4; errors as of `tensors.bfloat16_items`."""
    if cfg.experts is not None and cfg.experts.naming == "w123":
        return {published_name(name): item for name, item in bfloat16_items(found).items()}
    if cfg.experts is None or not cfg.experts.fused:
        return bfloat16_items(found)
    stacks: dict[tuple[str, str, str], dict[str, Source]] = {}
    plain: dict[str, Source] = {}
    for name, source in found.items():
        if (match := _EXPERT.fullmatch(name)) is not None:
            stacks.setdefault((match[1], match[2], match[3]), {})[name] = source
        else:
            plain[name.replace(".mlp.gate.", ".mlp.router.")] = source
    packed, items = packed_experts(cfg, found), bfloat16_items(plain)
    for (experts, matrix, kind), parts in stacks.items():
        name = f"{experts}.{matrix}"
        if kind == "bias":
            items[f"{name}_bias"] = _stacked(parts, lambda values: values)
        elif not packed:
            items[name] = _stacked(parts, lambda values: values.T.contiguous())
        else:
            items[f"{name}_blocks"] = _packed(parts, 16)
            items[f"{name}_scales"] = _packed(parts, None)
    return items


def _stacked(parts: dict[str, Source], change: Callable[[Tensor], Tensor]) -> Item:
    """The tensors of all experts as one, in bfloat16."""

    def pieces() -> Iterator[Tensor]:
        return (change(read_tensor(name, source)) for name, source in parts.items())

    own = change(torch.empty(next(iter(parts.values())).shape, device="meta")).shape
    return Item(torch.bfloat16, (len(parts), *own), pieces)


def _packed(parts: dict[str, Source], width: int | None) -> Item:
    """The blocks (of ``width`` bytes), or else the scales, of all experts' matrices as one tensor."""
    rows, columns = next(iter(parts.values())).shape
    shape = (len(parts), rows, columns // _BLOCK, *(() if width is None else (width,)))
    read = _scales if width is None else _codes
    return Item(torch.uint8, shape, partial(_pieces, parts, read))


def _pieces(parts: dict[str, Source], read: Callable[[np.ndarray], np.ndarray]) -> Iterator[Tensor]:
    for name, source in parts.items():
        count, columns = source.entries[0].shape
        stored = [read_rows(entry, 0, count, columns).reshape(count, -1, 17) for entry in source.entries]
        if any((blocks[..., 0] == _NO_NUMBER).any() for blocks in stored):
            raise OctoError(f"{source.entries[0].path}: {name} holds values that are no finite numbers: {AGAIN}.")
        taking_turns = np.stack(stored, 1).reshape(len(stored) * count, -1, 17)
        yield torch.from_numpy(np.ascontiguousarray(read(taking_turns)))


def _scales(blocks: np.ndarray) -> np.ndarray:
    return np.asarray(blocks[..., 0])


def _codes(blocks: np.ndarray) -> np.ndarray:
    halves = blocks[..., 1:]
    codes = np.concatenate((halves & 15, halves >> 4), -1)
    return np.asarray(codes[..., 0::2] | codes[..., 1::2] << 4)
