#include <math.h>

#include "quantised_inputs.h"

enum {
    COLUMNS = LANES == 16 ? 2 : 1,                      /* panels of a tile when there are many rows */
    TILE_ROWS = LANES == 16 ? 6 : LANES == 8 ? 2 : 1,   /* sums in integers and in floats fill the registers */
    WAITING_ROWS = 3                                    /* so few rows wait for memory */
};

int64_t quantised_scratch(int32_t dtype, int64_t group, int64_t k, int64_t rows, int32_t threads)
{
    return inputs_bytes(dtype, group, k, rows) + quantised_tiles_scratch(dtype, group, k, threads);
}

/* A quad of bytes as the dot takes it: in two words, as pairs of 16 bits, the even ones first. */
INLINE void store_quad(int32_t *words, const int8_t *quad, int64_t count)
{
    int16_t pairs[4] = {quad[0], quad[2], quad[1], quad[3]};
    memcpy(words, count == 1 ? (const void *)quad : pairs, (size_t)count * sizeof *words);
}

/* Rounds `count` inputs of a group, the rest of which is zero. What is not finite makes the scale NaN. */
static void round_group(const float *x, int64_t count, int64_t group, int32_t dtype, int32_t *record)
{
    enum { MOST = 256 };
    int8_t bytes[MOST];
    int32_t sum = 0;
    vec most = vec_set(0.0f), nothing = vec_set(0.0f);
    for (int64_t i = 0; i < count; i += LANES) {
        vec v = vec_load_upto(x + i, count - i);
        most = vec_max(most, vec_max(v, vec_sub(vec_set(0.0f), v)));
        nothing = vec_fma(v, vec_set(0.0f), nothing); /* or NaN */
    }
    float largest = vec_reduce_max(most), factor = largest > 0.0f ? 127.0f / largest : 0.0f;
    bool finite = vec_reduce_add(nothing) == 0.0f;
    factor = finite && factor < INFINITY ? factor : 0.0f; /* what is too close to zero for it is zero */
    for (int64_t i = 0; i < group; i += LANES) {
        vec v = i < count && finite ? vec_load_upto(x + i, count - i) : vec_set(0.0f);
        vec_round_bytes(vec_mul(v, vec_set(factor)), bytes + i);
    }
    for (int64_t i = 0; i < group; i++)
        sum += bytes[i];
    float scale = !finite ? NAN : factor > 0.0f ? largest / 127.0f : 0.0f, scaled = scale * (float)sum;
    memcpy(record + SCALE, &scale, 4);
    record[START] = -quant_zero(dtype) * sum;
    memcpy(record + SUM, &scaled, 4);
    int64_t words = quad_words(dtype);
    for (int64_t i = 0; i < group / 4; i++)
        store_quad(record + QUADS + i * words, bytes + i * 4, words);
}

static void round_inputs(const struct product *p, struct worker *me, int32_t *packed)
{
    int64_t words = row_words(p->dtype, p->group, p->k), record = record_words(p->dtype, p->group), groups = words / record;
    struct range share = my_share(me, p->rows * groups);
    for (int64_t i = share.begin; i < share.end; i++) {
        int64_t row = i / groups, first = i % groups * p->group;
        round_group(product_row(p, row) + first, max_i64(0, min_i64(p->group, p->k - first)), p->group,
                    p->dtype, packed + i * record);
    }
}

/* Products. */

/* sums[rows][columns * VECTORS] += the dots of a group. `bits` and the numbers must be constants where it is called. */
INLINE void add_dots(ivec *sums, const int32_t *const *a, int64_t a_row, const char *lines, int64_t b_column, int64_t group,
                     const int rows, const int columns, const int bits)
{
    const int width = columns * VECTORS, quads = bits == 4 ? 2 : 1; /* quads to a line */
    ivec second[TILE_ROWS * COLUMNS * VECTORS]; /* a chain of its own for the second quad, where that hides latency */
    const bool chains = quads == 2 && rows * width <= 4;
    if (chains)
#pragma GCC unroll 24
        for (int i = 0; i < rows * width; i++)
            second[i] = ivec_set(0);
    for (int64_t line = 0; line < group / (4 * quads); line++, lines += 64) {
        ivec low[COLUMNS * VECTORS], high[COLUMNS * VECTORS];
        if (rows <= WAITING_ROWS)
            FETCH_AHEAD(lines);
#pragma GCC unroll 24
        for (int i = 0; i < width; i++) {
            low[i] = ivec_load(lines + i / VECTORS * b_column + i % VECTORS * LANES * 4);
            if (quads == 2) {
                high[i] = ivec_high_halves(low[i]);
                low[i] = ivec_low_halves(low[i]);
            }
        }
#pragma GCC unroll 24
        for (int r = 0; r < rows; r++) {
            const int32_t *x = a[r / 3] + r % 3 * a_row + QUADS + line * quads * QUAD_WORDS(bits);
#pragma GCC unroll 24
            for (int i = 0; i < width; i++) {
                sums[r * width + i] = ivec_dot(sums[r * width + i], low[i], x);
                if (quads == 2 && chains)
                    second[r * width + i] = ivec_dot(second[r * width + i], high[i], x + QUAD_WORDS(bits));
                else if (quads == 2)
                    sums[r * width + i] = ivec_dot(sums[r * width + i], high[i], x + QUAD_WORDS(bits));
            }
        }
    }
    if (chains)
#pragma GCC unroll 24
        for (int i = 0; i < rows * width; i++)
            sums[i] = ivec_add(sums[i], second[i]);
}

#ifdef HALF_QUADS
/* The same of 4 bits, in sums of 16 bits as long as these suffice. */
INLINE void add_half_dots(ivec *sums, const int32_t *const *a, int64_t a_row, const char *lines, int64_t b_column,
                          int64_t group, const int rows, const int columns)
{
    const int width = columns * VECTORS;
    for (int64_t quad = 0; quad < group / 4;) {
        ivec halves[TILE_ROWS * COLUMNS * VECTORS];
#pragma GCC unroll 24
        for (int i = 0; i < rows * width; i++)
            halves[i] = ivec_set(0);
        int64_t until = min_i64(quad + HALF_QUADS, group / 4);
#pragma GCC unroll 4
        for (; quad < until; quad += 2, lines += 64) {
            if (rows <= WAITING_ROWS)
                FETCH_AHEAD(lines);
#pragma GCC unroll 24
            for (int i = 0; i < width; i++) {
                ivec both = ivec_load(lines + i / VECTORS * b_column + i % VECTORS * LANES * 4);
                ivec low = ivec_low_halves(both), high = ivec_high_halves(both);
#pragma GCC unroll 24
                for (int r = 0; r < rows; r++) {
                    const int32_t *x = a[r / 3] + r % 3 * a_row + QUADS + quad;
                    halves[r * width + i] = ivec_dot_halves(halves[r * width + i], low, x);
                    halves[r * width + i] = ivec_dot_halves(halves[r * width + i], high, x + 1);
                }
            }
        }
#pragma GCC unroll 24
        for (int i = 0; i < rows * width; i++)
            sums[i] = ivec_add_halves(sums[i], halves[i]);
    }
}
#endif

/* out[first .. first + rows][of `columns` panels] */
INLINE void multiply_tile(const struct product *p, const void *packed, int64_t first, int64_t panel, const int rows,
                          const int columns, const int32_t dtype)
{
    const int width = columns * VECTORS, groups = (int)block_groups(dtype), bits = (int)quant_bits(dtype);
    const int64_t b_column = quantised_panel_bytes(dtype, p->group, p->k), bytes = group_bytes(dtype, p->group);
    const int64_t a_row = row_words(dtype, p->group, p->k), record = record_words(dtype, p->group);
    const char *b = p->weight + panel * b_column, *end = b + b_column;
    const int32_t *a[2]; /* rows 0 and 3: three rows to a pointer is what addresses can express */
    vec acc[TILE_ROWS * COLUMNS * VECTORS];
    a[0] = (const int32_t *)packed + first * a_row;
    a[1] = a[0] + 3 * a_row;
#pragma GCC unroll 24
    for (int i = 0; i < rows * width; i++)
        acc[i] = vec_set(0.0f);
    for (; b < end; b += 64 + groups * bytes)
#pragma GCC unroll 2
        for (int g = 0; g < groups; g++, a[0] += record, a[1] += record) {
            ivec sums[TILE_ROWS * COLUMNS * VECTORS];
#pragma GCC unroll 24
            for (int i = 0; i < rows * width; i++)
                sums[i] = ivec_set(a[i / width / 3][i / width % 3 * a_row + START]);
            const char *lines = b + 64 + g * bytes;
#ifdef HALF_QUADS
            if (bits == 4)
                add_half_dots(sums, a, a_row, lines, b_column, p->group, rows, columns);
            else
#endif
                add_dots(sums, a, a_row, lines, b_column, p->group, rows, columns, bits);
#pragma GCC unroll 24
            for (int i = 0; i < width; i++) {
                const char *head = b + i / VECTORS * b_column + i % VECTORS * LANES * 2;
                vec scales = line_f16(head + g * PANEL * 2);
#pragma GCC unroll 24
                for (int r = 0; r < rows; r++) {
                    const int32_t *x = a[r / 3] + r % 3 * a_row;
                    vec *to = &acc[r * width + i];
                    *to = vec_fma(ivec_to_vec(sums[r * width + i]), vec_mul(scales, vec_set(as_float(x[SCALE]))), *to);
                    if (has_minimums(dtype))
                        *to = vec_fma(line_f16(head + PANEL * 2), vec_set(as_float(x[SUM])), *to);
                }
            }
        }
#pragma GCC unroll 8
    for (int i = 0; i < width; i++) {
        int64_t column = panel * PANEL + i * LANES, left = p->out_width - column;
        if (left <= 0)
            return;
        vec bias = p->bias ? vec_load_upto(p->bias + column, left) : vec_set(0.0f);
#pragma GCC unroll 24
        for (int r = 0; r < rows; r++)
            vec_store_upto(p->out + (first + r) * p->out_stride + column,
                           p->bias ? vec_add(acc[r * width + i], bias) : acc[r * width + i], left);
    }
}

#define CASE(n, dtype)                                                 \
    case n:                                                            \
        if (n <= TILE_ROWS)                                            \
            multiply_tile(p, packed, first, panel, n, 1, dtype);       \
        break;

/* The kernels of one dtype, apart from each other: as one function they take a compiler very long. */
#define KERNELS(name, dtype)                                                                                \
    static void rows_##name(const struct product *p, const void *packed, int64_t first, int64_t panel)      \
    {                                                                                                       \
        switch (min_i64(TILE_ROWS, p->rows - first)) {                                                      \
            CASE(1, dtype) CASE(2, dtype) CASE(3, dtype) CASE(4, dtype) CASE(5, dtype) CASE(6, dtype)       \
        }                                                                                                   \
    }                                                                                                       \
    static void tile_##name(const struct product *p, const void *packed, int64_t first, int64_t panel)      \
    {                                                                                                       \
        multiply_tile(p, packed, first, panel, TILE_ROWS, COLUMNS, dtype);                                  \
    }
KERNELS(i8, DTYPE_I8)
KERNELS(i4, DTYPE_I4)
KERNELS(u8, DTYPE_U8)
KERNELS(u4, DTYPE_U4)

static panel_kernel *const rows_of[] = {
    [DTYPE_I8] = rows_i8, [DTYPE_I4] = rows_i4, [DTYPE_U8] = rows_u8, [DTYPE_U4] = rows_u4};
static panel_kernel *const tile_of[] = {
    [DTYPE_I8] = tile_i8, [DTYPE_I4] = tile_i4, [DTYPE_U8] = tile_u8, [DTYPE_U4] = tile_u4};

static struct panel_kernels kernels_of(int32_t dtype)
{
    return (struct panel_kernels){tile_of[dtype], rows_of[dtype], rows_of[dtype], TILE_ROWS, COLUMNS, 1};
}

static void multiply_some(const struct product *p, const void *packed, struct range panels, struct worker *me)
{
    struct panel_kernels k = kernels_of(p->dtype);
    panels.begin = multiply_quantised_tiles(p, packed, panels, me);
    multiply_panels(p, packed, &k, panels);
}

void multiply_quantised(const struct product *p, struct worker *me)
{
    struct panel_kernels k = kernels_of(p->dtype);
    int64_t bytes = quantised_panel_bytes(p->dtype, p->group, p->k);
    struct shared_panels shared = {multiply_some, handful(p, &k, bytes), bytes};
    void *packed = me->team->scratch;
    round_inputs(p, me, packed);
    share_panels(p, packed, &shared, me);
}
