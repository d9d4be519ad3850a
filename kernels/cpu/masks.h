/* Bit-packed masks: one bit per element, rows padded to whole bytes (kernels/packing.py).
 * Groups have M = 2, 4, 8 or 16 bits, so that a word of 64 bits holds whole groups. */
#ifndef SLOPE_MASKS_H
#define SLOPE_MASKS_H

#include "vectors.h"

typedef struct {
    const uint8_t *bytes;
    long rows, columns, stride; /* stride: bytes in a row */
    int n, m;
} mask_t;

INLINE mask_t mask_of(const uint8_t *bytes, long rows, long columns, int n, int m) {
    return (mask_t){bytes, rows, columns, (columns + 7) / 8, n, m};
}

INLINE uint64_t low_bits(long count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

/* `count` (at most 64) bits of a row from `column`, a multiple of 8. Reads no memory after the
 * mask. */
INLINE uint64_t mask_bits(const mask_t *mask, long row, long column, long count) {
    long first = row * mask->stride + column / 8, left = mask->rows * mask->stride - first;
    uint64_t word = 0;
    if (left >= 8)
        memcpy(&word, mask->bytes + first, 8);
    else
        memcpy(&word, mask->bytes + first, left);
    return word & low_bits(count);
}

/* `count` (at most 57) bits of a row from any column. */
INLINE uint64_t mask_bits_anywhere(const mask_t *mask, long row, long column, long count) {
    return mask_bits(mask, row, column & ~7l, (column & 7) + count) >> (column & 7);
}

/* A word with `x` in each field of m bits. */
INLINE uint64_t in_each_field(uint64_t x, int m) { return ~0ull / low_bits(m) * x; }

/* Each field of m bits holds the number of its set bits. (With m = 16, the counts 0 to 16 take
 * five bits.) For one word, and for a register of words. */
#define FIELD_COUNTS(NAME, WORD)                                                                        \
    INLINE WORD NAME(WORD word, int m) {                                                                \
        word -= word >> 1 & 0x5555555555555555ull;                                                      \
        if (m >= 4) word = (word & 0x3333333333333333ull) + (word >> 2 & 0x3333333333333333ull);        \
        if (m >= 8) word = (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0full;                                \
        if (m >= 16) word = (word + (word >> 8)) & 0x00ff00ff00ff00ffull;                               \
        return word;                                                                                    \
    }
typedef uint64_t vw __attribute__((vector_size(4 * VL), aligned(1), may_alias));
FIELD_COUNTS(field_counts, uint64_t)
FIELD_COUNTS(field_counts_each, vw)

/* Whether each group of some rows has exactly n set bits, and the padding has none. All other code
 * computes the number of values from the pattern, not from the bits. Without this check, a
 * corrupted mask would lead to accesses out of bounds. */
INLINE int rows_are_valid(const mask_t *mask, long row, long count) {
    uint64_t wrong = 0, want = in_each_field(mask->n, mask->m);
    vw each = {0};
    for (long end = row + count; row < end; row++) {
        const uint8_t *bytes = mask->bytes + row * mask->stride;
        long column = 0;
        for (; column + 32 * VL <= mask->columns; column += 32 * VL)
            each |= field_counts_each(*(const vw *)(bytes + column / 8), mask->m) ^ want;
        for (; column + 64 <= mask->columns; column += 64)
            wrong |= field_counts(mask_bits(mask, row, column, 64), mask->m) ^ want;
        if (column < mask->columns) {
            long left = mask->columns - column;
            uint64_t word = mask_bits(mask, row, column, 8 * (mask->stride - column / 8));
            wrong |= field_counts(word, mask->m) ^ (want & low_bits(left));
        }
    }
    for (int i = 0; i < VL / 2; i++) wrong |= each[i];
    return !wrong;
}

INLINE int row_is_valid(const mask_t *mask, long row) { return rows_are_valid(mask, row, 1); }

/* The transpose of an 8x8 matrix of bits: bit i of byte j is bit j of byte i of `x`. */
INLINE uint64_t transpose_8x8(uint64_t x) {
    uint64_t t = (x ^ x >> 7) & 0x00aa00aa00aa00aaull;
    x ^= t ^ t << 7;
    t = (x ^ x >> 14) & 0x0000cccc0000ccccull;
    x ^= t ^ t << 14;
    t = (x ^ x >> 28) & 0x00000000f0f0f0f0ull;
    return x ^ t ^ t << 28;
}

/* The bits of `source`, lowest first, at the places of the set bits of `where`. */
INLINE uint64_t deposit(uint64_t source, uint64_t where) {
#if defined(__BMI2__) && defined(__x86_64__)
    return _pdep_u64(source, where);
#else
    uint64_t result = 0;
    for (; where; where &= where - 1, source >>= 1)
        if (source & 1) result |= where & -where;
    return result;
#endif
}

#endif
