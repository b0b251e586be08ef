/* What every device's way of drawing tokens is made of: the same for C, for CUDA and for its emulation. */
#ifndef DRAWING_H
#define DRAWING_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef DEVICE /* in CUDA: what runs on a GPU */
#define DEVICE static inline
#endif

enum {
    FIRST_TRY = 64, /* tokens sorted before top_p is known to need more */
    GROWTH = 16
};

/* A number that orders by logit, equal logits by lower id. */
DEVICE uint64_t key_of(float logit, int32_t id)
{
    uint32_t bits;
    logit += 0.0f; /* −0 becomes 0: they are equal */
    memcpy(&bits, &logit, 4);
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
    return (uint64_t)bits << 32 | (uint32_t)~id;
}

DEVICE int32_t id_of(uint64_t key) { return (int32_t)~(uint32_t)key; }

/* Divides a positive logit and multiplies a negative one by `repetition`, then takes `presence` away. */
DEVICE float penalised(float logit, float repetition, float presence)
{
    logit = (logit > 0 ? logit / repetition : logit * repetition) - presence;
    return fminf(fmaxf(logit, -FLT_MAX), FLT_MAX);
}

/* A number in [0, 1): 53 bits of Philox4x32-10 (Salmon et al., 2011) with the seed as key and the index as counter. */
DEVICE double uniform(uint64_t seed, uint64_t index)
{
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    uint32_t c0 = (uint32_t)index, c1 = (uint32_t)(index >> 32), c2 = 0, c3 = 0;
    for (int round = 0; round < 10; round++) {
        uint64_t product0 = (uint64_t)0xd2511f53 * c0, product2 = (uint64_t)0xcd9e8d57 * c2;
        c0 = (uint32_t)(product2 >> 32) ^ c1 ^ key0;
        c1 = (uint32_t)product2;
        c2 = (uint32_t)(product0 >> 32) ^ c3 ^ key1;
        c3 = (uint32_t)product0;
        key0 += 0x9e3779b9;
        key1 += 0xbb67ae85;
    }
    return (double)(((uint64_t)c0 << 32 | c1) >> 11) * 0x1p-53;
}

#endif
