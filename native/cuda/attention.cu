/* Standard attention: a block for each query head of each row writes all its scores to memory, makes weights of them,
 * and adds up the values. A thread has a key, then a column. */
#include "cache.cuh"

template <class T> DEVICE float score(const struct attention &op, const struct view &view, int64_t head, int index)
{
    enum { COUNT = per_line<T>::COUNT };
    int position = position_of(view, index);
    int64_t page = page_of(op, view.row, position), kv_head = head / (op.heads / op.kv_heads), slot = position % PAGE;
    const char *key = head_of<T>(op, page, kv_head) + slot * row_bytes<T>(op.head_dim);
    const float *q = query_of(op, view.row, head, index < view.by_sink);
    float sum = 0.0f;
    for (int d = 0; d < op.head_dim; d += COUNT) {
        float k[COUNT];
        load_line<T>(key + d * sizeof(T), k);
        for (int i = 0; i < COUNT && d + i < op.head_dim; i++)
            sum = fmaf(q[d + i], k[i], sum);
    }
    return (sizeof(T) == 1 ? sum * scales_of<T>(op, page, kv_head)[slot] : sum) * op.scale;
}

/* Column d of the values, added up by their weights. */
template <class T>
DEVICE float weighted(const struct attention &op, const struct view &view, int64_t head, const float *weights, int d)
{
    int64_t kv_head = head / (op.heads / op.kv_heads);
    float sum = 0.0f;
    for (int i = 0; i < view.count; i++) {
        int position = position_of(view, i);
        int64_t page = page_of(op, view.row, position), slot = PAGE + position % PAGE;
        const T *value = (const T *)(head_of<T>(op, page, kv_head) + slot * row_bytes<T>(op.head_dim));
        float weight = sizeof(T) == 1 ? weights[i] * scales_of<T>(op, page, kv_head)[slot] : weights[i];
        sum = fmaf(weight, to_float(value[d]), sum);
    }
    return sum;
}

template <class T> DEVICE void attend(const struct attention &op, const struct team &team)
{
    float *scores = (float *)(team.scratch + blockIdx.x * team.share);
    for (int64_t i = blockIdx.x; i < (int64_t)*op.rows * op.heads; i += gridDim.x) {
        int64_t row = i / op.heads, head = i % op.heads;
        struct view view;
        if (!sees(op, row, view))
            continue;
        float max = -INFINITY, sum = 0.0f;
        for (int j = threadIdx.x; j < view.count; j += blockDim.x) {
            scores[j] = score<T>(op, view, head, j);
            max = fmaxf(max, scores[j]);
        }
        max = block_max(max);
        for (int j = threadIdx.x; j < view.count; j += blockDim.x)
            sum += scores[j] = expf(scores[j] - max);
        sum = block_sum(sum); /* and all weights are written */
        float *out = op.out + row * op.out_stride + head * op.head_dim;
        for (int d = threadIdx.x; d < op.head_dim; d += blockDim.x)
            out[d] = weighted<T>(op, view, head, scores, d) / sum;
        __syncthreads(); /* the next scores go where these are */
    }
}

KERNEL(attention_f32, attention, THREADS) { attend<float>(op, team); }
KERNEL(attention_bf16, attention, THREADS) { attend<struct bf16>(op, team); }
KERNEL(attention_f16, attention, THREADS) { attend<struct f16>(op, team); }
KERNEL(attention_i8, attention, THREADS) { attend<int8_t>(op, team); }
