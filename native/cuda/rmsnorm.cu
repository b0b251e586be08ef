/* A block for each vector. */
#include "common.cuh"

DEVICE void normalise(const float *x, const float *weight, float *out, int width, float eps,
                      const struct block &block)
{
    float sum = 0.0f;
    for (int i = threadIdx.x; i < width; i += block.threads)
        sum += x[i] * x[i];
    float scale = inverse_rms(block_sum(sum, block), width, eps);
    for (int i = threadIdx.x; i < width; i += block.threads)
        out[i] = x[i] * scale * weight[i];
}

KERNEL(rmsnorm, rmsnorm, MAX_THREADS)
{
    for (int i = block.index.x; i < *op.rows * op.groups; i += block.grid.x) {
        int64_t row = i / op.groups, column = i % op.groups * (int64_t)op.weight_width;
        normalise(op.x + row * op.x_stride + column, op.weight, op.out + row * op.out_stride + column, op.weight_width,
                  op.eps, block);
    }
}

KERNEL(add_rmsnorm, add_rmsnorm, MAX_THREADS)
{
    for (int64_t row = block.index.x; row < *op.rows; row += block.grid.x) {
        float *x = op.x + row * op.x_stride;
        for (int i = threadIdx.x; i < op.weight_width; i += block.threads)
            x[i] += op.delta[row * op.delta_stride + i];
        normalise(x, op.weight, op.out + row * op.out_stride, op.weight_width, op.eps, block);
    }
}
