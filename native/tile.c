/* Products of any shape out of register tiles: full tiles first, then ever fewer rows. */
#include "amx.h"
#include "tile.h"

/* The most panels that fit into registers beside so many rows. */
#define COLUMNS_FOR(rows)                                                                                \
    ((rows) * 8 * VECTORS <= ACCUMULATORS ? 8 : (rows) * 4 * VECTORS <= ACCUMULATORS ? 4                 \
     : (rows) * 2 * VECTORS <= ACCUMULATORS ? 2 : 1)

/* C (+)= the whole numbers that a piece sums up to, times each row's unit. */
INLINE void add_words(const struct tile_product *p, const vec *acc, float *c, const float *unit, bool add, const int rows,
                      const int width)
{
#pragma GCC unroll 24
    for (int i = 0; i < rows * width; i++) {
        float *at = c + i / width * p->c_row + i % width * LANES;
        vec worth = vec_set(unit[i / width * p->unit_row]);
        vec_store(at, vec_fma(vec_from_whole(acc[i]), worth, add ? vec_load(at) : vec_set(0.0f)));
    }
}

INLINE void multiply_tile(const struct tile_product *p, int64_t row, int64_t panel, const int rows, const int columns,
                          const enum line kind)
{
    const int width = columns * VECTORS;
    float *c = p->c + row * p->c_row + panel * PANEL;
    struct tile t = {.a = p->a + row * p->a_row, .a_row = p->a_row, .a_step = line_floats(kind), .b_step = p->b_step,
                     .b_column = p->b_column, .depth = p->depth, .ahead_step = columns * p->ahead_step,
                     .ahead_column = p->ahead_step};
    vec acc[ACCUMULATORS];
    if (p->add && kind != LINE_I8) {
#pragma GCC unroll 24
        for (int i = 0; i < rows * width; i++)
            acc[i] = vec_load(c + i / width * p->c_row + i % width * LANES);
    } else
        tile_clear(acc, rows, columns);
    for (int64_t piece = 0; piece < p->pieces; piece++, t.a += p->depth * line_floats(kind)) {
        t.b = p->b[piece] + panel * p->b_column;
        t.ahead = p->ahead[piece] + panel * p->depth * p->ahead_step;
        tile_accumulate(acc, &t, rows, columns, kind, WAITING_ROWS);
        if (kind == LINE_I8) {
            add_words(p, acc, c, p->unit + row * p->unit_row + piece, p->add || piece > 0, rows, width);
            tile_clear(acc, rows, columns);
        }
    }
    if (kind == LINE_I8)
        return;
#pragma GCC unroll 24
    for (int i = 0; i < rows * width; i++)
        vec_store(c + i / width * p->c_row + i % width * LANES, acc[i]);
}

/* As many full tiles of `height` rows as there are, panels outermost: those of a tile stay in the L1 cache. Returns the
 * row after them. */
INLINE int64_t multiply_rows(const struct tile_product *p, int64_t row, int64_t rows, int64_t panels, const int height,
                             const enum line kind)
{
    const int columns = COLUMNS_FOR(height), half = columns > 1 ? columns / 2 : 1;
    int64_t end = row + (rows - row) / height * height, panel = 0;
    if (end == row)
        return row;
    for (; panel + columns <= panels; panel += columns)
        for (int64_t r = row; r < end; r += height)
            multiply_tile(p, r, panel, height, columns, kind);
    for (; half > 1 && panel + half <= panels; panel += half)
        for (int64_t r = row; r < end; r += height)
            multiply_tile(p, r, panel, height, half, kind);
    for (; panel < panels; panel++)
        for (int64_t r = row; r < end; r += height)
            multiply_tile(p, r, panel, height, 1, kind);
    return end;
}

/* A function for each kind of line and height: as one they take a compiler very long. */
#define HEIGHT(name, kind, height)                                                                                \
    static int64_t name##_##height(const struct tile_product *p, int64_t row, int64_t rows, int64_t panels)       \
    {                                                                                                             \
        return multiply_rows(p, row, rows, panels, height <= ACCUMULATORS / VECTORS ? height : 1, kind);          \
    }
#define KIND(name, kind)                                                                                          \
    HEIGHT(name, kind, 1) HEIGHT(name, kind, 2) HEIGHT(name, kind, 3) HEIGHT(name, kind, 6) HEIGHT(name, kind, 12)
KIND(f32, LINE_F32)
KIND(f16, LINE_F16)
KIND(bf16, LINE_BF16)
KIND(i8, LINE_I8)

typedef int64_t kernel(const struct tile_product *p, int64_t row, int64_t rows, int64_t panels);
#define HEIGHTS(name) {name##_12, name##_6, name##_3, name##_2, name##_1}
static kernel *const kernels[][5] = {
    [LINE_F32] = HEIGHTS(f32), [LINE_F16] = HEIGHTS(f16), [LINE_BF16] = HEIGHTS(bf16), [LINE_I8] = HEIGHTS(i8)};
static const int heights[5] = {12, 6, 3, 2, 1};

/* Whether tiles of so many rows are of use here. Two or three rows wait for B, and should read its lines whole: where
 * registers do not suffice for that, one row after the other does it better, unless widening B is most of the work. */
static bool is_useful(int height, enum line kind)
{
    if (height * VECTORS > ACCUMULATORS || (height == 12 && LANES < 16))
        return false;
    return height == 1 || height >= 6 || kind == LINE_I8 || height * 2 * VECTORS < ACCUMULATORS;
}

void tile_product(const struct tile_product *p, int64_t rows, int64_t panels)
{
#ifdef __AMX_BF16__
    if (p->kind == LINE_BF16) {
        struct amx_product product = {.a = (const char *)p->a, .a_row = p->a_row * 4, .a_step = 64,
                                      .a_block = 16 * p->a_row * 4, .b = p->b, .pieces = p->pieces, .depth = p->depth,
                                      .b_step = p->b_step, .b_column = p->b_column, .c = p->c,
                                      .c_row = p->c_row, .add = p->add};
        amx_product(&product, rows, panels);
        return;
    }
#endif
    int64_t row = 0;
    for (int i = 0; row < rows; i++)
        if (is_useful(heights[i], p->kind))
            row = kernels[p->kind][i](p, row, rows, panels);
}
