/* Standard attention: all scores of a few queries, their softmax, then the weighted values.
 *
 * Work is cut into tiles: some rows of one sequence times the query heads that share one KV head, so that a page of
 * keys is read once for all of them. A row's arithmetic does not depend on its tile: every score and every output is
 * one chain, and positions that a row does not see add exact zeros. */
#include "page.h"
#include "tile.h"

enum {
    TILE_QUERIES = 24,                                                   /* queries that share a walk over the pages */
    MAX_ROWS = ACCUMULATORS / VECTORS < 6 ? ACCUMULATORS / VECTORS : 6   /* queries that share a micro-kernel */
};

/* Panels of a micro-kernel for so many rows: as many as the registers hold. */
#define COLUMNS_FOR(rows) \
    ((rows) * 4 * VECTORS <= ACCUMULATORS ? 4 : (rows) * 2 * VECTORS <= ACCUMULATORS ? 2 : 1)

struct span { int64_t first, last; }; /* positions, both included */

struct attention_tile {
    const struct attention *op;
    int64_t row, rows, kv_head, group; /* group: query heads to a KV head */
    struct span pages;                 /* that any of its rows sees */
    float *queries, *scores;           /* [rows * group][head_dim], [rows * group][capacity] */
    int64_t capacity;
};

static inline int64_t capacity_of(const struct attention *op) { return (int64_t)op->page_table_stride * PAGE; }

static inline int64_t max_queries(const struct attention *op)
{
    return max_i64(TILE_QUERIES, op->heads / op->kv_heads);
}

static int64_t thread_floats(const struct attention *op)
{
    return round_up(max_queries(op) * (op->head_dim + capacity_of(op)), 16);
}

int64_t attention_scratch(const struct attention *op, int32_t threads, int32_t max_rows)
{
    (void)max_rows;
    return thread_floats(op) * threads * 4;
}

static struct span visible(const struct attention *op, int64_t row)
{
    int64_t pos = op->pos[row];
    return (struct span){op->window > 0 ? max_i64(0, pos - op->window + 1) : 0, pos};
}

static const char *head_of_page(const struct attention_tile *t, int64_t page)
{
    const struct attention *op = t->op;
    int64_t index = op->page_table[(int64_t)op->seq[t->row] * op->page_table_stride + page];
    return (const char *)op->kv + (index * op->kv_heads + t->kv_head) * page_head_bytes(op->kv_dtype, op->head_dim);
}

/* Puts x into the form in which the micro-kernel reads A, in place: pairs of bf16 for the dot instruction. */
static void to_operand(float *x, int64_t count, int32_t dtype)
{
#ifdef BF16_DOT
    if (dtype == DTYPE_BF16)
        for (int64_t i = 0; i < count; i += 2) {
            uint16_t pair[2] = {f32_to_bf16(x[i]), f32_to_bf16(x[i + 1])};
            memcpy(x + i / 2, pair, sizeof pair);
        }
#else
    (void)x, (void)count, (void)dtype;
#endif
}

/* Floats of A that a line of keys or values takes, and lines to so many inputs. */
static inline int64_t operand_floats(int32_t dtype) { return dtype == DTYPE_BF16 ? BF16_FLOATS : 1; }
static inline int64_t lines(int32_t dtype, int64_t inputs) { return dtype == DTYPE_BF16 ? inputs / 2 : inputs; }

static void load_queries(const struct attention_tile *t)
{
    const struct attention *op = t->op;
    for (int64_t i = 0; i < t->rows * t->group; i++) {
        int64_t row = t->row + i / t->group, head = t->kv_head * t->group + i % t->group;
        float *query = t->queries + i * op->head_dim;
        memcpy(query, op->q + row * op->q_stride + head * op->head_dim, (size_t)op->head_dim * sizeof *query);
        to_operand(query, op->head_dim, op->kv_dtype);
    }
}

/* scores[first .. first + rows][of this page] = queries · keys */
INLINE void score_page(const struct attention_tile *t, int64_t page, int64_t first, const int rows,
                       const enum line kind)
{
    const int columns = COLUMNS_FOR(rows);
    const struct attention *op = t->op;
    float *out = t->scores + first * t->capacity + (page - t->pages.first) * PAGE;
    for (int column = 0; column < PAGE / PANEL; column += columns) {
        struct tile tile = {.a = t->queries + first * op->head_dim, .a_row = op->head_dim,
                            .a_step = operand_floats(op->kv_dtype), .b = head_of_page(t, page) + column * PANEL * 4,
                            .b_column = PANEL * 4, .b_step = PAGE * 4, .depth = lines(op->kv_dtype, op->head_dim)};
        vec acc[ACCUMULATORS];
        tile_clear(acc, rows, columns);
        tile_accumulate(acc, &tile, rows, columns, kind);
#pragma GCC unroll 24
        for (int i = 0; i < rows * columns * VECTORS; i++)
            vec_store(out + i / (columns * VECTORS) * t->capacity + column * PANEL + i % (columns * VECTORS) * LANES,
                      acc[i]);
    }
}

/* out[first .. first + rows] = weights · values, `columns` panels of head_dim from `panel` on */
INLINE void weigh_values(const struct attention_tile *t, const float *scale, int64_t first, int64_t panel,
                         const int rows, const int columns, const enum line kind)
{
    const struct attention *op = t->op;
    int64_t step = operand_floats(op->kv_dtype), page_floats = lines(op->kv_dtype, PAGE) * step;
    vec acc[ACCUMULATORS];
    tile_clear(acc, rows, columns);
    for (int64_t page = t->pages.first; page <= t->pages.last; page++) {
        struct tile tile = {.a = t->scores + first * t->capacity + (page - t->pages.first) * page_floats,
                            .a_row = t->capacity, .a_step = step,
                            .b = head_of_page(t, page) + page_key_bytes(op->kv_dtype, op->head_dim) + panel * PANEL * 4,
                            .b_column = PANEL * 4, .b_step = value_width(op->head_dim) * 4,
                            .depth = lines(op->kv_dtype, PAGE)};
        tile_accumulate(acc, &tile, rows, columns, kind);
    }
    for (int r = 0; r < rows; r++) {
        int64_t row = t->row + (first + r) / t->group, head = t->kv_head * t->group + (first + r) % t->group;
        float *out = op->out + row * op->out_stride + head * op->head_dim;
        for (int i = 0; i < columns * VECTORS; i++) {
            int64_t d = panel * PANEL + i * LANES;
            if (d < op->head_dim)
                vec_store_upto(out + d, vec_mul(acc[r * columns * VECTORS + i], vec_set(scale[first + r])),
                               op->head_dim - d);
        }
    }
}

INLINE void weigh_rows(const struct attention_tile *t, const float *scale, int64_t first, const int rows,
                       const enum line kind)
{
    const int columns = COLUMNS_FOR(rows);
    int64_t panel = 0, panels = value_width(t->op->head_dim) / PANEL;
    for (; panel + columns <= panels; panel += columns)
        weigh_values(t, scale, first, panel, rows, columns, kind);
    for (; panel < panels; panel++)
        weigh_values(t, scale, first, panel, rows, 1, kind);
}

/* Turns a query's scores into weights e^(score - max), exact zeros where it does not look. Returns 1 / their sum. */
static float soften(const struct attention_tile *t, int64_t row, float *scores)
{
    struct span seen = visible(t->op, row);
    int64_t base = t->pages.first * PAGE, end = (t->pages.last + 1) * PAGE - base;
    int64_t from = seen.first / PAGE * PAGE - base, to = (seen.last / PAGE + 1) * PAGE - base;
    for (int64_t i = from; i < seen.first - base; i++)
        scores[i] = -INFINITY;
    for (int64_t i = seen.last + 1 - base; i < to; i++)
        scores[i] = -INFINITY;
    vec highest = vec_set(-INFINITY);
    for (int64_t i = from; i < to; i += LANES)
        highest = vec_max(highest, vec_load(scores + i));
    vec max = vec_set(vec_reduce_max(highest)), scale = vec_set(t->op->scale), sum = vec_set(0.0f);
    for (int64_t i = from; i < to; i += LANES) {
        vec weight = vec_exp(vec_mul(vec_sub(vec_load(scores + i), max), scale));
        vec_store(scores + i, weight);
        sum = vec_add(sum, weight);
    }
    memset(scores, 0, (size_t)from * sizeof *scores);
    memset(scores + to, 0, (size_t)(end - to) * sizeof *scores);
    to_operand(scores, end, t->op->kv_dtype);
    return 1.0f / vec_reduce_add(sum);
}

#define CASE(n)                                                   \
    case n:                                                       \
        if (n <= MAX_ROWS)                                        \
            call(n);                                              \
        break;
#define EACH_ROW_COUNT(rows) switch (rows) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }

INLINE void attend(const struct attention_tile *t, float *scale, const enum line kind)
{
    int64_t queries = t->rows * t->group;
    load_queries(t);
    for (int64_t page = t->pages.first; page <= t->pages.last; page++)
        for (int64_t first = 0; first < queries; first += MAX_ROWS) {
#define call(n) score_page(t, page, first, n, kind)
            EACH_ROW_COUNT(min_i64(MAX_ROWS, queries - first))
#undef call
        }
    for (int64_t i = 0; i < queries; i++)
        scale[i] = soften(t, t->row + i / t->group, t->scores + i * t->capacity);
    for (int64_t first = 0; first < queries; first += MAX_ROWS) {
#define call(n) weigh_rows(t, scale, first, n, kind)
        EACH_ROW_COUNT(min_i64(MAX_ROWS, queries - first))
#undef call
    }
}

static void attend_tile(struct attention_tile *t)
{
    float scale[t->rows * t->group];
    if (t->op->kv_dtype == DTYPE_F32)
        attend(t, scale, LINE_F32);
    else
        attend(t, scale, LINE_BF16);
}

static struct span pages_of(const struct attention *op, int64_t row, int64_t rows)
{
    struct span all = visible(op, row);
    for (int64_t r = row + 1; r < row + rows; r++) {
        struct span seen = visible(op, r);
        all.first = min_i64(all.first, seen.first);
        all.last = max_i64(all.last, seen.last);
    }
    return (struct span){all.first / PAGE, all.last / PAGE};
}

void attention(const struct attention *op, struct worker *me)
{
    int64_t count = *op->rows, group = op->heads / op->kv_heads, tile_rows = max_i64(1, TILE_QUERIES / group);
    float *mine = (float *)me->team->scratch + me->index * thread_floats(op);
    struct attention_tile t = {.op = op, .group = group, .queries = mine, .capacity = capacity_of(op),
                               .scores = mine + max_queries(op) * op->head_dim};
    int32_t item = 0, next = take(me);
    for (t.row = 0; t.row < count; t.row += t.rows) {
        t.rows = 1;
        while (t.rows < tile_rows && t.row + t.rows < count && op->seq[t.row + t.rows] == op->seq[t.row])
            t.rows++;
        t.pages = pages_of(op, t.row, t.rows);
        for (t.kv_head = 0; t.kv_head < op->kv_heads; t.kv_head++)
            if (item++ == next) {
                attend_tile(&t);
                next = take(me);
            }
    }
}
