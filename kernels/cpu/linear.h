/* The weight of a product, for linear.c and linear_few.c. */
#ifndef SLOPE_LINEAR_H
#define SLOPE_LINEAR_H

#include "masks.h"
#include "panels.h"
#include "quantised.h"

typedef struct {
    matrix_t values; /* (d_out, d_in * N / M) */
    mask_t mask;
    const void *bias; /* NULL or (d_out,), in the dtype of the values */
} weight_t;

/* A low-rank branch beside the weight, in the dtype of the inputs. rank 0: there is none. */
typedef struct {
    const void *a; /* (rank, d_in) */
    const void *b; /* (d_out, rank), with the scale in it */
    long rank;
} adapter_t;

/* One of the products with the same inputs that are computed together. A quantised weight is in
 * `codes`, and `weight` has only its bias. */
typedef struct {
    weight_t weight;
    quantised_t codes;
    adapter_t adapter;
    matrix_t y; /* (tokens, d_out) */
} part_t;

/* The part that has the `tile`-th of the tiles of VL rows of all parts. `tile` becomes its number in
 * the part. */
INLINE const part_t *part_of_tile(const part_t *parts, long *tile) {
    for (long tiles; *tile >= (tiles = ceil_div(parts->y.columns, VL)); parts++) *tile -= tiles;
    return parts;
}
INLINE long count_tiles(const part_t *parts, int count) {
    long tiles = 0;
    for (int k = 0; k < count; k++) tiles += ceil_div(parts[k].y.columns, VL);
    return tiles;
}

#endif
