"""AWQ, the gemm packing: ``W = scale * (code - zero)``, eight outputs of an input in a word, not in their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from octo_run.models.quantisation.stored import FLOATS, Layout, Needed, Parts, Source, as_scales, groups_of, unpacked

if TYPE_CHECKING:
    from octo_run.models.quantisation.config import StoredScheme

#: Place in a word, from the lowest bits on, of each of eight outputs.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class Awq(Layout):
    """``qweight`` ``[in, out / 8]``, ``qzeros`` ``[groups, out / 8]``, ``scales`` ``[groups, out]``."""

    marker = "qweight"

    def tensors(self, scheme: StoredScheme, out: int, columns: int, has: Callable[[str], bool]) -> dict[str, Needed]:
        """See :class:`Layout`."""
        groups, words = groups_of(scheme, columns), -(-out // 8)
        return {
            "qweight": Needed(("I32",), ((columns, words),)),
            "qzeros": Needed(("I32",), ((groups, words),)),
            "scales": Needed(FLOATS, ((groups, out),)),
        }

    def parts(self, scheme: StoredScheme, out: int, columns: int, source: Source) -> Parts:
        """See :class:`Layout`."""
        words = source("qweight")

        def outputs(part: Tensor, count: int) -> Tensor:
            codes = unpacked(part, 4, 8 * part.shape[1]).view(len(part), -1, 8)
            return codes[..., list(_PLACES)].flatten(1)[:, :count].T

        def codes(first: int, last: int) -> Tensor:
            return outputs(words[:, first // 8 : -(-last // 8)], last - first)

        zeros = outputs(source("qzeros"), out).float() - 8
        return Parts(codes, as_scales(source, "scales").T, zeros, ("qweight", "scales"))
