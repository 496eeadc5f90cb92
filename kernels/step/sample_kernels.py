"""Triton kernels that draw a token for each sequence: slices of the vocabulary, then the best of the slices.

What lasts is stored by rows; number b of the batch owns row ROWS[b], a negative one is filler and left out.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

SCORE, TOKEN, BASE, TOTAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
"""What is known of a slice: the best score; the bits of its token; of the logits the largest and the sum of
exponentials relative to it."""
REPETITION, PRESENCE, FREQUENCY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""The penalties of `Draws`."""


@triton.jit
def _hash(x):
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014) on uint64."""
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def sample_slice_kernel(
    LOGITS, ROWS, COUNTS, TEMPERATURE, PENALTIES, EDITS, FLOOR, SEEDS, COUNTERS, SLICES, vocab, s_penalty,
    BLOCK: tl.constexpr, COUNTED: tl.constexpr, EDITED: tl.constexpr, NOISY: tl.constexpr, FLOORED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The program is (slice, number in the batch). SLICES float32 [B, 4, slices]: `SCORE`, `TOKEN`, `BASE`, `TOTAL`."""
    index, row = tl.program_id(0), tl.program_id(1)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    owned = tl.load(ROWS + row).to(tl.int64)
    if owned < 0:
        return
    at = index * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    places = row.to(tl.int64) * vocab + at
    logit = tl.load(LOGITS + places, mask=inside, other=float("-inf")).to(tl.float32)
    score = logit
    if COUNTED:
        repetition = tl.load(PENALTIES + REPETITION * s_penalty + row)
        presence = tl.load(PENALTIES + PRESENCE * s_penalty + row)
        frequency = tl.load(PENALTIES + FREQUENCY * s_penalty + row)
        count = tl.load(COUNTS + owned * vocab + at, mask=inside, other=0)
        drawn = (count >> 1).to(tl.float32)
        score = tl.where(count > 0, tl.where(logit > 0, logit / repetition, logit * repetition), logit)
        score -= frequency * drawn + tl.where(drawn > 0, presence, 0.0)
    if EDITED:
        score += tl.load(EDITS + places, mask=inside, other=0.0)
    if FLOORED:
        score = tl.where(score < tl.load(FLOOR + row), float("-inf"), score)
    if NOISY:
        temperature = tl.load(TEMPERATURE + row)
        seed = tl.load(SEEDS + row).to(tl.uint64, bitcast=True)
        counter = tl.load(COUNTERS + row).to(tl.uint64, bitcast=True)
        mixed = _hash(_hash(seed ^ _hash(counter)) + at.to(tl.uint64))
        share = ((mixed >> 40).to(tl.int32).to(tl.float32) + 0.5) * 5.9604644775390625e-08
        # -log(1 - share), exact for small shares too
        wait = tl.where(share < 0.01, share * (1 + share * (0.5 + share * 0.33333333)), -tl.log(1 - share))
        score = tl.where(temperature > 0, score - temperature * tl.log(wait), score)
    largest = tl.max(logit, 0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    to = SLICES + row * 4 * tl.num_programs(0) + index
    tl.store(to + SCORE * tl.num_programs(0), tl.max(score, 0))
    token = index * BLOCK + tl.argmax(score, 0)
    tl.store(to + TOKEN * tl.num_programs(0), token.to(tl.float32, bitcast=True))
    tl.store(to + BASE * tl.num_programs(0), base)
    tl.store(to + TOTAL * tl.num_programs(0), tl.sum(tl.exp(logit - base), 0))


@triton.jit
def sample_merge_kernel(
    LOGITS, ROWS, COUNTS, COUNTERS, SLICES, TOKENS, LOGPROBS, vocab, slices,
    WIDTH: tl.constexpr, COUNTED: tl.constexpr, NOISY: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program a sequence: the token and its log-probability; it is counted, and so is the draw."""
    row = tl.program_id(0)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    owned = tl.load(ROWS + row).to(tl.int64)
    if owned < 0:
        return
    at = tl.arange(0, WIDTH)
    inside = at < slices
    source = SLICES + row * 4 * slices + at
    best = tl.argmax(tl.load(source + SCORE * slices, mask=inside, other=float("-inf")), 0)
    token = tl.load(SLICES + row * 4 * slices + TOKEN * slices + best).to(tl.int32, bitcast=True)
    base = tl.load(source + BASE * slices, mask=inside, other=float("-inf"))
    total = tl.load(source + TOTAL * slices, mask=inside, other=0.0)
    largest = tl.max(base, 0)
    whole = largest + tl.log(tl.sum(tl.where(inside, total * tl.exp(base - largest), 0.0), 0))
    chosen = tl.load(LOGITS + row.to(tl.int64) * vocab + token).to(tl.float32)
    tl.store(TOKENS + owned, token)
    tl.store(LOGPROBS + owned, chosen - whole)
    if COUNTED:
        place = COUNTS + owned * vocab + token
        tl.store(place, (tl.load(place) + 2) | 1)
    if NOISY:
        tl.store(COUNTERS + row, tl.load(COUNTERS + row) + 1)
