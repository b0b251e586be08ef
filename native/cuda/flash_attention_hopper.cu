/* Flash attention for many rows on Hopper, with the ideas of FlashAttention-3 (Shah and others, 2024). A block has a query
 * head and a tile of 128 rows, two warpgroups with 64 each. A third one copies: pages come by TMA into a ring of tiles,
 * keys and values in turn, ahead of those who multiply. These overlap twice. Within a warpgroup, while the tensor cores
 * multiply a page's values, threads make weights of the next page's scores; and the two warpgroups take turns to start
 * products, so that one has weights to make while the other multiplies.
 *
 * Queries and weights are first operands and stay in registers; keys [key][d] and values [key][d] lie as they do in the
 * cache, the second transposed by the tensor cores. */
#include "flash_attention.cuh"
#include "hopper.cuh"

enum {
    GROUPS = HOPPER_QUERIES / 64,          /* warpgroups that multiply; one more copies */
    BOX = PAGE * BOX_COLUMNS * 2,          /* bytes of a page's keys or values, 64 columns of them */
    EIGHT_ROWS = 8 * BOX_COLUMNS * 2,      /* the swizzle repeats: tiles begin at multiples of this */
    COPYING_REGISTERS = 40, REGISTERS = 232 /* 128 · 40 + 256 · 232 are not more than there are */
};

/* Tiles of a page's keys or values, filled again and again: number n, counted from the first page on, is in slot
 * n % HOPPER_TILES. full: its bytes are there; empty: every warp is done with it. */
struct ring {
    char *tiles;
    uint64_t *full, *empty;
};
template <int WIDTH> DEVICE char *tile_of(const struct ring &ring, uint32_t n)
{
    return ring.tiles + n % HOPPER_TILES * (WIDTH / BOX_COLUMNS * BOX);
}
DEVICE int parity_of(uint32_t n) { return n / HOPPER_TILES % 2; }

/* Fills tile n from a row of the cache on, when those who had it before are done. By one thread. */
template <int WIDTH> DEVICE void fill(const struct ring &ring, uint32_t n, const struct tensor_map &map, int row)
{
    uint64_t *full = &ring.full[n % HOPPER_TILES];
    wait_for(&ring.empty[n % HOPPER_TILES], 1 - parity_of(n));
    arrive_expecting(full, WIDTH / BOX_COLUMNS * BOX);
    for (int i = 0; i < WIDTH / BOX_COLUMNS; i++)
        copy_box(tile_of<WIDTH>(ring, n) + i * BOX, map, i * BOX_COLUMNS, row, full);
}
DEVICE void wait_until_full(const struct ring &ring, uint32_t n) { wait_for(&ring.full[n % HOPPER_TILES], parity_of(n)); }
DEVICE void release(const struct ring &ring, uint32_t n)
{
    if (threadIdx.x % WARP == 0)
        arrive(&ring.empty[n % HOPPER_TILES]);
}

/* Copies every page that a row of the tile sees, one sequence after the other. By one warp. */
template <int WIDTH>
DEVICE void copy_pages(const struct attention &op, const struct tensor_map &map, const struct rows<HOPPER_QUERIES> &rows,
                       int64_t first_row, int count, const struct ring &ring)
{
    int64_t kv_head = blockIdx.x / (op.heads / op.kv_heads);
    uint32_t n = 0;
    for (int begin = 0, end; begin < count; begin = end) {
        end = end_of_sequence(rows, begin, count);
        struct pages pages = pages_of(op, rows, begin, end);
        for (int page = pages.first; page <= pages.last; page++, n += 2) {
            int64_t row = (page_of(op, first_row + begin, page * PAGE) * op.kv_heads + kv_head) * 2 * PAGE;
            if (threadIdx.x % WARP == 0) {
                fill<WIDTH>(ring, n, map, (int)row);
                fill<WIDTH>(ring, n + 1, map, (int)row + PAGE);
            }
        }
    }
}

/* A thread's part of its warp's queries as first operands; columns behind head_dim are 0. */
template <int WIDTH>
DEVICE void load_queries(const struct attention &op, int64_t first_row, int count, uint32_t (*q)[4])
{
    float scale = query_scale(op);
#pragma unroll
    for (int i = 0; i < WIDTH / 4; i++) {
        int row = row_of_thread(i % 2), d = i / 4 * 16 + i / 2 % 2 * 8 + threadIdx.x % 4 * 2;
        const float *at = op.q + (first_row + row) * op.q_stride + blockIdx.x * op.head_dim + d;
        bool there = row < count && d < op.head_dim;
        q[i / 4][i % 4] = there ? pack_bf16(at[0] * scale, d + 1 < op.head_dim ? at[1] * scale : 0.0f) : 0;
    }
}

/* score [64][64] = q · keysᵀ of a warpgroup. */
template <int WIDTH>
DEVICE void multiply_keys(const char *keys, const uint32_t (&q)[WIDTH / 16][4], float (&score)[PAGE / 8][4])
{
    uint64_t described = describe(keys, 0, EIGHT_ROWS);
#pragma unroll
    for (int d = 0; d < WIDTH; d += 16)
        multiply<false>(score, q[d / 16], advance(described, d / BOX_COLUMNS * BOX + d % BOX_COLUMNS * 2), d > 0);
    end_group();
}

/* out += weight [64][64] · values. */
template <int WIDTH>
DEVICE void multiply_values(const char *values, const uint32_t (&weight)[PAGE / 16][4], float (&out)[WIDTH / 8][4])
{
    uint64_t described = describe(values, BOX, EIGHT_ROWS);
#pragma unroll
    for (int key = 0; key < PAGE; key += 16)
        multiply<true>(out, weight[key / 16], advance(described, key * BOX_COLUMNS * 2), true);
    end_group();
}

/* Warpgroups start their products in turn. */
DEVICE void take_turn() { wait_at(1 + threadIdx.x / WARPGROUP, GROUPS * WARPGROUP); }
DEVICE void pass_turn() { arrive_at(1 + (threadIdx.x / WARPGROUP + 1) % GROUPS, GROUPS * WARPGROUP); }

/* Pages [from, to) that only the other warpgroup sees. n: the first one's keys. */
DEVICE void skip_pages(const struct ring &ring, int from, int to, uint32_t n)
{
    for (; from < to; from++, n += 2) {
        take_turn();
        pass_turn();
        for (int part = 0; part < 2; part++) {
            wait_until_full(ring, n + part); /* or this would be an arrival for who had the tile before */
            release(ring, n + part);
        }
    }
}

DEVICE void pack_page(float (*weight)[4], uint32_t (&packed)[PAGE / 16][4])
{
#pragma unroll
    for (int i = 0; i < PAGE / 16; i++)
        pack_weights(&weight[2 * i], packed[i]);
}

/* A warpgroup goes through the pages of a sequence. n: the first one's keys; pos: of this thread's rows. Weights are made
 * while the values of the page before are multiplied. nvcc would move the wait for these up, before all arithmetic, but
 * not past a loop; so the wait for the page's own values, which is one, comes in between. */
template <int WIDTH>
DEVICE void attend_pages(const struct attention &op, const struct ring &ring, const uint32_t (&q)[WIDTH / 16][4],
                         struct pages pages, uint32_t n, const int *pos, struct sums<WIDTH> &s)
{
    float score[PAGE / 8][4], shrink[2];
    uint32_t weight[PAGE / 16][4];
    wait_until_full(ring, n);
    take_turn();
    begin_products();
    multiply_keys<WIDTH>(tile_of<WIDTH>(ring, n), q, score);
    pass_turn();
    wait_for_products<0>(score);
    release(ring, n);
    mask(op, pos, pages.first * PAGE, score);
    soften(score, s, shrink);
    wait_until_full(ring, n + 1);
    rescale(s, shrink);
    pack_page(score, weight);
    for (int page = pages.first + 1; page <= pages.last; page++) {
        n += 2;
        wait_until_full(ring, n);
        take_turn();
        begin_products();
        multiply_keys<WIDTH>(tile_of<WIDTH>(ring, n), q, score);
        multiply_values<WIDTH>(tile_of<WIDTH>(ring, n - 1), weight, s.out);
        pass_turn();
        wait_for_products<1>(score); /* the values' goes on */
        release(ring, n);
        mask(op, pos, page * PAGE, score);
        soften(score, s, shrink);
        wait_until_full(ring, n + 1);
        wait_for_products<0>(s.out);
        release(ring, n - 1);
        rescale(s, shrink);
        pack_page(score, weight);
    }
    begin_products();
    multiply_values<WIDTH>(tile_of<WIDTH>(ring, n + 1), weight, s.out);
    wait_for_products<0>(s.out);
    release(ring, n + 1);
}

/* The rows of a warpgroup, from queries to what comes out. */
template <int WIDTH>
DEVICE void attend_rows(const struct attention &op, const struct rows<HOPPER_QUERIES> &rows, int64_t first_row, int count,
                        const struct ring &ring)
{
    int group = threadIdx.x / WARPGROUP;
    uint32_t q[WIDTH / 16][4];
    load_queries<WIDTH>(op, first_row, count, q);
    struct sums<WIDTH> s;
    clear(s);
    if (group == GROUPS - 1)
        pass_turn();
    uint32_t n = 0;
    for (int begin = 0, end; begin < count; begin = end) {
        end = end_of_sequence(rows, begin, count);
        int pos[2], first = max_of(begin, group * 64), last = min_of(end, group * 64 + 64);
        for (int r = 0; r < 2; r++) {
            int row = row_of_thread(r);
            pos[r] = row >= begin && row < end ? rows.pos[row] : -1;
        }
        struct pages pages = pages_of(op, rows, begin, end), own = pages_of(op, rows, first, last);
        if (own.last < own.first)
            own = {pages.last + 1, pages.last};
        skip_pages(ring, pages.first, own.first, n);
        if (own.first <= own.last)
            attend_pages(op, ring, q, own, n + 2 * (own.first - pages.first), pos, s);
        skip_pages(ring, own.last + 1, pages.last + 1, n + 2 * (own.last + 1 - pages.first));
        n += 2 * max_of(0, pages.last + 1 - pages.first);
    }
    write(op, rows, first_row, s);
    if (group == 0)
        take_turn(); /* that nobody else will take: a barrier is left as it was found */
}

template <int WIDTH> DEVICE void attend(const struct attention &op, const struct tensor_map &map)
{
    DYNAMIC_SHARED(memory);
    __shared__ struct rows<HOPPER_QUERIES> rows;
    __shared__ uint64_t full[HOPPER_TILES], empty[HOPPER_TILES];
    struct ring ring = {memory + (-shared_address(memory) & (EIGHT_ROWS - 1)), full, empty};
    int64_t first_row = (gridDim.y - 1 - blockIdx.y) * (int64_t)HOPPER_QUERIES; /* those with most to do come first */
    int count = min_of(HOPPER_QUERIES, (int)(*op.rows - first_row));
    if (count <= 0)
        return;
    find_rows(op, first_row, count, rows);
    if (threadIdx.x == 0) {
        for (int i = 0; i < HOPPER_TILES; i++) {
            make_barrier(&full[i], 1);
            make_barrier(&empty[i], GROUPS * WARPGROUP / WARP);
        }
        publish_barriers();
    }
    __syncthreads();
    if (threadIdx.x / WARPGROUP == GROUPS) {
        give_registers<COPYING_REGISTERS>();
        if (threadIdx.x / WARP == GROUPS * WARPGROUP / WARP)
            copy_pages<WIDTH>(op, map, rows, first_row, count, ring);
    } else {
        take_registers<REGISTERS>();
        attend_rows<WIDTH>(op, rows, first_row, count, ring);
    }
}

KERNEL_WITH_MAP(flash_attention_hopper_64, attention, HOPPER_THREADS) { attend<64>(op, map); }
KERNEL_WITH_MAP(flash_attention_hopper_128, attention, HOPPER_THREADS) { attend<128>(op, map); }
