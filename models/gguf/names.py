"""Which tensors of a GGUF file each of the decoder's is made of."""

import re
from dataclasses import replace

from octo_run.errors import OctoError, quoted
from octo_run.models.config import ModelConfig
from octo_run.models.foreign import AGAIN
from octo_run.models.gguf.architectures import Architecture
from octo_run.models.gguf.header import GgufModel
from octo_run.models.gguf.tensors import Source
from octo_run.models.safetensors_file import TensorEntry
from octo_run.models.weights import expected_tensors

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
#: The matrices (or biases) of all experts of a layer, and those of one, as older files have them.
_EXPERTS = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))_exps\.(weight|bias)")
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|gate_up|down)_proj")
#: Rotary frequencies, which are computed from the configuration.
_COMPUTED = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")
_LONGROPE = re.compile(r"rope_factors_(long|short)\.weight")


def gguf_names(name: str, arch: Architecture) -> tuple[str, ...]:
    """What GGUF calls the tensors of which one of the decoder's is made: one, or two whose rows take turns in it."""
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
    return (f"blk.{layer[1]}.{names[layer[2].rpartition('.')[0]]}.{kind}",)


def sources(model: GgufModel, arch: Architecture, cfg: ModelConfig) -> dict[str, Source]:
    """The decoder's name -> where the tensor comes from, for all that the decoder needs.

    Raises:
        OctoError: Tensors are missing, unknown or misshapen.
    """
    expected = expected_tensors(cfg)
    parts = {name: gguf_names(name, arch) for name in expected}
    wanted = {part: name for name, names in parts.items() for part in names}
    stored = dict(part for name, entry in model.tensors.items() for part in _by_expert(name, entry))
    computed = cfg.rope_scaling is not None and cfg.rope_scaling.kind == "longrope"
    for name, entry in stored.items():
        if _COMPUTED.fullmatch(name) or (computed and _LONGROPE.fullmatch(name)):
            continue
        if name not in wanted:
            raise OctoError(
                f"{model.path} has the tensor {quoted(name)}, which is no part of the models that octo-run knows."
            )
        rows, *rest = expected[wanted[name]]
        shape = (rows // len(parts[wanted[name]]), *rest)
        if entry.shape != shape:
            raise OctoError(
                f"{model.path}: the tensor {name} has the shape {quoted(list(entry.shape))} where its metadata ask for "
                f"{list(shape)}: {AGAIN}."
            )
    missing = [part for part in wanted if part not in stored]
    if missing:
        raise OctoError(f"{model.path} lacks {len(missing):,} tensors of its model (such as {missing[0]}): {AGAIN}.")
    return {name: _source(name, tuple(stored[part] for part in parts[name]), arch, cfg) for name in expected}


def _source(name: str, entries: tuple[TensorEntry, ...], arch: Architecture, cfg: ModelConfig) -> Source:
    """With what the converter did to the tensor: rows of queries and keys in another order, 1 added to the weights of
    norms."""
    if arch.reordered and (part := re.search(r"\.([qk])_proj\.", name)):
        return Source(entries, heads=cfg.num_heads if part[1] == "q" else cfg.num_kv_heads)
    return Source(entries, added=float(cfg.family.norm == "one_plus" and name.endswith("norm.weight")))


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
