"""MXFP4 as gpt-oss stores it, and NVFP4 as ModelOpt does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from octo_run.models.quantisation.stored import (
    Layout,
    Needed,
    Parts,
    Source,
    as_scales,
    groups_of,
    scale_shapes,
    unpacked,
)

if TYPE_CHECKING:
    from octo_run.models.quantisation.config import StoredScheme


class Blocks(Layout):
    """``weight_blocks`` uint8 ``[out, in / 32, 16]``, the lower half of a byte first; ``weight_scales`` exponents."""

    marker = "weight_blocks"

    def tensors(self, scheme: StoredScheme, out: int, columns: int, has: Callable[[str], bool]) -> dict[str, Needed]:
        """See :class:`Layout`."""
        groups = groups_of(scheme, columns)
        return {
            "weight_blocks": Needed(("U8",), ((out, groups, 16),)),
            "weight_scales": Needed(("U8", "F8_E8M0"), ((out, groups),)),
        }

    def parts(self, scheme: StoredScheme, out: int, columns: int, source: Source) -> Parts:
        """See :class:`Layout`."""
        stored, scales = source("weight_blocks").flatten(1), as_scales(source, "weight_scales")
        names = ("weight_blocks", "weight_scales")
        return Parts(lambda first, last: unpacked(stored[first:last], 4, columns), scales, names=names)


class ModelOptFp4(Layout):
    """``weight`` uint8 ``[out, in / 2]``, the lower half first; E4M3 scales times ``weight_scale_2`` of the tensor."""

    marker = "weight"

    def tensors(self, scheme: StoredScheme, out: int, columns: int, has: Callable[[str], bool]) -> dict[str, Needed]:
        """See :class:`Layout`."""
        return {
            "weight": Needed(("U8",), ((out, columns // 2),)),
            "weight_scale": Needed(("F8_E4M3",), scale_shapes(scheme, out, columns)),
            "weight_scale_2": Needed(("F32",), ((), (1,))),
        }

    def parts(self, scheme: StoredScheme, out: int, columns: int, source: Source) -> Parts:
        """See :class:`Layout`."""
        stored = source("weight")
        scales, factor = as_scales(source, "weight_scale"), as_scales(source, "weight_scale_2").reshape(())
        return Parts(lambda first, last: unpacked(stored[first:last], 4, columns), scales, factor=factor)
