/* A product of rows with a matrix: what every way to multiply starts from. */
#ifndef PRODUCT_CUH
#define PRODUCT_CUH

#include "common.cuh"

struct product {
    const int32_t *row_index; /* which rows of x; NULL: all, in order */
    const float *x;
    const char *weight;
    const float *bias;
    float *out;
    int64_t rows, k, x_stride, out_width, out_stride;
    int group; /* inputs that share a scale of a quantised matrix */
};

DEVICE struct product product_of(const struct matmul &op)
{
    return {NULL, op.x, (const char *)op.weight, op.bias, op.out, *op.rows, op.x_width, op.x_stride, op.out_width,
            op.out_stride, op.weight_group};
}
DEVICE struct product product_of(const struct logits &op)
{
    return {op.row_index, op.x, (const char *)op.weight, NULL, op.out, *op.rows, op.x_width, op.x_stride, op.out_width,
            op.out_stride, op.weight_group};
}
DEVICE const float *row_of(const struct product &p, int64_t row)
{
    return p.x + (p.row_index ? p.row_index[row] : row) * p.x_stride;
}
DEVICE void put(const struct product &p, int64_t row, int64_t column, float sum)
{
    p.out[row * p.out_stride + column] = p.bias ? sum + p.bias[column] : sum;
}

/* Numbers of x from the start of a line on. */
template <int COUNT> DEVICE void load_x(const float *x, float *out)
{
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
        float4 four = *(const float4 *)(x + i);
        out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
    }
}
/* Of any address; what lies behind the end of x counts as 0. */
template <int COUNT> DEVICE void load_x(const float *x, int64_t left, float *out)
{
    if (left >= COUNT && (uintptr_t)x % LINE == 0) {
        load_x<COUNT>(x, out);
        return;
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        out[i] = i < left ? x[i] : 0.0f;
}

#endif
