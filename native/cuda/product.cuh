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
    int dtype, group; /* of the matrix; inputs that share a scale of a quantised one */
    const float *norm; /* of rows of x that are normed on the way, what their columns are multiplied by */
    float eps;
};

/* What a product of few rows is fused with: whether rows of x are NORMED on the way; how many sums make an output, the
 * second with a row of the matrix p.out_width further on. */
struct alone { enum { NORMED = 0, OUTPUTS = 1 }; };
struct added { enum { NORMED = 0, OUTPUTS = 1 }; };
struct normed { enum { NORMED = 1, OUTPUTS = 1 }; };
struct normed_gated { enum { NORMED = 1, OUTPUTS = 2 }; };

DEVICE struct product product_of(const struct matmul &op)
{
    return {NULL, op.x, (const char *)op.weight, op.bias, op.out, *op.rows, op.x_width, op.x_stride, op.out_width,
            op.out_stride, op.weight_dtype, op.weight_group, NULL, 0.0f};
}
DEVICE struct product product_of(const struct logits &op)
{
    return {op.row_index, op.x, (const char *)op.weight, NULL, op.out, *op.rows, op.x_width, op.x_stride, op.out_width,
            op.out_stride, op.weight_dtype, op.weight_group, NULL, 0.0f};
}
DEVICE const float *row_of(const struct product &p, int64_t row)
{
    return p.x + (p.row_index ? p.row_index[row] : row) * p.x_stride;
}
DEVICE float biased(const struct product &p, int64_t column, float sum) { return p.bias ? sum + p.bias[column] : sum; }
DEVICE void put(const struct product &p, int64_t row, int64_t column, float sum)
{
    p.out[row * p.out_stride + column] = biased(p, column, sum);
}
DEVICE void put(struct alone, const struct product &p, int64_t row, int64_t column, const float *sum)
{
    put(p, row, column, sum[0]);
}
DEVICE void put(struct normed, const struct product &p, int64_t row, int64_t column, const float *sum)
{
    put(p, row, column, sum[0]);
}
DEVICE void put(struct added, const struct product &p, int64_t row, int64_t column, const float *sum)
{
    p.out[row * p.out_stride + column] += biased(p, column, sum[0]);
}
DEVICE void put(struct normed_gated, const struct product &p, int64_t row, int64_t column, const float *sum)
{
    float up = biased(p, column + p.out_width, sum[1]);
    p.out[row * p.out_stride + column] = silu(biased(p, column, sum[0])) * up;
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
