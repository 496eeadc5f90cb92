"""Fused decode attention over pages of trellis codes by table lookup and int8 matrix products (NVIDIA, Gluon).

Written lane by lane: every tensor has one element a thread, so that each line is one machine instruction of each lane.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,assignment,var-annotated,misc"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from octo_run.kernels.attention.hopper.codewords import chains_of, field, half_selectors, value_words
from octo_run.kernels.attention.hopper.full_precision import blocks_at_once, full_precision, load_queries, stage_round
from octo_run.kernels.attention.hopper.mean_bias import (
    add_biases,
    component_bytes,
    load_angles,
    load_functions,
    make_components,
    mean_bytes,
    operand_bytes,
    page_apart,
    page_components,
    pages_ahead,
    write_operands,
)
from octo_run.kernels.attention.hopper.parts import combine, divide, hidden_pages, merge
from octo_run.kernels.attention.hopper.products import (
    limit_scores,
    query_bytes,
    query_words,
    score_page,
    sum_values,
    weigh_page,
    write_queries,
)
from octo_run.kernels.attention.hopper.tables import entries, fill_tables, kept_words, row_shift
from octo_run.kernels.lane_copies import commit_copies, copy16, wait_for_copies
from octo_run.kernels.lanes import (
    arrive,
    barrier,
    let_next_kernel_start,
    log2,
    own_warp,
    read_scalars,
    read_shared,
    read_shared4,
    read_shared_f,
    reciprocal,
    repeat,
    runs_among,
    shuffle,
    sync_warp,
    u32,
    wait_for_kernel_before,
)


@gluon.jit
def _fetch(stage, block, lane, BPV: gl.constexpr):
    """Start copying a block of 64 vectors to the warp's stage, every lane its own 16-byte chunks."""
    for c in gl.static_range((64 * BPV + 511) // 512):
        if c < BPV // 8:
            at = lane * 16
        else:
            at = gl.minimum(lane, 64 * BPV % 512 // 16 - 1) * 16  # the others write what the last one writes
        copy16(stage + c * 512 + u32(at), block + c * 512 + at)
    commit_copies(lane)


@gluon.jit
def _words(stage, lane, COUNT: gl.constexpr):
    """The first COUNT words of the lane's buffer in a staged block."""
    words = ()
    for c in gl.static_range(COUNT // 4):
        a0, a1, a2, a3 = read_shared4(stage + c * 512 + u32(lane * 16))
        words = words + (a0, a1, a2, a3)
    for w in gl.static_range(COUNT // 4 * 4, COUNT):
        words = words + (read_shared(stage + w * 128 + u32(lane * 4)),)
    return words


# What differs from call to call is not worth a compilation of its own.
@gluon.jit(do_not_specialize=["st_r", "sink", "capacity", "batch", "even_parts", "processors"])
def table_decode_kernel(
    Q, PAGES, PAGE_TABLE, ROWS, NUM_PACKED, STARTS, TAIL_ORIGIN, SINK_K, SINK_V, TAIL_K, TAIL_V, TABLE_K, TABLE_V,
    COEF, ANGLES, WEIGHTS, FUNCTIONS, OUT, PARTIAL, LSE, COUNTERS, sq_b, sq_h, sp_page, sp_head, st_r, so_b, so_h,
    ssk_r, ssk_h, ssk_t, ssv_r, ssv_h, ssv_t, stk_r, stk_h, stk_t, stv_r, stv_h, stv_t, sc_b, sc_h, sink, capacity,
    step_k, step_v, scale_log2, batch, even_parts, processors, SINK_LOGITS,
    HKV: gl.constexpr, G: gl.constexpr, D: gl.constexpr, B_K: gl.constexpr, STATE_K: gl.constexpr,
    SIGNED_K: gl.constexpr, NORM_K: gl.constexpr, BPV_K: gl.constexpr, COPIES_K: gl.constexpr,
    COPIES_XK: gl.constexpr, B_V: gl.constexpr, STATE_V: gl.constexpr, SIGNED_V: gl.constexpr, BPV_V: gl.constexpr,
    COPIES_V: gl.constexpr, COPIES_XV: gl.constexpr, ONE_TABLE: gl.constexpr, NT: gl.constexpr, PASS: gl.constexpr,
    ELEMENT: gl.constexpr, MEAN: gl.constexpr, WARPS: gl.constexpr, SMEM_WORDS: gl.constexpr, BATCHED: gl.constexpr,
    EARLY: gl.constexpr, WINDOW: gl.constexpr, CAP: gl.constexpr, SINKS: gl.constexpr, TIGHT: gl.constexpr,
):  # fmt: skip
    """Programs: (KV head and block of 4 NT query heads, part of a sequence). ``even_parts``: see `parts.divide`.

    ONE_TABLE: K and V have one format. MEAN: fast steps of the key mean's tables, 0 without a mean. EARLY: it may be
    launched before the kernel in front has ended. WINDOW, CAP: `AttentionSpec`, 0 without; SINKS: there are
    SINK_LOGITS. TIGHT: see `launch.constants`. Shared memory: K's table, its extra triplets' table; V's likewise if
    it has its own; a stage of a K and a V block for each warp; the queries; four words that say what the program does;
    what the key mean takes; in what remains, full-precision tokens if they fit, else these go where the table is to
    come.
    """
    T: gl.constexpr = (D + 2) // 3
    CHAINS: gl.constexpr = chains_of(D)
    N: gl.constexpr = T // CHAINS
    EXTRAS: gl.constexpr = T % CHAINS
    SLOTS: gl.constexpr = N + (EXTRAS > 0)
    PAIRS: gl.constexpr = (SLOTS + 1) // 2
    gl.static_assert(EXTRAS == 2 if CHAINS == 4 else EXTRAS == 0 or EXTRAS == 3 or EXTRAS == 6)
    BLOCKS: gl.constexpr = (G + 4 * NT - 1) // (4 * NT)
    HEADS: gl.constexpr = min(G, 4 * NT)
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
    QUERIES_AT: gl.constexpr = STAGES_AT + WARPS * 64 * (BPV_K + BPV_V)
    SLOTS_Q: gl.constexpr = query_words(D)
    QUERY_BYTES: gl.constexpr = query_bytes(D, TIGHT)
    MEAN_AT: gl.constexpr = QUERIES_AT + NT * QUERY_BYTES + (0 if TIGHT else 16)
    PAGES_AHEAD: gl.constexpr = pages_ahead(TIGHT)
    PAGE_APART: gl.constexpr = page_apart(TIGHT)
    COMPONENTS_AT: gl.constexpr = MEAN_AT + operand_bytes(D, NT, MEAN)
    # What the program does has been read by all of it, with a barrier since, before components are written.
    PLACE_AT: gl.constexpr = COMPONENTS_AT if TIGHT else QUERIES_AT + NT * QUERY_BYTES
    SPARE_AT: gl.constexpr = MEAN_AT + (mean_bytes(D, NT, WARPS, MEAN, PAGES_AHEAD, PAGE_APART) if MEAN > 0 else 0)
    ANGLES_AHEAD: gl.constexpr = D <= 128  # there are registers for the next ones
    WHOLE: gl.constexpr = MEAN > 0 and CAP == 0  # the products that add biases to logits add logarithms of norms, too
    SPARE: gl.constexpr = blocks_at_once(SMEM_WORDS * 4 - SPARE_AT, D)
    WORDS_K: gl.constexpr = BPV_K // 2  # of a lane, for its eight tokens
    FULL_V: gl.constexpr = value_words(CHAINS, N, B_V, SIGNED_V)
    ALL_V: gl.constexpr = FULL_V if CHAINS == 4 else (16 * SLOTS * (B_V + 3 * SIGNED_V) + 31) // 32
    NORMS_AT: gl.constexpr = FULL_V * 128 + (ALL_V - FULL_V) * EXTRAS * 16
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])

    smem = gl.allocate_shared_memory(
        gl.int32, [SMEM_WORDS // (32 * WARPS), 32 * WARPS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    tid = gl.arange(0, 32 * WARPS, layout=LAYOUT)
    lane = tid & 31
    warp = tid >> 5
    smem.index(0).store(tid)  # names the allocation in the PTX: the lookups below address it by that name
    barrier()
    if BATCHED:
        divide(
            NUM_PACKED, STARTS, sink, gl.program_id(1), batch, even_parts, gl.num_programs(0), processors, lane, warp,
            PLACE_AT, WARPS, WINDOW,
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
    page_id = gl.load(ids + gl.minimum(begin + warp, last), mask=begin < end, other=0)
    next_id = gl.load(ids + gl.minimum(begin + warp + WARPS, last), mask=begin < end, other=0)

    # A block is fetched as soon as the one before it is in registers; ids are read a page earlier.
    k_stage = u32(STAGES_AT + warp * (64 * (BPV_K + BPV_V)))
    v_stage = k_stage + 64 * BPV_K
    _fetch(k_stage, pages + page_id.to(gl.int64) * sp_page, lane, BPV_K)
    _fetch(v_stage, pages + page_id.to(gl.int64) * sp_page + 64 * BPV_K, lane, BPV_V)

    if MEAN > 0:
        components = u32(COMPONENTS_AT + warp * component_bytes(NT, PAGES_AHEAD, PAGE_APART))
        functions = load_functions(FUNCTIONS, lane)
        angles = load_angles(ANGLES, begin + warp, last, lane, D, WARPS, PAGES_AHEAD)
    sink_k = SINK_K + owned * ssk_r + head * ssk_h
    sink_v = SINK_V + owned * ssv_r + head * ssv_h
    tail_k = TAIL_K + owned * stk_r + head * stk_h
    tail_v = TAIL_V + owned * stv_r + head * stv_h
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
    beside = mine <= SPARE
    room = gl.where(beside, max(SPARE, 1), blocks_at_once(EXTRAS_AT_V, D))
    full_at = gl.where(beside, SPARE_AT, 0)
    if beside:
        fill_tables(
            table, table_x, TABLE_V, tid, MAIN_K, COPIES_K, EXTRAS_AT_K, B_K, COPIES_XK, TABLE_AT_V, MAIN_V,
            COPIES_V, EXTRAS_AT_V, B_V, COPIES_XV, EXTRAS, ONE_TABLE, 32 * WARPS,
        )  # fmt: skip
    after = 0
    if EARLY:
        let_next_kernel_start(seq)
        after = wait_for_kernel_before(seq)
    q_row = Q + (seq * sq_b + head * G * sq_h + after)
    coef = COEF + (seq * sc_b + head * G * sc_h + after)
    stage_round(
        sink_k, sink_v, tail_k, tail_v, ssk_t, ssv_t, stk_t, stv_t, n_sink, count, first_slot,
        capacity, part, parts, 0, mine, room, full_at, tid, D, WARPS,
    )  # fmt: skip
    queries16 = load_queries(q_row, sq_h, lane, first_head, G, D, NT)
    # With a mean, half of the warps split the query, and the others make the operands of the mean's products.
    SPLITTERS: gl.constexpr = WARPS // 2 if MEAN > 0 else WARPS
    if runs_among(seq, 0, SPLITTERS):
        write_queries(
            q_row, sq_h, queries16, seq, lane, warp, first_head, step_k * scale_log2, QUERIES_AT, G, D, NT, ELEMENT,
            TIGHT, SPLITTERS,
        )  # fmt: skip
    if MEAN > 0:
        the_others = runs_among(seq, SPLITTERS, WARPS)
        if the_others:
            write_operands(coef, sc_h, WEIGHTS, lane, warp, first_head, scale_log2, MEAN_AT, D, G, NT, MEAN, SPLITTERS)
    zero_i = lane * 0
    highest, total, acc = full_precision(
        queries16, sink_k, sink_v, tail_k, tail_v, ssk_t, ssv_t, stk_t, stv_t, n_sink,
        count, first_slot, capacity, part, parts, mine, room, full_at, tid, first_head, scale_log2,
        32512.0 / step_v, SINK_LOGITS + head * G, G, D, NT, PAIRS, ELEMENT, WARPS, CAP, SINKS,
    )  # fmt: skip
    if beside == 0:
        barrier()
        fill_tables(
            table, table_x, TABLE_V, tid, MAIN_K, COPIES_K, EXTRAS_AT_K, B_K, COPIES_XK, TABLE_AT_V, MAIN_V,
            COPIES_V, EXTRAS_AT_V, B_V, COPIES_XV, EXTRAS, ONE_TABLE, 32 * WARPS,
        )  # fmt: skip
        barrier()
    # Shuffled to itself: else the assembler takes the remainder's mask into every lookup, an instruction each.
    lane_k = shuffle(u32((lane % COPIES_K) * 4), lane)
    lane_xk = shuffle(u32((lane % COPIES_XK) * 4), lane)
    if ONE_TABLE:
        lane_v = lane_k
        lane_xv = lane_xk
    else:
        lane_v = shuffle(u32((lane % COPIES_V) * 4), lane)
        lane_xv = shuffle(u32((lane % COPIES_XV) * 4), lane)
    level = highest
    weight = repeat(zero_i.to(gl.float32), NT)
    selector = u32(gl.where(g & 1 == 0, 0x7351, 0x6240))
    source = t * 4 + (g >> 1)
    halves = half_selectors(lane) if CHAINS == 4 else ()
    scales = ()
    for b in gl.static_range(NT):
        two = ()
        for i in gl.static_range(SLOTS_Q, SLOTS_Q + 2):
            if TIGHT:  # all lanes t have the same factor: the first one of them keeps it, the second one the offset
                word_at = QUERIES_AT + b * QUERY_BYTES + SLOTS_Q // 4 * 512 + SLOTS_Q % 4 * 4 + (i - SLOTS_Q) * 64
                two = two + (read_shared_f(u32(word_at + t * 16)),)
            else:
                word_at = QUERIES_AT + b * QUERY_BYTES + i // 4 * 512 + i % 4 * 4
                two = two + (read_shared_f(u32(word_at + lane * 16)),)
        scales = scales + (two,)
    # Loops carry the next block's place, not its page's id: whoever waits for an id waits for all that was asked for
    # since, which may be the next pages' angles.
    next_block = pages + next_id.to(gl.int64) * sp_page
    # Every warp ends its loop by itself; run in step instead (`own` is zero then), a warp without a page is not inside.
    own = own_warp(seq)
    own_begin = begin + own
    # With a mean, pages by PAGES_AHEAD of the warp; else all at once, and the outer loop is none.
    for section in range(0, end - own_begin if MEAN > 0 else 1, WARPS * PAGES_AHEAD):
        section_end = end
        if MEAN > 0:
            page = own_begin + section + (warp - own)
            if not ANGLES_AHEAD:
                angles = load_angles(ANGLES, page, last, lane, D, WARPS, PAGES_AHEAD)
            make_components(angles, components, lane, MEAN_AT, D, NT, MEAN, PAGES_AHEAD, PAGE_APART)
            if ANGLES_AHEAD:
                angles = load_angles(ANGLES, page + PAGES_AHEAD * WARPS, last, lane, D, WARPS, PAGES_AHEAD)
            section_end = gl.minimum(own_begin + section + PAGES_AHEAD * WARPS, end)
        for base in range(own_begin + section, section_end, WARPS):
            page = base + (warp - own)
            inside = page < end
            following = gl.load(ids + gl.minimum(page + 2 * WARPS, last))
            wait_for_copies(lane, 1)
            k_words = _words(k_stage, lane, WORDS_K)
            if MEAN > 0:
                turn = base - own_begin - section  # times WARPS
                of_page = page_components(components + u32(turn * (NT * PAGE_APART // WARPS)), lane, NT)
            sync_warp(lane)
            _fetch(k_stage, next_block, lane, BPV_K)
            queries = ()
            for b in gl.static_range(NT):
                kept = kept_words(u32(QUERIES_AT + b * QUERY_BYTES + lane * 16), SLOTS_Q)
                queries = queries + ((kept, scales[b][0], scales[b][1]),)
            scores = score_page(
                k_words, lane, lane_k, lane_xk, queries, zero_i, CHAINS, N, EXTRAS, B_K, STATE_K, SH_K, SHX_K,
                EXTRAS_AT_K, SIGNED_K, NORM_K, WORDS_K, NT,
            )  # fmt: skip
            if MEAN > 0 and CAP > 0:
                scores = add_biases(scores, of_page, functions, repeat(zero_i.to(gl.float32), 8), NT)
            if CAP > 0 or (WINDOW > 0 and not WHOLE):
                unseen = gl.maximum(start + 1 - WINDOW, 0) - sink - 64 * page
                scores = limit_scores(scores, lane, unseen, NT, CAP, WINDOW)
            wait_for_copies(lane, 1)
            v_words = _words(v_stage, lane, FULL_V)
            for w in gl.static_range(FULL_V, ALL_V):
                at = FULL_V * 128 + (w - FULL_V) * (EXTRAS * 16) + gl.minimum(lane, EXTRAS * 4 - 1) * 4
                v_words = v_words + (read_shared(v_stage + u32(at)),)
            n_words = (
                read_shared(v_stage + u32(NORMS_AT + g * 12)),
                read_shared(v_stage + u32(NORMS_AT + g * 12 + 4)),
                read_shared(v_stage + u32(NORMS_AT + g * 12 + 8)),
            )
            sync_warp(lane)
            _fetch(v_stage, next_block + 64 * BPV_K, lane, BPV_V)
            gammas = ()
            log_gammas = ()
            for r in gl.static_range(8):
                bits = field(n_words, 12 * r, 16, 12) & 0xFFF0000
                if WHOLE:
                    gamma = (bits | 1).to(gl.float32, bitcast=True) * 5.192296858534828e33  # 2^-37 in place of zero
                    gammas = gammas + (reciprocal(gamma),)
                    log_gammas = log_gammas + (log2(gamma),)
                else:
                    gamma = bits.to(gl.float32, bitcast=True) * 5.192296858534828e33
                    gammas = gammas + (gamma,)
                    log_gammas = log_gammas + (gl.maximum(log2(gamma), -24.0),)
            if WHOLE:
                scores = add_biases(scores, of_page, functions, log_gammas, NT)
                if WINDOW > 0:
                    unseen = gl.maximum(start + 1 - WINDOW, 0) - sink - 64 * page
                    scores = limit_scores(scores, lane, unseen, NT, CAP, WINDOW)
            packed = ()
            decays = ()
            new_highest = ()
            new_level = ()
            new_total = ()
            new_weight = ()
            for b in gl.static_range(NT):
                pairs, most, reference, mass, heavy, decay = weigh_page(
                    scores[b], gammas, log_gammas, inside, highest[b], level[b], total[b], weight[b], lane, WHOLE
                )
                packed = packed + (pairs,)
                decays = decays + (decay,)
                new_highest = new_highest + (most,)
                new_level = new_level + (reference,)
                new_total = new_total + (mass,)
                new_weight = new_weight + (heavy,)
            highest = new_highest
            level = new_level
            total = new_total
            weight = new_weight

            grown = repeat((), NT)
            for first in gl.static_range(0, PAIRS, PASS):
                sums = sum_values(
                    v_words, lane_v, lane_xv, packed, source, selector, halves, zero_i, first, min(PASS, PAIRS - first),
                    CHAINS, N, SLOTS, B_V, STATE_V, SH_V, SHX_V, TABLE_AT_V, EXTRAS_AT_V, SIGNED_V, NT,
                )  # fmt: skip
                longer = ()
                for b in gl.static_range(NT):
                    row = grown[b]
                    for i in gl.static_range(3 * min(PASS, PAIRS - first)):
                        for h in gl.static_range(2):
                            four = sums[b * 3 * min(PASS, PAIRS - first) + i]
                            page_sum = (four[2 * h] * 256 + four[2 * h + 1]).to(gl.float32)
                            row = row + (acc[b * 6 * PAIRS + 6 * first + 2 * i + h] * decays[b] + page_sum,)
                    longer = longer + (row,)
                grown = longer
            acc = ()
            for b in gl.static_range(NT):
                acc = acc + grown[b]
            next_block = pages + following.to(gl.int64) * sp_page

    first_row = before * (HKV * G) + (head * G + first_head) * parts
    out_row = OUT + seq * so_b + (head * G + first_head) * so_h
    partial_row = PARTIAL + first_row.to(gl.int64) * D
    lse_row = LSE + first_row
    combine(
        acc, level, total, weight, lane, warp, tid, first_head, out_row, partial_row, lse_row, so_h, parts, part,
        step_v / 32512.0, CHAINS, N, G, D, HEADS, NT, PAIRS, WARPS,
    )  # fmt: skip
    if parts > 1:
        counter = COUNTERS + (seq * HKV + head) * BLOCKS + gl.program_id(0) % BLOCKS
        if arrive(counter, parts - 1) == parts - 1:
            merge(tid, first_head, out_row, partial_row, lse_row, so_h, parts, G, D, HEADS, WARPS)
    smem._keep_alive()
