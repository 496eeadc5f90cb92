"""Named arguments that the encode kernels share.

``s`` + a tensor + ``_`` + a dimension is a stride: sy_h leads from head to head of the vectors. Tensors: y vectors,
p pages. Dimensions: l layer, n page of the call, h head, t token, page its place in the pool.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from octo_run.kernels.attention.arguments import Arguments, strides
from octo_run.kernels.codec.page_layout import Side


@dataclass(frozen=True)
class BlockPlaces:
    """Where the blocks of all K, or of all V, are written.

    Attributes:
        pages: ``uint8 [num_pages, L, Hkv, page bytes]``.
        page_ids: int32 or int64 [N], the pages that are written.
        side: Which blocks they are.
        at_byte: Where a block begins in its page, a multiple of 4.
    """

    pages: Tensor
    page_ids: Tensor
    side: Side
    at_byte: int

    def arguments(self) -> Arguments:
        """What tells a kernel where to write."""
        return {"PAGES": self.pages, "IDS": self.page_ids, **strides("sp", self.pages, page=0, l=1, h=2),
                "at_byte": self.at_byte}  # fmt: skip


def of_vectors(y: Tensor) -> Arguments:
    """Vectors ``[L, N, Hkv, 64, d]`` that a Triton kernel reads, and the pages N of a layer."""
    return {"Y": y, **strides("sy", y, l=0, n=1, h=2, t=3), "pages": y.shape[1]}
