/* How a position is written into the cache. */
#ifndef STORE_CUH
#define STORE_CUH

#include "common.cuh"

enum { KEYS, VALUES };

/* Where a position lies in the cache. */
struct place {
    char *position;
    float *scale; /* int8 only */
};

template <class T> DEVICE struct place place_of(const struct kv_store &op, int64_t row, int64_t head, int part, int slot)
{
    int64_t heads = op.k_width / op.head_dim, size = row_bytes<T>(op.head_dim);
    int64_t entry = page_entry(op.pos[row] / PAGE, op.sink_pages, op.ring_pages);
    int64_t page = op.page_table[(int64_t)op.seq[row] * op.page_table_stride + entry];
    int64_t index = ((page * heads + head) * 2 + part) * PAGE + slot;
    char *scales = (char *)op.kv + op.kv_pages * heads * 2 * PAGE * size;
    return {(char *)op.kv + index * size, (float *)scales + index};
}

/* What int8 counts in: the largest magnitude is 127 of it. NaN if there is NaN among them. */
DEVICE float scale_of(const float *x, int width)
{
    float most = 0.0f, poison = 0.0f;
    for (int i = threadIdx.x % WARP; i < width; i += WARP) {
        most = fmaxf(most, fabsf(x[i]));
        poison += x[i] * 0.0f;
    }
    most = warp_max(most) / 127.0f;
    return warp_sum(poison) == 0.0f || most > FLT_MAX ? most : NAN;
}

/* One vector by one warp; the padding behind it becomes 0. */
template <class T> DEVICE void store_vector(const float *x, int width, struct place to)
{
    float unit = 1.0f;
    if (sizeof(T) == 1) {
        float scale = scale_of(x, width);
        unit = scale > 0.0f && scale <= FLT_MAX ? scale : 1.0f;
        if (threadIdx.x % WARP == 0)
            *to.scale = scale;
    }
    for (int i = threadIdx.x % WARP; i < row_bytes<T>(width) / (int)sizeof(T); i += WARP)
        from_float(i < width ? (sizeof(T) == 1 ? x[i] / unit : x[i]) : 0.0f, ((T *)to.position)[i]);
}

/* A page is handed out when its first position is written. What an earlier sequence left in it is cleared then: its
 * unused tail is read with a weight of zero, and zero times a stale NaN is NaN. Positions that other blocks write in
 * this step are left to them. */
template <class T> DEVICE void clear_rest(const struct kv_store &op, int64_t row, int64_t head, const struct block &block)
{
    __shared__ int written[PAGE];
    int64_t size = row_bytes<T>(op.head_dim);
    for (int i = threadIdx.x; i < PAGE; i += block.threads)
        written[i] = i == 0;
    sync(block);
    for (int other = threadIdx.x; other < *op.rows; other += block.threads)
        if (op.seq[other] == op.seq[row] && op.pos[other] / PAGE == op.pos[row] / PAGE)
            written[op.pos[other] % PAGE] = 1;
    sync(block);
    for (int i = threadIdx.x; i < 2 * PAGE; i += block.threads) {
        if (written[i % PAGE])
            continue;
        struct place p = place_of<T>(op, row, head, i / PAGE, i % PAGE);
        for (int64_t byte = 0; byte < size; byte += LINE)
            *(uint4 *)(p.position + byte) = {0, 0, 0, 0};
        if (sizeof(T) == 1)
            *p.scale = 0.0f;
    }
    sync(block);
}

/* The key and the value of a row and KV head by a block of two warps. */
template <class T> DEVICE void store_head(const struct kv_store &op, int64_t row, int64_t head, const struct block &block)
{
    int part = threadIdx.x / WARP;
    if (op.pos[row] % PAGE == 0)
        clear_rest<T>(op, row, head, block);
    const float *vector = part == KEYS ? op.k + row * op.k_stride : op.v + row * op.v_stride;
    store_vector<T>(vector + head * op.head_dim, op.head_dim, place_of<T>(op, row, head, part, op.pos[row] % PAGE));
}
DEVICE void store_head(const struct kv_store &op, int64_t row, int64_t head, const struct block &block)
{
    switch (op.kv_dtype) {
    case DTYPE_F32: store_head<float>(op, row, head, block); break;
    case DTYPE_BF16: store_head<struct bf16>(op, row, head, block); break;
    case DTYPE_F16: store_head<struct f16>(op, row, head, block); break;
    default: store_head<int8_t>(op, row, head, block);
    }
}

#endif
