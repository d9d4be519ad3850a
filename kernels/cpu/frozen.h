/* A product of a frozen weight, between frozen.cpp and engine.c. */
#ifndef SLOPE_FROZEN_H
#define SLOPE_FROZEN_H

#include <stdint.h>

#define FEWEST_ROWS 4 /* fewest rows of a weight of values for slope_stream */

/* y = x W^T + bias + (x A^T) B^T */
typedef struct {
    const void *values;   /* (d_out, d_in * N / M), or their codes */
    const void *scales;   /* of the codes; NULL for values */
    const uint8_t *mask;  /* it was checked when the weight was made */
    const void *bias;     /* (d_out,) or NULL */
    const void *a, *b;    /* (rank, d_in) and (d_out, rank), with the scale in b; NULL if rank is 0 */
    long rank, d_out;
    void *y;              /* (tokens, d_out) */
} frozen_t;

#endif
