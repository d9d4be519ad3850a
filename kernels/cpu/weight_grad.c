/* The weight gradient at the kept positions only: dW[o, c] = sum over tokens of
 * dY[t, o] X[t, c], straight into compressed form.
 *
 * Both factors are packed with tokens in lanes (panels.h). A row of dY fills the registers,
 * each kept column of X is T multiply-adds against it, and VL such results are summed
 * across their lanes at once. */
#include "masks.h"
#include "panels.h"
#include "scratch.h"

#define MOST_G (VL == 8 ? 6 : 12)        /* vectors of tokens in a panel: registers for dY */
#define GRAD_L1_VECTORS 384              /* vectors of X's panel that share the L1 cache */
#define GRAD_CHUNK 256                   /* rows of dW a task */
#define GRAD_PACK_BYTES (32l << 20)      /* packed at a time */

/* One chunk of rows, one block of columns, one panel: sums (rows, run) += dY^T X. */
typedef struct {
    const mask_t *mask;
    const float *grad, *x; /* packed, at the chunk's first row and the block's first column */
    long row, rows, column, columns, run;
    const char *next; /* X's part of the next block, to be fetched meanwhile */
    long next_lines;  /* cache lines of it to fetch at each row */
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
                /* Past the last kept position all bits are gone: any column will do, as
                 * nothing reads the result. */
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

/* `sums` holds what earlier tokens gave, if there were any: fp32 (d_out, kept). */
static int grad_tokens(const matrix_t *grad, const matrix_t *x, const mask_t *mask,
                       const matrix_t *dw, float *sums, int first, int last, int threads) {
    int bf16 = HAS_BF16_DOT && x->dtype == BF16;
    long lanes = bf16 ? 2 * VL : VL, d_in = x->columns, d_out = grad->columns;
    /* A block has whole vectors of kept positions, where its words of 64 columns allow. */
    long width = least(64, (VL > 8 ? 16 : 8) * mask->m / mask->n / 16 * 16);
    width = width < 16 ? 16 : width;
    split_t parts = split(x->rows, lanes, least(MOST_G, GRAD_L1_VECTORS / width));
    long kept = dw->columns, run = ceil_div(width * mask->n / mask->m, VL) * VL;
    float *packed_x = scratch(parts.vectors * d_in * VL);
    float *packed_grad = scratch(parts.vectors * d_out * VL);
    int failed = !packed_x || !packed_grad;
    long chunks = ceil_div(d_out, GRAD_CHUNK), blocks = ceil_div(d_in, width);
    /* With few rows, the columns are shared out as well. */
    long pieces = least(blocks, ceil_div(4l * threads, chunks));
    if (!failed) {
#if HAS_BF16_DOT
        void (*pack)(const matrix_t *, long, long, long, int, float *) = bf16 ? pack_bf16 : pack_f32;
#else
        void (*pack)(const matrix_t *, long, long, long, int, float *) = pack_f32;
#endif
#pragma omp parallel num_threads(threads) reduction(| : failed)
        {
            float *out = scratch(GRAD_CHUNK * run);
            failed |= !out;
            long x_slices = ceil_div(d_in, 256), grad_slices = ceil_div(d_out, 256);
            long slices = x_slices + grad_slices;
#pragma omp for schedule(dynamic)
            for (long task = 0; task < parts.panels * slices; task++) {
                long p = task / slices, slice = task % slices, start = panel_start(parts, p);
                const matrix_t *from = slice < x_slices ? x : grad;
                float *to = slice < x_slices ? packed_x : packed_grad;
                long c = 256 * (slice < x_slices ? slice : slice - x_slices);
                pack(from, start * lanes, c, least(c + 256, from->columns), panel_width(parts, p),
                     to + start * from->columns * VL);
            }
#pragma omp for schedule(dynamic)
            for (long task = 0; task < chunks * pieces; task++) {
                if (!out) continue;
                long row = task / pieces * GRAD_CHUNK, rows = least(GRAD_CHUNK, d_out - row);
                long from = blocks * (task % pieces) / pieces;
                long to = blocks * (task % pieces + 1) / pieces;
                for (long c = from * width; c < least(to * width, d_in); c += width) {
                    long columns = least(width, d_in - c);
                    long count = columns * mask->n / mask->m, k = c * mask->n / mask->m;
                    for (long r = 0; r < rows; r++)
                        for (long i = 0; i < run; i += VL)
                            *(vf *)(out + r * run + i) =
                                first ? zero()
                                      : load_part(sums + (row + r) * kept + k + i, count - i, F32);
                    for (long p = 0; p < parts.panels; p++) {
                        int T = panel_width(parts, p);
                        long start = panel_start(parts, p), after = (p + 1) % parts.panels;
                        long next_c = after ? c : c + width; /* past the end at the very end */
                        const float *next = packed_x + (panel_start(parts, after) * d_in +
                                                        next_c * panel_width(parts, after)) * VL;
                        grad_block_t b = {mask,
                                          packed_grad + (start * d_out + row * T) * VL,
                                          packed_x + (start * d_in + c * T) * VL,
                                          row, rows, c, columns, run, (const char *)next,
                                          next_c < d_in ? ceil_div(columns * T * VL * 4 / 64, rows) : 0};
                        (bf16 ? grads_bf16 : grads_f32)[T](&b, out);
                    }
                    for (long r = 0; r < rows; r++)
                        for (long i = 0; i < count; i += VL) {
                            vf v = *(vf *)(out + r * run + i);
                            if (last)
                                store_part((void *)element(dw, row + r, k + i), v, count - i, dw->dtype);
                            else
                                store_part(sums + (row + r) * kept + k + i, v, count - i, F32);
                        }
                }
            }
            give_back(out);
        }
    }
    give_back(packed_x);
    give_back(packed_grad);
    return failed;
}

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
