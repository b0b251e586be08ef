/* What kernels and those who launch them must agree on. CUDA, the host compiler and cffi's parser all read this file:
 * constants and structs only. */

enum {
    WARP = 32,             /* threads that run in step */
    LINE = 16,             /* bytes of the widest load: rows of weights and of caches are padded to whole lines */
    CACHE_LINE = 128,      /* bytes of the L2 cache that come at once */
    THREADS = 256,         /* of a block, where nothing asks for another number */
    MAX_THREADS = 1024,    /* of a block whose size follows the width of a row */
    FEW = 8,               /* rows that a warp multiplies by one row of a matrix */
    TILE = 64,             /* rows and columns of a tile of a product of many */
    TENSOR_THREADS = 128,  /* of a block that multiplies with tensor cores */
    STANDARD_BLOCKS = 528, /* of standard attention: four for each processor of a large GPU */
    SPLIT_THREADS = 128,   /* of a block of streaming attention */
    RANGE = 1024,          /* keys of a range of it */
    SPLIT_ROWS = 16,       /* rows of a step up to which their ranges are shared out */
    QUERIES = 64,          /* rows to a tile of flash attention; its keys are a page's */
    HOPPER_QUERIES = 128,  /* rows to a tile of it on Hopper */
    HOPPER_THREADS = 384,  /* of a block of it there: three warpgroups */
    HOPPER_TILES = 8,      /* pages of keys or of values that a block has room for */
    MEASURE_BLOCKS = 2112, /* of what is timed to know a GPU's limits: every processor is full several times */
    GROUP = 128            /* ids whose weights are added up before the others' */
};

/* What a persistent kernel (persistent.cu) can do, by the names of the kernels that do the same, without dtypes. */
enum stage_kind {
    STAGE_embedding, STAGE_rope_angles, STAGE_rmsnorm, STAGE_add_rmsnorm, STAGE_rmsnorm_rope_kv_store,
    STAGE_matmul_one, STAGE_matmul_add_one, STAGE_rmsnorm_matmul_one, STAGE_rmsnorm_matmul_swiglu_one, STAGE_logits_one,
    STAGE_matmul_few, STAGE_matmul_add_few, STAGE_rmsnorm_matmul_few, STAGE_rmsnorm_matmul_swiglu_few, STAGE_logits_few,
    STAGE_streaming_attention_one, STAGE_streaming_attention_two, STAGE_streaming_attention_merge
};

/* One of its stages: a launch as data. */
struct stage {
    int32_t kind, threads;   /* enum stage_kind; of a block */
    int32_t grid[3];
    /* What is fetched into the L2 cache behind this stage, of each of so many blocks, and again as much from so many
     * bytes further on (0: no more). */
    int32_t ahead_blocks;
    int64_t ahead, ahead_bytes, ahead_further;
    int64_t share;           /* struct team's */
    int64_t op[40];          /* the structs of the op, one after the other */
};

struct persistent {
    const struct stage *stages;
    uint32_t *barrier; /* 0 before the first launch, and nobody else's */
    int64_t count;     /* of stages */
};
