// Packed weights (see kernels/linear/packed.py) and rows of activations as they are multiplied with them.
//
// Integer kinds. A block of 128 activations is rounded to 16 bits and multiplied as integers, which lie in the order of
// the weight's codes: as bytes (see `of_bytes`; and by AMX) as x = step (254 hi + lo) with hi and lo in -127..127, else
// as x = step n; step = largest / 32380. Sums of a block are exact, so the number of threads does not change them. The
// error of an activation is at most 1.6e-5 of its block's largest one.
#pragma once
#include "common.h"
#include <algorithm>

namespace {
constexpr int BLOCK = 128;
constexpr float STEPS = 32380;
enum Kind { INT4 = 0, INT8 = 1, FP4 = 2, FP8 = 3 };

struct Weight {
    int kind;
    int64_t out, columns, padded, group;
    const uint8_t *codes;
    const float *rows;
    const uint16_t *scales, *offsets;  // float16 or null
    const int32_t *order;              // or null

    bool nibbles() const { return kind == INT4 || kind == FP4; }
    int64_t blocks() const { return padded / BLOCK; }
    int64_t row_bytes() const { return nibbles() ? padded / 2 : padded; }
    int64_t groups() const { return padded / group; }
    // Parts of a block that must not be summed in one lane: steps of 16 columns of a word of nibbles.
    int parts() const { return nibbles() && group == 16 ? 2 : 1; }
};

// Column of the code at each byte: int8 [128], nibbles [2][64] (low halves, then high ones).
struct Orders {
    uint8_t bytes[128], halves[128];
    Orders() {
        const int word4[8] = {0, 2, 4, 6, 1, 3, 5, 7}, word8[4] = {0, 2, 1, 3};
        int column[128];
        for (int t = 0, n = 0; t < 4; t++)
            for (int s = 0; s < 8; s++)
                for (int j = 0; j < 4; j++) column[n++] = 16 * s + 4 * t + j;
        for (int i = 0; i < 128; i++) {
            bytes[i] = column[i / 4 * 4 + word8[i % 4]];
            halves[i % 2 * 64 + i / 2] = column[i / 8 * 8 + word4[i % 8]];
        }
    }
};
const Orders orders;

// The even and the odd bytes of lanes, as numbers of 16 bits.
static inline I16 even_bytes(const B64 &w, bool is_signed) {
    if (!is_signed) return (I16)w & 0x00ff00ff;
#if REGISTER == 64
    return (I16)_mm512_srai_epi16(_mm512_slli_epi16((__m512i)w, 8), 8);
#else
    return (I16)((S32)w << 8 >> 8);
#endif
}
static inline I16 odd_bytes(const B64 &w, bool is_signed) {
    if (!is_signed) return (I16)((U16)w >> 8) & 0x00ff00ff;
#if REGISTER == 64
    return (I16)_mm512_srai_epi16((__m512i)w, 8);
#else
    return (I16)((S32)w >> 8);
#endif
}

// Whether codes are multiplied as bytes with bytes: with VNNI all are, with AVX2 nibbles, whose products fit 16 bits.
#if defined(WIDE_VNNI) || (defined(__AVXVNNI__) && REGISTER == 32)
static constexpr bool of_bytes(int) { return true; }
#elif REGISTER == 32
static constexpr bool of_bytes(int kind) { return kind != INT8; }
#else
static constexpr bool of_bytes(int) { return false; }
#endif
// What a code is more than its number, where it is multiplied.
static constexpr int zero_of(int kind) { return kind == INT4 ? 8 : kind == FP4 ? 12 : of_bytes(INT8) ? 128 : 0; }

// acc[lane] += the products of a lane's four bytes in `low` with those of x, and in `high` with those of x + 64.
// |x| <= 127.
#if defined(WIDE_VNNI)
static inline void dots(I16 &acc, const B64 &low, const B64 &high, const int8_t *x) {
    acc = (I16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)low, _mm512_loadu_si512(x));
    acc = (I16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)high, _mm512_loadu_si512(x + 64));
}
#elif REGISTER == 32
static inline Lanes<int32_t> dots(Lanes<int32_t> acc, B64::Half low, B64::Half high, const int8_t *x) {
    const __m256i first = _mm256_loadu_si256((const __m256i *)x), second = _mm256_loadu_si256((const __m256i *)(x + 64));
#if defined(__AVXVNNI__)
    return (Lanes<int32_t>)_mm256_dpbusd_avx_epi32(
        _mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)low.lanes, first), (__m256i)high.lanes, second);
#else
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)low.lanes, first),
                                           _mm256_maddubs_epi16((__m256i)high.lanes, second));
    return acc + (Lanes<int32_t>)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
}
static inline void dots(I16 &acc, const B64 &low, const B64 &high, const int8_t *x) {
    acc = {dots(acc.low.lanes, low.low, high.low, x), dots(acc.high.lanes, low.high, high.high, x + 32)};
}
#else
static inline void dots(I16 &, const B64 &, const B64 &, const int8_t *) {}  // not called
#endif

static const uint8_t FP4_HALVES[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};  // 2 value + 12

static inline B64 fp4_halves(B64 codes) {
#if defined(__AVX512BW__)
    __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)FP4_HALVES));
    return (B64)_mm512_shuffle_epi8(table, (__m512i)codes);
#elif REGISTER == 32
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)FP4_HALVES));
    return {(Lanes<uint8_t>)_mm256_shuffle_epi8(table, (__m256i)codes.low.lanes),
            (Lanes<uint8_t>)_mm256_shuffle_epi8(table, (__m256i)codes.high.lanes)};
#else
    uint8_t found[64];
    store(found, codes);
    for (uint8_t &one : found) one = FP4_HALVES[one];
    return load<B64>(found);
#endif
}

// The numbers of a block's codes in two vectors: those of int8 as they are, int4 codes (their zero is 8), fp4 in halves
// (12).
struct Numbers {
    B64 low, high;
};
template <int KIND> static inline Numbers numbers_of(const uint8_t *codes) {
    B64 first = load<B64>(codes);
    if (KIND == INT8) return {first, load<B64>(codes + 64)};
    Numbers found{first & (uint8_t)15, first >> 4};
    return KIND == FP4 ? Numbers{fp4_halves(found.low), fp4_halves(found.high)} : found;
}

// One row of activations in the order of a weight's codes.
struct Prepared {
    int8_t *bytes;  // [blocks][parts][hi, lo][128]; or int16 [blocks][parts][2 halves][even, odd bytes of codes][32]
    I16 *starts;    // [blocks][parts][hi, lo]: less the zero times the sums of the lanes; or one, then nothing
    float *sums;    // [groups], then zeros up to a whole vector
    float *steps;   // [blocks]
};

static size_t prepared_bytes(const Weight &w) {
    const size_t blocks = w.blocks(), parts = w.parts();
    return blocks * parts * (256 + 2 * sizeof(I16)) + (w.groups() + 15) / 16 * 64 + (blocks * 4 + 63) / 64 * 64;
}
static Prepared place(const Weight &w, char *at) {
    const size_t blocks = w.blocks(), parts = w.parts();
    Prepared p;
    p.starts = (I16 *)at, at += blocks * parts * 2 * sizeof(I16);
    p.bytes = (int8_t *)at, at += blocks * parts * 256;
    p.sums = (float *)at, at += (w.groups() + 15) / 16 * 64;
    p.steps = (float *)at;
    return p;
}

// x in natural order, float32 [columns], of a block: its columns, padded by zeros.
static void gather(const Weight &w, const void *x, int element_kind, int64_t block, float *into) {
    int64_t first = block * BLOCK, count = std::min<int64_t>(BLOCK, w.columns - first);
    if (!w.order && element_kind == FLOAT32)
        memcpy(into, (const float *)x + first, count * 4);
    else
        for (int64_t i = 0; i < count; i++) {
            int64_t at = w.order ? w.order[first + i] : first + i;
            into[i] = element(x, element_kind, at);
        }
    for (int64_t i = count; i < BLOCK; i++) into[i] = 0;
}

// A block's values as integers, and their step; NaN where one is not finite.
static float rounded(const float *values, int32_t *whole) {
    F16 largest = {}, bad = {};
    for (int i = 0; i < BLOCK; i += 16) {
        const F16 x = load<F16>(values + i), size = pick(x < 0.0f, -x, x);
        largest = pick(size > largest, size, largest);
        bad += x * 0.0f;  // NaN
    }
    float of_lane[16], most = 0;
    store(of_lane, largest);
    for (float one : of_lane) most = std::max(most, one);
    float inverse = most > 0 ? STEPS / most : 0;
    if (!std::isfinite(inverse)) inverse = 0;
    float step = inverse > 0 ? most / STEPS : 0;
    if (total(bad) != 0) step = NAN, inverse = 0;
    for (int i = 0; i < BLOCK; i += 16) {
        const F16 x = load<F16>(values + i) * inverse + 12582912.0f;  // rounds: 1.5 2^23
        store(whole + i, inverse > 0 ? integers(x - 12582912.0f) : I16{});
    }
    return step;
}

// A block's bytes in another order: to[i] = from[order[i]].
static inline void reorder(const int8_t *from, const uint8_t *order, int8_t *to) {
#if defined(__AVX512VBMI__)
    const __m512i first = _mm512_loadu_si512(from), second = _mm512_loadu_si512(from + 64);
    for (int i = 0; i < BLOCK; i += 64)
        _mm512_storeu_si512(to + i, _mm512_permutex2var_epi8(first, _mm512_loadu_si512(order + i), second));
#else
    for (int i = 0; i < BLOCK; i++) to[i] = from[order[i]];
#endif
}

// The numbers of a block as bytes, high and low ones, of the codes of one part.
template <int ZERO>
static void prepare_bytes(const int32_t *numbers, const uint8_t *order, int parts, int part, int8_t *into, I16 *starts) {
    alignas(64) int8_t high[BLOCK], low[BLOCK];
    for (int i = 0; i < BLOCK; i += 16) {
        alignas(64) int32_t of_high[16], of_low[16];
        const bool there = parts == 1 || i / 16 % 2 == part;
        const I16 n = there ? load<I16>(numbers + i) : I16{};
        const F16 rounds = floats(n) * (1.0f / 254) + 12582912.0f;
        const I16 hi = integers(rounds - 12582912.0f);
        store(of_high, hi), store(of_low, n - hi * 254);
        for (int j = 0; j < 16; j++) high[i + j] = (int8_t)of_high[j], low[i + j] = (int8_t)of_low[j];
    }
    reorder(high, order, into), reorder(low, order, into + BLOCK);
    for (int half = 0; half < 2; half++) {
        I16 sums = {};
        dots(sums, B64{} + uint8_t(1), B64{} + uint8_t(1), into + half * BLOCK);
        store(starts + half, sums * -ZERO);
    }
}

template <int KIND> static void prepare_as(const Weight &w, const void *x, int element_kind, Prepared p) {
    constexpr int zero = zero_of(KIND);
    const uint8_t *order = w.nibbles() ? orders.halves : orders.bytes;
    const int parts = w.parts();
    const int64_t group = std::min<int64_t>(w.group, BLOCK), groups = w.groups();
    memset(p.sums, 0, (groups + 15) / 16 * 64);
    for (int64_t b = 0; b < w.blocks(); b++) {
        alignas(64) float values[BLOCK];
        alignas(64) int32_t numbers[BLOCK];
        gather(w, x, element_kind, b, values);
        p.steps[b] = rounded(values, numbers);
        for (int64_t first = 0; w.offsets && first < BLOCK; first += group) {
            int32_t sum = 0;
            for (int64_t i = first; i < first + group; i++) sum += numbers[i];
            p.sums[(b * BLOCK + first) / w.group] += p.steps[b] * (float)sum;
        }
        for (int part = 0; part < parts; part++) {
            const int64_t at = b * parts + part;
            if constexpr (of_bytes(KIND)) {
                prepare_bytes<zero>(numbers, order, parts, part, p.bytes + at * 256, p.starts + 2 * at);
            } else {
                int16_t *into = (int16_t *)(p.bytes + at * 256);
                int32_t sums[16] = {};
                for (int i = 0; i < BLOCK; i++) {
                    const int16_t n = parts == 1 || order[i] / 16 % 2 == part ? numbers[order[i]] : 0;
                    into[i / 64 * 64 + i % 2 * 32 + i % 64 / 2] = n;
                    sums[i % 64 / 4] += n;
                }
                store(p.starts + 2 * at, load<I16>(sums) * -zero), store(p.starts + 2 * at + 1, I16{});
            }
        }
    }
}
static void prepare(const Weight &w, const void *x, int element_kind, Prepared p) {
    (w.kind == INT8 ? prepare_as<INT8> : w.kind == INT4 ? prepare_as<INT4> : prepare_as<FP4>)(w, x, element_kind, p);
}
}  // namespace
