"""Which tensors of a GGUF file each of the decoder's is made of."""

import re
from dataclasses import replace

import numpy as np

from octo_run.errors import OctoError, quoted
from octo_run.models.config import ModelConfig
from octo_run.models.foreign import AGAIN
from octo_run.models.gguf.architectures import PREDICTING, Architecture
from octo_run.models.gguf.header import GgufModel
from octo_run.models.gguf.tensors import Source
from octo_run.models.safetensors_file import TensorEntry
from octo_run.models.tensors import expected_tensors

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
#: The matrices (or biases) of all experts of a layer, and those of one, as older files have them.
_EXPERTS = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))_exps\.(weight|bias)")
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|gate_up|down)_proj")
#: Rotary frequencies, which are computed from the configuration.
_COMPUTED = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")
_LONGROPE = re.compile(r"rope_factors_(long|short)\.weight")


def gguf_names(name: str, arch: Architecture) -> tuple[str, ...]:
    """What GGUF calls the tensors of which one of the decoder's is made."""
    stem, _, kind = name.rpartition(".")
    if (expert := _EXPERT.fullmatch(stem)) is not None:
        parts = expert[3].split("_")
        return tuple(f"blk.{expert[1]}.ffn_{part}.{expert[2]}.{kind}" for part in parts)
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if layer is None:
        return (f"{next(ours for ours, theirs in _TOP.items() if theirs == stem)}.{kind}",)
    names = arch.layer_names
    if layer[2] in names:
        return (f"blk.{layer[1]}.{names[layer[2]]}",)
    return tuple(f"blk.{layer[1]}.{part}.{kind}" for part in names[layer[2].rpartition(".")[0]].split("+"))


def sources(model: GgufModel, arch: Architecture, cfg: ModelConfig) -> dict[str, Source]:
    """The decoder's name -> where the tensor comes from, for all that the decoder needs.

    Raises:
        OctoError: Tensors are missing, unknown or misshapen.
    """
    expected = expected_tensors(cfg)
    parts = {name: gguf_names(name, arch) for name in expected}
    stored = dict(part for name, entry in model.tensors.items() for part in _by_expert(name, entry))
    computed = cfg.rope_scaling is not None and cfg.rope_scaling.kind == "longrope"
    shapes = dict[str, tuple[int, ...]]()
    for name, shape in expected.items():
        sizes = _rows_of(name, shape[0], len(parts[name]), cfg)
        shapes |= {part: (rows, *shape[1:]) for part, rows in zip(parts[name], sizes, strict=True)}
    for name, entry in stored.items():
        if _COMPUTED.fullmatch(name) or (computed and _LONGROPE.fullmatch(name)) or _predicts(name, arch, cfg):
            continue
        if name not in shapes:
            raise OctoError(
                f"{model.path} has the tensor {quoted(name)}, which is no part of the models that octo-run knows."
            )
        if _wide(entry.shape) != _wide(shapes[name]):
            raise OctoError(
                f"{model.path}: the tensor {name} has the shape {quoted(list(entry.shape))} where its metadata ask for "
                f"{list(shapes[name])}: {AGAIN}."
            )
    missing = [part for part in shapes if part not in stored]
    if missing:
        raise OctoError(f"{model.path} lacks {len(missing):,} tensors of its model (such as {missing[0]}): {AGAIN}.")
    return {
        name: _source(name, shape, tuple(stored[part] for part in parts[name]), arch, cfg)
        for name, shape in expected.items()
    }


def _wide(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without dimensions of 1, which some converters leave out."""
    return tuple(size for size in shape if size != 1)


def _predicts(name: str, arch: Architecture, cfg: ModelConfig) -> bool:
    """Whether a tensor is of the layers behind the last, which predict further tokens."""
    layer = re.fullmatch(r"blk\.(\d{1,9})\..+", name, re.DOTALL)
    return layer is not None and PREDICTING in arch.keys and int(layer[1]) >= cfg.num_layers


def _rows_of(name: str, rows: int, count: int, cfg: ModelConfig) -> list[int]:
    """The rows of each of the tensors of which one is made."""
    if count == 2 and name.endswith("in_proj_qkvz.weight") and cfg.delta is not None:
        values = cfg.delta.value_heads * cfg.delta.value_dim
        return [rows - values, values]
    return [rows // count] * count


def _source(
    name: str, shape: tuple[int, ...], entries: tuple[TensorEntry, ...], arch: Architecture, cfg: ModelConfig
) -> Source:
    """With what the converter did to the tensor: rows and columns in another order, 1 added to the weights of norms,
    decays in place of their logarithms."""
    if arch.reordered and (part := re.search(r"\.([qk])_proj\.", name)):
        return Source(shape, entries, heads=cfg.num_heads if part[1] == "q" else cfg.num_kv_heads)
    if (delta := re.search(r"\.linear_attn\.(\w+)", name)) is not None:
        return _of_delta_net(delta[1], shape, entries, arch, cfg)
    return Source(shape, entries, added=float(cfg.family.norm == "one_plus" and name.endswith("norm.weight")))


def _of_delta_net(
    name: str, shape: tuple[int, ...], entries: tuple[TensorEntry, ...], arch: Architecture, cfg: ModelConfig
) -> Source:
    """Value heads that share a key head are neighbours; where the converter spreads them, each key head's first come
    first. In Qwen3-Next it puts together the rows of queries, of keys, of values, and of gates of all key heads."""
    sizes = cfg.delta
    assert sizes is not None
    group, exact = sizes.value_heads // sizes.key_heads, len(shape) == 1
    if name == "in_proj_qkvz":
        widths = (sizes.key_dim, sizes.key_dim, group * sizes.value_dim, group * sizes.value_dim)
        starts = sizes.key_heads * np.cumsum((0, *widths[:-1]))
        ranges = [
            np.arange(start + head * width, start + (head + 1) * width)
            for head in range(sizes.key_heads)
            for start, width in zip(starts, widths, strict=True)
        ]
        return Source(shape, entries, rows=np.concatenate(ranges))
    if not arch.spread or name == "norm":
        return Source(shape, entries, decay=name == "A_log", exact=exact)

    def spread(width: int) -> np.ndarray:
        stored = np.arange(sizes.value_heads * width).reshape(group, sizes.key_heads, width)
        return stored.swapaxes(0, 1).reshape(-1)

    if name == "out_proj":
        return Source(shape, entries, columns=spread(sizes.value_dim))
    if name in ("in_proj_qkv", "conv1d"):
        keys = 2 * sizes.key_heads * sizes.key_dim
        return Source(shape, entries, rows=np.concatenate((np.arange(keys), keys + spread(sizes.value_dim))))
    rows = spread(sizes.value_dim if name == "in_proj_z" else 1)
    return Source(shape, entries, rows=rows, decay=name == "A_log", exact=exact)


def _by_expert(name: str, entry: TensorEntry) -> list[tuple[str, TensorEntry]]:
    """The parts of the experts in a tensor of all of a layer's; of another tensor itself."""
    match = _EXPERTS.fullmatch(name)
    if match is None or len(entry.shape) != (3 if match[2] == "weight" else 2) or not entry.shape[0]:
        return [(name, entry)]
    size, found = (entry.end - entry.start) // entry.shape[0], []
    for expert in range(entry.shape[0]):
        start = entry.start + expert * size
        part = replace(entry, shape=entry.shape[1:], start=start, end=start + size)
        found.append((f"{match[1]}.{expert}.{match[2]}", part))
    return found
