/* Conversions of a weight: compressed to dense and back, and the compressed transpose. */
#include "masks.h"
#include "panels.h"

/* One dense row from its values, with zeros at pruned positions. */
static void expand_row(const matrix_t *values, const mask_t *mask, const matrix_t *dense, long row) {
    int dtype = values->dtype;
    long k = 0;
    float widened[64 + VL];
    for (long c = 0; c < mask->columns; c += 64) {
        long columns = least(64, mask->columns - c), kept = columns * mask->n / mask->m;
        uint64_t word = mask_bits(mask, row, c, columns);
        const float *run = element(values, row, k);
        if (dtype != F32) {
            widen(widened, run, kept, dtype);
            run = widened;
        }
        for (long s = 0; s < columns; s += VL) {
            uint32_t bits = word >> s & low_bits(VL);
            store_part((void *)element(dense, row, c + s), expand_f32(run, bits), columns - s, dtype);
            run += __builtin_popcount(bits);
        }
        k += kept;
    }
}

/* The values of one row, from the dense row. */
static void compress_row(const matrix_t *dense, const mask_t *mask, const matrix_t *values, long row) {
    int dtype = dense->dtype;
    long k = 0;
    for (long c = 0; c < mask->columns; c += 64) {
        long columns = least(64, mask->columns - c), kept = columns * mask->n / mask->m;
        uint64_t word = mask_bits(mask, row, c, columns);
        float run[64 + VL], *to = run;
        for (long s = 0; s < columns; s += VL) {
            uint32_t bits = word >> s & low_bits(VL);
            compress_f32(to, load_part(element(dense, row, c + s), columns - s, dtype), bits);
            to += __builtin_popcount(bits);
        }
        for (long i = 0; i < kept; i += VL)
            store_part((void *)element(values, row, k + i), *(vf_any *)(run + i), kept - i, dtype);
        k += kept;
    }
}

INLINE vf keep_lanes(vf x, uint32_t bits) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_mov_ps((__mmask16)bits, (__m512)x);
#else
    vu kept = {0};
    for (int i = 0; i < VL; i++) kept[i] = -(bits >> i & 1);
    return (vf)((vu)x & kept);
#endif
}

/* Sets the lowest unset bits of each field of m bits, until the field has n set bits. */
INLINE uint64_t fill_fields(uint64_t word, int n, int m) {
    for (int i = 0; i < n; i++) {
        uint64_t missing = field_counts(word, m) ^ in_each_field(n, m);
        for (int s = 1; s < m; s *= 2) missing |= missing >> s;
        missing &= in_each_field(1, m);
        if (!missing) break;
        word |= word + missing; /* no carry leaves a field that has unset bits */
    }
    return word;
}

/* across = the transpose of the 64x64 matrix of bits `bits`. */
INLINE void transpose_bits(const uint64_t bits[64], uint64_t across[64]) {
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++) {
            uint64_t block = 0;
            for (int k = 0; k < 8; k++) block |= (bits[8 * i + k] >> 8 * j & 0xff) << 8 * k;
            block = transpose_8x8(block);
            for (int k = 0; k < 8; k++) ((uint8_t *)&across[8 * j + k])[i] = block >> 8 * k;
        }
}

/* Stores 64 rows and 64 columns of W^{R,C} to the compressed transpose, which has a row for each
 * of d_in and groups along d_out. A group that kept fewer than N values gets zeros at its
 * first free places, so that the result is N:M. Returns whether the backward mask was N:M. */
static int transpose_tile(const matrix_t *values, const mask_t *forward, const mask_t *backward,
                          const matrix_t *out, uint8_t *out_bits, long out_stride, long row,
                          long column) {
    int n = forward->n, m = forward->m, valid = 1;
    long rows = least(64, forward->rows - row), columns = least(64, forward->columns - column);
    long kept = columns * n / m, first = column * n / m, out_kept = rows * n / m;
    uint64_t both[64] = {0}, across[64];
    float tile[64][64] __attribute__((aligned(64))), widened[64 + VL];
    for (long c = 0; c < columns; c++) /* the memory that is written at the end */
        for (long k = 0; k < out_kept; k += 64 / element_size(out->dtype))
            __builtin_prefetch(element(out, column + c, row * n / m + k), 1);
    for (long r = 0; r < rows; r++) {
        uint64_t word = mask_bits(forward, row + r, column, columns);
        if (row + r + 64 < forward->rows) /* for the next tile, which is below this one */
            for (long k = 0; k < kept; k += 64 / element_size(values->dtype))
                __builtin_prefetch(element(values, row + r + 64, first + k), 0, 2);
        both[r] = deposit(mask_bits_anywhere(backward, row + r, first, kept), word);
        const float *run = element(values, row + r, first);
        if (values->dtype != F32) {
            widen(widened, run, kept, values->dtype);
            run = widened;
        }
        for (int s = 0; s < 64; s += VL) {
            uint32_t bits = word >> s & low_bits(VL);
            *(vf *)(tile[r] + s) = keep_lanes(expand_f32(run, bits), both[r] >> s & low_bits(VL));
            run += __builtin_popcount(bits);
        }
    }
    for (long r = rows; r < 64; r++) memset(tile[r], 0, sizeof tile[r]);
    transpose_bits(both, across);
    for (long c = 0; c < columns; c += VL) {
        float lines[VL][64] __attribute__((aligned(64)));
        for (int r = 0; r < 64; r += VL) {
            vf v[VL];
            for (int i = 0; i < VL; i++) v[i] = *(vf *)(tile[r + i] + c);
            transpose(v);
            for (int i = 0; i < VL; i++) *(vf *)(lines[i] + r) = v[i];
        }
        for (long i = 0; i < least(VL, columns - c); i++) {
            uint64_t word = fill_fields(across[c + i], n, m) & low_bits(rows);
            valid &= field_counts(word, m) == (in_each_field(n, m) & low_bits(rows));
            memcpy(out_bits + (column + c + i) * out_stride + row / 8, &word, (rows + 7) / 8);
            float run[64 + VL], *to = run;
            for (int s = 0; s < 64; s += VL) {
                uint32_t bits = word >> s & low_bits(VL);
                compress_f32(to, *(vf *)(lines[i] + s), bits);
                to += __builtin_popcount(bits);
            }
            for (long k = 0; k < out_kept; k += VL)
                store_part((void *)element(out, column + c + i, row * n / m + k),
                           *(vf_any *)(run + k), out_kept - k, out->dtype);
        }
    }
    return valid;
}
