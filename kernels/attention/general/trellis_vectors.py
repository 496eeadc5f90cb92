"""Device functions that read vectors of the trellis formats out of a block, by the maps of `trellis_tables`."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl
from triton.runtime.jit import constexpr_function

from octo_run.kernels.attention.general.parts import PAGE
from octo_run.kernels.codec import TrellisCodec
from octo_run.kernels.page_size import PAGE_TOKENS
from octo_run.kernels.trellis_tables import NORM_SEGMENTS, VALUE_SCALE, WORD_BITS

SEGMENTS = tl.constexpr(NORM_SEGMENTS)
SCALE = tl.constexpr(1 / VALUE_SCALE)
WORD = tl.constexpr((1 << WORD_BITS) - 1)
SECOND = tl.constexpr(WORD_BITS)
THIRD = tl.constexpr(2 * WORD_BITS)
PLANES_AT = tl.constexpr(PAGE_TOKENS * NORM_SEGMENTS + 4)


def describe(codec: TrellisCodec) -> int:
    """The constants of a format in one number, as `trellis_planes` takes it."""
    return codec.stream | codec.state_bits << 8 | int(codec.signed) << 16 | codec.chains << 24


@constexpr_function
def _part(bits, shift):
    return int(bits) >> shift & 255


@triton.jit
def _stream(words, at, keep):
    """32 bits of the stream from the place in a block that the map's number `at` names; 0 unless `keep`."""
    low = tl.load(words + (at & WORD), mask=keep, other=0).to(tl.uint32, bitcast=True)
    high = tl.load(words + ((at >> SECOND) & WORD), mask=keep, other=0).to(tl.uint32, bitcast=True)
    shift = ((at >> THIRD) & 31).to(tl.uint64)
    return ((low.to(tl.uint64) | (high.to(tl.uint64) << 32)) >> shift).to(tl.int32)


@triton.jit
def _signed(value, word, bit, SIGNED: tl.constexpr):
    """The odd half steps, scaled, of int8 `value` in the low byte; complemented first if the bit of the word is set."""
    number = (value << 24) >> 24
    if SIGNED:
        number = number ^ -((word >> bit) & 1)
    return (2 * number + 1).to(tl.float32) * SCALE


@triton.jit
def trellis_planes(base, row, i, table, map, BITS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """Triplets `i` of the tokens `row` of the block at `base`: odd half steps / VALUE_SCALE, float32.

    BITS: of `describe`; table: int32 words, x in the low byte; map: `trellis_tables.read_map`; MASKED: some i are
    beyond the last.
    """
    STREAM: tl.constexpr = _part(BITS, 0)
    STATE: tl.constexpr = _part(BITS, 8)
    SIGNED: tl.constexpr = _part(BITS, 16)
    TRIPLETS: tl.constexpr = (D + 2) // 3
    CHAINS: tl.constexpr = _part(BITS, 24)
    CHAIN: tl.constexpr = TRIPLETS // CHAINS
    MAIN: tl.constexpr = 1 << (STREAM + STATE)
    words = base.to(tl.pointer_type(tl.int32))
    if MASKED:
        i = tl.minimum(i, TRIPLETS - 1)
    chained = i < CHAINS * CHAIN
    last = chained & (i % CHAIN == CHAIN - 1)
    at = map + PLANES_AT + row * TRIPLETS + i
    stream = _stream(words, tl.load(at), True)
    # In a chain the predecessor's code stands above; the last slot's predecessor is slot 0.
    around = _stream(words, tl.load(at - (CHAIN - 1), mask=last, other=0), last)
    window = tl.where(last, (stream & ((1 << STREAM) - 1)) | (around << STREAM), stream) & (MAIN - 1)
    entry = tl.load(table + tl.where(chained, window, MAIN + (stream & ((1 << STREAM) - 1))))
    word_x = entry
    word_y = entry
    word_z = entry
    xy = tl.zeros(stream.shape, tl.int32)
    z = xy
    if SIGNED:
        xy = tl.load(at + PAGE * TRIPLETS)
        z = tl.load(at + 2 * PAGE * TRIPLETS)
        word_x = tl.load(words + (xy & WORD))
        word_y = tl.load(words + ((xy >> SECOND) & WORD))
        word_z = tl.load(words + (z & WORD))
    x = _signed(entry, word_x, (xy >> THIRD) & 31, SIGNED)
    y = _signed(entry >> 8, word_y, (z >> SECOND) & 31, SIGNED)
    return x, y, _signed(entry >> 16, word_z, (z >> (SECOND + 5)) & 31, SIGNED)


@triton.jit
def trellis_norms(base, row, map):
    """float32 factors that turn the numbers of `trellis_planes` into coordinates, one a token `row`."""
    words = base.to(tl.pointer_type(tl.int32))
    pattern = tl.zeros(row.shape, tl.int32)
    for n in tl.static_range(SEGMENTS):
        piece = tl.load(map + row * SEGMENTS + n)
        bits = tl.load(words + (piece & WORD)) >> ((piece >> SECOND) & 31)
        pattern |= (bits & ((1 << ((piece >> (SECOND + 5)) & 31)) - 1)) << (piece >> (SECOND + 10))
    factor = tl.load(map + PAGE * SEGMENTS).to(tl.float32, bitcast=True)
    return pattern.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * factor
