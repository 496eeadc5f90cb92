// What the CPU kernels share: vectors of 64 bytes (the compiler splits them where registers are shorter), threads.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AVX512BW__) && defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define WIDE_VNNI 1
#endif
#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(WIDE_VNNI) && defined(__linux__)
#define AMX 1
#endif

typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef uint8_t B64 __attribute__((vector_size(64)));

template <class T> static inline T load(const void *from) {
    T found;
    memcpy(&found, from, sizeof(T));
    return found;
}
template <class T> static inline void store(void *to, T value) { memcpy(to, &value, sizeof(T)); }
static inline F16 splat(float x) { return F16{} + x; }
static inline F16 floats(I16 x) { return __builtin_convertvector(x, F16); }
static inline float total(F16 x) {  // always in the same order
#if defined(__AVX512F__)
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)x),
                                _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)x, 1)));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
    float part[16];
    store(part, x);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
#endif
}
static inline F16 exponential(F16 x) {  // of x <= 0, at least of -87
    F16 y = x < -87.0f ? splat(-87.0f) : x;
    F16 n = y * 1.44269504f + 12582912.0f;
    n -= 12582912.0f;
    F16 r = y - n * 0.693359375f - n * -2.12194440e-4f;
    F16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (F16)((I16)p + (__builtin_convertvector(n, I16) << 23));
}
static inline float of_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    return load<float>(&wide);
}
static inline uint16_t to_bf16(float x) {
    uint32_t bits = load<uint32_t>(&x);
    if ((bits & 0x7fffffff) > 0x7f800000) return (bits >> 16) | 64;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static inline float of_half(uint16_t bits) { return (float)load<_Float16>(&bits); }
static inline F16 of_bf16s(const uint16_t *from) {
#ifdef __AVX512F__
    return (F16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
#else
    typedef uint16_t H16 __attribute__((vector_size(32)));
    return (F16)(__builtin_convertvector(load<H16>(from), U16) << 16);
#endif
}

enum Element { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
static inline float element(const void *from, int kind, int64_t at) {
    if (kind == FLOAT32) return ((const float *)from)[at];
    uint16_t bits = ((const uint16_t *)from)[at];
    return kind == BFLOAT16 ? of_bf16(bits) : of_half(bits);
}
static inline void put(void *to, int kind, int64_t at, float x) {
    if (kind == FLOAT32)
        ((float *)to)[at] = x;
    else if (kind == BFLOAT16)
        ((uint16_t *)to)[at] = to_bf16(x);
    else {
        _Float16 half = (_Float16)x;
        memcpy((uint16_t *)to + at, &half, 2);
    }
}

// Run work(i) for all i < count on up to `threads` threads. What belongs to an i does not depend on their number.
void parallel(int64_t count, int threads, const std::function<void(int64_t)> &work);
// Aligned memory of this thread, kept; `slot` tells those in use at once apart.
char *scratch(int slot, size_t bytes);
bool amx_allowed();
