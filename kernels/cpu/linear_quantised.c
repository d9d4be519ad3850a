/* The product with a quantised weight, for few tokens. The time is that of reading the weight.
 *
 * The inputs are rounded to 16-bit integers, with a power of two for each block of columns. Sums of
 * products within a block and a group are exact, in 32 bits. Inputs in 16 bits that are no smaller
 * than 2^-7 (bf16) or 2^-4 (fp16) of the largest in their block are exact too. The largest error is
 * 2^-15 of the largest input of the block. */
#include "linear.h"
#include "panels.h"
#include "quantised.h"
#include "scratch.h"

#define MOST_TOGETHER 8 /* tokens at a time; more do not fit the registers */

/* The rounded inputs of at most MOST_TOGETHER tokens. For each 64 columns, x has the registers of
 * all `width` tokens one after the other; the even columns of a register come first, then the odd
 * ones. For each block of `words` times 64 columns, scales has a float for each token. */
typedef struct {
    const int16_t *x;
    const float *scales;
    int width, words;
} rounded_t;

/* Rounds the 64 columns of a token from `column` on. `power` is the biased exponent of the power
 * of two that the inputs are multiplied with. */
static void round_word(const matrix_t *x, long token, long column, int power, int16_t *to) {
    uint32_t bits = (uint32_t)power << 23;
    float times;
    memcpy(&times, &bits, 4);
    int16_t rounded[64];
    for (int k = 0; k < 64; k += VL) {
        vf v = load_part(element(x, token, column + k), x->columns - column - k, x->dtype);
        vi q = (vi)(v * times + 0x1.8p23f) - 0x4b400000; /* the adder does the rounding */
        q = (vi)choose(q > 0x7fff, (vu){0} + 0x7fff, (vu)q);
        *(vh_any *)(rounded + k) = (vh)__builtin_convertvector((vu)q, vh);
    }
    for (int part = 0; part < PARTS; part++)
        for (int half = 0; half < 2; half++) {
            vi pairs;
            memcpy(&pairs, rounded + part * 2 * VL * 2 + half * 2 * VL, sizeof pairs);
            int16_t *even = to + part * 4 * VL + half * VL, *odd = even + 2 * VL;
            *(vh_any *)even = __builtin_convertvector((vu)pairs, vh);
            *(vh_any *)odd = __builtin_convertvector((vu)pairs >> 16, vh);
        }
}

/* The exponent of the largest of some columns of a token: 2^(exponent - 126) is larger than each.
 * 255 if there is NaN or infinity. */
static int largest_exponent(const matrix_t *x, long token, long column, long count) {
    vi largest = {0};
    for (long k = 0; k < count; k += VL) {
        vi v = (vi)load_part(element(x, token, column + k), count - k, x->dtype) & 0x7fffffff;
        largest = (vi)choose(v > largest, (vu)v, (vu)largest);
    }
    int most = 0;
    for (int k = 0; k < VL; k++) most = largest[k] > most ? largest[k] : most;
    return most >> 23;
}

static void round_inputs(const matrix_t *x, long token, long tokens, rounded_t *r, int16_t *to, float *scales,
                         int bits) {
    int part = bits == 4 ? 4 : 0; /* of the exponent: int4 codes are expanded to 16 times the code */
    long block = 64l * r->words;
    for (long first = 0; first < x->columns; first += block)
        for (long b = 0; b < r->width; b++) {
            long end = least(first + block, x->columns);
            int exponent = 15 + part; /* with less, the scale would be a denormal number */
            if (b < tokens) {
                int found = largest_exponent(x, token + b, first, end - first);
                exponent = found > exponent ? found : exponent;
            }
            uint32_t scale = exponent == 255 ? 0x7fc00000u : (uint32_t)(exponent - part - 14) << 23;
            memcpy(scales + first / block * r->width + b, &scale, 4);
            for (long c = first; c < end; c += 64) {
                int16_t *out = to + (c * r->width + 64 * b);
                if (b < tokens && exponent < 255)
                    round_word(x, token + b, c, 268 - exponent, out);
                else
                    memset(out, 0, 64 * sizeof *out);
            }
        }
}

/* total[b] += the columns of a word times those of token b. */
INLINE void add_word(const int B, vi total[MOST_TOGETHER], const vs columns[PARTS], const int16_t *x) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) {
        vs even = even_columns(columns[p]), odd = odd_columns(columns[p]);
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            const int16_t *token = x + 64 * b + BYTES * p;
            total[b] = dot_i16(total[b], even, *(const vs *)token);
            total[b] = dot_i16(total[b], odd, *(const vs *)(token + BYTES / 2));
        }
    }
}

/* Adds the totals of a group to the sums. */
INLINE void add_group(const int B, vf sum[MOST_TOGETHER], const vi total[MOST_TOGETHER], float scale,
                      const float *scales) {
#pragma GCC unroll 8
    for (int b = 0; b < B; b++)
        sum[b] += __builtin_convertvector(total[b], vf) * (splat(scales[b]) * splat(scale));
}

/* The columns of a word, as far as its codes are in one group, are added to the totals. */
INLINE void add_codes(const int B, const int bits, vi total[MOST_TOGETHER], row_t *row, uint64_t word, int count,
                      const int16_t *x) {
    vs columns[PARTS];
    expand_codes(columns, row, bits, word, count);
    add_word(B, total, columns, x);
    row->codes += count * bits / 8;
}

/* The `count` columns of a word in which groups may end. `left` is what the group has left. */
INLINE void add_split(const int B, const int bits, const quantised_t *w, vf sum[MOST_TOGETHER], row_t *row,
                      uint64_t word, int count, int *left, const int16_t *x, const float *scales) {
    while (count) {
        vi total[MOST_TOGETHER] = {{0}};
        int taken = (int)least(count, *left);
        uint64_t part = lowest_bits(word, taken);
        add_codes(B, bits, total, row, part, taken, x);
        add_group(B, sum, total, scale_of(row->scales), scales);
        word ^= part, count -= taken, *left -= taken;
        if (!*left) row->scales++, *left = w->group;
    }
}

/* sum[b] = partial sums in lanes of row r of W times token b, for B tokens. `in_block`: the words of a
 * group; 0 if groups may end within words. */
INLINE void dots_codes(const int B, const int bits, const int in_block, const quantised_t *w, long r,
                       const rounded_t *inputs, vf sum[MOST_TOGETHER]) {
    const mask_t *mask = &w->mask;
    const int16_t *x = inputs->x;
    const float *scales = inputs->scales;
    const uint8_t *word_bytes = mask->bytes + r * mask->stride;
    row_t row = row_of(w, r);
    long words = mask->columns / 64, rest = mask->columns % 64;
    int codes = 64 * mask->n / mask->m, left = w->group;
    uint64_t word;
    vf s[MOST_TOGETHER] = {{0}};
    for (; in_block && words >= in_block; words -= in_block, scales += B) {
        vi total[MOST_TOGETHER] = {{0}};
        __builtin_prefetch(row.codes + 2048);
#pragma GCC unroll 4
        for (int k = 0; k < in_block; k++, word_bytes += 8, x += 64 * B) {
            memcpy(&word, word_bytes, 8);
            add_codes(B, bits, total, &row, word, codes, x);
        }
        add_group(B, s, total, scale_of(row.scales++), scales);
    }
    for (; words; words--, word_bytes += 8, x += 64 * B) {
        memcpy(&word, word_bytes, 8);
        __builtin_prefetch(row.codes + 2048);
        add_split(B, bits, w, s, &row, word, codes, &left, x, scales);
        if (!in_block) scales += B;
    }
    if (rest) {
        word = mask_bits(mask, r, mask->columns - rest, rest);
        add_split(B, bits, w, s, &row, word, (int)rest * mask->n / mask->m, &left, x, scales);
    }
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) sum[b] = s[b];
}

typedef void dots_codes_fn(const quantised_t *, long, const rounded_t *, vf[MOST_TOGETHER]);
#define DOTS_CODES(B, BITS, IN_BLOCK)                                                                   \
    static void dots_int##BITS##_##B##_##IN_BLOCK(const quantised_t *w, long r, const rounded_t *x,     \
                                                  vf sum[MOST_TOGETHER]) {                              \
        dots_codes(B, BITS, IN_BLOCK, w, r, x, sum);                                                    \
    }
#define DOTS_CODES_OF(B, BITS) \
    DOTS_CODES(B, BITS, 0) DOTS_CODES(B, BITS, 1) DOTS_CODES(B, BITS, 2) DOTS_CODES(B, BITS, 4)
DOTS_CODES_OF(1, 8) DOTS_CODES_OF(2, 8) DOTS_CODES_OF(4, 8) DOTS_CODES_OF(8, 8)
DOTS_CODES_OF(1, 4) DOTS_CODES_OF(2, 4) DOTS_CODES_OF(4, 4) DOTS_CODES_OF(8, 4)

static dots_codes_fn *dots_codes_for(int width, int bits, int in_block) {
#define ROW(B, BITS)                                                                                \
    {dots_int##BITS##_##B##_0, dots_int##BITS##_##B##_1, dots_int##BITS##_##B##_2, dots_int##BITS##_##B##_4}
    static dots_codes_fn *const table[2][4][4] = {{ROW(1, 4), ROW(2, 4), ROW(4, 4), ROW(8, 4)},
                                                  {ROW(1, 8), ROW(2, 8), ROW(4, 8), ROW(8, 8)}};
#undef ROW
    return table[bits == 8][__builtin_ctz(width)][in_block == 4 ? 3 : in_block];
}

/* The words of a group: 1, 2 or 4, or 0 for anything else. */
static int words_of_group(const quantised_t *w) {
    int codes = 64 * w->mask.n / w->mask.m, words = w->group / codes;
    return words * codes == w->group && (words == 1 || words == 2 || words == 4) ? words : 0;
}

/* The products for at most MOST_TOGETHER tokens from `token` on. All parts have codes of one format. */
static int linear_quantised(const matrix_t *x, long token, const part_t *parts, int count, int check, int threads) {
    const quantised_t *any = &parts->codes;
    long d_in = x->columns, tokens = least(MOST_TOGETHER, x->rows - token);
    long tiles = count_tiles(parts, count), ranks = count_ranks(parts, count);
    int in_block = words_of_group(any), width = tokens == 1 ? 1 : tokens == 2 ? 2 : tokens <= 4 ? 4 : 8;
    dots_codes_fn *dots = dots_codes_for(width, any->bits, in_block);
    rounded_t inputs = {NULL, NULL, width, in_block ? in_block : 1};
    long words = ceil_div(d_in, 64), elements = words * 64 * width;
    /* An adapter reads the inputs as they are, so it needs them in its own layout. */
    int pairs = STREAMS_BF16 && x->dtype == BF16;
    long padded = ranks ? padded_vectors(d_in, pairs) * width * VL : 0;
    long narrow_size = narrow_before(parts, parts + count, width);
    float *memory = scratch(padded + elements / 2 + words * width + narrow_size);
    if (!memory) return NO_MEMORY;
    float *rounded = memory + padded, *scales = rounded + elements / 2, *narrow = scales + words * width;
    branch_t branch = branch_for(width, x->dtype);
    if (ranks) pad_tokens(x, token, tokens, width, pairs, memory);
    clear_narrow(parts, count, narrow, width);
    inputs.x = (int16_t *)rounded;
    inputs.scales = scales;
    round_inputs(x, token, tokens, &inputs, (int16_t *)rounded, scales, any->bits);
    int valid = 1;
#pragma omp parallel num_threads(threads) reduction(& : valid)
    {
        if (ranks) {
#pragma omp for schedule(static)
            for (long i = 0; i < ranks; i++) down_rank(&branch, parts, i, d_in, memory, narrow, width);
        }
#pragma omp for schedule(static)
        for (long i = 0; i < tiles; i++) {
            long tile = i;
            const part_t *part = part_of_tile(parts, &tile);
            const void *bias = part->weight.bias;
            long row = tile * VL, rows = least(VL, part->y.columns - row);
            vf by_token[MOST_B][VL], sum[MOST_TOGETHER];
            if (check && !rows_are_valid(&part->codes.mask, row, rows)) {
                valid = 0;
                continue;
            }
            for (long i = 0; i < VL; i++) {
                if (i < rows) dots(&part->codes, row + i, &inputs, sum);
                for (long b = 0; b < width; b++) by_token[b][i] = i < rows ? sum[b] : zero();
            }
            vf added = bias ? load_part(at(bias, row, x->dtype), rows, x->dtype) : zero();
            if (part->adapter.rank)
                branch.up(&part->adapter, row, rows, narrow + narrow_before(parts, part, width), by_token);
            for (long b = 0; b < tokens; b++)
                store_part((void *)element(&part->y, token + b, row), sums(by_token[b]) + added, rows, x->dtype);
        }
    }
    give_back(memory);
    return valid ? OK : BAD_FORWARD_MASK;
}

/* Reads the weights once for each MOST_TOGETHER tokens. */
static int linear_quantised_streamed(const matrix_t *x, const part_t *parts, int count, int check, int threads) {
    int failed = OK;
    for (long token = 0; !failed && token < x->rows; token += MOST_TOGETHER)
        failed = linear_quantised(x, token, parts, count, check, threads);
    return failed;
}

/* One dense row, with zeros at pruned positions. */
static void expand_row_quantised(const quantised_t *w, const matrix_t *dense, long r) {
    row_t row = row_of(w, r);
    int in_group = w->group;
    for (long c = 0; c < w->mask.columns; c += 64) {
        long columns = least(64, w->mask.columns - c);
        uint64_t word = mask_bits(&w->mask, r, c, columns);
        int8_t codes[64];
        float values[64] = {0};
        for (int left = __builtin_popcountll(word); left;) {
            int count = (int)least(left, in_group);
            uint64_t part = lowest_bits(word, count);
            float scale = scale_of(row.scales) * (w->bits == 4 ? 0x1p-4f : 1);
            vs v[PARTS];
            expand_codes(v, &row, w->bits, part, count);
            memcpy(codes, v, sizeof codes);
            /* The codes of other groups are zeros here. */
            for (int k = 0; k < 64; k++) values[k] += codes[k] * scale;
            row.codes += count * w->bits / 8;
            left -= count, in_group -= count, word ^= part;
            if (!in_group) row.scales++, in_group = w->group;
        }
        for (long s = 0; s < columns; s += VL)
            store_part((void *)element(dense, r, c + s), *(vf_any *)(values + s), columns - s, dense->dtype);
    }
}
