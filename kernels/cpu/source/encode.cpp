// Trellis codes of vectors, bit for bit those of kernels/codec/trellis.py (which says what is searched and how ties are
// settled): 16 vectors side by side, one in a lane.
//
// The cost of a table entry p (odd numbers of half steps) for a triplet x (eighths of a step) is 2 |p|^2 - p x, an
// integer. With the bits of the code below it, it is a key: the least key of a pair of states has both.
#include "calls.h"
#include "common.h"
#include <algorithm>
#include <vector>

namespace {
constexpr int LANES = 16, LIMIT = 1020;
constexpr double SMALLEST = 0x1p-60;

static inline I16 least(const I16 &a, const I16 &b) {
#if REGISTER == 64
    return (I16)_mm512_min_epi32((__m512i)a, (__m512i)b);
#else
    return pick(a < b, a, b);
#endif
}

static inline I16 gather(const I16 *table, I16 row) {  // of each lane its own row
    const I16 index = (row << 4) + lane_numbers();
#if REGISTER == 64
    return (I16)_mm512_i32gather_epi32((__m512i)index, table, 4);
#else
    int32_t at[16], found[16];
    store(at, index);
    for (int i = 0; i < 16; i++) found[i] = ((const int32_t *)table)[at[i]];
    return load<I16>(found);
#endif
}

// To the nearest integer. A product may be its argument: adding and subtracting 1.5 * 2^23 would fuse with it.
static inline F16 rounded(F16 x) {
#if REGISTER == 64
    return (F16)_mm512_roundscale_ps((__m512)x, 8);
#else
    float lane[16];
    store(lane, x);
    for (float &one : lane) one = std::nearbyint(one);
    return load<F16>(lane);
#endif
}

struct Entry {
    int32_t constant, xy, z;
};

// Keys of entries whose code has `bits` bits; products fit 16 bits each way: p by 2^most, x by the rest.
struct Keys {
    int bits, of_x;
    std::vector<Entry> entries;

    explicit Keys(int bits) : bits(bits), of_x(std::max(0, bits - 7)) {}
    void add(const int8_t *v, int64_t used, int32_t code) {
        int32_t p[3], square = 0;
        for (int i = 0; i < 3; i++) p[i] = i < used ? 2 * v[i] + 1 : 0, square += p[i] * p[i];
        const int scale = 1 << (bits - of_x);
        auto half = [&](int i) { return (uint32_t)(uint16_t)(int16_t)(-p[i] * scale); };
        entries.push_back({(2 * square) * (1 << bits) + code, (int32_t)(half(0) | half(1) << 16), (int32_t)half(2)});
    }
};

struct Triplet {
    I16 xy, z;  // 16-bit halves
};

static inline I16 key_of(const Entry &e, const Triplet &x) {
    return pairs(pairs(I16{} + e.constant, x.xy, I16{} + e.xy), x.z, I16{} + e.z);
}
static inline I16 best_key(const Entry *first, int64_t count, const Triplet &x) {
    I16 best = key_of(first[0], x);
    for (int64_t i = 1; i < count; i++) best = least(best, key_of(first[i], x));
    return best;
}

struct Search {
    const TrellisCall &c;
    int64_t triplets, chain, states;
    Keys chained, extra, last;

    explicit Search(const TrellisCall &c)
        : c(c), triplets((c.dim + 2) / 3), chain(triplets / c.chains), states(1 << c.state_bits),
          chained((int)(c.stream - c.state_bits)), extra((int)c.stream), last((int)c.stream) {
        const int64_t codes = 1 << chained.bits, entries = 1 << c.stream;
        for (int64_t before = 0; before < states; before++)
            for (int64_t after = 0; after < states; after++)
                for (int64_t high = 0; high < codes; high++)
                    chained.add(c.table + 3 * (before << c.stream | high << c.state_bits | after), 3, (int32_t)high);
        for (int64_t code = 0; code < entries; code++) {
            const int8_t *v = c.table + 3 * ((entries << c.state_bits) + code);
            extra.add(v, 3, (int32_t)code);
            last.add(v, c.dim - 3 * (triplets - 1), (int32_t)code);
        }
    }
    Triplet triplet(const I16 *scaled, int64_t number, const Keys &keys) const {
        const I16 *x = scaled + 3 * number;
        const int by = keys.of_x;
        return {((x[0] << by) & 0xffff) | (x[1] << (16 + by)), (x[2] << by) & 0xffff};
    }
    template <int BITS> void chain_codes(const I16 *scaled, int64_t first, I16 *codes, I16 *work) const;
    void block(int64_t first, int64_t count) const;
};

// Codes of the triplets of a chain. work [chain][2][cells].
template <int BITS> void Search::chain_codes(const I16 *scaled, int64_t first, I16 *codes, I16 *work) const {
    constexpr int S = 1 << BITS, CELLS = S * S;
    const int64_t n = chain, each = 1 << chained.bits;
    I16 *keys = work, *choices = work + n * CELLS;  // choices [chain][start][after]
    I16 reached[CELLS], weights[CELLS];
    for (int64_t s = 0; s < n; s++) {
        const Triplet x = triplet(scaled, first + s, chained);
        for (int cell = 0; cell < CELLS; cell++)
            keys[s * CELLS + cell] = best_key(chained.entries.data() + cell * each, each, x);
    }
    for (int cell = 0; cell < CELLS; cell++) reached[cell] = keys[(n - 1) * CELLS + cell] >> chained.bits << BITS;
    for (int64_t s = n - 2; s >= 0; s--) {
        for (int cell = 0; cell < CELLS; cell++)
            weights[cell] = (keys[s * CELLS + cell] >> chained.bits << BITS) + cell / S;
        for (int start = 0; start < S; start++) {
            I16 found[S];
            for (int after = s ? 0 : start; after < (s ? S : start + 1); after++) {  // in the end a path closes
                I16 best = reached[start * S] + weights[after];
                for (int before = 1; before < S; before++)
                    best = least(best, reached[start * S + before] + weights[before * S + after]);
                found[after] = best;
            }
            for (int after = s ? 0 : start; after < (s ? S : start + 1); after++) {
                choices[s * CELLS + start * S + after] = found[after] & (S - 1);
                reached[start * S + after] = found[after] & -S;
            }
        }
    }
    I16 best = reached[0];
    for (int start = 1; start < S; start++) best = least(best, reached[start * S + start] + start);
    const I16 start = best & (S - 1);
    I16 after = start;
    for (int64_t s = 0; s < n; s++) {
        const I16 before = s + 1 < n ? gather(choices + s * CELLS, start * S + after) : start;
        const I16 key = gather(keys + s * CELLS, before * S + after);
        codes[first + s] = ((key & ((1 << chained.bits) - 1)) << BITS) | after;
        after = before;
    }
}

static uint16_t norm_of(double gain, int shift) {
    const float single = std::min(std::max((float)gain, 0.0f), 65504.0f);
    int32_t bits, number;
    memcpy(&bits, &single, 4);
    if (single < 0x1p-14f)
        number = (int32_t)(single * (float)(1 << (24 - shift)) + 0.5f);
    else
        number = (bits - (112 << 23) + (1 << (12 + shift))) >> (13 + shift);
    return (uint16_t)(std::min(number, (0x7c00 >> shift) - 1) << shift);
}

void Search::block(int64_t first, int64_t count) const {
    const int64_t rows = 3 * triplets, cells = states * states;
    I16 *scaled = (I16 *)scratch(2, (2 * rows + 2 * triplets + 2 * std::max<int64_t>(chain, 1) * cells) * sizeof(I16));
    F16 *y = (F16 *)(scaled + rows);
    I16 *codes = (I16 *)(y + rows), *signs = codes + triplets, *work = signs + triplets;
    memset(y, 0, rows * sizeof(F16));
    for (int64_t t = 0; t < count; t++)
        for (int64_t i = 0; i < c.dim; i++) ((float *)(y + i))[t] = c.y[(first + t) * c.y_stride + i];
    double energy[LANES] = {}, along[LANES] = {};
    float factors[LANES];
    for (int64_t i = 0; i < c.dim; i++)
        for (int t = 0; t < LANES; t++) energy[t] += (double)y[i][t] * (double)y[i][t];
    for (int t = 0; t < LANES; t++) {
        const double norm = std::sqrt(energy[t]);
        factors[t] = norm >= SMALLEST ? (float)(8 * std::sqrt((double)c.dim) / (c.step * norm)) : 0.0f;
    }
    const F16 most = splat(LIMIT), factor = load<F16>(factors);
    for (int64_t i = 0; i < rows; i++) {
        F16 x = rounded(y[i] * factor);
        x = pick(x > most, most, pick(x < -most, -most, x));
        const I16 number = integers(x);
        scaled[i] = c.is_signed ? pick(number < 0, -number, number) : number;
    }
    for (int64_t i = 0; i < triplets; i++)
        signs[i] = c.is_signed ? ((y[3 * i] < 0.0f) & 1) | ((y[3 * i + 1] < 0.0f) & 2) | ((y[3 * i + 2] < 0.0f) & 4) : I16{};
    if (chain)
        for (int64_t one = 0; one < c.chains; one++) {
            if (c.state_bits == 3)
                chain_codes<3>(scaled, one * chain, codes, work);
            else
                chain_codes<1>(scaled, one * chain, codes, work);
        }
    for (int64_t i = c.chains * chain; i < triplets; i++) {
        const Keys &keys = i + 1 < triplets ? extra : last;
        codes[i] = best_key(keys.entries.data(), (int64_t)keys.entries.size(), triplet(scaled, i, keys)) &
                   ((1 << keys.bits) - 1);
    }
    const int64_t mask = states - 1;
    for (int64_t i = 0; i < triplets; i++) {
        const bool has_state = i < c.chains * chain;
        const int64_t before = !has_state ? i : i % chain == chain - 1 ? i - chain + 1 : i + 1;
        for (int t = 0; t < LANES; t++) {
            const int64_t state = has_state ? codes[before][t] & mask : states;
            const int8_t *v = c.table + 3 * (state << c.stream | codes[i][t]);
            for (int64_t axis = 0; axis < 3 && 3 * i + axis < c.dim; axis++) {
                const double word = (2 * v[axis] + 1) * (c.step / 2);
                along[t] += (double)y[3 * i + axis][t] * (signs[i][t] >> axis & 1 ? -word : word);
            }
        }
    }
    for (int64_t t = 0; t < count; t++) {
        uint8_t *to = c.out + (first + t) * c.bytes, *end = to + c.bytes - 2;
        uint64_t held = 0;
        int filled = 0;
        auto put_bits = [&](uint32_t value, int bits) {
            held |= (uint64_t)value << filled;
            for (filled += bits; filled >= 8; filled -= 8, held >>= 8) *to++ = (uint8_t)held;
        };
        for (int64_t i = 0; i < triplets; i++) put_bits(codes[i][t], (int)c.stream);
        for (int64_t i = 0; c.is_signed && i < triplets; i++) put_bits(signs[i][t], 3);
        for (; to < end; held >>= 8) *to++ = (uint8_t)held;
        const bool there = std::sqrt(energy[t]) >= SMALLEST && along[t] > 0;
        const uint16_t norm = norm_of(there ? energy[t] / along[t] : 0, (int)c.norm_shift);
        memcpy(end, &norm, 2);
    }
}
}  // namespace

FUNCTION(octo_encode_trellis, TrellisCall) {
    const Search search(*call);
    parallel((call->vectors + LANES - 1) / LANES, (int)call->threads, [&](int64_t n) {
        search.block(n * LANES, std::min<int64_t>(LANES, call->vectors - n * LANES));
    });
}
