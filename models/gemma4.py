"""What a configuration of Gemma 4 says beside what other families do. Nothing here imports torch.

Layers that see the whole context have heads of another size than those with a window, often fewer, and often values
that are what keys are made of. In the small models the last layers see keys and values of earlier ones, and every token
has a vector of its own for each layer (`models.per_layer`). One model has experts (`models.dense_and_experts`).
"""

from typing import Any

from octo_run.errors import quoted
from octo_run.models.expert_config import gemma4_experts
from octo_run.models.fields import Fields
from octo_run.models.kv_heads import KVHeads, head_size
from octo_run.models.rope_config import FULL, SLIDING

#: RoPE where nothing is said of it.
ROPE: dict[str, Any] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
_SIZE, _HEADS = 256, 8  # of a head, and how many, where they are left out
_CAP = (1e-3, 1e6)


def gemma4(fields: Fields, kinds: tuple[str, ...], per_layer_input: int) -> dict[str, Any]:
    """Fields of `ModelConfig`.

    Args:
        kinds: Of the layers.
        per_layer_input: ``hidden_size_per_layer_input`` where it is left out.
    """
    if fields.text("use_bidirectional_attention") not in (None, "vision"):  # images are not read
        raise fields.fail("use_bidirectional_attention", "is not 'vision', and octo-run computes decoders only")
    kinds = (*kinds[:-1], FULL)  # whatever the file says of the last one
    cap = fields.raw("final_logit_softcapping")
    heads, sources = _heads(fields, kinds), _sources(fields, kinds)
    for layer, source in enumerate(sources):
        if heads and heads[layer] != heads[source]:
            raise fields.fail("num_kv_shared_layers", f"lets layer {layer} see keys of {source}, whose heads differ")
    whole = frozenset(layer for layer, kind in enumerate(kinds) if kind == FULL)
    return {
        "attention_scale": 1.0,
        "logit_cap": None if cap is None else fields.number("final_logit_softcapping", low=_CAP[0], high=_CAP[1]),
        "layer_types": kinds,
        "layer_heads": heads,
        "kv_sources": sources,
        "values_are_keys": whole if fields.boolean("attention_k_eq_v") else frozenset(),
        "double_wide": fields.boolean("use_double_wide_mlp"),
        **_per_layer(fields, per_layer_input),
        **gemma4_experts(fields),
    }


def _heads(fields: Fields, kinds: tuple[str, ...]) -> tuple[KVHeads, ...]:
    """Keys and values of each layer; none where they are the same everywhere."""
    num_heads = fields.integer("num_attention_heads", _HEADS)
    plain = KVHeads(fields.integer("num_key_value_heads", 4), fields.integer("head_dim", _SIZE))
    named = fields.sub("per_layer_config")
    if named is None:
        count = plain.number
        if fields.boolean("attention_k_eq_v") and fields.raw("num_global_key_value_heads") is not None:
            count = _count(fields, "num_global_key_value_heads", count, num_heads)
        whole = KVHeads(count, head_size(fields, "global_head_dim", 512))
        found = tuple(whole if kind == FULL else plain for kind in kinds)
    else:
        found = _named_heads(named, plain, num_heads, len(kinds))
    return () if set(found) == {plain} else found


def _named_heads(named: Fields, plain: KVHeads, num_heads: int, layers: int) -> tuple[KVHeads, ...]:
    """As newer files have them: objects by the layers' numbers."""
    found = [plain] * layers
    for name in named.values:
        if not name.isascii() or not name.isdecimal() or len(name) > 4 or int(name) >= layers:
            raise named.fail(quoted(name), f"is no number of a layer, of which there are {layers}")
        own = named.sub(name)
        if own is None:
            continue
        if other := own.values.keys() - {"head_dim", "num_key_value_heads"}:
            raise own.fail(quoted(min(other)), "is nothing that octo-run lets layers differ in")
        count = _count(own, "num_key_value_heads", plain.number, num_heads)
        found[int(name)] = KVHeads(count, head_size(own, "head_dim", plain.size))
    return tuple(found)


def _count(fields: Fields, name: str, default: int, num_heads: int) -> int:
    """A number of KV heads."""
    count = fields.integer(name, default)
    if num_heads % count:
        raise fields.fail(name, f"is {count}, and num_attention_heads ({num_heads}) is no multiple of it")
    return count


def _sources(fields: Fields, kinds: tuple[str, ...]) -> tuple[int, ...]:
    """For each layer the one whose keys and values it sees; none where each has its own."""
    shared = fields.integer("num_kv_shared_layers", 0, low=0)
    if not shared:
        return ()
    own = kinds[: max(0, len(kinds) - shared)]
    for kind in kinds:
        if kind not in own:
            problem = f"is {shared}, which leaves no layer of the kind {kind} with keys and values of its own"
            raise fields.fail("num_kv_shared_layers", problem)
    last = {kind: max(layer for layer, other in enumerate(own) if other == kind) for kind in kinds}
    return (*range(len(own)), *(last[kind] for kind in kinds[len(own) :]))


def _per_layer(fields: Fields, default: int) -> dict[str, int]:
    size, vocab = (fields.integer("hidden_size_per_layer_input", default, low=0), fields.integer("vocab_size", 262_144))
    if not size:
        return {}
    count = fields.integer("vocab_size_per_layer_input", 262_144)
    if count < vocab:
        raise fields.fail("vocab_size_per_layer_input", f"({count}) is less than vocab_size ({vocab})")
    return {"per_layer_input": size, "per_layer_vocab": count}
