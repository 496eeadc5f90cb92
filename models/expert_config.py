"""What a configuration says about routed experts. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from octo_run.errors import quoted

if TYPE_CHECKING:
    from octo_run.models.fields import Fields

_MOST = 4096
_LIMIT = (1e-3, 1e6)


@dataclass(frozen=True)
class ExpertConfig:
    """The experts of a model's layers.

    Attributes:
        count: Experts of a layer.
        chosen: Experts that a token is given to.
        inner: Columns between an expert's matrices.
        normalised: The weights of a token's experts add up to 1; else they are shares of all experts' softmax.
        shared: Columns of the expert that all tokens have, which has a gate of its own; 0: there is none.
        dense: The layers that have a plain MLP.
        bias: Router and experts have biases.
        fused: An expert's gate and up are one matrix in the files, its rows taking turns.
        naming: Of the experts in published files: ``list``: one by one; ``w123``: so, their matrices being w1, w3 and
            w2; ``stacked``: in one tensor.
        beside: Each layer has a dense MLP, too (`dense_and_experts`).
        scaled: The weight of each expert is multiplied by a number of its own.
        clamped: The activation is ``clamped_silu`` with these ``alpha`` and ``limit``; None: that of the model.
    """

    count: int
    chosen: int
    inner: int
    normalised: bool
    shared: int = 0
    dense: frozenset[int] = frozenset()
    bias: bool = False
    fused: bool = False
    naming: str = "list"
    beside: bool = False
    scaled: bool = False
    clamped: tuple[float, float] | None = None


def _chosen(fields: Fields, default: int | None, count: int, name: str = "num_experts_per_tok") -> int:
    chosen = fields.integer(name, default)
    if chosen > count:
        raise fields.fail(name, f"is {chosen}, more than the {count} experts that there are")
    return chosen


def local_experts(fields: Fields, naming: str) -> dict[str, Any]:
    """Of Mixtral and Granite: every layer has experts of the model's ``intermediate_size``."""
    count = fields.integer("num_local_experts", 8, high=_MOST)
    inner = fields.integer("intermediate_size")
    return {"experts": ExpertConfig(count, _chosen(fields, 2, count), inner, True, naming=naming)}


def qwen_experts(
    fields: Fields, count: int, chosen: int, inner: int, shared: int, normalised: bool = False
) -> dict[str, Any]:
    """Of Qwen, some of whose layers can be dense. Given what fields mean that are left out; ``shared`` 0: none."""
    if fields.boolean("use_sliding_window") and fields.values.get("sliding_window", 0) is not None:
        raise fields.fail("use_sliding_window", "is true, and octo-run computes this family without a window")
    elsewhere = fields.integer("num_local_experts", count, low=0, high=_MOST)
    count = fields.integer("num_experts", elsewhere, low=0, high=_MOST)
    if not count:
        return {}
    step, layers = fields.integer("decoder_sparse_step", 1), fields.integer("num_hidden_layers")
    listed = fields.raw("mlp_only_layers")
    if listed is None:
        listed = []
    if not isinstance(listed, list) or not all(type(index) is int for index in listed):
        raise fields.fail("mlp_only_layers", f"is {quoted(listed)}, not a list of layers")
    dense = frozenset(index for index in range(layers) if index in listed or (index + 1) % step)
    config = ExpertConfig(
        count,
        _chosen(fields, chosen, count),
        fields.integer("moe_intermediate_size", inner),
        fields.boolean("norm_topk_prob", normalised),
        fields.integer("shared_expert_intermediate_size", shared) if shared else 0,
        dense,
    )
    return {"experts": config}


def gpt_oss_experts(fields: Fields) -> dict[str, Any]:
    """Of gpt-oss."""
    count = fields.integer("num_local_experts", 128, high=_MOST)
    alpha = fields.number("swiglu_alpha", 1.702, low=_LIMIT[0], high=_LIMIT[1])
    limit = fields.number("swiglu_limit", 7.0, low=_LIMIT[0], high=_LIMIT[1])
    config = ExpertConfig(
        count, _chosen(fields, 4, count), fields.integer("intermediate_size"), True, bias=True, fused=True,
        naming="stacked", clamped=(alpha, limit),
    )  # fmt: skip
    return {"experts": config}


def olmoe_experts(fields: Fields) -> dict[str, Any]:
    """Of OLMoE."""
    if fields.raw("clip_qkv") is not None:
        raise fields.fail("clip_qkv", f"is {quoted(fields.raw('clip_qkv'))}, and octo-run does not clip q, k and v")
    count = fields.integer("num_experts", 64, high=_MOST)
    inner, normalised = fields.integer("intermediate_size"), fields.boolean("norm_topk_prob")
    return {"experts": ExpertConfig(count, _chosen(fields, 8, count), inner, normalised)}


def gemma4_experts(fields: Fields) -> dict[str, Any]:
    """Of Gemma 4: in every layer, beside its dense MLP."""
    if not fields.boolean("enable_moe_block"):
        return {}
    count = fields.integer("num_experts", high=_MOST)
    chosen, inner = _chosen(fields, None, count, "top_k_experts"), fields.integer("moe_intermediate_size")
    return {"experts": ExpertConfig(count, chosen, inner, True, naming="stacked", beside=True, scaled=True)}
