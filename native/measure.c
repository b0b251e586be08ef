/* What the machine can do at best, measured in the same process as what is held against it. */
#include "native.h"

/* The xor of all 8-byte words, read as `streams` parallel runs: CPUs differ in how many their prefetchers like. */
static uint64_t read_streams(const uint64_t *words, int64_t count, int64_t streams)
{
    enum { WIDTH = 16 }; /* words added up side by side: two cache lines */
    uint64_t sums[WIDTH] = {0}, all = 0;
    int64_t run = count / streams / WIDTH * WIDTH;
    for (int64_t i = 0; i < run; i += WIDTH)
        for (int64_t s = 0; s < streams; s++)
            for (int w = 0; w < WIDTH; w++)
                sums[w] ^= words[s * run + i + w];
    for (int w = 0; w < WIDTH; w++)
        all ^= sums[w];
    return all;
}

uint64_t read_memory(const void *data, int64_t bytes, int32_t threads, int32_t streams)
{
    uint64_t all = 0;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(^ : all)
#endif
    for (int32_t t = 0; t < threads; t++) {
        struct range mine = share_of(bytes / 64, t, threads);
        all ^= read_streams((const uint64_t *)data + mine.begin * 8, (mine.end - mine.begin) * 8, streams);
    }
    return all;
}
