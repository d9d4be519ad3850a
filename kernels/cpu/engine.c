/* The entry points. One file of source for the compiler, so that everything inlines.
 *
 * Shapes, strides (in elements) and dtype codes come from kernels/cpu/__init__.py, which has
 * checked them. Each entry point returns 0, or what went wrong. */
#include "linear.c"
#include "linear_few.c"
#include "weight_grad.c"
#include "weights.c"

#if !defined(_WIN32)
#include <pthread.h>
#endif

#define MOST_WEIGHTS 8 /* on one input, in one call */

enum { OK = 0, NO_MEMORY = 1, BAD_FORWARD_MASK = 2, BAD_BACKWARD_MASK = 3 };

/* In a forked child the OpenMP threads of the parent don't exist, and waiting for them
 * would be forever. */
static int forked;
static void in_child(void) { forked = 1; }
__attribute__((constructor)) static void watch_forks(void) {
#if !defined(_WIN32)
    pthread_atfork(NULL, NULL, in_child);
#endif
}
static int usable(int threads) { return forked || threads < 1 ? 1 : threads; }

static int mask_is_valid(const mask_t *mask, int threads) {
    int valid = 1;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(& : valid)
    for (long r = 0; r < mask->rows; r++) valid &= row_is_valid(mask, r);
    return valid;
}

/* ys[k] (tokens, d_outs[k]) = x (tokens, d_in) W_k^T + biases[k], for at most MOST_WEIGHTS. */
int slope_linear(const void *x, long x_stride, long tokens, int count, const void *const *values,
                 const uint8_t *const *mask_bytes, const void *const *biases, const long *d_outs,
                 long d_in, int n, int m, void *const *ys, int dtype, int threads) {
    threads = usable(threads);
    matrix_t input = {x, tokens, d_in, x_stride, dtype}, outputs[MOST_WEIGHTS];
    weight_t ws[MOST_WEIGHTS];
    int few = tokens <= FEW;
    for (int k = 0; k < count; k++) {
        mask_t mask = mask_of(mask_bytes[k], d_outs[k], d_in, n, m);
        if (!mask_is_valid(&mask, threads)) return BAD_FORWARD_MASK;
        matrix_t kept = {values[k], d_outs[k], d_in * n / m, d_in * n / m, dtype};
        ws[k] = (weight_t){kept, mask, biases[k]};
        outputs[k] = (matrix_t){ys[k], tokens, d_outs[k], d_outs[k], dtype};
        few &= d_outs[k] >= FEWEST_ROWS;
    }
    if (tokens == 0) return OK;
    if (!few) return linear_panels(&input, ws, outputs, count, threads);
    int failed = 0;
    for (int k = 0; k < count && !failed; k++)
        failed = linear_streamed(&input, ws + k, outputs + k, threads);
    return failed;
}

/* dw (d_out, d_in * N / M) = grad^T x at the mask's positions. */
int slope_weight_grad(const void *grad, long grad_stride, const void *x, long x_stride, long tokens,
                      const uint8_t *mask_bytes, long d_out, long d_in, int n, int m, void *dw,
                      int dtype, int threads) {
    threads = usable(threads);
    mask_t mask = mask_of(mask_bytes, d_out, d_in, n, m);
    if (!mask_is_valid(&mask, threads)) return BAD_FORWARD_MASK;
    matrix_t g = {grad, tokens, d_out, grad_stride, dtype}, input = {x, tokens, d_in, x_stride, dtype};
    matrix_t out = {dw, d_out, d_in * n / m, d_in * n / m, dtype};
    return weight_grad(&g, &input, &mask, &out, threads);
}

/* The compressed transpose of W^{R,C}: out (d_in, d_out * N / M) and its mask. */
int slope_transpose(const void *values, const uint8_t *forward_bytes, const uint8_t *backward_bytes,
                    long d_out, long d_in, int n, int m, void *out, uint8_t *out_bits, int dtype,
                    int threads) {
    threads = usable(threads);
    mask_t forward = mask_of(forward_bytes, d_out, d_in, n, m);
    mask_t backward = mask_of(backward_bytes, d_out, d_in * n / m, n, m);
    if (!mask_is_valid(&forward, threads)) return BAD_FORWARD_MASK;
    matrix_t from = {values, d_out, d_in * n / m, d_in * n / m, dtype};
    matrix_t to = {out, d_in, d_out * n / m, d_out * n / m, dtype};
    long down = ceil_div(d_out, 64), across = ceil_div(d_in, 64);
    int valid = 1;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(& : valid)
    for (long task = 0; task < down * across; task++)
        valid &= transpose_tile(&from, &forward, &backward, &to, out_bits, (d_out + 7) / 8,
                                task % down * 64, task / down * 64);
    return valid ? OK : BAD_BACKWARD_MASK;
}

int slope_expand(const void *values, const uint8_t *mask_bytes, long d_out, long d_in, int n, int m,
                 void *dense, int dtype, int threads) {
    threads = usable(threads);
    mask_t mask = mask_of(mask_bytes, d_out, d_in, n, m);
    matrix_t from = {values, d_out, d_in * n / m, d_in * n / m, dtype};
    matrix_t to = {dense, d_out, d_in, d_in, dtype};
    int valid = 1;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(& : valid)
    for (long r = 0; r < d_out; r++) {
        int good = row_is_valid(&mask, r);
        if (good) expand_rows(&from, &mask, &to, r);
        valid &= good;
    }
    return valid ? OK : BAD_FORWARD_MASK;
}

int slope_compress(const void *dense, long dense_stride, const uint8_t *mask_bytes, long d_out,
                   long d_in, int n, int m, void *values, int dtype, int threads) {
    threads = usable(threads);
    mask_t mask = mask_of(mask_bytes, d_out, d_in, n, m);
    matrix_t from = {dense, d_out, d_in, dense_stride, dtype};
    matrix_t to = {values, d_out, d_in * n / m, d_in * n / m, dtype};
    int valid = 1;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(& : valid)
    for (long r = 0; r < d_out; r++) {
        int good = row_is_valid(&mask, r);
        if (good) compress_row(&from, &mask, &to, r);
        valid &= good;
    }
    return valid ? OK : BAD_FORWARD_MASK;
}
