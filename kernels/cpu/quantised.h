/* Quantised weights: their format (kernels/quantised.py), and the expansion of their codes. */
#ifndef SLOPE_QUANTISED_H
#define SLOPE_QUANTISED_H

#include "masks.h"

/* A value is its code times the scale of its group. */
typedef struct {
    const uint8_t *codes; /* (d_out, row_bytes): int8, or two int4 a byte, the first one low */
    const uint16_t *scales; /* bf16 (d_out, groups) */
    mask_t mask;
    int bits, group; /* group: kept values of a row that share a scale; a power of two, 32 or more */
    long row_bytes, groups;
} quantised_t;

INLINE quantised_t quantised_of(const void *codes, const void *scales, mask_t mask, int bits, int group) {
    long kept = mask.columns * mask.n / mask.m;
    return (quantised_t){codes, scales, mask, bits, group, ceil_div(kept * bits, 8), ceil_div(kept, group)};
}

/* Where the codes and the scales of a row are. */
typedef struct {
    const uint8_t *codes, *end; /* end: of the codes of all rows */
    const uint16_t *scales;
} row_t;

INLINE row_t row_of(const quantised_t *w, long row) {
    const uint8_t *end = w->codes + w->mask.rows * w->row_bytes;
    return (row_t){w->codes + row * w->row_bytes, end, w->scales + row * w->groups};
}

INLINE float scale_of(const uint16_t *scale) {
    uint32_t bits = (uint32_t)*scale << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

/* --- int8 columns -------------------------------------------------------------------- */

#define BYTES (4 * VL)    /* in a register */
#define PARTS (64 / BYTES) /* registers for the columns of a mask word */

typedef int16_t vs __attribute__((vector_size(BYTES)));
typedef uint64_t vq __attribute__((vector_size(BYTES)));
typedef int16_t vs_any __attribute__((vector_size(BYTES), aligned(1), may_alias));

/* The codes of `row` from its pointer on, as bytes at the `count` set bits of `word`, with zeros
 * elsewhere. int4 codes are in the high half of their byte, which is 16 times the code. The bytes
 * of two columns make a lane. Reads only these codes. */
INLINE void expand_codes(vs columns[PARTS], const row_t *row, const int bits, uint64_t word, int count) {
    const uint8_t *from = row->codes;
#if defined(__AVX512VBMI2__) && defined(__AVX512VBMI__)
    if (bits == 8) {
        columns[0] = (vs)_mm512_mask_expandloadu_epi8((__m512i)fresh_zero(), word, from);
    } else {
        __mmask32 bytes = (__mmask32)low_bits((count + 1) / 2);
        /* Two codes in 16 bits each; for each pair, the bits from four before it, and from its start. */
        __m512i pairs = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(bytes, from));
        __m512i starts = _mm512_set1_epi64(0x302c201c100c003cull);
        pairs = _mm512_and_si512(_mm512_multishift_epi64_epi8(starts, pairs), _mm512_set1_epi8(-16));
        columns[0] = (vs)_mm512_mask_expand_epi8((__m512i)fresh_zero(), word, pairs);
    }
#else
    (void)count;
    uint64_t eights[8];
#if defined(__BMI2__) && defined(__x86_64__)
    uint8_t last[72]; /* eight bytes are read where there may be one */
    if (row->end - from < 72) {
        memset(last, 0, sizeof last);
        from = memcpy(last, from, row->end - from);
    }
    int taken = 0;
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) {
        uint64_t lanes = _pdep_u64(word >> 8 * k, 0x0101010101010101ull), next;
        memcpy(&next, from + taken * bits / 8, 8);
        if (bits == 4) next >>= taken % 2 * 4;
        eights[k] = _pdep_u64(next, lanes * (bits == 8 ? 0xff : 0xf0));
        taken += __builtin_popcountll(lanes);
    }
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) { /* in registers: a load right after narrower stores is slow */
        vq part = {0};
#pragma GCC unroll 8
        for (int k = 0; k < VL / 2; k++) part[k] = eights[p * VL / 2 + k];
        columns[p] = (vs)part;
    }
#else
    uint8_t *to = memset(eights, 0, sizeof eights);
    for (int taken = 0; word; word &= word - 1, taken++)
        to[__builtin_ctzll(word)] = bits == 8 ? from[taken] : from[taken / 2] >> taken % 2 * 4 << 4;
    memcpy(columns, eights, sizeof eights);
#endif
#endif
}

INLINE vs even_columns(vs bytes) { return bytes << 8 >> 8; }
INLINE vs odd_columns(vs bytes) { return bytes >> 8; }

/* sum + a * b: each lane adds the two products of its pair. */
INLINE vi dot_i16(vi sum, vs a, vs b) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return sum + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return sum + ((vi)a << 16 >> 16) * ((vi)b << 16 >> 16) + ((vi)a >> 16) * ((vi)b >> 16);
#endif
}

/* A mask word is split where a group ends: the lowest `count` set bits of it. */
INLINE uint64_t lowest_bits(uint64_t word, int count) { return deposit(low_bits(count), word); }

#endif
