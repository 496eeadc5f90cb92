"""The tensors of routed experts in files, whatever they are called there, by one set of names.

The names are those of a list of experts: ``mlp.gate.weight`` of the router, ``mlp.experts.3.gate_proj.weight`` (or,
where gate and up are one matrix, ``gate_up_proj``) and ``down_proj`` of an expert. Files that stack the experts in one
tensor have a part of it for each name; no data is read for that.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from octo_run.errors import OctoError, quoted, shown
from octo_run.models.foreign import AGAIN
from octo_run.models.safetensors_file import ITEM_BITS

if TYPE_CHECKING:
    from octo_run.models.expert_config import ExpertConfig
    from octo_run.models.safetensors_file import TensorEntry

_BLOCK = re.compile(r"(model\.layers\.\d+)\.(?:block_sparse_moe|mlp)\.(.+)", re.DOTALL)
#: Where the experts are beside the layer's MLP, not in place of it.
_BESIDE = re.compile(r"(model\.layers\.\d+)\.(router\.proj\..+|experts\..+)", re.DOTALL)
_EXPERT = re.compile(r"(.+)\.mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)(|\..+)", re.DOTALL)
_OLDER = re.compile(r"experts\.(\d+)\.(w1|w2|w3)\.(.+)", re.DOTALL)
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_ROUTERS = ("gate", "router", "router.layer", "router.proj")
#: What a stacked tensor is called -> the matrix of each expert, and the tensor of it.
_STACKED = {
    "input_linear.weight": ("gate_up_proj", "weight"),
    "output_linear.weight": ("down_proj", "weight"),
    **{f"experts.{name}": (name, "weight") for name in ("gate_up_proj", "down_proj")},
    **{f"experts.{name}.weight": (name, "weight") for name in ("gate_up_proj", "down_proj")},
    **{f"experts.{name}_bias": (name, "bias") for name in ("gate_up_proj", "down_proj")},
    **{f"experts.{name}_{part}": (name, f"weight_{part}")
       for name in ("gate_up_proj", "down_proj") for part in ("blocks", "scales", "scale_inv")},
}  # fmt: skip


def published_name(name: str) -> str:
    """How files that call experts' matrices w1, w2 and w3 name a layer, or a tensor of it."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return name.replace(".mlp.gate", ".block_sparse_moe.gate")
    older = next(older for older, newer in _PROJECTIONS.items() if newer == match[3])
    return f"{match[1]}.block_sparse_moe.experts.{match[2]}.{older}{match[4]}"


def by_expert(
    found: dict[str, TensorEntry], experts: ExpertConfig, hidden: int, block: int = 1
) -> dict[str, TensorEntry]:
    """The tensors of a model by the names above; those that are no experts' keep theirs.

    Args:
        block: Rows that a scale of a stacked matrix of fp8 is for.

    Raises:
        OctoError: A stacked tensor has not the shape of all experts', or two tensors have one name.
    """
    named: dict[str, TensorEntry] = {}
    for name, entry in found.items():
        for new, part in _parts(name, entry, experts, hidden, block):
            if new in named:
                raise OctoError(f"{entry.path}: {shown(name, 80)} is there by another name, too: {AGAIN}.")
            named[new] = part
    return named


def _parts(
    name: str, entry: TensorEntry, experts: ExpertConfig, hidden: int, block: int
) -> list[tuple[str, TensorEntry]]:
    match = _BLOCK.fullmatch(name) or (_BESIDE.fullmatch(name) if experts.beside else None)
    if match is None:
        return [(name, entry)]
    layer, rest = f"{match[1]}.mlp", match[2]
    module, _, part = rest.rpartition(".")
    if module in _ROUTERS:
        return [(f"{layer}.gate.{part}", entry)]
    older = _OLDER.fullmatch(rest)
    if older is not None:
        return [(f"{layer}.experts.{older[1]}.{_PROJECTIONS[older[2]]}.{older[3]}", entry)]
    if rest in _STACKED:
        matrix, part = _STACKED[rest]
        if part == "weight_scale_inv":
            return _unstacked_scales(name, entry, experts, f"{layer}.experts", matrix, block)
        return _unstacked(name, entry, experts, hidden, f"{layer}.experts", matrix, part)
    return [(f"{layer}.{rest}", entry)]


def _unstacked(
    name: str, entry: TensorEntry, experts: ExpertConfig, hidden: int, prefix: str, matrix: str, part: str
) -> list[tuple[str, TensorEntry]]:
    """The parts of a tensor of all experts."""
    rows, columns = (2 * experts.inner, hidden) if matrix == "gate_up_proj" else (hidden, experts.inner)
    turned = part == "weight" and experts.fused  # stored [in, out] where gate and up take turns
    own: tuple[int, ...] = {
        "bias": (rows,), "weight_blocks": (rows, -(-columns // 32), 16), "weight_scales": (rows, -(-columns // 32)),
    }.get(part, (columns, rows) if turned else (rows, columns))  # fmt: skip
    if entry.shape != (experts.count, *own):
        wanted = [experts.count, *own]
        raise OctoError(
            f"The weights in {entry.path.parent} do not fit its config.json: {shown(name, 80)} is "
            f"{quoted(list(entry.shape))} instead of {wanted}."
        )
    size = math.prod(own) * ITEM_BITS[entry.dtype] // 8
    found = []
    for expert in range(experts.count):
        start = entry.start + expert * size
        each = replace(entry, shape=(rows, columns) if turned else own, start=start, end=start + size, turned=turned)
        where = f"{prefix}.{expert}"
        if matrix == "gate_up_proj" and not experts.fused:
            half = start + size // 2
            found.append((f"{where}.gate_proj.{part}", replace(each, shape=(rows // 2, *own[1:]), end=half)))
            found.append((f"{where}.up_proj.{part}", replace(each, shape=(rows // 2, *own[1:]), start=half)))
        else:
            found.append((f"{where}.{matrix}.{part}", each))
    return found


def _unstacked_scales(
    name: str, entry: TensorEntry, experts: ExpertConfig, prefix: str, matrix: str, block: int
) -> list[tuple[str, TensorEntry]]:
    """The parts of the scales of all experts' blocks; of a matrix as a whole gate and up may have the same one."""
    halves = 2 if matrix == "gate_up_proj" else 1
    whole = len(entry.shape) == 3 and entry.shape[1] == 1
    if (
        len(entry.shape) != 3
        or entry.shape[0] != experts.count
        or experts.fused
        or (entry.shape[1] % halves and not whole)
    ):
        raise OctoError(
            f"The weights in {entry.path.parent} do not fit its config.json: {shown(name, 80)} is "
            f"{quoted(list(entry.shape))}, no scales for {experts.count} experts."
        )
    if halves == 2 and not whole and experts.inner % block:
        raise OctoError(
            f"{entry.path}: {shown(name, 80)} has blocks of {block} rows that belong to gate and up at once, which "
            "octo-run cannot load: take another copy of the model."
        )
    rows, columns = entry.shape[1:]
    size, found = rows * columns * ITEM_BITS[entry.dtype] // 8, []
    part = rows // halves if not whole else rows
    for expert in range(experts.count):
        for number, half in enumerate(("gate_proj", "up_proj") if halves == 2 else (matrix,)):
            start = entry.start + expert * size + (0 if whole else number * size // halves)
            each = replace(entry, shape=(part, columns), start=start, end=start + size * part // rows)
            found.append((f"{prefix}.{expert}.{half}.weight_scale_inv", each))
    return found
