/* Few rows times a quantised matrix: a block multiplies a panel, by tensor cores, and waits for memory. */
#ifndef MULTIPLY_PANEL_CUH
#define MULTIPLY_PANEL_CUH

#include "product.cuh"
#include "quants.cuh"

/* What a lane multiplies a line by: of each step four inputs of a row of x, as a pair of even ones and one of odd. Zeros
 * beyond the end. */
template <class Q> DEVICE void load_pairs(const float *x, int left, uint32_t (*pairs)[2])
{
    float four[Q::STEPS][4];
    if (left >= Q::INPUTS - Q::STEP + 4 && (uintptr_t)x % LINE == 0) {
#pragma unroll
        for (int s = 0; s < Q::STEPS; s++)
            load_x<4>(x + s * Q::STEP, four[s]);
    } else {
#pragma unroll
        for (int i = 0; i < Q::STEPS * 4; i++)
            four[i / 4][i % 4] = i / 4 * Q::STEP + i % 4 < left ? x[i / 4 * Q::STEP + i % 4] : 0.0f;
    }
#pragma unroll
    for (int s = 0; s < Q::STEPS; s++) {
        pairs[s][0] = pack_bf16(four[s][0], four[s][2]);
        pairs[s][1] = pack_bf16(four[s][1], four[s][3]);
    }
}

/* Some inputs, a line of a panel, times all rows; SHARE steps have a scale in common. Sums are those of mma_bf16: outputs
 * g, g, g + 8, g + 8 of rows 2t, 2t + 1, 2t, 2t + 1; WIDENED times too small. */
template <class Q, int SHARE>
DEVICE void add_quants(uint4 bits, const struct head *heads, const uint32_t (*x)[2], float *sum)
{
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
    const uint32_t ones[4] = {0x3b803b80u, 0x3b803b80u, 0x3b803b80u, 0x3b803b80u}; /* each 1 / WIDENED */
    float dots[4] = {}, inputs[4] = {};
#pragma unroll
    for (int s = 0; s < Q::STEPS; s++) {
        uint32_t pairs[4];
        widen_step<Q>(words + s * Q::WORDS, pairs);
        mma_bf16(dots, pairs, x[s]);
        if (Q::MINIMUMS)
            mma_bf16(inputs, ones, x[s]); /* their sum, for each output the same */
        if ((s + 1) % SHARE)
            continue;
        struct head head = heads[s / SHARE];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sum[i] = fmaf(dots[i], scale_of<Q>(head, i / 2), sum[i]);
            if (Q::MINIMUMS)
                sum[i] = fmaf(inputs[i], minimum_of<Q>(head, i / 2), sum[i]);
            dots[i] = inputs[i] = 0.0f;
        }
    }
}

template <class Q, int SHARE>
DEVICE void load_line(const struct panel &panel, int index, uint4 &line, struct head *heads)
{
    line = *(const uint4 *)(panel.lines + index * (int64_t)(WARP * LINE));
#pragma unroll
    for (int s = 0; s < Q::STEPS; s += SHARE)
        heads[s / SHARE] = head_at<Q>(panel, index * Q::INPUTS + s * Q::STEP);
}

/* A warp's part of a panel: its lines, of which several are on their way at once. */
template <class Q, int SHARE> DEVICE void add_panel(const struct product &p, float *sum)
{
    enum { TOGETHER = 4, WARPS = THREADS / WARP };
    int lane = threadIdx.x % WARP, first = lane % 4 * 4;
    if (p.rows <= 0)
        return;
    struct panel panel = panel_of<Q>(p.weight, p.k, p.group, blockIdx.x, lane);
    const float *x = row_of(p, lane / 4 < p.rows ? lane / 4 : 0) + first; /* nobody looks at rows that there are not */
    for (int i = threadIdx.x / WARP; i < panel.line_count; i += TOGETHER * WARPS) {
        uint4 line[TOGETHER];
        struct head heads[TOGETHER][Q::STEPS / SHARE];
#pragma unroll
        for (int t = 0; t < TOGETHER; t++)
            if (i + t * WARPS < panel.line_count)
                load_line<Q, SHARE>(panel, i + t * WARPS, line[t], heads[t]);
#pragma unroll
        for (int t = 0; t < TOGETHER; t++)
            if (i + t * WARPS < panel.line_count) {
                int input = (i + t * WARPS) * Q::INPUTS;
                uint32_t pairs[Q::STEPS][2];
                load_pairs<Q>(x + input, (int)p.k - first - input, pairs);
                add_quants<Q, SHARE>(line[t], heads[t], pairs, sum);
            }
    }
}

/* PANEL outputs of up to FEW rows by a block, which reads them once. The order of the sums is the same for any number of
 * rows. */
template <class Q> DEVICE void multiply_panel(const struct product &p)
{
    __shared__ float part[THREADS / WARP][FEW][PANEL];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float sum[4] = {};
    if (p.group >= Q::INPUTS)
        add_panel<Q, Q::STEPS>(p, sum);
    else if (p.group == 2 * Q::STEP)
        add_panel<Q, 2>(p, sum);
    else
        add_panel<Q, 1>(p, sum);
#pragma unroll
    for (int i = 0; i < 4; i++)
        part[warp][lane % 4 * 2 + i % 2][lane / 4 + i / 2 * 8] = sum[i];
    __syncthreads();
    int row = threadIdx.x / PANEL;
    int64_t column = blockIdx.x * (int64_t)PANEL + threadIdx.x % PANEL;
    if (row >= min_of(FEW, (int)p.rows) || column >= p.out_width)
        return;
    float total = 0.0f;
    for (int w = 0; w < THREADS / WARP; w++)
        total += part[w][row][threadIdx.x % PANEL];
    put(p, row, column, total * WIDENED);
}

#endif
