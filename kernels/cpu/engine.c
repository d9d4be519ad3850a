/* The entry points. They include all other sources, so that the compiler can inline everything.
 *
 * kernels/cpu/__init__.py checks the shapes, strides (in elements) and dtype codes that it
 * passes. Each entry point returns OK or an error code. */
enum { OK = 0, NO_MEMORY = 1, BAD_FORWARD_MASK = 2, BAD_BACKWARD_MASK = 3, BAD_FORMAT = 4 };

#include "frozen.h"
#include "linear.c"
#include "linear_few.c"
#include "linear_quantised.c"
#include "weight_grad.c"
#include "weights.c"

#if !defined(_WIN32)
#include <pthread.h>
#endif

/* The OpenMP threads of the parent do not exist in a forked child, and a parallel region
 * there would wait for them without end. */
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
    for (long r = 0; r < mask->rows; r += 16) valid &= rows_are_valid(mask, r, least(16, mask->rows - r));
    return valid;
}

/* y (tokens, d_out) = x (tokens, d_in) W^T + bias. bias is NULL or has d_out elements. */
int slope_linear(const void *x, long x_stride, long tokens, const void *values,
                 const uint8_t *mask_bytes, const void *bias, long d_out, long d_in, int n, int m,
                 void *y, int dtype, int threads) {
    threads = usable(threads);
    mask_t mask = mask_of(mask_bytes, d_out, d_in, n, m);
    if (!mask_is_valid(&mask, threads)) return BAD_FORWARD_MASK;
    if (tokens == 0) return OK;
    matrix_t input = {x, tokens, d_in, x_stride, dtype}, output = {y, tokens, d_out, d_out, dtype};
    part_t part = {.weight = {{values, d_out, d_in * n / m, d_in * n / m, dtype}, mask, bias}, .y = output};
    if (tokens <= FEW && d_out >= FEWEST_ROWS) return linear_streamed(&input, &part, 1, threads);
    return linear_panels(&input, &part.weight, &output, threads);
}

/* The products of frozen weights, whose masks and format were checked when they were made.
 *
 * slope_stream: several products with the same inputs, whose weights have one pattern and one format;
 * bits is 0 for values. Reads the weights once for every 8 tokens. With values, d_out is FEWEST_ROWS at
 * least. slope_panels: y = x W^T + bias. */
int slope_stream(const void *x, long x_stride, long tokens, const frozen_t *products, int count, long d_in,
                 int n, int m, int bits, int group, int dtype, int threads) {
    matrix_t input = {x, tokens, d_in, x_stride, dtype};
    part_t parts[count];
    for (int k = 0; k < count; k++) {
        const frozen_t *p = products + k;
        mask_t mask = mask_of(p->mask, p->d_out, d_in, n, m);
        parts[k] = (part_t){
            .weight = {{p->values, p->d_out, d_in * n / m, d_in * n / m, dtype}, mask, p->bias},
            .adapter = {p->a, p->b, p->rank},
            .y = {p->y, tokens, p->d_out, p->d_out, dtype},
        };
        if (bits) parts[k].codes = quantised_of(p->values, p->scales, mask, bits, group);
    }
    threads = usable(threads);
    return bits ? linear_quantised_streamed(&input, parts, count, 0, threads)
                : linear_streamed(&input, parts, count, threads);
}

int slope_panels(const void *x, long x_stride, long tokens, const void *values, const uint8_t *mask_bytes,
                 const void *bias, long d_out, long d_in, int n, int m, void *y, int dtype, int threads) {
    matrix_t input = {x, tokens, d_in, x_stride, dtype}, output = {y, tokens, d_out, d_out, dtype};
    weight_t weight = {{values, d_out, d_in * n / m, d_in * n / m, dtype}, mask_of(mask_bytes, d_out, d_in, n, m), bias};
    return linear_panels(&input, &weight, &output, usable(threads));
}

/* dw (d_out, d_in * N / M) = grad^T x at the kept positions. */
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

/* out (d_in, d_out * N / M) and out_bits = the compressed transpose of W^{R,C}. */
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

/* dense (d_out, d_in) = W^R. */
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
        if (good) expand_row(&from, &mask, &to, r);
        valid &= good;
    }
    return valid ? OK : BAD_FORWARD_MASK;
}

/* values (d_out, d_in * N / M) = the kept elements of dense (d_out, d_in). */
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

static int format_is_valid(int bits, int group) {
    return (bits == 4 || bits == 8) && (group == 32 || group == 64 || group == 128);
}

/* y (tokens, d_out) = x (tokens, d_in) W^T + bias, with a quantised W (kernels/quantised.py). Few
 * tokens: the weight is read once for each eight of them. */
int slope_linear_quantised(const void *x, long x_stride, long tokens, const void *codes,
                           const void *scales, const uint8_t *mask_bytes, const void *bias,
                           long d_out, long d_in, int n, int m, int bits, int group, void *y,
                           int dtype, int threads) {
    if (!format_is_valid(bits, group)) return BAD_FORMAT;
    threads = usable(threads);
    mask_t mask = mask_of(mask_bytes, d_out, d_in, n, m);
    if (tokens == 0) return mask_is_valid(&mask, threads) ? OK : BAD_FORWARD_MASK;
    matrix_t input = {x, tokens, d_in, x_stride, dtype};
    part_t part = {
        .weight = {.bias = bias},
        .codes = quantised_of(codes, scales, mask, bits, group),
        .y = {y, tokens, d_out, d_out, dtype},
    };
    return linear_quantised_streamed(&input, &part, 1, 1, threads);
}

/* dense (d_out, d_in) = W^R, with its quantised values. */
int slope_expand_quantised(const void *codes, const void *scales, const uint8_t *mask_bytes,
                           long d_out, long d_in, int n, int m, int bits, int group, void *dense,
                           int dtype, int threads) {
    if (!format_is_valid(bits, group)) return BAD_FORMAT;
    threads = usable(threads);
    mask_t mask = mask_of(mask_bytes, d_out, d_in, n, m);
    quantised_t weight = quantised_of(codes, scales, mask, bits, group);
    matrix_t to = {dense, d_out, d_in, d_in, dtype};
    int valid = 1;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(& : valid)
    for (long r = 0; r < d_out; r++) {
        int good = row_is_valid(&mask, r);
        if (good) expand_row_quantised(&weight, &to, r);
        valid &= good;
    }
    return valid ? OK : BAD_FORWARD_MASK;
}
