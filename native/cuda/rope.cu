/* A thread for each angle, and for each pair of numbers that is rotated. */
#include "common.cuh"

KERNEL(rope_angles, rope_angles, THREADS)
{
    int64_t half = op.angles_width / 2, count = *op.rows * half;
    for (int64_t i = block.index.x * (int64_t)block.threads + threadIdx.x; i < count; i += block.grid.x * (int64_t)block.threads) {
        int64_t row = i / half, j = i % half;
        double angle = (double)min_of(op.pos[row], op.last_pos) * op.inv_freq[j];
        float *angles = op.angles + row * op.angles_width;
        angles[j] = (float)(cos(angle) * (double)op.scaling);
        angles[half + j] = (float)(sin(angle) * (double)op.scaling);
    }
}

KERNEL(rope, rope, THREADS)
{
    int64_t head_dim = op.angles_width, half = head_dim / 2, pairs = op.x_width / 2, count = *op.rows * pairs;
    for (int64_t i = block.index.x * (int64_t)block.threads + threadIdx.x; i < count; i += block.grid.x * (int64_t)block.threads) {
        int64_t row = i / pairs, column = i % pairs / half * head_dim + i % half;
        const float *x = op.x + row * op.x_stride + column;
        rotate(x[0], x[half], op.angles + row * head_dim + i % half, half, op.out + row * op.out_stride + column);
    }
}
