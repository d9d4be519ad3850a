/* Vectors of VL fp32 lanes, as wide as the registers of the CPU, written with the vector
 * extensions of the compiler. Operations without such an extension (expand, compress, the
 * bf16 dot product) use an intrinsic where the CPU has one, and plain C elsewhere. */
#ifndef SLOPE_VECTORS_H
#define SLOPE_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX__)
#define VL 8
#else
#define VL 4 /* NEON, SSE */
#endif

typedef float vf __attribute__((vector_size(4 * VL)));
typedef float vf_any __attribute__((vector_size(4 * VL), aligned(1), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));
typedef uint16_t vh_any __attribute__((vector_size(2 * VL), aligned(1), may_alias));

#define INLINE static inline __attribute__((always_inline))

/* Codes of dtypes. kernels/cpu/__init__.py has the same codes. */
enum { F32 = 0, BF16 = 1, F16 = 2 };

/* Forces a pointer into one register. Without it, the compiler keeps several sums of it. */
#define OPAQUE(pointer) __asm__("" : "+r"(pointer))

INLINE long element_size(int dtype) { return dtype == F32 ? 4 : 2; }
INLINE const void *at(const void *p, long i, int dtype) {
    return (const char *)p + i * element_size(dtype);
}
INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long ceil_div(long a, long b) { return (a + b - 1) / b; }
INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf zero(void) { return (vf){0}; }

/* --- 16-bit floats ------------------------------------------------------------------- */

INLINE vu choose(vi where, vu a, vu b) { return ((vu)where & a) | (~(vu)where & b); }

INLINE vf from_bf16(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }

INLINE vh to_bf16(vf x) { /* to nearest, ties to even */
    vu u = (vu)x;
    vu rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    vu quiet = u >> 16 | 0x40;
    return __builtin_convertvector(choose(x == x, rounded, quiet), vh);
}

INLINE vf from_f16(vh h) {
    vu u = __builtin_convertvector(h, vu);
    vu sign = (u & 0x8000) << 16, rest = (u & 0x7fff) << 13;
    vf scaled = (vf)rest * 0x1p112f; /* moves the exponent's bias, denormals too */
    vu special = rest | 0xffu << 23; /* inf and NaN */
    return (vf)(sign | choose((vi)(rest >= (vu)(0x7c00u << 13 | (vu){0})), special, (vu)scaled));
}

INLINE vh to_f16(vf x) { /* to nearest, ties to even */
    vu u = (vu)x, sign = u & 0x80000000u, rest = u ^ sign;
    vf magnitude = (vf)rest;
    vu normal = (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13;
    vu denormal = (vu)(magnitude + 0.5f) - 0x3f000000u; /* the adder does the rounding */
    vu big = choose(magnitude == magnitude, (vu){0} + 0x7c00u, (vu){0} + 0x7e00u);
    vu h = choose((vi)(rest < ((vu){0} + (113u << 23))), denormal, normal);
    h = choose((vi)(rest >= ((vu){0} + (143u << 23))), big, h);
    return __builtin_convertvector(h | sign >> 16, vh);
}

/* --- loads and stores of VL elements, or fewer, of any dtype ------------------------- */

INLINE vf load(const void *p, int dtype) {
    if (dtype == F32) return *(const vf_any *)p;
    vh h = *(const vh_any *)p;
    return dtype == BF16 ? from_bf16(h) : from_f16(h);
}

INLINE void store(void *p, vf x, int dtype) {
    if (dtype == F32)
        *(vf_any *)p = x;
    else
        *(vh_any *)p = dtype == BF16 ? to_bf16(x) : to_f16(x);
}

/* The first `count` elements (at most VL), then zeros. Reads no other memory. */
INLINE vf load_part(const void *p, long count, int dtype) {
    if (count >= VL) return load(p, dtype);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    uint32_t mask = count > 0 ? (1u << count) - 1 : 0;
    if (dtype == F32) return (vf)_mm512_maskz_loadu_ps(mask, p);
    vh h = (vh)_mm256_maskz_loadu_epi16(mask, p);
    return dtype == BF16 ? from_bf16(h) : from_f16(h);
#endif
    char part[4 * VL] = {0};
    if (count > 0) memcpy(part, p, count * element_size(dtype));
    return load(part, dtype);
}

INLINE void store_part(void *p, vf x, long count, int dtype) {
    if (count >= VL) {
        store(p, x, dtype);
    } else if (count > 0) {
        char part[4 * VL];
        store(part, x, dtype);
        memcpy(p, part, count * element_size(dtype));
    }
}

INLINE float load_one(const void *p, int dtype) { return load_part(p, 1, dtype)[0]; }

/* `count` elements as fp32; `to` has room for a whole number of vectors. */
INLINE void widen(float *to, const void *from, long count, int dtype) {
    for (long i = 0; i < count; i += VL)
        *(vf_any *)(to + i) = load_part(at(from, i, dtype), count - i, dtype);
}

/* --- expand and compress ------------------------------------------------------------- */

#if defined(__AVX512F__)
/* Zeros for an expand to write into. With zeros of its own choice (maskz), the compiler leaves the
 * last contents of the register there, and some CPUs (Zen 5) wait for them. */
INLINE vf fresh_zero(void) {
    vf x = zero();
    __asm__("" : "+v"(x));
    return x;
}
#endif

/* The next values of a row at the set bits of a VL-bit mask, and zeros elsewhere. Reads no more
 * values than there are set bits. */
INLINE vf expand_f32(const float *values, uint32_t bits) {
#if defined(__AVX512F__)
    return (vf)_mm512_mask_expandloadu_ps((__m512)fresh_zero(), (__mmask16)bits, values);
#else
    vf x = zero();
    for (; bits; bits &= bits - 1) x[__builtin_ctz(bits)] = *values++;
    return x;
#endif
}

/* Stores the lanes of x at the set bits, one after the other. Writes VL floats. */
INLINE void compress_f32(float *to, vf x, uint32_t bits) {
#if defined(__AVX512F__)
    *(vf_any *)to = (vf)_mm512_maskz_compress_ps((__mmask16)bits, (__m512)x);
#else
    float lanes[VL];
    memcpy(lanes, &x, sizeof x);
    for (; bits; bits &= bits - 1) *to++ = lanes[__builtin_ctz(bits)];
#endif
}

/* --- transposing a square of VL vectors ---------------------------------------------- */

#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#if defined(__clang__)
#undef SHUFFLE
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif

#if VL == 16
#define LOW1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define HIGH1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define LOW2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define LOW4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define HIGH4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define LOW8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#elif VL == 8
#define LOW1 0, 8, 2, 10, 4, 12, 6, 14
#define HIGH1 1, 9, 3, 11, 5, 13, 7, 15
#define LOW2 0, 1, 8, 9, 4, 5, 12, 13
#define HIGH2 2, 3, 10, 11, 6, 7, 14, 15
#define LOW4 0, 1, 2, 3, 8, 9, 10, 11
#define HIGH4 4, 5, 6, 7, 12, 13, 14, 15
#else
#define LOW1 0, 4, 2, 6
#define HIGH1 1, 5, 3, 7
#define LOW2 0, 1, 4, 5
#define HIGH2 2, 3, 6, 7
#endif

/* One round: exchanges the off-diagonal S x S blocks of each 2S x 2S block. */
#define TRANSPOSE_ROUND(v, S, LOW, HIGH)              \
    _Pragma("GCC unroll 16") for (int i = 0; i < VL; i++) { \
        if (i & S) continue;                          \
        vf a = v[i], b = v[i + S];                    \
        v[i] = SHUFFLE(a, b, LOW);                    \
        v[i + S] = SHUFFLE(a, b, HIGH);               \
    }

INLINE void transpose(vf v[VL]) {
    TRANSPOSE_ROUND(v, 1, LOW1, HIGH1)
    TRANSPOSE_ROUND(v, 2, LOW2, HIGH2)
#if VL >= 8
    TRANSPOSE_ROUND(v, 4, LOW4, HIGH4)
#endif
#if VL >= 16
    TRANSPOSE_ROUND(v, 8, LOW8, HIGH8)
#endif
}

/* Lane i of the result is the sum of the lanes of v[i]. The order of the additions is fixed.
 * The rounds are those of a transpose, with an addition in the place of each pair of shuffles. */
#define SUM_ROUND(v, S, LOW, HIGH)                    \
    _Pragma("GCC unroll 16") for (int i = 0; i < VL; i += 2 * S) \
        v[i] = SHUFFLE(v[i], v[i + S], LOW) + SHUFFLE(v[i], v[i + S], HIGH);

INLINE vf sums(vf v[VL]) {
    SUM_ROUND(v, 1, LOW1, HIGH1)
    SUM_ROUND(v, 2, LOW2, HIGH2)
#if VL >= 8
    SUM_ROUND(v, 4, LOW4, HIGH4)
#endif
#if VL >= 16
    SUM_ROUND(v, 8, LOW8, HIGH8)
#endif
    return v[0];
}

#endif
