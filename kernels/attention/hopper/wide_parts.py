"""How the teams of a program of the wide decode kernel add up what they found, lane by lane."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from octo_run.kernels.lane_copies import wait_for_all_copies
from octo_run.kernels.lanes import (
    barrier,
    exp2,
    log2,
    read_shared2,
    read_shared4,
    read_shared_f,
    sum_over_rows,
    u32,
    write_shared,
    write_shared_if,
)


@constexpr_function
def _columns(head_dim):
    """Numbers of a head with those that pad the extra triplets."""
    return 24 * ((int(head_dim) + 2) // 3 // 8 + 1)


@constexpr_function
def combine_bytes(head_dim, blocks, teams):
    """Shared memory that `combine_teams` takes: of every team and head sums, masses and lifts of four warps, and the
    maximum."""
    return 4 * 4 * int(blocks) * int(teams) * (int(_columns(head_dim)) + 4 + 4 + 1)


@gluon.jit
def _bits(x):
    return x.to(gl.uint32, bitcast=True)


@gluon.jit
def combine_teams(
    acc, level, total, weight, tid, first_head, partial_row, lse_row, to_value, G: gl.constexpr, D: gl.constexpr,
    NT: gl.constexpr, PAIRS: gl.constexpr, TEAMS: gl.constexpr,
):  # fmt: skip
    """Add up the warps' sums through shared memory (the table is not needed any more); write outputs to
    ``partial_row`` [4 NT, D], and log2-sum-exp2 to ``lse_row`` [4 NT]."""
    N: gl.constexpr = (D + 2) // 3 // 8
    COLUMNS: gl.constexpr = _columns(D)
    HEADS: gl.constexpr = 4 * NT
    MASS_AT: gl.constexpr = 4 * TEAMS * HEADS * COLUMNS
    LIFT_AT: gl.constexpr = MASS_AT + 16 * TEAMS * HEADS
    MAXIMA_AT: gl.constexpr = LIFT_AT + 16 * TEAMS * HEADS
    lane = tid & 31
    warp = tid >> 5
    tile = warp & 3
    g = lane >> 2
    t = lane & 3
    wait_for_all_copies(lane)
    barrier()
    for b in gl.static_range(NT):
        head = (warp >> 2) * HEADS + 4 * b + t
        write_shared(u32(MASS_AT + (head * 4 + tile) * 4), _bits(sum_over_rows(total[b], lane)))
        write_shared(u32(LIFT_AT + (head * 4 + tile) * 4), _bits(0.5 * sum_over_rows(weight[b], lane)))
        write_shared(u32(MAXIMA_AT + head * 4), _bits(level[b]))
        for i in gl.static_range(PAIRS):
            for c in gl.static_range(3):
                for h in gl.static_range(2):
                    slot = tile * (2 * PAIRS) + (2 * i + h)
                    column = gl.where(slot < N, (g * N + slot) * 3 + c, (8 * N + g) * 3 + c)
                    value = acc[(b * PAIRS + i) * 6 + 2 * c + h]
                    write_shared_if(u32((head * COLUMNS + column) * 4), _bits(value), slot <= N)
    barrier()
    for first in gl.static_range(0, D, 256 * TEAMS):
        column = first + 2 * tid
        for i in gl.static_range(HEADS):
            best = (tid * 0).to(gl.float32) - 1e30
            for n in gl.static_range(TEAMS):
                best = gl.maximum(best, read_shared_f(u32(tid * 0 + (MAXIMA_AT + (n * HEADS + i) * 4))))
            mass = best * 0.0
            left = best * 0.0
            right = best * 0.0
            for n in gl.static_range(TEAMS):
                scale = exp2(read_shared_f(u32(tid * 0 + (MAXIMA_AT + (n * HEADS + i) * 4))) - best)
                masses = read_shared4(u32(tid * 0 + (MASS_AT + (n * HEADS + i) * 16)))
                lifts = read_shared4(u32(tid * 0 + (LIFT_AT + (n * HEADS + i) * 16)))
                lift = best * 0.0
                for w in gl.static_range(4):
                    mass += scale * masses[w].to(gl.float32, bitcast=True)
                    lift += lifts[w].to(gl.float32, bitcast=True)
                two = read_shared2(u32(((n * HEADS + i) * COLUMNS + column) * 4))
                left += scale * (two[0].to(gl.float32, bitcast=True) + lift)
                right += scale * (two[1].to(gl.float32, bitcast=True) + lift)
            keep = (column < D) & (first_head + i < G)
            empty = mass == 0.0
            over = gl.where(empty, 0.0, to_value / gl.where(empty, 1.0, mass))
            gl.store(partial_row + (i * D + column), left * over, mask=keep)
            gl.store(partial_row + (i * D + 1 + column), right * over, mask=keep)
            whole = gl.where(empty, -1e30, best + log2(gl.where(empty, 1.0, mass)))
            gl.store(lse_row + (column * 0 + i), whole, mask=keep & (column == 0))
