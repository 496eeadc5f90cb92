"""The attention named "octo" for models of the transformers library: pages are read as they are.

It is what our kernels compute (on a CPU their PyTorch reference), wherever they can: causal attention, or one query
that sees everything. Whatever they cannot do is done by transformers over decoded keys and values, with a warning that
says why. A call without a page goes to transformers as well: there is nothing to decode.
"""

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from octo_run.errors import OctoError
from octo_run.integrations.batch_pages import View
from octo_run.integrations.stored_states import StoredStates

NAME = "octo"

#: Arguments of attention functions that leave alone what is computed from queries, keys, values and mask: what a mask
#: says already, what other implementations need, and what the model's forward was given for itself.
_HARMLESS = frozenset({
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "cu_seqlens", "deterministic", "kwargs", "logits_to_keep",
    "max_length_k", "max_length_q", "num_items_in_batch", "output_hidden_states", "output_router_logits",
    "position_embeddings", "position_ids", "return_dict", "seq_idx", "sliding_window", "token_type_ids", "use_cache",
})  # fmt: skip
#: Marks a mask tensor that hides later tokens and nothing else.
_CAUSAL = "_octo_causal"

_warned: set[str] = set()


def octo_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask of transformers' "sdpa", marked where it hides later tokens and nothing else."""
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    if mask is None or not kwargs.get("allow_is_causal_skip", True) or kwargs.get("allow_is_bidirectional_skip"):
        return mask
    q_offset, kv_length, local = kwargs.get("q_offset", 0), kwargs["kv_length"], kwargs.get("local_size")
    padding = kwargs.get("attention_mask")
    whole = isinstance(q_offset, int) and q_offset + kwargs["q_length"] == kv_length and not kwargs.get("kv_offset", 0)
    unpadded = padding is None or (padding.shape[-1] >= kv_length and bool(padding.all()))
    if whole and unpadded and (local is None or kv_length < local):
        setattr(mask, _CAUSAL, True)
    return mask


def octo_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers' ``AttentionInterface``.

    Args:
        query: ``[B, heads, C, d]``.
        key, value: ``[B, kv_heads, n, d]``: what ``OctoCache`` returned, or tensors.
        attention_mask: None where nothing but later tokens is hidden (or nothing at all, if not causal).

    Returns:
        ``[B, C, heads, d]``, and the weights where they were asked for.

    Raises:
        OctoError: An argument that the model alone knows, and the model has no attention of its own.
    """
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    special = sorted(name for name, given in kwargs.items() if name not in _HARMLESS and _given(given))
    view, queries = _view(key, value), query.shape[2]
    if view is not None and view.old:
        reason = _reason(view, query, attention_mask, causal, dropout, special)
        if reason is None:
            scale = query.shape[3] ** -0.5 if scaling is None else scaling
            return view.attend(query, scale, causal or attention_mask is not None or queries == 1), None
        if view.packed:
            _warn(reason)
    if view is not None:
        key, value = key.dense(), value.dense()  # type: ignore[attr-defined]
        hidden = key.shape[2] - queries
    else:
        hidden = 0
    if attention_mask is None and causal and queries > 1 and (hidden or special):
        seen = torch.ones(queries, key.shape[2], dtype=torch.bool, device=query.device).tril(hidden)
        attention_mask = seen[None, None].expand(query.shape[0], 1, -1, -1)
    attend: Callable[..., tuple[Tensor, Tensor | None]] = sdpa_attention_forward
    if special:
        attend, attention_mask = _own_attention(module, special), _additive(attention_mask, query.dtype)
    return attend(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


def _given(value: object) -> bool:
    return value is not None and value is not False


def _view(key: Tensor, value: Tensor) -> View | None:
    """What both are of, if they are a cache's."""
    if not isinstance(key, StoredStates) or not isinstance(value, StoredStates):
        return None
    return key.view_of if (key.side, value.side) == (0, 1) and key.view_of is value.view_of else None


def _reason(
    view: View, query: Tensor, mask: Tensor | None, causal: bool, dropout: float, special: list[str]
) -> str | None:
    """Why the kernels cannot do it; None if they can."""
    if special:
        return f"{', '.join(special)}"
    if mask is not None and not getattr(mask, _CAUSAL, False):
        return "a mask that hides more than later tokens (padding on the left, a sliding window)"
    if dropout:
        return "dropout"
    queries = query.shape[2]
    return view.hindrance(query.shape[1], queries, causal or mask is not None or queries == 1)


def _warn(reason: str) -> None:
    """Say once for each reason that pages are decoded."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"The attention 'octo' decodes the pages of the cache for every call, which is slower: its kernels do not "
            f"do {reason}.",
            stacklevel=2,
        )


def _own_attention(module: nn.Module, special: list[str]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention in PyTorch that the model's own file has: it knows every argument of the model."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        raise OctoError(
            f"The attention 'octo' does not know {', '.join(special)} of {type(module).__name__}: set another "
            "attention, for example model.set_attn_implementation('eager')."
        )
    found: Callable[..., tuple[Tensor, Tensor | None]] = own
    return found


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask to add to scores, of one that says what is seen."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def register() -> None:
    """Make the attention known to transformers as "octo"."""
    AttentionInterface.register(NAME, octo_attention)
    AttentionMaskInterface.register(NAME, octo_mask)
