/* The numbers that kernels and those who launch them must agree on. CUDA, the host compiler and cffi's parser all read
 * this file: constants only. */

enum {
    WARP = 32,             /* threads that run in step */
    LINE = 16,             /* bytes of the widest load: rows of weights and of caches are padded to whole lines */
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
