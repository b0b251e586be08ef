/* Streaming attention for few rows, and for any row that sees sinks: what a row sees is cut into ranges, a block for
 * each range, row and few query heads of a KV head. Some lanes have a key together, each whole lines of it, and a
 * softmax of their own; those of a block are merged in shared memory, ranges by a second kernel. */
#include "cache.cuh"

template <class T, int HEADS, int LINES> struct walk {
    enum { COUNT = per_line<T>::COUNT, WIDTH = LINES * COUNT };
    float q[HEADS][WIDTH], out[HEADS][WIDTH], max[HEADS], sum[HEADS];
    int lanes, lane, group, lines; /* that share a key; mine among them; which of the block; lines of a key */
    int64_t kv_head, head, heads;  /* the first query head, and how many */
};

template <class T, int HEADS, int LINES>
DEVICE void load_queries(const struct attention &op, const struct view &view, bool of_sinks, struct walk<T, HEADS, LINES> &w)
{
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
        for (int i = 0; i < w.WIDTH; i++) {
            int d = (w.lane + i / w.COUNT * w.lanes) * w.COUNT + i % w.COUNT;
            bool there = h < w.heads && d < op.head_dim;
            w.q[h][i] = there ? query_of(op, view.row, w.head + h, of_sinks)[d] * op.scale * 1.44269504f : 0.0f;
        }
}

template <class T, int HEADS, int LINES>
DEVICE void load_vector(const char *vector, const struct walk<T, HEADS, LINES> &w, float *out)
{
#pragma unroll
    for (int i = 0; i < LINES; i++) {
        int line = w.lane + i * w.lanes;
        if (line < w.lines)
            load_line<T>(vector + line * LINE, out + i * w.COUNT);
        else
#pragma unroll
            for (int j = 0; j < w.COUNT; j++)
                out[i * w.COUNT + j] = 0.0f;
    }
}

/* Takes the keys [begin, end) of a view into the softmaxes. All lanes of a warp go through every turn together. */
template <class T, int HEADS, int LINES>
DEVICE void walk_keys(const struct attention &op, const struct view &view, int begin, int end,
                      struct walk<T, HEADS, LINES> &w, const struct block &block)
{
    int groups = block.threads / w.lanes;
    for (int start = begin; start < end; start += groups) {
        int index = min_of(start + w.group, end - 1), position = position_of(view, index);
        int64_t page = page_of(op, view.row, position);
        const char *key = head_of<T>(op, page, w.kv_head) + position % PAGE * row_bytes<T>(op.head_dim);
        float k[w.WIDTH], v[w.WIDTH], k_scale = 1.0f, v_scale = 1.0f;
        load_vector(key, w, k);
        load_vector(key + PAGE * row_bytes<T>(op.head_dim), w, v);
        if (sizeof(T) == 1) {
            k_scale = scales_of<T>(op, page, w.kv_head)[position % PAGE];
            v_scale = scales_of<T>(op, page, w.kv_head)[PAGE + position % PAGE];
        }
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float score = 0.0f;
#pragma unroll
            for (int i = 0; i < w.WIDTH; i++)
                score = fmaf(w.q[h][i], k[i], score);
            score = warp_sum(score, w.lanes) * k_scale;
            if (start + w.group >= end)
                continue;
            float max = fmaxf(w.max[h], score), shrink = exp2f(w.max[h] - max), weight = exp2f(score - max);
            w.max[h] = max;
            w.sum[h] = w.sum[h] * shrink + weight;
#pragma unroll
            for (int i = 0; i < w.WIDTH; i++)
                w.out[h][i] = fmaf(weight * v_scale, v[i], w.out[h][i] * shrink);
        }
    }
}

/* A range of a row and head: its highest score, the sum of its weights, its weighted values. */
DEVICE float *partial_of(const struct attention &op, const struct team &team, int64_t row, int64_t head, int64_t ranges,
                         int64_t range)
{
    return (float *)(team.scratch + ((row * op.heads + head) * ranges + range) * team.share);
}

/* Merges the softmaxes of a block and writes them: as a partial, or divided, where there is one range. */
template <int HEADS, int WIDTH> struct softmaxes {
    float max[SPLIT_THREADS][HEADS], sum[SPLIT_THREADS][HEADS], out[HEADS][SPLIT_THREADS * WIDTH];
};
template <class T, int HEADS, int LINES>
DEVICE void merge_block(const struct attention &op, const struct team &team, const struct view &view,
                        const struct walk<T, HEADS, LINES> &w, const struct block &block)
{
    enum { WIDTH = walk<T, HEADS, LINES>::WIDTH };
    SHARED(of, struct softmaxes<HEADS, WIDTH>);
    int groups = block.threads / w.lanes, padded = w.lanes * WIDTH;
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        if (w.lane == 0)
            of.max[w.group][h] = w.max[h], of.sum[w.group][h] = w.sum[h];
#pragma unroll
        for (int i = 0; i < WIDTH; i++)
            of.out[h][w.group * padded + (w.lane + i / w.COUNT * w.lanes) * w.COUNT + i % w.COUNT] = w.out[h][i];
    }
    sync(block);
    for (int h = 0; h < w.heads; h++) {
        float highest = -INFINITY, total = 0.0f;
        for (int g = 0; g < groups; g++)
            highest = fmaxf(highest, of.max[g][h]);
        for (int g = 0; g < groups; g++)
            total += of.sum[g][h] == 0.0f ? 0.0f : of.sum[g][h] * exp2f(of.max[g][h] - highest);
        bool whole = block.grid.z == 1;
        float *to = whole ? op.out + view.row * op.out_stride + (w.head + h) * op.head_dim
                          : partial_of(op, team, view.row, w.head + h, block.grid.z, block.index.z) + 2;
        for (int d = threadIdx.x; d < op.head_dim; d += block.threads) {
            float value = 0.0f;
            for (int g = 0; g < groups; g++)
                if (of.sum[g][h] != 0.0f)
                    value = fmaf(of.out[h][g * padded + d], exp2f(of.max[g][h] - highest), value);
            to[d] = whole ? value / total : value;
        }
        if (!whole && threadIdx.x == 0)
            to[-2] = highest, to[-1] = total;
    }
}

template <class T, int HEADS, int LINES>
DEVICE void attend_range(const struct attention &op, const struct team &team, const struct block &block)
{
    struct view view;
    if (!sees(op, block.index.x, view))
        return;
    int range = block.grid.z == 1 ? view.count : (int)RANGE, begin = (int)block.index.z * range;
    if (begin >= view.count)
        return;
    int64_t group = op.heads / op.kv_heads, pieces = (group + HEADS - 1) / HEADS;
    struct walk<T, HEADS, LINES> w;
    w.lines = (int)(row_bytes<T>(op.head_dim) / LINE);
    for (w.lanes = 1; w.lanes < w.lines && w.lanes < WARP;)
        w.lanes *= 2;
    w.lane = threadIdx.x % w.lanes, w.group = threadIdx.x / w.lanes;
    w.kv_head = block.index.y / pieces, w.head = w.kv_head * group + block.index.y % pieces * HEADS;
    w.heads = min_of(HEADS, (int)((w.kv_head + 1) * group - w.head));
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        w.max[h] = -INFINITY, w.sum[h] = 0.0f;
#pragma unroll
        for (int i = 0; i < w.WIDTH; i++)
            w.out[h][i] = 0.0f;
    }
    int end = min_of(begin + range, view.count), sinks = min_of(max_of(view.by_sink, begin), end);
    if (begin < sinks) {
        load_queries(op, view, true, w);
        walk_keys(op, view, begin, sinks, w, block);
    }
    load_queries(op, view, false, w);
    walk_keys(op, view, sinks, end, w, block);
    merge_block(op, team, view, w, block);
}

#define KERNELS(dtype, T)                                                                                          \
    KERNEL(streaming_attention_one_##dtype, attention, SPLIT_THREADS) { attend_range<T, 1, 1>(op, team, block); }  \
    KERNEL(streaming_attention_four_##dtype, attention, SPLIT_THREADS) { attend_range<T, 4, 1>(op, team, block); } \
    KERNEL(streaming_attention_wide_##dtype, attention, SPLIT_THREADS) { attend_range<T, 1, 3>(op, team, block); }
KERNELS(f32, float)
KERNELS(bf16, struct bf16)
KERNELS(f16, struct f16)
KERNELS(i8, int8_t)
#undef KERNELS

/* Merges the ranges of a row and head, in order. The launch is as deep as there are ranges, and each block has
 * a share of the columns. */
KERNEL(streaming_attention_merge, attention, SPLIT_THREADS)
{
    struct view view;
    if (!sees(op, block.index.x, view))
        return;
    int64_t head = block.index.y, ranges = block.grid.z;
    int used = (view.count + RANGE - 1) / RANGE;
    float highest = -INFINITY, total = 0.0f;
    for (int i = 0; i < used; i++)
        highest = fmaxf(highest, partial_of(op, team, view.row, head, ranges, i)[0]);
    for (int i = 0; i < used; i++) {
        const float *part = partial_of(op, team, view.row, head, ranges, i);
        total += part[1] * exp2f(part[0] - highest);
    }
    for (int d = block.index.z * block.threads + threadIdx.x; d < op.head_dim; d += block.grid.z * block.threads) {
        float value = 0.0f;
        for (int i = 0; i < used; i++) {
            const float *part = partial_of(op, team, view.row, head, ranges, i);
            value = fmaf(part[2 + d], exp2f(part[0] - highest), value);
        }
        op.out[view.row * op.out_stride + head * op.head_dim + d] = value / total;
    }
}
