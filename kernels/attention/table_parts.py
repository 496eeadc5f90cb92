"""How the table-decode kernel divides contexts among its programs, and puts their results together, lane by lane."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from octo_run.kernels.lanes import (
    barrier,
    exp2,
    log2,
    read_shared_f,
    sum_over_rows,
    u32,
    wait_for_all_copies,
    write_shared,
)


@gluon.jit
def divide(num_packed_ptr, flat, batch, parts, programs, processors, WARPS: gl.constexpr):
    """What program number ``flat`` of those along all contexts does: the sequence, its part, the parts of that
    sequence (0: nothing is left to do) and of all sequences before it.

    Every sequence has ``parts`` parts if they are about equally long; else parts are of one length, small enough for
    the chip to even out their times. More than eight programs a multiprocessor even themselves out, and there is no
    counter for their merge (`splits.counter_words`).
    """
    total = 0
    longest = 0
    for i in range(batch):
        num = gl.load(num_packed_ptr + i)
        total += num
        longest = gl.maximum(longest, num)
    waves = (batch * programs * parts + processors - 1) // processors
    even = gl.maximum(longest + parts - 1, parts) // parts
    fair = total.to(gl.float32) * programs / processors  # pages of each multiprocessor
    small = ((0.25 * fair).to(gl.int32) // WARPS + 1) * WARPS
    unit = gl.where(((waves * even).to(gl.float32) <= 1.15 * fair) | (waves > 8), even, small)
    start = 0
    seq = 0
    before = 0
    splits = 0
    for i in range(batch):
        count = gl.maximum((gl.load(num_packed_ptr + i) + unit - 1) // unit, 1)
        mine = (flat >= start) & (flat < start + count)
        seq = gl.where(mine, i, seq)
        before = gl.where(mine, start, before)
        splits = gl.where(mine, count, splits)
        start += count
    return seq, flat - before, splits, before


@gluon.jit
def combine(
    acc, running, total, weight, lane, warp, tid, first_head, out_row, part_row, lse_row, stride_oh, parts, split,
    to_value, N: gl.constexpr, G: gl.constexpr, D: gl.constexpr, HEADS: gl.constexpr, NT: gl.constexpr,
    PAIRS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Add up the warps' sums through shared memory (the table is not needed any more); write the result of this
    program, to ``out_row`` if it is the only one of its heads, else to ``part_row`` and ``lse_row``."""
    ROW: gl.constexpr = 24 * (N + 1)
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
                    place = (g * N + 2 * (i // 3) + h) * 3 + i % 3
                else:
                    place = (8 * N + g) * 3 + i % 3
                if 2 * (i // 3) + h <= N:
                    value = acc[(b * 3 * PAIRS + i) * 2 + h] + lift
                    write_shared(mine + u32(place * 4), value.to(gl.uint32, bitcast=True))
        write_shared(heads, running[b].to(gl.uint32, bitcast=True))
        write_shared(heads + 16, mass.to(gl.uint32, bitcast=True))
    barrier()
    for written in range(0, HEADS * D, 32 * WARPS):
        item = written + tid
        which = gl.minimum(item // D, HEADS - 1)
        column = item % D
        row = u32(((which // 4) * (4 * ROW + 8) + (which % 4) * ROW + column) * 4)
        head = u32(((which // 4) * (4 * ROW + 8) + 4 * ROW + which % 4) * 4)
        best = running[0] * 0.0 - 1e30
        for w in gl.static_range(WARPS):
            best = gl.maximum(best, read_shared_f(head + w * (WARP_WORDS * 4)))
        mass = best * 0.0
        value = best * 0.0
        for w in gl.static_range(WARPS):
            scale = exp2(read_shared_f(head + w * (WARP_WORDS * 4)) - best)
            mass += scale * read_shared_f(head + (w * (WARP_WORDS * 4) + 16))
            value += scale * read_shared_f(row + w * (WARP_WORDS * 4))
        keep = (item < HEADS * D) & (first_head + which < G)
        empty = mass == 0.0
        value = gl.where(empty, 0.0, value * to_value / gl.where(empty, 1.0, mass))
        if parts == 1:
            gl.store(out_row + which * stride_oh + column, value.to(out_row.dtype.element_ty), mask=keep)
        else:
            place = which * parts + split
            gl.store(part_row + place.to(gl.int64) * D + column, value, mask=keep)
            level = gl.where(empty, -1e30, best + log2(gl.where(empty, 1.0, mass)))
            gl.store(lse_row + place, level, mask=keep & (column == 0))


@gluon.jit
def merge(tid, first_head, out_row, part_row, lse_row, stride_oh, parts, G: gl.constexpr, D: gl.constexpr,
           HEADS: gl.constexpr, WARPS: gl.constexpr):  # fmt: skip
    """The result of all programs of these heads, by the last one to finish; past the first-level cache, which is not
    coherent."""
    AT_ONCE: gl.constexpr = 16  # parts whose loads are under way together
    for written in range(0, HEADS * D, 32 * WARPS):
        item = written + tid
        which = gl.minimum(item // D, HEADS - 1)
        column = item % D
        keep = (item < HEADS * D) & (first_head + which < G)
        best = (item * 0).to(gl.float32) - 1e30
        mass = best * 0.0
        value = best * 0.0
        for first in range(0, parts, AT_ONCE):
            levels = ()
            values = ()
            for s in gl.static_range(AT_ONCE):
                there = keep & (first + s < parts)
                place = which * parts + first + s
                level = gl.load(lse_row + place, mask=there, other=-1e30, cache_modifier=".cg")
                levels = levels + (level,)
                part = gl.load(part_row + place.to(gl.int64) * D + column, mask=there, other=0.0, cache_modifier=".cg")
                values = values + (part,)
            highest = best
            for s in gl.static_range(AT_ONCE):
                highest = gl.maximum(highest, levels[s])
            decay = exp2(best - highest)
            best = highest
            mass = mass * decay
            value = value * decay
            for s in gl.static_range(AT_ONCE):
                scale = exp2(levels[s] - best)
                mass += scale
                value += scale * values[s]
        gl.store(out_row + which * stride_oh + column, (value / mass).to(out_row.dtype.element_ty), mask=keep)
