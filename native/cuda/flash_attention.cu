/* Flash attention for many rows over a bf16 cache (Dao, 2023), by tensor cores: a block has a tile of rows and a query
 * head, a warp 16 of the rows. Keys and values come a page at a time; while one is multiplied the other is on its way.
 * Rows of several sequences may share a tile: it goes through the pages of each, and rows look at their own only. */
#include "flash_attention.cuh"

template <int WIDTH> struct tiles {
    uint16_t q[QUERIES][WIDTH + 8], k[PAGE][WIDTH + 8], v[PAGE][WIDTH + 8]; /* 8 more: rows in different banks */
};

template <int WIDTH> DEVICE void load_queries(const struct attention &op, int64_t first, int64_t head, struct tiles<WIDTH> &t)
{
    float scale = query_scale(op);
    for (int i = threadIdx.x; i < QUERIES * WIDTH / 2; i += TENSOR_THREADS) {
        int row = i / (WIDTH / 2), d = i % (WIDTH / 2) * 2;
        bool there = first + row < *op.rows && d < op.head_dim;
        const float *q = op.q + (first + row) * op.q_stride + head * op.head_dim + d;
        *(uint32_t *)&t.q[row][d] = there ? pack_bf16(q[0] * scale, d + 1 < op.head_dim ? q[1] * scale : 0.0f) : 0;
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

/* out += weight [16][64] · v. */
template <int WIDTH> DEVICE void add_values(struct tiles<WIDTH> &t, float (*weight)[4], struct sums<WIDTH> &s)
{
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int key = 0; key < PAGE; key += 16) {
        uint32_t a[4];
        pack_weights(&weight[key / 8], a);
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
DEVICE void attend_sequence(const struct attention &op, const struct rows<QUERIES> &rows, int64_t first_row, int begin,
                            int end, struct tiles<WIDTH> &t, struct sums<WIDTH> &s)
{
    struct pages pages = pages_of(op, rows, begin, end);
    if (pages.last < pages.first)
        return;
    int mine[2];
    for (int r = 0; r < 2; r++) {
        int row = row_of_thread(r);
        mine[r] = row >= begin && row < end ? rows.pos[row] : -1;
    }
    int64_t kv_head = blockIdx.x / (op.heads / op.kv_heads), size = row_bytes<struct bf16>(op.head_dim);
    const char *keys = head_of<struct bf16>(op, page_of(op, first_row + begin, pages.first * PAGE), kv_head);
    fetch<WIDTH>(keys, size, t.k);
    for (int page = pages.first; page <= pages.last; page++) {
        float score[PAGE / 8][4], shrink[2];
        wait_for_copies<0>();
        __syncthreads(); /* the keys are here, and nobody reads the last values any more */
        fetch<WIDTH>(keys + PAGE * size, size, t.v);
        multiply_keys(t, score);
        __syncthreads(); /* nobody reads these keys any more */
        if (page < pages.last) {
            keys = head_of<struct bf16>(op, page_of(op, first_row + begin, (page + 1) * PAGE), kv_head);
            fetch<WIDTH>(keys, size, t.k);
        } else
            commit_copies(); /* of nothing: there is always one group behind the values */
        mask(op, mine, page * PAGE, score);
        soften(score, s, shrink);
        rescale(s, shrink);
        wait_for_copies<1>();
        __syncthreads(); /* the values are here */
        add_values(t, score, s);
    }
    __syncthreads(); /* the next sequence's keys go where these are */
}

template <int WIDTH> DEVICE void attend(const struct attention &op)
{
    DYNAMIC_SHARED(memory);
    __shared__ struct rows<QUERIES> rows;
    struct tiles<WIDTH> &t = *(struct tiles<WIDTH> *)memory;
    int64_t first = blockIdx.y * (int64_t)QUERIES;
    int count = min_of(QUERIES, (int)(*op.rows - first));
    if (count <= 0)
        return;
    find_rows(op, first, count, rows);
    load_queries(op, first, blockIdx.x, t);
    struct sums<WIDTH> s;
    clear(s);
    __syncthreads();
    for (int begin = 0, end; begin < count; begin = end) {
        end = end_of_sequence(rows, begin, count);
        attend_sequence(op, rows, first, begin, end, t, s);
    }
    write(op, rows, first, s);
}

KERNEL(flash_attention_64, attention, TENSOR_THREADS) { attend<64>(op); }
KERNEL(flash_attention_96, attention, TENSOR_THREADS) { attend<96>(op); }
KERNEL(flash_attention_128, attention, TENSOR_THREADS) { attend<128>(op); }
KERNEL(flash_attention_256, attention, TENSOR_THREADS) { attend<256>(op); }
