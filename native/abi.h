/* The one description of everything that crosses from Python to native code. C, CUDA and cffi's parser all read
 * this file, so it holds fixed-width fields and prototypes only: no #include, no #ifdef (native.h adds those).
 *
 * An op's struct, its C function, its Python module and its test share one name. Field names follow one rule, which
 * lets the lowering fill a struct by itself:  `x` is the address of tensor x;  `x_width` the length of its rows;
 * `x_stride` the elements from one row to the next;  `x_dtype` its enum dtype;  `x_group` how many inputs of a
 * quantised matrix share a scale, else 0;  `rows` points to the number of rows in this step;  any other field is a
 * scalar that the layer passes under that name. */

enum {
    PAGE = 64,          /* positions in a page of the KV cache */
    PANEL = 16,         /* outputs in a panel of a packed weight matrix */
    LOGIT_ROWS = 32,    /* rows of logits made at once */
    MOST_MEETING = 64,  /* ranks of one machine that can share a memory */
    MAX_LOGPROBS = 20   /* most alternatives reported for a token */
};

enum dtype {
    DTYPE_F32 = 0, DTYPE_BF16 = 1, DTYPE_F16 = 2,
    /* Quantised weights: integers around zero times the scale of their group, or from zero up and added to its minimum.
     * I8 is a dtype of the KV cache, too. */
    DTYPE_I8 = 3, DTYPE_I4 = 4, DTYPE_U8 = 5, DTYPE_U4 = 6
};

enum status {
    STATUS_OK = 0,
    STATUS_CANCELLED = 1,  /* control.cancel was set: the step did not happen */
    STATUS_TOKEN = 2,      /* row `detail` holds a token id outside the vocabulary */
    STATUS_NOT_FINITE = 3  /* logits row `detail` holds NaN or infinity */
};

/* Shared with the caller while a plan runs. */
struct control {
    int32_t cancel;  /* set by anyone, at any time */
    int32_t status;  /* enum status */
    int32_t detail;
};

struct worker;

/* run_with_next: NULL, or what does this node and the next one at once, where both are to run and no times are wanted.
 * Nobody reads what comes between them.
 * work: what the node has to do now, in bytes that it reads; four floating-point operations, which take about as long,
 * count as one. NULL where it has little to do, or every thread is to take part whatever there is to do. */
struct node {
    void (*run)(const void *op, struct worker *me);
    void (*run_with_next)(const void *op, const void *next, struct worker *me);
    int64_t (*work)(const void *op);
    const void *op;
};

/* What a node took on one thread, in nanoseconds of CLOCK_MONOTONIC: its work, then the wait at the barrier after it. */
struct node_times {
    int64_t begin, end, passed;
};

/* Runs the nodes in order, a barrier after each, on `threads` threads, or on fewer where nodes know their work and it is
 * little. domains: 0, or how many NUMA nodes to pretend that
 * the threads run on. times: NULL, or [threads][count] to be filled; a thread or node that did not run leaves its entry
 * alone. Returns enum status. */
int32_t plan_run(const struct node *nodes, int32_t count, int32_t threads, int32_t domains, struct control *control,
                 void *scratch, struct node_times *times);

/* out[r] = row token[r] of a table [vocab_size, width], of which `ids` rows from first_id on are here: zeros where it
 * is another. table: packed [ids, width]. */
struct embedding {
    const int32_t *rows;
    const int32_t *token;
    const void *table;
    float *out;
    int32_t table_dtype, table_group, out_width, vocab_size, first_id, ids;
};
void embedding(const struct embedding *op, struct worker *me);

/* Each row of x is `groups` vectors of weight_width numbers: out = x / sqrt(mean(x²) + eps) · weight. */
struct rmsnorm {
    const int32_t *rows;
    const float *x, *weight;
    float *out;
    int32_t x_stride, out_stride, weight_width, groups;
    float eps;
};
void rmsnorm(const struct rmsnorm *op, struct worker *me);

/* x += delta;  out = rmsnorm(x). */
struct add_rmsnorm {
    const int32_t *rows;
    float *x;
    const float *delta, *weight;
    float *out;
    int32_t x_stride, delta_stride, out_stride, weight_width;
    float eps;
};
void add_rmsnorm(const struct add_rmsnorm *op, struct worker *me);

/* out = x · weightᵀ + bias. weight: packed [out_width, x_width]; bias: [out_width] or NULL. */
struct matmul {
    const int32_t *rows;
    const float *x;
    const void *weight;
    const float *bias;
    float *out;
    int32_t weight_dtype, weight_group, x_width, x_stride, out_width, out_stride;
};
void matmul(const struct matmul *op, struct worker *me);
int64_t matmul_scratch(const struct matmul *op, int32_t threads, int32_t max_rows);
int64_t matmul_work(const struct matmul *op);

/* out[i] = x[row_index[i]] · weightᵀ, for the rows that want logits. */
struct logits {
    const int32_t *rows;
    const int32_t *row_index;
    const float *x;
    const void *weight;
    float *out;
    int32_t weight_dtype, weight_group, x_width, x_stride, out_width, out_stride;
};
void logits(const struct logits *op, struct worker *me);
int64_t logits_scratch(const struct logits *op, int32_t threads, int32_t max_rows);
int64_t logits_work(const struct logits *op);

/* angles[r] = cos and sin of min(pos[r], last_pos) · inv_freq, in double precision, times `scaling`:
 * [width/2 cos | width/2 sin]. */
struct rope_angles {
    const int32_t *rows;
    const int32_t *pos;
    const double *inv_freq;
    float *angles;
    int32_t angles_width, last_pos;
    float scaling;
};
void rope_angles(const struct rope_angles *op, struct worker *me);

/* out = each head of x, its first half rotated against its second half. out may be x. */
struct rope {
    const int32_t *rows;
    const float *angles, *x;
    float *out;
    int32_t angles_width, x_width, x_stride, out_stride;
};
void rope(const struct rope *op, struct worker *me);

/* The KV cache of a layer: kv [kv_pages][kv_head][K, V]. Of the pages of a sequence, in order, entry i of its row in
 * page_table names the i-th; where ring_pages > 0, the first sink_pages entries stay and those after them are used in
 * turn, so that a sequence has no end (page.h).
 * In panels of 16 positions or columns: f32, f16: K [PAGE/16][head_dim][16], V [width/16][PAGE][16]. bf16: pairs,
 * K [PAGE/16][head_dim/2][16][2], V [width/16][PAGE/2][16][2]. i8: quads, K [PAGE/16][head_dim/4][16][4],
 * V [width/16][PAGE/4][16][4], and after all pages [kv_pages][kv_head][2][PAGE] f32, the scales of keys and of values.
 * width is head_dim rounded up to whole panels. */

/* Writes one position of keys and values for each row. */
struct kv_store {
    const int32_t *rows;
    const int32_t *pos, *seq, *page_table;
    const float *k, *v;
    void *kv;
    int32_t kv_dtype, k_width, k_stride, v_stride, page_table_stride, head_dim, kv_pages, sink_pages, ring_pages;
};
void kv_store(const struct kv_store *op, struct worker *me);

/* Attention of each row to the positions up to its own; where window > 0, to the last `window` of them and to the first
 * `sink`, which it sees by q_sink (NULL: none). Query head h reads KV head h / (heads / kv_heads). Rows outside
 * [from_pos, until_pos) are left alone. */
struct attention {
    const int32_t *rows;
    const int32_t *pos, *seq, *page_table;
    const float *q, *q_sink;
    const void *kv;
    float *out;
    int32_t kv_dtype, q_stride, q_sink_stride, out_stride, page_table_stride, heads, kv_heads, head_dim, kv_pages;
    int32_t window, sink, sink_pages, ring_pages;
    int32_t q_block, kv_block; /* queries and keys to a block of flash and streaming attention */
    int32_t from_pos, until_pos;
    float scale;
};
/* Of every kind. */
int64_t attention_work(const struct attention *op);
/* All scores of a row at once. */
void attention(const struct attention *op, struct worker *me);
int64_t attention_scratch(const struct attention *op, int32_t threads, int32_t max_rows);
/* Tiles of queries times blocks of keys, with a softmax that is mended as it goes. Absent where the library was built
 * without USE_FLASH_ATTENTION. */
void flash_attention(const struct attention *op, struct worker *me);
int64_t flash_attention_scratch(const struct attention *op, int32_t threads, int32_t max_rows);
/* The same sums over ranges of keys, each on its own, merged in order. */
void streaming_attention(const struct attention *op, struct worker *me);
int64_t streaming_attention_scratch(const struct attention *op, int32_t threads, int32_t max_rows);

/* out = silu(gate) · up, where x = [gate | up]. */
struct swiglu {
    const int32_t *rows;
    const float *x;
    float *out;
    int32_t x_stride, out_width, out_stride;
};
void swiglu(const struct swiglu *op, struct worker *me);

/* Both at once, of a matmul whose output is gate and up: in steps of many rows, that is not written. */
void matmul_swiglu(const struct matmul *op, const struct swiglu *next, struct worker *me);
int64_t matmul_swiglu_scratch(const struct matmul *op, int32_t threads, int32_t max_rows);

/* What the ranks of one machine share. */
struct meeting {
    int32_t rank, ranks;
    int32_t patience;          /* looks at who is missing before another process may have the core */
    volatile uint32_t waits;   /* odd while this rank waits for others, and never the same twice */
    int64_t epoch;             /* meetings so far */
    int64_t *arrived;          /* shared, [ranks][8]: to which meeting each rank has come, a cache line apart */
    float *halves;             /* shared, [2][half] */
    int64_t half;
};

/* x becomes the sum of all ranks' x. rows · x_width · ranks <= half */
struct all_reduce {
    const int32_t *rows;
    float *x;
    struct meeting *meeting;
    int32_t x_width;
};
void all_reduce(const struct all_reduce *op, struct worker *me);

/* Rank 0 gets every rank's share of the columns of x. x_width <= half */
struct gather {
    const int32_t *rows;
    float *x;
    struct meeting *meeting;
    int32_t x_width, x_stride;
};
void gather(const struct gather *op, struct worker *me);

/* What one row of logits is for. */
struct sampling {
    uint64_t seed;
    int64_t index;             /* of the token within its request: with the seed, the whole state of the generator */
    float temperature;         /* 0: the most likely token */
    float top_p, min_p;        /* 1 and 0: all */
    float repetition_penalty;  /* of every token so far, the prompt's too; 1: none */
    float presence_penalty;    /* of every generated token; 0: none */
    int32_t top_k;             /* 0: all */
    int32_t logprobs;          /* how many alternatives to report; -1: no logprobs at all */
    int32_t target;            /* >= 0: report on this token instead of drawing one */
    int32_t history_start, history_length, prompt_length; /* the sequence's tokens, in `history`, the prompt's first */
};

/* Draws token[r] of logits row r as sampling[r] says. Logprobs are those of the logits as they come: no penalty, no
 * temperature, nothing cut. Unless asked for, logprob is 0; alternatives that there are not, -1 and minus infinity. */
struct sample {
    const int32_t *rows;
    const struct sampling *sampling;
    const int32_t *history;
    const float *logits;
    int32_t *token;         /* [rows] */
    float *logprob;         /* [rows] */
    int32_t *top_token;     /* [rows][MAX_LOGPROBS], the most likely first */
    float *top_logprob;     /* [rows][MAX_LOGPROBS] */
    int32_t logits_stride;
    int32_t vocab_size;     /* ids from here on are padding: never looked at, never drawn */
};
void sample(const struct sample *op, struct worker *me);
int64_t sample_scratch(const struct sample *op, int32_t threads, int32_t max_rows);

/* Where some consecutive rows of a matrix come from: a file (fd >= 0) or memory. Rows are contiguous. */
struct source {
    int32_t fd, dtype, rows;
    int64_t offset;
    const void *data;
};

/* Reads `count` sources that stack up to an [n, k] matrix into packed panels, rows beyond n as zeros. Threads take
 * the panels they will read in matmul. Returns 0, 1 + the index of a source that ended too soon, or -1 for want of memory. */
int32_t pack_matrix(const struct source *sources, int32_t count, int32_t n, int32_t k, int32_t dtype, void *packed,
                    int32_t threads);
/* Bytes of a panel of PANEL rows of a packed matrix. group: of a quantised one, else 0. */
int64_t packed_panel_bytes(int32_t dtype, int32_t group, int32_t k);
/* Rounds n rows of k finite numbers, none so large that its scale would not be: I8 or I4, group 32, 64 or 128. Writes quants
 * [n, k], each in a byte of its own, counted from the lowest, and scales [n, ceil(k / group)], in f16. */
void quantise_rows(const float *values, int32_t n, int32_t k, int32_t dtype, int32_t group, uint8_t *quants,
                   uint16_t *scales);
/* Packs n rows of a quantised matrix: quants [n, k], each in a byte of its own, counted from the lowest; scales and, for
 * U8 and U4, minimums [n, ceil(k / group)], in f16. */
void pack_quantised(const uint8_t *quants, const uint16_t *scales, const uint16_t *minimums, int32_t n, int32_t k,
                    int32_t dtype, int32_t group, void *packed);
/* The reverse of both: rows [first, first + count) of a packed matrix as f32 [count, k]. */
void unpack_matrix(const void *packed, int32_t dtype, int32_t group, int32_t k, int32_t first, int32_t count, float *out);

/* Ends the threads that wait for more work of the thread that calls this. While there are more of all such threads than
 * CPUs, OpenMP has them sleep between two plans, and to wake them takes as long as a short plan. */
void release_threads(void);

/* Reads all of a memory on all threads, each its share as that many parallel streams: to be timed. */
uint64_t read_memory(const void *data, int64_t bytes, int32_t threads, int32_t streams);

/* Does `rounds` of the multiply-adds that products with weights of that dtype are made of, on all threads, in registers
 * alone: to be timed. Returns the operations, two for a multiply-add. A cache of f16 is multiplied as f32;
 * one of I8 as pairs of whole numbers of 16 bits, which nothing here measures. */
int64_t multiply_in_registers(int32_t dtype, int64_t rounds, int32_t threads);

/* Bytes of one head in a page of the cache, scales included. */
int64_t kv_head_bytes(int32_t dtype, int32_t head_dim);

/* Whether this CPU and its operating system run the library of that name. */
int32_t isa_supported(const char *name);

/* sizeof the struct of that name, -1 if there is none: checked against the caller's when a library is loaded. */
int64_t struct_size(const char *name);
