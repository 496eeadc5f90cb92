// Instructions of AVX-512, VNNI and AMX as loops over a vector's numbers, so that a machine with AVX2 alone runs the CPU
// kernels' code for them: included before the sources, with EMULATED as 1 AVX-512, 2 with VNNI, 3 with AMX too, 4 AVX2
// with VNNI. What the compiler makes of the real instructions is not tested so. Misuse of tiles and of addresses aborts.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace emulated {
template <class T> struct Array {
    T v[64 / sizeof(T)];
    T &operator[](int i) { return v[i]; }
    const T &operator[](int i) const { return v[i]; }
};
template <class T, class V> static inline Array<T> of(V x) {
    static_assert(sizeof(V) == 64, "a vector of 64 bytes");
    Array<T> found;
    memcpy(&found, &x, 64);
    return found;
}
template <class V, class T> static inline V as(const Array<T> &x) {
    V found;
    memcpy(&found, &x, 64);
    return found;
}
static inline void must(bool holds) {
    if (!holds) abort();
}
// A function of each number of a vector.
template <class T, class V, class F> static inline V each(V x, F f) {
    Array<T> found = of<T>(x);
    for (T &one : found.v) one = (T)f(one);
    return as<V>(found);
}

static inline __m512i loadu(const void *from) {
    __m512i found;
    memcpy(&found, from, 64);
    return found;
}
static inline void store(void *to, __m512i x) {
    must((uintptr_t)to % 64 == 0);
    memcpy(to, &x, 64);
}
static inline __m512i broadcast(__m128i x) {
    __m512i found;
    for (int i = 0; i < 4; i++) memcpy((char *)&found + 16 * i, &x, 16);
    return found;
}
static inline __m512i shuffle_bytes(__m512i table, __m512i index) {
    const auto x = of<uint8_t>(table);
    auto n = of<uint8_t>(index);
    for (int i = 0; i < 64; i++) n[i] = n[i] & 128 ? 0 : x[i / 16 * 16 + (n[i] & 15)];
    return as<__m512i>(n);
}
static inline __m256 low_half(__m512 x) {
    __m256 found;
    memcpy(&found, &x, 32);
    return found;
}
static inline __m256d half(__m512d x, int n) {
    __m256d found;
    memcpy(&found, (char *)&x + 32 * n, 32);
    return found;
}
static inline __m512i widened(__m256i x) {
    uint16_t in[16];
    memcpy(in, &x, 32);
    Array<uint32_t> found;
    for (int i = 0; i < 16; i++) found[i] = in[i];
    return as<__m512i>(found);
}
static inline __m512 of_halves(__m256i x) {
    uint16_t in[16];
    memcpy(in, &x, 32);
    Array<float> found;
    for (int i = 0; i < 16; i++) found[i] = _cvtsh_ss(in[i]);
    return as<__m512>(found);
}
static inline __m512i dot_bytes(__m512i sum, __m512i u, __m512i w) {
    auto found = of<int32_t>(sum);
    const auto x = of<uint8_t>(u);
    const auto y = of<int8_t>(w);
    for (int i = 0; i < 64; i++) found[i / 4] += (int)x[i] * y[i];
    return as<__m512i>(found);
}
static inline __m512i dot_words(__m512i sum, __m512i u, __m512i w) {
    auto found = of<int32_t>(sum);
    const auto x = of<int16_t>(u), y = of<int16_t>(w);
    for (int i = 0; i < 32; i++) found[i / 2] = (int32_t)((uint32_t)found[i / 2] + (uint32_t)((int)x[i] * y[i]));
    return as<__m512i>(found);
}
template <__m512i (*F)(__m512i, __m512i, __m512i)> static inline __m256i in_half(__m256i sum, __m256i u, __m256i w) {
    __m512i x{}, y{}, z{};
    memcpy(&x, &sum, 32), memcpy(&y, &u, 32), memcpy(&z, &w, 32);
    x = F(x, y, z);
    memcpy(&sum, &x, 32);
    return sum;
}
static inline __m512i gather(__m512i index, const void *from, int step) {
    auto n = of<int32_t>(index);
    for (int32_t &one : n.v) memcpy(&one, (const char *)from + (int64_t)one * step, 4);
    return as<__m512i>(n);
}
static inline __m512i some_bytes(uint64_t mask, const void *from) {
    Array<uint8_t> found = {};
    for (int i = 0; i < 64; i++)
        if (mask >> i & 1) found[i] = ((const uint8_t *)from)[i];
    return as<__m512i>(found);
}
static inline __m128i some_words(uint8_t mask, const void *from) {
    uint16_t in[8] = {};
    for (int i = 0; i < 8; i++)
        if (mask >> i & 1) memcpy(in + i, (const uint16_t *)from + i, 2);
    __m128i found;
    memcpy(&found, in, 16);
    return found;
}
static inline __m512i least(__m512i x, __m512i y) {
    auto p = of<int32_t>(x);
    const auto q = of<int32_t>(y);
    for (int i = 0; i < 16; i++)
        if (q[i] < p[i]) p[i] = q[i];
    return as<__m512i>(p);
}
static inline __m512i from_two(__m512i x, __m512i index, __m512i y) {
    const auto p = of<int32_t>(x), q = of<int32_t>(y);
    auto n = of<int32_t>(index);
    for (int32_t &one : n.v) one = (one & 16 ? q : p)[one & 15];
    return as<__m512i>(n);
}
static inline __m512 permuted(__m512i index, __m512 x) {
    const auto n = of<int32_t>(index);
    const auto p = of<float>(x);
    Array<float> found;
    for (int i = 0; i < 16; i++) found[i] = p[n[i] & 15];
    return as<__m512>(found);
}
static inline __m512 to_integers(__m512 x, int how) {
    must(how == 8);
    return each<float>(x, [](float one) { return std::nearbyint(one); });
}
static inline __m512i words_left(__m512i x, int by) {
    return each<uint16_t>(x, [by](uint16_t one) { return one << by; });
}
static inline __m512i words_right(__m512i x, int by) {
    return each<int16_t>(x, [by](int16_t one) { return one >> by; });
}
static inline __m512i left(__m512i x, int by) {
    return each<uint32_t>(x, [by](uint32_t one) { return one << by; });
}

// Tiles of this thread, with the sizes that were configured.
struct Tiles {
    bool on;
    uint16_t bytes[16];
    uint8_t rows[16], data[8][16][64];
};
static thread_local Tiles tiles;
static inline void configure(const void *from) {
    const uint8_t *given = (const uint8_t *)from;
    must(given[0] == 1 && given[1] == 0);
    for (int i = 2; i < 16; i++) must(!given[i]);
    memset(&tiles, 0, sizeof tiles);
    memcpy(tiles.bytes, given + 16, 32), memcpy(tiles.rows, given + 48, 16);
    for (int i = 0; i < 16; i++) must(i < 8 ? tiles.bytes[i] <= 64 && tiles.rows[i] <= 16 : !tiles.bytes[i] && !tiles.rows[i]);
    tiles.on = true;
}
static inline void zero(int tile) {
    must(tiles.on && tiles.rows[tile]);
    memset(tiles.data[tile], 0, 1024);
}
static inline void load_tile(int tile, const void *from, int64_t stride) {
    zero(tile);
    for (int r = 0; r < tiles.rows[tile]; r++)
        memcpy(tiles.data[tile][r], (const char *)from + r * stride, tiles.bytes[tile]);
}
static inline void store_tile(int tile, void *to, int64_t stride) {
    must(tiles.on);
    for (int r = 0; r < tiles.rows[tile]; r++) memcpy((char *)to + r * stride, tiles.data[tile][r], tiles.bytes[tile]);
}
static inline void multiply(int to, int x, int y) {
    must(tiles.on && tiles.bytes[to] == tiles.bytes[y] && tiles.rows[to] == tiles.rows[x]);
    must(tiles.bytes[x] / 4 == tiles.rows[y]);
    for (int m = 0; m < tiles.rows[to]; m++)
        for (int k = 0; k < tiles.bytes[x] / 4; k++)
            for (int n = 0; n < tiles.bytes[to] / 4; n++) {
                int32_t sum;
                memcpy(&sum, tiles.data[to][m] + 4 * n, 4);
                for (int i = 0; i < 4; i++)
                    sum += (int)(int8_t)tiles.data[x][m][4 * k + i] * (int8_t)tiles.data[y][k][4 * n + i];
                memcpy(tiles.data[to][m] + 4 * n, &sum, 4);
            }
}
}  // namespace emulated

#undef _mm512_extractf64x4_pd
#undef _mm512_i32gather_epi32
#undef _mm512_roundscale_ps
#undef _mm512_slli_epi16
#undef _mm512_srai_epi16
#undef _mm512_slli_epi32
#undef _tile_loadconfig
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_release
#define _mm512_loadu_si512 emulated::loadu
#define _mm512_store_si512 emulated::store
#define _mm512_broadcast_i32x4 emulated::broadcast
#define _mm512_shuffle_epi8 emulated::shuffle_bytes
#define _mm512_castps512_ps256 emulated::low_half
#define _mm512_extractf64x4_pd emulated::half
#define _mm512_cvtepu16_epi32 emulated::widened
#define _mm512_cvtph_ps emulated::of_halves
#define _mm512_dpbusd_epi32 emulated::dot_bytes
#define _mm512_dpwssd_epi32 emulated::dot_words
#define _mm512_madd_epi16(u, w) emulated::dot_words(__m512i{}, u, w)
#define _mm512_i32gather_epi32 emulated::gather
#define _mm512_maskz_loadu_epi8 emulated::some_bytes
#define _mm_maskz_loadu_epi16 emulated::some_words
#define _mm512_min_epi32 emulated::least
#define _mm512_permutex2var_epi32 emulated::from_two
#define _mm512_permutexvar_ps emulated::permuted
#define _mm512_roundscale_ps emulated::to_integers
#define _mm512_slli_epi16 emulated::words_left
#define _mm512_srai_epi16 emulated::words_right
#define _mm512_slli_epi32 emulated::left
#define _mm256_dpbusd_avx_epi32 emulated::in_half<emulated::dot_bytes>
#define _mm256_dpwssd_avx_epi32 emulated::in_half<emulated::dot_words>
#define _tile_loadconfig emulated::configure
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load_tile
#define _tile_stored emulated::store_tile
#define _tile_dpbssd emulated::multiply
#define _tile_release() (emulated::tiles.on = false)
#define syscall(...) 0                 // the system allows tiles
#define IN_REGISTER(x) (void)(x)       // of a vector longer than the machine's

#if EMULATED >= 1 && EMULATED <= 3
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#endif
#if EMULATED == 2 || EMULATED == 3
#define __AVX512VNNI__ 1
#endif
#if EMULATED == 3
#define __AMX_INT8__ 1
#define __AMX_BF16__ 1
#endif
#if EMULATED == 4
#define __AVXVNNI__ 1
#endif
