"""Triton kernels of the small operations of a step. Rounding to the compute dtype happens where PyTorch rounds.

EARLY: the kernel is launched as a programmatic dependent one: it may begin before the kernel in front of it has ended,
fetches weights, and waits only then; its own successor may begin at once, and waits in turn.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _times_weight(x, weight, kind: tl.constexpr):
    """What a norm gives times its weight: rounded first if the weight is of the compute dtype, else only then."""
    if weight.dtype == kind:
        return (weight.to(tl.float32) * x.to(kind).to(tl.float32)).to(kind).to(tl.float32)
    return (weight.to(tl.float32) * x).to(kind).to(tl.float32)


@triton.jit
def _row_normed(x, weight, eps, inside, N: tl.constexpr, CENTRED: tl.constexpr, kind: tl.constexpr):
    """The norm of one row of N numbers, 0 beyond them."""
    if CENTRED:
        x = tl.where(inside, x - tl.sum(x, 0) / N, 0.0)
    return _times_weight(x * tl.rsqrt(tl.sum(x * x, 0) / N + eps), weight, kind)


@triton.jit
def add_rms_norm_kernel(
    X, RESIDUAL, WEIGHT, OUT, POST, eps, multiplier, N: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
    NORM: tl.constexpr, POST_NORM: tl.constexpr, SCALED: tl.constexpr, CENTRED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row of N numbers a program."""
    kind = X.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * N
    at = tl.arange(0, BLOCK)
    inside = at < N
    if NORM:
        weight = tl.load(WEIGHT + at, mask=inside, other=0)
    if POST_NORM:
        post = tl.load(POST + at, mask=inside, other=0)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(X + row + at, mask=inside, other=0).to(tl.float32)
    if POST_NORM:
        x = _row_normed(x, post, eps, inside, N, CENTRED, kind)
    if SCALED:
        x = (x * multiplier).to(kind).to(tl.float32)
    if ADD:
        x = (x + tl.load(RESIDUAL + row + at, mask=inside, other=0).to(tl.float32)).to(kind)
        tl.store(RESIDUAL + row + at, x, mask=inside)
        x = x.to(tl.float32)
    if NORM:
        tl.store(OUT + row + at, _row_normed(x, weight, eps, inside, N, CENTRED, kind).to(kind), mask=inside)


@triton.jit
def norm_heads_kernel(X, WEIGHT, eps, s_row, N: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """One row of N numbers a program, in place."""
    kind = X.dtype.element_ty
    row = X + tl.program_id(0).to(tl.int64) * s_row
    at = tl.arange(0, BLOCK)
    inside = at < N
    weight = tl.load(WEIGHT + at, mask=inside, other=0)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(row + at, mask=inside, other=0).to(tl.float32)
    tl.store(row + at, _row_normed(x, weight, eps, inside, N, False, kind).to(kind), mask=inside)


@triton.jit
def angles_kernel(POSITIONS, INV_FREQ, COS, SIN, factor, n, N: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """BLOCK of the N angles of each of n positions a program. No kernel starts before it ends: later ones read the
    angles before they wait."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n * N
    inv_freq = tl.load(INV_FREQ + at % N, mask=inside, other=0.0)
    if EARLY:
        gdc_wait()
    angle = tl.load(POSITIONS + at // N, mask=inside, other=0).to(tl.float32) * inv_freq
    kind = COS.dtype.element_ty
    tl.store(COS + at, (tl.cos(angle) * tl.where(inv_freq > 0, factor, 1.0)).to(kind), mask=inside)
    tl.store(SIN + at, (tl.sin(angle) * factor).to(kind), mask=inside)


@triton.jit
def move_on_kernel(POSITIONS, PLACES, ACTIVE, n, sink, ring, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """BLOCK sequences a program."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    position = tl.load(POSITIONS + at, mask=inside, other=0) + tl.load(ACTIVE + at, mask=inside, other=0)
    tl.store(POSITIONS + at, position, mask=inside)
    tl.store(PLACES + at, tl.where(position < sink, position, (position - sink) % ring + sink), mask=inside)


@triton.jit
def embed_kernel(IDS, TABLE, OUT, scale, N: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """BLOCK numbers of a token's row of N; the program is (token, part of the row)."""
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.load(IDS + tl.program_id(0)).to(tl.int64)
    values = tl.load(TABLE + token * N + at, mask=at < N, other=0).to(tl.float32) * scale
    tl.store(OUT + tl.program_id(0).to(tl.int64) * N + at, values.to(OUT.dtype.element_ty), mask=at < N)


@triton.jit
def embed_packed_kernel(
    IDS, CODES, ROWS, OUT, scale, N: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """BLOCK codes of a token's row of N int8 codes in lane order (`kernels.linear.packed`); the program is (token, part
    of the row)."""
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = at % 128
    # of a block: lane, step, word's place; the second and third code of a word have changed places
    column = at - place + place % 32 // 4 * 16 + place // 32 * 4 + place % 2 * 2 + place % 4 // 2
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.load(IDS + tl.program_id(0)).to(tl.int64)
    codes = tl.load(CODES + token * PADDED + at, mask=at < PADDED, other=0).to(tl.int8, bitcast=True)
    values = (codes.to(tl.float32) * tl.load(ROWS + token)).to(OUT.dtype.element_ty)
    if SCALED:
        values = (values.to(tl.float32) * scale).to(OUT.dtype.element_ty)
    tl.store(OUT + tl.program_id(0).to(tl.int64) * N + column, values, mask=column < N)


@triton.jit
def gate_kernel(X, GATES, n, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """BLOCK of n numbers a program."""
    kind = X.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(GATES + at, mask=at < n, other=0).to(tl.float32)
    x = tl.load(X + at, mask=at < n, other=0).to(tl.float32)
    share = (1.0 / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(X + at, (x * share).to(kind), mask=at < n)


@triton.jit
def swiglu_kernel(GATE_UP, OUT, n, BLOCK: tl.constexpr, GELU: tl.constexpr, EARLY: tl.constexpr):
    """The program is (part of a row, row)."""
    kind = OUT.dtype.element_ty
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(GATE_UP + row * 2 * n + at, mask=at < n, other=0).to(tl.float32)
    up = tl.load(GATE_UP + row * 2 * n + n + at, mask=at < n, other=0).to(tl.float32)
    slope = gate
    if GELU:  # half of 1 + tanh(x) is the logistic function of 2 x
        slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    active = (gate / (1.0 + tl.exp(-slope))).to(kind).to(tl.float32)
    tl.store(OUT + row * n + at, (active * up).to(kind), mask=at < n)


@triton.jit
def _normed(x, other, weight, weight_other, eps, kind: tl.constexpr, D: tl.constexpr):
    """Columns and their partners of heads [rows, D], normed."""
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    return _times_weight(x * scale, weight, kind), _times_weight(other * scale, weight_other, kind)


@triton.jit
def _for_lines(vector, column, wanted, line, LINES: tl.constexpr):
    """Numbers that all lines share, [LINES or 1, columns]. Few lines read them each for itself: threads that bring them
    to each other wait for each other."""
    if LINES > 16:
        found = tl.load(vector + column, mask=wanted, other=0)[None, :]
    else:
        mask = wanted[None, :] & (line >= 0)[:, None]
        found = tl.load(vector + column[None, :] + 0 * line[:, None], mask=mask, other=0)
    return found


@triton.jit
def qkv_rope_append_kernel(
    QKV, COS, SIN, Q_NORM, K_NORM, MAPS, V_ROTATION, MEAN, COEF, ROWS, QUERIES, SLOTS, K, V, Q, eps, n,
    sm_part, sm_h, sk_r, sk_h, sk_t, sv_r, sv_h, sv_t,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr, NORM: tl.constexpr, MAP: tl.constexpr, MAP_V: tl.constexpr, TAKES_MEAN: tl.constexpr,
    MAPPED: tl.constexpr, SCALED: tl.constexpr, NORM_V: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The program is (a KV head's unit; COLUMNS columns of the result; TOKENS numbers of the batch). Units of a KV
    head: HEADS of its query heads at a time, then its keys, then its values; with a mean, the coefficients of HEADS
    query heads at a time, which are all columns of the first program. MAPPED: K and V go to row ROWS[number], nowhere
    if it is negative."""
    kind = QKV.dtype.element_ty
    HALF: tl.constexpr = D // 2
    GROUP: tl.constexpr = H // HKV
    OF_Q: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    UNITS: tl.constexpr = OF_Q + 2 + (OF_Q if TAKES_MEAN else 0)
    h = (tl.program_id(0) // UNITS).to(tl.int64)
    unit = tl.program_id(0) % UNITS
    is_mean = unit >= OF_Q + 2
    if is_mean & (tl.program_id(1) > 0):
        return
    is_q = (unit < OF_Q) | is_mean
    is_k = unit == OF_Q
    line = tl.arange(0, HEADS * TOKENS)
    row = (tl.program_id(2) * TOKENS + line // HEADS).to(tl.int64)
    place = tl.where(is_q, tl.where(is_mean, unit - (OF_Q + 2), unit) * HEADS, 0) + line % HEADS
    real = (row < n) & (place < tl.where(is_q, GROUP, 1))
    # For each line, because the interpreter cannot tell a scalar truth from an integer.
    q_line = unit + 0 * line < OF_Q
    k_line = unit + 0 * line == OF_Q
    head = tl.where(is_q, h * GROUP + place, tl.where(is_k, H + h, H + HKV + h))
    column = tl.arange(0, BD)
    inside = column < D
    partner = tl.where(column < HALF, column + HALF, column - HALF)
    source = QKV + (row * (H + 2 * HKV) + head)[:, None] * D
    there = real[:, None] & inside[None, :]
    out = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    kept = out < D
    into = column[:, None] * D + out[None, :]
    square = inside[:, None] & kept[None, :]
    part = tl.zeros([BD, COLUMNS], kind)
    if MAP:
        keys_too = column[:, None] < tl.where((is_q | is_k) & (unit < OF_Q + 2), D, 0)
        part = tl.load(MAPS + tl.where(is_q, 0, sm_part) + h * sm_h + into, mask=square & keys_too, other=0)
    if MAP_V:
        values = column[:, None] < tl.where(unit == OF_Q + 1, D, 0)
        part += tl.load(V_ROTATION + into, mask=square & values, other=0)
    target = row
    if MAPPED:
        target = tl.load(ROWS + row, mask=row < n, other=-1).to(tl.int64)
    if NORM:
        here_q = column < tl.where(is_q, D, 0)
        here_k = column < tl.where(is_k, D, 0)
        weight = _for_lines(Q_NORM, column, here_q, line, HEADS * TOKENS)
        weight += _for_lines(K_NORM, column, here_k, line, HEADS * TOKENS)
        weight_across = _for_lines(Q_NORM, partner, here_q, line, HEADS * TOKENS)
        weight_across += _for_lines(K_NORM, partner, here_k, line, HEADS * TOKENS)
    if TAKES_MEAN:
        of_mean = column < tl.where(is_mean, D, 0)
        mean = _for_lines(MEAN + h * D, column, of_mean, line, HEADS * TOKENS)
        mean_across = _for_lines(MEAN + h * D, partner, of_mean, line, HEADS * TOKENS)
    # The angles are there since the step or prompt began: `angles_kernel` lets no kernel start before its end.
    angle = row[:, None] * HALF + tl.where(column < HALF, column, column - HALF)[None, :]
    turns = there & (column < tl.where(is_q | is_k, D, 0))[None, :]
    cos = tl.load(COS + angle, mask=turns, other=0).to(tl.float32)
    sin = tl.load(SIN + angle, mask=turns, other=0).to(tl.float32)
    if SCALED:
        scaled = (row < n) & (q_line | (unit + 0 * line >= OF_Q + 2))
        factor = tl.load(QUERIES + row, mask=scaled, other=1.0).to(kind).to(tl.float32)[:, None]
    slot = tl.load(SLOTS + row, mask=row < n, other=0).to(tl.int64)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    stored = (real & (target >= 0))[:, None] & kept[None, :]
    raw = tl.load(source + column[None, :], mask=there, other=0)
    if is_q | is_k:
        x = raw.to(tl.float32)
        other = tl.load(source + partner[None, :], mask=there, other=0).to(tl.float32)
        if NORM:
            x, other = _normed(x, other, weight, weight_across, eps, kind, D)
        low = (column < HALF)[None, :]
        by_cos = (x * cos).to(kind).to(tl.float32)
        by_sin = (other * sin).to(kind).to(tl.float32)
        turned = tl.where(low, by_cos - by_sin, by_cos + by_sin).to(kind)
        if SCALED:
            turned = (turned.to(tl.float32) * factor).to(kind)
        if TAKES_MEAN:  # noqa: SIM102 (a constant of the compilation)
            if is_mean:
                # The partner of each column, turned, makes A of the first half and B of the second (`key_mean`).
                by_cos = (other * cos).to(kind).to(tl.float32)
                by_sin = (x * sin).to(kind).to(tl.float32)
                across = tl.where(low, by_cos + by_sin, by_cos - by_sin).to(kind).to(tl.float32)
                if SCALED:
                    across = (across * factor).to(kind).to(tl.float32)
                straight = turned.to(tl.float32)
                found = tl.where(low, straight * mean + across * mean_across, straight * mean_across - across * mean)
                tl.store(COEF + (row * H + head)[:, None] * D + column[None, :], found, mask=there)
                return
        if MAP:
            result = tl.dot(turned, part, input_precision="ieee").to(kind)
            at = out
            mine_too = kept
        else:
            result = turned
            at = column
            mine_too = column + tl.program_id(1) * BD < D  # the first program has all columns already
        tl.store(
            Q + (row * H + head)[:, None] * D + at[None, :], result, mask=(real & q_line)[:, None] & mine_too[None, :]
        )
        to_k = K + (target * sk_r + h * sk_h + slot * sk_t)[:, None] + at[None, :]
        tl.store(to_k, result, mask=(real & k_line & (target >= 0))[:, None] & mine_too[None, :])
    else:
        if NORM_V:
            wide = raw.to(tl.float32)
            scale = tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)[:, None]
            raw = (wide * scale).to(kind)
        if MAP_V:
            value = tl.dot(raw, part, input_precision="ieee").to(kind)
        else:
            value = tl.load(source + out[None, :], mask=stored, other=0)
            if NORM_V:
                value = (value.to(tl.float32) * scale).to(kind)
        tl.store(V + (target * sv_r + h * sv_h + slot * sv_t)[:, None] + out[None, :], value, mask=stored)


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
