/* The limits of a GPU, to be timed: reading memory, and multiplying in registers. */
#include "common.cuh"

struct piece {
    const uint4 *data;
    int64_t lines, rounds;
};

/* Reads all lines, each thread every so many, and keeps nothing but what no compiler can foresee. */
KERNEL(read_memory, piece, THREADS)
{
    uint32_t all = 0;
    int64_t step = gridDim.x * (int64_t)blockDim.x;
#pragma unroll 8
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < op.lines; i += step) {
        uint4 line = op.data[i];
        all ^= line.x ^ line.y ^ line.z ^ line.w;
    }
    if (all == 0x5eed)
        *(uint32_t *)team.scratch = all;
}

/* `rounds` of 8 independent products of 16 × 8 × 16 a warp. */
KERNEL(multiply_bf16, piece, THREADS)
{
    float sum[8][4] = {};
    uint32_t a[4] = {threadIdx.x, 1, 2, 3}, b[2] = {blockIdx.x, 5};
    for (int64_t i = 0; i < op.rounds; i++)
#pragma unroll
        for (int j = 0; j < 8; j++)
            mma_bf16(sum[j], a, b);
    for (int j = 0; j < 8; j++)
        if (sum[j][0] == 0.123f)
            *(float *)team.scratch = sum[j][0];
}

/* `rounds` of 16 independent multiply-adds a thread. */
KERNEL(multiply_f32, piece, THREADS)
{
    float sum[16] = {}, a = (float)threadIdx.x, b = (float)blockIdx.x;
    for (int64_t i = 0; i < op.rounds; i++)
#pragma unroll
        for (int j = 0; j < 16; j++)
            sum[j] = fmaf(sum[j], a, b);
    for (int j = 0; j < 16; j++)
        if (sum[j] == 0.123f)
            *(float *)team.scratch = sum[j];
}
