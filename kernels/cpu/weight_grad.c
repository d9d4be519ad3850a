/* The weight gradient at the kept positions, in compressed form: dW[o, c] is the sum over tokens
 * t of dY[t, o] X[t, c].
 *
 * Both factors are packed with tokens in lanes (panels.h). A row of dY fills the registers. Each
 * kept column of X costs T multiply-adds with this row. The lanes of VL such results are summed
 * together. */
#include "masks.h"
#include "panels.h"
#include "scratch.h"

#define MOST_G (VL == 8 ? 6 : 12)        /* vectors of tokens in a panel: registers for dY */
#define GRAD_L1_VECTORS 384              /* vectors of X's panel that share the L1 cache */
#define GRAD_CHUNK 256                   /* rows of dW in a task */
#define GRAD_PACK_BYTES (32l << 20)      /* of tokens that are packed at a time */

/* One chunk of rows, one block of columns, one panel: out (rows, run) += dY^T X. */
typedef struct {
    const mask_t *mask;
    const float *grad, *x; /* packed, at the chunk's first row and the block's first column */
    long row, rows, column, columns, run;
    const char *next; /* the part of X in the next block, prefetched during this block */
    long next_lines;  /* cache lines of `next` to prefetch at each row */
} grad_block_t;

INLINE vf multiply_add(const int bf16, vf acc, vf a, vf b) {
    (void)bf16;
#if HAS_BF16_DOT
    if (bf16) return dot_bf16(acc, a, b);
#endif
    return acc + a * b;
}

INLINE void grad_block(const int bf16, const int T, const grad_block_t *b, float *out) {
    long kept = b->columns * b->mask->n / b->mask->m;
    const vf *grad = (const vf *)b->grad;
    const char *next = b->next;
    for (long r = 0; r < b->rows; r++, grad += T, out += b->run) {
        uint64_t bits = mask_bits(b->mask, b->row + r, b->column, b->columns);
        for (long i = 0; i < b->next_lines; i++, next += 64) __builtin_prefetch(next, 0, 2);
        vf g[MOST_G];
#pragma GCC unroll 12
        for (int t = 0; t < T; t++) g[t] = grad[t];
        for (long k = 0; k < kept; k += VL) {
            vf s[VL];
#pragma GCC unroll 16
            for (int i = 0; i < VL; i += 4) {
                /* After the last kept position no bits are left. The column is then
                 * arbitrary, because nothing reads the result. */
                const vf *x[4];
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    x[j] = (const vf *)b->x + (bits ? (long)__builtin_ctzll(bits) : 0) * T;
                    bits &= bits - 1;
                }
                vf a[4] = {zero(), zero(), zero(), zero()};
#pragma GCC unroll 12
                for (int t = 0; t < T; t++)
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) a[j] = multiply_add(bf16, a[j], g[t], x[j][t]);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) s[i + j] = a[j];
            }
            *(vf *)(out + k) += sums(s);
        }
    }
}

typedef void grad_fn(const grad_block_t *, float *);
#define GRAD_FN(T)                                                                      \
    static void grad_f32_##T(const grad_block_t *b, float *out) { grad_block(0, T, b, out); }  \
    static void grad_bf16_##T(const grad_block_t *b, float *out) { grad_block(1, T, b, out); }
GRAD_FN(1) GRAD_FN(2) GRAD_FN(3) GRAD_FN(4) GRAD_FN(5) GRAD_FN(6)
#if MOST_G > 6
GRAD_FN(7) GRAD_FN(8) GRAD_FN(9) GRAD_FN(10) GRAD_FN(11) GRAD_FN(12)
#define GRAD_FNS(name)                                                                         \
    {0, name##_1, name##_2, name##_3, name##_4, name##_5, name##_6, name##_7, name##_8, name##_9, \
     name##_10, name##_11, name##_12}
#else
#define GRAD_FNS(name) {0, name##_1, name##_2, name##_3, name##_4, name##_5, name##_6}
#endif
static grad_fn *const grads_f32[] = GRAD_FNS(grad_f32);
static grad_fn *const grads_bf16[] = GRAD_FNS(grad_bf16);

/* The weight gradient of one round of tokens: the values that its tasks share. */
typedef struct {
    const mask_t *mask;
    const matrix_t *grad, *x, *dw;
    float *packed_grad, *packed_x;
    float *sums;     /* fp32 (d_out, kept): the sums over rounds, or NULL if there is one round */
    int first, last; /* whether this is the first round, the last round */
    int bf16;
    long lanes; /* tokens in a vector */
    split_t parts;
    long width; /* columns in a block */
    long run;   /* kept positions in a block, rounded up to whole vectors */
} by_rounds_t;

/* Packs 256 columns of panel p: the slices of x come first, then those of grad. */
static void pack_slice(const by_rounds_t *job, long p, long slice) {
    long x_slices = ceil_div(job->x->columns, 256), start = panel_start(job->parts, p);
    const matrix_t *from = slice < x_slices ? job->x : job->grad;
    float *to = (slice < x_slices ? job->packed_x : job->packed_grad) + start * from->columns * VL;
    long c = 256 * (slice < x_slices ? slice : slice - x_slices), end = least(c + 256, from->columns);
    int T = panel_width(job->parts, p);
#if HAS_BF16_DOT
    if (job->bf16) {
        pack_bf16(from, start * job->lanes, c, end, T, to);
        return;
    }
#endif
    pack_f32(from, start * job->lanes, c, end, T, to);
}

/* out (rows, run) += dY^T X for rows from `row` and columns from `c`, over all panels. */
static void grad_panels(const by_rounds_t *job, long row, long rows, long c, float *out) {
    long d_in = job->x->columns, d_out = job->grad->columns, columns = least(job->width, d_in - c);
    for (long p = 0; p < job->parts.panels; p++) {
        int T = panel_width(job->parts, p);
        long start = panel_start(job->parts, p), after = (p + 1) % job->parts.panels;
        long next_c = after ? c : c + job->width; /* after the last block: outside of X */
        long next = (panel_start(job->parts, after) * d_in + next_c * panel_width(job->parts, after)) * VL;
        grad_block_t b = {job->mask,
                          job->packed_grad + (start * d_out + row * T) * VL,
                          job->packed_x + (start * d_in + c * T) * VL,
                          row, rows, c, columns, job->run, (const char *)(job->packed_x + next),
                          next_c < d_in ? ceil_div(columns * T * VL * 4 / 64, rows) : 0};
        (job->bf16 ? grads_bf16 : grads_f32)[T](&b, out);
    }
}

/* One chunk of rows and the columns of one block, from the first sum to the result. */
static void grad_chunk(const by_rounds_t *job, long row, long c, float *out) {
    const mask_t *mask = job->mask;
    long rows = least(GRAD_CHUNK, job->grad->columns - row), kept = job->dw->columns;
    long count = least(job->width, job->x->columns - c) * mask->n / mask->m, k = c * mask->n / mask->m;
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < job->run; i += VL)
            *(vf *)(out + r * job->run + i) =
                job->first ? zero() : load_part(job->sums + (row + r) * kept + k + i, count - i, F32);
    grad_panels(job, row, rows, c, out);
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < count; i += VL) {
            vf v = *(vf *)(out + r * job->run + i);
            if (job->last)
                store_part((void *)element(job->dw, row + r, k + i), v, count - i, job->dw->dtype);
            else
                store_part(job->sums + (row + r) * kept + k + i, v, count - i, F32);
        }
}

/* Computes the round `job` of some tokens. Returns whether memory was missing. */
static int grad_round(by_rounds_t *job, int threads) {
    long d_in = job->x->columns, d_out = job->grad->columns;
    long chunks = ceil_div(d_out, GRAD_CHUNK), blocks = ceil_div(d_in, job->width);
    /* With few chunks of rows, a task has only some of the blocks of columns. */
    long pieces = least(blocks, ceil_div(4l * threads, chunks));
    long slices = ceil_div(d_in, 256) + ceil_div(d_out, 256);
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *out = scratch(GRAD_CHUNK * job->run);
        failed |= !out;
#pragma omp for schedule(dynamic)
        for (long task = 0; task < job->parts.panels * slices; task++)
            pack_slice(job, task / slices, task % slices);
#pragma omp for schedule(dynamic)
        for (long task = 0; task < chunks * pieces; task++) {
            long from = blocks * (task % pieces) / pieces, to = blocks * (task % pieces + 1) / pieces;
            for (long block = from; out && block < to; block++)
                grad_chunk(job, task / pieces * GRAD_CHUNK, block * job->width, out);
        }
        give_back(out);
    }
    return failed;
}

/* One round: the tokens of grad and x. Returns whether memory was missing. */
static int grad_tokens(const matrix_t *grad, const matrix_t *x, const mask_t *mask,
                       const matrix_t *dw, float *sums, int first, int last, int threads) {
    by_rounds_t job = {.mask = mask, .grad = grad, .x = x, .dw = dw, .sums = sums,
                       .first = first, .last = last, .bf16 = HAS_BF16_DOT && x->dtype == BF16};
    job.lanes = job.bf16 ? 2 * VL : VL;
    /* A block has whole vectors of kept positions, if its words of 64 columns allow this. */
    long width = least(64, (VL > 8 ? 16 : 8) * mask->m / mask->n / 16 * 16);
    job.width = width < 16 ? 16 : width;
    job.run = ceil_div(job.width * mask->n / mask->m, VL) * VL;
    job.parts = split(x->rows, job.lanes, least(MOST_G, GRAD_L1_VECTORS / job.width));
    job.packed_x = scratch(job.parts.vectors * x->columns * VL);
    job.packed_grad = scratch(job.parts.vectors * grad->columns * VL);
    int failed = !job.packed_x || !job.packed_grad || grad_round(&job, threads);
    give_back(job.packed_x);
    give_back(job.packed_grad);
    return failed;
}

/* dw = grad^T x at the kept positions, in rounds of as many tokens as are packed at a time. */
static int weight_grad(const matrix_t *grad, const matrix_t *x, const mask_t *mask,
                       const matrix_t *dw, int threads) {
    long tokens = x->rows, at_once = GRAD_PACK_BYTES / (4 * (x->columns + grad->columns));
    at_once = at_once < 1024 ? 1024 : at_once;
    int many = tokens > at_once;
    float *sums = many ? scratch(dw->rows * dw->columns) : NULL;
    int failed = many && !sums;
    for (long t = 0; !failed && (t < tokens || t == 0); t += at_once) {
        long count = least(at_once, tokens - t);
        matrix_t g = {element(grad, t, 0), count, grad->columns, grad->stride, grad->dtype};
        matrix_t some = {element(x, t, 0), count, x->columns, x->stride, x->dtype};
        failed = grad_tokens(&g, &some, mask, dw, sums, t == 0, t + at_once >= tokens, threads);
    }
    give_back(sums);
    return failed;
}
