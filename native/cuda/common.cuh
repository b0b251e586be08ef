/* What every kernel includes: the ABI, the hardware's own instructions or their emulation, types, layouts, and sums
 * across a warp and a block.
 *
 * A kernel takes the struct of its op, as a C function does, and the team it works in. It reads how many rows there are
 * from the step: a launch may have more blocks than there is work, so that one recorded launch serves every step. */
#ifndef COMMON_CUH
#define COMMON_CUH

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "abi.h"
#include "launch.h"

struct team {
    struct control *control;
    char *scratch;
    int64_t share; /* bytes of scratch for each block, or for each piece of work */
};

#ifdef __CUDACC__
#include "hardware.cuh"
#else
#include "emulation.h"
#endif

/* Which block of a launch this is, or of a stage of a persistent kernel (persistent.cu), of as many threads: further ones
 * take no part. */
struct block {
    struct { unsigned x, y, z; } index, grid;
    unsigned threads;
};
DEVICE struct block launched_block()
{
    return {{blockIdx.x, blockIdx.y, blockIdx.z}, {gridDim.x, gridDim.y, gridDim.z}, blockDim.x};
}

/* KERNEL: what a block does; an entry of its own starts it, or in a persistent kernel, whoever calls it. SHARED: memory
 * for the threads of a block; the stages of a persistent kernel have the same in turns, each when all threads are done
 * with what it was before. */
#define FUNCTION(name, type)                                                                             \
    DEVICE void name([[maybe_unused]] const struct type &op, [[maybe_unused]] const struct team &team,   \
                     [[maybe_unused]] const struct block &block)
#ifdef PERSISTENT
#define KERNEL(name, type, threads) FUNCTION(name, type)
#define SHARED(name, ...)                                                                                \
    static_assert(sizeof(__VA_ARGS__) <= sizeof shared_by_stages, "more than stages have");              \
    sync(block);                                                                                         \
    __VA_ARGS__ &name = *(__VA_ARGS__ *)shared_by_stages
__shared__ uint4 shared_by_stages[(36 << 10) / LINE];
DEVICE void sync(const struct block &block) { wait_for_threads(block.threads); }
#else
#define KERNEL(name, type, threads)                                                                      \
    FUNCTION(name##_block, type);                                                                        \
    ENTRY(name, type, threads) { name##_block(op, team, launched_block()); }                             \
    FUNCTION(name##_block, type)
#define SHARED(name, ...) __shared__ __VA_ARGS__ name
DEVICE void sync(const struct block &) { __syncthreads(); }
#endif

/* Storage types, and what they hold as a float. */
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

DEVICE float to_float(float x) { return x; }
DEVICE float low_bf16(uint32_t pair) { return bits_to_float(pair << 16); }
DEVICE float high_bf16(uint32_t pair) { return bits_to_float(pair & 0xffff0000u); }
DEVICE float to_float(struct bf16 x) { return low_bf16(x.bits); }
DEVICE float to_float(struct f16 x) { return f16_to_f32(x.bits); }
DEVICE float to_float(int8_t x) { return (float)x; }
DEVICE void from_float(float x, float &to) { to = x; }
DEVICE void from_float(float x, struct bf16 &to) { to.bits = (uint16_t)pack_bf16(x, 0.0f); }
DEVICE void from_float(float x, struct f16 &to) { to.bits = (uint16_t)pack_f16(x, 0.0f); }
DEVICE void from_float(float x, int8_t &to) { to = (int8_t)rintf(x); }

/* Layouts on a GPU. A matrix [n, k] is row-major, its rows padded with zeros to whole lines. A cache is
 * [kv_pages][kv_head][K, V][PAGE], a position head_dim numbers padded to whole lines; i8 has after all pages
 * [kv_pages][kv_head][K, V][PAGE] f32, the scales. */
DEVICE int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
template <class T> DEVICE int64_t row_bytes(int64_t width) { return round_up(width * (int64_t)sizeof(T), LINE); }
DEVICE int page_entry(int page, int sink_pages, int ring_pages)
{
    return ring_pages == 0 || page < sink_pages ? page : sink_pages + (page - sink_pages) % ring_pages;
}

/* A line of numbers as floats. */
template <class T> struct per_line { enum { COUNT = LINE / sizeof(T) }; };
template <class T> DEVICE void widen_line(uint4 bits, float *out)
{
    T line[per_line<T>::COUNT];
    memcpy(line, &bits, LINE);
#pragma unroll
    for (int i = 0; i < per_line<T>::COUNT; i++)
        out[i] = to_float(line[i]);
}
template <class T> DEVICE void load_line(const void *at, float *out) { widen_line<T>(*(const uint4 *)at, out); }

DEVICE int min_of(int a, int b) { return a < b ? a : b; }
DEVICE int max_of(int a, int b) { return a > b ? a : b; }

/* Sums and maxima over the first `lanes` lanes of each group of as many, a power of two. Every lane gets the result. */
DEVICE float warp_sum(float x, int lanes = WARP)
{
    for (int step = lanes / 2; step > 0; step /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}
DEVICE float warp_max(float x, int lanes = WARP)
{
    for (int step = lanes / 2; step > 0; step /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

DEVICE int warp_most(int x)
{
    for (int step = WARP / 2; step > 0; step /= 2)
        x = max_of(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

/* Of all threads of a block, in whole warps; every thread gets the result. */
DEVICE float block_sum(float x, const struct block &block = launched_block())
{
    __shared__ float part[MAX_THREADS / WARP];
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0)
        part[threadIdx.x / WARP] = x;
    sync(block);
    float sum = 0.0f;
    for (unsigned i = 0; i < block.threads / WARP; i++)
        sum += part[i];
    sync(block);
    return sum;
}
DEVICE float block_max(float x)
{
    __shared__ float part[MAX_THREADS / WARP];
    x = warp_max(x);
    if (threadIdx.x % WARP == 0)
        part[threadIdx.x / WARP] = x;
    __syncthreads();
    float max = part[0];
    for (unsigned i = 1; i < blockDim.x / WARP; i++)
        max = fmaxf(max, part[i]);
    __syncthreads();
    return max;
}

/* The scale that rmsnorm gives to numbers of which the squares add up to so much. */
DEVICE float inverse_rms(float squares, int64_t count, float eps) { return 1.0f / sqrtf(squares / (float)count + eps); }
DEVICE float silu(float x) { return x / (1.0f + expf(-x)); }
/* Rotates a number of the first half of a head against that of the second. */
DEVICE void rotate(float first, float second, const float *angles, int64_t half, float *out)
{
    float cosine = angles[0], sine = angles[half];
    out[0] = first * cosine - second * sine;
    out[half] = second * cosine + first * sine;
}

/* Notes a failure; only the first is reported. */
DEVICE void fail(const struct team &team, int32_t status, int32_t detail)
{
    if (atomicCAS(&team.control->status, STATUS_OK, status) == STATUS_OK)
        team.control->detail = detail;
}

#endif
