/* Few rows times a matrix that is not quantised: a warp multiplies a row of the matrix, and waits for memory. */
#ifndef MULTIPLY_FEW_CUH
#define MULTIPLY_FEW_CUH

#include "product.cuh"

/* Some inputs, a line of each row of the matrix, times all rows of x. Where x is normed, the matrix takes the norm's
 * weights, once for all rows, and the squares of each line are added up by one warp of the block. */
template <class T, int ROWS, class Way>
DEVICE void add_line(const struct product &p, const uint4 *bits, int64_t at, float (*sum)[ROWS], float *squares)
{
    enum { COUNT = per_line<T>::COUNT };
    float w[Way::OUTPUTS][COUNT], norm[COUNT];
    if (Way::NORMED)
        load_x<COUNT>(p.norm + at, p.k - at, norm);
#pragma unroll
    for (int o = 0; o < Way::OUTPUTS; o++) {
        widen_line<T>(bits[o], w[o]);
#pragma unroll
        for (int j = 0; j < COUNT; j++)
            w[o][j] = Way::NORMED ? w[o][j] * norm[j] : w[o][j];
    }
    bool mine = Way::NORMED && (unsigned)at / (WARP * COUNT) % (THREADS / WARP) == threadIdx.x / WARP;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (r >= p.rows)
            break;
        float x[COUNT];
        load_x<COUNT>(row_of(p, r) + at, p.k - at, x);
#pragma unroll
        for (int o = 0; o < Way::OUTPUTS; o++)
#pragma unroll
            for (int j = 0; j < COUNT; j++)
                sum[o][r] = fmaf(x[j], w[o][j], sum[o][r]);
        if (mine)
#pragma unroll
            for (int j = 0; j < COUNT; j++)
                squares[r] = fmaf(x[j], x[j], squares[r]);
    }
}

template <int ROWS> struct squares_of_warps {
    float part[THREADS / WARP][ROWS];
};
/* What each row is to be multiplied by, from the squares that the threads of a block have added up. */
template <int ROWS>
DEVICE void scale_rows(const struct product &p, const float *squares, float *scale, const struct block &block)
{
    SHARED(shared, struct squares_of_warps<ROWS>);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float sum = warp_sum(squares[r]);
        if (threadIdx.x % WARP == 0)
            shared.part[threadIdx.x / WARP][r] = sum;
    }
    sync(block);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float sum = 0.0f;
        for (int w = 0; w < THREADS / WARP; w++)
            sum += shared.part[w][r];
        scale[r] = inverse_rms(sum, p.k, p.eps);
    }
}

/* One output of up to ROWS rows by a warp: the order of the sums is the same for any number of rows. Several lines of
 * the matrix are on their way at once. Warps beyond the last output read its row again, for the squares. */
template <class T, int ROWS, class Way> DEVICE void multiply_few(const struct product &p, const struct block &block)
{
    enum { COUNT = per_line<T>::COUNT, STEP = WARP * COUNT, TOGETHER = 4 / Way::OUTPUTS };
    int64_t column = block.index.x * (int64_t)(THREADS / WARP) + threadIdx.x / WARP, size = row_bytes<T>(p.k);
    int lane = threadIdx.x % WARP;
    const char *weight = p.weight + (column < p.out_width ? column : p.out_width - 1) * size;
    int64_t further = p.out_width * size; /* the second output's row */
    float sum[Way::OUTPUTS][ROWS] = {}, squares[ROWS] = {}, scale[ROWS];
    for (int64_t i = lane * COUNT; i < p.k; i += TOGETHER * STEP) {
        uint4 line[TOGETHER][Way::OUTPUTS];
#pragma unroll
        for (int t = 0; t < TOGETHER; t++)
#pragma unroll
            for (int o = 0; o < Way::OUTPUTS; o++)
                if (i + t * STEP < p.k)
                    line[t][o] = *(const uint4 *)(weight + o * further + (i + t * STEP) * (int64_t)sizeof(T));
#pragma unroll
        for (int t = 0; t < TOGETHER; t++)
            if (i + t * STEP < p.k)
                add_line<T, ROWS, Way>(p, line[t], i + t * STEP, sum, squares);
    }
    if (Way::NORMED)
        scale_rows<ROWS>(p, squares, scale, block);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float total[Way::OUTPUTS];
#pragma unroll
        for (int o = 0; o < Way::OUTPUTS; o++)
            total[o] = Way::NORMED ? warp_sum(sum[o][r]) * scale[r] : warp_sum(sum[o][r]);
        if (lane == 0 && r < p.rows && column < p.out_width)
            put(Way(), p, r, column, total);
    }
}

#endif
