"""Triton kernels around the experts' products: the router, sorting tokens by expert, adding up.

EARLY: see `kernels.step.layer_kernels`.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _comparable(logits):
    """What is no number becomes the largest one: so that of two there is always one that comes first."""
    return tl.where(logits == logits, logits, float("inf"))


@triton.jit
def _earlier(theirs, other, mine, at):
    """Whether each of theirs comes before each of mine, [theirs, mine] as 0 and 1; places decide between equal ones."""
    larger = theirs[:, None] > mine[None, :]
    equal = theirs[:, None] == mine[None, :]
    return (larger | (equal & (other[:, None] < at[None, :]))).to(tl.int32)


@triton.jit
def _choose(
    LOGITS, INDICES, WEIGHTS, TILES, ORDER, row, experts, outputs, CHOSEN: tl.constexpr, BE: tl.constexpr,
    PART: tl.constexpr, NORMALISED: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """The CHOSEN largest logits of a row, and their shares. SINGLE: there is one row; its tiles are written, too.

    Each logit's rank is the number of those before it: no turn waits for the one before. Of many logits PART are
    compared with all at a time. They are read past the first-level cache, which may not know of other programs' writes.
    """
    at = tl.arange(0, BE)
    source = LOGITS + row * outputs
    logits = tl.load(source + at, mask=at < experts, other=-float("inf"), cache_modifier=".cg")
    mine = _comparable(logits)
    if PART == BE:
        before = _earlier(mine, at, mine, at)
    else:
        before = tl.zeros([PART, BE], tl.int32)
        for first in range(0, BE, PART):
            other = first + tl.arange(0, PART)
            theirs = tl.load(source + other, mask=other < experts, other=-float("inf"), cache_modifier=".cg")
            before += _earlier(_comparable(theirs), other, mine, at)
    rank = tl.sum(before, 0)
    chosen = rank < CHOSEN
    exps = tl.exp(logits - tl.max(logits, 0))
    total = tl.sum(tl.where(chosen, exps, 0.0) if NORMALISED else exps, 0)
    tl.store(WEIGHTS + row * CHOSEN + rank, exps / total, mask=chosen)
    tl.store(INDICES + row * CHOSEN + rank, at, mask=chosen)
    if SINGLE:
        tl.store(ORDER + rank, rank, mask=chosen)
        tl.store(TILES + 3 * rank, at, mask=chosen)
        tl.store(TILES + 3 * rank + 1, rank, mask=chosen)
        tl.store(TILES + 3 * rank + 2, rank + 1, mask=chosen)


@triton.jit
def router_kernel(
    X, WEIGHT, BIAS, OUT, COUNTERS, INDICES, WEIGHTS, TILES, ORDER, experts, outputs, K: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BIASED: tl.constexpr, CHOSEN: tl.constexpr, BE: tl.constexpr,
    PART: tl.constexpr, NORMALISED: tl.constexpr, SINGLE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Float32 logits OUT [R, outputs] of X [R, K] by WEIGHT [outputs, K]; the program is (BN outputs, row). The last
    program of a row to end chooses its experts. COUNTERS: int32 [R], 0 before and after."""
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BK)
    source = WEIGHT + at[:, None] * K + k[None, :]
    there = (at < outputs)[:, None]
    weights = tl.load(source, mask=there & (k < K)[None, :], other=0)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros([BN, BK], tl.float32)
    for first in range(0, K, BK):
        x = tl.load(X + row * K + first + k, mask=first + k < K, other=0).to(tl.float32)
        following = first + BK
        ahead = tl.load(source + following, mask=there & (following + k < K)[None, :], other=0)
        total += weights.to(tl.float32) * x[None, :]
        weights = ahead
    logits = tl.sum(total, 1)
    if BIASED:
        logits += tl.load(BIAS + at, mask=at < outputs, other=0).to(tl.float32)
    tl.store(OUT + row * outputs + at, logits, mask=at < outputs)
    tl.debug_barrier()  # what all threads have written comes before what one of them counts
    ended = tl.atomic_add(COUNTERS + row, 1, sem="acq_rel")
    if ended == tl.num_programs(0) - 1:
        tl.store(COUNTERS + row, 0)
        _choose(OUT, INDICES, WEIGHTS, TILES, ORDER, row, experts, outputs, CHOSEN, BE, PART, NORMALISED, SINGLE)


@triton.jit
def router_rows_kernel(
    X, WEIGHT, BIAS, OUT, rows, outputs, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BIASED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """As `router_kernel`, for many rows; the program is (BN outputs, BM rows)."""
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    row = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    k = tl.arange(0, BK)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros([BM, BN], tl.float32)
    for first in range(0, K, BK):
        inside = (first + k < K)[None, :]
        x = tl.load(X + row[:, None] * K + first + k[None, :], mask=(row < rows)[:, None] & inside, other=0)
        w = tl.load(WEIGHT + at[:, None] * K + first + k[None, :], mask=(at < outputs)[:, None] & inside, other=0)
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    if BIASED:
        total += tl.load(BIAS + at, mask=at < outputs, other=0).to(tl.float32)[None, :]
    mask = (row < rows)[:, None] & (at < outputs)[None, :]
    tl.store(OUT + row[:, None] * outputs + at[None, :], total, mask=mask)


@triton.jit
def choose_kernel(
    LOGITS, INDICES, WEIGHTS, TILES, ORDER, experts, outputs, CHOSEN: tl.constexpr, BE: tl.constexpr,
    PART: tl.constexpr, NORMALISED: tl.constexpr, SINGLE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A row's experts (`_choose`), a program each."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    _choose(LOGITS, INDICES, WEIGHTS, TILES, ORDER, row, experts, outputs, CHOSEN, BE, PART, NORMALISED, SINGLE)


@triton.jit
def count_kernel(INDICES, COUNTS, pairs, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """How many pairs an expert has; a program each."""
    expert = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros([BLOCK], tl.int32)
    for first in range(0, pairs, BLOCK):
        chosen = tl.load(INDICES + first + at, mask=first + at < pairs, other=-1)
        total += (chosen == expert).to(tl.int32)
    tl.store(COUNTS + expert, tl.sum(total, 0))


@triton.jit
def place_kernel(
    INDICES, COUNTS, ORDER, TILES, experts, pairs, tiles, ROWS: tl.constexpr, BE: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Writes an expert's pairs to ORDER, in their order, and its tiles of ROWS rows; a program each. The last one marks
    the tiles that nobody needs."""
    expert = tl.program_id(0)
    other = tl.arange(0, BE)
    at = tl.arange(0, BLOCK)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    counts = tl.load(COUNTS + other, mask=other < experts, other=0)
    of_each = (counts + ROWS - 1) // ROWS
    start = tl.sum(tl.where(other < expert, counts, 0), 0)
    count = tl.sum(tl.where(other == expert, counts, 0), 0)
    tile = tl.sum(tl.where(other < expert, of_each, 0), 0)
    used = tl.sum(of_each, 0)
    place = start
    for first in range(0, pairs, BLOCK):
        pair = first + at
        mine = (tl.load(INDICES + pair, mask=pair < pairs, other=-1) == expert).to(tl.int32)
        tl.store(ORDER + place + tl.cumsum(mine, 0) - 1, pair, mask=mine > 0)
        place += tl.sum(mine, 0)
    for first in range(0, count, BLOCK * ROWS):
        begin = first + at * ROWS
        into = TILES + 3 * (tile + first // ROWS + at)
        here = begin < count
        tl.store(into, expert + 0 * at, mask=here)
        tl.store(into + 1, start + begin, mask=here)
        tl.store(into + 2, start + tl.minimum(begin + ROWS, count), mask=here)
    if expert == experts - 1:
        for first in range(used, tiles, BLOCK):
            tl.store(TILES + 3 * (first + at), 0 * at - 1, mask=first + at < tiles)


@triton.jit
def combine_kernel(
    PARTS, WEIGHTS, SHARED, LOGITS, OUT, outputs, experts, N: tl.constexpr, CHOSEN: tl.constexpr, BLOCK: tl.constexpr,
    HAS_SHARED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The weighted sum of a row's CHOSEN parts; the program is (BLOCK columns, row)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = at < N
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros([BLOCK], tl.float32)
    for number in tl.static_range(CHOSEN):
        weight = tl.load(WEIGHTS + row * CHOSEN + number)
        part = tl.load(PARTS + (row * CHOSEN + number) * N + at, mask=inside, other=0)
        total += weight * part.to(tl.float32)
    if HAS_SHARED:
        gate = 1.0 / (1.0 + tl.exp(-tl.load(LOGITS + row * outputs + experts)))
        total += gate * tl.load(SHARED + row * N + at, mask=inside, other=0).to(tl.float32)
    tl.store(OUT + row * N + at, total.to(OUT.dtype.element_ty), mask=inside)
