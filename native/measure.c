/* What the machine can do at best, measured in the same process as what is held against it. */
#include "amx.h"
#include "quantised.h"
#include "tile.h"

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

enum { CHAINS = ACCUMULATORS }; /* independent sums: more than a unit has in flight */

/* Not static: a compiler must take them for unknown, and what is written for needed. */
float measured_weights[2 * LANES], measured_sums[LANES];

/* The multiply-adds of a tile with everything in registers. */
INLINE void multiply_rounds(int64_t rounds, const enum line kind)
{
    vec acc[CHAINS], x = vec_set(1e-9f);
#pragma GCC unroll 24
    for (int i = 0; i < CHAINS; i++)
        acc[i] = vec_set((float)i);
    for (int64_t n = 0; n < rounds; n++) {
        vec w = vec_load(measured_weights + (n & 1) * LANES);
#pragma GCC unroll 24
        for (int i = 0; i < CHAINS; i++)
            acc[i] = multiply_add(w, x, acc[i], kind);
    }
    for (int i = 1; i < CHAINS; i++)
        acc[0] = vec_add(acc[0], acc[i]);
    vec_store(measured_sums, acc[0]);
}

/* The same of the integer dots that quantised weights take. */
INLINE void dot_rounds(int64_t rounds)
{
    ivec acc[CHAINS / 2];
    const int32_t x[2] = {0x01010101, 0x01010101};
#pragma GCC unroll 24
    for (int i = 0; i < CHAINS / 2; i++)
        acc[i] = ivec_set(i);
    for (int64_t n = 0; n < rounds; n++) {
        ivec w = ivec_load(measured_weights + (n & 1) * LANES);
#pragma GCC unroll 24
        for (int i = 0; i < CHAINS / 2; i++)
            acc[i] = ivec_dot(acc[i], w, x);
    }
    for (int i = 1; i < CHAINS / 2; i++)
        acc[0] = ivec_add(acc[0], acc[i]);
    vec_store(measured_sums, ivec_to_vec(acc[0]));
}

int64_t multiply_in_registers(int32_t dtype, int64_t rounds, int32_t threads)
{
#ifdef __AMX_BF16__
    if (dtype == DTYPE_BF16) {
        int64_t products = 0;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : products)
#endif
        for (int32_t t = 0; t < threads; t++) {
            amx_begin();
            products += amx_in_registers(rounds);
            amx_end();
        }
        return products * 2;
    }
#endif
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1)
#endif
    for (int32_t t = 0; t < threads; t++) {
        if (is_quantised(dtype))
            dot_rounds(rounds);
        else if (dtype == DTYPE_BF16)
            multiply_rounds(rounds, LINE_BF16);
        else
            multiply_rounds(rounds, LINE_F32);
    }
    if (is_quantised(dtype))
        return rounds * threads * (CHAINS / 2) * LANES * 4 * 2;
    int64_t inputs = dtype == DTYPE_BF16 && BF16_FLOATS == 1 ? 2 : 1;
    return rounds * threads * CHAINS * LANES * inputs * 2;
}
