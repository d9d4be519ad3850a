/* Y = X W^T + b for an N:M weight W, or several on one input; for a weight's compressed transpose
 * that is the input gradient.
 *
 * X is packed into panels (panels.h). Each kept weight is then one broadcast and T
 * multiply-adds, so the work is N/M of dense for any N:M. The columns go in blocks whose
 * part of a panel stays close while all rows of a chunk pass over it; the chunk's results
 * wait in the L2 cache, tokens in lanes, and are transposed on their way out. A few tokens
 * are another matter: linear_few.c. */
#include "linear.h"
#include "masks.h"
#include "panels.h"
#include "scratch.h"

#define MOST_T 8         /* vectors of tokens in a panel: accumulators a row */
#define CHUNK 512        /* rows of W at a time: their results fill 256 KiB of the L2 cache */
#define BLOCK 64         /* columns a block: a word of the mask, 32 KiB of a panel at 512 bits */

/* A block of columns of W, for a chunk of its rows. */
typedef struct {
    const weight_t *w;
    const float *panel; /* at the block's first column */
    long row, rows, column, columns;
    const char *next; /* the panel at the next block, to be fetched meanwhile */
    long next_lines;  /* cache lines of it to fetch at each row */
} block_t;

INLINE void fetch_next(block_t *b) {
    for (long i = 0; i < b->next_lines; i++, b->next += 64) __builtin_prefetch(b->next, 0, 2);
}

/* What the loop over a block's rows needs, so that it divides and multiplies nothing. */
typedef struct {
    const char *values;  /* the row's run in this block */
    long kept, stride;   /* values in a run; bytes from row to row */
    const uint8_t *bits; /* the row's bits in this block */
    long left;           /* bytes of the mask from there */
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

/* acc (rows, T * VL) += the block's part of the product. */
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

/* The same with two kept of each four columns, in bf16: a group is one dot_bf16. */
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

/* acc (rows, T * VL), tokens in lanes, to y (tokens, d_out). */
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

/* Products of one input by panels: what their tasks share. */
typedef struct {
    const matrix_t *x, *ys; /* a result for each weight */
    const weight_t *ws;
    int count, pairs;
    long slots; /* vectors of a panel, over T */
    split_t parts;
    long chunk; /* rows of W at a time */
} by_panels_t;

static void pack_columns(const by_panels_t *job, long p, long from, long to, float *panel) {
    (job->pairs ? pack_pairs : pack_f32)(job->x, panel_start(job->parts, p) * VL, from, to,
                                         panel_width(job->parts, p), panel);
}

/* One panel times a chunk of rows of weight k. */
static void multiply_chunk(const by_panels_t *job, long p, int k, long row, const float *panel,
                           float *acc) {
    const weight_t *w = job->ws + k;
    long d_in = job->x->columns, rows = least(job->chunk, w->mask.rows - row);
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
    store_chunk(acc, T, row, rows, panel_start(job->parts, p) * VL, job->ys + k);
}

static long chunks_of(const by_panels_t *job, int k) { return ceil_div(job->ws[k].mask.rows, job->chunk); }

/* Chunk c of all weights', counted through. */
static void multiply_counted(const by_panels_t *job, long p, long c, const float *panel, float *acc) {
    int k = 0;
    for (; c >= chunks_of(job, k); k++) c -= chunks_of(job, k);
    multiply_chunk(job, p, k, c * job->chunk, panel, acc);
}

/* The weights are of one pattern; each panel of the input is packed once for all of them. */
static int linear_panels(const matrix_t *x, const weight_t *ws, const matrix_t *ys, int count,
                         int threads) {
    int pairs = HAS_BF16_DOT && x->dtype == BF16 && ws->mask.m <= 4 &&
                2 * ws->mask.n == ws->mask.m && x->columns % 4 == 0;
    long d_in = x->columns, d_out = 0, chunks = 0;
    for (int k = 0; k < count; k++) d_out += ws[k].mask.rows;
    by_panels_t job = {x, ys, ws, count, pairs, pairs ? d_in / 4 * PAIRS : d_in,
                       split(x->rows, VL, MOST_T), CHUNK};
    long panels = job.parts.panels;
    /* Enough panels for all threads: each packs its own, which stays in its cache. */
    int own = panels >= threads;
    if (own) job.parts.panels = panels = least(ceil_div(panels, threads) * threads, job.parts.vectors);
    else job.chunk = least(CHUNK, ceil_div(ceil_div(d_out, 4l * threads), 32) * 32);
    for (int k = 0; k < count; k++) chunks += chunks_of(&job, k);
    float *shared = own ? NULL : scratch(job.slots * job.parts.vectors * VL);
    int failed = !own && !shared;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *acc = scratch(CHUNK * MOST_T * VL);
        float *panel = own ? scratch(job.slots * MOST_T * VL) : shared;
        int ready = acc && panel;
        failed |= !ready;
        if (own) {
#pragma omp for schedule(dynamic)
            for (long p = 0; p < panels; p++) {
                if (!ready) continue;
                pack_columns(&job, p, 0, d_in, panel);
                for (long c = 0; c < chunks; c++) multiply_counted(&job, p, c, panel, acc);
            }
            give_back(panel);
        } else {
            /* Fewer: they share the packing, then the rows. */
            long slices = ceil_div(d_in, 256);
#pragma omp for schedule(dynamic)
            for (long task = 0; task < panels * slices; task++) {
                long p = task / slices, c = task % slices * 256;
                if (ready)
                    pack_columns(&job, p, c, least(c + 256, d_in),
                                 panel + panel_start(job.parts, p) * job.slots * VL);
            }
#pragma omp for schedule(dynamic)
            for (long task = 0; task < panels * chunks; task++) {
                long p = task / chunks;
                if (ready)
                    multiply_counted(&job, p, task % chunks,
                                     panel + panel_start(job.parts, p) * job.slots * VL, acc);
            }
        }
        give_back(acc);
    }
    give_back(shared);
    return failed;
}
