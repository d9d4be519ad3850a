/* Panels: the tokens of an input side by side in memory. One multiply-add on contiguous memory
 * multiplies one kept weight with VL tokens.
 *
 * A panel has T vectors of tokens. Column c of the input takes T vectors from c * T on. Panels
 * of the same input can have different T, so that few lanes are empty. */
#ifndef SLOPE_PANELS_H
#define SLOPE_PANELS_H

#include "vectors.h"

/* A 2-D tensor (rows, columns) whose columns are adjacent in memory. */
typedef struct {
    const void *data;
    long rows, columns, stride; /* stride: elements from row to row */
    int dtype;
} matrix_t;

INLINE const void *element(const matrix_t *a, long row, long column) {
    return at(a->data, row * a->stride + column, a->dtype);
}

/* How `vectors` vectors of tokens are split into panels of at most `most`. */
typedef struct {
    long vectors, panels;
} split_t;

INLINE split_t split(long tokens, long lanes, long most) {
    long vectors = ceil_div(tokens, lanes);
    return (split_t){vectors, ceil_div(vectors, most)};
}
INLINE long panel_start(split_t s, long panel) { /* in vectors */
    return panel * (s.vectors / s.panels) + least(panel, s.vectors % s.panels);
}
INLINE int panel_width(split_t s, long panel) {
    return (int)(panel_start(s, panel + 1) - panel_start(s, panel));
}

/* Lane i of the result's vector j: element j of row i. Zeros outside of the matrix. */
INLINE void load_transposed(vf v[VL], const matrix_t *x, long row, long column) {
    if (row + VL <= x->rows && column + VL <= x->columns) {
        for (int i = 0; i < VL; i++) v[i] = load(element(x, row + i, column), x->dtype);
    } else {
        for (int i = 0; i < VL; i++)
            v[i] = row + i < x->rows
                       ? load_part(element(x, row + i, column), x->columns - column, x->dtype)
                       : zero();
    }
    transpose(v);
}

/* Packs columns [from, to) of the T * VL tokens from `token` on, in fp32. `panel` points to
 * column 0. */
static void pack_f32(const matrix_t *x, long token, long from, long to, int T, float *panel) {
    for (int t = 0; t < T; t++) {
        for (long c = from; c < to; c += VL) {
            vf v[VL];
            load_transposed(v, x, token + t * VL, c);
            float *out = panel + (c * T + t) * VL;
            for (long j = 0; j < least(VL, to - c); j++) *(vf *)(out + j * T * VL) = v[j];
        }
    }
}

#define PAIRS 6 /* ways to keep two of four: see pack_pairs */

#if defined(__AVX512BF16__)
#define HAS_BF16_DOT 1

/* acc + a * b over pairs of bf16: each lane adds the two products of its pair. */
INLINE vf dot_bf16(vf acc, vf a, vf b) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}

/* Pairs of bf16 columns (2j, 2j + 1) as 32-bit lanes: lane i of v[j] is pair j of row i. */
INLINE void load_pairs_transposed(vf v[VL], const matrix_t *x, long row, long column) {
    matrix_t pairs = {x->data, x->rows, x->columns / 2, x->stride, F32};
    for (int i = 0; i < VL; i++)
        v[i] = row + i < x->rows
                   ? load_part(element(x, row + i, column), pairs.columns - column / 2, F32)
                   : zero();
    transpose(v);
}

INLINE vf low_low(vf a, vf b) { return (vf)(((vu)a & 0xffff) | (vu)b << 16); }
INLINE vf low_high(vf a, vf b) { return (vf)(((vu)a & 0xffff) | ((vu)b & 0xffff0000u)); }
INLINE vf high_low(vf a, vf b) { return (vf)((vu)a >> 16 | (vu)b << 16); }
INLINE vf high_high(vf a, vf b) { return (vf)((vu)a >> 16 | ((vu)b & 0xffff0000u)); }

/* For sums over tokens: packs bf16 columns with two tokens in a lane, 2 * VL in a vector. The
 * order of the tokens is arbitrary, but the same for both factors. */
static void pack_bf16(const matrix_t *x, long token, long from, long to, int T, float *panel) {
    for (int t = 0; t < T; t++) {
        for (long c = from; c < to; c += 2 * VL) {
            vf a[VL], b[VL];
            load_pairs_transposed(a, x, token + 2 * t * VL, c);
            load_pairs_transposed(b, x, token + (2 * t + 1) * VL, c);
            float *out = panel + (c * T + t) * VL;
            for (long j = 0; j < least(2 * VL, to - c); j += 2) {
                *(vf *)(out + j * T * VL) = low_low(a[j / 2], b[j / 2]);
                *(vf *)(out + (j + 1) * T * VL) = high_high(a[j / 2], b[j / 2]);
            }
        }
    }
}

/* The number of a group's pair among the six, by the four bits of its mask. */
static const uint8_t pair_of_bits[16] = {[3] = 0, [5] = 1, [9] = 2, [6] = 3, [10] = 4, [12] = 5};

/* For two kept of each four columns: packs all six pairs of the four columns for dot_bf16.
 * Group g of four columns takes PAIRS * T vectors from g * PAIRS * T on. */
static void pack_pairs(const matrix_t *x, long token, long from, long to, int T, float *panel) {
    for (int t = 0; t < T; t++) {
        for (long c = from; c < to; c += 2 * VL) {
            vf v[VL];
            load_pairs_transposed(v, x, token + t * VL, c);
            for (long j = 0; j < least(2 * VL, to - c); j += 4) {
                float *out = panel + ((c + j) / 4 * PAIRS * T + t) * VL;
                vf a = v[j / 2], b = v[j / 2 + 1];
                *(vf *)out = a;
                *(vf *)(out + 1 * T * VL) = low_low(a, b);
                *(vf *)(out + 2 * T * VL) = low_high(a, b);
                *(vf *)(out + 3 * T * VL) = high_low(a, b);
                *(vf *)(out + 4 * T * VL) = high_high(a, b);
                *(vf *)(out + 5 * T * VL) = b;
            }
        }
    }
}
#else
#define HAS_BF16_DOT 0
#endif

#endif
