/* What becomes of queries, keys and values before attention (engine/cuda/fusion.py): norms of heads, rotation, the
 * cache. Two warps to a block: a KV head's key and value, or two query heads. */
#include "store.cuh"

struct rmsnorm_rope_kv_store {
    struct rmsnorm q_norm, k_norm; /* weight NULL: heads are not normed */
    struct rope sink, rope;        /* out NULL: there are no sinks. rope: in place, queries and behind them keys */
    struct kv_store store;
};

/* A head of a row by a warp: normed, then rotated in place, and where there are sinks into another tensor as they see it. */
DEVICE void turn(const struct rope &rope, const struct rope &sink, const struct rmsnorm &norm, int64_t row, int64_t head)
{
    int lane = threadIdx.x % WARP, width = rope.angles_width, half = width / 2;
    float *x = rope.out + row * rope.out_stride + head * width, scale = 1.0f, squares = 0.0f;
    if (norm.weight) {
#pragma unroll 4
        for (int i = lane; i < width; i += WARP)
            squares += x[i] * x[i];
        scale = inverse_rms(warp_sum(squares), width, norm.eps);
    }
#pragma unroll 4
    for (int i = lane; i < half; i += WARP) {
        float first = x[i], second = x[half + i];
        if (norm.weight) {
            first = first * scale * norm.weight[i];
            second = second * scale * norm.weight[half + i];
        }
        if (sink.out)
            rotate(first, second, sink.angles + row * width + i, half,
                   sink.out + row * sink.out_stride + head * width + i);
        rotate(first, second, rope.angles + row * width + i, half, x + i);
    }
}

KERNEL(rmsnorm_rope_kv_store, rmsnorm_rope_kv_store, 2 * WARP)
{
    const struct rope no_sink = {};
    int kv_heads = op.store.k_width / op.store.head_dim, heads = op.rope.x_width / op.store.head_dim - kv_heads;
    int pairs = kv_heads + (heads + 1) / 2, warp = threadIdx.x / WARP; /* of a row */
    for (int i = block.index.x; i < *op.rope.rows * pairs; i += block.grid.x) {
        int row = i / pairs, pair = i % pairs, query = (pair - kv_heads) * 2 + warp;
        if (pair < kv_heads) {
            if (warp == KEYS)
                turn(op.rope, no_sink, op.k_norm, row, heads + pair);
            __syncwarp(); /* other lanes read what this one has rotated */
            store_head(op.store, row, pair, block);
        } else if (query < heads)
            turn(op.rope, op.sink, op.q_norm, row, query);
    }
}
