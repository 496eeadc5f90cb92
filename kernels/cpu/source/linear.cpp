// Products of activations with packed weights (see kernels/linear/packed.py) and with bfloat16 weights.
//
// Integer kinds. A block of 128 activations is rounded to 16 bits and multiplied as integers, which lie in the order of
// the weight's codes: as bytes (see `of_bytes`; and by AMX) as x = step (254 hi + lo) with hi and lo in -127..127, else
// as x = step n; step = largest / 32380. Sums of a block are exact, so the number of threads does not change them. The
// error of an activation is at most 1.6e-5 of its block's largest one.
#include "calls.h"
#include "common.h"
#include <algorithm>

namespace {
constexpr int BLOCK = 128;
constexpr float STEPS = 32380;
constexpr int AHEAD = 2048;  // bytes that are fetched in advance
constexpr int64_t MANY = 8;  // rows of activations from which on widened weights pay
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

// 16 numbers of 16 bits.
static inline F16 of_halves(const uint16_t *from) {
#if defined(__AVX512BW__)
    return (F16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif REGISTER == 32 && defined(__F16C__)
    return {(Lanes<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)),
            (Lanes<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 8)))};
#else
    float found[16];
    for (int i = 0; i < 16; i++) found[i] = of_half(from[i]);
    return load<F16>(found);
#endif
}

// Scales of rows, and their products with the offsets: float32 [rows][groups], or null.
struct Scales {
    float *scales, *shifts;
};
static Scales scales_of(const Weight &w, int64_t row, int64_t rows) {
    if (!w.scales && !w.offsets) return {};
    const int64_t count = rows * w.groups(), room = (count + 31) / 16 * 16;  // what is loaded goes beyond the last one
    float *at = (float *)scratch(2, 2 * room * 4);
    const Scales found{at, w.offsets ? at + room : nullptr};
    const float unit = w.kind == FP4 ? 0.5f : 1.0f;
    const auto some = [&](const uint16_t *part, int64_t i) {
        if (i + 16 <= count) return of_halves(part + row * w.groups() + i);
        uint16_t last[16] = {};
        memcpy(last, part + row * w.groups() + i, (count - i) * 2);
        return of_halves(last);
    };
    for (int64_t i = 0; i < count; i += 16) {
        const F16 scale = w.scales ? some(w.scales, i) * unit : splat(unit);
        store(found.scales + i, scale);
        if (w.offsets) store(found.shifts + i, scale * some(w.offsets, i));
    }
    return found;
}

// Of a block's scales those of its lanes, whose places `index` tells.
static inline F16 of_lanes(const float *first, const I16 &index) {
#if REGISTER == 64
    return (F16)_mm512_permutexvar_ps((__m512i)index, (__m512)load<F16>(first));
#elif REGISTER == 32
    const Lanes<float> half = (Lanes<float>)_mm256_permutevar8x32_ps(_mm256_loadu_ps(first), (__m256i)index.low.lanes);
    return {half, half};  // the upper lanes have the same columns
#else
    float found[16];
    int32_t at[16];
    store(at, index);
    for (int i = 0; i < 16; i++) found[i] = first[at[i]];
    return load<F16>(found);
#endif
}

// Products of ROWS rows, whose scales are given, with TOKENS rows of activations. Rows follow each other in memory,
// which is fetched in advance.
template <int KIND, int PARTS, int TOKENS, int ROWS>
static void rows_by_tokens(const Weight &w, int64_t row, Scales given, const Prepared *xs, const float *bias, void *out,
                           int kind, int64_t out_stride, int64_t token) {
    constexpr bool is_signed = KIND == INT8;
    constexpr int64_t bytes = KIND == INT8 ? 128 : 64;
    const int64_t blocks = w.blocks(), groups = w.groups(), width = blocks * bytes;
    const int64_t each = w.group > BLOCK ? 0 : BLOCK / w.group;  // scales of a block
    const int shift = w.group >= BLOCK ? 7 : w.group == 64 ? 6 : w.group == 32 ? 5 : 4;
    const uint8_t *codes = w.codes + row * width;
    const I16 lane = lane_numbers();
    F16 sums[ROWS][TOKENS] = {};
    for (int64_t g = 0; given.shifts && g < groups; g += 16)
        for (int r = 0; r < ROWS; r++) {
            F16 shifts = load<F16>(given.shifts + r * groups + g);
            if (g + 16 > groups) shifts = pick(lane < (int32_t)(groups - g), shifts, F16{});
            for (int t = 0; t < TOKENS; t++) sums[r][t] -= shifts * load<F16>(xs[t].sums + g);
        }
    I16 index[PARTS];
    for (int part = 0; part < PARTS; part++)
        index[part] = (KIND == INT8 ? (lane & 7) * 16 : (lane & 3) * 32 + 16 * part) >> shift;
    for (int64_t b = 0; b < blocks; b++, codes += bytes) {
        Numbers numbers[ROWS];
        I16 words[ROWS][4];
        for (int r = 0; r < ROWS; r++) {
            __builtin_prefetch(codes + r * width + AHEAD);
            if (KIND == INT8) __builtin_prefetch(codes + r * width + AHEAD + 64);
            Numbers &n = numbers[r] = numbers_of<KIND>(codes + r * width);
            if constexpr (!of_bytes(KIND))
                words[r][0] = even_bytes(n.low, is_signed), words[r][1] = odd_bytes(n.low, is_signed),
                words[r][2] = even_bytes(n.high, is_signed), words[r][3] = odd_bytes(n.high, is_signed);
            else if (is_signed)
                n.low ^= 128, n.high ^= 128;
        }
        for (int part = 0; part < PARTS; part++) {
            F16 scales[ROWS];
            for (int r = 0; r < ROWS; r++)
                scales[r] = given.scales ? of_lanes(given.scales + r * groups + b * each, index[part])
                                         : splat(KIND == FP4 ? 0.5f : 1.0f);
            for (int t = 0; t < TOKENS; t++) {
                const int64_t at = b * PARTS + part;
                const int8_t *x = xs[t].bytes + at * 256;
                for (int r = 0; r < ROWS; r++) {
                    F16 found;
                    if constexpr (of_bytes(KIND)) {
                        I16 hi = xs[t].starts[2 * at], lo = xs[t].starts[2 * at + 1];
                        dots(hi, numbers[r].low, numbers[r].high, x), dots(lo, numbers[r].low, numbers[r].high, x + 128);
                        found = floats(hi) * 254.0f + floats(lo);
                    } else {
                        I16 sum = xs[t].starts[2 * at];
                        sum = pairs(pairs(sum, load<I16>(x), words[r][0]), load<I16>(x + 64), words[r][1]);
                        sum = pairs(pairs(sum, load<I16>(x + 128), words[r][2]), load<I16>(x + 192), words[r][3]);
                        found = floats(sum);
                    }
                    sums[r][t] += found * (scales[r] * xs[t].steps[b]);
                }
            }
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < TOKENS; t++) {
            float y = total(sums[r][t]) * w.rows[row + r];
            put(out, kind, (token + t) * out_stride + row + r, bias ? y + bias[row + r] : y);
        }
}

constexpr int AT_A_TIME = REGISTER == 64 ? 4 : 1;  // rows with one of activations: what registers hold
template <int KIND, int PARTS>
static void some_rows(const Weight &w, int64_t row, int64_t last, const Prepared *xs, int64_t tokens, const float *bias,
                      void *out, int kind, int64_t stride) {
    const Scales all = scales_of(w, row, last - row);
    const auto from = [&](int64_t r) {
        const int64_t at = (r - row) * w.groups();
        return Scales{all.scales ? all.scales + at : nullptr, all.shifts ? all.shifts + at : nullptr};
    };
    int64_t t = 0;  // four rows of activations stay in the first-level cache while the rows of the weight pass
    for (; t + 4 <= tokens; t += 4)
        for (int64_t r = row; r < last; r++)
            rows_by_tokens<KIND, PARTS, 4, 1>(w, r, from(r), xs + t, bias, out, kind, stride, t);
    for (; t < tokens; t++) {
        int64_t r = row;
        for (; r + AT_A_TIME <= last; r += AT_A_TIME)
            rows_by_tokens<KIND, PARTS, 1, AT_A_TIME>(w, r, from(r), xs + t, bias, out, kind, stride, t);
        for (; r < last; r++) rows_by_tokens<KIND, PARTS, 1, 1>(w, r, from(r), xs + t, bias, out, kind, stride, t);
    }
}

#if REGISTER != 16
// Many rows of activations: weights as 16-bit numbers, a panel of rows of them side by side in lanes, two columns in a
// lane. A lane's sum over a block is exact, as above.
#define PANELS 1
typedef Lanes<int32_t> Whole;
typedef Lanes<float> Float;
constexpr int LANES = REGISTER / 4, ACROSS = 2, PANEL = ACROSS * LANES;  // rows of a panel
constexpr int64_t DEPTH = 8;  // blocks of a panel that are worked on at a time, so that they stay in the cache
constexpr int TOGETHER = REGISTER == 64 ? 8 : 6;  // rows of activations that registers hold the sums of

static inline Whole add_pairs(Whole acc, Whole x, Whole y) {
#if defined(WIDE_VNNI)
    return (Whole)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)x, (__m512i)y);
#elif REGISTER == 64
    return acc + (Whole)_mm512_madd_epi16((__m512i)x, (__m512i)y);
#elif defined(__AVXVNNI__)
    return (Whole)_mm256_dpwssd_avx_epi32((__m256i)acc, (__m256i)x, (__m256i)y);
#else
    return acc + (Whole)_mm256_madd_epi16((__m256i)x, (__m256i)y);
#endif
}

// One row of activations: its numbers in order, and for each block a step, for each group (of a block at most) a sum.
struct Ordered {
    int16_t *numbers;
    float *steps, *sums;
};
static int64_t panel_groups(const Weight &w) { return std::max<int64_t>(1, BLOCK / w.group); }  // of a block
static size_t ordered_bytes(const Weight &w) {
    return w.padded * 2 + (w.blocks() * 4 * (1 + panel_groups(w)) + 63) / 64 * 64;
}
static Ordered place_ordered(const Weight &w, char *at) {
    float *steps = (float *)(at + w.padded * 2);
    return {(int16_t *)at, steps, steps + w.blocks()};
}
static void prepare_ordered(const Weight &w, const void *x, int kind, Ordered to) {
    const int64_t groups = panel_groups(w), size = BLOCK / groups;
    for (int64_t b = 0; b < w.blocks(); b++) {
        alignas(64) float values[BLOCK];
        alignas(64) int32_t whole[BLOCK];
        gather(w, x, kind, b, values);
        to.steps[b] = rounded(values, whole);
        for (int i = 0; i < BLOCK; i++) to.numbers[b * BLOCK + i] = (int16_t)whole[i];
        if (!w.offsets) continue;
        for (int64_t g = 0; g < groups; g++) {
            int32_t sum = 0;
            for (int64_t i = g * size; i < g * size + size; i++) sum += whole[i];
            to.sums[b * groups + g] = (float)sum;
        }
    }
}

// Blocks of a panel's rows: numbers [blocks][64 pairs of columns][PANEL][2], scales and offsets [blocks][groups][PANEL].
struct Panel {
    int16_t *numbers;
    float *scales, *offsets;
};
// Eight columns of eight rows become rows, each to its place.
static inline void turn(const int32_t (*rows)[64], char *const *to) {
    __m256i in[8], two[8], four[8];
    for (int r = 0; r < 8; r++) in[r] = _mm256_loadu_si256((const __m256i *)rows[r]);
    for (int r = 0; r < 8; r += 2) {
        two[r] = _mm256_unpacklo_epi32(in[r], in[r + 1]);
        two[r + 1] = _mm256_unpackhi_epi32(in[r], in[r + 1]);
    }
    for (int r = 0; r < 8; r += 4)
        for (int i = 0; i < 2; i++) {
            four[r + 2 * i] = _mm256_unpacklo_epi64(two[r + i], two[r + 2 + i]);
            four[r + 2 * i + 1] = _mm256_unpackhi_epi64(two[r + i], two[r + 2 + i]);
        }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_si256((__m256i *)to[i], _mm256_permute2x128_si256(four[i], four[4 + i], 0x20));
        _mm256_storeu_si256((__m256i *)to[4 + i], _mm256_permute2x128_si256(four[i], four[4 + i], 0x31));
    }
}
template <int KIND> static void fill(const Weight &w, int64_t row, int64_t count, int64_t block, int64_t blocks, Panel to) {
    constexpr int zero = KIND == INT4 ? 8 : KIND == FP4 ? 12 : 0;
    constexpr int64_t bytes = KIND == INT8 ? 128 : 64;
    constexpr bool is_signed = KIND == INT8;
    const uint8_t *order = is_signed ? orders.bytes : orders.halves;
    const int64_t groups = panel_groups(w);
    int64_t pair[64];  // of columns, by its place among the even and odd bytes of low and high numbers
    for (int i = 0; i < 64; i++) pair[i] = order[i / 32 * 64 + i % 16 * 4 + i / 16 % 2] / 2;
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t eight = 0; eight < PANEL; eight += 8) {
            alignas(64) int32_t words[8][64];
            for (int64_t r = 0; r < 8; r++) {  // rows that are not there repeat the last one
                const int64_t here = row + std::min(eight + r, count - 1);
                const Numbers found = numbers_of<KIND>(w.codes + here * w.row_bytes() + (block + b) * bytes);
                const I16 four[4] = {even_bytes(found.low, is_signed), odd_bytes(found.low, is_signed),
                                     even_bytes(found.high, is_signed), odd_bytes(found.high, is_signed)};
                for (int i = 0; i < 4; i++) store(words[r] + 16 * i, zero ? I16(S32(four[i]) - int16_t(zero)) : four[i]);
                for (int64_t g = 0; g < groups; g++) {
                    const int64_t place = (b * groups + g) * PANEL + eight + r;
                    const int64_t group = here * w.groups() + ((block + b) * BLOCK + g * w.group) / w.group;
                    to.scales[place] = (KIND == FP4 ? 0.5f : 1.0f) * (w.scales ? of_half(w.scales[group]) : 1.0f);
                    to.offsets[place] = w.offsets ? of_half(w.offsets[group]) : 0;
                }
            }
            for (int i = 0; i < 64; i += 8) {
                char *into[8];
                for (int n = 0; n < 8; n++)
                    into[n] = (char *)(to.numbers + ((b * 64 + pair[i + n]) * PANEL + eight) * 2);
                turn((const int32_t(*)[64])&words[0][i], into);
            }
        }
}

// sums [tokens][PANEL] += products of blocks of a panel with rows of activations.
template <int TOKENS>
static void through(const Weight &w, const Panel &panel, int64_t block, int64_t blocks, const Ordered *xs, float *sums) {
    const int64_t groups = panel_groups(w), pairs_of = BLOCK / 2 / groups;
    Float found[TOKENS][ACROSS];
    for (int t = 0; t < TOKENS; t++)
        for (int v = 0; v < ACROSS; v++) found[t][v] = load<Float>(sums + t * PANEL + v * LANES);
    const int16_t *from = panel.numbers;
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t g = 0; g < groups; g++) {
            const int64_t first = ((block + b) * BLOCK) / 2 + g * pairs_of;
            Whole acc[TOKENS][ACROSS] = {};
            for (int64_t p = 0; p < pairs_of; p++, from += 2 * PANEL) {
                Whole weights[ACROSS];
                for (int v = 0; v < ACROSS; v++) {
                    weights[v] = load<Whole>(from + v * 2 * LANES);
                    IN_REGISTER(weights[v]);  // else it is read once for each row of activations
                }
                for (int t = 0; t < TOKENS; t++) {
                    const Whole x = Whole{} + load<int32_t>(xs[t].numbers + 2 * (first + p));
                    for (int v = 0; v < ACROSS; v++) acc[t][v] = add_pairs(acc[t][v], x, weights[v]);
                }
            }
            for (int v = 0; v < ACROSS; v++) {
                const int64_t place = (b * groups + g) * PANEL + v * LANES;
                const Float scale = load<Float>(panel.scales + place), shift = load<Float>(panel.offsets + place);
                for (int t = 0; t < TOKENS; t++) {
                    Float sum = __builtin_convertvector(acc[t][v], Float);
                    if (w.offsets) sum -= shift * xs[t].sums[(block + b) * groups + g];
                    found[t][v] += sum * (scale * xs[t].steps[block + b]);
                }
            }
        }
    for (int t = 0; t < TOKENS; t++)
        for (int v = 0; v < ACROSS; v++) store(sums + t * PANEL + v * LANES, found[t][v]);
}

template <int KIND>
static void panel_rows(const Weight &w, int64_t row, const Ordered *xs, int64_t tokens, const float *bias, void *out,
                       int kind, int64_t stride) {
    const int64_t count = std::min<int64_t>(PANEL, w.out - row), groups = panel_groups(w);
    float *sums = (float *)scratch(2, tokens * PANEL * 4);
    char *at = scratch(3, DEPTH * PANEL * (BLOCK * 2 + groups * 8));
    Panel panel{(int16_t *)at, (float *)(at + DEPTH * PANEL * BLOCK * 2), nullptr};
    panel.offsets = panel.scales + DEPTH * groups * PANEL;
    memset(sums, 0, tokens * PANEL * 4);
    for (int64_t block = 0; block < w.blocks(); block += DEPTH) {
        const int64_t blocks = std::min(DEPTH, w.blocks() - block);
        fill<KIND>(w, row, count, block, blocks, panel);
        int64_t t = 0;
        for (; t + TOGETHER <= tokens; t += TOGETHER)
            through<TOGETHER>(w, panel, block, blocks, xs + t, sums + t * PANEL);
        for (; t + 4 <= tokens; t += 4) through<4>(w, panel, block, blocks, xs + t, sums + t * PANEL);
        for (; t + 2 <= tokens; t += 2) through<2>(w, panel, block, blocks, xs + t, sums + t * PANEL);
        for (; t < tokens; t++) through<1>(w, panel, block, blocks, xs + t, sums + t * PANEL);
    }
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t r = 0; r < count; r++) {
            const float y = sums[t * PANEL + r] * w.rows[row + r];
            put(out, kind, t * stride + row + r, bias ? y + bias[row + r] : y);
        }
}
#endif

// fp8: float32 products of values in the codes' order.
static void fp8_rows(const Weight &w, int64_t row, int64_t count, const float *x, int64_t tokens, const float *bias,
                     void *out, int kind, int64_t stride) {
    float *values = (float *)scratch(2, w.padded * 4);
    static float table[256];
    static const bool filled = [] {
        for (int c = 0; c < 256; c++) {
            uint16_t half = (c & 127) << 7;
            table[c] = (c & 127) == 127 ? NAN : of_half(half) * 256 * (c & 128 ? -1 : 1);
        }
        return true;
    }();
    (void)filled;
    for (int64_t r = row; r < row + count; r++) {
        for (int64_t i = 0; i < w.padded; i++) values[i] = table[w.codes[r * w.padded + i]];
        if (w.scales)
            for (int64_t i = 0; i < w.padded; i++) {
                int64_t column = i / BLOCK * BLOCK + orders.bytes[i % BLOCK];
                values[i] *= of_half(w.scales[r * w.groups() + column / w.group]);
            }
        for (int64_t t = 0; t < tokens; t++) {
            F16 sum = {};
            for (int64_t i = 0; i < w.padded; i += 16)
                sum += load<F16>(values + i) * load<F16>(x + t * w.padded + i);
            float y = total(sum) * w.rows[r];
            put(out, kind, t * stride + r, bias ? y + bias[r] : y);
        }
    }
}

#ifdef AMX
// Products of 16 rows with 16 tokens by tiles. A block has one part for each group of its columns; nibbles are widened
// and their words put in order of the parts, which are words 8 n to 8 n + 7 for the columns 32 n to 32 n + 31.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static void tiles(int64_t words) {  // of a product: bytes of the tile of weights, rows of those of activations
    TileConfig config;
    config.bytes[2] = words * 4;
    config.rows[3] = config.rows[4] = words;
    _tile_loadconfig(&config);
}
static int64_t tile_parts(const Weight &w) { return w.group >= BLOCK ? 1 : BLOCK / w.group; }
static bool tiles_take(const Weight &w) { return w.group >= BLOCK || (w.nibbles() && w.group >= 32); }
static int word_of(const Weight &w, int place) {  // of the words of 64 low and 64 high halves, or of 128 bytes
    return w.nibbles() ? place / 8 + place % 4 * 4 + place % 8 / 4 * 16 : place;
}

// 16 tokens in tiles: [blocks][hi, lo][32 words][16 tokens]; steps [blocks][16], sums [blocks][parts][16].
struct Tiled {
    int8_t *bytes;
    F16 *steps, *sums;
};
static size_t tiled_bytes(const Weight &w) { return w.blocks() * (4096 + 64 * (1 + tile_parts(w))); }
static Tiled place_tiled(const Weight &w, char *at) {
    return {(int8_t *)at, (F16 *)(at + w.blocks() * 4096), (F16 *)(at + w.blocks() * (4096 + 64))};
}
static void prepare_tiled(const Weight &w, const void *x, int kind, int64_t tokens, int64_t x_bytes, Tiled to) {
    Prepared p = place(w, scratch(3, prepared_bytes(w)));
    const int parts = (int)tile_parts(w), words = 32 / parts;
    memset(to.bytes, 0, tiled_bytes(w));
    for (int64_t t = 0; t < tokens; t++) {
        prepare(w, (const char *)x + t * x_bytes, kind, p);
        for (int64_t b = 0; b < w.blocks(); b++) {
            for (int place = 0; place < 32; place++) {
                const int8_t *hi = p.bytes + b * 256 + word_of(w, place) * 4, *lo = hi + 128;
                memcpy(to.bytes + b * 4096 + place * 64 + t * 4, hi, 4);
                memcpy(to.bytes + b * 4096 + 2048 + place * 64 + t * 4, lo, 4);
                for (int i = 0; i < 4; i++)
                    ((float *)to.sums)[(b * parts + place / words) * 16 + t] += 254 * hi[i] + lo[i];
            }
            ((float *)to.steps)[b * 16 + t] = p.steps[b];
        }
    }
}
static void amx_rows(const Weight &w, int64_t row, const Tiled *xs, int64_t tokens, const float *bias, void *out,
                     int kind, int64_t stride) {
    const int64_t blocks = w.blocks(), width = w.row_bytes(), parts = tile_parts(w);
    const int64_t words = std::min<int64_t>(16, 32 / parts), products = 32 / parts / words;  // of a part
    tiles(words);
    const uint8_t *first = w.codes + row * width;
    const float unit = w.kind == FP4 ? 0.5f : 1.0f;
    if (w.nibbles()) {  // bytes in two's complement, [16][padded]
        uint8_t *wide = (uint8_t *)scratch(4, 16 * w.padded);
        const uint8_t zero = w.kind == FP4 ? 12 : 8;
        int order[32];
        for (int place = 0; place < 32; place++) order[place] = word_of(w, place);
        const __m512i start = _mm512_loadu_si512(order), end = _mm512_loadu_si512(order + 16);
        for (int r = 0; r < 16; r++)
            for (int64_t b = 0; b < blocks; b++) {
                uint8_t *to = wide + r * w.padded + b * BLOCK;
                const uint8_t *codes = first + r * width + b * 64;
                const Numbers numbers = w.kind == FP4 ? numbers_of<FP4>(codes) : numbers_of<INT4>(codes);
                const __m512i low = (__m512i)(numbers.low - zero), high = (__m512i)(numbers.high - zero);
                _mm512_store_si512(to, _mm512_permutex2var_epi32(low, start, high));
                _mm512_store_si512(to + 64, _mm512_permutex2var_epi32(low, end, high));
            }
        first = wide;
    }
    const int64_t all = blocks * parts;
    float *scales = (float *)scratch(5, all * 32 * 4), *shifts = scales + all * 16;
    for (int64_t part = 0; part < all; part++)
        for (int r = 0; r < 16; r++) {
            int64_t at = (row + r) * w.groups() + part * (BLOCK / parts) / w.group;
            scales[part * 16 + r] = w.scales ? unit * of_half(w.scales[at]) : unit;
            shifts[part * 16 + r] = w.offsets ? of_half(w.offsets[at]) : 0;
        }
    alignas(64) int32_t high[256], low[256];
    for (int64_t t = 0; t < tokens; t += 16) {
        const Tiled &x = xs[t / 16];
        F16 sums[16] = {};
        for (int64_t part = 0; part < all; part++) {
            const int64_t b = part / parts, word = part % parts * (32 / parts);
            _tile_zero(0);
            _tile_zero(1);
            for (int64_t n = 0; n < products; n++) {
                const int64_t at = word + n * words;
                const int8_t *bytes = x.bytes + b * 4096 + at * 64;
                _tile_loadd(2, first + b * BLOCK + at * 4, w.padded);
                _tile_loadd(3, bytes, 64);
                _tile_loadd(4, bytes + 2048, 64);
                _tile_dpbssd(0, 2, 3);
                _tile_dpbssd(1, 2, 4);
            }
            _tile_stored(0, high, 64);
            _tile_stored(1, low, 64);
            for (int r = 0; r < 16; r++) {
                F16 found = floats(load<I16>(high + 16 * r)) * 254.0f + floats(load<I16>(low + 16 * r));
                if (w.offsets) found -= shifts[part * 16 + r] * x.sums[part];
                sums[r] += found * (x.steps[b] * scales[part * 16 + r]);
            }
        }
        for (int r = 0; r < 16; r++) {
            float y[16];
            store(y, sums[r] * w.rows[row + r]);
            for (int64_t i = 0; i < std::min<int64_t>(16, tokens - t); i++)
                put(out, kind, (t + i) * stride + row + r, bias ? y[i] + bias[row + r] : y[i]);
        }
    }
    _tile_release();
}
#endif

static void fp8_linear(const Weight &w, const char *x, int kind, int64_t tokens, int64_t x_bytes, const float *bias,
                       void *out, int64_t stride, int threads) {
    float *ordered = (float *)scratch(0, tokens * w.padded * 4);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t b = 0; b < w.blocks(); b++) {
            float values[BLOCK], *to = ordered + t * w.padded + b * BLOCK;
            gather(w, x + t * x_bytes, kind, b, values);
            for (int i = 0; i < BLOCK; i++) to[i] = values[orders.bytes[i]];
        }
    parallel((w.out + 31) / 32, threads, [&](int64_t n) {
        fp8_rows(w, n * 32, std::min<int64_t>(32, w.out - n * 32), ordered, tokens, bias, out, kind, stride);
    });
}
}  // namespace

// out [tokens, out] = x [tokens, columns] W^T + bias. x and out are of one element kind; strides in elements.
FUNCTION(octo_packed_linear, PackedCall) {
    const PackedCall &c = *call;
    const int kind = (int)c.kind, threads = (int)c.threads;
    const int64_t out_rows = c.out_rows, tokens = c.tokens, stride = c.stride;
    const void *x = c.x;
    const float *bias = c.bias;
    void *out = c.out;
    Weight w{(int)c.code_kind, out_rows, c.columns, c.padded, c.group, c.codes, c.rows, c.scales, c.offsets, c.order};
    const int64_t x_bytes = c.x_stride * (kind == FLOAT32 ? 4 : 2);
    if (w.kind == FP8) return fp8_linear(w, (const char *)x, kind, tokens, x_bytes, bias, out, stride, threads);
    int64_t done = 0;
#ifdef AMX
    if (tokens >= 8 && tiles_take(w) && out_rows >= 16 && amx_allowed()) {
        const int64_t each = tiled_bytes(w), count = (tokens + 15) / 16;
        char *at = scratch(0, each * count + count * sizeof(Tiled));
        Tiled *xs = (Tiled *)(at + each * count);
        parallel(count, threads, [&](int64_t n) {
            xs[n] = place_tiled(w, at + each * n);
            int64_t here = std::min<int64_t>(16, tokens - n * 16);
            prepare_tiled(w, (const char *)x + n * 16 * x_bytes, kind, here, x_bytes, xs[n]);
        });
        done = out_rows / 16 * 16;
        parallel(done / 16, threads, [&](int64_t n) { amx_rows(w, n * 16, xs, tokens, bias, out, kind, stride); });
        if (done == out_rows) return;
    }
#endif
#ifdef PANELS
    if (tokens >= MANY) {
        const int64_t each = (ordered_bytes(w) + 63) / 64 * 64;
        char *at = scratch(1, each * tokens + tokens * sizeof(Ordered));
        Ordered *xs = (Ordered *)(at + each * tokens);
        parallel(tokens, threads, [&](int64_t t) {
            xs[t] = place_ordered(w, at + each * t);
            prepare_ordered(w, (const char *)x + t * x_bytes, kind, xs[t]);
        });
        const auto rows = w.kind == INT8 ? panel_rows<INT8> : w.kind == INT4 ? panel_rows<INT4> : panel_rows<FP4>;
        parallel((out_rows - done + PANEL - 1) / PANEL, threads, [&](int64_t n) {
            rows(w, done + n * PANEL, xs, tokens, bias, out, kind, stride);
        });
        return;
    }
#endif
    const int64_t each = (prepared_bytes(w) + 63) / 64 * 64;
    char *at = scratch(1, each * tokens + tokens * sizeof(Prepared));
    Prepared *xs = (Prepared *)(at + each * tokens);
    parallel(tokens, tokens < 8 ? 1 : threads, [&](int64_t t) {
        xs[t] = place(w, at + each * t);
        prepare(w, (const char *)x + t * x_bytes, kind, xs[t]);
    });
    const int64_t chunk = 32;
    const auto rows = w.kind == INT8              ? some_rows<INT8, 1>
                      : w.kind == INT4            ? (w.parts() == 1 ? some_rows<INT4, 1> : some_rows<INT4, 2>)
                      : (w.parts() == 1 ? some_rows<FP4, 1> : some_rows<FP4, 2>);
    parallel((out_rows - done + chunk - 1) / chunk, threads, [&](int64_t n) {
        const int64_t row = done + n * chunk;
        rows(w, row, std::min(out_rows, row + chunk), xs, tokens, bias, out, kind, stride);
    });
}

// The same for weights bfloat16 [out, columns] (contiguous) or float32 ones, in float32.
constexpr int FEW_ROWS = REGISTER == 64 ? 4 : 2;  // with four tokens, as many as there are registers for
template <int ROWS, int TOKENS, bool WIDE>
static void dense_rows(const void *weight, int64_t columns, int64_t row, const float *x, const float *bias, void *out,
                       int kind, int64_t stride, int64_t token) {
    F16 sums[ROWS][TOKENS] = {};
    const int64_t whole = columns / 16 * 16;
    for (int64_t i = 0; i < whole; i += 16)
        for (int r = 0; r < ROWS; r++) {
            if (!WIDE) __builtin_prefetch((const uint16_t *)weight + (row + r + 2 * ROWS) * columns + i);
            F16 part = WIDE ? load<F16>((const float *)weight + (row + r) * columns + i)
                            : of_bf16s((const uint16_t *)weight + (row + r) * columns + i);
            for (int t = 0; t < TOKENS; t++) sums[r][t] += part * load<F16>(x + t * columns + i);
        }
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < TOKENS; t++) {
            float y = total(sums[r][t]);
            for (int64_t i = whole; i < columns; i++)
                y += element(weight, WIDE ? FLOAT32 : BFLOAT16, (row + r) * columns + i) * x[t * columns + i];
            put(out, kind, (token + t) * stride + row + r, bias ? y + bias[row + r] : y);
        }
}
template <bool WIDE>
static void dense(const void *weight, int64_t out_rows, int64_t columns, const void *x, int kind, int64_t tokens,
                  int64_t x_stride, const float *bias, void *out, int64_t stride, int threads) {
    float *wide = (float *)scratch(0, tokens * columns * 4);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < columns; i++) wide[t * columns + i] = element(x, kind, t * x_stride + i);
    parallel((out_rows + 31) / 32, threads, [&](int64_t n) {
        int64_t last = std::min(out_rows, n * 32 + 32), t = 0;
        for (; t < tokens; t += t + 4 <= tokens ? 4 : 1) {
            int64_t row = n * 32;
            const float *from = wide + t * columns;
            if (t + 4 <= tokens)
                for (; row + FEW_ROWS <= last; row += FEW_ROWS)
                    dense_rows<FEW_ROWS, 4, WIDE>(weight, columns, row, from, bias, out, kind, stride, t);
            else
                for (; row + 4 <= last; row += 4)
                    dense_rows<4, 1, WIDE>(weight, columns, row, from, bias, out, kind, stride, t);
            for (; row < last; row++)
                for (int64_t i = t; i < (t + 4 <= tokens ? t + 4 : t + 1); i++)
                    dense_rows<1, 1, WIDE>(weight, columns, row, wide + i * columns, bias, out, kind, stride, i);
        }
    });
}
FUNCTION(octo_dense_linear, DenseCall) {
    const DenseCall &c = *call;
    (c.weight_kind == FLOAT32 ? dense<true> : dense<false>)(c.weight, c.out_rows, c.columns, c.x, (int)c.kind, c.tokens,
                                                            c.x_stride, c.bias, c.out, c.stride, (int)c.threads);
}

// int8 codes of rows in the order of kernels/linear/packed.py, and factors: a row's largest magnitude / 127 in bfloat16.
FUNCTION(octo_pack_rows, PackCall) {
    const PackCall &c = *call;
    parallel((c.rows + 63) / 64, (int)c.threads, [&](int64_t n) {
        float *values = (float *)scratch(0, c.padded * 4), *scaled = (float *)scratch(1, c.padded * 4);
        for (int64_t r = n * 64; r < std::min(c.rows, n * 64 + 64); r++) {
            float largest = 0;
            for (int64_t i = 0; i < c.columns; i++) values[i] = element(c.weight, (int)c.element, r * c.stride + i);
            for (int64_t i = c.columns; i < c.padded; i++) values[i] = 0;
            for (int64_t i = 0; i < c.padded; i++) largest = std::max(largest, std::fabs(values[i]));
            float factor = of_bf16(to_bf16(largest / 127));
            if (!(factor > 0)) factor = 1;
            c.factors[r] = factor;
            for (int64_t i = 0; i < c.padded; i++)
                scaled[i] = std::nearbyint(std::min(std::max(values[i] / factor, -127.0f), 127.0f));
            int8_t *to = (int8_t *)c.codes + r * c.padded;
            for (int64_t first = 0; first < c.padded; first += BLOCK)
                for (int i = 0; i < BLOCK; i++) to[first + i] = (int8_t)scaled[first + orders.bytes[i]];
        }
    });
}
