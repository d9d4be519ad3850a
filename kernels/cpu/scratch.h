/* Working memory. */
#ifndef SLOPE_SCRATCH_H
#define SLOPE_SCRATCH_H

#include "vectors.h"

/* Blocks of memory are kept from call to call: new pages from the kernel cost as much as a small
 * product. Each slot has its own lock. If all slots are busy, or a block is larger than
 * KEPT_BYTES, the memory comes from malloc and is freed after use. */
#define SLOTS 16
#define KEPT_BYTES (64l << 20)
static struct {
    int busy;
    long bytes;
    void *memory;
} blocks[SLOTS];

/* Uninitialized memory for `count` floats and one more vector, aligned to a cache line, or
 * NULL. give_back() returns it. */
static float *scratch(long count) {
    long bytes = (count + VL) * (long)sizeof(float), best = -1;
    for (long i = 0; i < SLOTS; i++) { /* the smallest large enough, or the largest */
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
