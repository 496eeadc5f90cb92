"""FP8 as DeepSeek, Qwen, AutoFP8, FBGEMM and ModelOpt store it: E4M3 codes and scales of the tensor, rows or blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from octo_run.models.quantisation.stored import FLOATS, Layout, Needed, Parts, Source, as_scales, scale_shapes

if TYPE_CHECKING:
    from octo_run.models.quantisation.config import StoredScheme


class Fp8(Layout):
    """``weight`` float8 ``[out, in]``; ``weight_scale_inv`` (a factor for all its name) or ``weight_scale``."""

    marker = "weight"

    def tensors(self, scheme: StoredScheme, out: int, columns: int, has: Callable[[str], bool]) -> dict[str, Needed]:
        """See :class:`Layout`."""
        return {
            "weight": Needed(("F8_E4M3",), ((out, columns),)),
            self._scale(scheme, has): Needed((*FLOATS, "F8_E8M0"), scale_shapes(scheme, out, columns)),
        }

    def parts(self, scheme: StoredScheme, out: int, columns: int, source: Source) -> Parts:
        """See :class:`Layout`."""
        stored, name = source("weight").view(torch.uint8), self._scale(scheme, source.has)
        return Parts(lambda first, last: stored[first:last], as_scales(source, name), names=("weight", name))

    @staticmethod
    def _scale(scheme: StoredScheme, has: Callable[[str], bool]) -> str:
        usual, other = "weight_scale_inv", "weight_scale"
        if scheme.group is None:
            usual, other = other, usual
        return other if has(other) and not has(usual) else usual
