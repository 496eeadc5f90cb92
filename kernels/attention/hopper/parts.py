"""How the table-decode kernel divides sequences into parts, and merges what these found, lane by lane.

A part is the share of a sequence's pages (and full-precision tokens) that one program does: see `attention.parts`.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from octo_run.kernels.lane_copies import wait_for_all_copies
from octo_run.kernels.lanes import (
    barrier,
    exp2,
    load_global4_l2,
    load_global_l2_f,
    log2,
    read_shared2,
    read_shared_f,
    repeat,
    shuffle,
    shuffle_f,
    sum_over_rows,
    sync_warp,
    u32,
    write_shared,
    write_shared4_if,
)


@gluon.jit
def _int(x):
    return x.to(gl.int32, bitcast=True)


@gluon.jit
def hidden_pages(num, start, sink, WINDOW: gl.constexpr):
    """Of ``num`` packed pages those of which a query at position ``start`` sees no token; WINDOW 0: it sees all."""
    if WINDOW == 0:
        return 0
    else:
        return gl.minimum(gl.maximum(start + 1 - WINDOW - sink, 0) // 64, num)


@gluon.jit
def _pages_of(num_packed, starts, sink, seq, batch, WINDOW: gl.constexpr):
    """The pages that sequence ``seq`` reads, or the last one if there is no such sequence."""
    seq = gl.minimum(seq, batch - 1)
    num = gl.load(num_packed + seq)
    if WINDOW > 0:
        num -= hidden_pages(num, gl.load(starts + seq), sink, WINDOW)
    return num


@gluon.jit
def divide(
    num_packed, starts, sink, flat, batch, even_parts, programs, processors, lane, warp, AT: gl.constexpr,
    WARPS: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """What program number ``flat`` of those along all sequences does, in four words at byte AT of shared memory: the
    sequence, its part, the parts of that sequence (0: nothing is left to do) and of all sequences before it.

    Every sequence has ``even_parts`` parts if they are about equally long; else parts are of one length, small enough
    for the chip to even out their times. More than eight programs a multiprocessor even themselves out, and there is no
    counter for their merge (`workspace.counter_words`). A lane takes a sequence.
    """
    total = lane * 0
    longest = lane * 0
    for first in range(0, batch, 32):
        num = _pages_of(num_packed, starts, sink, first + lane, batch, WINDOW)
        total += gl.where(first + lane < batch, num, 0)
        longest = gl.maximum(longest, num)
    for step in gl.static_range(5):
        total += _int(shuffle(u32(total), lane ^ (1 << step)))
        longest = gl.maximum(longest, _int(shuffle(u32(longest), lane ^ (1 << step))))
    waves = (batch * programs * even_parts + processors - 1) // processors
    even = gl.maximum(longest + even_parts - 1, even_parts) // even_parts
    fair = total.to(gl.float32) * programs / processors  # pages of each multiprocessor
    small = ((0.25 * fair).to(gl.int32) // WARPS + 1) * WARPS
    unit = gl.where(((waves * even).to(gl.float32) <= 1.15 * fair) | (waves > 8), even, small)
    at = u32(lane * 0 + AT)
    write_shared4_if(at, u32(at * 0), u32(at * 0), u32(at * 0), u32(at * 0), warp == 0)
    sync_warp(lane)
    start = lane * 0
    for first in range(0, batch, 32):
        num = _pages_of(num_packed, starts, sink, first + lane, batch, WINDOW)
        count = gl.where(first + lane < batch, gl.maximum((num + unit - 1) // unit, 1), 0)
        upto = count
        for step in gl.static_range(5):
            before = _int(shuffle(u32(upto), lane - (1 << step)))
            upto += gl.where(lane >= (1 << step), before, 0)
        begin = start + upto - count
        mine = (flat >= begin) & (flat < begin + count) & (warp == 0)
        write_shared4_if(at, u32(first + lane), u32(flat - begin), u32(count), u32(begin), mine)
        start += _int(shuffle(u32(upto), lane * 0 + 31))


@gluon.jit
def combine(
    acc, level, total, weight, lane, warp, tid, first_head, out_row, partial_row, lse_row, stride_oh, parts, part,
    to_value, CHAINS: gl.constexpr, N: gl.constexpr, G: gl.constexpr, D: gl.constexpr, HEADS: gl.constexpr,
    NT: gl.constexpr, PAIRS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Add up the warps' sums through shared memory (the table is not needed any more); write the result of this
    program, to ``out_row`` if it is the only one of its heads, else to ``partial_row`` and ``lse_row``. Of four chains,
    two lanes have sums of a chain's values, and four of an extra's: all write what they make together."""
    ROW: gl.constexpr = 3 * CHAINS * (N + 1)
    WARP_WORDS: gl.constexpr = NT * (4 * ROW + 8)
    g = lane >> 2
    t = lane & 3
    wait_for_all_copies(lane)
    barrier()
    for b in gl.static_range(NT):
        mass = sum_over_rows(total[b], lane)
        lift = 0.5 * sum_over_rows(weight[b], lane)
        mine = u32((warp * WARP_WORDS + b * (4 * ROW + 8) + t * ROW) * 4)
        heads = u32((warp * WARP_WORDS + b * (4 * ROW + 8) + 4 * ROW + t) * 4)
        for i in gl.static_range(3 * PAIRS):
            for h in gl.static_range(2):
                if 2 * (i // 3) + h < N:
                    place = (g // (8 // CHAINS) * N + 2 * (i // 3) + h) * 3 + i % 3
                else:
                    place = (CHAINS * N + g // (16 // CHAINS if CHAINS == 4 else 1)) * 3 + i % 3
                if 2 * (i // 3) + h <= N:
                    value = acc[(b * 3 * PAIRS + i) * 2 + h]
                    if CHAINS == 4:
                        value += shuffle_f(value, lane ^ 4)
                        if 2 * (i // 3) + h == N:
                            value += shuffle_f(value, lane ^ 8)
                    value += lift
                    write_shared(mine + u32(place * 4), value.to(gl.uint32, bitcast=True))
        write_shared(heads, level[b].to(gl.uint32, bitcast=True))
        write_shared(heads + 16, mass.to(gl.uint32, bitcast=True))
    barrier()
    for written in range(0, HEADS * D, 64 * WARPS):
        item = written + 2 * tid
        which = gl.minimum(item // D, HEADS - 1)
        column = item % D
        row = u32(((which // 4) * (4 * ROW + 8) + (which % 4) * ROW + column) * 4)
        head = u32(((which // 4) * (4 * ROW + 8) + 4 * ROW + which % 4) * 4)
        best = level[0] * 0.0 - 1e30
        for w in gl.static_range(WARPS):
            best = gl.maximum(best, read_shared_f(head + w * (WARP_WORDS * 4)))
        mass = best * 0.0
        left = best * 0.0
        right = best * 0.0
        for w in gl.static_range(WARPS):
            scale = exp2(read_shared_f(head + w * (WARP_WORDS * 4)) - best)
            mass += scale * read_shared_f(head + (w * (WARP_WORDS * 4) + 16))
            two = read_shared2(row + w * (WARP_WORDS * 4))
            left += scale * two[0].to(gl.float32, bitcast=True)
            right += scale * two[1].to(gl.float32, bitcast=True)
        keep = (item < HEADS * D) & (first_head + which < G)
        empty = mass == 0.0
        over = gl.where(empty, 0.0, to_value / gl.where(empty, 1.0, mass))
        if parts == 1:
            out = out_row + which * stride_oh + column
            gl.store(out, (left * over).to(out_row.dtype.element_ty), mask=keep)
            gl.store(out + 1, (right * over).to(out_row.dtype.element_ty), mask=keep)
        else:
            place = which * parts + part
            to = partial_row + place.to(gl.int64) * D + column
            gl.store(to, left * over, mask=keep)
            gl.store(to + 1, right * over, mask=keep)
            whole = gl.where(empty, -1e30, best + log2(gl.where(empty, 1.0, mass)))
            gl.store(lse_row + place, whole, mask=keep & (column == 0))


@gluon.jit
def merge(tid, first_head, out_row, partial_row, lse_row, stride_oh, parts, G: gl.constexpr, D: gl.constexpr,
           HEADS: gl.constexpr, WARPS: gl.constexpr):  # fmt: skip
    """The result of all programs of these heads, by the last one to finish; past the first-level cache, which is not
    coherent. Few parts are read in one go, and so are up to twice as many."""
    if parts <= 16:
        _merge(tid, first_head, out_row, partial_row, lse_row, stride_oh, parts, G, D, HEADS, WARPS, 16)
    else:
        _merge(tid, first_head, out_row, partial_row, lse_row, stride_oh, parts, G, D, HEADS, WARPS, 32)


@gluon.jit
def _merge(tid, first_head, out_row, partial_row, lse_row, stride_oh, parts, G: gl.constexpr, D: gl.constexpr,
           HEADS: gl.constexpr, WARPS: gl.constexpr, AT_ONCE: gl.constexpr):  # fmt: skip
    """Four columns a thread, whose loads from AT_ONCE parts are under way together."""
    zero = (tid * 0).to(gl.float32)
    for begin in gl.static_range(0, HEADS * D, 128 * WARPS):
        item = begin + 4 * tid
        which = gl.minimum(gl.minimum(item // D, HEADS - 1), G - 1 - first_head)
        column = item % D
        best = zero - 1e30
        mass = zero
        sums = repeat(zero, 4)
        for first in range(0, parts, AT_ONCE):
            levels = ()
            values = ()
            for s in gl.static_range(AT_ONCE):
                place = which * parts + gl.minimum(first + s, parts - 1)
                levels = levels + (load_global_l2_f(lse_row + place),)
                values = values + (load_global4_l2(partial_row + place.to(gl.int64) * D + column),)
            highest = best
            for s in gl.static_range(AT_ONCE):
                highest = gl.maximum(highest, levels[s])
            decay = exp2(best - highest)
            best = highest
            mass *= decay
            grown = ()
            for i in gl.static_range(4):
                grown = grown + (sums[i] * decay,)
            for s in gl.static_range(AT_ONCE):
                scale = gl.where(first + s < parts, exp2(levels[s] - highest), 0.0)
                mass += scale
                more = ()
                for i in gl.static_range(4):
                    more = more + (grown[i] + scale * values[s][i].to(gl.float32, bitcast=True),)
                grown = more
            sums = grown
        keep = (item < HEADS * D) & (first_head + item // D < G)
        out = out_row + which * stride_oh + column
        for i in gl.static_range(4):
            gl.store(out + i, (sums[i] / mass).to(out_row.dtype.element_ty), mask=keep)
