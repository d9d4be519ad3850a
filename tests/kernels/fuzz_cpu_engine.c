/* Random calls of the CPU engine's entry points, each against plain C in double precision.
 *
 * Built with AddressSanitizer and UndefinedBehaviorSanitizer by test_cpu_build.py, once for
 * each vector width that the machine has. Every operand is a block of its own of exactly the
 * right size, at an odd alignment, so that one byte too many is found.
 *
 *     fuzz_cpu_engine ROUNDS SEED
 */
#include "../../kernels/cpu/engine.c"

#include <stdio.h>

static uint64_t state;
static uint32_t next(void) { /* xorshift64* */
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return (state * 2685821657736338717ull) >> 32;
}
static long below(long n) { return next() % n; }
static long pick(const long *from, long count) { return from[below(count)]; }
#define PICK(...) pick((const long[]){__VA_ARGS__}, sizeof((long[]){__VA_ARGS__}) / sizeof(long))

/* Exactly `bytes` bytes, aligned to no more than the element. */
static char *blocks_made[24];
static int made;
static void *block(long bytes, long alignment) {
    blocks_made[made] = malloc(bytes + alignment);
    return blocks_made[made++] + alignment;
}
static void release(void) {
    while (made) free(blocks_made[--made]);
}

static void put(void *p, long i, int dtype, float x) {
    char lanes[4 * VL];
    store(lanes, splat(x), dtype);
    memcpy((char *)p + i * element_size(dtype), lanes, element_size(dtype));
}
static double get(const void *p, long i, int dtype) { return load_one(at(p, i, dtype), dtype); }

static void *random_tensor(long count, int dtype) {
    void *p = block(count * element_size(dtype), element_size(dtype) * below(3));
    for (long i = 0; i < count; i++) put(p, i, dtype, (float)((int)below(2001) - 1000) / 500);
    return p;
}

static int bit(const uint8_t *mask, long stride, long row, long column) {
    return mask[row * stride + column / 8] >> column % 8 & 1;
}

/* Exactly n of each m along the rows. */
static uint8_t *random_mask(long rows, long columns, int n, int m) {
    long stride = (columns + 7) / 8;
    uint8_t *mask = block(rows * stride, below(3));
    memset(mask, 0, rows * stride);
    for (long r = 0; r < rows; r++)
        for (long g = 0; g < columns; g += m)
            for (int left = n, j = 0; j < m; j++)
                if (below(m - j) < left) mask[r * stride + (g + j) / 8] |= 1 << (g + j) % 8, left--;
    return mask;
}

static int failures;
static void expect(const char *what, double got, double want, double magnitude, int dtype) {
    double epsilon = dtype == F32 ? 0x1p-23 : dtype == BF16 ? 0x1p-7 : 0x1p-10;
    if (fabs(got - want) <= 4 * epsilon * magnitude + 1e-7) return;
    if (failures++ < 5) printf("%s: got %g, want %g (magnitude %g)\n", what, got, want, magnitude);
}

static void round_of(int dtype) {
    int m = PICK(2, 4, 8, 16), n = m == 2 ? 1 : 1 + below(m - 1), threads = PICK(1, 2, 3);
    long d_out = m * (1 + below(PICK(3, 300 / m))), d_in = m * (1 + below(PICK(3, 300 / m)));
    long tokens = PICK(0, 1, 2, 3, 5, 8, 9, 16, 17, 33, 64, 129 + below(300));
    long kept = d_in * n / m, stride = (d_in + 7) / 8, gap = below(3), size = element_size(dtype);
    long x_stride = d_in + gap, grad_stride = d_out + gap;
    void *values = random_tensor(d_out * kept, dtype), *x = random_tensor(tokens * x_stride, dtype);
    void *grad = random_tensor(tokens * grad_stride, dtype);
    void *bias = below(2) ? random_tensor(d_out, dtype) : NULL;
    uint8_t *mask = random_mask(d_out, d_in, n, m);
    void *y = block(tokens * d_out * size, 0), *dw = block(d_out * kept * size, 0);
    void *dense = block(d_out * d_in * size, 0), *again = block(d_out * kept * size, 0);

    int code = slope_linear(x, x_stride, tokens, values, mask, bias, d_out, d_in, n, m, y, dtype, threads);
    code |= slope_weight_grad(grad, grad_stride, x, x_stride, tokens, mask, d_out, d_in, n, m, dw, dtype, threads);
    code |= slope_expand(values, mask, d_out, d_in, n, m, dense, dtype, threads);
    code |= slope_compress(dense, d_in, mask, d_out, d_in, n, m, again, dtype, threads);
    expect("codes", code, 0, 0, F32);
    for (long o = 0; o < d_out; o++) {
        for (long c = 0, k = 0; c < d_in; c++) {
            int keeps = bit(mask, stride, o, c);
            double value = keeps ? get(values, o * kept + k, dtype) : 0;
            expect("expand", get(dense, o * d_in + c, dtype), value, 0, F32);
            if (!keeps) continue;
            expect("compress", get(again, o * kept + k, dtype), value, 0, F32);
            double want = 0, magnitude = 0;
            for (long t = 0; t < tokens; t++) {
                double term = get(grad, t * grad_stride + o, dtype) * get(x, t * x_stride + c, dtype);
                want += term, magnitude += fabs(term);
            }
            expect("weight_grad", get(dw, o * kept + k++, dtype), want, magnitude, dtype);
        }
    }
    for (long t = 0; t < tokens; t++)
        for (long o = 0; o < d_out; o++) {
            double want = bias ? get(bias, o, dtype) : 0, magnitude = fabs(want);
            for (long c = 0; c < d_in; c++) {
                double term = get(x, t * x_stride + c, dtype) * get(dense, o * d_in + c, dtype);
                want += term, magnitude += fabs(term);
            }
            expect("linear", get(y, t * d_out + o, dtype), want, magnitude, dtype);
        }
    release();
}

/* The product of a frozen weight with an adapter. */
static void round_of_adapters(int dtype) {
    int m = PICK(2, 4, 8, 16), n = m == 2 ? 1 : 1 + below(m - 1);
    long d_out = ceil_div(FEWEST_ROWS, m) * m * (1 + below(PICK(3, 100 / m))), d_in = m * (1 + below(PICK(3, 200 / m)));
    long tokens = 1 + below(PICK(2, 9, 20)), rank = below(PICK(4, 40)), x_stride = d_in + below(3), kept = d_in * n / m;
    void *values = random_tensor(d_out * kept, dtype), *x = random_tensor(tokens * x_stride, dtype);
    void *a = random_tensor(rank * d_in, dtype), *b = random_tensor(rank * d_out, dtype);
    void *bias = below(2) ? random_tensor(d_out, dtype) : NULL;
    uint8_t *mask = random_mask(d_out, d_in, n, m);
    void *y = block(tokens * d_out * element_size(dtype), 0), *panels = block(tokens * d_out * element_size(dtype), 0);
    long fewer = FEWEST_ROWS + below(d_out - FEWEST_ROWS + 1);
    void *first = block(tokens * fewer * element_size(dtype), 0);
    frozen_t products[] = {
        {values, NULL, mask, NULL, NULL, NULL, 0, fewer, first},
        {values, NULL, mask, bias, a, b, rank, d_out, y},
    };
    int code = slope_stream(x, x_stride, tokens, products, 2, d_in, n, m, 0, 0, dtype, PICK(1, 2, 3));
    code |= slope_panels(x, x_stride, tokens, values, mask, bias, d_out, d_in, n, m, panels, dtype, PICK(1, 2, 3));
    expect("codes", code, 0, 0, F32);
    for (long t = 0; t < tokens; t++)
        for (long o = 0; o < d_out; o++) {
            double want = bias ? get(bias, o, dtype) : 0, magnitude = fabs(want);
            for (long c = 0, k = 0; c < d_in; c++) {
                if (!bit(mask, (d_in + 7) / 8, o, c)) continue;
                double term = get(x, t * x_stride + c, dtype) * get(values, o * kept + k++, dtype);
                want += term, magnitude += fabs(term);
            }
            expect("panels", get(panels, t * d_out + o, dtype), want, magnitude, dtype);
            double added = bias ? get(bias, o, dtype) : 0;
            if (o < fewer) expect("joined", get(first, t * fewer + o, dtype), want - added, magnitude, dtype);
            for (long j = 0; j < rank; j++)
                for (long c = 0; c < d_in; c++) {
                    double term = get(x, t * x_stride + c, dtype) * get(a, j * d_in + c, dtype) * get(b, o * rank + j, dtype);
                    want += term, magnitude += fabs(term);
                }
            expect("stream", get(y, t * d_out + o, dtype), want, magnitude, dtype);
        }
    release();
}

/* A code of a row of codes, and the scale of its group. */
static int code_at(const uint8_t *codes, long row_bytes, long row, long k, int bits) {
    if (bits == 8) return ((const int8_t *)codes)[row * row_bytes + k];
    int half = codes[row * row_bytes + k / 2] >> k % 2 * 4 & 15;
    return half < 8 ? half : half - 16;
}

/* The product with a quantised weight, and its expansion. */
static void round_of_quantised(int dtype) {
    int m = PICK(2, 4, 8, 16), n = m == 2 ? 1 : 1 + below(m - 1), threads = PICK(1, 2, 3);
    int bits = PICK(4, 8), group = PICK(32, 64, 128);
    long d_out = 1 + below(PICK(3, 50)), d_in = m * (1 + below(PICK(3, 700 / m)));
    long tokens = PICK(0, 1, 2, 3, 4, 5, 8, 9, 16, 17), gap = below(3), size = element_size(dtype);
    long kept = d_in * n / m, stride = (d_in + 7) / 8, x_stride = d_in + gap;
    long row_bytes = (kept * bits + 7) / 8, groups = (kept + group - 1) / group;
    void *x = random_tensor(tokens * x_stride, dtype), *bias = below(2) ? random_tensor(d_out, dtype) : NULL;
    void *scales = random_tensor(d_out * groups, BF16);
    uint8_t *codes = block(d_out * row_bytes, below(3)), *mask = random_mask(d_out, d_in, n, m);
    for (long i = 0; i < d_out * row_bytes; i++) codes[i] = below(256);
    void *y = block(tokens * d_out * size, 0), *dense = block(d_out * d_in * size, 0);
    int code = slope_linear_quantised(x, x_stride, tokens, codes, scales, mask, bias, d_out, d_in, n, m, bits, group, y, dtype, threads);
    code |= slope_expand_quantised(codes, scales, mask, d_out, d_in, n, m, bits, group, dense, dtype, threads);
    long rank = PICK(0, 1, 5, 20);
    void *a = random_tensor(rank * d_in, dtype), *b = random_tensor(rank * d_out, dtype);
    void *beside = block(tokens * d_out * size, 0);
    frozen_t product = {codes, scales, mask, bias, a, b, rank, d_out, beside};
    code |= slope_stream(x, x_stride, tokens, &product, 1, d_in, n, m, bits, group, dtype, threads);
    expect("quantised codes", code, 0, 0, F32);
    for (long o = 0; o < d_out; o++) {
        double want[17], magnitude[17], rounding[17];
        for (long t = 0; t < tokens; t++)
            want[t] = bias ? get(bias, o, dtype) : 0, magnitude[t] = fabs(want[t]), rounding[t] = 0;
        for (long c = 0, k = 0; c < d_in; c++) {
            double weight = 0;
            if (bit(mask, stride, o, c)) {
                weight = code_at(codes, row_bytes, o, k, bits) * get(scales, o * groups + k / group, BF16);
                k++;
            }
            expect("expand_quantised", get(dense, o * d_in + c, dtype), weight, fabs(weight) / 8, dtype);
            for (long t = 0; t < tokens; t++) {
                double term = weight * get(x, t * x_stride + c, dtype);
                want[t] += term, magnitude[t] += fabs(term), rounding[t] += fabs(weight) * 2;
            }
        }
        /* random_tensor's largest is 2; inputs are rounded to 2^-15 of the largest of a block. */
        double in_magnitude = 0x1p-17 / (dtype == F32 ? 0x1p-23 : dtype == BF16 ? 0x1p-7 : 0x1p-10);
        for (long t = 0; t < tokens; t++) {
            expect("linear_quantised", get(y, t * d_out + o, dtype), want[t],
                   magnitude[t] + rounding[t] * in_magnitude, dtype);
            for (long j = 0; j < rank; j++)
                for (long c = 0; c < d_in; c++) {
                    double term = get(x, t * x_stride + c, dtype) * get(a, j * d_in + c, dtype) * get(b, o * rank + j, dtype);
                    want[t] += term, magnitude[t] += fabs(term);
                }
            expect("stream_quantised", get(beside, t * d_out + o, dtype), want[t],
                   magnitude[t] + rounding[t] * in_magnitude, dtype);
        }
    }
    release();
}

/* The transpose of W with a backward mask that drops values until columns are N:M. */
static void round_of_transpose(int dtype) {
    int m = PICK(2, 4, 8, 16), n = m == 2 ? 1 : 1 + below(m - 1);
    long d_out = m * (1 + below(300 / m)), d_in = m * (1 + below(300 / m));
    long kept = d_in * n / m, stride = (d_in + 7) / 8, back_stride = (kept + 7) / 8;
    long t_kept = d_out * n / m, t_stride = (d_out + 7) / 8;
    void *values = random_tensor(d_out * kept, dtype);
    uint8_t *mask = random_mask(d_out, d_in, n, m);
    uint8_t *backward = block(d_out * back_stride, below(3));
    memset(backward, 0, d_out * back_stride);
    uint8_t *count = block(d_in, 0);
    for (long o = 0; o < d_out; o++) {
        if (o % m == 0) memset(count, 0, d_in);
        for (long c = 0, k = 0; c < d_in; c++)
            if (bit(mask, stride, o, c)) {
                if (count[c] < n && below(4)) backward[o * back_stride + k / 8] |= 1 << k % 8, count[c]++;
                k++;
            }
    }
    void *out = block(d_in * t_kept * element_size(dtype), 0);
    uint8_t *bits = block(d_in * t_stride, 0);
    int code = slope_transpose(values, mask, backward, d_out, d_in, n, m, out, bits, dtype, PICK(1, 2));
    expect("transpose's code", code, 0, 0, F32);
    mask_t made_mask = mask_of(bits, d_in, d_out, n, m);
    for (long c = 0; c < d_in; c++) expect("transpose's mask", row_is_valid(&made_mask, c), 1, 0, F32);
    for (long c = 0; c < d_in; c++)
        for (long o = 0, slot = 0; o < d_out; o++) {
            long k = 0;
            for (long j = 0; j < c; j++) k += bit(mask, stride, o, j);
            int keeps = bit(mask, stride, o, c) && bit(backward, back_stride, o, k);
            double want = keeps ? get(values, o * kept + k, dtype) : 0, got = 0;
            if (bit(bits, t_stride, c, o)) got = get(out, c * t_kept + slot++, dtype);
            expect("transpose", got, want, 0, F32);
        }
    release();
}

/* A mask that something wrote into is refused, and not followed. */
static void round_of_bad_masks(int dtype) {
    int m = PICK(2, 4, 8, 16), n = m == 2 ? 1 : 1 + below(m - 1);
    long d_out = m * (1 + below(40)), d_in = m * (1 + below(40)), tokens = PICK(1, 5, 40);
    long kept = d_in * n / m, bytes = d_out * ((d_in + 7) / 8);
    void *values = random_tensor(d_out * kept, dtype), *x = random_tensor(tokens * d_in, dtype);
    void *grad = random_tensor(tokens * d_out, dtype);
    uint8_t *mask = random_mask(d_out, d_in, n, m), *wrong = block(d_out * ((kept + 7) / 8), 0);
    mask[below(bytes)] ^= 1 << below(8);
    void *y = block(tokens * d_out * element_size(dtype), 0);
    void *dw = block(d_out * kept * element_size(dtype), 0);
    void *dense = block(d_out * d_in * element_size(dtype), 0);
    uint8_t *bits = block(d_in * ((d_out + 7) / 8), 0);
    memset(wrong, 255, d_out * ((kept + 7) / 8));
    memset(dense, 0, d_out * d_in * element_size(dtype));
    int group = PICK(32, 64, 128), width = PICK(4, 8);
    uint8_t *q = block(d_out * ((kept * width + 7) / 8), 0);
    void *scales = random_tensor(d_out * ((kept + group - 1) / group), BF16);
    memset(q, 17, d_out * ((kept * width + 7) / 8));
    int codes[] = {
        slope_linear_quantised(x, d_in, tokens, q, scales, mask, NULL, d_out, d_in, n, m, width, group, y, dtype, 2),
        slope_expand_quantised(q, scales, mask, d_out, d_in, n, m, width, group, dense, dtype, 1),
        slope_linear(x, d_in, tokens, values, mask, NULL, d_out, d_in, n, m, y, dtype, 1),
        slope_weight_grad(grad, d_out, x, d_in, tokens, mask, d_out, d_in, n, m, dw, dtype, 1),
        slope_expand(values, mask, d_out, d_in, n, m, dense, dtype, 2),
        slope_compress(dense, d_in, mask, d_out, d_in, n, m, dw, dtype, 2),
        slope_transpose(values, mask, wrong, d_out, d_in, n, m, dense, bits, dtype, 1),
    };
    for (int i = 0; i < 7; i++) expect("a bad mask's code", codes[i], BAD_FORWARD_MASK, 0, F32);
    uint8_t *good = random_mask(d_out, d_in, n, m);
    expect("a bad format's code", slope_linear_quantised(x, d_in, tokens, q, scales, good, NULL, d_out, d_in, n, m, width, 48, y, dtype, 1), BAD_FORMAT, 0, F32);
    expect("a bad format's code", slope_expand_quantised(q, scales, good, d_out, d_in, n, m, 5, group, dense, dtype, 1), BAD_FORMAT, 0, F32);
    good = random_mask(d_out, d_in, n, m);
    memset(good, 0, bytes);
    for (long o = 0; o < d_out; o++) /* all rows keep the same columns, so each is too full */
        for (long c = 0; c < d_in; c++)
            if (c % m < n) good[o * ((d_in + 7) / 8) + c / 8] |= 1 << c % 8;
    int code = slope_transpose(values, good, wrong, d_out, d_in, n, m, dense, bits, dtype, 1);
    expect("a bad backward mask's code", code, BAD_BACKWARD_MASK, 0, F32);
    release();
}

int main(int argc, char **argv) {
    long rounds = argc > 1 ? atol(argv[1]) : 100;
    state = 88172645463325252ull + (argc > 2 ? atol(argv[2]) : 0);
    for (long i = 0; i < rounds; i++) {
        round_of(i % 3);
        round_of_adapters(i % 3);
        round_of_transpose(i % 3);
        round_of_quantised(i % 3);
        round_of_bad_masks(i % 3);
    }
    printf("%ld rounds at %d lanes, bf16 dots %d: %d failures\n", rounds, VL, HAS_BF16_DOT, failures);
    return failures != 0;
}
