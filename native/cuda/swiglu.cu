/* A thread for each number. */
#include "common.cuh"

KERNEL(swiglu, swiglu, THREADS)
{
    int64_t width = op.out_width, count = *op.rows * width;
    for (int64_t i = block.index.x * (int64_t)block.threads + threadIdx.x; i < count; i += block.grid.x * (int64_t)block.threads) {
        const float *x = op.x + i / width * op.x_stride + i % width;
        op.out[i / width * op.out_stride + i % width] = silu(x[0]) * x[width];
    }
}
