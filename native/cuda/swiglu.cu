/* A thread for each number. */
#include "common.cuh"

KERNEL(swiglu, swiglu, THREADS)
{
    int64_t width = op.out_width, count = *op.rows * width;
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < count; i += gridDim.x * (int64_t)blockDim.x) {
        const float *x = op.x + i / width * op.x_stride + i % width;
        float gate = x[0], up = x[width];
        op.out[i / width * op.out_stride + i % width] = gate / (1.0f + expf(-gate)) * up;
    }
}
