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

// Bytes of a register. A vector of 64 bytes is one, or two or four of them: of a longer vector than its registers the
// compiler would make memory. AVX-512 without bytes and words (Xeon Phi) is used as AVX2.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define REGISTER 64
#elif defined(__AVX2__)
#define REGISTER 32
#else
#define REGISTER 16
#endif

#define INLINE inline __attribute__((always_inline))

// Keeps a vector in a register, where the compiler would rather read memory again.
#ifndef IN_REGISTER
#define IN_REGISTER(x) asm("" : "+v"(x))
#endif

template <class E, int BYTES> struct Register {
    typedef E type __attribute__((vector_size(BYTES), may_alias));
};
template <class E, int BYTES = REGISTER> using Lanes = typename Register<E, BYTES>::type;

#if REGISTER == 64
typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef int16_t S32 __attribute__((vector_size(64)));
typedef uint8_t B64 __attribute__((vector_size(64)));
template <class M, class V> static inline V pick(M mask, V yes, V no) { return mask ? yes : no; }
static inline F16 floats(I16 x) { return __builtin_convertvector(x, F16); }
static inline I16 integers(F16 x) { return __builtin_convertvector(x, I16); }
#else
template <class E, int BYTES> struct Wide {
    typedef Wide<E, BYTES / 2> Half;
    Half low, high;
    Wide() = default;
    Wide(Half low, Half high) : low(low), high(high) {}
    explicit Wide(E x) : low(x), high(x) {}
    template <class F> explicit Wide(const Wide<F, BYTES> &x) : low(x.low), high(x.high) {}  // the same bits
    E operator[](int i) const { return ((const Lanes<E> *)this)[i * sizeof(E) / REGISTER][i % (REGISTER / sizeof(E))]; }
};
template <class E> struct Wide<E, REGISTER> {
    Lanes<E> lanes;
    Wide() = default;
    Wide(Lanes<E> lanes) : lanes(lanes) {}
    explicit Wide(E x) : lanes(x - Lanes<E>{}) {}  // 0 + x is not always x, so it would be computed
    template <class F> explicit Wide(const Wide<F, REGISTER> &x) : lanes((Lanes<E>)x.lanes) {}
};
template <class E> struct Same {
    typedef E type;
};
#define OPERATOR(op)                                                                                                \
    template <class E, int B> static inline Wide<E, B> operator op(const Wide<E, B> &x, const Wide<E, B> &y) {      \
        if constexpr (B == REGISTER)                                                                                \
            return Wide<E, B>(x.lanes op y.lanes);                                                                  \
        else                                                                                                        \
            return {x.low op y.low, x.high op y.high};                                                              \
    }                                                                                                               \
    template <class E, int B> static inline Wide<E, B> operator op(const Wide<E, B> &x, typename Same<E>::type y) { \
        return x op Wide<E, B>(y);                                                                                  \
    }                                                                                                               \
    template <class E, int B> static inline Wide<E, B> operator op(typename Same<E>::type x, const Wide<E, B> &y) { \
        return Wide<E, B>(x) op y;                                                                                  \
    }                                                                                                               \
    template <class E, int B, class T> static inline Wide<E, B> &operator op##=(Wide<E, B> &x, const T &y) {        \
        return x = x op y;                                                                                          \
    }
OPERATOR(+) OPERATOR(-) OPERATOR(*) OPERATOR(/) OPERATOR(&) OPERATOR(|) OPERATOR(^)
#undef OPERATOR
#define SHIFT(op)                                                                              \
    template <class E, int B> static inline Wide<E, B> operator op(const Wide<E, B> &x, int by) { \
        if constexpr (B == REGISTER)                                                           \
            return Wide<E, B>(x.lanes op by);                                                  \
        else                                                                                   \
            return {x.low op by, x.high op by};                                                \
    }
SHIFT(<<) SHIFT(>>)
#undef SHIFT
template <class E, int B> static inline Wide<E, B> operator-(const Wide<E, B> &x) {
    if constexpr (B == REGISTER)
        return Wide<E, B>(-x.lanes);
    else
        return {-x.low, -x.high};
}
// All bits of a lane where it holds. Of lanes of 32 bits.
#define COMPARISON(op)                                                                                       \
    template <class E, int B> static inline Wide<int32_t, B> operator op(const Wide<E, B> &x, const Wide<E, B> &y) { \
        if constexpr (B == REGISTER)                                                                         \
            return Wide<int32_t, B>((Lanes<int32_t>)(x.lanes op y.lanes));                                   \
        else                                                                                                 \
            return {x.low op y.low, x.high op y.high};                                                       \
    }                                                                                                        \
    template <class E, int B>                                                                                \
    static inline Wide<int32_t, B> operator op(const Wide<E, B> &x, typename Same<E>::type y) {              \
        return x op Wide<E, B>(y);                                                                           \
    }
COMPARISON(<) COMPARISON(>)
#undef COMPARISON
template <class E, int B> static inline Wide<E, B> pick(const Wide<int32_t, B> &mask, const Wide<E, B> &yes, const Wide<E, B> &no) {
    if constexpr (B == REGISTER)
        return Wide<E, B>(mask.lanes ? yes.lanes : no.lanes);
    else
        return {pick(mask.low, yes.low, no.low), pick(mask.high, yes.high, no.high)};
}
template <class To, class E, int B> static inline Wide<To, B> converted(const Wide<E, B> &x) {
    if constexpr (B == REGISTER)
        return Wide<To, B>(__builtin_convertvector(x.lanes, Lanes<To>));
    else
        return {converted<To>(x.low), converted<To>(x.high)};
}
typedef Wide<float, 64> F16;
typedef Wide<int32_t, 64> I16;
typedef Wide<uint32_t, 64> U16;
typedef Wide<int16_t, 64> S32;
typedef Wide<uint8_t, 64> B64;
static inline F16 floats(const I16 &x) { return converted<float>(x); }
static inline I16 integers(const F16 &x) { return converted<int32_t>(x); }
#endif

// The registers that a vector is made of.
constexpr int PARTS = 64 / REGISTER;
#if REGISTER == 64
static INLINE Lanes<float> part(const F16 &x, int) { return x; }
#elif REGISTER == 32
static INLINE Lanes<float> part(const F16 &x, int n) { return n ? x.high.lanes : x.low.lanes; }
#else
static INLINE Lanes<float> part(const F16 &x, int n) {
    const F16::Half &half = n < 2 ? x.low : x.high;
    return n % 2 ? half.high.lanes : half.low.lanes;
}
#endif

template <class T> struct Memory {
    static T load(const void *from) {
        T found;
        memcpy(&found, from, sizeof(T));
        return found;
    }
    static void store(void *to, const T &value) { memcpy(to, &value, sizeof(T)); }
};
#if REGISTER != 64
// By registers: the compiler would copy a structure in smaller pieces, for which reading it whole has to wait.
template <class E, int BYTES> struct Memory<Wide<E, BYTES>> {
    static Wide<E, BYTES> load(const void *from) {
        if constexpr (BYTES == REGISTER)
            return Wide<E, BYTES>(Memory<Lanes<E>>::load(from));
        else
            return {Memory<Wide<E, BYTES / 2>>::load(from),
                    Memory<Wide<E, BYTES / 2>>::load((const char *)from + BYTES / 2)};
    }
    static void store(void *to, const Wide<E, BYTES> &value) {
        if constexpr (BYTES == REGISTER)
            Memory<Lanes<E>>::store(to, value.lanes);
        else
            Memory<Wide<E, BYTES / 2>>::store(to, value.low),
                Memory<Wide<E, BYTES / 2>>::store((char *)to + BYTES / 2, value.high);
    }
};
#endif
template <class T> static inline T load(const void *from) { return Memory<T>::load(from); }
template <class T> static inline void store(void *to, const T &value) { Memory<T>::store(to, value); }
static inline F16 splat(float x) { return x - F16{}; }
static inline I16 lane_numbers() {
    static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load<I16>(numbers);
}
static inline float total(const F16 &x) {  // always in the same order
#if defined(__AVX2__)
#if REGISTER == 64
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)x),
                                _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)x, 1)));
#else
    __m256 half = _mm256_add_ps((__m256)x.low.lanes, (__m256)x.high.lanes);
#endif
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
    F16 y = pick(x < -87.0f, splat(-87.0f), x);
    F16 n = y * 1.44269504f + 12582912.0f;
    n -= 12582912.0f;
    F16 r = y - n * 0.693359375f - n * -2.12194440e-4f;
    F16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (F16)((I16)p + (integers(n) << 23));
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
#if defined(__aarch64__)
typedef __fp16 Half;  // _Float16 is C++ only from GCC 13 on
#elif !defined(__F16C__)
typedef _Float16 Half;
#endif
static inline float of_half(uint16_t bits) {
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#else
    return (float)load<Half>(&bits);
#endif
}
static inline F16 of_bf16s(const uint16_t *from) {
#if REGISTER == 64
    return (F16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
#else
    typedef Lanes<uint16_t, REGISTER / 2> Half;
    constexpr int each = REGISTER / 4;
    Lanes<uint32_t> wide[16 / each];
    for (int i = 0; i < 16 / each; i++)
        wide[i] = __builtin_convertvector(load<Half>(from + i * each), Lanes<uint32_t>) << 16;
    return load<F16>(wide);
#endif
}

// acc + the products of the two 16-bit halves of each lane of x with those of y.
static inline I16 pairs(const I16 &acc, const I16 &x, const I16 &y) {
#if defined(WIDE_VNNI)
    return (I16)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)x, (__m512i)y);
#elif defined(__AVX512BW__)
    return acc + (I16)_mm512_madd_epi16((__m512i)x, (__m512i)y);
#elif REGISTER == 32
    return acc + I16((Lanes<int32_t>)_mm256_madd_epi16((__m256i)x.low.lanes, (__m256i)y.low.lanes),
                     (Lanes<int32_t>)_mm256_madd_epi16((__m256i)x.high.lanes, (__m256i)y.high.lanes));
#else
    return acc + ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
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
#if defined(__F16C__)
        ((uint16_t *)to)[at] = _cvtss_sh(x, 0);
#else
        Half half = (Half)x;
        memcpy((uint16_t *)to + at, &half, 2);
#endif
    }
}

// Run work(i) for all i < count on up to `threads` threads. What belongs to an i does not depend on their number.
void parallel(int64_t count, int threads, const std::function<void(int64_t)> &work);
// Aligned memory of this thread, kept; `slot` tells those in use at once apart.
char *scratch(int slot, size_t bytes);
bool amx_allowed();
