"""Writers of quantised matrices, from the descriptions of the formats and number by number.

Nothing of octo-run is used. Each takes a matrix ``[out, in]`` and returns its tensors, by their names behind the
layer's, and the values that they stand for in float64.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[Any]
Written = tuple[dict[str, Tensor], Matrix]
Writer = Callable[[Matrix], Written]

#: Columns at a nibble of a word, from the lowest bits on (AutoAWQ's order_map).
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def e2m1() -> Matrix:
    """The 16 numbers of FP4: a sign, two bits of exponent (bias 1), one of mantissa."""
    found = []
    for code in range(16):
        sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
        size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        found.append(-size if sign else size)
    return np.array(found)


def e4m3() -> Matrix:
    """The 256 numbers of FP8 E4M3 (bias 7, without infinities); 0x7f and 0xff are none."""
    found = []
    for code in range(256):
        sign, exponent, mantissa = code >> 7, (code >> 3) & 15, code & 7
        size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        size = np.nan if code & 127 == 127 else size
        found.append(-size if sign else size)
    return np.array(found)


def nearest(values: Matrix, table: Matrix) -> Matrix:
    """Codes of the nearest numbers of a table."""
    known = np.where(np.isnan(table), np.inf, table)
    return np.stack([np.abs(row[:, None] - known).argmin(1) for row in values]).astype(np.uint8)


def fp8_scales(values: Matrix) -> tuple[Tensor, Matrix]:
    """Numbers rounded to E4M3."""
    codes = nearest(values, e4m3())
    return torch.from_numpy(codes).view(torch.float8_e4m3fn), e4m3()[codes]


def words(codes: Matrix, bits: int) -> Matrix:
    """Codes ``[r, n]`` in int32 words along rows, the first in the lowest bits."""
    count = codes.shape[1]
    found = np.zeros((len(codes), -(-count * bits // 32)), dtype=np.uint64)
    for i in range(count):
        found[:, i * bits // 32] |= codes[:, i].astype(np.uint64) << np.uint64(i * bits % 32)
    return found.astype(np.uint32).view(np.int32)


def spread(values: Matrix, group: int | None, columns: int) -> Matrix:
    """Numbers of groups for each column."""
    return np.repeat(values, group or columns, 1)[:, :columns]


def integers(w: Matrix, bits: int, group: int | None, symmetric: bool, dtype: torch.dtype) -> tuple[Matrix, ...]:
    """Codes 0 to 2^bits - 1 ``[out, in]``, scales (rounded to a dtype) and zeros ``[out, groups]``, and the values."""
    most, half = 2**bits - 1, 2 ** (bits - 1)
    size = group or w.shape[1]
    scales, zeros = [], []
    for first in range(0, w.shape[1], size):
        part = w[:, first : first + size]
        if symmetric:
            scales.append(np.abs(part).max(1) / (half - 1))
            zeros.append(np.full(len(w), half))
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scales.append((high - low) / most)
            zeros.append(np.round(-low / scales[-1]))
    scale = torch.from_numpy(np.stack(scales, 1)).to(dtype).double().numpy()
    zero = np.stack(zeros, 1)
    wide = spread(scale, group, w.shape[1])
    codes = np.clip(np.round(w / wide) + spread(zero, group, w.shape[1]), 0, most).astype(np.uint8)
    return codes, scale, zero, wide * (codes - spread(zero, group, w.shape[1]))


def auto_round(bits: int = 4, group: int | None = 32, *, symmetric: bool = True, less: int = 1) -> Writer:
    """AutoRound's packing after GPTQ: rows of inputs in words, no groups of columns; zeros ``less`` what they are. A
    symmetric scale has the sign of what is largest, so that -8 (or -128) is used."""

    def write(w: Matrix) -> Written:
        if symmetric:
            half, scales = 2 ** (bits - 1), []
            for first in range(0, w.shape[1], group or w.shape[1]):
                part = w[:, first : first + (group or w.shape[1])]
                largest = np.take_along_axis(part, np.abs(part).argmax(1)[:, None], 1)[:, 0]
                scales.append(-largest / half)
            scale = torch.from_numpy(np.stack(scales, 1)).half().double().numpy()
            zero, wide = np.full(scale.shape, half), spread(scale, group, w.shape[1])
            codes = np.clip(np.round(w / wide) + half, 0, 2 * half - 1)
            codes, values = codes.astype(np.uint8), wide * (codes - half)
        else:
            codes, scale, zero, values = integers(w, bits, group, False, torch.float16)
        stored = (zero - less) % 2**bits
        return {
            "qweight": torch.from_numpy(words(codes, bits).T.copy()),
            "qzeros": torch.from_numpy(words(stored.T.astype(np.uint8), bits)),
            "scales": torch.from_numpy(scale.T.copy()).half(),
        }, values

    return write


def gptq(
    bits: int = 4, group: int | None = 32, *, symmetric: bool = True, act_order: bool = False, version: int = 1
) -> Writer:
    def write(w: Matrix) -> Written:
        columns = w.shape[1]
        place = np.arange(columns) // (group or columns)
        if act_order:
            np.random.default_rng(columns).shuffle(place)
        order = np.argsort(place, kind="stable")
        codes, scale, zero, sorted_values = integers(w[:, order], bits, group, symmetric, torch.float16)
        natural, values = np.empty_like(codes), np.empty_like(w)
        natural[:, order], values[:, order] = codes, sorted_values
        stored = (zero - 1) % 2**bits if version == 1 else zero
        return {
            "qweight": torch.from_numpy(words(natural, bits).T.copy()),
            "qzeros": torch.from_numpy(words(stored.T.astype(np.uint8), bits)),
            "scales": torch.from_numpy(scale.T.copy()).half(),
            "g_idx": torch.from_numpy(place.astype(np.int32)),
        }, values

    return write


def awq(group: int | None = 64, *, symmetric: bool = False) -> Writer:
    def write(w: Matrix) -> Written:
        codes, scale, zero, values = integers(w, 4, group, symmetric, torch.float16)

        def packed(columns: Matrix) -> Tensor:  # [n, out] -> [n, out / 8]
            shuffled = columns.reshape(len(columns), -1, 8)[..., AWQ_ORDER].reshape(len(columns), -1)
            return torch.from_numpy(words(shuffled, 4))

        return {
            "qweight": packed(codes.T),
            "qzeros": packed(zero.T.astype(np.uint8)),
            "scales": torch.from_numpy(scale.T.copy()).half(),
        }, values

    return write


def ct_packed(
    bits: int = 4, group: int | None = 32, *, symmetric: bool = True, act_order: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Writer:  # fmt: skip
    def write(w: Matrix) -> Written:
        columns = w.shape[1]
        place = np.arange(columns) // (group or columns)
        if act_order:
            np.random.default_rng(columns).shuffle(place)
        order = np.argsort(place, kind="stable")
        codes, scale, zero, sorted_values = integers(w[:, order], bits, group, symmetric, dtype)
        natural, values = np.empty_like(codes), np.empty_like(w)
        natural[:, order], values[:, order] = codes, sorted_values
        tensors = {
            "weight_packed": torch.from_numpy(words(natural, bits)),
            "weight_scale": torch.from_numpy(scale).to(dtype),
            "weight_shape": torch.tensor(w.shape),
        }
        if act_order:
            tensors["weight_g_idx"] = torch.from_numpy(place.astype(np.int32))
        if not symmetric:
            tensors["weight_zero_point"] = torch.from_numpy(words(zero.T.astype(np.uint8), bits).T.copy())
        return tensors, values

    return write


def ct_int8(group: int | None = None, *, symmetric: bool = True) -> Writer:
    def write(w: Matrix) -> Written:
        codes, scale, zero, values = integers(w, 8, group, symmetric, torch.bfloat16)
        tensors = {
            "weight": torch.from_numpy((codes.astype(np.int16) - 128).astype(np.int8)),
            "weight_scale": torch.from_numpy(scale).bfloat16(),
        }
        if not symmetric:
            tensors["weight_zero_point"] = torch.from_numpy((zero - 128).astype(np.int8))
        return tensors, values

    return write


def fp8(
    rows: int | None, columns: int | None, name: str = "weight_scale", dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] | None = None,
) -> Writer:  # fmt: skip
    """A scale for every block of so many rows and columns (None: all)."""

    def write(w: Matrix) -> Written:
        high, wide = rows or len(w), columns or w.shape[1]
        scale = np.zeros((-(-len(w) // high), -(-w.shape[1] // wide)))
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                block = w[i * high : (i + 1) * high, j * wide : (j + 1) * wide]
                scale[i, j] = np.abs(block).max() / 448
        if dtype == torch.float8_e8m0fnu:
            scale = 2.0 ** np.ceil(np.log2(scale))
        stored = torch.from_numpy(scale).to(dtype)
        scale = stored.double().numpy()
        full = np.repeat(np.repeat(scale, high, 0), wide, 1)[: len(w), : w.shape[1]]
        codes = nearest(w / full, e4m3())
        stored = stored if shape is None else stored.reshape(shape)
        return {"weight": torch.from_numpy(codes).view(torch.float8_e4m3fn), name: stored}, e4m3()[codes] * full

    return write


def _pairs(codes: Matrix) -> Tensor:
    return torch.from_numpy(codes[:, ::2] | (codes[:, 1::2] << 4))


def _fp4_codes(w: Matrix, scale: Matrix, group: int) -> tuple[Matrix, Matrix]:
    full = spread(scale, group, w.shape[1])
    codes = nearest(w / np.where(full == 0, 1, full), e2m1())
    return codes, e2m1()[codes] * full


def _amax(w: Matrix, group: int) -> Matrix:
    return np.abs(w.reshape(len(w), -1, group)).max(-1)


def nvfp4(modelopt: bool = False) -> Writer:
    """The scale of the tensor is a divisor in compressed-tensors, a factor in ModelOpt."""

    def write(w: Matrix) -> Written:
        factor = np.float32(np.abs(w).max() / (6 * 448)) if modelopt else 1 / np.float32(6 * 448 / np.abs(w).max())
        local, rounded = fp8_scales(_amax(w, 16) / 6 / float(factor))
        codes, values = _fp4_codes(w, rounded * float(factor), 16)
        if modelopt:
            whole = torch.tensor(float(factor))
            return {"weight": _pairs(codes), "weight_scale": local, "weight_scale_2": whole}, values
        whole = torch.tensor([1 / float(factor)])
        return {"weight_packed": _pairs(codes), "weight_scale": local, "weight_global_scale": whole}, values

    return write


def _exponents(w: Matrix, largest: float) -> Matrix:
    return np.floor(np.log2(_amax(w, 32) / largest)).astype(int) + 1 + 127


def mxfp4(blocks: bool = False) -> Writer:
    def write(w: Matrix) -> Written:
        stored = _exponents(w, 6.0)
        codes, values = _fp4_codes(w, 2.0 ** (stored - 127), 32)
        packed, scale = _pairs(codes), torch.from_numpy(stored.astype(np.uint8))
        if blocks:
            return {"weight_blocks": packed.view(len(w), -1, 16), "weight_scales": scale}, values
        return {"weight_packed": packed, "weight_scale": scale}, values

    return write


def mxfp8(w: Matrix) -> Written:
    stored = _exponents(w, 448.0)
    full = spread(2.0 ** (stored - 127), 32, w.shape[1])
    codes = nearest(w / full, e4m3())
    scale = torch.from_numpy(stored.astype(np.uint8))
    return {"weight": torch.from_numpy(codes).view(torch.float8_e4m3fn), "weight_scale": scale}, e4m3()[codes] * full
