/* Y = X W^T + b for an N:M weight W. With the compressed transpose of a weight in the place of W,
 * the same code computes the input gradient.
 *
 * X is packed into panels (panels.h). Each kept weight costs one broadcast and T multiply-adds,
 * so the work is N/M of the dense work for any N:M. The columns are processed in blocks. The
 * part of a panel that belongs to a block stays in a fast cache while all rows of a chunk use
 * it. The results of a chunk stay in the L2 cache with tokens in lanes, and are transposed
 * when they are stored. linear_few.c computes products with few tokens. */
#include "linear.h"
#include "masks.h"
#include "panels.h"
#include "scratch.h"

#define MOST_T 8         /* vectors of tokens in a panel: accumulators a row */
#define CHUNK 512        /* rows of W in a chunk: the results take 256 KiB of the L2 cache */
#define BLOCK 64         /* columns in a block: one word of the mask, 32 KiB of a panel at 512 bits */

/* A block of columns of W, for a chunk of its rows. */
typedef struct {
    const weight_t *w;
    const float *panel; /* at the block's first column */
    long row, rows, column, columns;
    const char *next; /* the panel at the next block, prefetched during this block */
    long next_lines;  /* cache lines of `next` to prefetch at each row */
} block_t;

INLINE void fetch_next(block_t *b) {
    for (long i = 0; i < b->next_lines; i++, b->next += 64) __builtin_prefetch(b->next, 0, 2);
}

/* Precomputed values for the loop over the rows of a block. They replace the divisions and
 * multiplications in the loop. */
typedef struct {
    const char *values;  /* the row's run in this block */
    long kept, stride;   /* values in a run; bytes from row to row */
    const uint8_t *bits; /* the row's bits in this block */
    long left;           /* bytes from `bits` to the end of the mask */
    uint64_t all;        /* a bit for each column of the block */
} runs_t;

INLINE runs_t runs_of(const block_t *b) {
    const mask_t *mask = &b->w->mask;
    const matrix_t *values = &b->w->values;
    long first = b->row * mask->stride + b->column / 8;
    return (runs_t){element(values, b->row, b->column * mask->n / mask->m),
                    b->columns * mask->n / mask->m,
                    values->stride * element_size(values->dtype),
                    mask->bytes + first,
                    mask->rows * mask->stride - first,
                    low_bits(b->columns)};
}

INLINE uint64_t bits_of(const runs_t *runs) {
    uint64_t bits = 0;
    if (__builtin_expect(runs->left >= 8, 1))
        memcpy(&bits, runs->bits, 8);
    else
        memcpy(&bits, runs->bits, runs->left);
    return bits & runs->all;
}

INLINE void next_row(runs_t *runs, long mask_stride) {
    runs->values += runs->stride;
    runs->bits += mask_stride;
    runs->left -= mask_stride;
}

/* acc (rows, T * VL) += the product of the block and its part of the panel. */
INLINE void block_f32(const int T, const int is_f32, block_t *b, float *acc) {
    runs_t runs = runs_of(b);
    float widened[64 + VL];
    for (long r = 0; r < b->rows; r++, acc += T * VL, next_row(&runs, b->w->mask.stride)) {
        uint64_t bits = bits_of(&runs);
        const char *values = runs.values;
        fetch_next(b);
        __builtin_prefetch(values + 4 * runs.stride);
        __builtin_prefetch(values + 4 * runs.stride + 64);
        __builtin_prefetch(runs.bits + 4 * b->w->mask.stride);
        if (!is_f32) {
            widen(widened, values, runs.kept, b->w->values.dtype);
            values = (const char *)widened;
        }
        vf a[MOST_T];
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) a[t] = ((vf *)acc)[t];
        for (long k = 0; k < runs.kept; k++) {
            const vf *x = (const vf *)b->panel + (long)__builtin_ctzll(bits) * T;
            bits &= bits - 1;
            OPAQUE(x);
            float value;
            memcpy(&value, values + 4 * k, sizeof value);
            vf v = splat(value);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) a[t] += v * x[t];
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) ((vf *)acc)[t] = a[t];
    }
}

#if HAS_BF16_DOT
INLINE void dot_group(const int T, vf *a, const char *pairs, const char *values, uint64_t bits) {
    const vf *x = (const vf *)(pairs + pair_of_bits[bits & 15] * (T * 64l));
    OPAQUE(x);
    int32_t both;
    memcpy(&both, values, sizeof both);
    vf v = (vf)_mm512_set1_epi32(both);
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) a[t] = dot_bf16(a[t], v, x[t]);
}

/* block_f32 for bf16 and patterns with two of each four columns: one dot_bf16 per group. */
INLINE void block_pairs(const int T, block_t *b, float *acc) {
    runs_t runs = runs_of(b);
    for (long r = 0; r < b->rows; r++, acc += T * VL, next_row(&runs, b->w->mask.stride)) {
        uint64_t bits = bits_of(&runs);
        const char *values = runs.values;
        fetch_next(b);
        __builtin_prefetch(values + 4 * runs.stride);
        __builtin_prefetch(runs.bits + 4 * b->w->mask.stride);
        const char *x = (const char *)b->panel;
        vf a[MOST_T];
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) a[t] = ((vf *)acc)[t];
        for (long k = 0; k < runs.kept / 2; k++, bits >>= 4)
            dot_group(T, a, x + k * PAIRS * T * 64, values + 4 * k, bits);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) ((vf *)acc)[t] = a[t];
    }
}
#else
#define block_pairs(T, b, acc) block_f32(T, 0, b, acc)
#define pack_pairs pack_f32
#endif

typedef void block_fn(block_t *, float *);
#define BLOCK_FN(T)                                                                     \
    static void block_f32_##T(block_t *b, float *acc) { block_f32(T, 1, b, acc); }  \
    static void block_wide_##T(block_t *b, float *acc) { block_f32(T, 0, b, acc); } \
    static void block_pairs_##T(block_t *b, float *acc) { block_pairs(T, b, acc); }
BLOCK_FN(1) BLOCK_FN(2) BLOCK_FN(3) BLOCK_FN(4) BLOCK_FN(5) BLOCK_FN(6) BLOCK_FN(7) BLOCK_FN(8)
#define BLOCK_FNS(name) \
    {0, name##_1, name##_2, name##_3, name##_4, name##_5, name##_6, name##_7, name##_8}
static block_fn *const blocks_f32[] = BLOCK_FNS(block_f32);
static block_fn *const blocks_wide[] = BLOCK_FNS(block_wide); /* bf16 or fp16 values, widened */
static block_fn *const blocks_pairs[] = BLOCK_FNS(block_pairs);

/* Stores acc (rows, T * VL), with tokens in lanes, to y (tokens, d_out). */
static void store_chunk(const float *acc, int T, long row, long rows, long token, const matrix_t *y) {
    for (int t = 0; t < T; t++) {
        for (long r = 0; r < rows; r += VL) {
            vf v[VL];
            for (long i = 0; i < VL; i++)
                v[i] = r + i < rows ? *(const vf *)(acc + ((r + i) * T + t) * VL) : zero();
            transpose(v);
            long first = token + t * VL;
            for (long i = 0; i < least(VL, y->rows - first); i++)
                store_part((void *)element(y, first + i, row + r), v[i], rows - r, y->dtype);
        }
    }
}

/* A product by panels: the values that its tasks share. */
typedef struct {
    const matrix_t *x, *y;
    const weight_t *w;
    int pairs;  /* whether panels hold pairs of columns (pack_pairs) */
    long slots; /* vectors of a panel, divided by T */
    split_t parts;
    long chunk; /* rows of W in a task */
    long chunks;
} by_panels_t;

static void pack_columns(const by_panels_t *job, long p, long from, long to, float *panel) {
    (job->pairs ? pack_pairs : pack_f32)(job->x, panel_start(job->parts, p) * VL, from, to,
                                         panel_width(job->parts, p), panel);
}

/* The product of panel p and a chunk of the rows of the weight. */
static void multiply_chunk(const by_panels_t *job, long p, long chunk, const float *panel, float *acc) {
    const weight_t *w = job->w;
    long d_in = job->x->columns, row = chunk * job->chunk;
    long rows = least(job->chunk, w->mask.rows - row);
    int T = panel_width(job->parts, p), dtype = w->values.dtype;
    block_fn *block = (job->pairs ? blocks_pairs : dtype == F32 ? blocks_f32 : blocks_wide)[T];
    for (long r = 0; r < rows; r++) {
        vf b = w->bias ? splat(load_one(at(w->bias, row + r, dtype), dtype)) : zero();
        for (int t = 0; t < T; t++) *(vf *)(acc + (r * T + t) * VL) = b;
    }
    long size = (job->pairs ? BLOCK / 4 * PAIRS : BLOCK) * T * VL; /* of a block's panel */
    for (long c = 0; c < d_in; c += BLOCK, panel += size) {
        long lines = c + BLOCK < d_in ? ceil_div(size * 4 / 64, rows) : 0;
        block_t b = {w, panel, row, rows, c, least(BLOCK, d_in - c), (const char *)(panel + size), lines};
        block(&b, acc);
    }
    store_chunk(acc, T, row, rows, panel_start(job->parts, p) * VL, job->y);
}

/* Runs in a parallel region, if there is a panel for each thread: each thread packs whole panels
 * into memory of its own, `panel`, so that they stay in its cache. `acc` and `panel` are NULL in
 * a thread without memory; such a thread does nothing. */
static void multiply_own_panels(const by_panels_t *job, float *panel, float *acc) {
#pragma omp for schedule(dynamic)
    for (long p = 0; p < job->parts.panels; p++) {
        if (!acc || !panel) continue;
        pack_columns(job, p, 0, job->x->columns, panel);
        for (long c = 0; c < job->chunks; c++) multiply_chunk(job, p, c, panel, acc);
    }
}

/* The same with fewer panels than threads: the threads share the packing into `all`, and then
 * the rows of the weight. */
static void multiply_shared_panels(const by_panels_t *job, float *all, float *acc) {
    long d_in = job->x->columns, slices = ceil_div(d_in, 256);
#pragma omp for schedule(dynamic)
    for (long task = 0; task < job->parts.panels * slices; task++) {
        long p = task / slices, c = task % slices * 256;
        float *panel = all + panel_start(job->parts, p) * job->slots * VL;
        if (acc && all) pack_columns(job, p, c, least(c + 256, d_in), panel);
    }
#pragma omp for schedule(dynamic)
    for (long task = 0; task < job->parts.panels * job->chunks; task++) {
        long p = task / job->chunks;
        const float *panel = all + panel_start(job->parts, p) * job->slots * VL;
        if (acc && all) multiply_chunk(job, p, task % job->chunks, panel, acc);
    }
}

/* y = x W^T + bias. Returns whether memory was missing. */
static int linear_panels(const matrix_t *x, const weight_t *w, const matrix_t *y, int threads) {
    int pairs = HAS_BF16_DOT && x->dtype == BF16 && w->mask.m <= 4 && 2 * w->mask.n == w->mask.m &&
                x->columns % 4 == 0;
    long d_in = x->columns, d_out = w->mask.rows;
    by_panels_t job = {.x = x, .y = y, .w = w, .pairs = pairs, .chunk = CHUNK,
                       .slots = pairs ? d_in / 4 * PAIRS : d_in,
                       .parts = split(x->rows, VL, MOST_T)};
    int own = job.parts.panels >= threads;
    if (own)
        job.parts.panels = least(ceil_div(job.parts.panels, threads) * threads, job.parts.vectors);
    else
        job.chunk = least(CHUNK, ceil_div(ceil_div(d_out, 4l * threads), 32) * 32);
    job.chunks = ceil_div(d_out, job.chunk);
    float *shared = own ? NULL : scratch(job.slots * job.parts.vectors * VL);
    int failed = !own && !shared;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *acc = scratch(CHUNK * MOST_T * VL);
        float *panel = own ? scratch(job.slots * MOST_T * VL) : shared;
        failed |= !acc || !panel;
        if (own) {
            multiply_own_panels(&job, panel, acc);
            give_back(panel);
        } else {
            multiply_shared_panels(&job, shared, acc);
        }
        give_back(acc);
    }
    give_back(shared);
    return failed;
}
