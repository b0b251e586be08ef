/* A block for each row and KV head, a warp for its keys and a warp for its values. */
#include "store.cuh"

KERNEL(kv_store, kv_store, 2 * WARP)
{
    int64_t heads = op.k_width / op.head_dim;
    for (int64_t i = block.index.x; i < *op.rows * heads; i += block.grid.x)
        store_head(op, i / heads, i % heads, block);
}
