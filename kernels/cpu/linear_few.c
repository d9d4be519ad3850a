/* The product for few tokens. The time is that of reading the weight. Each run of values is
 * expanded to its columns in a register, and multiplied there with each token. */
#include "frozen.h"
#include "linear.h"
#include "masks.h"
#include "panels.h"
#include "scratch.h"

#define FEW 16 /* most tokens of a product that streams the weight */

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

/* The elements of x A^T for a token, and zeros up to a whole number of vectors. */
INLINE long narrow_length(long rank) { return ceil_div(rank, VL) * VL; }

/* The floats of the products x A^T of the parts before `part`: for each, `width` tokens of
 * narrow_length(rank). */
INLINE long narrow_before(const part_t *parts, const part_t *part, int width) {
    long floats = 0;
    for (; parts < part; parts++) floats += width * narrow_length(parts->adapter.rank);
    return floats;
}
INLINE long count_ranks(const part_t *parts, int count) {
    long ranks = 0;
    for (int k = 0; k < count; k++) ranks += parts[k].adapter.rank;
    return ranks;
}
static void clear_narrow(const part_t *parts, int count, float *narrow, int width) {
    memset(narrow, 0, narrow_before(parts, parts + count, width) * sizeof *narrow);
}

/* The two products of an adapter, for B tokens in the layout of the dots functions.
 *
 * down: element `j` of x A^T for each token. up: adds `rows` rows of B (x A^T), from `row` on, to a
 * vector for each token and row, whose lanes are summed later. */
INLINE void down(const int B, const int dtype, const adapter_t *adapter, long j, long d_in, const float *x,
                 float *to) {
    const char *a = at(adapter->a, j * d_in, dtype);
    const int pairs = STREAMS_BF16 && dtype == BF16; /* two columns in a lane */
    const long lanes = pairs ? 2 * VL : VL;
    vf s[MOST_B];
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) s[b] = zero();
    for (long i = 0; i < d_in; i += lanes, x += B * VL) {
        const void *from = at(a, i, dtype);
        vf v = pairs ? load_part(from, (d_in - i) / 2, F32) : load_part(from, d_in - i, dtype);
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            vf token = *(const vf *)(x + b * VL);
#if STREAMS_BF16
            if (pairs) s[b] = dot_bf16(s[b], v, token);
            else
#endif
                s[b] += v * token;
        }
    }
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) {
        float sum = 0;
        for (int lane = 0; lane < VL; lane++) sum += s[b][lane];
        to[b * narrow_length(adapter->rank) + j] = sum;
    }
}

INLINE void up(const int B, const int dtype, const adapter_t *adapter, long row, long rows, const float *from,
               vf to[MOST_B][VL]) {
    long rank = adapter->rank, length = narrow_length(rank);
    for (long i = 0; i < rows; i++) {
        vf s[MOST_B];
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) s[b] = to[b][i];
        for (long j = 0; j < rank; j += VL) {
            vf v = load_part(at(adapter->b, (row + i) * rank + j, dtype), rank - j, dtype);
#pragma GCC unroll 8
            for (int b = 0; b < B; b++) s[b] += v * *(const vf_any *)(from + b * length + j);
        }
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) to[b][i] = s[b];
    }
}

typedef struct {
    void (*down)(const adapter_t *, long, long, const float *, float *);
    void (*up)(const adapter_t *, long, long, const float *, vf[MOST_B][VL]);
} branch_t;

#define BRANCH_FN(B, DTYPE)                                                                            \
    static void down_##B##_##DTYPE(const adapter_t *l, long j, long d_in, const float *x, float *to) {   \
        down(B, DTYPE, l, j, d_in, x, to);                                                               \
    }                                                                                                    \
    static void up_##B##_##DTYPE(const adapter_t *l, long row, long rows, const float *from,             \
                                 vf to[MOST_B][VL]) {                                                    \
        up(B, DTYPE, l, row, rows, from, to);                                                            \
    }
#define BRANCH_FNS(B) BRANCH_FN(B, F32) BRANCH_FN(B, BF16) BRANCH_FN(B, F16)
BRANCH_FNS(1) BRANCH_FNS(2) BRANCH_FNS(4) BRANCH_FNS(6) BRANCH_FNS(8)

static branch_t branch_for(int tokens, int dtype) {
#define BRANCH(B, DTYPE) (branch_t){down_##B##_##DTYPE, up_##B##_##DTYPE}
#define BRANCHES(B) (dtype == F32 ? BRANCH(B, F32) : dtype == BF16 ? BRANCH(B, BF16) : BRANCH(B, F16))
    switch (tokens) {
    case 1: return BRANCHES(1);
    case 2: return BRANCHES(2);
    case 4: return BRANCHES(4);
    case 6: return BRANCHES(6);
    default: return BRANCHES(8);
    }
#undef BRANCHES
#undef BRANCH
}

/* The `i`-th of the ranks of all parts. */
INLINE void down_rank(const branch_t *branch, const part_t *parts, long i, long d_in, const float *x,
                      float *narrow, int width) {
    const part_t *part = parts;
    for (; i >= part->adapter.rank; part++) i -= part->adapter.rank;
    branch->down(&part->adapter, i, d_in, x, narrow + narrow_before(parts, part, width));
}

/* The vectors of a width of tokens in the layout of the dots functions: for all columns, to whole
 * words of the mask, one vector of each token after the other. Missing tokens are zeros. */
INLINE long padded_vectors(long d_in, int pairs) { return ceil_div(d_in, 64) * 64 / (pairs ? 2 * VL : VL); }
static void pad_tokens(const matrix_t *x, long token, long tokens, int width, int pairs, float *padded) {
    long lanes = pairs ? 2 * VL : VL, count = padded_vectors(x->columns, pairs);
    for (long i = 0; i < count; i++)
        for (long b = 0; b < width; b++) {
            vf v = zero();
            if (b < tokens && i * lanes < x->columns) {
                const void *from = element(x, token + b, i * lanes);
                long left = x->columns - i * lanes;
                v = pairs ? load_part(from, left / 2, F32) : load_part(from, left, x->dtype);
            }
            *(vf *)(padded + (i * width + b) * VL) = v;
        }
}

/* The products for at most MOST_B tokens from `token` on. */
static int linear_few(const matrix_t *x, long token, const part_t *parts, int count, int threads) {
    int bf16 = STREAMS_BF16 && x->dtype == BF16;
    long d_in = x->columns, tokens = least(MOST_B, x->rows - token);
    long vectors = padded_vectors(d_in, bf16), tiles = count_tiles(parts, count), ranks = count_ranks(parts, count);
    dots_t dots = dots_for(tokens, vectors * VL * 4, bf16);
    int width = dots.tokens, together = dots.rows;
    long narrow_size = narrow_before(parts, parts + count, width);
    float *padded = scratch(vectors * width * VL + narrow_size);
    float *narrow = padded + vectors * width * VL;
    branch_t branch = branch_for(width, x->dtype);
    if (!padded) return 1;
    pad_tokens(x, token, tokens, width, bf16, padded);
    clear_narrow(parts, count, narrow, width);
#pragma omp parallel num_threads(threads)
    {
        if (ranks) {
#pragma omp for schedule(static)
            for (long i = 0; i < ranks; i++) down_rank(&branch, parts, i, d_in, padded, narrow, width);
        }
#pragma omp for schedule(static)
        for (long i = 0; i < tiles; i++) {
            long tile = i;
            const part_t *part = part_of_tile(parts, &tile);
            const weight_t *w = &part->weight;
            long d_out = part->y.columns, row = tile * VL, rows = least(VL, d_out - row);
            vf by_token[MOST_B][VL], sum[4][MOST_B];
            for (long i = 0; i < VL; i += together) {
                /* If the rows are no multiple of R, some of the last rows are computed twice. */
                long first = least(row + i, d_out - together);
                if (i < rows) dots.run(w, first, padded, sum);
                for (long j = 0; j < together; j++)
                    for (long b = 0; b < width; b++)
                        by_token[b][i + j] = row + i + j < d_out ? sum[row + i + j - first][b] : zero();
            }
            vf bias = w->bias ? load_part(at(w->bias, row, x->dtype), rows, x->dtype) : zero();
            if (part->adapter.rank)
                branch.up(&part->adapter, row, rows, narrow + narrow_before(parts, part, width), by_token);
            for (long b = 0; b < tokens; b++)
                store_part((void *)element(&part->y, token + b, row), sums(by_token[b]) + bias, rows, x->dtype);
        }
    }
    give_back(padded);
    return 0;
}

/* Reads the weights once for each MOST_B tokens. */
static int linear_streamed(const matrix_t *x, const part_t *parts, int count, int threads) {
    int failed = 0;
    for (long token = 0; !failed && token < x->rows; token += MOST_B)
        failed = linear_few(x, token, parts, count, threads);
    return failed;
}
