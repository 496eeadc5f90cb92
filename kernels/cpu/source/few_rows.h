// Products of few rows of activations with packed weights of integer kinds: a row of weights after the other.
#pragma once
#include "packed.h"

namespace {
constexpr int AHEAD = 2048;  // bytes that are fetched in advance

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
}  // namespace
