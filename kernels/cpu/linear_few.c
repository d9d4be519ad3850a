/* The product for few tokens. The time is that of reading the weight. Each run of values is
 * expanded to its columns in a register, and multiplied there with each token. */
#include "linear.h"
#include "masks.h"
#include "panels.h"
#include "scratch.h"

#define FEW 16        /* most tokens of a product that streams the weight */
#define FEWEST_ROWS 4 /* fewest rows of such a weight: the most rows of one dots function */

#define MOST_B 8 /* tokens at a time; more do not fit the registers */

/* The hardware prefetcher is too slow for values that are read a part of a cache line at a
 * time. A prefetch past the end of the weight has no effect. */
INLINE void fetch_ahead(const char *values, long bytes) {
    for (long i = 0; i < bytes; i += 64) __builtin_prefetch(values + 2048 + i);
}

/* sum[i][b] = partial sums in lanes of row `r + i` of W times token b, for R rows and B tokens.
 * Each vector of tokens is loaded once for all R rows. For each VL columns, x holds the
 * vectors of all B tokens one after the other; it is padded with zeros to whole mask words. */
INLINE void dots_f32(const int R, const int B, const weight_t *w, long r, const float *x,
                     vf sum[4][MOST_B]) {
    int dtype = w->values.dtype, n = w->mask.n, m = w->mask.m;
    const char *values[4];
    float widened[4][64 + VL];
    vf s[4][MOST_B];
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) {
        values[i] = element(&w->values, r + i, 0);
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) s[i][b] = zero();
    }
    for (long c = 0; c < w->mask.columns; c += 64) {
        long columns = least(64, w->mask.columns - c);
        uint64_t word[4];
        const float *run[4];
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) {
            word[i] = mask_bits(&w->mask, r + i, c, columns);
            run[i] = (const float *)values[i];
            if (dtype != F32) {
                widen(widened[i], values[i], columns * n / m, dtype);
                run[i] = widened[i];
            }
            fetch_ahead(values[i], 64 * n / m * element_size(dtype));
            values[i] += 64 * n / m * element_size(dtype);
        }
#pragma GCC unroll 2
        for (int k = 0; k < 64 / VL; k++, x += B * VL) {
            vf v[4];
#pragma GCC unroll 4
            for (int i = 0; i < R; i++) {
                uint32_t bits = word[i] & low_bits(VL);
                word[i] >>= VL;
                v[i] = expand_f32(run[i], bits);
                run[i] += m <= VL ? VL * n / m : __builtin_popcount(bits);
            }
#pragma GCC unroll 8
            for (int b = 0; b < B; b++) {
                vf token = *(const vf *)(x + b * VL);
#pragma GCC unroll 4
                for (int i = 0; i < R; i++) s[i][b] += v[i] * token;
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; i++)
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) sum[i][b] = s[i][b];
}

#if HAS_BF16_DOT && defined(__AVX512VBMI2__)
#define STREAMS_BF16 1
INLINE void dots_bf16(const int R, const int B, const weight_t *w, long r, const float *x,
                      vf sum[4][MOST_B]) {
    int n = w->mask.n, m = w->mask.m;
    const char *values[4];
    vf s[4][MOST_B];
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) {
        values[i] = element(&w->values, r + i, 0);
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) s[i][b] = zero();
    }
    for (long c = 0; c < w->mask.columns; c += 64) {
        long columns = least(64, w->mask.columns - c);
        uint64_t word[4];
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) {
            word[i] = mask_bits(&w->mask, r + i, c, columns);
            fetch_ahead(values[i], 2 * 64 * n / m);
        }
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++, x += B * VL) {
            vf v[4];
#pragma GCC unroll 4
            for (int i = 0; i < R; i++) {
                v[i] = (vf)_mm512_mask_expandloadu_epi16((__m512i)fresh_zero(), (__mmask32)(word[i] >> 32 * k), values[i]);
                values[i] += 2 * 32 * n / m;
            }
#pragma GCC unroll 8
            for (int b = 0; b < B; b++) {
                vf token = *(const vf *)(x + b * VL);
#pragma GCC unroll 4
                for (int i = 0; i < R; i++) s[i][b] = dot_bf16(s[i][b], v[i], token);
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; i++)
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) sum[i][b] = s[i][b];
}
#else
#define STREAMS_BF16 0
#define dots_bf16 dots_f32
#endif

typedef void dots_fn(const weight_t *, long, const float *, vf[4][MOST_B]);
#define DOTS_FN(R, B)                                                                           \
    static void dots_f32_##R##_##B(const weight_t *w, long r, const float *x, vf s[4][MOST_B]) {  \
        dots_f32(R, B, w, r, x, s);                                                             \
    }                                                                                           \
    static void dots_bf16_##R##_##B(const weight_t *w, long r, const float *x, vf s[4][MOST_B]) { \
        dots_bf16(R, B, w, r, x, s);                                                            \
    }
DOTS_FN(1, 1) DOTS_FN(1, 2) DOTS_FN(4, 1) DOTS_FN(4, 2) DOTS_FN(4, 4) DOTS_FN(2, 6) DOTS_FN(2, 8)

/* For one or two tokens, one row at a time is the fastest: the weight is then one stream. If
 * the tokens do not fit the L1 cache, several rows share each load of the tokens. */
#define L1_BYTES (24l << 10)

typedef struct {
    int tokens; /* B; missing tokens are zeros */
    int rows;   /* R */
    dots_fn *run;
} dots_t;

static dots_t dots_for(long tokens, long token_bytes, int bf16) {
#define DOTS(R, B) (dots_t){B, R, bf16 ? dots_bf16_##R##_##B : dots_f32_##R##_##B}
    int fits = tokens * token_bytes <= L1_BYTES;
    if (tokens == 1) return fits ? DOTS(1, 1) : DOTS(4, 1);
    if (tokens == 2) return fits ? DOTS(1, 2) : DOTS(4, 2);
    if (tokens <= 4) return DOTS(4, 4);
    return tokens <= 6 ? DOTS(2, 6) : DOTS(2, 8);
#undef DOTS
}

/* One element of x A^T: row `j` of A times a row of x. */
static float down_one(const matrix_t *x, long token, const adapter_t *adapter, long j) {
    long d_in = x->columns;
    int dtype = x->dtype;
    const void *row = at(adapter->a, j * d_in, dtype), *from = element(x, token, 0);
    vf part[4] = {zero(), zero(), zero(), zero()};
    long i = 0;
    for (; i + 4 * VL <= d_in; i += 4 * VL)
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++)
            part[k] += load(at(row, i + k * VL, dtype), dtype) * load(at(from, i + k * VL, x->dtype), x->dtype);
    for (; i < d_in; i += VL)
        part[0] += load_part(at(row, i, dtype), d_in - i, dtype) * load_part(at(from, i, x->dtype), d_in - i, x->dtype);
    vf whole = part[0] + part[1] + (part[2] + part[3]);
    float sum = 0;
    for (int i = 0; i < VL; i++) sum += whole[i];
    return sum;
}

/* Rows of (x A^T) B^T for one token: `rows` of the d_out, from `row` on. */
INLINE vf up(const adapter_t *adapter, int dtype, long d_out, long row, long rows, const float *down) {
    vf sum = zero();
    for (long j = 0; j < adapter->rank; j++)
        sum += splat(down[j]) * load_part(at(adapter->b, j * d_out + row, dtype), rows, dtype);
    return sum;
}

/* The product for at most MOST_B tokens from `token` on. */
static int linear_few(const matrix_t *x, long token, const weight_t *w, const adapter_t *adapter,
                      const matrix_t *y, int threads) {
    int bf16 = STREAMS_BF16 && x->dtype == BF16;
    long d_in = x->columns, d_out = w->mask.rows, tokens = least(MOST_B, x->rows - token);
    long lanes = bf16 ? 2 * VL : VL, count = ceil_div(d_in, 64) * 64 / lanes;
    dots_t dots = dots_for(tokens, count * VL * 4, bf16);
    int width = dots.tokens, together = dots.rows;
    long rank = adapter->rank;
    float *padded = scratch(count * width * VL + MOST_B * rank), *down = padded + count * width * VL;
    if (!padded) return 1;
    for (long i = 0; i < count; i++)
        for (long b = 0; b < width; b++) {
            vf v = zero();
            if (b < tokens && i * lanes < d_in) {
                const void *from = element(x, token + b, i * lanes);
                long left = d_in - i * lanes;
                v = bf16 ? load_part(from, left / 2, F32) : load_part(from, left, x->dtype);
            }
            *(vf *)(padded + (i * width + b) * VL) = v;
        }
#pragma omp parallel num_threads(threads)
    {
        if (rank) {
#pragma omp for schedule(static)
            for (long j = 0; j < rank; j++)
                for (long b = 0; b < tokens; b++) down[b * rank + j] = down_one(x, token + b, adapter, j);
        }
#pragma omp for schedule(static)
        for (long row = 0; row < d_out; row += VL) {
            long rows = least(VL, d_out - row);
            vf by_token[MOST_B][VL], sum[4][MOST_B];
            for (long i = 0; i < VL; i += together) {
                /* If the rows are no multiple of R, some of the last rows are computed twice. */
                long first = least(row + i, d_out - together);
                if (i < rows) dots.run(w, first, padded, sum);
                for (long j = 0; j < together; j++)
                    for (long b = 0; b < tokens; b++)
                        by_token[b][i + j] = row + i + j < d_out ? sum[row + i + j - first][b] : zero();
            }
            vf bias = w->bias ? load_part(at(w->bias, row, w->values.dtype), rows, w->values.dtype) : zero();
            for (long b = 0; b < tokens; b++)
                store_part((void *)element(y, token + b, row), sums(by_token[b]) + (rank ? bias + up(adapter, x->dtype, d_out, row, rows, down + b * rank) : bias), rows, y->dtype);
        }
    }
    give_back(padded);
    return 0;
}

/* Reads the weight once for each MOST_B tokens. */
static int linear_streamed(const matrix_t *x, const weight_t *w, const adapter_t *adapter,
                           const matrix_t *y, int threads) {
    int failed = 0;
    for (long token = 0; !failed && token < x->rows; token += MOST_B)
        failed = linear_few(x, token, w, adapter, y, threads);
    return failed;
}
