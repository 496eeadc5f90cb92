"""The trellis encoder lane by lane (NVIDIA, Gluon): the codes, signs and norms of `triton_trellis.trellis_kernel`.

A warp codes sixteen vectors, lane (g, t) = (lane / 4, lane % 4) has a part of the vectors g and g + 8 ("rows" 0 and 1):

* Keys of table entries are products of fp16 matrices, exact in float32 (`trellis_tables.search_tables`). Sixteen
  products in a row differ in four bits of the code only, so that a lane takes the minimum over these codes of what it
  has.
* The least costs of all pairs of states go through shared memory to the lanes that extend paths: with eight states a
  lane follows the start states 2 t and 2 t + 1, with two states every lane follows both.
* A path's cost is a multiple of sixteen, the low four bits of a sum tell the state before. Those, and the codes of
  pairs of states, are kept in shared memory, eight to a word, until the path's end is known.

No thread waits for another warp after the table of keys has been read.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from octo_run.kernels.lanes import (
    barrier,
    load_global4,
    mma_half_8,
    pack_half,
    read_shared,
    read_shared4,
    repeat,
    shift_pair,
    shuffle,
    sync_warp,
    u32,
    write_shared2,
    write_shared4_of,
)
from octo_run.kernels.page_size import PAGE_TOKENS

LANE_WARPS = PAGE_TOKENS // 16
"""Warps of a program, which has the tokens of a page."""


@constexpr_function
def move_words(state):
    """Words from one vector's costs of state pairs to the next one's: such that writes meet in no bank."""
    return 72 if int(state) == 3 else 4


@constexpr_function
def code_words(state):
    """Words of one slot's codes for all pairs of states of a vector: eight codes of four bits in each, or one."""
    return 8 if int(state) == 3 else 4


@constexpr_function
def warp_words(state, chain):
    """Words of shared memory of a warp: costs of one slot, codes of all slots, states before of all but the first."""
    return 16 * (move_words(state) + int(chain) * code_words(state) + (int(chain) - 1) * (1 << int(state)))


@constexpr_function
def key_words(stream, state):
    """Words of the table of keys: four planes of pairs for every entry."""
    return 4 << (int(stream) + int(state))


@gluon.jit
def _eighths(x, scale):
    # The limit keeps the product and the sum apart: fused, they would round once.
    return (gl.minimum(gl.maximum(x * scale, -1020.0), 1020.0) + 12582912.0) - 12582912.0


@gluon.jit
def _raw(rows, i, t, D: gl.constexpr):
    """The lane's numbers of triplet i of both rows: lane 0 has x and y, lane 1 has z."""
    out = ()
    for r in gl.static_range(2):
        first = 3 * i + 2 * t
        x = gl.load(rows[r] + first, mask=(t < 2) & (first < D), other=0.0).to(gl.float32)
        y = gl.load(rows[r] + (3 * i + 1), mask=(t == 0) & (3 * i + 1 < D), other=0.0).to(gl.float32)
        out = out + (x, y)
    return out


@gluon.jit
def _factors(raw, scales, t, SIGNED: gl.constexpr):
    """The A operand: planes x, y, z, 1, 1024, 1024, 0, 0 of both rows."""
    out = ()
    for r in gl.static_range(2):
        x = _eighths(raw[2 * r], scales[r])
        y = _eighths(raw[2 * r + 1], scales[r])
        if SIGNED:
            x = gl.maximum(x, -x)
            y = gl.maximum(y, -y)
        low = gl.where(t < 2, x, gl.where(t == 2, 1024.0, 0.0))
        high = gl.where(t == 0, y, gl.where(t == 1, 1.0, gl.where(t == 2, 1024.0, 0.0)))
        out = out + (pack_half(low, high, "f16"),)
    return out


@gluon.jit
def _tiles(at):
    """The lane's part of sixteen tiles of keys, from shared memory."""
    out = ()
    for n in gl.static_range(4):
        out = out + read_shared4(at + n * 512)
    return out


@gluon.jit
def _tiles_of(pointer):
    """The lane's part of sixteen tiles of keys, from global memory."""
    out = ()
    for n in gl.static_range(4):
        out = out + load_global4(pointer + n * 128)
    return out


@gluon.jit
def _least(factors, tiles, zero):
    """The least of sixteen products' keys, int32: row 0 with the columns 2 t and 2 t + 1, then row 1."""
    best = ()
    for n in gl.static_range(16):
        found = mma_half_8(repeat(zero, 4), factors[0], factors[1], tiles[n])
        new = ()
        for j in gl.static_range(4):
            bits = found[j].to(gl.int32, bitcast=True)  # floats above 0 are in the order of their bits
            if n > 0:
                bits = gl.minimum(best[j], bits)
            new = new + (bits,)
        best = new
    out = ()
    for j in gl.static_range(4):
        out = out + (best[j].to(gl.float32, bitcast=True).to(gl.int32),)
    return out


@gluon.jit
def _slot_of_eight(factors, keys_at, moves_at, codes_at, lane, zero):
    """Costs of a slot's 64 pairs of states and their codes, to shared memory; eight states. Tiles: states before;
    columns: states after."""
    g = lane >> 2
    t = lane & 3
    tiles = _tiles(keys_at)
    words = repeat(u32(lane * 0), 4)
    for before in gl.static_range(8):
        following = tiles
        if before < 7:
            following = _tiles(keys_at + (before + 1) * 2048)
        keys = _least(factors, tiles, zero)
        tiles = following
        new = ()
        for r in gl.static_range(2):
            low = (keys[2 * r] & -16) | before
            high = (keys[2 * r + 1] & -16) | before
            place = (g + 8 * r) * (4 * move_words(3)) + before * 32 + t * 8
            write_shared2(moves_at + u32(place), u32(low), u32(high))
            for half in gl.static_range(2):
                word = words[2 * r + half]
                if before // 4 == half:
                    word = shift_pair(shift_pair(word, u32(keys[2 * r]), 4), u32(keys[2 * r + 1]), 4)
                new = new + (word,)
        words = new
    for r in gl.static_range(2):
        write_shared2(codes_at + u32((g + 8 * r) * (4 * code_words(3)) + t * 8), words[2 * r], words[2 * r + 1])


@gluon.jit
def _slot_of_two(factors, keys_at, moves_at, codes_at, lane, zero, GROUPS: gl.constexpr):
    """The same for two states. Columns: four pairs of states for even, then for odd groups of sixteen codes."""
    g = lane >> 2
    t = lane & 3
    best = repeat(lane * 0 + 0x7FFFFFFF, 4)
    for pair in range(GROUPS // 2):
        keys = _least(factors, _tiles(keys_at + u32(pair * 2048)), zero)
        group = (2 * pair + (t >> 1)) * 16
        new = ()
        for j in gl.static_range(4):
            new = new + (gl.minimum(best[j], ((keys[j] & -16) << 5) | (group + (keys[j] & 15))),)
        best = new
    for r in gl.static_range(2):
        pair_codes = ()
        pair_moves = ()
        for c in gl.static_range(2):
            other = shuffle(u32(best[2 * r + c]), lane ^ 2).to(gl.int32, bitcast=True)
            least = gl.minimum(best[2 * r + c], other)
            pair_codes = pair_codes + (u32(least & 511),)
            pair_moves = pair_moves + (u32(((least >> 9) << 4) | (t & 1)),)
        # Costs and codes lie alike, four words a vector; lanes 2 and 3 write what 0 and 1 write.
        place = u32((g + 8 * r) * (4 * move_words(1)) + (t & 1) * 8)
        write_shared2(moves_at + place, pair_moves[0], pair_moves[1])
        write_shared2(codes_at + place, pair_codes[0], pair_codes[1])


@gluon.jit
def _row_of_costs(moves_at, row, before, STATE: gl.constexpr):
    """Costs of all states after the state ``before`` (a number, or one of each lane)."""
    at = moves_at + u32(row * (4 * move_words(STATE)) + before * (4 << STATE))
    out = ()
    if STATE == 3:
        for half in gl.static_range(2):
            words = read_shared4(at + 16 * half)
            for j in gl.static_range(4):
                out = out + (words[j].to(gl.int32, bitcast=True),)
    else:
        out = (read_shared(at).to(gl.int32, bitcast=True), read_shared(at + 4).to(gl.int32, bitcast=True))
    return out


@gluon.jit
def _first_paths(moves_at, lane, STATE: gl.constexpr):
    """Paths of one slot: of row 0 the first start state with all states after, the second one; of row 1."""
    g = lane >> 2
    start = (lane & 3) * 2 if STATE == 3 else lane * 0
    paths = ()
    for r in gl.static_range(2):
        for s in gl.static_range(2):
            costs = _row_of_costs(moves_at, g + 8 * r, start + s, STATE)
            for after in gl.static_range(1 << STATE):
                paths = paths + (costs[after] & -16,)
    return paths


@gluon.jit
def _longer_paths(paths, moves_at, history_at, lane, STATE: gl.constexpr):
    """Paths with one more slot; the states before it go to shared memory."""
    S: gl.constexpr = 1 << STATE
    g = lane >> 2
    start = (lane & 3) * 2 if STATE == 3 else lane * 0
    out = ()
    for r in gl.static_range(2):
        best = ()
        for before in gl.static_range(S):
            costs = _row_of_costs(moves_at, g + 8 * r, before, STATE)
            new = ()
            for s in gl.static_range(2):
                for after in gl.static_range(S):
                    total = paths[(2 * r + s) * S + before] + costs[after]
                    if before > 0:
                        total = gl.minimum(best[s * S + after], total)
                    new = new + (total,)
            best = new
        words = ()
        for s in gl.static_range(2):
            word = u32(lane * 0)
            for after in gl.static_range(S):
                word = shift_pair(word, u32(best[s * S + after]), 4)
                out = out + (best[s * S + after] & -16,)
            words = words + (word,)
        write_shared2(history_at + u32(((g + 8 * r) * S + start) * 4), words[0], words[1])
    return out


@gluon.jit
def _best_start(paths, lane, r: gl.constexpr, STATE: gl.constexpr):
    """The start state of row r's cheapest closed path, in all lanes of the row."""
    S: gl.constexpr = 1 << STATE
    t = lane & 3
    best = lane * 0 + 0x7FFFFFFF
    for s in gl.static_range(2):
        if STATE == 3:
            lower = gl.where(t == 0, paths[(2 * r + s) * S + s], paths[(2 * r + s) * S + s + 2])
            upper = gl.where(t == 2, paths[(2 * r + s) * S + s + 4], paths[(2 * r + s) * S + s + 6])
            closed = gl.where(t < 2, lower, upper)
            best = gl.minimum(best, closed | (2 * t + s))
        else:
            best = gl.minimum(best, paths[(2 * r + s) * S + s] | s)
    best = gl.minimum(best, shuffle(u32(best), lane ^ 1).to(gl.int32, bitcast=True))
    best = gl.minimum(best, shuffle(u32(best), lane ^ 2).to(gl.int32, bitcast=True))
    return best & 15


@gluon.jit
def _write_path(start, fields, first, codes_at, history_at, row, mine, N: gl.constexpr, STREAM: gl.constexpr,
                STATE: gl.constexpr):  # fmt: skip
    """Table indices of a chain's slots from the start state on, to the fields of the lane's vector if ``mine``."""
    S: gl.constexpr = 1 << STATE
    state = start
    for slot in gl.static_range(N):
        if slot == N - 1:
            before = start
        else:
            word = read_shared(history_at + (N - 2 - slot) * (64 * S) + u32((row * S + start) * 4))
            nibble = state * 4 if S == 8 else 24 + state * 4  # two states fill the top of the word alone
            before = (word >> u32(nibble)).to(gl.int32, bitcast=True) & (S - 1)
        at = codes_at + (N - 1 - slot) * (64 * code_words(STATE))
        if STATE == 3:
            word = read_shared(at + u32(row * (4 * code_words(3)) + (state >> 1) * 8 + (before >> 2) * 4))
            code = (word >> u32(((before & 3) * 2 + (state & 1)) * 4)).to(gl.int32, bitcast=True) & 15
        else:
            code = read_shared(at + u32(row * (4 * code_words(1)) + before * 8 + state * 4)).to(gl.int32, bitcast=True)
        entry = (before << STREAM) | (code << STATE) | state
        gl.store(fields + (first + slot), entry.to(gl.uint16), mask=mine)
        state = before


@gluon.jit
def _chain(rows, fields, first, scales, keys_at, warp_at, lane, zero, D: gl.constexpr, STREAM: gl.constexpr,
           STATE: gl.constexpr, SIGNED: gl.constexpr, N: gl.constexpr):  # fmt: skip
    """Search the chain of N slots that begins at triplet ``first``, from its last slot down to slot 0."""
    g = lane >> 2
    t = lane & 3
    codes_at = warp_at + 64 * move_words(STATE)
    history_at = codes_at + 64 * N * code_words(STATE)
    GROUPS: gl.constexpr = 1 << (STREAM - STATE - 4)
    raw = _raw(rows, first + N - 1, t, D)
    paths = repeat(lane * 0, 4 << STATE)
    for step in range(N):
        factors = _factors(raw, scales, t, SIGNED)
        raw = _raw(rows, first + gl.maximum(N - 2 - step, 0), t, D)
        at = codes_at + u32(step * (64 * code_words(STATE)))
        if STATE == 3:
            _slot_of_eight(factors, keys_at, warp_at, at, lane, zero)
        else:
            _slot_of_two(factors, keys_at, warp_at, at, lane, zero, GROUPS)
        sync_warp(lane)
        if step == 0:
            paths = _first_paths(warp_at, lane, STATE)
        else:
            paths = _longer_paths(paths, warp_at, history_at + u32((step - 1) * (64 << STATE)), lane, STATE)
        sync_warp(lane)
    start0 = _best_start(paths, lane, 0, STATE)
    start1 = _best_start(paths, lane, 1, STATE)
    start = gl.where(t & 1 == 0, start0, start1)
    _write_path(start, fields, first, codes_at, history_at, g + 8 * (t & 1), t < 2, N, STREAM, STATE)
    sync_warp(lane)


@gluon.jit
def _extra(rows, fields, i, scales, keys, lane, zero, D: gl.constexpr, STREAM: gl.constexpr, STATE: gl.constexpr,
           SIGNED: gl.constexpr):  # fmt: skip
    """Code triplet i, which stands alone; ``keys`` are its table's. Columns: groups of sixteen codes."""
    t = lane & 3
    factors = _factors(_raw(rows, i, t, D), scales, t, SIGNED)
    best = repeat(lane * 0 + 0x7FFFFFFF, 2)
    for eight in range(1 << (STREAM - 7)):
        found = _least(factors, _tiles_of(keys + eight * 512 + lane * 4), zero)
        code = (8 * eight + 2 * t) * 16
        new = ()
        for r in gl.static_range(2):
            least = best[r]
            for c in gl.static_range(2):
                key = found[2 * r + c]
                least = gl.minimum(least, ((key >> 4) << STREAM) | (code + 16 * c + (key & 15)))
            new = new + (least,)
        best = new
    out = ()
    for r in gl.static_range(2):
        least = gl.minimum(best[r], shuffle(u32(best[r]), lane ^ 1).to(gl.int32, bitcast=True))
        least = gl.minimum(least, shuffle(u32(least), lane ^ 2).to(gl.int32, bitcast=True))
        out = out + (least & ((1 << STREAM) - 1),)
    entry = gl.where(t == 0, out[0], out[1]) | (1 << (STREAM + STATE))
    gl.store(fields + i, entry.to(gl.uint16), mask=t < 2)


@gluon.jit
def _sum_of_row(x, lane):
    """The sum of float64 numbers over the four lanes of a row, in all of them."""
    for bit in gl.static_range(2):
        bits = x.to(gl.int64, bitcast=True)
        low = shuffle(u32(bits), lane ^ (1 << bit))
        high = shuffle(u32(bits >> 32), lane ^ (1 << bit))
        x += ((high.to(gl.int64) << 32) | low.to(gl.int64)).to(gl.float64, bitcast=True)
    return x


@gluon.jit
def _squares(row, lane, D: gl.constexpr):
    """|y|^2 of a row in float64."""
    total = (lane * 0).to(gl.float64)
    for first in range(0, D, 16):
        for j in gl.static_range(4):
            at = first + 4 * j + (lane & 3)
            y = gl.load(row + at, mask=at < D, other=0.0).to(gl.float64)
            total += y * y
    return _sum_of_row(total, lane)


@gluon.jit
def _finish(row, fields, values, lane, D: gl.constexpr, STREAM: gl.constexpr, STATE: gl.constexpr,
            SIGNED: gl.constexpr):  # fmt: skip
    """Turn a row's table indices into fields (code and signs); <y, codeword> in float64, in half steps."""
    T: gl.constexpr = (D + 2) // 3
    ENTRIES: gl.constexpr = (1 << (STREAM + STATE)) + (1 << STREAM)
    along = (lane * 0).to(gl.float64)
    for first in range(0, T, 4):
        i = first + (lane & 3)
        there = i < T
        entry = gl.load(fields + i, mask=there, other=0).to(gl.int32)
        field = entry & ((1 << STREAM) - 1)
        for c in gl.static_range(3):
            at = 3 * i + c
            y = gl.load(row + at, mask=at < D, other=0.0).to(gl.float32)
            number = gl.load(values + (c * ENTRIES + entry))
            if SIGNED:
                field = field | gl.where(y < 0, 1 << (10 + c), 0)
                number = gl.where(y < 0, -number, number)
            along += y.to(gl.float64) * number.to(gl.float64)
        gl.store(fields + i, field.to(gl.uint16), mask=there)
    return _sum_of_row(along, lane)


@gluon.jit
def _norm_pattern(gain, NORM: gl.constexpr):
    """fp16 bits (int32) of the nearest number whose bits are the top NORM bits of a positive fp16 number, halves up."""
    DROPPED: gl.constexpr = 15 - NORM
    PLACE: gl.constexpr = 13 + DROPPED
    HALF: gl.constexpr = (1 << (PLACE - 1)) - (112 << 23)
    SMALL: gl.constexpr = 1 << (24 - DROPPED)
    single = gl.minimum(gl.maximum(gain.to(gl.float32), 0.0), 65504.0)
    normal = (single.to(gl.int32, bitcast=True) + HALF) >> PLACE
    subnormal = (single * SMALL + 0.5).to(gl.int32)
    number = gl.where(single < 6.103515625e-05, subnormal, normal)
    return gl.minimum(number, (0x7C00 >> DROPPED) - 1) << DROPPED


@gluon.jit
def lane_search_kernel(
    y_ptr, fields_ptr, keys_ptr, extra_ptr, last_ptr, values_ptr, units_ptr, pages, stride_l, stride_n, stride_h,
    stride_t, D: gl.constexpr, CHAINS: gl.constexpr, STREAM: gl.constexpr, STATE: gl.constexpr, SIGNED: gl.constexpr,
    NORM: gl.constexpr, WARPS: gl.constexpr, SMEM_WORDS: gl.constexpr,
):  # fmt: skip
    """y [L, N, H, 64, D] -> fields uint16 [L, N, H, 64, triplets + 1]: code | signs << 10, then the norm's fp16 bits.

    The program is (page of a layer, head) with ``pages`` pages a layer; a warp codes sixteen tokens. keys, extra,
    last: `trellis_tables.LaneTables`; values: `trellis_tables.SearchTables`; units float64: 8 sqrt(D), the step,
    2 / step.
    """
    T: gl.constexpr = (D + 2) // 3
    N: gl.constexpr = T // CHAINS
    KEYS: gl.constexpr = key_words(STREAM, STATE)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    smem = gl.allocate_shared_memory(
        gl.int32, [SMEM_WORDS // (32 * WARPS), 32 * WARPS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    tid = gl.arange(0, 32 * WARPS, layout=LAYOUT)
    lane = tid & 31
    warp = tid >> 5
    smem.index(0).store(tid)  # names the allocation in the PTX
    barrier()
    for word in range(0, KEYS, 128 * WARPS):
        a, b, c, d = load_global4(keys_ptr + word + tid * 4)
        write_shared4_of(u32(word * 4 + tid * 16), a, b, c, d)
    g = lane >> 2
    t = lane & 3
    block = gl.program_id(0).to(gl.int64)
    h = gl.program_id(1).to(gl.int64)
    source = y_ptr + (block // pages) * stride_l + (block % pages) * stride_n + h * stride_h
    target = fields_ptr + (block * gl.num_programs(1) + h) * (16 * WARPS * (T + 1))
    token = warp * 16 + g
    rows = (source + token.to(gl.int64) * stride_t, source + (token + 8).to(gl.int64) * stride_t)
    fields = target + (token + 8 * (t & 1)) * (T + 1)  # of the vector whose codes the lane writes
    squares = ()
    fars = ()
    scales = ()
    for r in gl.static_range(2):
        square = _squares(rows[r], lane, D)
        norm = gl.sqrt(square)
        far = norm >= 8.673617379884035e-19  # 2^-60
        scale = gl.load(units_ptr) / (gl.load(units_ptr + 1) * gl.where(far, norm, 1.0))
        squares = squares + (square,)
        fars = fars + (far,)
        scales = scales + (gl.where(far, scale, 0.0).to(gl.float32),)
    zero = (lane * 0).to(gl.float32)
    keys_at = u32(lane * 16)
    warp_at = u32(KEYS * 4 + warp * (4 * warp_words(STATE, N)))
    barrier()
    for chain in range(CHAINS):
        _chain(rows, fields, chain * N, scales, keys_at, warp_at, lane, zero, D, STREAM, STATE, SIGNED, N)
    for i in gl.static_range(CHAINS * N, T):
        keys = extra_ptr
        if D % 3 != 0 and i == T - 1:
            keys = last_ptr
        _extra(rows, fields, i, scales, keys, lane, zero, D, STREAM, STATE, SIGNED)
    sync_warp(lane)
    for r in gl.static_range(2):
        along = _finish(rows[r], target + (token + 8 * r) * (T + 1), values_ptr, lane, D, STREAM, STATE, SIGNED)
        there = fars[r] & (along > 0)
        gain = gl.load(units_ptr + 2) * squares[r] / gl.where(there, along, 1.0)
        number = _norm_pattern(gl.where(there, gain, 0.0), NORM)
        gl.store(target + (token + 8 * r) * (T + 1) + T, number.to(gl.uint16), mask=t == 0)
    smem._keep_alive()
