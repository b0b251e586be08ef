/* Few rows times a quantised matrix: a block multiplies a panel, by tensor cores, and waits for memory. */
#ifndef MULTIPLY_PANEL_CUH
#define MULTIPLY_PANEL_CUH

#include "product.cuh"
#include "quants.cuh"

/* Of each step of a line the four inputs that a lane has; zeros beyond the end. */
template <class Q> DEVICE void load_fours(const float *x, int left, float (*four)[4])
{
    if (left >= Q::INPUTS - Q::STEP + 4 && (uintptr_t)x % LINE == 0) {
#pragma unroll
        for (int s = 0; s < Q::STEPS; s++)
            load_x<4>(x + s * Q::STEP, four[s]);
    } else {
#pragma unroll
        for (int i = 0; i < Q::STEPS * 4; i++)
            four[i / 4][i % 4] = i / 4 * Q::STEP + i % 4 < left ? x[i / 4 * Q::STEP + i % 4] : 0.0f;
    }
}

/* What a lane multiplies a line by: its inputs of a row of x, of each step a pair of even ones and one of odd. Where x
 * is normed, inputs take the norm's weights, and their squares are added up. */
template <class Q, class Way>
DEVICE void load_pairs(const struct product &p, const float *x, int first, uint32_t (*pairs)[2], float &squares)
{
    float four[Q::STEPS][4], norm[Q::STEPS][4];
    load_fours<Q>(x + first, (int)p.k - first, four);
    if (Way::NORMED)
        load_fours<Q>(p.norm + first, (int)p.k - first, norm);
#pragma unroll
    for (int s = 0; s < Q::STEPS; s++) {
#pragma unroll
        for (int i = 0; i < 4 && Way::NORMED; i++) {
            squares = fmaf(four[s][i], four[s][i], squares);
            four[s][i] *= norm[s][i];
        }
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
enum { PANEL_WARPS = THREADS / WARP }; /* that share a panel */
template <class Q, int SHARE, class Way>
DEVICE void add_lines(const struct product &p, int64_t index, float *sum, float &squares)
{
    enum { TOGETHER = 4 };
    int lane = threadIdx.x % WARP, first = lane % 4 * 4;
    if (p.rows <= 0)
        return;
    struct panel panel = panel_of<Q>(p.weight, p.k, p.group, index, lane);
    const float *x = row_of(p, lane / 4 < p.rows ? lane / 4 : 0); /* nobody looks at rows that there are not */
    for (int i = threadIdx.x / WARP % PANEL_WARPS; i < panel.line_count; i += TOGETHER * PANEL_WARPS) {
        uint4 line[TOGETHER];
        struct head heads[TOGETHER][Q::STEPS / SHARE];
#pragma unroll
        for (int t = 0; t < TOGETHER; t++)
            if (i + t * PANEL_WARPS < panel.line_count)
                load_line<Q, SHARE>(panel, i + t * PANEL_WARPS, line[t], heads[t]);
#pragma unroll
        for (int t = 0; t < TOGETHER; t++)
            if (i + t * PANEL_WARPS < panel.line_count) {
                uint32_t pairs[Q::STEPS][2];
                load_pairs<Q, Way>(p, x, (i + t * PANEL_WARPS) * Q::INPUTS + first, pairs, squares);
                add_quants<Q, SHARE>(line[t], heads[t], pairs, sum);
            }
    }
}

/* PANEL outputs of up to FEW rows by a block, which reads their panels once: THREADS threads each, so many AT_ONCE. The
 * order of the sums is the same for any number of rows. */
template <class Way> struct sums_of_warps {
    float part[Way::OUTPUTS][PANEL_WARPS][FEW][PANEL], squares[PANEL_WARPS][FEW];
};
template <class Q, class Way>
DEVICE void add_panel(const struct product &p, int output, struct sums_of_warps<Way> &to, const struct block &block)
{
    int warp = threadIdx.x / WARP % PANEL_WARPS, lane = threadIdx.x % WARP;
    int64_t index = block.index.x + output * (p.out_width / PANEL);
    float sum[4] = {}, squares = 0.0f;
    if (p.group >= Q::INPUTS)
        add_lines<Q, Q::STEPS, Way>(p, index, sum, squares);
    else if (p.group == 2 * Q::STEP)
        add_lines<Q, 2, Way>(p, index, sum, squares);
    else
        add_lines<Q, 1, Way>(p, index, sum, squares);
#pragma unroll
    for (int i = 0; i < 4; i++)
        to.part[output][warp][lane % 4 * 2 + i % 2][lane / 4 + i / 2 * 8] = sum[i];
    if (Way::NORMED) {
        squares = warp_sum(squares, 4);
        if (output == 0 && lane % 4 == 0)
            to.squares[warp][lane / 4] = squares;
    }
}

template <class Q, class Way, int AT_ONCE = Way::OUTPUTS>
DEVICE void multiply_panel(const struct product &p, const struct block &block)
{
    SHARED(shared, struct sums_of_warps<Way>);
#pragma unroll 1
    for (int output = 0; output < Way::OUTPUTS; output += AT_ONCE)
        add_panel<Q, Way>(p, output + threadIdx.x / THREADS, shared, block);
    sync(block);
    int row = threadIdx.x / PANEL;
    int64_t column = block.index.x * (int64_t)PANEL + threadIdx.x % PANEL;
    if (row >= min_of(FEW, (int)p.rows) || column >= p.out_width)
        return;
    float total[Way::OUTPUTS] = {}, squares = 0.0f;
    for (int w = 0; w < PANEL_WARPS; w++) {
#pragma unroll
        for (int o = 0; o < Way::OUTPUTS; o++)
            total[o] += shared.part[o][w][row][threadIdx.x % PANEL];
        if (Way::NORMED)
            squares += shared.squares[w][row];
    }
    float scale = Way::NORMED ? inverse_rms(squares, p.k, p.eps) : 1.0f;
#pragma unroll
    for (int o = 0; o < Way::OUTPUTS; o++)
        total[o] *= WIDENED * scale;
    put(Way(), p, row, column, total);
}

#endif
