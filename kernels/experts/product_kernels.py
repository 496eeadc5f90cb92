"""Triton kernels of the experts' products: vectors for a token or two, tiles of sorted tokens for more.

A program of the first product makes number i of an expert's gate and of its up, whose rows take turns in its tile, and
of both what the second matrix is multiplied by.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octo_run.kernels.linear.dequantise_kernel import _value


@triton.jit
def activated(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """See `weights.ACTIVATIONS`; float32."""
    if ACTIVATION == "clamped_silu":
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        return gate / (1.0 + tl.exp(-alpha * gate)) * (up + 1.0)
    elif ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh(u)) is the sigmoid of 2 u
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        return gate / (1.0 + tl.exp(-inner)) * up
    else:
        tl.static_assert(ACTIVATION == "silu")
        return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def gate_up_vector_kernel(
    X, WEIGHT, BIAS, INDICES, OUT, alpha, limit, N: tl.constexpr, K: tl.constexpr, CHOSEN: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, ACTIVATION: tl.constexpr, BIASED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BN of the N columns between the products of a pair of token and expert; the program is (columns, pair)."""
    pair = tl.program_id(1).to(tl.int64)
    line = tl.arange(0, 2 * BN)
    at = tl.program_id(0) * BN + line // 2
    k = tl.arange(0, BK)
    there = (at < N)[:, None]
    at += line % 2 * N
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()  # what fetches ahead finds the experts
    first_row = tl.load(INDICES + pair).to(tl.int64) * (2 * N)
    source = WEIGHT + (first_row + at)[:, None] * K + k[None, :]
    weights = tl.load(source, mask=there & (k < K)[None, :], other=0, eviction_policy="evict_first")
    total = tl.zeros([2 * BN, BK], tl.float32)
    for first in range(0, K, BK):
        x = tl.load(X + pair // CHOSEN * K + first + k, mask=first + k < K, other=0).to(tl.float32)
        following = first + BK
        mask = there & (following + k < K)[None, :]
        ahead = tl.load(source + following, mask=mask, other=0, eviction_policy="evict_first")
        total += weights.to(tl.float32) * x[None, :]
        weights = ahead
    both = tl.sum(total, 1)
    if BIASED:
        both += tl.load(BIAS + first_row + at, mask=tl.program_id(0) * BN + line // 2 < N, other=0).to(tl.float32)
    gate, up = tl.split(tl.reshape(both, (BN, 2)))
    into = tl.program_id(0) * BN + tl.arange(0, BN)
    result = activated(gate, up, alpha, limit, ACTIVATION)
    tl.store(OUT + pair * N + into, result.to(OUT.dtype.element_ty), mask=into < N)


@triton.jit
def _fetch_ahead(
    WEIGHT, INDICES, token, experts, size, N: tl.constexpr, K: tl.constexpr, CHOSEN: tl.constexpr, BN: tl.constexpr,
    PLACES: tl.constexpr,
):  # fmt: skip
    """Bring the first ``size`` bytes of BN rows of each expert in INDICES into the second-level cache, a thread a row
    (sm_90). If INDICES are not yet the right ones, nothing is wrong but the time lost. PLACES: 32 BN for each 32 chosen
    experts or a part of them."""
    place = tl.arange(0, PLACES)
    number = place // 32 // BN * 32 + place % 32  # a warp's threads have the same row of different experts
    row = tl.program_id(0) * BN + place // 32 % BN
    wanted = (number < CHOSEN) & (row < N)
    expert = tl.load(INDICES + token * CHOSEN + number, mask=wanted, other=0, cache_modifier=".cg")
    expert = tl.minimum(tl.maximum(expert, 0), experts - 1).to(tl.int64)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $3, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r,r", [WEIGHT + (expert * N + row) * K, size + 0 * place, wanted.to(tl.int32)],
        dtype=tl.int32, is_pure=False, pack=1)  # fmt: skip


@triton.jit
def down_vector_kernel(
    X, WEIGHT, BIAS, INDICES, WEIGHTS, SHARED, LOGITS, OUT, outputs, experts, ahead, N: tl.constexpr, K: tl.constexpr,
    CHOSEN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BIASED: tl.constexpr, HAS_SHARED: tl.constexpr,
    AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BN of a token's N outputs, summed over its CHOSEN experts; the program is (outputs, token). X: [pairs, K].

    AHEAD: 0, or places of `_fetch_ahead`: the first ``ahead`` bytes of each row are fetched while the first product
    still runs.
    """
    token = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    if EARLY:
        if AHEAD > 0:
            _fetch_ahead(WEIGHT, INDICES, token, experts, ahead, N, K, CHOSEN, BN, AHEAD)
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros([BN, BK], tl.float32)
    result = tl.zeros([BN], tl.float32)
    for number in tl.static_range(CHOSEN):
        pair = token * CHOSEN + number
        first_row = tl.load(INDICES + pair).to(tl.int64) * N
        share = tl.load(WEIGHTS + pair)
        source = WEIGHT + (first_row + at)[:, None] * K + k[None, :]
        for first in range(0, K, BK):
            total += _times(source + first, X + pair * K + first + k, first + k < K, at < N, share, BK)
        if BIASED:
            result += share * tl.load(BIAS + first_row + at, mask=at < N, other=0).to(tl.float32)
    result += tl.sum(total, 1)
    if HAS_SHARED:
        gate = 1.0 / (1.0 + tl.exp(-tl.load(LOGITS + token * outputs + experts)))
        result += gate * tl.load(SHARED + token * N + at, mask=at < N, other=0).to(tl.float32)
    tl.store(OUT + token * N + at, result.to(OUT.dtype.element_ty), mask=at < N)


@triton.jit
def _times(weights, inputs, inside, there, share, BK: tl.constexpr):
    """Weights [BN, BK] times inputs [BK] times ``share``, in float32."""
    mask = there[:, None] & inside[None, :]
    wide = tl.load(weights, mask=mask, other=0, eviction_policy="evict_first").to(tl.float32)
    if BK > 256:
        x = tl.load(inputs, mask=inside, other=0)[None, :]
    else:  # A row to a warp, each of which reads the inputs: through shared memory all would wait for each other.
        x = tl.load(inputs[None, :] + 0 * there[:, None].to(tl.int32), mask=mask, other=0)
    return wide * (x.to(tl.float32) * share)


@triton.jit
def _packed_block(
    WORDS, SCALES, OFFSETS, row, there, block, padded, stride_row, stride_group, KIND: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr, HAS_OFFSETS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Values [BN, 128] of a block of rows, less the rows' factors, in float32. Columns are in the order of the lanes:
    place 32 t + 4 s + j is column 16 s + 4 t + j."""
    OF_BLOCK: tl.constexpr = 4 * BITS  # words
    word = tl.arange(0, OF_BLOCK)
    at = row[:, None] * (padded // 128 * OF_BLOCK) + block * OF_BLOCK + word[None, :]
    words = tl.load(WORDS + at, mask=there[:, None], other=0)
    # The columns of a word lie as `packed._IN_WORD` says; here they come out in their order.
    if BITS == 4:
        even = tl.join(tl.join(words & 15, (words >> 8) & 15), tl.join((words >> 4) & 15, (words >> 12) & 15))
        odd = tl.join(tl.join((words >> 16) & 15, (words >> 24) & 15), tl.join((words >> 20) & 15, (words >> 28) & 15))
        codes = tl.join(even, odd)
    else:
        codes = tl.join(tl.join(words & 255, (words >> 8) & 255), tl.join((words >> 16) & 255, (words >> 24) & 255))
    GROUPS: tl.constexpr = 128 // GROUP if GROUP > 0 else 1
    value = _value(tl.reshape(codes, (BN, 4, GROUPS, 32 // GROUPS)), KIND)
    # A group has whole steps of every lane.
    group = tl.arange(0, GROUPS)
    of_group = row[:, None] * stride_row + group[None, :] * stride_group
    if GROUP > 0:
        of_group += block * (GROUPS * stride_group)
    if HAS_OFFSETS:
        value -= tl.load(OFFSETS + of_group, mask=there[:, None], other=0).to(tl.float32)[:, None, :, None]
    if SCALED:
        value *= tl.load(SCALES + of_group, mask=there[:, None], other=0).to(tl.float32)[:, None, :, None]
    return tl.reshape(value, (BN, 128))


@triton.jit
def grouped_kernel(
    X, WEIGHT, ROWS, SCALES, OFFSETS, BIAS, ORDER, TILES, OUT, alpha, limit, n, columns, padded, stride_row,
    stride_group, KIND: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr,
    HAS_OFFSETS: tl.constexpr, BIASED: tl.constexpr, CHOSEN: tl.constexpr, FIRST: tl.constexpr,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BN of an expert's n outputs for a tile of its pairs; the program is (outputs, tile).

    FIRST: inputs are the tokens' and outputs, half as many, go to the pairs' places in ORDER; else the other way round:
    inputs lie in that order and outputs go to the pairs' own rows. KIND: of packed codes (BK is 128, WEIGHT int32
    words), or "dense".
    """
    kind = OUT.dtype.element_ty
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    there = at < n
    if FIRST:  # of gate and up in turn
        at = at % 2 * (n // 2) + at // 2
    line = tl.arange(0, BM)
    place = tl.arange(0, BK)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    tile = TILES + 3 * tl.program_id(1)
    expert = tl.load(tile).to(tl.int64)
    if expert >= 0:
        begin = tl.load(tile + 1)
        end = tl.load(tile + 2)
        real = begin + line < end
        pair = tl.load(ORDER + begin + line, mask=real, other=0).to(tl.int64)
        sorted_place = (begin + line).to(tl.int64)
        row = expert * n + at
        if FIRST:
            source = X + (pair // CHOSEN)[:, None] * columns
        else:
            source = X + sorted_place[:, None] * columns
        total = tl.zeros([BM, BN], tl.float32)
        for first in range(0, columns, BK):
            if KIND == "dense":
                k = first + place
                inside = k < columns
                both = there[:, None] & inside[None, :]
                wide = tl.load(WEIGHT + row[:, None] * columns + k[None, :], mask=both, other=0)
            else:
                k = first + place % 32 // 4 * 16 + place // 32 * 4 + place % 4
                inside = k < columns
                block = first // 128
                wide = _packed_block(
                    WEIGHT,
                    SCALES,
                    OFFSETS,
                    row,
                    there,
                    block,
                    padded,
                    stride_row,
                    stride_group,
                    KIND,
                    BITS,
                    GROUP,
                    SCALED,
                    HAS_OFFSETS,
                    BN,
                ).to(kind)
            x = tl.load(source + k[None, :], mask=real[:, None] & inside[None, :], other=0)
            total = tl.dot(x, tl.trans(wide), total, input_precision="ieee")
        if KIND != "dense":
            total *= tl.load(ROWS + row, mask=there, other=0)[None, :]
        if BIASED:
            total += tl.load(BIAS + row, mask=there, other=0).to(tl.float32)[None, :]
        if FIRST:
            gate, up = tl.split(tl.reshape(total, (BM, BN // 2, 2)))
            result = activated(gate, up, alpha, limit, ACTIVATION)
            into = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
            target = OUT + sorted_place[:, None] * (n // 2) + into[None, :]
            tl.store(target, result.to(kind), mask=real[:, None] & (into < n // 2)[None, :])
        else:
            target = OUT + pair[:, None] * n + at[None, :]
            tl.store(target, total.to(kind), mask=real[:, None] & there[None, :])
