/* A thread for each number. */
#include "common.cuh"

KERNEL(swiglu, swiglu, THREADS)
{
    int64_t width = op.out_width, count = *op.rows * width;
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < count; i += gridDim.x * (int64_t)blockDim.x) {
        const float *x = op.x + i / width * op.x_stride + i % width;
        op.out[i / width * op.out_stride + i % width] = silu(x[0]) * x[width];
    }
}
