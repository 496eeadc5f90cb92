"""Codes to tensor-core operands, lane by lane: two neighbouring codes of a row to a register of two 16-bit floats.

Codes become small whole numbers or, for floating-point codes, numbers of the right mantissa and an exponent that a
factor mends: exact in either case. The tricks on bits are those of "Marlin" (Frantar et al. 2024, section 3.4): a mask
puts the code into the mantissa of a power of two.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from octo_run.kernels.lanes import fma_half2


@constexpr_function
def steps_of_word(bits):
    """Steps of a tensor-core product that a register of codes has a lane's columns for."""
    return 8 // int(bits)


@constexpr_function
def excess(kind, element):
    """What the numbers of a kind exceed the codes' values by."""
    return {"bf16": 136.0, "f16": 1032.0}[str(element)] if str(kind) == "int4" else 0.0


@constexpr_function
def masks(kind):
    """Constants of a kind that come from registers, as an instruction takes one constant only: two, and two zeros."""
    return {"int4": (0x000F000F, 0, 0, 0), "int8": (0x007F007F, 0x00800080, 0, 0)}.get(str(kind), (0, 0, 0, 0))


@constexpr_function
def _magic(element):
    """Two powers of two whose last mantissa bit is worth 1."""
    return {"bf16": 0x43004300, "f16": 0x64006400}[str(element)]


@constexpr_function
def input_factor(kind, element):
    """Two powers of two that inputs are multiplied by, or 0: bfloat16 of floating-point codes are so small that their
    products would be subnormal."""
    return 0x5F805F80 if str(kind) in ("fp4", "fp8") and str(element) == "bf16" else 0


@constexpr_function
def output_factor(kind, element):
    """What sums of products lack: the exponents of floating-point codes are not those of the 16-bit floats they lie in,
    and inputs may have been multiplied."""
    return {("fp8", "bf16"): 2.0**56, ("fp8", "f16"): 2.0**8, ("fp4", "bf16"): 2.0**62,
            ("fp4", "f16"): 2.0**14}.get((str(kind), str(element)), 1.0)  # fmt: skip


@constexpr_function
def _mantissa_shift(kind, element):
    """How far the bits of exponent and mantissa of a code move up."""
    bits = {"bf16": 7, "f16": 10}[str(element)] - {"fp8": 3, "fp4": 1}[str(kind)]
    return bits


@gluon.jit
def _placed_pair(word, I: gl.constexpr, KIND: gl.constexpr, ELEMENT: gl.constexpr):
    """Pair I of a register of floating-point codes, the bits of each in their places: less by a factor
    (`output_factor`), and subnormal where the code is."""
    shift: gl.constexpr = _mantissa_shift(KIND, ELEMENT)
    if KIND == "fp8":
        v = word >> (8 * I)
        return ((v << 8) & 0x80008000) | ((v & 0x007F007F) << shift)
    elif ELEMENT == "bf16":  # a product moves the sign and the other bits at once: copies of a code do not overlap
        v = word
        if I >= 2:
            v = word >> 8
        v = (v & (0xF000F << I % 2 * 4)) * ((1 << 12 - I % 2 * 4) + (1 << shift - I % 2 * 4))
        return v & (0x80008000 | (7 << shift) * 0x10001)
    else:
        if shift >= 4 * I:
            bits = word << (shift - 4 * I)
        else:
            bits = word >> (4 * I - shift)
        return ((word << (12 - 4 * I)) & 0x80008000) | (bits & ((7 << shift) * 0x10001))


@gluon.jit
def pair(word, I: gl.constexpr, constants, KIND: gl.constexpr, ELEMENT: gl.constexpr):
    """Pair I of a register of codes, as two 16-bit floats (see ``excess`` and ``output_factor``): of 4-bit codes 4
    pairs, of 8-bit ones 2.

    ``constants``: registers of ``masks``.
    """
    if KIND == "int4":
        return ((word >> (4 * I)) & constants[0]) | _magic(ELEMENT)
    elif KIND == "fp4" or KIND == "fp8":
        return _placed_pair(word, I, KIND, ELEMENT)
    else:
        gl.static_assert(KIND == "int8")
        v = word >> (8 * I)
        if ELEMENT == "bf16":  # 128 + the lower bits, less 128 or, for a negative one, 256
            low = (v & constants[0]) | 0x43004300
            high = (v & constants[1]) | 0x43004300
            return fma_half2(high, word * 0 + 0xBF80BF80, low, ELEMENT)
        else:  # 1024 + 128 + code, less that
            up = ((v & 0x00FF00FF) ^ 0x00800080) | 0x64006400
            return fma_half2(word * 0 + 0x64806480, word * 0 + 0xBC00BC00, up, ELEMENT)
