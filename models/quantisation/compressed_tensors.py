"""compressed-tensors (llm-compressor): integers in words or bytes, FP8, and groups of FP4 and FP8."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octo_run.kernels.linear import BITS
from octo_run.models.quantisation.stored import (
    FLOATS,
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


class Packed(Layout):
    """``weight_packed`` int32 ``[out, in * bits / 32]``: codes plus half their range; zeros likewise, along rows."""

    marker, order = "weight_packed", "weight_g_idx"

    def tensors(self, scheme: StoredScheme, out: int, columns: int, has: Callable[[str], bool]) -> dict[str, Needed]:
        """See :class:`Layout`."""
        bits = BITS[scheme.kind]
        found = {
            "weight_packed": Needed(("I32",), ((out, -(-columns * bits // 32)),)),
            "weight_scale": Needed(FLOATS, scale_shapes(scheme, out, columns)),
            "weight_shape": Needed(("I64", "I32"), ((2,),), optional=True),
            "weight_g_idx": Needed(("I32", "I64"), ((columns,),), optional=True),
        }
        if not scheme.symmetric:
            words = -(-out * bits // 32)
            found["weight_zero_point"] = Needed(("I32",), ((words, groups_of(scheme, columns)),))
        return found

    def parts(self, scheme: StoredScheme, out: int, columns: int, source: Source) -> Parts:
        """See :class:`Layout`."""
        bits, zeros = BITS[scheme.kind], None
        if source.has("weight_shape") and source("weight_shape").tolist() != [out, columns]:
            raise source.damaged("weight_shape", f"says something else than {out} x {columns}")
        words = source("weight_packed")

        def codes(first: int, last: int) -> Tensor:
            found = unpacked(words[first:last], bits, columns)
            return found if bits == 4 else found ^ 128

        if not scheme.symmetric:
            zeros = unpacked(source("weight_zero_point").T, bits, out).T.float() - (1 << (bits - 1))
        return Parts(codes, as_scales(source, "weight_scale"), zeros, ("weight_packed", "weight_scale"))


class Plain(Layout):
    """``weight`` int8 or float8 ``[out, in]``, one code a byte; zeros likewise."""

    marker = "weight"

    def tensors(self, scheme: StoredScheme, out: int, columns: int, has: Callable[[str], bool]) -> dict[str, Needed]:
        """See :class:`Layout`. Symmetric weights may have zeros, which are 0."""
        dtype, shapes = "F8_E4M3" if scheme.kind == "fp8" else "I8", scale_shapes(scheme, out, columns)
        return {
            "weight": Needed((dtype,), ((out, columns),)),
            "weight_scale": Needed(FLOATS, shapes),
            "weight_zero_point": Needed(("I8", dtype), shapes, optional=scheme.symmetric),
        }

    def parts(self, scheme: StoredScheme, out: int, columns: int, source: Source) -> Parts:
        """See :class:`Layout`."""
        stored, zeros = source("weight").view(torch.uint8), None
        if source.has("weight_zero_point"):
            zeros = source("weight_zero_point").float()
            if scheme.symmetric and bool((zeros != 0).any()):
                raise source.damaged("weight_zero_point", "is not 0, though quantization_config says symmetric")
        if scheme.kind == "int4" and bool((stored.view(torch.int8) + 8 & ~15).any()):
            raise source.damaged("weight", "has values that do not fit into 4 bits")

        def codes(first: int, last: int) -> Tensor:
            return stored[first:last] + 8 if scheme.kind == "int4" else stored[first:last]

        if zeros is not None:
            zeros = None if scheme.symmetric else zeros.reshape(-1, groups_of(scheme, columns)).expand(out, -1)
        return Parts(codes, as_scales(source, "weight_scale"), zeros)


class Fp4(Layout):
    """``weight_packed`` uint8 ``[out, in / 2]``, the lower half first; E4M3 scales over one divisor of the tensor."""

    marker = "weight_packed"
    divisor = "weight_global_scale"

    def tensors(self, scheme: StoredScheme, out: int, columns: int, has: Callable[[str], bool]) -> dict[str, Needed]:
        """See :class:`Layout`."""
        return {
            "weight_packed": Needed(("U8",), ((out, columns // 2),)),
            "weight_scale": Needed(("F8_E4M3",), scale_shapes(scheme, out, columns)),
            self.divisor: Needed(("F32",), ((1,), (), (1, 1))),
        }

    def parts(self, scheme: StoredScheme, out: int, columns: int, source: Source) -> Parts:
        """See :class:`Layout`."""
        stored, divisor = source("weight_packed"), as_scales(source, self.divisor).reshape(())
        if not bool(divisor > 0):
            raise source.damaged(self.divisor, "is not above 0")
        scales = as_scales(source, "weight_scale")
        return Parts(lambda first, last: unpacked(stored[first:last], 4, columns), scales, factor=1 / divisor)


class Mxfp4(Layout):
    """``weight_packed`` uint8 ``[out, in / 2]``, the lower half first; scales are powers of two (E8M0)."""

    marker = "weight_packed"

    def tensors(self, scheme: StoredScheme, out: int, columns: int, has: Callable[[str], bool]) -> dict[str, Needed]:
        """See :class:`Layout`."""
        return {
            "weight_packed": Needed(("U8",), ((out, columns // 2),)),
            "weight_scale": Needed(("U8", "F8_E8M0"), scale_shapes(scheme, out, columns)),
        }

    def parts(self, scheme: StoredScheme, out: int, columns: int, source: Source) -> Parts:
        """See :class:`Layout`."""
        stored, scales = source("weight_packed"), as_scales(source, "weight_scale")
        return Parts(lambda first, last: unpacked(stored[first:last], 4, columns), scales)


class Mxfp8(Layout):
    """``weight`` float8 ``[out, in]``; scales are powers of two (E8M0)."""

    marker = "weight"

    def tensors(self, scheme: StoredScheme, out: int, columns: int, has: Callable[[str], bool]) -> dict[str, Needed]:
        """See :class:`Layout`."""
        return {
            "weight": Needed(("F8_E4M3",), ((out, columns),)),
            "weight_scale": Needed(("U8", "F8_E8M0"), scale_shapes(scheme, out, columns)),
        }

    def parts(self, scheme: StoredScheme, out: int, columns: int, source: Source) -> Parts:
        """See :class:`Layout`."""
        stored = source("weight").view(torch.uint8)
        return Parts(lambda first, last: stored[first:last], as_scales(source, "weight_scale"))
