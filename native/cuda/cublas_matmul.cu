/* What cuBLAS leaves to do of a matmul of many rows, a block for each. Before it: x is rounded into scratch, and the
 * bias is written where the product will be added to it. After it: f16 rows get back their scale.
 *
 * f16 holds numbers up to 65,504, and small ones with few bits. A row whose largest number is near either end is
 * multiplied by a power of two, which follows the row in scratch, in a line of its own. */
#include "product.cuh"

DEVICE uint32_t pack(struct bf16, float low, float high) { return pack_bf16(low, high); }
DEVICE uint32_t pack(struct f16, float low, float high) { return pack_f16(low, high); }

DEVICE float scale_for(struct bf16, const float *, int64_t) { return 1.0f; }
DEVICE float scale_for(struct f16, const float *x, int64_t k)
{
    float most = 0.0f;
    for (int64_t i = threadIdx.x; i < k; i += blockDim.x)
        most = fmaxf(most, fabsf(x[i]));
    most = block_max(most);
    bool fits = most == 0.0f || (most >= 0x1p-6f && most <= 0x1p15f);
    return fits ? 1.0f : ldexpf(1.0f, -max_of(ilogbf(most), -96)); /* no more, so that no bias overflows */
}

DEVICE char *rounded_row(const struct team &team, int64_t row) { return team.scratch + row * team.share; }
DEVICE float *scale_of_row(const struct product &p, const struct team &team, int64_t row)
{
    return (float *)(rounded_row(team, row) + row_bytes<struct f16>(p.k));
}

DEVICE void put_bias(const struct product &p, int64_t row, float scale)
{
    for (int64_t i = threadIdx.x; p.bias && i < p.out_width; i += blockDim.x)
        p.out[row * p.out_stride + i] = p.bias[i] * scale;
}

/* Returns the scale of the row. */
template <class T> DEVICE float round_row(const struct product &p, const struct team &team, int64_t row)
{
    enum { EACH = LINE / sizeof(T) };
    const float *x = row_of(p, row);
    uint4 *lines = (uint4 *)rounded_row(team, row);
    float scale = scale_for(T(), x, p.k);
    for (int64_t i = threadIdx.x; i * EACH < p.k; i += blockDim.x) {
        float eight[EACH];
        load_x<EACH>(x + i * EACH, p.k - i * EACH, eight);
        uint32_t pairs[EACH / 2];
#pragma unroll
        for (int j = 0; j < EACH / 2; j++)
            pairs[j] = pack(T(), eight[2 * j] * scale, eight[2 * j + 1] * scale);
        lines[i] = {pairs[0], pairs[1], pairs[2], pairs[3]};
    }
    put_bias(p, row, scale);
    return scale;
}

KERNEL(matmul_bias, matmul, MAX_THREADS)
{
    for (int64_t row = blockIdx.x; row < *op.rows; row += gridDim.x)
        put_bias(product_of(op), row, 1.0f);
}

KERNEL(matmul_round_bf16, matmul, MAX_THREADS)
{
    for (int64_t row = blockIdx.x; row < *op.rows; row += gridDim.x)
        round_row<struct bf16>(product_of(op), team, row);
}

KERNEL(matmul_round_f16, matmul, MAX_THREADS)
{
    struct product p = product_of(op);
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        float scale = round_row<struct f16>(p, team, row);
        if (threadIdx.x == 0)
            *scale_of_row(p, team, row) = scale;
    }
}

KERNEL(matmul_unscale_f16, matmul, MAX_THREADS)
{
    struct product p = product_of(op);
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        float scale = *scale_of_row(p, team, row);
        for (int64_t i = threadIdx.x; scale != 1.0f && i < p.out_width; i += blockDim.x)
            p.out[row * p.out_stride + i] /= scale;
    }
}
