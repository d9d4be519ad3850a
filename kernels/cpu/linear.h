/* The weight of a product, for linear.c and linear_few.c. */
#ifndef SLOPE_LINEAR_H
#define SLOPE_LINEAR_H

#include "masks.h"
#include "panels.h"

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

#endif
