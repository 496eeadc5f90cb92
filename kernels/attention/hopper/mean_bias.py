"""What the key mean adds to the logits of a page, for the table-decode kernel, lane by lane (`key_mean`).

Two matrix products. The first one makes the components of the next four pages of a warp: of each half page and head, by
how much the logits follow each function of the offset (`angle_tables`). Its rows are functions and heads, and hold the
query's coefficients times the functions' weights, the same for all pages; K runs over cosines and sines of the
frequencies; the columns are eight half pages. The second one, page by page, multiplies components with the values of
the functions at the 32 offsets: 16 slots, which are the functions, and what rounding to fp16 leaves of the first one's
component, the constant. Its rows are the offsets, column 2 t + h is head t in half h, so that the sums are where the
logits are.

Operands of the first product are tiles of four slots and four heads, for steps of eight frequencies: tile 0 for all
steps, tile 1 for the fast ones, tiles 2 and 3 for the fastest.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from octo_run.kernels.attention.angle_tables import fastest_steps
from octo_run.kernels.lanes import (
    high_half,
    load_global4,
    low_half,
    mma_half,
    pack_half_finite,
    read_shared2,
    read_shared4,
    read_shared4_at,
    repeat,
    u32,
    write_shared4_of,
)

PAGES_AT_ONCE = gl.constexpr(4)
"""Of a warp, whose components are made together; a divisor of it where there is little room."""
PAGE_BYTES = gl.constexpr(256)
"""Of a page's components for four heads."""
_fastest = constexpr_function(fastest_steps)


@constexpr_function
def _steps(head_dim):
    """Steps of eight frequencies."""
    return int(head_dim) // 16


@constexpr_function
def _chains(head_dim, blocks):
    """Sums that the first tile's products are divided into; those of two blocks are under way together."""
    return max(2, int(_steps(head_dim)) // (2 * int(blocks)))


@constexpr_function
def _tiles(head_dim, fast):
    """Operands of the first product for four heads."""
    return int(_steps(head_dim)) + int(fast) + 2 * int(_fastest(fast))


@constexpr_function
def operand_bytes(head_dim, blocks, fast):
    """Shared memory for the operands of the first product."""
    return int(blocks) * int(_tiles(head_dim, fast)) * 512


@constexpr_function
def pages_ahead(tight):
    """Pages whose components the table kernel makes together."""
    return int(PAGES_AT_ONCE) // 2 if tight else int(PAGES_AT_ONCE)


@constexpr_function
def page_apart(tight):
    """Bytes from a page's components to the next one's in the table kernel, for four heads: with what keeps them in
    other banks, if there is room."""
    return int(PAGE_BYTES) + (0 if tight else 16)


@constexpr_function
def component_bytes(blocks, pages, page_bytes):
    """Shared memory of a warp for the components of its next pages, so many bytes a page and four heads."""
    return int(blocks) * int(pages) * int(page_bytes)


@constexpr_function
def mean_bytes(head_dim, blocks, warps, fast, pages, page_bytes):
    """Shared memory for the key mean; see `component_bytes`."""
    return int(operand_bytes(head_dim, blocks, fast)) + int(warps) * int(component_bytes(blocks, pages, page_bytes))


@gluon.jit
def _floats(words):
    """Registers as float32 numbers."""
    out = ()
    for i in gl.static_range(len(words)):
        out = out + (words[i].to(gl.float32, bitcast=True),)
    return out


@gluon.jit
def _place(n, D: gl.constexpr, FAST: gl.constexpr):
    """Tile and step of operand n."""
    STEPS: gl.constexpr = _steps(D)
    FASTEST: gl.constexpr = _fastest(FAST)
    beyond = n - STEPS - FAST
    tile = gl.where(n < STEPS, 0, gl.where(beyond < 0, 1, 2 + beyond // FASTEST))
    return tile, gl.where(n < STEPS, n, gl.where(beyond < 0, n - STEPS, beyond % FASTEST))


@gluon.jit
def _load_operands(
    coef_row, stride_h, weights_ptr, lane, warp, first_head, D: gl.constexpr, G: gl.constexpr, NT: gl.constexpr,
    FAST: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """What the warp's operands of the first product are made of: weights and, for each block of heads, coefficients."""
    TILES: gl.constexpr = _tiles(D, FAST)
    g = lane >> 2
    t = lane & 3
    out = ()
    for c in gl.static_range((TILES + WARPS - 1) // WARPS):
        tile, step = _place(gl.minimum(c * WARPS + warp % WARPS, TILES - 1), D, FAST)
        parts = ()
        for b in gl.static_range(NT):
            row = coef_row + gl.minimum(first_head + 4 * b + (g & 3), G - 1) * stride_h + step * 8 + t
            four = (gl.load(row), gl.load(row + D // 2), gl.load(row + 4), gl.load(row + (4 + D // 2)))
            parts = parts + (four,)
        words = load_global4(weights_ptr + (((step * 4 + tile) * 2 + (g >> 2)) * 4 + t) * 4)
        out = out + ((words, parts),)
    return out


@gluon.jit
def write_operands(
    coef_row, stride_h, weights_ptr, lane, warp, first_head, scale_log2, AT: gl.constexpr, D: gl.constexpr,
    G: gl.constexpr, NT: gl.constexpr, FAST: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The operands of the first product, in the unit of the logits, to byte AT of shared memory, tile by tile. WARPS
    warps share the work; what others do is what one of these does."""
    loaded = _load_operands(coef_row, stride_h, weights_ptr, lane, warp, first_head, D, G, NT, FAST, WARPS)
    TILES: gl.constexpr = _tiles(D, FAST)
    g = lane >> 2
    for c in gl.static_range((TILES + WARPS - 1) // WARPS):
        n = gl.minimum(c * WARPS + warp % WARPS, TILES - 1)
        tile, _step = _place(n, D, FAST)
        weights = _floats(loaded[c][0])
        constant = (tile == 0) & (g < 4)  # its second slot: what rounding leaves of the first one
        for b in gl.static_range(NT):
            words = ()
            for i in gl.static_range(2):
                cos_part = loaded[c][1][b][2 * i] * scale_log2
                sin_part = loaded[c][1][b][2 * i + 1] * scale_log2
                even = weights[2 * i + 1]
                odd = weights[2 * i]
                left = cos_part * even
                right = sin_part * even
                first = pack_half_finite(gl.where(constant, left, sin_part * odd),
                                         gl.where(constant, right, -cos_part * odd))  # fmt: skip
                left_rest = left - low_half(first)
                right_rest = right - high_half(first)
                second = pack_half_finite(gl.where(constant, left_rest, left), gl.where(constant, right_rest, right))
                words = words + (first, second)
            write_shared4_of(u32(AT + (b * TILES + n) * 512 + lane * 16), words[0], words[1], words[2], words[3])


@gluon.jit
def load_angles(angles_ptr, page, last, lane, D: gl.constexpr, WARPS: gl.constexpr, PAGES: gl.constexpr):
    """The other operand of the first product: cosines and sines of PAGES pages of a warp from ``page`` on, those of
    fewer than four again and again."""
    CHUNKS: gl.constexpr = (_steps(D) + 1) // 2
    there = gl.minimum(page + (lane >> 3) % PAGES * WARPS, last) * 2 + (lane >> 2 & 1)
    row = angles_ptr + there * (CHUNKS * 16) + (lane & 3) * 4
    words = ()
    for c in gl.static_range(CHUNKS):
        words = words + load_global4(row + c * 16)
    return words


@gluon.jit
def _sum(sums, angles, at, OFFSET: gl.constexpr, FIRST: gl.constexpr, END: gl.constexpr, BY: gl.constexpr):
    """The sums and every BY-th product from step FIRST, whose operand is OFFSET bytes behind ``at``, on."""
    for step in gl.static_range(FIRST, END, BY):
        r0, r1, r2, r3 = read_shared4_at(at, OFFSET + (step - FIRST) * 512)
        sums = mma_half(sums, r0, r1, r2, r3, angles[2 * step], angles[2 * step + 1], "f16")
    return sums


@gluon.jit
def _all_sums(angles, at, OFFSET: gl.constexpr, D: gl.constexpr, FAST: gl.constexpr, CHAINS: gl.constexpr):
    """The components of four heads, tile by tile; tile 0 by sums of CHAINS chains, as a product waits for the one
    before it."""
    STEPS: gl.constexpr = _steps(D)
    FASTEST: gl.constexpr = _fastest(FAST)
    zero = repeat((at * 0).to(gl.float32), 4)
    four = _sum(zero, angles, at, OFFSET, 0, STEPS, CHAINS)
    for chain in gl.static_range(1, CHAINS):
        more = _sum(zero, angles, at, OFFSET + chain * 512, chain, STEPS, CHAINS)
        both = ()
        for i in gl.static_range(4):
            both = both + (four[i] + more[i],)
        four = both
    sums = (four, _sum(zero, angles, at, OFFSET + STEPS * 512, 0, FAST, 1))
    for tile in gl.static_range(2):
        sums = sums + (_sum(zero, angles, at, OFFSET + (STEPS + FAST + tile * FASTEST) * 512, 0, FASTEST, 1),)
    return sums


@gluon.jit
def make_components(
    angles, stage, lane, AT: gl.constexpr, D: gl.constexpr, NT: gl.constexpr, FAST: gl.constexpr, PAGES: gl.constexpr,
    PAGE: gl.constexpr, behind=0,
):  # fmt: skip
    """The components of PAGES pages, to the warp's stage in shared memory: the operands of the second product, PAGE
    bytes a page and four heads. What comes next is to synchronise the warp. ``behind``: bytes from AT on to where the
    operands of these heads begin."""
    TILES: gl.constexpr = _tiles(D, FAST)
    g = lane >> 2
    constant = g < 4
    to = stage + u32((lane & (PAGES - 1)) * (NT * PAGE) + (g & 3) * (64 * NT) + (g >> 2) * (16 * NT))
    at = u32(lane * 16 + behind)
    sums = ()
    for b in gl.static_range(NT):
        sums = sums + (_all_sums(angles, at, AT + b * TILES * 512, D, FAST, _chains(D, NT)),)
    for half in gl.static_range(2):
        words = ()
        for b in gl.static_range(NT):
            # Slot 1: what rounding leaves of slot 0, whose coefficients have a rest of their own.
            first = sums[b][0][half]
            rest = first - low_half(pack_half_finite(first, first))
            second = sums[b][0][2 + half] + gl.where(constant, rest, 0.0)
            four = (pack_half_finite(first, second),)
            for tile in gl.static_range(1, 4):
                four = four + (pack_half_finite(sums[b][tile][half], sums[b][tile][2 + half]),)
            words = words + (four,)
        if NT == 1:
            write_shared4_of(to + half * 32, words[0][0], words[0][1], words[0][2], words[0][3])
        else:
            write_shared4_of(to + half * 64, words[0][0], words[0][1], words[1][0], words[1][1])
            write_shared4_of(to + (half * 64 + 16), words[0][2], words[0][3], words[1][2], words[1][3])


@gluon.jit
def load_half_of_functions(functions_ptr, lane, half):
    """Half 0 or 1 of `load_functions`."""
    return load_global4(functions_ptr + (half * 128 + lane * 4))


@gluon.jit
def load_functions(functions_ptr, lane):
    """The functions' values at the offsets: the operand of the second product that is the same for all pages."""
    return load_half_of_functions(functions_ptr, lane, 0), load_half_of_functions(functions_ptr, lane, 1)


@gluon.jit
def page_components(at, lane, NT: gl.constexpr):
    """The components of the page that are at ``at``: two registers for each block of heads."""
    gl.static_assert(NT <= 2)
    if NT == 1:
        b0, b1 = read_shared2(at + u32(lane * 8))
        return ((b0, b1),)
    else:
        b0, b1, b2, b3 = read_shared4(at + u32(lane * 16))
        return (b0, b1), (b2, b3)


@gluon.jit
def add_biases(scores, components, functions, more, NT: gl.constexpr):
    """The scores of a page with what the mean adds to them, and with ``more[r]`` in the rows r of all heads: NT tuples
    of 8, token 8 r + g of head 4 b + t."""
    out = ()
    for b in gl.static_range(NT):
        b0, b1 = components[b]
        low = (more[0], more[4], more[1], more[5])
        high = (more[2], more[6], more[3], more[7])
        f = functions[0]
        low = mma_half(low, f[0], f[1], f[2], f[3], b0, b1, "f16")
        f = functions[1]
        high = mma_half(high, f[0], f[1], f[2], f[3], b0, b1, "f16")
        biases = (low[0], low[2], high[0], high[2], low[1], low[3], high[1], high[3])
        eight = ()
        for r in gl.static_range(8):
            eight = eight + (scores[b][r] + biases[r],)
        out = out + (eight,)
    return out
