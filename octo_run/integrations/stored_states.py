"""Stored keys, or values, as a tensor that is decoded where an operation needs its numbers."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from octo_run.integrations.batch_pages import View


class StoredStates(Tensor):
    """What a cache returns for a layer's keys or values: ``[B, kv_heads, length, d]``.

    Attention over pages reads ``view_of``. To everybody else it is a tensor: the first operation on it decodes the
    pages for this call, and goes on with the dense tensor.

    Args:
        view: What is stored.
        side: 0 for keys, 1 for values.
        first: Tokens of the view that are left out at the beginning.
    """

    view_of: View
    side: int
    first: int

    @staticmethod
    def __new__(cls, view: View, side: int, first: int = 0) -> "StoredStates":
        batch, kv_heads, length, dim = view.shape
        arena = view.store.arena
        states: StoredStates = torch.Tensor._make_wrapper_subclass(
            cls, (batch, kv_heads, length - first, dim), dtype=arena.shape.dtype, device=arena.pages.device
        )
        states.view_of, states.side, states.first = view, side, first
        return states

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(StoredStates, StoredStates._promised, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _promised(self) -> Tensor:
        """``dense`` with the strides that this tensor says it has: who reads them may ask for a view."""
        return self.dense().contiguous()

    def dense(self) -> Tensor:
        """The keys or values themselves.

        Raises:
            OctoError: The layer has changed.
        """
        return self.view_of.dense()[self.side][:, :, self.first :]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({'KV'[self.side]}, {tuple(self.shape)}, {self.dtype}, {self.device})"
