/* The weight of a product, for both ways to compute one. */
#ifndef SLOPE_LINEAR_H
#define SLOPE_LINEAR_H

#include "masks.h"
#include "panels.h"

typedef struct {
    matrix_t values; /* (d_out, d_in * N / M) */
    mask_t mask;
    const void *bias; /* or NULL, dtype of the values */
} weight_t;

#endif
