"""GPTQ (AutoGPTQ, GPTQModel): ``W = scale * (code - zero)``, codes of a column of the matrix one above the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octo_run.kernels.linear import BITS
from octo_run.models.quantisation.stored import FLOATS, Layout, Needed, Parts, Source, as_scales, groups_of, unpacked

if TYPE_CHECKING:
    from octo_run.models.quantisation.config import StoredScheme


class Gptq(Layout):
    """``qweight`` ``[in * bits / 32, out]``, ``qzeros`` ``[groups, out * bits / 32]``, ``scales`` ``[groups, out]``.

    Version 1 stores zeros less 1, in as many bits as a code: a zero of 0 is all ones. ``g_idx`` ``[in]`` says the group
    of each column.
    """

    marker, order = "qweight", "g_idx"

    def tensors(self, scheme: StoredScheme, out: int, columns: int, has: Callable[[str], bool]) -> dict[str, Needed]:
        """See :class:`Layout`. Older files have biases of zeros that the model knows not of."""
        bits, groups = BITS[scheme.kind], groups_of(scheme, columns)
        return {
            "qweight": Needed(("I32",), ((-(-columns * bits // 32), out),)),
            "qzeros": Needed(("I32",), ((groups, -(-out * bits // 32)),)),
            "scales": Needed(FLOATS, ((groups, out),)),
            "g_idx": Needed(("I32", "I64"), ((columns,),), optional=not scheme.ordered),
        }

    def parts(self, scheme: StoredScheme, out: int, columns: int, source: Source) -> Parts:
        """See :class:`Layout`."""
        bits = BITS[scheme.kind]
        words, middle = source("qweight"), 1 << (bits - 1)
        zeros = unpacked(source("qzeros"), bits, out).to(torch.int32).T
        zeros = (zeros + scheme.zero_shift) & ((1 << bits) - 1)
        if scheme.symmetric and not bool((zeros == middle).all()):
            problem = f"has zeros other than {middle}, though quantization_config says sym or another checkpoint_format"
            raise source.damaged("qzeros", problem)

        def codes(first: int, last: int) -> Tensor:
            found = unpacked(words[:, first:last].T, bits, columns)
            return found if bits == 4 else found ^ 128

        scales = as_scales(source, "scales").T
        return Parts(codes, scales, None if scheme.symmetric else (zeros - middle).float(), ("qweight", "scales"))
