"""How the Triton decode kernels divide the sequences of a batch into parts, and the merge of what these found.

A part is the share of a sequence's pages and full-precision tokens that one program does: see `attention.parts`.

All of this goes by the order of the batch. Filler has a part, in which there are no keys.
The unit is a tile of keys: of packed pages, of the sinks, of the tail before its ring's end and after it (so that none
wraps). With a window, pages wholly before it and full-precision tokens before it are in no tile. Sequences are cut in
parts of about one length, at most as many in all as there are programs, and each in at least one. Every program finds
its own part, from the lengths on the device. Programs without a part are the last of the grid: among the others they
would leave multiprocessors with less to do than their neighbours (measured: an eighth of such programs cost 70 % more
time).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime.jit import constexpr_function

from octo_run.kernels.page_size import PAGE_TOKENS

PAGE = tl.constexpr(PAGE_TOKENS)
"""Tokens of a page."""
LOWEST = tl.constexpr(-1e30)
"""Starting maximum: finite, so that a program without a key subtracts no infinities."""
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def in_steps(stride, STEP: tl.constexpr):
    """The stride, which is a multiple of STEP.

    Of an argument the compiler knows it for 16 alone. With heads of 100 or 120 numbers it would read number by number,
    past the asynchronous copies, and what ptxas 12.8 made of that used registers that nothing had written.
    """
    if STEP % 16 == 0:
        return stride
    else:
        return stride // STEP * STEP


@constexpr_function
def tiles_of_page(keys):
    """Tiles of so many keys that make a page."""
    return PAGE_TOKENS // int(keys)


@triton.jit
def earliest_seen(length, WINDOW: tl.constexpr):
    """The first position that the last of so many tokens sees; WINDOW 0: it sees all."""
    if WINDOW == 0:
        return 0
    else:
        return tl.maximum(length - WINDOW, 0)


@triton.jit
def hidden_pages(earliest, sink, packed, WINDOW: tl.constexpr):
    """Packed pages of which every token lies before position `earliest`."""
    if WINDOW == 0:
        return 0
    else:
        return tl.minimum(tl.maximum(earliest - sink, 0) // PAGE, packed)


@triton.jit
def first_wanted(b, NUM_PACKED, STARTS, sink, WINDOW: tl.constexpr):
    """The number of the first page that any query of a prompt sees; its slabs begin there."""
    if WINDOW == 0:
        return 0
    else:
        earliest = earliest_seen(tl.load(STARTS + b) + 1, WINDOW)
        return hidden_pages(earliest, sink, tl.load(NUM_PACKED + b), WINDOW)


@triton.jit
def full_segments(packed, length, origin, sink, capacity, earliest, WINDOW: tl.constexpr):
    """Full-precision tokens of a sequence, or of many, from position `earliest` on: the first one in the sinks, and how
    many follow there; the position of the first one behind the pages, its row of the ring, how many follow before the
    ring's end, and how many in all."""
    sinks = tl.minimum(sink, length)
    done = sink + packed * PAGE
    skipped = 0
    if WINDOW > 0:
        skipped = tl.minimum(earliest, sinks)
        sinks -= skipped
        done = tl.maximum(done, earliest)
    total = tl.maximum(length - done, 0)
    row0 = (done - sink - origin) % capacity
    return skipped, sinks, done, row0, tl.minimum(total, capacity - row0), total


@triton.jit
def full_tiles(segments, BN: tl.constexpr):
    """Tiles that they make."""
    _, sinks, _, _, before_wrap, total = segments
    return tl.cdiv(sinks, BN) + tl.cdiv(before_wrap, BN) + tl.cdiv(total - before_wrap, BN)


@triton.jit
def full_tile(t, segments, BN: tl.constexpr):
    """Tile t of sinks and tail: whether it lies in the sinks, its first row there, the position of that row's token,
    and how many of its rows count."""
    skipped, sinks, done, row0, before_wrap, total = segments
    sink_tiles = tl.cdiv(sinks, BN)
    first_tiles = tl.cdiv(before_wrap, BN)
    is_sink = t < sink_tiles
    wrapped = t >= sink_tiles + first_tiles
    at = (t - sink_tiles) * BN
    after = (t - sink_tiles - first_tiles) * BN
    row = tl.where(is_sink, skipped + t * BN, tl.where(wrapped, after, row0 + at))
    position = tl.where(is_sink, skipped + t * BN, done + tl.where(wrapped, before_wrap + after, at))
    valid = tl.where(is_sink, sinks - t * BN, tl.where(wrapped, total - before_wrap - after, before_wrap - at))
    return is_sink, row, position, valid


@triton.jit
def soft_cap(s, CAP: tl.constexpr):
    """Scores in base 2 as ``cap tanh(s / cap)`` leaves them; CAP is in base e. Exact to 1e-7 of the cap."""
    top: tl.constexpr = CAP * LOG2E
    rate: tl.constexpr = 2.0 / CAP
    return top - 2.0 * top / (tl.exp2(s * rate) + 1.0)


@triton.jit
def first_softmax(SINK_LOGITS, head, wanted, SINKS: tl.constexpr):
    """Maximum and sum that the softmax of rows for heads `head` begins with: of the sink logit, in base 2, where it is
    `wanted`; else of nothing."""
    m = tl.full(head.shape, LOWEST, tl.float32)
    l = tl.zeros(head.shape, tl.float32)
    if SINKS:
        m = tl.where(wanted, tl.load(SINK_LOGITS + head, mask=wanted, other=0.0) * LOG2E, m)
        l = tl.where(wanted, 1.0, l)
    return m, l


@triton.jit
def place(b, ROWS, STARTS):
    """The row that number b of the batch owns, int64, and its length with the query; 0 and 0 of filler."""
    row = tl.load(ROWS + b)
    length = tl.where(row < 0, 0, tl.load(STARTS + b) + 1)
    return tl.maximum(row, 0).to(tl.int64), length


@triton.jit
def divide(
    NUM_PACKED,
    STARTS,
    TAIL_ORIGIN,
    sink,
    capacity,
    batch,
    programs,
    BATCH: tl.constexpr,
    BN: tl.constexpr,
    BF: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """The numbers of the sequences, padded to BATCH; the parts before each; and its parts, 0 beyond `batch`.

    Tiles of pages have BN rows, the others BF. All parts are at most `programs`, at least twice `batch`.
    """
    i = tl.arange(0, BATCH)
    inside = i < batch
    packed = tl.load(NUM_PACKED + i, mask=inside, other=0)
    length = tl.load(STARTS + i, mask=inside, other=0) + 1
    origin = tl.load(TAIL_ORIGIN + i, mask=inside, other=0)
    earliest = earliest_seen(length, WINDOW)
    segments = full_segments(packed, length, origin, sink, capacity, earliest, WINDOW)
    tiles = (packed - hidden_pages(earliest, sink, packed, WINDOW)) * tiles_of_page(BN) + full_tiles(segments, BF)
    tiles = tl.where(inside, tiles, 0)
    total = tl.sum(tiles, 0)
    # Each sequence's last part may be a short one: room for `batch` of them is enough, but mostly less will do.
    unit = tl.cdiv(total, programs - (batch if BATCH > 1 else 0))
    if BATCH > 1:
        for k in tl.static_range(4):
            shorter = tl.cdiv(total, programs - batch * (3 - k) // 4)
            unit = tl.where(tl.sum(tl.cdiv(tiles, shorter), 0) <= programs, shorter, unit)
    parts = tl.cdiv(tiles, unit)
    return i, tl.cumsum(parts, 0) - parts, parts


@triton.jit
def my_part(
    flat, NUM_PACKED, STARTS, TAIL_ORIGIN, sink, capacity, batch, programs, BATCH: tl.constexpr, BN: tl.constexpr,
    BF: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Of program `flat`: the sequence, the part, and that sequence's parts (0: there is nothing to do)."""
    i, begin, parts = divide(NUM_PACKED, STARTS, TAIL_ORIGIN, sink, capacity, batch, programs, BATCH, BN, BF, WINDOW)
    mine = (flat >= begin) & (flat < begin + parts)
    b = tl.sum(tl.where(mine, i, 0), 0)
    return b, flat - tl.sum(tl.where(mine, begin, 0), 0), tl.sum(tl.where(mine, parts, 0), 0)


@triton.jit
def _merge(
    PARTIAL, LSE, out, first, end, h, heads, D: tl.constexpr, AT_ONCE: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The parts from number `first` to before `end` of head h, to the row `out`: the program's columns."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    best = tl.full([AT_ONCE], LOWEST, tl.float32)
    mass = tl.zeros([AT_ONCE], tl.float32)
    total = tl.zeros([AT_ONCE, COLUMNS], tl.float32)
    for start in range(first, end, AT_ONCE):
        s = start + tl.arange(0, AT_ONCE)
        lse = tl.load(LSE + s * heads + h, mask=s < end, other=float("-inf"))
        keep = (s < end)[:, None] & (columns < D)[None, :]
        at = PARTIAL + (s * heads + h).to(tl.int64)[:, None] * D + columns[None, :]
        partial = tl.load(at, mask=keep, other=0.0)
        top = tl.maximum(best, lse)
        decay = tl.exp2(best - top)
        weight = tl.exp2(lse - top)
        mass = mass * decay + weight
        total = total * decay[:, None] + partial * weight[:, None]
        best = top
    share = tl.exp2(best - tl.max(best, 0))
    merged = tl.sum(total * share[:, None], 0) / tl.sum(mass * share, 0)
    tl.store(out + columns, merged.to(out.dtype.element_ty), mask=columns < D)


@triton.jit(do_not_specialize=["sink", "capacity", "batch", "programs"])
def merge_kernel(
    PARTIAL, LSE, OUT, NUM_PACKED, STARTS, TAIL_ORIGIN, sink, capacity, batch, programs, so_b, so_h, D: tl.constexpr,
    BATCH: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, AT_ONCE: tl.constexpr, COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (columns, head, sequence): weighs the outputs PARTIAL [parts, H, D] of parts by their share of the
    softmax's sum, whose log2 is LSE [parts, H]."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    h = tl.program_id(1)
    heads = tl.num_programs(1)
    b = tl.program_id(2)
    i, begin, parts = divide(NUM_PACKED, STARTS, TAIL_ORIGIN, sink, capacity, batch, programs, BATCH, BN, BF, WINDOW)
    first = tl.sum(tl.where(i == b, begin, 0), 0)
    end = first + tl.sum(tl.where(i == b, parts, 0), 0)
    _merge(PARTIAL, LSE, OUT + b.to(tl.int64) * so_b + h * so_h, first, end, h, heads, D, AT_ONCE, COLUMNS)


@triton.jit
def merge_places_kernel(
    PARTIAL, LSE, OUT, PLACES, so_b, so_h, D: tl.constexpr, AT_ONCE: tl.constexpr, COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """`merge_kernel` for parts that another rule has divided: PLACES [batch, 2] has a sequence's first part and its
    number of parts."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    h = tl.program_id(1)
    b = tl.program_id(2)
    first = tl.load(PLACES + 2 * b)
    end = first + tl.load(PLACES + 2 * b + 1)
    out = OUT + b.to(tl.int64) * so_b + h * so_h
    _merge(PARTIAL, LSE, out, first, end, h, tl.num_programs(1), D, AT_ONCE, COLUMNS)
