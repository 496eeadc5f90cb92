"""The full-precision tokens (sinks and tail) of a decode step, for the table-decode kernel, lane by lane.

The program's tokens are copied to shared memory, and sixteen at a time go to a warp.
Columns of the matrix products: 2 t is head t of a block of four query heads; for the weights 2 t + 1 holds what
rounding to 16 bits leaves of column 2 t. The sums come out as those of the pages do: lane (g, t) holds of head t the
coordinates of chain g and of extra triplet g; of four chains, which two lanes share, a part of those of its chain.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from octo_run.kernels.attention.hopper.codewords import chains_of
from octo_run.kernels.attention.hopper.products import soft_cap
from octo_run.kernels.lane_copies import copy16, wait_for_all_copies
from octo_run.kernels.lanes import (
    barrier,
    exp2,
    load_global2,
    max_over_rows,
    mma_half,
    own_warp_backwards,
    pack_half,
    read_shared2,
    read_shared_half,
    repeat,
    shuffle_f,
    u32,
)


@constexpr_function
def row_bytes(head_dim):
    """Bytes from one row in shared memory to the next: such that eight rows' reads of 32 bytes each meet in no bank."""
    return 2 * int(head_dim) + (8 - int(head_dim) // 2) % 32 * 4


@constexpr_function
def blocks_at_once(room, head_dim):
    """Blocks of sixteen tokens, K and V, that fit in ``room`` bytes."""
    return int(room) // (32 * (2 * int(head_dim) + (8 - int(head_dim) // 2) % 32 * 4))


@gluon.jit
def _stage(
    at, sink, tail, stride_sink, stride_tail, first_block, block_step, blocks, n_sink, count, first_slot, capacity,
    tid, D: gl.constexpr, THREADS: gl.constexpr,
):  # fmt: skip
    """Start copying the rows of ``blocks`` blocks of sixteen tokens (``first_block + n * block_step``) to byte ``at``.
    Tokens are numbered sinks first; beyond the last one the last is copied."""
    CHUNKS: gl.constexpr = D // 8
    for begin in range(0, blocks * (16 * CHUNKS), THREADS):
        item = gl.minimum(begin + tid, blocks * (16 * CHUNKS) - 1)
        row = item // CHUNKS
        chunk = item % CHUNKS
        index = gl.minimum((first_block + row // 16 * block_step) * 16 + row % 16, count - 1)
        slot = index - n_sink + first_slot
        slot = gl.where(slot >= capacity, slot - capacity, slot)
        source = gl.where(
            index < n_sink, sink + index.to(gl.int64) * stride_sink, tail + slot.to(gl.int64) * stride_tail
        )
        copy16(u32(at + row * row_bytes(D) + chunk * 16), source + chunk * 8)


@gluon.jit
def load_queries(q_ptr, stride_qh, lane, head, G: gl.constexpr, D: gl.constexpr, NT: gl.constexpr):
    """The B operands of the scores, NT blocks of four heads: in lanes of even g the row of head ``head + g / 2``."""
    g = lane >> 2
    out = ()
    for block in gl.static_range(NT):
        row = q_ptr + gl.minimum(head + 4 * block + (g >> 1), G - 1) * stride_qh + (lane & 3) * 4
        words = ()
        for s in gl.static_range(D // 16):
            words = words + load_global2(row + 16 * s)
        out = out + (words,)
    return out


@gluon.jit
def _queries(loaded, lane, head, G: gl.constexpr, NT: gl.constexpr):
    """What `load_queries` read, with zeros in lanes of odd g and of heads that are not there."""
    g = lane >> 2
    out = ()
    for block in gl.static_range(NT):
        mine = (g & 1 == 0) & (head + 4 * block + (g >> 1) < G)
        words = ()
        for i in gl.static_range(len(loaded[block])):
            words = words + (gl.where(mine, loaded[block][i], 0),)
        out = out + (words,)
    return out


@gluon.jit
def _pair(low_row, high_row, column):
    """Column ``column`` of two rows in shared memory in one register."""
    return read_shared_half(low_row + u32(column * 2)) | (read_shared_half(high_row + u32(column * 2)) << 16)


@gluon.jit
def _weights(p0, p1, lane, ELEMENT: gl.constexpr, HALF: gl.constexpr):
    """The B operand of the values' product from the weights of head t (tokens g and g + 8) in lane (g, t): in lane (g,
    t) the tokens t and t + 4, t + 8 and t + 12."""
    g = lane >> 2
    source = (lane & 3) * 4 + (g >> 1)
    out = ()
    for x in gl.static_range(2):
        weight = p0 if x == 0 else p1
        low = shuffle_f(weight, source)
        high = shuffle_f(weight, source + 16)
        low = gl.where(g & 1 == 0, low, low - low.to(HALF).to(gl.float32))
        high = gl.where(g & 1 == 0, high, high - high.to(HALF).to(gl.float32))
        out = out + (pack_half(low, high, ELEMENT),)
    return out


@gluon.jit
def _sum_of_half(grown, g, SLOT: gl.constexpr, C: gl.constexpr, B: gl.constexpr, N: gl.constexpr, EACH: gl.constexpr):
    """Of four chains, the sum of slot SLOT (N: the extra) and component C if it is the lane's to add, else zero."""
    FROM: gl.constexpr = SLOT % EACH
    found = grown[FROM // 2 * 3 + C][B]
    here = (g & 1) == SLOT // EACH
    if SLOT == N:
        here = (g & 3) == 1
    return gl.where(here, found[FROM % 2 * 2] + found[FROM % 2 * 2 + 1], 0.0)


@gluon.jit
def _grow(acc, decays, weights, v_at, lane, zero, to_sums, D: gl.constexpr, N: gl.constexpr, NT: gl.constexpr,
          PAIRS: gl.constexpr, ELEMENT: gl.constexpr):  # fmt: skip
    """The sums with a block's values (rows from byte ``v_at`` of shared memory on) added.

    Of four chains with five slots each and two extras, six slots in all, a lane of even g has the slots 0 to 2 of the
    chain that it shares, one of odd g the slots 3 and 4 and, of each extra, one of them.
    """
    CHAINS: gl.constexpr = chains_of(D)
    EACH: gl.constexpr = N + 1 if CHAINS == 8 else (N + 2) // 2  # slots of a lane
    PARTS: gl.constexpr = PAIRS if CHAINS == 8 else (EACH + 1) // 2
    g = lane >> 2
    rows = ()
    for i in gl.static_range(4):
        rows = rows + (u32(v_at + ((lane & 3) + 4 * i) * row_bytes(D)),)
    grown = ()
    for pair in gl.static_range(PARTS):
        for c in gl.static_range(3):
            operand = ()
            for h in gl.static_range(2):
                if CHAINS == 4:
                    slot = (g & 1) * EACH + 2 * pair + h
                    triplet = gl.where(slot < N, (g >> 1) * N + slot, 4 * N + (g >> 2))
                    column = gl.minimum(triplet * 3 + c, D - 1)
                elif 2 * pair + h < N:
                    column = (g * N + 2 * pair + h) * 3 + c
                else:
                    column = gl.minimum((8 * N + g) * 3 + c, D - 1)
                if 2 * pair + h < EACH:
                    operand = operand + (_pair(rows[0], rows[1], column), _pair(rows[2], rows[3], column))
                else:
                    operand = operand + (u32(lane * 0), u32(lane * 0))
            products = ()
            for b in gl.static_range(NT):
                products = products + (
                    mma_half(
                        repeat(zero, 4), operand[0], operand[2], operand[1], operand[3], weights[b][0], weights[b][1],
                        ELEMENT,
                    ),
                )  # fmt: skip
            grown = grown + (products,)
    out = ()
    for b in gl.static_range(NT):
        for i in gl.static_range(3 * PAIRS):
            for h in gl.static_range(2):
                if CHAINS == 4:
                    more = _sum_of_half(grown, g, 2 * (i // 3) + h, i % 3, b, N, EACH)
                else:
                    more = grown[i][b][2 * h] + grown[i][b][2 * h + 1]
                out = out + (acc[(b * 3 * PAIRS + i) * 2 + h] * decays[b] + more * to_sums,)
    return out


@gluon.jit
def stage_round(
    sink_k, sink_v, tail_k, tail_v, stride_sink_k, stride_sink_v, stride_tail_k, stride_tail_v, n_sink, count,
    first_slot, capacity, part, parts, begin, mine, room, at, tid, D: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Start copying the program's blocks from its number ``begin`` on, ``room`` of ``mine`` at most, to byte ``at``."""
    now = gl.minimum(mine - begin, room)
    first = part + begin * parts
    _stage(at, sink_k, tail_k, stride_sink_k, stride_tail_k, first, parts, now, n_sink, count, first_slot, capacity,
           tid, D, 32 * WARPS)  # fmt: skip
    _stage(at + room * (16 * row_bytes(D)), sink_v, tail_v, stride_sink_v, stride_tail_v, first, parts, now, n_sink,
           count, first_slot, capacity, tid, D, 32 * WARPS)  # fmt: skip


@gluon.jit
def _sink_logits(logits, lane, warp, part, head, G: gl.constexpr, NT: gl.constexpr):
    """Maxima and sums of weights that the softmax begins with: those of the sink logits in the first warp of the first
    part, where the lane of row 0 counts each once; of nothing elsewhere."""
    running = ()
    total = ()
    for b in gl.static_range(NT):
        h = head + 4 * b + (lane & 3)
        mine = (part == 0) & (warp == 0) & (h < G)
        logit = gl.load(logits + gl.minimum(h, G - 1)) * 1.4426950408889634
        running = running + (gl.where(mine, logit, -1e30),)
        total = total + (gl.where(mine & (lane < 4), 1.0, logit * 0.0),)
    return running, total


@gluon.jit
def full_precision(
    loaded, sink_k, sink_v, tail_k, tail_v, stride_sink_k, stride_sink_v, stride_tail_k, stride_tail_v,
    n_sink, count, first_slot, capacity, part, parts, mine, room, at, tid, head, scale_log2, to_sums,
    sink_logits, G: gl.constexpr, D: gl.constexpr, NT: gl.constexpr, PAIRS: gl.constexpr, ELEMENT: gl.constexpr,
    WARPS: gl.constexpr, CAP: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    """Softmax sums of the program's part of ``count`` tokens, of which the first ``n_sink`` are sinks; ``loaded``:
    `load_queries`.

    Its ``mine`` blocks of sixteen tokens are ``part + n * parts``, warp by warp, the last warp first, which has the
    fewest pages. `stage_round` has begun to copy those from 0 on to byte ``at`` of shared memory, which has room for
    ``room``. Who has no block does not wait for those who have, unless the room is needed again. All pointers are those
    of the sequence and KV head. CAP limits the logits; SINKS: the first part begins with the sink logits. Returns
    (running maxima, sums of weights of the lane's rows, sums of values times ``to_sums``): tuples of NT, NT and
    NT * 6 * PAIRS numbers.
    """
    N: gl.constexpr = (D + 2) // 3 // chains_of(D)
    HALF: gl.constexpr = gl.bfloat16 if ELEMENT == "bf16" else gl.float16
    v_after = room * (16 * row_bytes(D))
    lane = tid & 31
    warp = tid >> 5
    turned = WARPS - 1 - warp
    g = lane >> 2
    t = lane & 3
    zero = (lane * 0).to(gl.float32)
    running = repeat(zero - 1e30, NT)
    total = repeat(zero, NT)
    if SINKS:
        running, total = _sink_logits(sink_logits, lane, warp, part, head, G, NT)
    acc = repeat(zero, NT * 6 * PAIRS)
    query = _queries(loaded, lane, head, G, NT)
    wait_for_all_copies(lane)
    barrier()
    own = own_warp_backwards(part, WARPS)
    for begin in range(0, mine, room):
        now = gl.minimum(mine - begin, room)
        first = part + begin * parts
        for base in range(own, now, WARPS):
            number = base + (turned - own)
            block = gl.minimum(number, now - 1)
            token = (first + block * parts) * 16 + g
            there0 = (number < now) & (token < count)
            there1 = (number < now) & (token + 8 < count)
            k_at = at + block * (16 * row_bytes(D))
            raw = repeat(repeat(zero, 4), NT)
            for s in gl.static_range(D // 16):
                a0, a2 = read_shared2(u32(k_at + g * row_bytes(D) + 32 * s + 8 * t))
                a1, a3 = read_shared2(u32(k_at + (g + 8) * row_bytes(D) + 32 * s + 8 * t))
                new = ()
                for b in gl.static_range(NT):
                    new = new + (mma_half(raw[b], a0, a1, a2, a3, query[b][2 * s], query[b][2 * s + 1], ELEMENT),)
                raw = new
            decays = ()
            weights = ()
            new_running = ()
            new_total = ()
            for b in gl.static_range(NT):
                s0 = raw[b][0] * scale_log2
                s1 = raw[b][2] * scale_log2
                if CAP > 0:
                    s0 = soft_cap(s0, CAP)
                    s1 = soft_cap(s1, CAP)
                s0 = gl.where(there0, s0, -1e30)
                s1 = gl.where(there1, s1, -1e30)
                highest = gl.maximum(running[b], max_over_rows(gl.maximum(s0, s1), lane))
                p0 = gl.where(there0, exp2(s0 - highest), 0.0)
                p1 = gl.where(there1, exp2(s1 - highest), 0.0)
                decay = exp2(running[b] - highest)
                decays = decays + (decay,)
                weights = weights + (_weights(p0, p1, lane, ELEMENT, HALF),)
                new_running = new_running + (highest,)
                new_total = new_total + (total[b] * decay + (p0 + p1),)
            running = new_running
            total = new_total
            acc = _grow(acc, decays, weights, k_at + v_after, lane, zero, to_sums, D, N, NT, PAIRS, ELEMENT)
        if begin + room < mine:
            barrier()
            stage_round(
                sink_k, sink_v, tail_k, tail_v, stride_sink_k, stride_sink_v, stride_tail_k, stride_tail_v, n_sink,
                count, first_slot, capacity, part, parts, begin + room, mine, room, at, tid, D, WARPS,
            )  # fmt: skip
            wait_for_all_copies(lane)
            barrier()
    return running, total, acc
