/* What the kernels of flash attention for many rows share: the rows of a tile and the pages that they see, a softmax that
 * is mended as it goes, the way out. They keep sums as tensor cores leave them: a warp has 16 rows, a thread two of them,
 * 8 apart, and of each every fourth pair of columns. */
#ifndef FLASH_ATTENTION_CUH
#define FLASH_ATTENTION_CUH

#include "cache.cuh"

enum { ROWS_OF_WARP = 16 };

/* Queries are multiplied by this before they are rounded: scores are then exponents of 2. */
DEVICE float query_scale(const struct attention &op) { return op.scale * 1.44269504f; }

/* The rows of a tile: their positions, -1 for rows that are not here, and their sequences. */
template <int COUNT> struct rows {
    int pos[COUNT], seq[COUNT];
};

/* By all threads of a block, who must meet before they look. */
template <int COUNT> DEVICE void find_rows(const struct attention &op, int64_t first, int count, struct rows<COUNT> &rows)
{
    for (int i = threadIdx.x; i < COUNT; i += blockDim.x) {
        struct view view;
        rows.pos[i] = i < count && sees(op, first + i, view) ? op.pos[first + i] : -1;
        rows.seq[i] = i < count ? op.seq[first + i] : -1;
    }
}

/* A thread's own rows. */
DEVICE int row_of_thread(int r) { return threadIdx.x / WARP * ROWS_OF_WARP + threadIdx.x % WARP / 4 + 8 * r; }

/* Where the rows of another sequence begin. By whole warps. */
template <int COUNT> DEVICE int end_of_sequence(const struct rows<COUNT> &rows, int begin, int count)
{
    int end = count;
    for (int i = count - 1 - threadIdx.x % WARP; i > begin; i -= WARP)
        if (rows.seq[i] != rows.seq[begin])
            end = i;
    return -warp_most(-end);
}

/* The pages that rows [begin, end) of one sequence see; the last is before the first where there are none. By whole
 * warps. */
struct pages {
    int first, last;
};
template <int COUNT>
DEVICE struct pages pages_of(const struct attention &op, const struct rows<COUNT> &rows, int begin, int end)
{
    int lowest = INT32_MAX, highest = -1;
    for (int i = begin + threadIdx.x % WARP; i < end; i += WARP)
        if (rows.pos[i] >= 0)
            lowest = min_of(lowest, rows.pos[i]), highest = max_of(highest, rows.pos[i]);
    lowest = -warp_most(-lowest), highest = warp_most(highest);
    return {op.window > 0 ? max_of(0, lowest - op.window + 1) / PAGE : 0, highest < 0 ? -1 : highest / PAGE};
}

/* What a thread has of its two rows: the greatest score, the sum of weights (of its own columns), the values' sum. */
template <int WIDTH> struct sums {
    float max[2], sum[2], out[WIDTH / 8][4];
};
template <int WIDTH> DEVICE void clear(struct sums<WIDTH> &s)
{
#pragma unroll
    for (int j = 0; j < WIDTH / 8; j++)
        s.out[j][0] = s.out[j][1] = s.out[j][2] = s.out[j][3] = 0.0f;
    s.max[0] = s.max[1] = -INFINITY, s.sum[0] = s.sum[1] = 0.0f;
}

/* Of a page's scores, those that a row does not see become -inf. pos: of this thread's rows, -1 if they see nothing. */
DEVICE void mask(const struct attention &op, const int *pos, int first_key, float (*score)[4])
{
    if (first_key + PAGE <= min_of(pos[0], pos[1]) + 1 && (op.window == 0 || first_key > max_of(pos[0], pos[1]) - op.window))
        return; /* most pages: all of them is seen */
#pragma unroll
    for (int i = 0; i < PAGE / 2; i++) {
        int key = first_key + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2, own = pos[i / 2 % 2];
        bool seen = key <= own && (op.window == 0 || key > own - op.window);
        score[i / 4][i % 4] = seen ? score[i / 4][i % 4] : -INFINITY;
    }
}

/* Makes weights of scores. shrink: what sums under an older maximum are to be multiplied by. */
template <int WIDTH> DEVICE void soften(float (*score)[4], struct sums<WIDTH> &s, float *shrink)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float max = s.max[r], sum = 0.0f;
#pragma unroll
        for (int i = 0; i < PAGE / 4; i++)
            max = fmaxf(max, score[i / 2][2 * r + i % 2]);
        max = warp_max(max, 4);
        float base = max == -INFINITY ? 0.0f : max;
#pragma unroll
        for (int i = 0; i < PAGE / 4; i++) {
            float &x = score[i / 2][2 * r + i % 2];
            x = power_of_two(x - base);
            sum += x;
        }
        shrink[r] = power_of_two(s.max[r] - base);
        s.max[r] = max;
        s.sum[r] = s.sum[r] * shrink[r] + sum;
    }
}
template <int WIDTH> DEVICE void rescale(struct sums<WIDTH> &s, const float *shrink)
{
#pragma unroll
    for (int j = 0; j < WIDTH / 8; j++)
        s.out[j][0] *= shrink[0], s.out[j][1] *= shrink[0], s.out[j][2] *= shrink[1], s.out[j][3] *= shrink[1];
}

/* Weights of 16 keys as the first operand of the next product: they lie as it wants them. */
DEVICE void pack_weights(float (*weight)[4], uint32_t *a)
{
#pragma unroll
    for (int i = 0; i < 4; i++)
        a[i] = pack_bf16(weight[i / 2][i % 2 * 2], weight[i / 2][i % 2 * 2 + 1]);
}

template <int WIDTH, int COUNT>
DEVICE void write(const struct attention &op, const struct rows<COUNT> &rows, int64_t first, const struct sums<WIDTH> &s)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = row_of_thread(r);
        float sum = warp_sum(s.sum[r], 4), *out = op.out + (first + row) * op.out_stride + blockIdx.x * op.head_dim;
        if (rows.pos[row] < 0)
            continue;
#pragma unroll
        for (int j = 0; j < WIDTH / 8; j++)
            for (int c = 0; c < 2; c++) {
                int d = j * 8 + threadIdx.x % 4 * 2 + c;
                if (d < op.head_dim)
                    out[d] = s.out[j][2 * r + c] / sum;
            }
    }
}

#endif
