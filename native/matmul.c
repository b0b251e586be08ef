/* Packed matrix times one row or many, the same arithmetic for both: each output is one chain over k. Threads share
 * out the panels, the same way for every step, so that each reads the weights that it put into memory itself, and then
 * those that another has not come to. */
#include "amx.h"
#include "quantised.h"
#include "tile.h"

enum {
    COLUMNS = LANES == 16 ? 2 : 1,                    /* panels of a tile when there are many rows */
    TILE_ROWS = ACCUMULATORS / (COLUMNS * VECTORS),   /* 12, 6, 3 */
    SINGLE_COLUMNS = LANES == 8 ? 2 : 1,              /* panels of a single row: with one, sums would wait for each other */
    HANDFUL = 32 << 10                                /* bytes of weights to take at a time for few rows: some 3 µs */
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

/* Many rows: each panel becomes f32, in the order of the sums that there would be otherwise. */
static void multiply_widened(const struct product *p, struct worker *me)
{
    struct product wide = *p;
    char *packed = me->team->scratch;
    float *own = (float *)(packed + round_up(p->k * p->rows * 4, 64)) + me->index * p->k * PANEL;
    wide.dtype = DTYPE_F32;
    wide.weight = (const char *)own;
    pack_x(&wide, me, (float *)packed);
    share_out(me);
    if (!team_wait(me))
        return;
    for (struct range panels; take_next(me, panels_of(p), 1, &panels);) {
        int64_t column = panels.begin * PANEL;
        const char *line = p->weight + panels.begin * panel_bytes(p->dtype, p->k);
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

/* out[all rows][of `panels` panels]. The last ones, and those with a bias, go through a buffer. */
static void amx_multiply(const struct product *p, const char *packed, float *buffer, int64_t panel, int64_t panels)
{
    int64_t bytes = panel_bytes(p->dtype, p->k), column = panel * PANEL, width = min_i64(panels * PANEL, p->out_width - column);
    const char *weight = p->weight + panel * bytes;
    bool direct = !p->bias && width == panels * PANEL;
    struct amx_product product = {.a = packed, .a_row = 64, .a_step = 1024, .a_block = amx_block_bytes(p->k), .b = &weight,
                                  .pieces = 1, .depth = (p->k + 1) / 2, .b_step = 64, .b_column = bytes,
                                  .c = direct ? p->out + column : buffer,
                                  .c_row = direct ? p->out_stride : PANELS * PANEL};
    amx_product(&product, p->rows, panels);
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

static void multiply_by_tiles(const struct product *p, struct worker *me)
{
    int64_t blocks = round_up(p->rows, BLOCK) / BLOCK;
    char *packed = me->team->scratch;
    float *buffer = (float *)(packed + blocks * amx_block_bytes(p->k)) + me->index * blocks * BLOCK * PANELS * PANEL;
    amx_pack_x(p, me, packed);
    share_out(me);
    if (!team_wait(me))
        return;
    int64_t together = p->rows == 1 ? 1 : PANELS; /* one row waits for memory: one straight stream */
    for (struct range panels; take_next(me, panels_of(p), together, &panels);)
        amx_multiply(p, packed, buffer, panels.begin, panels.end - panels.begin);
}
#endif

int64_t handful(const struct product *p, const struct panel_kernels *k, int64_t bytes)
{
    if (p->rows > k->tile_rows)
        return k->columns;
    return max_i64(k->single_columns, round_up(HANDFUL / max_i64(1, bytes), k->single_columns));
}

void multiply_panels(const struct product *p, const void *packed, const struct panel_kernels *k, struct range panels)
{
    int64_t panel = panels.begin, tiled = p->rows / k->tile_rows * k->tile_rows;
    if (k->single_columns > 1 && p->rows == 1)
        for (; panel + k->single_columns <= panels.end; panel += k->single_columns)
            k->single(p, packed, 0, panel);
    if (k->columns > 1 && p->rows > k->tile_rows)
        for (; panel + k->columns <= panels.end; panel += k->columns) {
            for (int64_t first = 0; first < tiled; first += k->tile_rows)
                k->tile(p, packed, first, panel);
            for (int64_t c = 0; c < k->columns && tiled < p->rows; c++)
                k->rest(p, packed, tiled, panel + c);
        }
    for (; panel < panels.end; panel++)
        for (int64_t first = 0; first < p->rows; first += k->tile_rows)
            k->rest(p, packed, first, panel);
}

static void multiply(const struct product *p, struct worker *me)
{
    if (is_quantised(p->dtype)) {
        multiply_quantised(p, me);
        return;
    }
#ifdef __AMX_BF16__
    if (p->dtype == DTYPE_BF16) {
        multiply_by_tiles(p, me);
        return;
    }
#endif
    if (widens_once(p->dtype) && p->rows > TILE_ROWS) {
        multiply_widened(p, me);
        return;
    }
    enum line kind = line_of(p->dtype);
    struct panel_kernels k = {tile_of[kind], rows_of[kind], single_of[kind], TILE_ROWS, COLUMNS, SINGLE_COLUMNS};
    pack_x(p, me, (float *)me->team->scratch);
    share_out(me);
    if (!team_wait(me))
        return;
    int64_t together = handful(p, &k, panel_bytes(p->dtype, p->k));
    for (struct range panels; take_next(me, panels_of(p), together, &panels);)
        multiply_panels(p, me->team->scratch, &k, panels);
}

void matmul(const struct matmul *op, struct worker *me)
{
    struct product p = {.x = op->x, .weight = op->weight, .bias = op->bias, .out = op->out, .rows = *op->rows,
                        .k = op->x_width, .x_stride = op->x_stride, .out_width = op->out_width,
                        .out_stride = op->out_stride, .dtype = op->weight_dtype, .group = op->weight_group};
    multiply(&p, me);
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
    return scratch_bytes(op->weight_dtype, op->weight_group, op->x_width, max_rows, threads);
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
