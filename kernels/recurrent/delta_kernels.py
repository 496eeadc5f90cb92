"""Triton kernels of Gated DeltaNet (see ``kernels.recurrent``). Rounding to the compute dtype as in the reference.

EARLY: as in ``kernels.step.layer_kernels``.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _silu(x, kind: tl.constexpr):
    return (x / (1.0 + tl.exp(-x))).to(kind).to(tl.float32)


@triton.jit
def _log_decay(gate, decay, bias):
    """decay * softplus(gate + bias)"""
    x = gate + bias
    return decay * tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def _newest(X, CONV_W, CONV, channel, there, position, CHANNELS: tl.constexpr, TAPS: tl.constexpr):
    """The convolution's output at ``position`` after SiLU, float32, and its input; CONV is the row's slots."""
    kind = X.dtype.element_ty
    new = tl.load(X + channel, mask=there, other=0)
    total = new.to(tl.float32) * tl.load(CONV_W + (TAPS - 1) * CHANNELS + channel, mask=there, other=0).to(tl.float32)
    for back in tl.static_range(1, TAPS):
        slot = (position + TAPS - back) % TAPS
        past = tl.load(CONV + slot * CHANNELS + channel, mask=there & (position + 0 * channel >= back), other=0).to(
            tl.float32
        )
        weight = tl.load(CONV_W + (TAPS - 1 - back) * CHANNELS + channel, mask=there, other=0).to(tl.float32)
        total += past * weight
    return _silu(total.to(kind).to(tl.float32), kind), new


@triton.jit
def delta_step_kernel(
    X, GATES, CONV_W, DECAY, BIAS, NORM, CONV, MEMORY, POSITIONS, ROWS, OUT, eps, s_conv, s_memory,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    TAPS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One token of one sequence in one value head; the program is (value head, number of the batch).

    Programs of one key head convolve its channels each for itself. They read the slots of older inputs; the new
    input goes to a slot that none of them reads.
    """
    kind = X.dtype.element_ty
    CHANNELS: tl.constexpr = 2 * HK * DK + HV * DV
    GROUP: tl.constexpr = HV // HK
    head = tl.program_id(0)
    number = tl.program_id(1).to(tl.int64)
    key_head = head // GROUP
    at_k = tl.arange(0, BK)
    at_v = tl.arange(0, BV)
    decay = tl.load(DECAY + head)
    bias = tl.load(BIAS + head)
    norm = tl.load(NORM + at_v, mask=at_v < DV, other=0).to(tl.float32)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.load(ROWS + number).to(tl.int64)
    position = tl.load(POSITIONS + number)
    # Bounds instead of truths, because the interpreter cannot tell a scalar truth from an integer.
    in_k = at_k < tl.where(row >= 0, DK, 0)
    in_v = at_v < tl.where(row >= 0, DV, 0)
    x = X + number * (CHANNELS + HV * DV)
    conv = CONV + row * s_conv
    square = in_k[:, None] & in_v[None, :]
    begun = (at_k < tl.where(position > 0, DK, 0))[:, None]
    place = MEMORY + row * s_memory + head * DK * DV + at_k[:, None] * DV + at_v[None, :]
    memory = tl.load(place, mask=square & begun, other=0)
    q_channel = key_head * DK + at_k
    k_channel = HK * DK + q_channel
    v_channel = 2 * HK * DK + head * DV + at_v
    q, q_new = _newest(x, CONV_W, conv, q_channel, in_k, position, CHANNELS, TAPS)
    k, k_new = _newest(x, CONV_W, conv, k_channel, in_k, position, CHANNELS, TAPS)
    v, v_new = _newest(x, CONV_W, conv, v_channel, in_v, position, CHANNELS, TAPS)
    newest = conv + (position % TAPS) * CHANNELS
    first = in_k & (at_k < tl.where(head % GROUP == 0, DK, 0))
    tl.store(newest + q_channel, q_new, mask=first)
    tl.store(newest + k_channel, k_new, mask=first)
    tl.store(newest + v_channel, v_new, mask=in_v)
    q = q * tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * (DK**-0.5)
    k = k * tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
    strength = tl.load(GATES + number * 2 * HV + head).to(tl.float32)
    fading = tl.load(GATES + number * 2 * HV + HV + head).to(tl.float32)
    beta = (1.0 / (1.0 + tl.exp(-strength))).to(kind).to(tl.float32)
    memory = memory * tl.exp(_log_decay(fading, decay, bias))
    error = (v - tl.sum(memory * k[:, None], 0)) * beta
    memory += k[:, None] * error[None, :]
    tl.store(place, memory, mask=square)
    mixed = tl.sum(memory * q[:, None], 0).to(kind).to(tl.float32)
    scale = tl.rsqrt(tl.sum(mixed * mixed, 0) / DV + eps)
    normed = (norm * (mixed * scale).to(kind).to(tl.float32)).to(kind).to(tl.float32)
    gate = tl.load(x + CHANNELS + head * DV + at_v, mask=in_v, other=0).to(tl.float32)
    done = normed * (gate / (1.0 + tl.exp(-gate)))
    tl.store(OUT + number * (HV * DV) + head * DV + at_v, tl.where(in_v, done, 0.0).to(kind), mask=at_v < DV)


@triton.jit(do_not_specialize=["start", "n"])
def delta_heads_kernel(
    X, GATES, CONV_W, DECAY, BIAS, CONV, QK, V, BETA, FADE, start, n,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, TAPS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Convolution, norms and gates of a chunk of n tokens; the program is (TOKENS tokens, head).

    Heads are those of queries, keys, values. QK is [n, 2 HK, DK], V [n, HV, DV], BETA and FADE float32 [n, HV]."""
    kind = X.dtype.element_ty
    CHANNELS: tl.constexpr = 2 * HK * DK + HV * DV
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    unit = tl.program_id(1)
    is_value = unit >= 2 * HK
    head = unit - 2 * HK
    at = tl.arange(0, BD)
    size = tl.where(is_value, DV, DK)
    channel = tl.where(is_value, 2 * HK * DK + head * DV, unit * DK) + at
    real = token < n
    inside = at < size
    total = tl.zeros([TOKENS, BD], tl.float32)
    for back in tl.static_range(0, TAPS):
        weight = tl.load(CONV_W + (TAPS - 1 - back) * CHANNELS + channel, mask=inside, other=0).to(tl.float32)
        source = token - back
        here = (real & (source >= 0))[:, None] & inside[None, :]
        new = tl.load(X + source[:, None] * (CHANNELS + HV * DV) + channel[None, :], mask=here, other=0)
        total += new.to(tl.float32) * weight[None, :]
        if back > 0:
            position = start + source
            there = (real & (source < 0) & (position >= 0))[:, None] & inside[None, :]
            slot = (position + TAPS) % TAPS
            old = tl.load(CONV + slot[:, None] * CHANNELS + channel[None, :], mask=there, other=0)
            total += old.to(tl.float32) * weight[None, :]
    y = _silu(total.to(kind).to(tl.float32), kind)
    square = real[:, None] & inside[None, :]
    if is_value:
        tl.store(V + (token * HV + head)[:, None] * DV + at[None, :], y.to(kind), mask=square)
        decay = tl.load(DECAY + head)
        bias = tl.load(BIAS + head)
        strength = tl.load(GATES + token * 2 * HV + head, mask=real, other=0).to(tl.float32)
        fading = tl.load(GATES + token * 2 * HV + HV + head, mask=real, other=0).to(tl.float32)
        tl.store(BETA + token * HV + head, (1.0 / (1.0 + tl.exp(-strength))).to(kind).to(tl.float32), mask=real)
        tl.store(FADE + token * HV + head, _log_decay(fading, decay, bias), mask=real)
    else:
        y = y * tl.rsqrt(tl.sum(y * y, 1) + 1e-6)[:, None]
        y = y * tl.where(unit < HK, DK**-0.5, 1.0)
        tl.store(QK + (token * 2 * HK + unit)[:, None] * DK + at[None, :], y.to(kind), mask=square)


@triton.jit(do_not_specialize=["n", "lead"])
def delta_block_kernel(
    QK, V, W, SCORES, BETA, FADE, n, lead,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The triangular systems of the delta rule; the program is (block of 64 tokens, value head).

    The first block has ``64 - lead`` tokens. FADE becomes its own sums within the block, V the errors that the tokens
    would write to an empty memory, W [n, HV, DK] what takes part of them back for each number that the memory holds,
    SCORES [n, HV, 64] the decayed products of queries and keys."""
    kind = QK.dtype.element_ty
    head = tl.program_id(1)
    key_head = head // (HV // HK)
    line = tl.arange(0, 64)
    token = tl.program_id(0).to(tl.int64) * 64 - lead + line
    real = (token >= 0) & (token < n)
    at_k = tl.arange(0, BK)
    at_v = tl.arange(0, BV)
    square_k = real[:, None] & (at_k < DK)[None, :]
    square_v = real[:, None] & (at_v < DV)[None, :]
    q = tl.load(QK + (token * 2 * HK + key_head)[:, None] * DK + at_k[None, :], mask=square_k, other=0)
    k = tl.load(QK + (token * 2 * HK + HK + key_head)[:, None] * DK + at_k[None, :], mask=square_k, other=0)
    place_v = V + (token * HV + head)[:, None] * DV + at_v[None, :]
    v = tl.load(place_v, mask=square_v, other=0)
    beta = tl.load(BETA + token * HV + head, mask=real, other=0)
    fade = tl.cumsum(tl.load(FADE + token * HV + head, mask=real, other=0), 0)
    tl.store(FADE + token * HV + head, fade, mask=real)
    lower = line[:, None] >= line[None, :]
    between = tl.exp(tl.where(lower, fade[:, None] - fade[None, :], 0.0))
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * between
    to_scores = SCORES + (token * HV + head)[:, None] * 64 + line[None, :]
    tl.store(to_scores, tl.where(lower, scores, 0.0).to(kind), mask=real[:, None] & (line >= 0)[None, :])
    system = tl.dot(k, tl.trans(k), input_precision="ieee") * between * beta[:, None]
    system = tl.where(line[:, None] > line[None, :], system, 0.0)
    # Blocks of 16 on the diagonal are inverted row by row, all four at a time.
    part = tl.arange(0, 4)
    side = tl.arange(0, 16)
    same = part[:, None, None, None] == part[None, None, :, None]
    diagonal = tl.sum(tl.where(same, tl.reshape(system, (4, 16, 4, 16)), 0.0), 2)
    unit = (side[:, None] == side[None, :]).to(tl.float32)[None, :, :]
    inverse = tl.broadcast_to(unit, (4, 16, 16))
    for i in range(1, 16):
        here = side[None, :, None] == i
        coefficient = tl.sum(tl.where(here, diagonal, 0.0), 1)
        new = tl.sum(coefficient[:, :, None] * inverse, 1)
        inverse = tl.where(here, unit - new[:, None, :], inverse)
    inverse = tl.reshape(tl.where(same, inverse[:, :, None, :], 0.0), (64, 64))
    # The rest is nilpotent: four steps of blocks, (1 + N)^-1 = (1 - N)(1 + N N).
    rest = tl.where(line[:, None] // 16 > line[None, :] // 16, system, 0.0)
    rest = tl.dot(inverse, rest, input_precision="ieee")
    inverse += tl.dot(tl.dot(rest, rest, input_precision="ieee"), inverse, input_precision="ieee")
    inverse -= tl.dot(rest, inverse, input_precision="ieee")
    solved = inverse.to(kind)
    u = tl.dot(solved, (v.to(tl.float32) * beta[:, None]).to(kind), input_precision="ieee")
    tl.store(place_v, u.to(kind), mask=square_v)
    w = tl.dot(solved, (k.to(tl.float32) * (beta * tl.exp(fade))[:, None]).to(kind), input_precision="ieee")
    tl.store(W + (token * HV + head)[:, None] * DK + at_k[None, :], w.to(kind), mask=square_k)


# Lengths differ from call to call. Besides, two other kernels that Triton 3.6 made of this one for 16-bit numbers were
# wrong: for a scan of one block as a constant, and for pointers that are no multiple of 16 bytes. They read memory that
# is not there, or gave numbers that are off by their own size. So pointers are those of whole, aligned parts.
@triton.jit(do_not_specialize=["start", "begin", "end", "lead", "blocks", "save"])
def delta_scan_kernel(
    QK, V, W, SCORES, FADE, MEMORY, SAVED, OUT, start, begin, end, lead, blocks, save,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, COLUMNS: tl.constexpr,
    SAVES: tl.constexpr,
):  # fmt: skip
    """From block to block: OUT [n, HV, DV] and MEMORY [HV, DK, DV]; the program is (COLUMNS of the values, value head).

    The tokens are those from ``begin`` on and before ``end``; the first block has ``64 - lead`` of them.
    SAVES: the memory before block number ``save`` goes to SAVED."""
    kind = QK.dtype.element_ty
    head = tl.program_id(1)
    key_head = head // (HV // HK)
    line = tl.arange(0, 64)
    at_k = tl.arange(0, BK)
    at_v = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_k = at_k < DK
    in_v = at_v < DV
    square = in_k[:, None] & in_v[None, :]
    place = head * DK * DV + at_k[:, None] * DV + at_v[None, :]
    memory = tl.load(MEMORY + place, mask=square & (start + begin + 0 * place > 0), other=0)
    for block in range(blocks):
        if SAVES:
            tl.store(SAVED + place, memory, mask=square & (block + 0 * place == save))
        first = begin + block * 64 - lead
        token = (first + line).to(tl.int64)
        real = (token >= begin) & (token < end)
        square_k = real[:, None] & in_k[None, :]
        square_v = real[:, None] & in_v[None, :]
        last = tl.minimum(first + 63, end - 1)
        fade = tl.load(FADE + token * HV + head, mask=real, other=0)
        whole = tl.load(FADE + last.to(tl.int64) * HV + head)
        w = tl.load(W + (token * HV + head)[:, None] * DK + at_k[None, :], mask=square_k, other=0)
        u = tl.load(V + (token * HV + head)[:, None] * DV + at_v[None, :], mask=square_v, other=0)
        old = memory.to(kind)
        errors = u.to(tl.float32) - tl.dot(w, old, input_precision="ieee")
        q = tl.load(QK + (token * 2 * HK + key_head)[:, None] * DK + at_k[None, :], mask=square_k, other=0)
        scores = tl.load(SCORES + (token * HV + head)[:, None] * 64 + line[None, :],
                         mask=real[:, None] & (line >= 0)[None, :], other=0)  # fmt: skip
        mixed = tl.dot(q, old, input_precision="ieee") * tl.exp(fade)[:, None]
        mixed += tl.dot(scores, errors.to(kind), input_precision="ieee")
        tl.store(OUT + (token * HV + head)[:, None] * DV + at_v[None, :], mixed.to(kind), mask=square_v)
        k = tl.load(QK + (token * 2 * HK + HK + key_head)[:, None] * DK + at_k[None, :], mask=square_k, other=0)
        # Of tokens that are not there, errors are 0; their decay need only be finite.
        left = tl.exp(tl.where(real, whole - fade, 0.0))
        written = (errors * left[:, None]).to(kind)
        memory = memory * tl.exp(whole) + tl.dot(tl.trans(k), written, input_precision="ieee")
    if SAVES:
        tl.store(SAVED + place, memory, mask=square & (save + 0 * place == blocks))
    tl.store(MEMORY + place, memory, mask=square)


@triton.jit(do_not_specialize=["lines"])
def delta_finish_kernel(
    OUT, X, NORM, eps, lines, HV: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, CHANNELS: tl.constexpr,
    LINES: tl.constexpr,
):  # fmt: skip
    """Norm and gate of heads' outputs, in place; the program has LINES of them."""
    kind = OUT.dtype.element_ty
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    at = tl.arange(0, BV)
    there = (line < lines)[:, None] & (at < DV)[None, :]
    norm = tl.load(NORM + at, mask=at < DV, other=0).to(tl.float32)
    x = tl.load(OUT + line[:, None] * DV + at[None, :], mask=there, other=0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / DV + eps)
    normed = (norm[None, :] * (x * scale[:, None]).to(kind).to(tl.float32)).to(kind).to(tl.float32)
    source = X + (line // HV)[:, None] * (CHANNELS + HV * DV) + CHANNELS + (line % HV)[:, None] * DV + at[None, :]
    gate = tl.load(source, mask=there, other=0).to(tl.float32)
    done = normed * (gate / (1.0 + tl.exp(-gate)))
    tl.store(OUT + line[:, None] * DV + at[None, :], done.to(kind), mask=there)
