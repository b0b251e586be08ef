/* A matrix times few rows or many. Few wait for memory: a warp reads a row of the matrix in whole lines and multiplies
 * it with all of them. Many are cut into tiles: in float32 by ordinary multiply-adds, in bf16 by the tensor cores,
 * which see x rounded to bf16, too. Sums are float32. */
#include "common.cuh"

struct product {
    const int32_t *row_index; /* which rows of x; NULL: all, in order */
    const float *x;
    const char *weight;
    const float *bias;
    float *out;
    int64_t rows, k, x_stride, out_width, out_stride;
};

DEVICE struct product product_of(const struct matmul &op)
{
    return {NULL, op.x, (const char *)op.weight, op.bias, op.out, *op.rows, op.x_width, op.x_stride, op.out_width,
            op.out_stride};
}
DEVICE struct product product_of(const struct logits &op)
{
    return {op.row_index, op.x, (const char *)op.weight, NULL, op.out, *op.rows, op.x_width, op.x_stride, op.out_width,
            op.out_stride};
}
DEVICE const float *row_of(const struct product &p, int64_t row)
{
    return p.x + (p.row_index ? p.row_index[row] : row) * p.x_stride;
}
DEVICE void put(const struct product &p, int64_t row, int64_t column, float sum)
{
    p.out[row * p.out_stride + column] = p.bias ? sum + p.bias[column] : sum;
}

/* A line's worth of x; what lies behind its end counts as 0. */
template <int COUNT> DEVICE void load_x(const float *x, int64_t left, float *out)
{
    if (left >= COUNT && (uintptr_t)x % LINE == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            float4 four = *(const float4 *)(x + i);
            out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        out[i] = i < left ? x[i] : 0.0f;
}

/* Some inputs, one line of a row of the matrix, times all rows. */
template <class T, int ROWS> DEVICE void add_line(const struct product &p, uint4 bits, int64_t at, float *sum)
{
    enum { COUNT = per_line<T>::COUNT };
    float w[COUNT];
    widen_line<T>(bits, w);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (r >= p.rows)
            break;
        float x[COUNT];
        load_x<COUNT>(row_of(p, r) + at, p.k - at, x);
#pragma unroll
        for (int j = 0; j < COUNT; j++)
            sum[r] = fmaf(x[j], w[j], sum[r]);
    }
}

/* One output of up to ROWS rows by a warp: the order of the sums is the same for any number of rows. Several lines of the
 * matrix are on their way at once. */
template <class T, int ROWS> DEVICE void multiply_few(const struct product &p)
{
    enum { COUNT = per_line<T>::COUNT, STEP = WARP * COUNT, TOGETHER = 4 };
    int64_t column = blockIdx.x * (int64_t)(blockDim.x / WARP) + threadIdx.x / WARP;
    int lane = threadIdx.x % WARP;
    if (column >= p.out_width)
        return;
    const char *weight = p.weight + column * row_bytes<T>(p.k);
    float sum[ROWS] = {};
    for (int64_t i = lane * COUNT; i < p.k; i += TOGETHER * STEP) {
        uint4 line[TOGETHER];
#pragma unroll
        for (int t = 0; t < TOGETHER; t++)
            if (i + t * STEP < p.k)
                line[t] = *(const uint4 *)(weight + (i + t * STEP) * (int64_t)sizeof(T));
#pragma unroll
        for (int t = 0; t < TOGETHER; t++)
            if (i + t * STEP < p.k)
                add_line<T, ROWS>(p, line[t], i + t * STEP, sum);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float total = warp_sum(sum[r]);
        if (lane == 0 && r < p.rows)
            put(p, r, column, total);
    }
}

/* A tile of TILE × TILE outputs, each thread 4 × 4 of them: rows and columns that are 16 apart. */
template <class T> DEVICE void multiply_tile(const struct product &p)
{
    enum { DEPTH = 16, SIDE = 16, EACH = TILE / SIDE };
    __shared__ float x[DEPTH][TILE + 1], w[DEPTH][TILE + 1];
    int64_t first_row = blockIdx.y * (int64_t)TILE, first_column = blockIdx.x * (int64_t)TILE;
    if (first_row >= p.rows)
        return;
    int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    float sum[EACH][EACH] = {};
    for (int64_t k = 0; k < p.k; k += DEPTH) {
        for (int i = threadIdx.x; i < TILE * DEPTH; i += THREADS) {
            int64_t at = k + i % DEPTH, row = first_row + i / DEPTH, column = first_column + i / DEPTH;
            x[i % DEPTH][i / DEPTH] = at < p.k && row < p.rows ? row_of(p, row)[at] : 0.0f;
            bool there = at < p.k && column < p.out_width;
            w[i % DEPTH][i / DEPTH] = there ? to_float(((const T *)(p.weight + column * row_bytes<T>(p.k)))[at]) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int d = 0; d < DEPTH; d++)
#pragma unroll
            for (int i = 0; i < EACH; i++)
#pragma unroll
                for (int j = 0; j < EACH; j++)
                    sum[i][j] = fmaf(x[d][ty + i * SIDE], w[d][tx + j * SIDE], sum[i][j]);
        __syncthreads();
    }
    for (int i = 0; i < EACH; i++)
        for (int j = 0; j < EACH; j++) {
            int64_t row = first_row + ty + i * SIDE, column = first_column + tx + j * SIDE;
            if (row < p.rows && column < p.out_width)
                put(p, row, column, sum[i][j]);
        }
}

/* A tile of TILE × TILE outputs by tensor cores: 4 warps, each a quarter of 32 × 32. The next piece of the matrix is on
 * its way into shared memory while this one is multiplied, the next piece of x in registers. */
enum { BF16_DEPTH = 32, BF16_STRIDE = BF16_DEPTH + 8 }; /* 8 more, so that rows lie in different banks */

struct alignas(LINE) bf16_tiles {
    uint16_t x[2][TILE][BF16_STRIDE], w[2][TILE][BF16_STRIDE];
};

/* Each thread has 16 inputs of one row of x, and two lines of the matrix. */
DEVICE void fetch_x(const struct product &p, int64_t first_row, int64_t k, float *x)
{
    int64_t row = first_row + threadIdx.x / 2, at = k + threadIdx.x % 2 * 16;
#pragma unroll
    for (int i = 0; i < 16; i += 4)
        load_x<4>(row < p.rows ? row_of(p, row) + at + i : p.x, row < p.rows ? p.k - at - i : 0, x + i);
}
DEVICE void keep_x(uint16_t (*tile)[BF16_STRIDE], const float *x)
{
    uint32_t *to = (uint32_t *)&tile[threadIdx.x / 2][threadIdx.x % 2 * 16];
#pragma unroll
    for (int i = 0; i < 8; i++)
        to[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
}
DEVICE void fetch_weight(const struct product &p, int64_t first_column, int64_t k, uint16_t (*tile)[BF16_STRIDE])
{
    int64_t size = row_bytes<struct bf16>(p.k);
#pragma unroll
    for (int i = threadIdx.x; i < TILE * 4; i += TENSOR_THREADS) {
        int64_t column = first_column + i / 4, byte = k * 2 + i % 4 * LINE;
        bool there = column < p.out_width && byte < size;
        copy_line(&tile[i / 4][i % 4 * 8], there ? p.weight + column * size + byte : p.weight, there ? LINE : 0);
    }
    commit_copies();
}

/* Adds the product of two pieces to a warp's 32 × 32 sums. */
DEVICE void multiply_piece(uint16_t (*x)[BF16_STRIDE], uint16_t (*w)[BF16_STRIDE], float (*sum)[4][4])
{
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < BF16_DEPTH; k += 16) {
        uint32_t a[2][4], b[4][2];
#pragma unroll
        for (int i = 0; i < 2; i++)
            load_matrices(a[i], &x[warp / 2 * 32 + i * 16 + lane % 16][k + lane / 16 * 8]);
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
            uint32_t pair[4];
            load_matrices(pair, &w[warp % 2 * 32 + (j + lane / 16) * 8 + lane % 8][k + lane / 8 % 2 * 8]);
            b[j][0] = pair[0], b[j][1] = pair[1], b[j + 1][0] = pair[2], b[j + 1][1] = pair[3];
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                mma_bf16(sum[i][j], a[i], b[j]);
    }
}

DEVICE void multiply_bf16(const struct product &p)
{
    __shared__ struct bf16_tiles tiles;
    int64_t first_row = blockIdx.y * (int64_t)TILE, first_column = blockIdx.x * (int64_t)TILE;
    if (first_row >= p.rows)
        return;
    float sum[2][4][4] = {}, x[16];
    fetch_x(p, first_row, 0, x);
    fetch_weight(p, first_column, 0, tiles.w[0]);
    for (int64_t k = 0, turn = 0; k < p.k; k += BF16_DEPTH, turn ^= 1) {
        keep_x(tiles.x[turn], x);
        wait_for_copies<0>();
        __syncthreads(); /* this turn's pieces are here, and nobody reads the other turn's any more */
        if (k + BF16_DEPTH < p.k) {
            fetch_x(p, first_row, k + BF16_DEPTH, x);
            fetch_weight(p, first_column, k + BF16_DEPTH, tiles.w[turn ^ 1]);
        }
        multiply_piece(tiles.x[turn], tiles.w[turn], sum);
    }
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int64_t row = first_row + warp / 2 * 32 + i * 16 + c / 2 * 8 + lane / 4;
                int64_t column = first_column + warp % 2 * 32 + j * 8 + lane % 4 * 2 + c % 2;
                if (row < p.rows && column < p.out_width)
                    put(p, row, column, sum[i][j][c]);
            }
}

/* The kernels of an op: one row, few, many, by the dtype of the weight. */
#define KERNELS(op_name)                                                                                          \
    KERNEL(op_name##_one_f32, op_name, THREADS) { multiply_few<float, 1>(product_of(op)); }                       \
    KERNEL(op_name##_one_bf16, op_name, THREADS) { multiply_few<struct bf16, 1>(product_of(op)); }                \
    KERNEL(op_name##_one_f16, op_name, THREADS) { multiply_few<struct f16, 1>(product_of(op)); }                  \
    KERNEL(op_name##_few_f32, op_name, THREADS) { multiply_few<float, FEW>(product_of(op)); }                     \
    KERNEL(op_name##_few_bf16, op_name, THREADS) { multiply_few<struct bf16, FEW>(product_of(op)); }              \
    KERNEL(op_name##_few_f16, op_name, THREADS) { multiply_few<struct f16, FEW>(product_of(op)); }                \
    KERNEL(op_name##_many_f32, op_name, THREADS) { multiply_tile<float>(product_of(op)); }                        \
    KERNEL(op_name##_many_bf16, op_name, TENSOR_THREADS) { multiply_bf16(product_of(op)); }                       \
    KERNEL(op_name##_many_f16, op_name, THREADS) { multiply_tile<struct f16>(product_of(op)); }
KERNELS(matmul)
KERNELS(logits)
