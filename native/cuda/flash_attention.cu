/* Flash attention for many rows over a bf16 cache (Dao, 2023), by tensor cores: a block has a tile of rows and a query
 * head, a warp 16 of the rows. Keys and values come a page at a time; while one is multiplied the other is on its way.
 * Rows of several sequences may share a tile: it goes through the pages of each, and rows look at their own only. */
#include "cache.cuh"

enum { ROWS_OF_WARP = 16 };

template <int WIDTH> struct tiles {
    uint16_t q[QUERIES][WIDTH + 8], k[PAGE][WIDTH + 8], v[PAGE][WIDTH + 8]; /* 8 more: rows in different banks */
};

/* What a thread has of a warp's 16 rows: two of them, and of each every fourth pair of columns. */
template <int WIDTH> struct sums {
    float max[2], sum[2], out[WIDTH / 8][4];
};

/* The rows of a tile: their positions, -1 for rows that are not here, and their sequences. */
struct rows {
    int pos[QUERIES], seq[QUERIES];
};

template <int WIDTH> DEVICE void load_queries(const struct attention &op, int64_t first, int64_t head, struct tiles<WIDTH> &t)
{
    for (int i = threadIdx.x; i < QUERIES * WIDTH / 2; i += TENSOR_THREADS) {
        int row = i / (WIDTH / 2), d = i % (WIDTH / 2) * 2;
        bool there = first + row < *op.rows && d < op.head_dim;
        const float *q = op.q + (first + row) * op.q_stride + head * op.head_dim + d;
        *(uint32_t *)&t.q[row][d] = there ? pack_bf16(q[0], d + 1 < op.head_dim ? q[1] : 0.0f) : 0;
    }
}

/* Starts to copy 64 keys or values of a page; columns behind head_dim become 0. */
template <int WIDTH> DEVICE void fetch(const char *from, int64_t size, uint16_t (*to)[WIDTH + 8])
{
    for (int i = threadIdx.x; i < PAGE * WIDTH / 8; i += TENSOR_THREADS) {
        int row = i / (WIDTH / 8), line = i % (WIDTH / 8);
        bool there = line * LINE < size;
        copy_line(&to[row][line * 8], there ? from + row * size + line * LINE : from, there ? LINE : 0);
    }
    commit_copies();
}

/* score [16][64] = q · kᵀ of a warp. */
template <int WIDTH> DEVICE void multiply_keys(struct tiles<WIDTH> &t, float (*score)[4])
{
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int j = 0; j < PAGE / 8; j++)
        score[j][0] = score[j][1] = score[j][2] = score[j][3] = 0.0f;
#pragma unroll
    for (int d = 0; d < WIDTH; d += 16) {
        uint32_t a[4], b[4];
        load_matrices(a, &t.q[warp * ROWS_OF_WARP + lane % 16][d + lane / 16 * 8]);
#pragma unroll
        for (int j = 0; j < PAGE / 8; j += 2) {
            load_matrices(b, &t.k[(j + lane / 16) * 8 + lane % 8][d + lane / 8 % 2 * 8]);
            mma_bf16(score[j], a, b);
            mma_bf16(score[j + 1], a, b + 2);
        }
    }
}

/* Makes weights of scores; sums under an older maximum shrink. pos: of this thread's rows, -1 if they see nothing. */
template <int WIDTH>
DEVICE void soften(const struct attention &op, const int *pos, int first_key, float (*score)[4], struct sums<WIDTH> &s)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float max = s.max[r];
#pragma unroll
        for (int i = 0; i < PAGE / 4; i++) {
            float &x = score[i / 2][2 * r + i % 2];
            int key = first_key + i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2;
            bool seen = key <= pos[r] && (op.window == 0 || key > pos[r] - op.window);
            x = seen ? x * op.scale * 1.44269504f : -INFINITY;
            max = fmaxf(max, x);
        }
        max = warp_max(max, 4);
        float base = max == -INFINITY ? 0.0f : max, shrink = exp2f(s.max[r] - base), sum = 0.0f;
#pragma unroll
        for (int i = 0; i < PAGE / 4; i++) {
            float &x = score[i / 2][2 * r + i % 2];
            x = exp2f(x - base);
            sum += x;
        }
        s.max[r] = max;
        s.sum[r] = s.sum[r] * shrink + sum;
#pragma unroll
        for (int j = 0; j < WIDTH / 8; j++)
            s.out[j][2 * r] *= shrink, s.out[j][2 * r + 1] *= shrink;
    }
}

/* out += weight [16][64] · v. The weights lie as the next product wants them. */
template <int WIDTH> DEVICE void add_values(struct tiles<WIDTH> &t, float (*weight)[4], struct sums<WIDTH> &s)
{
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int key = 0; key < PAGE; key += 16) {
        float *w0 = weight[key / 8], *w1 = weight[key / 8 + 1];
        uint32_t a[4] = {pack_bf16(w0[0], w0[1]), pack_bf16(w0[2], w0[3]), pack_bf16(w1[0], w1[1]), pack_bf16(w1[2], w1[3])};
#pragma unroll
        for (int j = 0; j < WIDTH / 8; j += 2) {
            uint32_t b[4];
            load_transposed(b, &t.v[key + lane % 16][(j + lane / 16) * 8]);
            mma_bf16(s.out[j], a, b);
            mma_bf16(s.out[j + 1], a, b + 2);
        }
    }
}

/* Of the rows [begin, end) of a tile, all of one sequence, those that are here go through its pages. */
template <int WIDTH>
DEVICE void attend_sequence(const struct attention &op, const struct rows &rows, int64_t first_row, int begin, int end,
                            struct tiles<WIDTH> &t, struct sums<WIDTH> &s)
{
    int lowest = INT32_MAX, highest = -1, mine[2];
    for (int i = begin; i < end; i++)
        if (rows.pos[i] >= 0)
            lowest = min_of(lowest, rows.pos[i]), highest = max_of(highest, rows.pos[i]);
    if (highest < 0)
        return;
    for (int r = 0; r < 2; r++) {
        int row = threadIdx.x / WARP * ROWS_OF_WARP + threadIdx.x % WARP / 4 + 8 * r;
        mine[r] = row >= begin && row < end ? rows.pos[row] : -1;
    }
    int64_t kv_head = blockIdx.x / (op.heads / op.kv_heads), size = row_bytes<struct bf16>(op.head_dim);
    int first = op.window > 0 ? max_of(0, lowest - op.window + 1) / PAGE : 0, last = highest / PAGE;
    const char *keys = head_of<struct bf16>(op, page_of(op, first_row + begin, first * PAGE), kv_head);
    fetch<WIDTH>(keys, size, t.k);
    for (int page = first; page <= last; page++) {
        float score[PAGE / 8][4];
        wait_for_copies<0>();
        __syncthreads(); /* the keys are here, and nobody reads the last values any more */
        fetch<WIDTH>(keys + PAGE * size, size, t.v);
        multiply_keys(t, score);
        __syncthreads(); /* nobody reads these keys any more */
        if (page < last) {
            keys = head_of<struct bf16>(op, page_of(op, first_row + begin, (page + 1) * PAGE), kv_head);
            fetch<WIDTH>(keys, size, t.k);
        } else
            commit_copies(); /* of nothing: there is always one group behind the values */
        soften(op, mine, page * PAGE, score, s);
        wait_for_copies<1>();
        __syncthreads(); /* the values are here */
        add_values(t, score, s);
    }
    __syncthreads(); /* the next sequence's keys go where these are */
}

template <int WIDTH> DEVICE void write(const struct attention &op, const struct rows &rows, int64_t first, struct sums<WIDTH> &s)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = threadIdx.x / WARP * ROWS_OF_WARP + threadIdx.x % WARP / 4 + 8 * r;
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

template <int WIDTH> DEVICE void attend(const struct attention &op)
{
    DYNAMIC_SHARED(memory);
    __shared__ struct rows rows;
    struct tiles<WIDTH> &t = *(struct tiles<WIDTH> *)memory;
    int64_t first = blockIdx.y * (int64_t)QUERIES;
    int count = min_of(QUERIES, (int)(*op.rows - first));
    if (count <= 0)
        return;
    for (int i = threadIdx.x; i < QUERIES; i += TENSOR_THREADS) {
        struct view view;
        rows.pos[i] = i < count && sees(op, first + i, view) ? op.pos[first + i] : -1;
        rows.seq[i] = i < count ? op.seq[first + i] : -1;
    }
    load_queries(op, first, blockIdx.x, t);
    struct sums<WIDTH> s;
#pragma unroll
    for (int j = 0; j < WIDTH / 8; j++)
        s.out[j][0] = s.out[j][1] = s.out[j][2] = s.out[j][3] = 0.0f;
    s.max[0] = s.max[1] = -INFINITY, s.sum[0] = s.sum[1] = 0.0f;
    __syncthreads();
    for (int begin = 0, end; begin < count; begin = end) {
        for (end = begin + 1; end < count && rows.seq[end] == rows.seq[begin];)
            end++;
        attend_sequence(op, rows, first, begin, end, t, s);
    }
    write(op, rows, first, s);
}

KERNEL(flash_attention_64, attention, TENSOR_THREADS) { attend<64>(op); }
KERNEL(flash_attention_96, attention, TENSOR_THREADS) { attend<96>(op); }
KERNEL(flash_attention_128, attention, TENSOR_THREADS) { attend<128>(op); }
KERNEL(flash_attention_256, attention, TENSOR_THREADS) { attend<256>(op); }
