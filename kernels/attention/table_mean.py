"""What the key mean adds to the logits of a page, for the table-decode kernel, lane by lane (`key_mean`).

One small matrix product: rows are the page's tokens, columns 2 t and 2 t + 1 the heads t and 4 + t, K runs over (A, B)
of the frequencies, of which lane t has those from t D / 8 on.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from octo_run.kernels.lanes import (
    copy16,
    load_global2,
    load_global4,
    mma_half,
    pack_half,
    read_shared4,
    repeat,
    shuffle_f,
    u32,
)


@gluon.jit
def _floats(pointer, COUNT: gl.constexpr):
    """COUNT float32 numbers from ``pointer`` on."""
    out = ()
    if COUNT % 4 == 0:
        for i in gl.static_range(COUNT // 4):
            a, b, c, d = load_global4(pointer + 4 * i)
            out = out + (a, b, c, d)
    else:
        for i in gl.static_range(COUNT // 2):
            a, b = load_global2(pointer + 2 * i)
            out = out + (a, b)
    floats = ()
    for i in gl.static_range(COUNT):
        floats = floats + (out[i].to(gl.float32, bitcast=True),)
    return floats


@gluon.jit
def coefficient_row(coef_ptr, stride_h, lane, first_head, G: gl.constexpr, D: gl.constexpr):
    """Pointer to the lane's A of its column's head."""
    g = lane >> 2
    head = gl.minimum(first_head + (g >> 1) + 4 * (g & 1), G - 1)
    return coef_ptr + head * stride_h + (lane & 3) * (D // 8)


@gluon.jit
def stage_offsets(fragments_ptr, tid, AT: gl.constexpr, D: gl.constexpr, THREADS: gl.constexpr):
    """Start copying the offsets' table, 128 D bytes, to byte AT of shared memory."""
    CHUNKS: gl.constexpr = 8 * D
    for c in gl.static_range((CHUNKS + THREADS - 1) // THREADS):
        chunk = gl.minimum(c * THREADS + tid, CHUNKS - 1)
        copy16(u32(AT + chunk * 16), fragments_ptr + chunk * 4)


@gluon.jit
def add_mean(
    scores, coef, base_ptr, fragments_ptr, page, lane, scale_log2, D: gl.constexpr, NT: gl.constexpr, AT: gl.constexpr,
    STAGED: gl.constexpr,
):  # fmt: skip
    """Scores (NT tuples of 8: token 8 r + g of head 4 b + t) with the mean's part for the sequence's page ``page``.

    STAGED: the offsets' table is at byte AT of shared memory, not at ``fragments_ptr``.
    """
    STEPS: gl.constexpr = D // 16
    t = lane & 3
    angles = base_ptr + page * D + t * (D // 8)
    cos = _floats(angles, D // 8)
    sin = _floats(angles + D // 2, D // 8)
    a = _floats(coef, D // 8)
    b = _floats(coef + D // 2, D // 8)
    ones = cos[0] * 0.0
    operand = ()
    for i in gl.static_range(D // 8):
        turned = a[i] * cos[i] + b[i] * sin[i]
        ones += turned
        operand = operand + (pack_half(turned, b[i] * cos[i] - a[i] * sin[i], "f16"),)
    ones += shuffle_f(ones, lane ^ 1)
    ones += shuffle_f(ones, lane ^ 2)
    even = shuffle_f(ones, t * 8)
    odd = shuffle_f(ones, t * 8 + 4)
    out = repeat((), NT)
    for tile in gl.static_range(4):
        sums = (even, odd, even, odd)
        for step in gl.static_range(STEPS):
            if STAGED:
                a0, a1, a2, a3 = read_shared4(u32(AT + (tile * STEPS + step) * 512 + lane * 16))
            else:
                a0, a1, a2, a3 = load_global4(fragments_ptr + (tile * STEPS + step) * 128 + lane * 4)
            sums = mma_half(sums, a0, a1, a2, a3, operand[2 * step], operand[2 * step + 1], "f16")
        grown = ()
        for n in gl.static_range(NT):
            two = out[n]
            for h in gl.static_range(2):
                two = two + (scores[n][2 * tile + h] + sums[2 * h + n] * scale_log2,)
            grown = grown + (two,)
        out = grown
    return out
