"""Triton kernels of the small operations of a step. Rounding to the compute dtype happens where PyTorch rounds.

EARLY: the kernel is launched as a programmatic dependent one: it may begin before the kernel in front of it has ended,
fetches weights, and waits only then; its own successor may begin at once, and waits in turn.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def add_rms_norm_kernel(
    X, RESIDUAL, WEIGHT, OUT, eps, N: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr
):
    """One row of N numbers a program."""
    kind = OUT.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * N
    at = tl.arange(0, BLOCK)
    inside = at < N
    weight = tl.load(WEIGHT + at, mask=inside, other=0).to(tl.float32)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(X + row + at, mask=inside, other=0).to(tl.float32)
    if ADD:
        x = (x + tl.load(RESIDUAL + row + at, mask=inside, other=0).to(tl.float32)).to(kind)
        tl.store(RESIDUAL + row + at, x, mask=inside)
        x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / N + eps)
    normed = (x * scale).to(kind).to(tl.float32)
    tl.store(OUT + row + at, (weight * normed).to(kind), mask=inside)


@triton.jit
def swiglu_kernel(GATE_UP, OUT, n, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """The program is (part of a row, row)."""
    kind = OUT.dtype.element_ty
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(GATE_UP + row * 2 * n + at, mask=at < n, other=0).to(tl.float32)
    up = tl.load(GATE_UP + row * 2 * n + n + at, mask=at < n, other=0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(OUT + row * n + at, (silu * up).to(kind), mask=at < n)


@triton.jit
def _normed(x, other, WEIGHT, column, partner, inside, eps, kind: tl.constexpr, D: tl.constexpr):
    """Columns and their partners of heads [rows, D], normed."""
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    weight = tl.load(WEIGHT + column, mask=inside, other=0).to(tl.float32)[None, :]
    weight_other = tl.load(WEIGHT + partner, mask=inside, other=0).to(tl.float32)[None, :]
    x = (weight * (x * scale).to(kind).to(tl.float32)).to(kind).to(tl.float32)
    other = (weight_other * (other * scale).to(kind).to(tl.float32)).to(kind).to(tl.float32)
    return x, other


@triton.jit
def qkv_rope_append_kernel(
    QKV, COS, SIN, Q_NORM, K_NORM, ROTATION, V_ROTATION, ROWS, SLOTS, K, V, Q, eps,
    sk_r, sk_h, sk_t, sv_r, sv_h, sv_t,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
    NORM: tl.constexpr, ROTATE: tl.constexpr, ROTATE_V: tl.constexpr, MAPPED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The program is (HEADS heads, of q, k and v alike; COLUMNS columns of the result; number in the batch). MAPPED: K
    and V go to row ROWS[number], nowhere if it is negative."""
    kind = QKV.dtype.element_ty
    HALF: tl.constexpr = D // 2
    row = tl.program_id(2).to(tl.int64)
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BD)
    inside = column < D
    partner = tl.where(column < HALF, column + HALF, column - HALF)
    source = QKV + (row * (H + 2 * HKV) + head[:, None]) * D
    out = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    kept = out < D
    into = column[:, None] * D + out[None, :]
    if ROTATE:
        part = tl.load(ROTATION + into, mask=inside[:, None] & kept[None, :], other=0)
    if ROTATE_V:
        part_v = tl.load(V_ROTATION + into, mask=inside[:, None] & kept[None, :], other=0)
    target = row
    if MAPPED:
        target = tl.load(ROWS + row).to(tl.int64)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    there = (head < H + 2 * HKV)[:, None] & inside[None, :]
    raw = tl.load(source + column[None, :], mask=there, other=0)
    x = raw.to(tl.float32)
    other = tl.load(source + partner[None, :], mask=there, other=0).to(tl.float32)
    if NORM:
        xq, oq = _normed(x, other, Q_NORM, column, partner, inside, eps, kind, D)
        xk, ok = _normed(x, other, K_NORM, column, partner, inside, eps, kind, D)
        x = tl.where((head < H)[:, None], xq, xk)
        other = tl.where((head < H)[:, None], oq, ok)
    angle = tl.where(column < HALF, column, column - HALF)
    cos = tl.load(COS + row * HALF + angle, mask=inside, other=0).to(tl.float32)[None, :]
    sin = tl.load(SIN + row * HALF + angle, mask=inside, other=0).to(tl.float32)[None, :]
    here = (x * cos).to(kind).to(tl.float32)
    there_part = (other * sin).to(kind).to(tl.float32)
    turned = tl.where((column < HALF)[None, :], here - there_part, here + there_part).to(kind)
    if ROTATE:
        result = tl.dot(turned, part, input_precision="ieee").to(kind)
        place = out
        mine = kept
    else:
        result = turned
        place = column
        mine = column + tl.program_id(1) * BD < D  # the first program has all columns already
    slot = tl.load(SLOTS + row).to(tl.int64)
    tl.store(Q + (row * H + head[:, None]) * D + place[None, :], result, mask=(head < H)[:, None] & mine[None, :])
    k_head = (head - H).to(tl.int64)
    is_k = (head >= H) & (head < H + HKV)
    v_head = k_head - HKV
    is_v = (head >= H + HKV) & (head < H + 2 * HKV)
    if ROTATE_V:
        value = tl.dot(raw, part_v, input_precision="ieee").to(kind)
    else:
        value = tl.load(source + out[None, :], mask=is_v[:, None] & kept[None, :], other=0)
    if target >= 0:
        to_k = K + target * sk_r + k_head[:, None] * sk_h + slot * sk_t + place[None, :]
        tl.store(to_k, result, mask=is_k[:, None] & mine[None, :])
        to_v = V + target * sv_r + v_head[:, None] * sv_h + slot * sv_t + out[None, :]
        tl.store(to_v, value, mask=is_v[:, None] & kept[None, :])


@triton.jit
def rotate_back_kernel(
    X, ROTATION, OUT, n, D: tl.constexpr, BD: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """HEADS of the n heads X [n, D] times the transpose of ROTATION [D, D]; the program is (heads; COLUMNS columns)."""
    head = tl.program_id(0).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BD)
    inside = column < D
    out = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    kept = out < D
    part = tl.load(ROTATION + out[None, :] * D + column[:, None], mask=inside[:, None] & kept[None, :], other=0)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    there = (head < n)[:, None]
    x = tl.load(X + head[:, None] * D + column[None, :], mask=there & inside[None, :], other=0)
    result = tl.dot(x, part, input_precision="ieee").to(OUT.dtype.element_ty)
    tl.store(OUT + head[:, None] * D + out[None, :], result, mask=there & kept[None, :])


@triton.jit
def vector_kernel(
    X, WEIGHT, BIAS, OUT, n, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BIASED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """BN outputs of a matrix-vector product a program: x [K], weights [n, K], sums in float32."""
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    source = WEIGHT + at.to(tl.int64)[:, None] * K + k[None, :]
    there = (at < n)[:, None]
    weights = tl.load(source, mask=there & (k < K)[None, :], other=0, eviction_policy="evict_first")
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros([BN, BK], tl.float32)
    for first in range(0, K, BK):
        x = tl.load(X + first + k, mask=first + k < K, other=0).to(tl.float32)
        following = first + BK
        mask = there & (following + k < K)[None, :]
        ahead = tl.load(source + following, mask=mask, other=0, eviction_policy="evict_first")
        total += weights.to(tl.float32) * x[None, :]
        weights = ahead
    result = tl.sum(total, 1)
    if BIASED:
        result += tl.load(BIAS + at, mask=at < n, other=0).to(tl.float32)
    tl.store(OUT + at, result.to(OUT.dtype.element_ty), mask=at < n)
