/* Working memory. */
#ifndef SLOPE_SCRATCH_H
#define SLOPE_SCRATCH_H

#include "vectors.h"

/* Blocks are kept from call to call, since fresh pages from the kernel cost as much as a
 * small product. A few slots, each with a lock of its own, are enough for a call in each of
 * a few threads; more than that, or more than KEPT_BYTES, comes from malloc and goes back. */
#define SLOTS 16
#define KEPT_BYTES (64l << 20)
static struct {
    int busy;
    long bytes;
    void *memory;
} blocks[SLOTS];

/* Room for `count` floats and a vector more, on a cache line of its own; NULL if there is
 * none. Its contents are anything. */
static float *scratch(long count) {
    long bytes = (count + VL) * (long)sizeof(float), best = -1;
    for (long i = 0; i < SLOTS; i++) { /* the smallest that is large enough, else the largest */
        if (__atomic_exchange_n(&blocks[i].busy, 1, __ATOMIC_ACQUIRE)) continue;
        long worse = i;
        if (best < 0 || (blocks[i].bytes >= bytes ? blocks[best].bytes < bytes || blocks[i].bytes < blocks[best].bytes
                                                 : blocks[i].bytes > blocks[best].bytes)) {
            worse = best;
            best = i;
        }
        if (worse >= 0) __atomic_store_n(&blocks[worse].busy, 0, __ATOMIC_RELEASE);
    }
    if (best >= 0 && blocks[best].bytes >= bytes) return blocks[best].memory;
    void *memory = NULL;
    if (posix_memalign(&memory, 64, bytes)) memory = NULL;
    if (best < 0) return memory;
    if (memory && bytes <= KEPT_BYTES) {
        free(blocks[best].memory);
        __atomic_store_n(&blocks[best].memory, memory, __ATOMIC_RELAXED);
        blocks[best].bytes = bytes;
    } else {
        __atomic_store_n(&blocks[best].busy, 0, __ATOMIC_RELEASE);
    }
    return memory;
}

static void give_back(void *memory) {
    for (long i = 0; memory && i < SLOTS; i++)
        if (__atomic_load_n(&blocks[i].memory, __ATOMIC_RELAXED) == memory) {
            __atomic_store_n(&blocks[i].busy, 0, __ATOMIC_RELEASE);
            return;
        }
    free(memory);
}

#endif
