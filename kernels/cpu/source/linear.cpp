// Products of activations with packed weights (see kernels/linear/packed.py) and with bfloat16 weights.
#include "calls.h"
#include "few_rows.h"
#include "packed.h"

namespace {
constexpr int64_t MANY = 8;  // rows of activations from which on widened weights pay

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
