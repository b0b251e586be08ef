/* Packed matrix times one row or many, the same arithmetic for both: each output is one chain over k. Threads share
 * out the panels, the same way for every step, so that each reads the weights that it put into memory itself, and then
 * those that another has not come to. */
#include "amx.h"
#include "quantised.h"
#include "swiglu.h"
#include "tile.h"

enum {
    COLUMNS = LANES == 16 ? 2 : 1,                    /* panels of a tile when there are many rows */
    TILE_ROWS = ACCUMULATORS / (COLUMNS * VECTORS),   /* 12, 6, 3 */
    SINGLE_COLUMNS = LANES == 8 ? 2 : 1,              /* panels of a single row: with one, sums would wait for each other */
    GATED_ROWS = 16                                   /* rows that make gating at once worth while */
};

/* Floats of packed x per row: one for each input, or one for each pair of bf16. */
static int64_t packed_floats(int32_t dtype, int64_t k)
{
    if (dtype != DTYPE_BF16)
        return k;
    return round_up(k, 2) / 2 * BF16_FLOATS;
}

/* Whether what a panel holds becomes f32 once for all rows: where there is no instruction for it. */
static bool widens_once(int32_t dtype) { return LANES == 4 && dtype == DTYPE_F16; }

#ifdef __AMX_BF16__
static int64_t amx_scratch(int64_t k, int64_t rows, int32_t threads);
#endif

static int64_t scratch_bytes(int32_t dtype, int64_t group, int64_t k, int64_t rows, int32_t threads)
{
    if (is_quantised(dtype))
        return quantised_scratch(dtype, group, k, rows, threads);
#ifdef __AMX_BF16__
    if (dtype == DTYPE_BF16)
        return amx_scratch(k, rows, threads);
#endif
    int64_t wide = widens_once(dtype) ? threads * panel_bytes(DTYPE_F32, k) : 0;
    return round_up(packed_floats(dtype, k) * rows * 4, 64) + wide;
}

/* Row r of a tile of m rows of x as [k][m], bf16 as [k/2][m] pairs. */
static void pack_row(const float *x, int64_t k, int32_t dtype, float *out, int64_t m, int64_t r)
{
    if (dtype != DTYPE_BF16) {
        for (int64_t i = 0; i < k; i++)
            out[i * m + r] = x[i];
        return;
    }
    for (int64_t i = 0; i < k; i += 2) {
        float pair[2] = {x[i], i + 1 < k ? x[i + 1] : 0.0f};
        float *at = out + (i / 2 * m + r) * BF16_FLOATS;
#ifdef BF16_DOT
        uint16_t halves[2] = {f32_to_bf16(pair[0]), f32_to_bf16(pair[1])};
        memcpy(at, halves, sizeof halves);
#else
        memcpy(at, pair, sizeof pair);
#endif
    }
}

static void pack_x(const struct product *p, struct worker *me, float *packed)
{
    struct range rows = my_share(me, p->rows);
    int64_t floats = packed_floats(p->dtype, p->k);
    for (int64_t row = rows.begin; row < rows.end; row++) {
        int64_t first = row / TILE_ROWS * TILE_ROWS, m = min_i64(TILE_ROWS, p->rows - first);
        const float *x = product_row(p, row);
        pack_row(x, p->k, p->dtype, packed + first * floats, m, row - first);
    }
}

/* out[first .. first + rows][of `columns` panels] */
INLINE void multiply_tile(const struct product *p, const void *packed, int64_t first, int64_t panel, const int rows,
                          const int columns, const enum line kind)
{
    const int group = line_floats(kind);
    int64_t bytes = panel_bytes(p->dtype, p->k);
    const char *b = p->weight + panel * bytes;
    struct tile t = {.a = (const float *)packed + first * packed_floats(p->dtype, p->k), .a_row = group, .a_step = group * rows,
                     .b = b, .b_column = bytes, .b_step = line_bytes(kind),
                     .depth = kind == LINE_BF16 ? (p->k + 1) / 2 : p->k,
                     .ahead = b + AHEAD, .ahead_column = bytes, .ahead_step = line_bytes(kind)};
    vec acc[ACCUMULATORS];
    tile_clear(acc, rows, columns);
    tile_accumulate(acc, &t, rows, columns, kind, TILE_ROWS);
#pragma GCC unroll 8
    for (int i = 0; i < columns * VECTORS; i++) {
        int64_t column = panel * PANEL + i * LANES, left = p->out_width - column;
        if (left <= 0)
            return;
        vec bias = p->bias ? vec_load_upto(p->bias + column, left) : vec_set(0.0f);
#pragma GCC unroll 24
        for (int r = 0; r < rows; r++) {
            vec sum = acc[r * columns * VECTORS + i];
            vec_store_upto(p->out + (first + r) * p->out_stride + column, p->bias ? vec_add(sum, bias) : sum, left);
        }
    }
}

#define CASE(n, kind)                                                  \
    case n:                                                            \
        if (n <= TILE_ROWS)                                            \
            multiply_tile(p, packed, first, panel, n, 1, kind);        \
        break;

/* One panel times the rows from `first` on, at most a tile: calls multiply_tile with their number as a constant. */
#define MULTIPLY_ROWS(kind)                                                                     \
    switch (min_i64(TILE_ROWS, p->rows - first)) {                                              \
        CASE(1, kind) CASE(2, kind) CASE(3, kind) CASE(4, kind) CASE(5, kind) CASE(6, kind)     \
        CASE(7, kind) CASE(8, kind) CASE(9, kind) CASE(10, kind) CASE(11, kind) CASE(12, kind)  \
    }

/* The kernels of one kind of line, apart from each other: as one function they take a compiler very long. */
#define KERNELS(name, kind)                                                                              \
    static void rows_##name(const struct product *p, const void *packed, int64_t first, int64_t panel)   \
    {                                                                                                    \
        MULTIPLY_ROWS(kind)                                                                              \
    }                                                                                                    \
    static void tile_##name(const struct product *p, const void *packed, int64_t first, int64_t panel)   \
    {                                                                                                    \
        multiply_tile(p, packed, first, panel, TILE_ROWS, COLUMNS, kind);                                \
    }                                                                                                    \
    static void single_##name(const struct product *p, const void *packed, int64_t first, int64_t panel) \
    {                                                                                                    \
        multiply_tile(p, packed, first, panel, 1, SINGLE_COLUMNS, kind);                                 \
    }
KERNELS(f32, LINE_F32)
KERNELS(f16, LINE_F16)
KERNELS(bf16, LINE_BF16)

static panel_kernel *const rows_of[] = {[LINE_F32] = rows_f32, [LINE_F16] = rows_f16, [LINE_BF16] = rows_bf16};
static panel_kernel *const tile_of[] = {[LINE_F32] = tile_f32, [LINE_F16] = tile_f16, [LINE_BF16] = tile_bf16};
static panel_kernel *const single_of[] = {[LINE_F32] = single_f32, [LINE_F16] = single_f16, [LINE_BF16] = single_bf16};

static struct panel_kernels kernels_of(enum line kind)
{
    return (struct panel_kernels){tile_of[kind], rows_of[kind], single_of[kind], TILE_ROWS, COLUMNS, SINGLE_COLUMNS};
}

static void multiply_plain(const struct product *p, const void *packed, struct range panels, struct worker *me)
{
    struct panel_kernels k = kernels_of(line_of(p->dtype));
    (void)me;
    multiply_panels(p, packed, &k, panels);
}

/* Many rows: each panel becomes f32, in the order of the sums that there would be otherwise. */
static void multiply_widened(const struct product *p, const void *packed, struct range panels, struct worker *me)
{
    struct product wide = *p;
    float *own = (float *)((char *)packed + round_up(p->k * p->rows * 4, 64)) + me->index * p->k * PANEL;
    wide.dtype = DTYPE_F32;
    wide.weight = (const char *)own;
    for (int64_t panel = panels.begin; panel < panels.end; panel++) {
        int64_t column = panel * PANEL;
        const char *line = p->weight + panel * panel_bytes(p->dtype, p->k);
        float *to = own;
        for (int64_t i = 0; i < p->k; i++, line += line_bytes(LINE_F16))
            to = widen_line(line, to, LINE_F16);
        wide.out = p->out + column;
        wide.bias = p->bias ? p->bias + column : NULL;
        wide.out_width = min_i64(p->out_width - column, PANEL);
        for (int64_t first = 0; first < p->rows; first += TILE_ROWS)
            rows_f32(&wide, packed, first, 0);
    }
}

#ifdef __AMX_BF16__
enum { BLOCK = 16, PANELS = 2 }; /* rows of a tile; panels that share a reading of x */

/* x as the tile unit wants it: tiles of 16 rows and 32 inputs, one after the other. */
static int64_t amx_block_bytes(int64_t k) { return round_up(k, 32) / 32 * 1024; }

static void amx_pack_x(const struct product *p, struct worker *me, char *packed)
{
    struct range rows = my_share(me, p->rows);
    for (int64_t row = rows.begin; row < rows.end; row++) {
        const float *x = product_row(p, row);
        char *to = packed + row / BLOCK * amx_block_bytes(p->k) + row % BLOCK * 64;
        for (int64_t i = 0; i < p->k; i += 32, to += 1024) {
            int64_t left = p->k - i;
            vec_store_bf16((uint16_t *)to, vec_load_upto(x + i, left));
            vec_store_bf16((uint16_t *)to + 16, left > 16 ? vec_load_upto(x + i + 16, left - 16) : vec_set(0.0f));
        }
    }
}

/* All rows of up to PANELS panels. The last ones, and those with a bias, go through a buffer. */
static void amx_multiply(const struct product *p, const void *packed, struct range panels, struct worker *me)
{
    int64_t blocks = round_up(p->rows, BLOCK) / BLOCK, block_bytes = amx_block_bytes(p->k);
    float *buffer = (float *)((char *)packed + blocks * block_bytes) + me->index * blocks * BLOCK * PANELS * PANEL;
    int64_t count = panels.end - panels.begin, column = panels.begin * PANEL, bytes = panel_bytes(p->dtype, p->k);
    int64_t width = min_i64(count * PANEL, p->out_width - column);
    const char *weight = p->weight + panels.begin * bytes;
    bool direct = !p->bias && width == count * PANEL;
    struct amx_product product = {.a = packed, .a_row = 64, .a_step = 1024, .a_block = block_bytes, .b = &weight,
                                  .pieces = 1, .depth = (p->k + 1) / 2, .b_step = 64, .b_column = bytes,
                                  .c = direct ? p->out + column : buffer,
                                  .c_row = direct ? p->out_stride : PANELS * PANEL};
    amx_product(&product, p->rows, count);
    if (direct)
        return;
    for (int64_t r = 0; r < p->rows; r++)
        for (int64_t i = 0; i < width; i += LANES) {
            vec sum = vec_load(buffer + r * PANELS * PANEL + i);
            if (p->bias)
                sum = vec_add(sum, vec_load_upto(p->bias + column + i, width - i));
            vec_store_upto(p->out + r * p->out_stride + column + i, sum, width - i);
        }
}

static int64_t amx_scratch(int64_t k, int64_t rows, int32_t threads)
{
    int64_t blocks = round_up(rows, BLOCK) / BLOCK;
    return blocks * amx_block_bytes(k) + threads * blocks * BLOCK * PANELS * PANEL * 4;
}

#endif

static void multiply(const struct product *p, struct worker *me)
{
    void *packed = me->team->scratch;
    int64_t bytes = panel_bytes(p->dtype, p->k);
    if (is_quantised(p->dtype)) {
        multiply_quantised(p, me);
        return;
    }
#ifdef __AMX_BF16__
    if (p->dtype == DTYPE_BF16) {
        /* One row waits for memory: one straight stream. */
        struct shared_panels shared = {amx_multiply, p->rows == 1 ? 1 : PANELS, bytes};
        amx_pack_x(p, me, packed);
        share_panels(p, packed, &shared, me);
        return;
    }
#endif
    struct panel_kernels k = kernels_of(line_of(p->dtype));
    bool widens = widens_once(p->dtype) && p->rows > TILE_ROWS;
    struct shared_panels shared = {widens ? multiply_widened : multiply_plain, handful(p, &k, bytes), bytes};
    pack_x(p, me, packed);
    share_panels(p, packed, &shared, me);
}

static struct product product_of(const struct matmul *op)
{
    return (struct product){.x = op->x, .weight = op->weight, .bias = op->bias, .out = op->out, .rows = *op->rows,
                            .k = op->x_width, .x_stride = op->x_stride, .out_width = op->out_width,
                            .out_stride = op->out_stride, .dtype = op->weight_dtype, .group = op->weight_group};
}

void matmul(const struct matmul *op, struct worker *me)
{
    struct product p = product_of(op);
    multiply(&p, me);
}

void matmul_swiglu(const struct matmul *op, const struct swiglu *next, struct worker *me)
{
    struct product p = product_of(op);
    if (p.rows >= GATED_ROWS) {
        p.gated = next;
        p.gates = (char *)me->team->scratch + matmul_scratch(op, me->team->threads, *op->rows);
        multiply(&p, me);
        return;
    }
    multiply(&p, me);
    if (team_wait(me))
        swiglu(next, me);
}

/* Few rows wait for the weights, many multiply. */
static int64_t product_work(int32_t dtype, int64_t group, int64_t k, int64_t n, int64_t rows)
{
    int64_t bytes = (n + PANEL - 1) / PANEL * packed_panel_bytes(dtype, group, k);
    return rows > 0 ? max_i64(bytes, rows * n * k / 2) : 0;
}

int64_t matmul_work(const struct matmul *op)
{
    return product_work(op->weight_dtype, op->weight_group, op->x_width, op->out_width, *op->rows);
}

int64_t matmul_scratch(const struct matmul *op, int32_t threads, int32_t max_rows)
{
    return round_up(scratch_bytes(op->weight_dtype, op->weight_group, op->x_width, max_rows, threads), 64);
}

int64_t matmul_swiglu_scratch(const struct matmul *op, int32_t threads, int32_t max_rows)
{
    return matmul_scratch(op, threads, max_rows) + threads * gates_bytes(max_rows);
}

void logits(const struct logits *op, struct worker *me)
{
    struct product p = {.row_index = op->row_index, .x = op->x, .weight = op->weight, .out = op->out,
                        .rows = *op->rows, .k = op->x_width, .x_stride = op->x_stride, .out_width = op->out_width,
                        .out_stride = op->out_stride, .dtype = op->weight_dtype, .group = op->weight_group};
    multiply(&p, me);
}

int64_t logits_work(const struct logits *op)
{
    return product_work(op->weight_dtype, op->weight_group, op->x_width, op->out_width, *op->rows);
}

int64_t logits_scratch(const struct logits *op, int32_t threads, int32_t max_rows)
{
    return scratch_bytes(op->weight_dtype, op->weight_group, op->x_width, max_rows, threads);
}
