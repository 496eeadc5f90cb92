"""Fused decode attention over pages of trellis codes for heads of 512 numbers (NVIDIA, Gluon), lane by lane.

It is the table-decode kernel (`decode`) divided otherwise: a page is done by a team of four warps, for up to sixteen
query heads. The warps share the tokens for the logits, and the head for the sums of values, so that a page is decoded
once, and a lane has a quarter of the sums. Each team has one K and one V block in shared memory; while it works on one
of them, the other one comes.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from octo_run.kernels.attention.hopper.mean_bias import (
    PAGE_BYTES,
    PAGES_AT_ONCE,
    component_bytes,
    load_angles,
    load_half_of_functions,
    make_components,
    mean_bytes,
    operand_bytes,
    write_operands,
)
from octo_run.kernels.attention.hopper.parts import divide, hidden_pages
from octo_run.kernels.attention.hopper.products import query_bytes
from octo_run.kernels.attention.hopper.tables import entries, fill_tables, keep_words, row_shift
from octo_run.kernels.attention.hopper.wide_full_precision import full_bytes, full_sums, full_tokens
from octo_run.kernels.attention.hopper.wide_parts import combine_bytes, combine_teams
from octo_run.kernels.attention.hopper.wide_products import (
    add_tile_biases,
    limit_tile,
    slice_values,
    split_query,
    tile_scores,
    value_norms,
    weigh_tile,
)
from octo_run.kernels.attention.hopper.wide_words import SLICE_PAIRS, fourth_lookup
from octo_run.kernels.lane_copies import commit_copies, copy16, copy16_if, wait_for_copies
from octo_run.kernels.lanes import (
    barrier,
    let_next_kernel_start,
    own_warp,
    read_scalars,
    repeat,
    shuffle,
    team_barrier,
    u32,
    wait_for_kernel_before,
)


@constexpr_function
def exchange_bytes(blocks):
    """Shared memory by which the warps of a team tell each other maxima and weights."""
    return int(blocks) * (64 + 512)


@constexpr_function
def other_bytes(head_dim, blocks, teams, bytes_k, bytes_v, mean):
    """Shared memory beside the tables: pages, queries, exchange, four words, what the key mean takes."""
    head_dim, blocks, teams, mean = int(head_dim), int(blocks), int(teams), int(mean)
    of_team = 64 * (int(bytes_k) + int(bytes_v)) + int(exchange_bytes(blocks))
    of_mean = int(mean_bytes(head_dim, blocks, teams, mean, PAGES_AT_ONCE, PAGE_BYTES)) if mean else 0
    return teams * of_team + blocks * int(query_bytes(head_dim)) + 16 + of_mean


@gluon.jit
def _fetch(stage, block, lane, tile, BPV: gl.constexpr):
    """Start copying a block of 64 vectors to the team's stage, every warp of it a quarter."""
    first = tile * 512 + lane * 16
    to = stage + u32(first)
    source = block + first
    for c in gl.static_range((64 * BPV + 2047) // 2048):
        if c * 2048 + 2048 <= 64 * BPV:
            copy16(to + c * 2048, source + c * 2048)
        else:
            copy16_if(to + c * 2048, source + c * 2048, c * 2048 + first < 64 * BPV, False)
    commit_copies(lane)


# What differs from call to call is not worth a compilation of its own.
@gluon.jit(do_not_specialize=["st_r", "sink", "capacity", "batch", "even_parts", "processors"])
def wide_decode_kernel(
    Q, PAGES, PAGE_TABLE, ROWS, NUM_PACKED, STARTS, TAIL_ORIGIN, SINK_K, SINK_V, TAIL_K, TAIL_V, TABLE_K, TABLE_V,
    COEF, ANGLES, WEIGHTS, FUNCTIONS, PARTIAL, LSE, PLACES, sq_b, sq_h, sp_page, sp_head, st_r,
    ssk_r, ssk_h, ssk_t, ssv_r, ssv_h, ssv_t, stk_r, stk_h, stk_t, stv_r, stv_h, stv_t, sc_b, sc_h, sink, capacity,
    step_k, step_v, scale_log2, batch, even_parts, processors, SINK_LOGITS,
    G: gl.constexpr, D: gl.constexpr, B_K: gl.constexpr, STATE_K: gl.constexpr,
    SIGNED_K: gl.constexpr, NORM_K: gl.constexpr, BPV_K: gl.constexpr, COPIES_K: gl.constexpr,
    COPIES_XK: gl.constexpr, B_V: gl.constexpr, STATE_V: gl.constexpr, SIGNED_V: gl.constexpr, BPV_V: gl.constexpr,
    COPIES_V: gl.constexpr, COPIES_XV: gl.constexpr, ONE_TABLE: gl.constexpr, NT: gl.constexpr, TEAMS: gl.constexpr,
    ELEMENT: gl.constexpr, MEAN: gl.constexpr, SMEM_WORDS: gl.constexpr, BATCHED: gl.constexpr, EARLY: gl.constexpr,
    WINDOW: gl.constexpr, CAP: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    """Programs: (KV head and block of 4 NT query heads, part of a sequence). ``even_parts``: see `parts.divide`.

    Outputs go to PARTIAL [parts, H, D], log2-sum-exp2 to LSE [parts, H], and to PLACES [batch, 2] the first part of a
    sequence and how many it has. ONE_TABLE, MEAN, EARLY, WINDOW, CAP, SINKS: as in `table_decode_kernel`. Shared
    memory: K's table, its extra triplets' table; V's likewise if it has its own; a K and a V block for each team; the
    queries; four words that say what the program does; what the key mean takes; what the teams' warps exchange.
    Full-precision tokens come first, where the tables are to come.
    """
    WARPS: gl.constexpr = 4 * TEAMS
    T: gl.constexpr = (D + 2) // 3
    N: gl.constexpr = T // 8
    gl.static_assert(T % 8 == 3)
    EXTRAS: gl.constexpr = 3
    PAIRS: gl.constexpr = SLICE_PAIRS
    BLOCKS: gl.constexpr = (G + 4 * NT - 1) // (4 * NT)
    SH_K: gl.constexpr = row_shift(COPIES_K)
    SHX_K: gl.constexpr = row_shift(COPIES_XK)
    SH_V: gl.constexpr = row_shift(COPIES_V)
    SHX_V: gl.constexpr = row_shift(COPIES_XV)
    MAIN_K: gl.constexpr = 1 << (B_K + STATE_K)
    MAIN_V: gl.constexpr = 1 << (B_V + STATE_V)
    EXTRAS_AT_K: gl.constexpr = MAIN_K * COPIES_K * 4
    TABLE_END_K: gl.constexpr = EXTRAS_AT_K + (4 << B_K) * COPIES_XK
    TABLE_AT_V: gl.constexpr = 0 if ONE_TABLE else TABLE_END_K
    EXTRAS_AT_V: gl.constexpr = TABLE_AT_V + MAIN_V * COPIES_V * 4
    STAGES_AT: gl.constexpr = EXTRAS_AT_V + (4 << B_V) * COPIES_XV
    QUERIES_AT: gl.constexpr = STAGES_AT + TEAMS * 64 * (BPV_K + BPV_V)
    QUERY_BYTES: gl.constexpr = query_bytes(D)
    PLACE_AT: gl.constexpr = QUERIES_AT + NT * QUERY_BYTES
    MEAN_AT: gl.constexpr = PLACE_AT + 16
    COMPONENTS_AT: gl.constexpr = MEAN_AT + operand_bytes(D, NT, MEAN)
    EXCHANGE_AT: gl.constexpr = MEAN_AT + (mean_bytes(D, NT, TEAMS, MEAN, PAGES_AT_ONCE, PAGE_BYTES) if MEAN > 0 else 0)
    gl.static_assert(full_bytes(D, NT) <= STAGES_AT)
    gl.static_assert(combine_bytes(D, NT, TEAMS) <= SMEM_WORDS * 4)
    WORDS_K: gl.constexpr = BPV_K // 2  # of a lane, for its eight tokens
    FULL_V: gl.constexpr = (16 * N * (B_V + 3 * SIGNED_V) + 31) // 32
    ALL_V: gl.constexpr = (16 * (N + 1) * (B_V + 3 * SIGNED_V) + 31) // 32
    NORMS_AT: gl.constexpr = FULL_V * 128 + (ALL_V - FULL_V) * EXTRAS * 16
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])

    smem = gl.allocate_shared_memory(
        gl.int32, [SMEM_WORDS // (32 * WARPS), 32 * WARPS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    tid = gl.arange(0, 32 * WARPS, layout=LAYOUT)
    lane = tid & 31
    warp = tid >> 5
    team = warp >> 2
    tile = warp & 3
    smem.index(0).store(tid)  # names the allocation in the PTX: the lookups below address it by that name
    barrier()
    if BATCHED:
        divide(
            NUM_PACKED, STARTS, sink, gl.program_id(1), batch, even_parts, gl.num_programs(0), processors, lane, warp,
            PLACE_AT, TEAMS, WINDOW,
        )  # fmt: skip
        barrier()
        seq, part, parts, before = read_scalars(batch, PLACE_AT)
        if parts == 0:
            return
    else:
        seq = 0
        part = gl.program_id(1)
        parts = gl.num_programs(1)
        before = 0
    g = lane >> 2
    t = lane & 3
    head = gl.program_id(0) // BLOCKS
    first_head = gl.program_id(0) % BLOCKS * (4 * NT)

    # Before `wait_for_kernel_before` nothing is read that a kernel of the same step writes: the query, its key and
    # value, the key mean's coefficients.
    owned = gl.load(ROWS + seq)
    num = gl.load(NUM_PACKED + seq)
    start = gl.load(STARTS + seq)
    origin = gl.load(TAIL_ORIGIN + seq)
    length = gl.where(owned < 0, 0, start + 1)  # filler has no tokens
    owned = gl.maximum(owned, 0)
    table = entries(TABLE_K, tid, MAIN_K, 32 * WARPS)
    table_x = entries(TABLE_K + MAIN_K, tid, 1 << B_K, 32 * WARPS)
    hidden = hidden_pages(num, start, sink, WINDOW)
    per = (num - hidden + parts - 1) // parts
    begin = hidden + part * per
    end = gl.minimum(begin + per, num)
    last = gl.maximum(end - 1, 0)
    ids = PAGE_TABLE + owned * st_r
    pages = PAGES + head * sp_head
    page_id = gl.load(ids + gl.minimum(begin + team, last), mask=begin < end, other=0)
    next_id = gl.load(ids + gl.minimum(begin + team + TEAMS, last), mask=begin < end, other=0)
    k_stage = u32(STAGES_AT + team * (64 * (BPV_K + BPV_V)))
    v_stage = k_stage + 64 * BPV_K
    block = pages + page_id.to(gl.int64) * sp_page
    _fetch(k_stage, block, lane, tile, BPV_K)
    _fetch(v_stage, block + 64 * BPV_K, lane, tile, BPV_V)

    if MEAN > 0:
        components = u32(COMPONENTS_AT + team * component_bytes(NT, PAGES_AT_ONCE, PAGE_BYTES))
        own_block = gl.minimum(tile, NT - 1)
        functions = load_half_of_functions(FUNCTIONS, lane, tile % 2)
    after = 0
    if EARLY:
        let_next_kernel_start(seq)
        after = wait_for_kernel_before(seq)
    q_row = Q + (seq * sq_b + head * G * sq_h + after)
    sink_k = SINK_K + owned * ssk_r + head * ssk_h
    sink_v = SINK_V + owned * ssv_r + head * ssv_h
    tail_k = TAIL_K + owned * stk_r + head * stk_h
    tail_v = TAIL_V + owned * stv_r + head * stv_h
    coef = COEF + (seq * sc_b + head * G * sc_h + after)
    n_sink = gl.minimum(sink, length)
    behind = 64 * num  # the first token behind the pages, counted from the sinks on
    if WINDOW > 0:
        earliest = gl.maximum(length - WINDOW, 0)
        skipped = gl.minimum(earliest, n_sink)
        n_sink -= skipped
        sink_k += skipped * ssk_t
        sink_v += skipped * ssv_t
        behind = gl.maximum(behind, earliest - sink)
    count = n_sink + gl.maximum(length - sink - behind, 0)
    first_slot = (behind - origin) % capacity
    mine = ((count + 15) // 16 - part + parts - 1) // parts
    # A warp splits the query of a block of heads; warps without one do what the last one does.
    its_block = gl.minimum(warp, NT - 1)
    keep_words(
        u32(QUERIES_AT + its_block * QUERY_BYTES + lane * 16),
        split_query(q_row, sq_h, lane, first_head + 4 * its_block, step_k * scale_log2, G, D),
    )
    if MEAN > 0:
        write_operands(coef, sc_h, WEIGHTS, lane, warp, first_head, scale_log2, MEAN_AT, D, G, NT, MEAN, WARPS)
    full_tokens(
        q_row, sq_h, sink_k, sink_v, tail_k, tail_v, ssk_t, ssv_t, stk_t, stv_t, n_sink, count, first_slot, capacity,
        part, parts, mine, tid, first_head, scale_log2, SINK_LOGITS + head * G, 0, G, D, NT, ELEMENT, WARPS, CAP, SINKS,
    )  # fmt: skip
    highest, total, acc = full_sums(tid, 32512.0 / step_v, 0, D, NT, PAIRS)
    barrier()
    fill_tables(
        table, table_x, TABLE_V, tid, MAIN_K, COPIES_K, EXTRAS_AT_K, B_K, COPIES_XK, TABLE_AT_V, MAIN_V, COPIES_V,
        EXTRAS_AT_V, B_V, COPIES_XV, EXTRAS, ONE_TABLE, 32 * WARPS,
    )  # fmt: skip
    # Shuffled to itself: else the assembler takes the remainder's mask into every lookup, an instruction each.
    lane_k = shuffle(u32((lane % COPIES_K) * 4), lane)
    lane_xk = shuffle(u32((lane % COPIES_XK) * 4), lane)
    if ONE_TABLE:
        lane_v = lane_k
        lane_xv = lane_xk
    else:
        lane_v = shuffle(u32((lane % COPIES_V) * 4), lane)
        lane_xv = shuffle(u32((lane % COPIES_XV) * 4), lane)
    fourth = fourth_lookup(lane, tile, lane_v, lane_xv, B_V, STATE_V, SH_V, SHX_V, TABLE_AT_V, EXTRAS_AT_V)
    its_row = shuffle(u32(lane * 0 + 1) << u32(2 * tile), lane)  # for a product: as a shift it costs more
    zero_i = lane * 0
    zero_f = zero_i.to(gl.float32)
    level = highest
    weight = repeat(zero_f, NT)
    selector = u32(gl.where(g & 1 == 0, 0x7351, 0x6240))
    source = t * 4 + (g >> 1)
    queries_at = u32(QUERIES_AT + lane * 16)
    maxima_at = u32(EXCHANGE_AT + team * exchange_bytes(NT) + lane * 0)
    weights_at = maxima_at + 64 * NT
    barrier()
    # Every team ends its loop by itself; run in step instead (`own` is zero then), one without a page is not inside.
    own = own_warp(seq) // 4
    number = own_warp(seq) % 4  # of the warp in its team, as a scalar: `tile`
    for base in range(begin + own, end, TEAMS):
        page = base + (team - own)
        inside = page < end
        next_block = pages + next_id.to(gl.int64) * sp_page
        next_id = gl.load(ids + gl.minimum(page + 2 * TEAMS, last))
        if MEAN > 0:
            turn = (base - begin) & (TEAMS * (PAGES_AT_ONCE - 1))  # times TEAMS
            if (turn == 0) & (number < NT):  # a warp for each block of heads
                angles = load_angles(ANGLES, page, last, lane, D, TEAMS, PAGES_AT_ONCE)
                make_components(
                    angles, components + u32(own_block * (PAGES_AT_ONCE * PAGE_BYTES)), lane, MEAN_AT, D, 1, MEAN,
                    PAGES_AT_ONCE, PAGE_BYTES, own_block * (operand_bytes(D, NT, MEAN) // NT),
                )  # fmt: skip
        wait_for_copies(lane, 0)
        team_barrier(own)
        if base != begin + own:  # the first one is under way since the start
            _fetch(v_stage, block + 64 * BPV_K, lane, tile, BPV_V)
        scores = tile_scores(
            k_stage, lane, lane_k, lane_xk, queries_at, zero_i, tile, its_row, number, D, B_K, STATE_K, SH_K, SHX_K,
            EXTRAS_AT_K, SIGNED_K, NORM_K, WORDS_K, NT,
        )  # fmt: skip
        if MEAN > 0:
            scores = add_tile_biases(scores, components + u32(turn * (PAGE_BYTES // TEAMS)), functions, lane, tile, NT)
        if CAP > 0 or WINDOW > 0:
            unseen = gl.maximum(start + 1 - WINDOW, 0) - sink - 64 * page - 16 * tile
            scores = limit_tile(scores, lane, unseen, NT, CAP, WINDOW)
        wait_for_copies(lane, 0)
        team_barrier(own)
        _fetch(k_stage, next_block, lane, tile, BPV_K)
        gammas = value_norms(v_stage + NORMS_AT, lane, tile)
        highest, level, total, weight, decays = weigh_tile(
            scores, gammas, inside, highest, level, total, weight, maxima_at, weights_at, lane, tile, source, selector,
            own, NT,
        )  # fmt: skip
        acc = slice_values(
            acc, decays, v_stage, weights_at, lane, lane_v, fourth, zero_i, tile, number, D, B_V, STATE_V, SH_V,
            TABLE_AT_V, SIGNED_V, FULL_V, ALL_V, NT,
        )  # fmt: skip
        block = next_block

    gl.store(PLACES + (2 * seq + tid), gl.where(tid == 0, tid * 0 + before, tid * 0 + parts),
             mask=(tid < 2) & (part == 0))  # fmt: skip
    first_row = (before + part) * (gl.num_programs(0) // BLOCKS * G) + head * G + first_head
    combine_teams(
        acc, level, total, weight, tid, first_head, PARTIAL + first_row.to(gl.int64) * D, LSE + first_row,
        step_v / 32512.0, G, D, NT, PAIRS, TEAMS,
    )  # fmt: skip
    smem._keep_alive()
