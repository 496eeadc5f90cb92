"""What decides the bytes of an arena."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from octo_run import kernels
from octo_run.engine.recurrent_state import RecurrentShape
from octo_run.engine.window_pages import WindowShape
from octo_run.errors import UsageError
from octo_run.models.config import KVHeads

PAGE = kernels.PAGE_TOKENS


@dataclass(frozen=True)
class ArenaShape:
    """What decides the bytes of an arena.

    Attributes:
        heads: Keys and values of each layer.
        token_bytes: Of a packed token: its keys and values of all layers without a window.
        dtype: The full-precision one.
        context: Tokens that one sequence can hold.
        chunk: Tokens that ``KVArena.prefill`` takes at most (0: it is not used, and nothing is staged).
        sequences: Rows.
        mean_heads: The number of query heads if key means are kept out of the codes (``key_means``), else 0.
        on_gpu: Whether they are for a GPU.
        pool_pages: Pages that all sequences share (None: as many as all of them hold at full context).
        recurrent: The states of recurrent layers, which are not among ``layers``; None: there are none.
        windows: Groups of layers that have a window, and pages of their own.
        lent: Layers whose keys and values later layers of the model see, too.
    """

    heads: tuple[KVHeads, ...]
    token_bytes: int
    dtype: torch.dtype
    context: int
    sink: int = 64
    window: int = 64
    chunk: int = 512
    sequences: int = 1
    mean_heads: int = 0
    on_gpu: bool = False
    pool_pages: int | None = None
    recurrent: RecurrentShape | None = None
    windows: tuple[WindowShape, ...] = ()
    lent: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.sink < 0:
            raise UsageError(f"The number of sink tokens is {self.sink}; give 0 or more.")
        if self.window < 0 or self.window % PAGE:
            raise UsageError(f"The window is {self.window} tokens; give a multiple of {PAGE}.")
        if self.context < 1:
            raise UsageError(f"The context is {self.context} tokens; give at least 1.")

    @property
    def ring(self) -> int:
        """Slots of a sequence's full-precision ring: the window and the page being filled."""
        return self.window + PAGE

    @property
    def max_pages(self) -> int:
        """Packed pages of one sequence at full context."""
        return max(0, (self.context - self.sink - self.window) // PAGE)

    @property
    def pages(self) -> int:
        """Packed pages of all sequences together."""
        return self.sequences * self.max_pages if self.pool_pages is None else self.pool_pages

    def with_pages(self, pages: int, limit: int) -> "ArenaShape":
        """The shape with so many pages for all sequences, and a context that takes all of them, at most ``limit``."""
        context = min(limit, self.sink + self.window + PAGE * pages + PAGE - 1)
        return replace(self, pool_pages=pages, context=context, chunk=min(self.chunk, context))

    @property
    def layers(self) -> int:
        """Layers that have keys and values of their own."""
        return len(self.heads)

    @cached_property
    def kinds(self) -> dict[KVHeads, tuple[int, ...]]:
        """The layers whose keys and values have one shape: they lie in one tensor."""
        found = dict[KVHeads, list[int]]()
        for layer, heads in enumerate(self.heads):
            found.setdefault(heads, []).append(layer)
        return {heads: tuple(layers) for heads, layers in found.items()}

    def place(self, layer: int) -> tuple[int, int]:
        """The number of a layer's kind, and its own number among the layers of that."""
        heads = self.heads[layer]
        return [*self.kinds].index(heads), self.kinds[heads].index(layer)

    def coefficients_shape(self, rows: int) -> tuple[int, int, int, int]:
        """Of the means' coefficients of ``rows`` queries, float32, in the layers with the largest heads: on a GPU only
        a step's, for prefill needs none."""
        count = min(rows, self.sequences) if self.on_gpu else rows
        return count if self.mean_heads else 0, 1, self.mean_heads, max(heads.size for heads in self.heads)
