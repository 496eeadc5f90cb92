"""What the key mean adds to the logits of a page, for the table-decode kernel, lane by lane (`key_mean`).

A token of a page lies an offset before or behind a centre. With A and B turned to the centre, tokens have A cos + B sin
and A cos - B sin of the offset: two small matrix products give both terms. Rows are the offsets, K runs over the
frequencies, of which lane t has a run (`LaneTables`). A program with one block of four heads has two centres, column
2 t + c is head t at the centre c; one with two blocks has one centre, and column 2 t + b is head t of block b.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from octo_run.kernels.lanes import (
    copy16,
    mma_half,
    pack_half,
    read_shared4,
    repeat,
    shuffle_f,
    u32,
    write_shared,
)


@constexpr_function
def centres(blocks):
    """Centres of a page for a program with as many blocks of four heads."""
    return 2 // int(blocks)


@constexpr_function
def run_steps(head_dim):
    """Steps of four frequencies in a lane's run."""
    return (int(head_dim) // 8 + 3) // 4


@constexpr_function
def angle_bytes(head_dim, blocks):
    """Of a page: `LaneTables.angles`."""
    return 2 * run_steps(head_dim) * centres(blocks) * 64


@constexpr_function
def mean_bytes(head_dim, blocks, warps):
    """Shared memory for the key mean: offsets, coefficients, a page's angles for each warp."""
    steps = run_steps(head_dim)
    return int(blocks) * 2 * steps * (512 + 4 * 64) + int(warps) * angle_bytes(head_dim, blocks)


@gluon.jit
def stage_offsets(offsets_ptr, tid, AT: gl.constexpr, D: gl.constexpr, NT: gl.constexpr, THREADS: gl.constexpr):
    """Start copying the offsets' table to byte AT of shared memory."""
    CHUNKS: gl.constexpr = NT * 2 * run_steps(D) * 32
    for c in gl.static_range((CHUNKS + THREADS - 1) // THREADS):
        chunk = gl.minimum(c * THREADS + tid, CHUNKS - 1)
        copy16(u32(AT + chunk * 16), offsets_ptr + chunk * 4)


@gluon.jit
def write_coefficients(
    coef_row, stride_h, tid, first_head, AT: gl.constexpr, G: gl.constexpr, D: gl.constexpr, NT: gl.constexpr,
    THREADS: gl.constexpr,
):  # fmt: skip
    """A, then B, of the program's heads to byte AT of shared memory: [2, steps, 4 NT heads, 4 (t), 4]."""
    HEADS: gl.constexpr = 4 * NT
    COUNT: gl.constexpr = D // 8
    ITEMS: gl.constexpr = 2 * run_steps(D) * HEADS * 16
    for c in gl.static_range((ITEMS + THREADS - 1) // THREADS):
        item = gl.minimum(c * THREADS + tid, ITEMS - 1)
        place = item // (16 * HEADS) % run_steps(D) * 4 + item % 4  # in the run
        head = gl.minimum(first_head + item // 16 % HEADS, G - 1)
        column = item // (16 * HEADS * run_steps(D)) * (D // 2) + item // 4 % 4 * COUNT + gl.minimum(place, COUNT - 1)
        value = gl.load(coef_row + head * stride_h + column)
        value = gl.where(place < COUNT, value, 0.0)
        write_shared(u32(AT + item * 4), value.to(gl.uint32, bitcast=True))


@gluon.jit
def fetch_angles(stage, row, lane, D: gl.constexpr, NT: gl.constexpr):
    """Start copying a page's angles to the warp's stage."""
    CHUNKS: gl.constexpr = angle_bytes(D, NT) // 16
    for c in gl.static_range((CHUNKS + 31) // 32):
        chunk = gl.minimum(c * 32 + lane, CHUNKS - 1)
        copy16(stage + u32(chunk * 16), row + chunk * 4)


@gluon.jit
def _four(address):
    """Four float32 numbers."""
    words = read_shared4(address)
    out = ()
    for i in gl.static_range(4):
        out = out + (words[i].to(gl.float32, bitcast=True),)
    return out


@gluon.jit
def read_angles(stage, lane, D: gl.constexpr, NT: gl.constexpr):
    """The lane's cosines, then its sines, of its column's centre."""
    C: gl.constexpr = centres(NT)
    place = (lane >> 2 & 1) * (C - 1) * 4 + (lane & 3)
    out = ()
    for i in gl.static_range(2 * run_steps(D)):
        out = out + _four(stage + u32(i * (C * 64) + place * 16))
    return out


@gluon.jit
def page_biases(angles, lane, OFFSETS_AT: gl.constexpr, COEF_AT: gl.constexpr, D: gl.constexpr, NT: gl.constexpr):
    """What the mean adds to q . k: NT tuples of 8, token 8 r + g of head 4 b + t."""
    STEPS: gl.constexpr = run_steps(D)
    g = lane >> 2
    t = lane & 3
    place = (g >> 1) * 4 + t
    if NT == 2:
        place += (g & 1) * 16
    mass = angles[0] * 0.0
    even_part = ()
    odd_part = ()
    for i in gl.static_range(STEPS):
        a = _four(u32(COEF_AT + i * (NT * 256) + place * 16))
        b = _four(u32(COEF_AT + (STEPS + i) * (NT * 256) + place * 16))
        turned_a = ()
        turned_b = ()
        for n in gl.static_range(4):
            cos = angles[4 * i + n]
            sin = angles[4 * (STEPS + i) + n]
            turned_a = turned_a + (a[n] * cos + b[n] * sin,)
            turned_b = turned_b + (b[n] * cos - a[n] * sin,)
            mass += turned_a[n]
        for n in gl.static_range(2):
            even_part = even_part + (pack_half(turned_a[2 * n], turned_a[2 * n + 1], "f16"),)
            odd_part = odd_part + (pack_half(turned_b[2 * n], turned_b[2 * n + 1], "f16"),)
    mass += shuffle_f(mass, lane ^ 1)
    mass += shuffle_f(mass, lane ^ 2)
    first = shuffle_f(mass, t * 8)
    second = shuffle_f(mass, t * 8 + 4)
    ahead = ()  # of each tile's accumulators: tokens behind the centre, and before it
    before = ()
    for tile in gl.static_range(NT):
        even = (first, second, first, second)
        odd = repeat(mass * 0.0, 4)
        for step in gl.static_range(STEPS):
            at = u32(OFFSETS_AT + (tile * 2 * STEPS + step) * 512 + lane * 16)
            r0, r1, r2, r3 = read_shared4(at)
            even = mma_half(even, r0, r1, r2, r3, even_part[2 * step], even_part[2 * step + 1], "f16")
            r0, r1, r2, r3 = read_shared4(at + STEPS * 512)
            odd = mma_half(odd, r0, r1, r2, r3, odd_part[2 * step], odd_part[2 * step + 1], "f16")
        # Offset g of lane g, behind a centre at a multiple of 16, is of the lane's tokens; before it, of lane 7 - g's.
        plus = ()
        minus = ()
        for i in gl.static_range(4):
            plus = plus + (even[i] + odd[i],)
            minus = minus + (shuffle_f(even[i] - odd[i], lane ^ 28),)
        ahead = ahead + (plus,)
        before = before + (minus,)
    if NT == 1:
        minus = before[0]
        plus = ahead[0]
        return ((minus[2], minus[0], plus[0], plus[2], minus[3], minus[1], plus[1], plus[3]),)
    else:
        out = ()
        for n in gl.static_range(2):
            out = out + ((
                before[1][2 + n], before[1][n], before[0][2 + n], before[0][n],
                ahead[0][n], ahead[0][2 + n], ahead[1][n], ahead[1][2 + n],
            ),)  # fmt: skip
        return out


@gluon.jit
def add_biases(scores, biases, scale_log2, NT: gl.constexpr):
    """Scores with the biases, in the unit of the scores."""
    out = ()
    for n in gl.static_range(NT):
        eight = ()
        for r in gl.static_range(8):
            eight = eight + (scores[n][r] + biases[n][r] * scale_log2,)
        out = out + (eight,)
    return out
