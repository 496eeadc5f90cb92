// Attention over sinks, packed pages and tail (see kernels/attention/inputs.py): the sequence is cut into blocks of up
// to 64 tokens. A block's keys are decoded to a tile with tokens side by side, multiplied with all queries of the KV
// head, then its values likewise. A run of blocks is a piece of work: SPLIT of them, or where there are many queries as
// many as make MOST_SPLITS pieces, whose sums take memory. They are merged in order, so the number of threads changes
// nothing.
#include "calls.h"
#include "common.h"
#include <algorithm>
#include <vector>

namespace {
constexpr int PAGE = 64, SPLIT = 16, ROWS = 128, MOST_SPLITS = 4;
enum { PLAIN = 0, TRELLIS = 1, OCTOPUS = 2 };
}  // namespace

namespace {
static inline F16 weight_of(F16 x) {  // exp(x) of x <= 0, which is 0 far below
    return pick(x < -87.0f, F16{}, exponential(x));
}

// cap tanh(x / cap), of which the series is exact where the quotient would cancel.
static inline F16 capped(F16 x, float cap) {
    F16 y = x / cap, size = pick(y < 0.0f, -y, y), square = y * y;
    F16 series = square * (62.0f / 2835.0f) - 17.0f / 315.0f;
    series = (series * square + 2.0f / 15.0f) * square - 1.0f / 3.0f;
    series = (series * square + 1.0f) * y;
    F16 e = exponential(size * -2.0f), whole = (1.0f - e) / (1.0f + e);
    whole = pick(y < 0.0f, -whole, whole);
    return pick(size < 0.25f, series, whole) * cap;
}

// rows[i][j] becomes rows[j][i], words of 32 bits. A stage exchanges what lies `half` lanes and rows off the diagonal.
#define STAGE(half, low, high)                                                                          \
    for (int i = 0; i < N; i++)                                                                         \
        if (!(i & half)) {                                                                              \
            V a = rows[i], b = rows[i + half];                                                          \
            rows[i] = __builtin_shuffle(a, b, low), rows[i + half] = __builtin_shuffle(a, b, high);     \
        }
#if REGISTER == 64
static inline void transpose(U16 *rows) {
    typedef U16 V;
    constexpr int N = 16;
    const V l8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    const V l4 = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
    const V l2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
    const V l1 = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
    STAGE(8, l8, l8 + 8)
    STAGE(4, l4, l4 + 4)
    STAGE(2, l2, l2 + 2)
    STAGE(1, l1, l1 + 1)
}
#else
static inline void transpose_square(Lanes<uint32_t> *rows) {
    typedef Lanes<uint32_t> V;
    constexpr int N = REGISTER / 4;
#if REGISTER == 32
    const V l4 = {0, 1, 2, 3, 8, 9, 10, 11}, h4 = {4, 5, 6, 7, 12, 13, 14, 15};
    const V l2 = {0, 1, 8, 9, 4, 5, 12, 13}, h2 = {2, 3, 10, 11, 6, 7, 14, 15};
    const V l1 = {0, 8, 2, 10, 4, 12, 6, 14}, h1 = {1, 9, 3, 11, 5, 13, 7, 15};
    STAGE(4, l4, h4)
#else
    const V l2 = {0, 1, 4, 5}, h2 = {2, 3, 6, 7}, l1 = {0, 4, 2, 6}, h1 = {1, 5, 3, 7};
#endif
    STAGE(2, l2, h2)
    STAGE(1, l1, h1)
}
static inline void transpose(U16 *rows) {
    typedef Lanes<uint32_t> V;
    constexpr int N = REGISTER / 4, ACROSS = 16 / N;
    V *parts = (V *)rows;  // [16][ACROSS]
    for (int i = 0; i < ACROSS; i++)
        for (int j = i; j < ACROSS; j++) {
            V one[N], other[N];
            for (int n = 0; n < N; n++)
                one[n] = parts[(i * N + n) * ACROSS + j], other[n] = parts[(j * N + n) * ACROSS + i];
            transpose_square(one), transpose_square(other);
            for (int n = 0; n < N; n++)
                parts[(j * N + n) * ACROSS + i] = one[n], parts[(i * N + n) * ACROSS + j] = other[n];
        }
}
#endif
#undef STAGE

static inline U16 some_bytes(const uint8_t *from, int64_t bytes) {
    if (bytes >= 64) return load<U16>(from);
#if defined(__AVX512BW__)
    return (U16)_mm512_maskz_loadu_epi8((1ull << bytes) - 1, from);
#else
    U16 found = {};
    memcpy(&found, from, bytes);
    return found;
#endif
}

// tile [dim][64] of rows of numbers.
static void tile_of_rows(const void *const *rows, int count, int64_t dim, int element, float *tile) {
    for (int first = 0; first < PAGE; first += 16) {
        int64_t step = element == FLOAT32 ? 16 : 32;
        for (int64_t i = 0; i < dim; i += step) {
            U16 words[16];
            int64_t bytes = std::min<int64_t>(64, (dim - i) * (element == FLOAT32 ? 4 : 2));
            for (int t = 0; t < 16; t++)
                words[t] = first + t < count
                               ? some_bytes((const uint8_t *)rows[first + t] + i * (element == FLOAT32 ? 4 : 2), bytes)
                               : U16{};
            transpose(words);
            float *to = tile + i * PAGE + first;
            if (element == FLOAT32)
                for (int j = 0; j < 16 && i + j < dim; j++) store(to + j * PAGE, words[j]);
            else
                for (int j = 0; j < 16 && i + 2 * j < dim; j++) {
                    if (element == BFLOAT16) {
                        store(to + 2 * j * PAGE, words[j] << 16);
                        store(to + (2 * j + 1) * PAGE, words[j] & 0xffff0000u);
                    } else
                        for (int t = 0; t < 16; t++) {
                            const uint32_t word = ((const uint32_t *)(words + j))[t];
                            to[2 * j * PAGE + t] = of_half((uint16_t)word);
                            to[(2 * j + 1) * PAGE + t] = of_half(word >> 16);
                        }
                }
        }
    }
}

#if REGISTER == 32
// Four entries: loads straight into a register, as a load over single stores would wait for them to leave the core.
static inline __m128i entries(const int32_t *table, uint64_t two, uint64_t more) {
    const __m128i low = _mm_insert_epi32(_mm_cvtsi32_si128(table[(uint32_t)two]), table[two >> 32], 1);
    const __m128i high = _mm_insert_epi32(_mm_cvtsi32_si128(table[(uint32_t)more]), table[more >> 32], 1);
    return _mm_unpacklo_epi64(low, high);
}
#endif

static inline I16 lookup(const int32_t *table, I16 index) {
#if REGISTER == 64
    return (I16)_mm512_i32gather_epi32((__m512i)index, table, 4);
#elif REGISTER == 32
    uint64_t at[8];
    store(at, index);
    auto eight = [&](const uint64_t *at) {
        return Lanes<int32_t>(_mm256_set_m128i(entries(table, at[2], at[3]), entries(table, at[0], at[1])));
    };
    return I16(eight(at), eight(at + 4));
#else
    int32_t found[16], at[16];
    store(at, index);
    for (int i = 0; i < 16; i++) found[i] = table[at[i]];
    return load<I16>(found);
#endif
}

// Words whose bytes are all ones where a number of three bits, of which more may stand above, has its bits.
static inline I16 bytes_of_bits(U16 numbers) {
#if REGISTER == 64
    const I16 bytes = {0,        0x0000ff, 0x00ff00, 0x00ffff, 0xff0000, 0xff00ff, 0xffff00, 0xffffff,
                       0,        0x0000ff, 0x00ff00, 0x00ffff, 0xff0000, 0xff00ff, 0xffff00, 0xffffff};
    return (I16)_mm512_permutexvar_ps((__m512i)numbers, (__m512)bytes);
#elif REGISTER == 32
    const __m256i bytes = _mm256_setr_epi32(0, 0x0000ff, 0x00ff00, 0x00ffff, 0xff0000, 0xff00ff, 0xffff00, 0xffffff);
    auto of = [&](Lanes<uint32_t> eight) {
        return (Lanes<int32_t>)_mm256_permutevar8x32_epi32(bytes, (__m256i)eight);
    };
    return I16(of(numbers.low.lanes), of(numbers.high.lanes));
#else
    const U16 spread = (numbers & 1u) | (numbers & 2u) << 7 | (numbers & 4u) << 14;
    return (I16)((spread << 8) - spread);
#endif
}

// A block's codes, which are read as numbers of 16 tokens side by side. A number times the token's factor is the vector's.
//
// A trellis's numbers come nested: u, u + 256 u' and u + 256 u' + 65536 u'' of three numbers u - MIDDLE, u' - MIDDLE,
// u'' - MIDDLE. Sums of products of them are as good as of the numbers, as it takes little to get one from the other at
// the beginning or the end (`nested_factors`, `numbers_of`), and they cost half of the instructions.
constexpr float MIDDLE = 127.5f;
struct Codes {
    const Codec &c;
    const U16 *streams;  // [words][4 times 16 tokens]
    const uint32_t *before;  // the first bit of the triplet before one in its chain; of the chained ones
    int64_t chained, dim;  // triplets in chains

    // `count` bits, and others above them.
    INLINE U16 from_bit(uint32_t bit, int count, int sixteen) const {
        const uint32_t w = bit / 32;
        const int shift = bit % 32;
        U16 found = streams[w * 4 + sixteen] >> shift;
        if (shift + count > 32) found |= streams[(w + 1) * 4 + sixteen] << (32 - shift);
        return found;
    }
    INLINE U16 field(uint32_t bit, int count, int sixteen) const {
        return from_bit(bit, count, sixteen) & ((1u << count) - 1);
    }
    // Triplet i of 64 tokens of a trellis: u, u' and u'' are the bytes of a word, the lowest first.
    INLINE void words(int64_t i, I16 *found) const {
        const int bits = (int)c.stream, state = (int)c.state_bits;
        const uint32_t bit = (uint32_t)i * bits;
        U16 index[4];
        if (i >= chained)
            for (int n = 0; n < 4; n++) index[n] = field(bit, bits, n) + (1u << (bits + state));
        else if (before[i] == bit + bits)  // the state's bits follow the code's
            for (int n = 0; n < 4; n++) index[n] = field(bit, bits + state, n);
        else
            for (int n = 0; n < 4; n++) index[n] = field(bit, bits, n) | field(before[i], state, n) << bits;
        for (int n = 0; n < 4; n++) found[n] = lookup((const int32_t *)c.table, (I16)index[n]);
        if (!c.is_signed) return;
        const uint32_t signs = (uint32_t)(c.triplets * bits + 3 * i);
        // A number's negative has all bits of its byte turned.
        for (int n = 0; n < 4; n++) found[n] = found[n] ^ bytes_of_bits(from_bit(signs, 3, n));
    }
};
// The nested numbers of words.
static INLINE void nested_of(I16 word, F16 *xyz) {
    xyz[0] = floats(word & 0xff), xyz[1] = floats(word & 0xffff), xyz[2] = floats(word);
}
// What nested numbers are multiplied by for the products of numbers with x, y, z; returns what is added to the sum.
static inline float nested_factors(float x, float y, float z, float *factors) {
    factors[0] = x - y / 256, factors[1] = y / 256 - z / 65536, factors[2] = z / 65536;
    return -MIDDLE * (x + y + z);
}
// Number `axis` of a triplet, times a weight or summed over weights, of such sums of nested ones; `weight` is their sum.
template <class T> static inline T number_of(const T *nested, int64_t axis, float weight) {
    const T apart = axis == 0 ? nested[0] : axis == 1 ? (nested[1] - nested[0]) / 256.0f
                                                      : (nested[2] - nested[1]) / 65536.0f;
    return apart - MIDDLE * weight;
}

#if REGISTER == 32
// Words of a row, at most eight.
static inline Lanes<uint32_t> some_words(const uint8_t *from, int64_t words) {
    static const int32_t there[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    const __m256i mask = _mm256_loadu_si256((const __m256i *)(there + 8 - std::min<int64_t>(words, 8)));
    return (Lanes<uint32_t>)_mm256_maskload_epi32((const int *)from, mask);
}
#endif

// The codes of 64 rows, each of which ends with its norm.
static Codes codes_of(const Codec &c, const uint8_t *rows, int64_t dim, float *factors) {
    const int64_t words = (c.bytes + 1) / 4, chain = c.chains ? c.triplets / c.chains : 0;  // without the norm
    U16 *streams = (U16 *)scratch(6, (words + 17) * 4 * sizeof(U16) + c.triplets * 4);
    uint32_t *before = (uint32_t *)(streams + (words + 17) * 4);
    for (int64_t first = 0, i = 0; first < c.chains * chain; first += chain)
        for (; i < first + chain; i++) before[i] = (uint32_t)((i + 1 < first + chain ? i + 1 : first) * c.stream);
    for (int sixteen = 0; sixteen < 4; sixteen++) {
        const uint8_t *first = rows + sixteen * 16 * c.bytes;
#if REGISTER == 32
        for (int64_t w = 0; w < words; w += 8)
            for (int half = 0; half < 2; half++) {
                Lanes<uint32_t> part[8];
                for (int t = 0; t < 8; t++) part[t] = some_words(first + (8 * half + t) * c.bytes + 4 * w, words - w);
                transpose_square(part);
                for (int j = 0; j < 8; j++) store((char *)(streams + (w + j) * 4 + sixteen) + 32 * half, part[j]);
            }
#else
        for (int64_t w = 0; w < words; w += 16) {
            U16 part[16];
            const int64_t bytes = std::min<int64_t>(64, c.bytes - 4 * w);
            for (int t = 0; t < 16; t++) part[t] = some_bytes(first + t * c.bytes + 4 * w, bytes);
            transpose(part);
            for (int j = 0; j < 16 && w + j < words; j++) streams[(w + j) * 4 + sixteen] = part[j];
        }
#endif
        for (int t = 0; t < 16; t++)
            factors[sixteen * 16 + t] = of_half(load<uint16_t>(first + (t + 1) * c.bytes - 2)) * (float)c.unit;
    }
    return {c, streams, before, c.chains * chain, dim};
}

// tile [dim][64] of a block of codes.
static void tile_of_codes(const Codes &codes, float *tile) {
    const int64_t dim = codes.dim;
    const int bits = (int)codes.c.stream;
    for (int64_t i = 0; i < codes.c.triplets; i++) {
        const int64_t axes = std::min<int64_t>(3, dim - 3 * i);
        float *to = tile + 3 * i * PAGE;
        if (codes.c.kind == TRELLIS) {
            I16 words[4];
            codes.words(i, words);
            for (int n = 0; n < 4; n++) {
                F16 nested[3];
                nested_of(words[n], nested);
                for (int64_t axis = 0; axis < axes; axis++) store(to + axis * PAGE + n * 16, number_of(nested, axis, 1));
            }
        } else
            for (int n = 0; n < 4; n++) {
                const I16 index = (I16)codes.field((uint32_t)i * bits, bits, n);
                for (int64_t axis = 0; axis < axes; axis++)
                    store(to + axis * PAGE + n * 16, lookup((const int32_t *)codes.c.table + axis * codes.c.entries, index));
            }
    }
}

// For few queries a trellis's codes are multiplied as they are read, without a tile.
constexpr int AT_ONCE = REGISTER == 64 ? 8 : 4;  // queries whose sums registers hold
// What scores_of_codes takes of queries [R][dim]: for each triplet and query three factors, then one addend a query.
static void factors_of_queries(const Codec &c, const float *queries, int64_t R, int64_t dim, float *factors) {
    float *addends = factors + c.triplets * R * 3;
    for (int64_t r = 0; r < R; r++) {
        addends[r] = 0;
        for (int64_t i = 0; i < c.triplets; i++) {
            float xyz[3] = {}, *to = factors + (i * R + r) * 3;
            for (int64_t axis = 0; axis < 3 && 3 * i + axis < dim; axis++) xyz[axis] = queries[r * dim + 3 * i + axis];
            addends[r] += nested_factors(xyz[0], xyz[1], xyz[2], to);
        }
    }
}
// scores [R][64] of queries.
template <int R> static void scores_of_codes(const Codes &codes, const float *factors, float *scores) {
    const int64_t triplets = codes.c.triplets;
    const float *addends = factors + triplets * R * 3;
    I16 *words = (I16 *)scratch(2, triplets * 4 * sizeof(I16));
    for (int64_t i = 0; i < triplets; i++) codes.words(i, words + 4 * i);
    for (int sixteen = 0; sixteen < 4; sixteen++) {
        Lanes<float> sums[R][PARTS];
        for (int r = 0; r < R; r++)
            for (int n = 0; n < PARTS; n++) sums[r][n] = addends[r] - Lanes<float>{};
        const float *q = factors;
        for (int64_t i = 0; i < triplets; i++, q += 3 * R) {
            F16 xyz[3];
            nested_of(words[4 * i + sixteen], xyz);
            for (int r = 0; r < R; r++)
                for (int axis = 0; axis < 3; axis++)
                    for (int n = 0; n < PARTS; n++) sums[r][n] += part(xyz[axis], n) * q[3 * r + axis];
        }
        for (int r = 0; r < R; r++)
            for (int n = 0; n < PARTS; n++) store(scores + r * PAGE + 16 * sixteen + n * (REGISTER / 4), sums[r][n]);
    }
}
// sums [R][dim][16], over tokens a multiple of 16 apart, += weights [R][64] times nested numbers.
template <int R> static void add_codes(const Codes &codes, const float *weights, float *sums) {
    const int64_t dim = codes.dim;
    for (int64_t i = 0; i < codes.c.triplets; i++) {
        I16 words[4];
        codes.words(i, words);
        for (int64_t axis = 0; axis < 3 && 3 * i + axis < dim; axis++) {
            F16 numbers[4];
            for (int n = 0; n < 4; n++) numbers[n] = floats(axis == 2 ? words[n] : words[n] & (axis ? 0xffff : 0xff));
            for (int r = 0; r < R; r++) {
                float *to = sums + (r * dim + 3 * i + axis) * 16;
                F16 sum = load<F16>(to);
                for (int n = 0; n < 4; n++) sum += numbers[n] * load<F16>(weights + r * PAGE + 16 * n);
                store(to, sum);
            }
        }
    }
}
// One of the templates F<1> to F<AT_ONCE> for a number of queries; null: there are too many.
#define BY_QUERIES(F, R)                                                                                       \
    ((R) == 1 ? F<1> : (R) == 2 ? F<2> : (R) == 3 ? F<3> : (R) == 4 ? F<4> : AT_ONCE < (R) ? nullptr           \
     : (R) == 5 ? F<5> : (R) == 6 ? F<6> : (R) == 7 ? F<7> : F<8>)

// scores [R][64] = queries [R][dim] times the first 16 WIDTH columns of tile [dim][stride].
template <int R, int WIDTH>
static void products(const float *queries, int64_t dim, const float *tile, int64_t stride, float *scores) {
    typedef Lanes<float> V;
    constexpr int COUNT = WIDTH * PARTS, EACH = REGISTER / 4;
    V sums[R][COUNT] = {};
    for (int64_t i = 0; i < dim; i++)
        for (int v = 0; v < COUNT; v++) {
            const V numbers = load<V>(tile + i * stride + EACH * v);
            for (int r = 0; r < R; r++) sums[r][v] += numbers * queries[r * dim + i];
        }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < COUNT; v++) store(scores + r * PAGE + EACH * v, sums[r][v]);
}
// As many at once as there are registers for.
constexpr int TALL = REGISTER == 64 ? 4 : REGISTER == 32 ? 6 : 3, BROAD = REGISTER == 64 ? 4 : 1;
template <int R, int WIDTH>
static void some_products(const float *queries, int64_t dim, const float *tile, int64_t stride, float *scores) {
    constexpr int SOME = WIDTH < BROAD ? WIDTH : BROAD;
    for (int v = 0; v < WIDTH; v += SOME) products<R, SOME>(queries, dim, tile + 16 * v, stride, scores + 16 * v);
}
template <int WIDTH>
static void all_products(const float *queries, int64_t rows, int64_t dim, const float *tile, int64_t stride,
                         float *scores) {
    int64_t r = 0;
    for (; r + TALL <= rows; r += TALL)
        some_products<TALL, WIDTH>(queries + r * dim, dim, tile, stride, scores + r * PAGE);
    for (; r + 3 <= rows; r += 3)
        some_products<3, WIDTH>(queries + r * dim, dim, tile, stride, scores + r * PAGE);
    if (rows - r == 2) some_products<2, WIDTH>(queries + r * dim, dim, tile, stride, scores + r * PAGE);
    if (rows - r == 1) some_products<1, WIDTH>(queries + r * dim, dim, tile, stride, scores + r * PAGE);
}

// sums [R][dim] += weights [R][64] times values [count][dim].
template <int R>
static void add_values(const float *weights, int count, const float *values, int64_t dim, float *sums) {
    typedef Lanes<float> V;
    constexpr int EACH = REGISTER / 4;
    for (int64_t i = 0; i < dim; i += 16) {
        V found[R][PARTS];
        for (int r = 0; r < R; r++)
            for (int n = 0; n < PARTS; n++) found[r][n] = load<V>(sums + r * dim + i + EACH * n);
        for (int t = 0; t < count; t++)
            for (int n = 0; n < PARTS; n++) {
                const V v = load<V>(values + t * dim + i + EACH * n);
                for (int r = 0; r < R; r++) found[r][n] += v * weights[r * PAGE + t];
            }
        for (int r = 0; r < R; r++)
            for (int n = 0; n < PARTS; n++) store(sums + r * dim + i + EACH * n, found[r][n]);
    }
}
static void add_all_values(const float *weights, int64_t rows, int count, const float *values, int64_t dim,
                           float *sums) {
    constexpr int MOST = REGISTER == 64 ? 8 : REGISTER == 32 ? 6 : 3;
    int64_t r = 0;
    for (; r + MOST <= rows; r += MOST) add_values<MOST>(weights + r * PAGE, count, values, dim, sums + r * dim);
    if (MOST > 4)
        for (; r + 4 <= rows; r += 4) add_values<4>(weights + r * PAGE, count, values, dim, sums + r * dim);
    if (rows - r == 3) add_values<3>(weights + r * PAGE, count, values, dim, sums + r * dim);
    if (rows - r == 2) add_values<2>(weights + r * PAGE, count, values, dim, sums + r * dim);
    if (rows - r == 1) add_values<1>(weights + r * PAGE, count, values, dim, sums + r * dim);
}
// The same for a tile [dim][64], into sums [R][dim][16] over tokens a multiple of 16 apart.
template <int R> static void add_tile(const float *weights, const float *tile, int64_t dim, float *sums) {
    for (int r = 0; r < R; r++)  // one after the other, half of the lanes at a time: eight registers of weights
        for (int half = 0; half < 16; half += REGISTER / 4) {
            typedef Lanes<float> V;
            const float *from = weights + r * PAGE + half;
            const V w[4] = {load<V>(from), load<V>(from + 16), load<V>(from + 32), load<V>(from + 48)};
            for (int64_t i = 0; i < dim; i++) {
                const float *part = tile + i * PAGE + half;
                float *to = sums + (r * dim + i) * 16 + half;
                V sum = load<V>(part) * w[0] + load<V>(part + 16) * w[1] + load<V>(part + 32) * w[2] +
                        load<V>(part + 48) * w[3];
                store(to, load<V>(to) + sum);
            }
        }
}

struct Piece {  // sums of a run of blocks
    std::vector<float> top, total, sums;
};

struct Work {
    const AttentionCall &c;
    int64_t b, head, first_row, count_rows, first_block, last_block;
    int64_t row, start, length, packed, sink_blocks, blocks;
    Piece *piece;

    void run() const;
};

static int64_t tail_start(const AttentionCall &c, int64_t packed) { return c.sink + packed * PAGE; }
// The first position that a query sees.
static int64_t earliest(const AttentionCall &c, int64_t query) { return std::max<int64_t>(0, query - c.window + 1); }

void Work::run() const {
    const int64_t dim = c.dim, group = c.heads / c.kv_heads, R = count_rows;
    const int64_t size = c.element == FLOAT32 ? 4 : 2;
    const bool few = R <= 8, mean = c.coefficients != nullptr;
    const int64_t floats_needed = R * dim * 3 + R * PAGE * 2 + dim * PAGE * 2 + (few ? R * (17 * dim + 3) : 0) + PAGE * 4 +
                                  (mean ? dim * 32 + R * dim : 0);
    float *at = (float *)scratch(7, floats_needed * 4 + 1024);
    auto take = [&](int64_t n) { float *found = at; at += (n + 15) / 16 * 16; return found; };
    float *queries = take(R * dim), *sums = take(R * dim), *scores = take(R * PAGE), *biases = take(R * PAGE);
    float *tile = take(dim * PAGE), *values = take(dim * PAGE), *factors = take(PAGE);
    float *wide = few ? take(R * dim * 16) : nullptr;
    const auto multiply = c.k.kind != TRELLIS ? nullptr : BY_QUERIES(scores_of_codes, R);
    const auto add = c.v.kind != TRELLIS ? nullptr : BY_QUERIES(add_codes, R);
    float *by_triplet = multiply ? take(R * (3 * c.k.triplets + 1)) : nullptr;
    F16 nested[AT_ONCE] = {};  // of queries: the weights of numbers that `wide` has nested
    float *coefficients = mean ? take(R * dim) : nullptr, *turned = mean ? take(R * dim) : nullptr;
    float *offsets = mean ? take(dim * 32) : nullptr;
    piece->top.assign(R, -INFINITY), piece->total.assign(R, 0);
    memset(sums, 0, R * dim * 4);
    if (few) memset(wide, 0, R * dim * 64);
    for (int64_t r = 0; r < R; r++) {
        int64_t token = (first_row + r) / group, h = head * group + (first_row + r) % group;
        for (int64_t i = 0; i < dim; i++)
            queries[r * dim + i] = element(c.q, c.element, b * c.q_b + token * c.q_c + h * c.q_h + i) * (float)c.scale;
        if (mean)
            for (int64_t i = 0; i < dim; i++)
                coefficients[r * dim + i] =
                    c.coefficients[((b * c.count + token) * c.heads + h) * dim + i] * (float)c.scale;
    }
    if (multiply) factors_of_queries(c.k, queries, R, dim, by_triplet);
    if (mean)
        for (int64_t i = 0; i < dim; i++)
            for (int t = 0; t < 32; t++) offsets[i * 32 + t] = c.offset[t * dim + i];

    for (int64_t block = first_block; block < last_block; block++) {
        const void *k_rows[PAGE], *v_rows[PAGE];
        const uint8_t *page = nullptr;
        int64_t position, n = PAGE;
        if (block < sink_blocks) {
            position = block * PAGE;
            n = std::min<int64_t>(PAGE, std::min(c.sink, length) - position);
            for (int64_t t = 0; t < n; t++) {
                k_rows[t] = (const char *)c.sink_k + (row * c.sk_r + head * c.sk_h + (position + t) * c.sk_t) * size;
                v_rows[t] = (const char *)c.sink_v + (row * c.sv_r + head * c.sv_h + (position + t) * c.sv_t) * size;
            }
        } else if (block < sink_blocks + packed) {
            position = c.sink + (block - sink_blocks) * PAGE;
            int64_t number = c.page_table[row * c.table_row + block - sink_blocks];
            page = c.pages + number * c.page_page + head * c.page_head;
        } else {
            int64_t at_tail = (block - sink_blocks - packed) * PAGE;
            position = tail_start(c, packed) + at_tail;
            n = std::min<int64_t>(PAGE, length - position);
            for (int64_t t = 0; t < n; t++) {
                int64_t slot = (position + t - c.sink - c.tail_origin[b]) % c.capacity;
                if (slot < 0) slot += c.capacity;
                k_rows[t] = (const char *)c.tail_k + (row * c.tk_r + head * c.tk_h + slot * c.tk_t) * size;
                v_rows[t] = (const char *)c.tail_v + (row * c.tv_r + head * c.tv_h + slot * c.tv_t) * size;
            }
        }
        if (position > start + (first_row + R - 1) / group || position + n <= earliest(c, start + first_row / group))
            continue;  // nobody here sees it
        const bool codes = page && c.k.kind != PLAIN;
        if (codes && multiply)
            multiply(codes_of(c.k, page, dim, factors), by_triplet, scores);
        else {
            if (codes)
                tile_of_codes(codes_of(c.k, page, dim, factors), tile);
            else {
                if (page)
                    for (int t = 0; t < PAGE; t++) k_rows[t] = page + t * c.k.bytes;
                tile_of_rows(k_rows, (int)n, dim, page ? (int)c.k.element : (int)c.element, tile);
            }
            all_products<4>(queries, R, dim, tile, PAGE, scores);
        }
        if (page && mean)
            for (int half = 0; half < 2; half++) {
                const float *angle = c.base + ((block - sink_blocks) * 2 + half) * dim;
                const int64_t d2 = dim / 2;
                for (int64_t r = 0; r < R; r++)
                    for (int64_t i = 0; i < d2; i++) {
                        float a = coefficients[r * dim + i], second = coefficients[r * dim + d2 + i];
                        turned[r * dim + i] = a * angle[i] + second * angle[d2 + i];
                        turned[r * dim + d2 + i] = second * angle[i] - a * angle[d2 + i];
                    }
                all_products<2>(turned, R, dim, offsets, 32, biases + half * 32);
            }
        const uint8_t *v_block = page ? page + PAGE * c.k.bytes : nullptr;
        const bool v_codes = page && c.v.kind != PLAIN;
        float v_factors[PAGE];
        for (int64_t r = 0; r < R; r++) {
            const int64_t query = start + (first_row + r) / group;
            const int64_t seen = std::min<int64_t>(n, query - position + 1), from = earliest(c, query) - position;
            float *s = scores + r * PAGE;
            F16 best = splat(-INFINITY);
            for (int v = 0; v < 4; v++) {
                F16 x = load<F16>(s + 16 * v);
                if (codes) x *= load<F16>(factors + 16 * v);
                if (page && mean) x += load<F16>(biases + r * PAGE + 16 * v);
                if (c.cap > 0) x = capped(x, (float)c.cap);
                const I16 lane = lane_numbers() + 16 * v;
                if (16 * v + 16 > seen)
                    x = pick(lane < (int32_t)std::max<int64_t>(seen, 0), x, splat(-INFINITY));
                if (16 * v < from)
                    x = pick(lane < (int32_t)std::min<int64_t>(from, PAGE), splat(-INFINITY), x);
                store(s + 16 * v, x);
                best = pick(x > best, x, best);
            }
            float part[16], top = piece->top[r];
            store(part, best);
            for (int i = 0; i < 16; i++) top = std::max(top, part[i]);
            const float shift = top == -INFINITY ? 0 : top;
            float keep[16];
            store(keep, weight_of(splat(piece->top[r] - shift)));
            F16 sum = {};
            for (int v = 0; v < 4; v++) {
                F16 p = weight_of(load<F16>(s + 16 * v) - shift);
                sum += p;
                store(s + 16 * v, p);
            }
            piece->total[r] = piece->total[r] * keep[0] + total(sum);
            if (top != piece->top[r]) {
                for (int64_t i = 0; i < dim; i += 16)
                    store(sums + r * dim + i, load<F16>(sums + r * dim + i) * keep[0]);
                if (few)
                    for (int64_t i = 0; i < dim * 16; i += 16)
                        store(wide + r * dim * 16 + i, load<F16>(wide + r * dim * 16 + i) * keep[0]);
                if (add) nested[r] = nested[r] * keep[0];
                piece->top[r] = top;
            }
        }
        if (!v_codes) {
            for (int64_t t = 0; t < n; t++) {
                const void *from = page ? v_block + t * c.v.bytes : v_rows[t];
                const int kind = page ? (int)c.v.element : (int)c.element;
                float *to = values + t * dim;
                if (kind == FLOAT32)
                    memcpy(to, from, dim * 4);
                else if (kind == BFLOAT16)
                    for (int64_t i = 0; i < dim; i += 16) store(to + i, of_bf16s((const uint16_t *)from + i));
                else
                    for (int64_t i = 0; i < dim; i++) to[i] = element(from, kind, i);
            }
            add_all_values(scores, R, (int)n, values, dim, sums);
            continue;
        }
        const Codes packed_v = codes_of(c.v, v_block, dim, v_factors);
        for (int64_t r = 0; r < R; r++)
            for (int v = 0; v < 4; v++) {
                const F16 weights = load<F16>(scores + r * PAGE + 16 * v) * load<F16>(v_factors + 16 * v);
                store(scores + r * PAGE + 16 * v, weights);
                if (add) nested[r] += weights;
            }
        if (add) {
            add(packed_v, scores, wide);
            continue;
        }
        tile_of_codes(packed_v, tile);
        if (few) {
            int64_t r = 0;
            for (; r + 4 <= R; r += 4) add_tile<4>(scores + r * PAGE, tile, dim, wide + r * dim * 16);
            if (R - r == 3) add_tile<3>(scores + r * PAGE, tile, dim, wide + r * dim * 16);
            if (R - r == 2) add_tile<2>(scores + r * PAGE, tile, dim, wide + r * dim * 16);
            if (R - r == 1) add_tile<1>(scores + r * PAGE, tile, dim, wide + r * dim * 16);
        } else {
            for (int first = 0; first < PAGE; first += 16)
                for (int64_t i = 0; i < dim; i += 16) {
                    U16 part[16];
                    for (int j = 0; j < 16; j++) part[j] = load<U16>(tile + (i + j) * PAGE + first);
                    transpose(part);
                    for (int t = 0; t < 16; t++) store(values + (first + t) * dim + i, part[t]);
                }
            add_all_values(scores, R, PAGE, values, dim, sums);
        }
    }
    if (few)
        for (int64_t r = 0; r < R; r++)
            for (int64_t first = 0; first < dim; first += 3) {
                const int64_t axes = std::min<int64_t>(3, dim - first);
                float of[3], *to = sums + r * dim + first;
                for (int64_t axis = 0; axis < axes; axis++) of[axis] = total(load<F16>(wide + (r * dim + first + axis) * 16));
                const float weight = add ? total(nested[r]) : 0;
                for (int64_t axis = 0; axis < axes; axis++)
                    to[axis] += add ? number_of(of, axis, weight) : of[axis];
            }
    piece->sums.assign(sums, sums + R * dim);
}
}  // namespace

// See kernels.attention.attend; head_dim a multiple of 16.
FUNCTION(octo_attend, AttentionCall) {
    const AttentionCall &c = *call;
    const int64_t group = c.heads / c.kv_heads, rows = c.count * group;
    std::vector<Work> work;
    std::vector<int64_t> begins;  // of the pieces of a lane: sequence, KV head, chunk of rows
    for (int64_t b = 0; b < c.batch; b++) {
        const int64_t row = c.rows[b];
        if (row < 0) {
            for (int64_t token = 0; token < c.count; token++)
                for (int64_t h = 0; h < c.heads; h++)
                    for (int64_t i = 0; i < c.dim; i++)
                        put(c.out, (int)c.element, b * c.o_b + token * c.o_c + h * c.o_h + i, 0);
            continue;
        }
        const int64_t start = c.starts[b], length = start + c.count, packed = c.num_packed[b];
        const int64_t sinks = (std::min(c.sink, length) + PAGE - 1) / PAGE;
        const int64_t tail = std::max<int64_t>(0, length - tail_start(c, packed));
        const int64_t blocks = sinks + packed + (tail + PAGE - 1) / PAGE;
        auto block_of = [&](int64_t position) {
            if (position < c.sink) return position / PAGE;
            const int64_t behind = position - tail_start(c, packed);
            return behind < 0 ? sinks + (position - c.sink) / PAGE : sinks + packed + behind / PAGE;
        };
        const int64_t split = rows < ROWS ? SPLIT : std::max<int64_t>(SPLIT, (blocks + MOST_SPLITS - 1) / MOST_SPLITS);
        for (int64_t head = 0; head < c.kv_heads; head++)
            for (int64_t first = 0; first < rows; first += ROWS) {
                begins.push_back((int64_t)work.size());
                for (int64_t block = block_of(earliest(c, start + first / group)); block < blocks; block += split)
                    work.push_back({c, b, head, first, std::min<int64_t>(ROWS, rows - first), block,
                                    std::min(blocks, block + split), row, start, length, packed, sinks, blocks, nullptr});
            }
    }
    begins.push_back((int64_t)work.size());
    std::vector<Piece> pieces(work.size());
    for (size_t i = 0; i < work.size(); i++) work[i].piece = &pieces[i];
    parallel((int64_t)work.size(), (int)c.threads, [&](int64_t n) { work[n].run(); });
    for (size_t lane = 0; lane + 1 < begins.size(); lane++) {
        const Work &w = work[begins[lane]];
        for (int64_t r = 0; r < w.count_rows; r++) {
            const int64_t token = (w.first_row + r) / group, h = w.head * group + (w.first_row + r) % group;
            float top = c.sink_logits ? c.sink_logits[h] : -INFINITY;
            for (int64_t i = begins[lane]; i < begins[lane + 1]; i++) top = std::max(top, pieces[i].top[r]);
            float whole = c.sink_logits ? std::exp(c.sink_logits[h] - top) : 0;
            std::vector<float> shares;
            for (int64_t i = begins[lane]; i < begins[lane + 1]; i++) {
                shares.push_back(pieces[i].top[r] > -INFINITY ? std::exp(pieces[i].top[r] - top) : 0);
                whole += pieces[i].total[r] * shares.back();
            }
            for (int64_t d = 0; d < c.dim; d++) {
                float sum = 0;
                for (int64_t i = begins[lane]; i < begins[lane + 1]; i++)
                    sum += pieces[i].sums[r * c.dim + d] * shares[i - begins[lane]];
                put(c.out, (int)c.element, w.b * c.o_b + token * c.o_c + h * c.o_h + d, sum / whole);
            }
        }
    }
}
