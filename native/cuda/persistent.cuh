/* Many launches as one. The blocks of a persistent kernel stay where they are and go through a list of stages together:
 * each does its share of a stage's blocks, then waits for the others. Stages are functions of the ops' own sources, in
 * which KERNEL makes no entries here. engine/cuda/persistent.py writes the lists. */
#ifndef PERSISTENT_CUH
#define PERSISTENT_CUH

#define PERSISTENT
#include "embedding.cu"
#include "fused_matmul.cu"
#include "rmsnorm.cu"
#include "rmsnorm_rope_kv_store.cu"
#include "rope.cu"
#include "streaming_attention.cu"

/* Waits until all blocks are here, and sees what they have written. Block 0 adds what the ones of the others leave to the
 * highest bit: that turns over each time, the rest is 0 again, and the next launch may have any number of blocks. */
DEVICE void wait_for_blocks(uint32_t *barrier)
{
    const unsigned turn = 0x80000000u;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        unsigned before = atomicAdd(barrier, blockIdx.x ? 1u : turn - (gridDim.x - 1));
        wait_for_change(barrier, before, turn);
    }
    __syncthreads();
}

/* How weights are stored: what multiplies few rows by them. */
template <class T> struct dense {};
template <class Q> struct quantised_as {};
template <class Way, int ROWS, class T>
DEVICE void multiply(struct dense<T>, const struct product &p, const struct block &block)
{
    multiply_few<T, ROWS, Way>(p, block);
}
template <class Way, int ROWS, class Q>
DEVICE void multiply(struct quantised_as<Q>, const struct product &p, const struct block &block)
{
    if (ROWS == FEW) /* as fast as one */
        multiply_panel<Q, Way, 1>(p, block);
}

/* One block of a stage. KV: what the cache holds. */
template <class Op> DEVICE const Op &op_of(const struct stage &stage) { return *(const Op *)stage.op; }
#define STAGE(name, function, Op) case STAGE_##name: function(op_of<struct Op>(stage), team, block); break
#define PRODUCT(name, way, p)                                                         \
    case STAGE_##name##_one: multiply<struct way, 1>(Weights(), p, block); break;     \
    case STAGE_##name##_few: multiply<struct way, FEW>(Weights(), p, block); break
template <class Weights, class KV>
DEVICE void run_block(const struct stage &stage, const struct team &team, const struct block &block)
{
    switch (stage.kind) {
        STAGE(embedding, embedding, embedding);
        STAGE(rope_angles, rope_angles, rope_angles);
        STAGE(rmsnorm, rmsnorm, rmsnorm);
        STAGE(add_rmsnorm, add_rmsnorm, add_rmsnorm);
        STAGE(rmsnorm_rope_kv_store, rmsnorm_rope_kv_store, rmsnorm_rope_kv_store);
        STAGE(streaming_attention_one, (attend_range<KV, 1, 1>), attention);
        STAGE(streaming_attention_two, (attend_range<KV, 2, 1>), attention);
        STAGE(streaming_attention_merge, streaming_attention_merge, attention);
        PRODUCT(matmul_add, added, product_of(op_of<struct matmul_add>(stage)));
        PRODUCT(rmsnorm_matmul, normed, product_of(op_of<struct rmsnorm_matmul>(stage)));
        PRODUCT(rmsnorm_matmul_swiglu, normed_gated, product_of(op_of<struct rmsnorm_matmul_swiglu>(stage)));
        PRODUCT(matmul, alone, product_of(op_of<struct matmul>(stage)));
        PRODUCT(logits, alone, product_of(op_of<struct logits>(stage)));
    }
}

/* Has the L2 cache fetch what this block reads first when it comes to the next product. */
DEVICE void fetch_ahead(const struct stage &stage)
{
    if (blockIdx.x >= (unsigned)stage.ahead_blocks)
        return;
    const char *first = (const char *)stage.ahead + blockIdx.x * stage.ahead_bytes;
    for (int64_t i = threadIdx.x * (int64_t)CACHE_LINE; i < stage.ahead_bytes; i += THREADS * CACHE_LINE) {
        fetch_into_l2(first + i);
        if (stage.ahead_further)
            fetch_into_l2(first + stage.ahead_further + i);
    }
}

/* A stage that comes into shared memory: nobody reads what was there, the last but one. */
DEVICE void load_stage(const struct persistent &op, int64_t index, struct stage *stages)
{
    enum { WORDS = sizeof(struct stage) / sizeof(int64_t) };
    if (index < op.count && threadIdx.x < WORDS)
        ((int64_t *)&stages[index % 2])[threadIdx.x] = ((const int64_t *)&op.stages[index])[threadIdx.x];
}

template <class Weights, class KV> DEVICE void run_stages(const struct persistent &op, struct team team)
{
    __shared__ struct stage stages[2];
    load_stage(op, 0, stages);
    __syncthreads();
    for (int64_t i = 0; i < op.count; i++) {
        const struct stage &stage = stages[i % 2];
        unsigned x = stage.grid[0], y = stage.grid[1], z = stage.grid[2], threads = stage.threads;
        team.share = stage.share;
        for (unsigned b = blockIdx.x; b < x * y * z && threadIdx.x < threads; b += gridDim.x)
            run_block<Weights, KV>(stage, team, {{b % x, b / x % y, b / x / y}, {x, y, z}, threads});
        fetch_ahead(stage);
        load_stage(op, i + 1, stages);
        if (i + 1 < op.count)
            wait_for_blocks(op.barrier);
    }
}

/* The threads of a persistent kernel, of which two blocks to a processor are to be resident. */
#define RESIDENT THREADS, 2

#endif
