"""Triton kernels that code vectors of the rotated basis in the signed-table trellis formats.

Two steps: `trellis_kernel` finds the codes, signs and norms of vectors, `pack_kernel` puts their bits in the places
that a block of a page has for them. What is computed, with which ties, is said in `codec.trellis`; both agree bit for
bit.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

FAR = tl.constexpr(1 << 29)  # more than any path costs
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken away, it leaves a small float rounded to an integer


@triton.jit
def _triplet(source, i, scale, D: tl.constexpr, SIGNED: tl.constexpr):
    """Triplet i of the vectors at `source`: as it is; in eighths of a step, without the signs if they are
    stored apart; the signs (x lowest)."""
    x = tl.load(source + 3 * i, mask=3 * i < D, other=0.0).to(tl.float32)
    y = tl.load(source + 3 * i + 1, mask=3 * i + 1 < D, other=0.0).to(tl.float32)
    z = tl.load(source + 3 * i + 2, mask=3 * i + 2 < D, other=0.0).to(tl.float32)
    u = _eighths(x, scale)
    v = _eighths(y, scale)
    w = _eighths(z, scale)
    signs = tl.zeros(x.shape, tl.int32)
    if SIGNED:
        signs = (x < 0).to(tl.int32) | ((y < 0).to(tl.int32) << 1) | ((z < 0).to(tl.int32) << 2)
        u = tl.abs(u)
        v = tl.abs(v)
        w = tl.abs(w)
    return x, y, z, u, v, w, signs


@triton.jit
def _eighths(x, scale):
    # The limit keeps the product and the sum apart: fused, they would round once.
    return (tl.minimum(tl.maximum(x * scale, -1020.0), 1020.0) + ROUND) - ROUND


@triton.jit
def _products(x, y, z, signs, values, entry, i, keep, D: tl.constexpr, ENTRIES: tl.constexpr, SIGNED: tl.constexpr):
    """<y, o> of triplets i, float64, o their codewords in half steps; 0 unless `keep`."""
    dots = tl.zeros(entry.shape, tl.float64)
    for c in tl.static_range(3):
        number = tl.load(values + c * ENTRIES + entry)
        if SIGNED:
            number = tl.where(((signs >> c) & 1) != 0, -number, number)
        number = tl.where(keep & (3 * i + c < D), number, 0.0).to(tl.float64)
        dots += (x if c == 0 else (y if c == 1 else z)).to(tl.float64) * number
    return dots


@triton.jit
def _cheapest(source, i, scale, keys, SIGNED: tl.constexpr, CELLS: tl.constexpr, CODES: tl.constexpr,
              COLUMNS: tl.constexpr):  # fmt: skip
    """For triplet i and every pair of states the cheapest code, int32 [vectors, CELLS]: cost in half units * CODES +
    code.

    The keys of all entries are a product of fp16 matrices, exact in float32; see `trellis_tables.search_tables`. The
    tensor core leaves a vector's keys of a column with one thread, which takes their minimum.
    """
    DEPTH: tl.constexpr = 16
    PART: tl.constexpr = 4 * COLUMNS  # keys of a product: few enough for registers
    SIDE: tl.constexpr = COLUMNS // CELLS  # groups of sixteen codes side by side
    ROWS: tl.constexpr = scale.shape[0]
    k = tl.arange(0, DEPTH)[None, :]
    x = tl.load(source[:, None] + 3 * i + k, mask=k < 3, other=0.0).to(tl.float32)
    x = _eighths(x, scale[:, None])
    if SIGNED:
        x = tl.abs(x)
    factors = tl.where(k < 3, x, tl.where(k == 3, 1.0, 1024.0)).to(tl.float16)
    at = keys + tl.arange(0, DEPTH)[:, None] * (CODES * CELLS) + tl.arange(0, PART)[None, :]
    column = tl.arange(0, COLUMNS)[None, :]
    best = tl.full([ROWS, COLUMNS], 0x7FFFFFFF, tl.int32)
    for group in tl.static_range(0, CODES // 16, SIDE):
        least = tl.full([ROWS, COLUMNS], 0x7F800000, tl.int32)  # floats above 0 are in the order of their bits
        for part in tl.static_range(0, 16 * COLUMNS, PART):
            found = tl.dot(factors, tl.load(at + group * 16 * CELLS + part)).to(tl.int32, bitcast=True)
            least = tl.minimum(least, tl.min(tl.reshape(found, [ROWS, PART // COLUMNS, COLUMNS]), 1))
        key = least.to(tl.float32, bitcast=True).to(tl.int32)
        code = (group + column // CELLS) * 16 + (key & 15)
        best = tl.minimum(best, (key >> 4) * CODES + code)
    if SIDE > 1:
        best = tl.min(tl.reshape(best, [ROWS, SIDE, CELLS]), 1)
    return best


@triton.jit
def _moves(cheapest, CODE_BITS: tl.constexpr, STATE: tl.constexpr):
    """The costs as [before, after, row], times the number of states."""
    S: tl.constexpr = 1 << STATE
    cost = (cheapest >> CODE_BITS) << STATE
    return tl.permute(tl.reshape(cost, [cheapest.shape[0], S, S]), [1, 2, 0])


@triton.jit
def _chosen(tile, column, COLUMNS: tl.constexpr):
    """Elements [rows, n] of an integer tile [rows, COLUMNS] in the columns `column` [rows, n]."""
    if COLUMNS >= 32:
        return tl.gather(tile, column, 1)
    else:  # Triton 3.6 cannot gather from narrow tiles
        here = tl.arange(0, COLUMNS)[None, None, :] == column[:, :, None]
        return tl.sum(tl.where(here, tile[:, None, :], 0), 2)


@triton.jit
def _norm_pattern(gain, NORM: tl.constexpr):
    """fp16 bits (int32) of the nearest number whose bits are the top NORM bits of a positive fp16 number, halves up."""
    DROPPED: tl.constexpr = 15 - NORM
    PLACE: tl.constexpr = 13 + DROPPED
    HALF: tl.constexpr = (1 << (PLACE - 1)) - (112 << 23)
    SMALL: tl.constexpr = 1 << (24 - DROPPED)
    single = tl.minimum(tl.maximum(gain.to(tl.float32), 0.0), 65504.0)
    normal = (single.to(tl.int32, bitcast=True) + HALF) >> PLACE
    subnormal = (single * SMALL + 0.5).to(tl.int32)
    number = tl.where(single < 6.103515625e-05, subnormal, normal)
    return tl.minimum(number, (0x7C00 >> DROPPED) - 1) << DROPPED


@triton.jit
def _chain(source, fields, i0, scale, keys, values, D: tl.constexpr, STREAM: tl.constexpr, STATE: tl.constexpr,
           SIGNED: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Search the chain of N slots that begins at triplet i0, write its fields; its part of the gain's sum.

    The path runs from the last slot down to slot 0, once for every start state, the low bits of slot 0's code. Costs
    are integers times the number of states, so that a sum and the state before it are one number to minimise. Tiles
    have the states before and after in front: a thread then has them all, and one start state of a vector.
    """
    S: tl.constexpr = 1 << STATE
    CELLS: tl.constexpr = S * S
    CODE_BITS: tl.constexpr = STREAM - STATE
    CODES: tl.constexpr = 1 << CODE_BITS
    SHORT: tl.constexpr = N * CODE_BITS < 32
    FIRST: tl.constexpr = N if SHORT else 63 // CODE_BITS  # slots whose codes one integer holds
    ENTRIES: tl.constexpr = (1 << (STREAM + STATE)) + (1 << STREAM)
    HISTORY: tl.constexpr = tl.int64 if STATE * N > 32 else tl.int32
    WIDTH: tl.constexpr = 32 if N > 16 else (16 if N > 8 else (8 if N > 4 else (4 if N > 2 else 2)))
    tl.static_assert(N <= 3 * FIRST)
    ROWS: tl.constexpr = scale.shape[0]
    states = tl.arange(0, S)
    cheapest = _cheapest(source, i0 + N - 1, scale, keys, SIGNED, CELLS, CODES, COLUMNS)
    codes = (cheapest & (CODES - 1)).to(tl.int32 if SHORT else tl.int64)
    more = tl.zeros([ROWS, CELLS], tl.int64)
    rest = more
    paths = tl.permute(_moves(cheapest, CODE_BITS, STATE), [1, 2, 0])  # [after, row, start]
    history = states[None, None, :].to(HISTORY) + tl.zeros([S, ROWS, S], HISTORY)
    for step in range(1, N):
        cheapest = _cheapest(source, i0 + N - 1 - step, scale, keys, SIGNED, CELLS, CODES, COLUMNS)
        code = (cheapest & (CODES - 1)).to(codes.dtype)
        if N > FIRST:
            codes |= tl.where(step < FIRST, code << (CODE_BITS * tl.minimum(step, FIRST - 1)), 0)
            second = (step >= FIRST) & (step < 2 * FIRST)
            more |= tl.where(second, code << (CODE_BITS * tl.where(second, step - FIRST, 0)), 0)
            if N > 2 * FIRST:
                rest |= tl.where(step < 2 * FIRST, 0, code << (CODE_BITS * tl.maximum(step - 2 * FIRST, 0)))
        else:
            codes |= code << (CODE_BITS * step)
        move = _moves(cheapest, CODE_BITS, STATE) | states[:, None, None]
        best = tl.min(paths[:, None, :, :] + move[:, :, :, None], 0)
        history |= (best & (S - 1)).to(HISTORY) << (STATE * step)
        paths = best & -S
    same = states[:, None, None] == states[None, None, :]
    closed = tl.min(tl.where(same, paths, 0x7FFFFFFF - (S - 1)), 0)  # [row, start]
    state = tl.min(closed | states[None, :], 1) & (S - 1)
    history = tl.sum(tl.where(states[None, None, :] == state[None, :, None], history, 0), 2)  # [after, row]
    slots = tl.arange(0, WIDTH)[None, :]
    cells = tl.zeros([ROWS, WIDTH], tl.int32)
    for slot in range(N):
        here = tl.sum(tl.where(states[:, None] == state[None, :], history, 0), 0)
        previous = ((here >> (STATE * (N - 1 - slot))) & (S - 1)).to(tl.int32)
        cells = tl.where(slots == slot, ((previous << STATE) | state)[:, None], cells)
        state = previous
    step = tl.maximum(N - 1 - slots, 0)
    held = _chosen(codes, cells, CELLS) >> (CODE_BITS * tl.minimum(step, FIRST - 1))
    if N > FIRST:
        second = (step >= FIRST) & (step < 2 * FIRST)
        held = tl.where(second, _chosen(more, cells, CELLS) >> (CODE_BITS * tl.where(second, step - FIRST, 0)), held)
        if N > 2 * FIRST:
            third = _chosen(rest, cells, CELLS) >> (CODE_BITS * tl.maximum(step - 2 * FIRST, 0))
            held = tl.where(step < 2 * FIRST, held, third)
    code = ((held.to(tl.int32) & (CODES - 1)) << STATE) | (cells & (S - 1))
    i = i0 + slots
    x, y, z, _u, _v, _w, signs = _triplet(source[:, None], i, scale[:, None], D, SIGNED)
    tl.store(fields[:, None] + i, (code | (signs << 10)).to(tl.uint16), mask=slots < N)
    entry = ((cells >> STATE) << STREAM) | code
    return tl.sum(_products(x, y, z, signs, values, entry, i, slots < N, D, ENTRIES, SIGNED), 1)


@triton.jit
def _extra(source, fields, i, scale, values, D: tl.constexpr, STREAM: tl.constexpr, STATE: tl.constexpr,
           SIGNED: tl.constexpr):  # fmt: skip
    """Code triplet i, which stands alone, write its field; its part of the gain's sum."""
    MAIN: tl.constexpr = 1 << (STREAM + STATE)
    ENTRIES: tl.constexpr = MAIN + (1 << STREAM)
    PART: tl.constexpr = 32  # codes at a time
    ROWS: tl.constexpr = scale.shape[0]
    x, y, z, u, v, w, signs = _triplet(source, i, scale, D, SIGNED)
    best = tl.full([ROWS, PART], 0x7FFFFFFF, tl.int32)
    for part in range(0, 1 << STREAM, PART):
        code = part + tl.arange(0, PART)[None, :]
        a = tl.load(values + MAIN + code)
        b = tl.load(values + MAIN + ENTRIES + code)
        c = tl.load(values + MAIN + 2 * ENTRIES + code)
        b = tl.where(3 * i + 1 < D, b, 0.0)
        c = tl.where(3 * i + 2 < D, c, 0.0)
        cost = 2 * (a * a + b * b + c * c) - a * u[:, None] - b * v[:, None] - c * w[:, None]
        best = tl.minimum(best, (cost.to(tl.int32) << STREAM) | code)
    code = tl.min(best, 1) & ((1 << STREAM) - 1)
    tl.store(fields + i, (code | (signs << 10)).to(tl.uint16))
    return _products(x, y, z, signs, values, MAIN + code, i, True, D, ENTRIES, SIGNED)


@triton.jit(do_not_specialize=["pages"])
def trellis_kernel(
    Y, FIELDS, KEYS, VALUES, UNITS, pages, sy_l, sy_n, sy_h, sy_t,
    D: tl.constexpr, CHAINS: tl.constexpr, STREAM: tl.constexpr, STATE: tl.constexpr, SIGNED: tl.constexpr,
    NORM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Y [L, N, H, 64, D] -> FIELDS uint16 [L, N, H, 64, triplets + 1]: code | signs << 10, then the norm's fp16 bits.

    The program is (ROWS vectors, page of a layer, head) with `pages` pages a layer. KEYS, VALUES:
    `trellis_tables.SearchTables`; UNITS float64: 8 sqrt(D), the step, 2 / step; COLUMNS: of the KEYS.
    """
    TRIPLETS: tl.constexpr = (D + 2) // 3
    N: tl.constexpr = TRIPLETS // CHAINS
    WIDTH: tl.constexpr = 64 if D <= 64 else (128 if D <= 128 else (256 if D <= 256 else 512))
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1).to(tl.int64)
    h = tl.program_id(2).to(tl.int64)
    source = Y + (block // pages) * sy_l + (block % pages) * sy_n + h * sy_h + token.to(tl.int64) * sy_t
    tokens = tl.num_programs(0) * ROWS
    fields = FIELDS + ((block * tl.num_programs(2) + h) * tokens + token) * (TRIPLETS + 1)
    axis = tl.arange(0, WIDTH)[None, :]
    numbers = tl.load(source[:, None] + axis, mask=axis < D, other=0.0).to(tl.float64)
    squares = tl.sum(numbers * numbers, 1)
    norm = tl.sqrt(squares)
    far = norm >= 8.673617379884035e-19  # 2^-60
    scale = tl.load(UNITS) / (tl.load(UNITS + 1) * tl.where(far, norm, 1.0))
    scale = tl.where(far, scale, 0.0).to(tl.float32)
    along = tl.zeros([ROWS], tl.float64)
    for chain in range(CHAINS):
        along += _chain(source, fields, chain * N, scale, KEYS, VALUES, D, STREAM, STATE, SIGNED, N, COLUMNS)
    for i in range(CHAINS * N, TRIPLETS):
        along += _extra(source, fields, i, scale, VALUES, D, STREAM, STATE, SIGNED)
    there = far & (along > 0)
    gain = tl.where(there, tl.load(UNITS + 2) * squares / tl.where(there, along, 1.0), 0.0)
    tl.store(fields + TRIPLETS, _norm_pattern(gain, NORM).to(tl.uint16))


@triton.jit(do_not_specialize=["pages", "sources", "words"])
def pack_kernel(FIELDS, PAGES, IDS, INVERSE, pages, sp_page, sp_l, sp_h, at_byte, sources, words, WORDS: tl.constexpr):
    """Write a block: bit b of word w is the bit of FIELDS [L, N, H, sources] that INVERSE [words, 32] names.

    The program is (WORDS words, page of a layer, head); the block begins at byte `at_byte` of the page.
    """
    block = tl.program_id(1).to(tl.int64)
    h = tl.program_id(2).to(tl.int64)
    page = tl.load(IDS + block % pages).to(tl.int64)
    fields = FIELDS + (block * tl.num_programs(2) + h) * sources
    w = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    bit = tl.arange(0, 32)[None, :]
    place = tl.load(INVERSE + w[:, None] * 32 + bit, mask=w[:, None] < words, other=-1)
    field = tl.load(fields + (place >> 4), mask=place >= 0, other=0).to(tl.int32)
    word = tl.sum(((field >> (place & 15)) & 1) << bit, 1)
    target = (PAGES + page * sp_page + (block // pages) * sp_l + h * sp_h + at_byte).to(tl.pointer_type(tl.int32))
    tl.store(target + w, word, mask=w < words)
