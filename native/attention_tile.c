/* Where a tile lies, what it sees, and its two products. Between them stands the softmax: attention_softmax.c. */
#include "attention_tile.h"

#include <unistd.h>

enum { MOST_QUERIES = 768, TILES_A_THREAD = 4 };

/* As many queries as have their state in half of the L2 cache: each block of keys is read once for all of them. */
int64_t q_block_of(const struct attention *op)
{
    static int64_t cache;
    if (op->q_block > 0)
        return max_i64(op->q_block, group_of(op));
    if (!cache) {
#ifdef _SC_LEVEL2_CACHE_SIZE
        cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
        cache = cache > 0 ? cache : 512 << 10; /* where the system does not say */
    }
    int64_t strip = strip_of(op), query = 4 * (2 * value_width(op->head_dim) + op->head_dim);
    return max_i64(group_of(op), max_i64(1, min_i64(MOST_QUERIES, cache / 2 / query) / strip) * strip);
}

int64_t tile_rows(const struct attention *op, int32_t threads)
{
    int64_t rows = q_block_of(op) / group_of(op), least = max_i64(1, strip_of(op) / group_of(op));
    while (rows > least && op->q_block == 0 && *op->rows * op->kv_heads < rows * threads * TILES_A_THREAD)
        rows = max_i64(least, rows / 2);
    return is_narrow(op) ? narrow_rows(op, rows) : rows;
}

static int64_t q_row_of(const struct attention *op)
{
    return round_up(op->head_dim, line_inputs(op->kv_dtype)) + LANES;
}

/* The next part of a memory that is being divided, or measured where there is none. */
static void *cut(char *memory, int64_t *used, int64_t bytes)
{
    char *part = memory ? memory + *used : NULL;
    *used += round_up(bytes, 64);
    return part;
}

int64_t tile_place(struct attention_tile *t, char *memory, int64_t queries, int64_t strip, int64_t keys)
{
    int64_t pages = keys / PAGE, sink = t->op->sink > 0, used = 0;
    t->width = value_width(t->op->head_dim);
    t->strip = strip;
    t->q_row = q_row_of(t->op);
    t->score_row = keys + LANES; /* neighbours in different sets of the L1 cache */
    t->group = group_of(t->op);
    t->q = cut(memory, &used, queries * t->q_row * 4);
    t->q_sink = cut(memory, &used, sink * queries * t->q_row * 4);
    t->scores = cut(memory, &used, strip * t->score_row * 4);
    t->sink_scores = cut(memory, &used, sink * strip * PAGE * 4);
    t->unit_row = t->op->kv_dtype == DTYPE_I8 ? pages : 0;
    t->weight_units = cut(memory, &used, strip * t->unit_row * 4);
    t->highest = cut(memory, &used, strip * 4);
    t->out = cut(memory, &used, queries * t->width * 4);
    t->max = cut(memory, &used, queries * 4);
    t->sum = cut(memory, &used, queries * 4);
    t->page = cut(memory, &used, pages * 8);
    t->part = cut(memory, &used, pages * (int64_t)sizeof *t->part);
    t->pieces = cut(memory, &used, pages * 8);
    t->ahead = cut(memory, &used, pages * 8);
    int64_t copies = tile_copies_bytes(t, queries, pages);
    t->copies = copies > 0 ? cut(memory, &used, copies) : NULL;
    return used;
}

static bool is_mine(const struct attention *op, int64_t row)
{
    return op->pos[row] >= op->from_pos && op->pos[row] < op->until_pos;
}

bool tile_before(struct attention_tile *t, int64_t *end, int64_t max_rows)
{
    const struct attention *op = t->op;
    while (*end > 0 && !is_mine(op, *end - 1))
        --*end;
    if (*end == 0)
        return false;
    t->row = *end - 1;
    while (t->row > 0 && *end - t->row < max_rows && op->seq[t->row - 1] == op->seq[*end - 1] &&
           is_mine(op, t->row - 1))
        t->row--;
    t->rows = *end - t->row;
    t->queries = t->rows * t->group;
    t->skipped = 0;
    tile_choose_lines(t);
    *end = t->row;
    return true;
}

int64_t attention_work(const struct attention *op)
{
    int64_t bytes = op->kv_heads * page_head_bytes(op->kv_dtype, op->head_dim) / PAGE, seen = 0;
    for (int64_t row = 0; row < *op->rows; row++) {
        struct span span = visible(op, row);
        seen += span.last + 1 - span.first + min_i64(op->sink, span.first);
    }
    return seen * max_i64(bytes, op->heads * op->head_dim);
}

struct span visible(const struct attention *op, int64_t row)
{
    int64_t pos = op->pos[row];
    return (struct span){op->window > 0 ? max_i64(0, pos - op->window + 1) : 0, pos};
}

int64_t tile_next_page(const struct attention_tile *t, int64_t page)
{
    bool sees_all = page * PAGE < t->op->sink;
    return sees_all ? page : max_i64(page, visible(t->op, t->row).first / PAGE);
}

int64_t tile_end_page(const struct attention_tile *t) { return t->op->pos[t->row + t->rows - 1] / PAGE + 1; }

/* Puts a query into the form in which the micro-kernel reads A: pairs of bf16 for the dot instruction, words for bytes. */
static void load_query(const struct attention_tile *t, const float *from, float *to)
{
    int64_t count = t->op->head_dim;
    if (t->op->kv_dtype == DTYPE_I8) {
        to[t->q_row - 1] = round_words(from, count, to);
        return;
    }
#ifdef BF16_DOT
    if (t->op->kv_dtype == DTYPE_BF16) {
        for (int64_t i = 0; i < round_up(count, 2); i++)
            ((uint16_t *)to)[i] = i < count ? f32_to_bf16(from[i]) : 0;
        return;
    }
#endif
    memcpy(to, from, (size_t)count * sizeof *to);
    for (int64_t i = count; i < t->q_row; i++)
        to[i] = 0.0f;
}

void tile_load_queries(struct attention_tile *t)
{
    const struct attention *op = t->op;
    for (int64_t i = 0; i < t->queries; i++) {
        load_query(t, query_of(t, op->q, op->q_stride, i), t->q + i * t->q_row);
        if (op->sink)
            load_query(t, query_of(t, op->q_sink, op->q_sink_stride, i), t->q_sink + i * t->q_row);
    }
}

void tile_clear_sums(struct attention_tile *t)
{
    memset(t->out, 0, (size_t)(t->queries * t->width) * sizeof *t->out);
    for (int64_t i = 0; i < t->queries; i++)
        t->max[i] = -INFINITY, t->sum[i] = 0.0f;
}

/* What a strip of queries, from position `first` to `last`, needs of a page: windows and the diagonal seldom begin or end
 * with one. What is left out would have added exact zeros. */
static struct part part_of(const struct attention_tile *t, int64_t place, int64_t first, int64_t last)
{
    const struct attention *op = t->op;
    int64_t page = t->page[place], begin = page * PAGE;
    int64_t window = op->window > 0 ? max_i64(0, first - op->window + 1) - begin : 0;
    int64_t sinks = op->sink - begin, from = sinks > 0 ? 0 : max_i64(0, window), to = min_i64(PAGE, last + 1 - begin);
    int64_t line = tile_product_lines(t->kind) * t->inputs;
    if (window >= PAGE)
        to = min_i64(to, sinks);
    struct part part = {.page = page, .place = place, .sinks = max_i64(0, min_i64(PAGE, sinks)), .only_sinks = window >= PAGE,
                        .first = from / line * line, .until = round_up(max_i64(to, 0), line)};
    part.from = part.first / PANEL * PANEL;
    part.to = round_up(part.until, PANEL);
    return part;
}

/* Which page of the memory, and head of it, holds a page of the sequence. */
static int64_t page_index(const struct attention_tile *t, int64_t page)
{
    const struct attention *op = t->op;
    int64_t entry = page_entry(page, op->sink_pages, op->ring_pages);
    return op->page_table[(int64_t)op->seq[t->row] * op->page_table_stride + entry] * (int64_t)op->kv_heads + t->kv_head;
}

struct page_lines tile_page(const struct attention_tile *t, int64_t page)
{
    const struct attention *op = t->op;
    const char *keys = (const char *)op->kv + page_index(t, page) * page_head_bytes(op->kv_dtype, op->head_dim);
    return (struct page_lines){keys, keys + page_key_bytes(op->kv_dtype, op->head_dim)};
}

static const float *scales_of(const struct attention_tile *t, int64_t page)
{
    const struct attention *op = t->op;
    int64_t pages = (int64_t)op->kv_pages * op->kv_heads * page_head_bytes(op->kv_dtype, op->head_dim);
    return (const float *)((const char *)op->kv + pages) + page_index(t, page) * page_scales(op->kv_dtype);
}

/* scores[count rows] of columns [from, to) of a part's page. Few rows fetch the values of these positions meanwhile. */
static void multiply_keys(const struct attention_tile *t, const struct part *part, const float *q, int64_t count, int64_t from,
                          int64_t to, float *scores, int64_t score_row)
{
    const int line = line_bytes(t->kind);
    const char *keys = part->at.keys + from / PANEL * t->key_panel;
    const char *values = part->at.values + from / t->inputs * line;
    struct tile_product product = {.kind = t->kind, .a = q, .a_row = t->q_row, .b = &keys, .pieces = 1,
                                   .depth = t->key_lines, .b_step = line, .b_column = t->key_panel,
                                   .ahead = &values, .ahead_step = line, .unit = q + t->q_row - 1,
                                   .unit_row = t->q_row, .c = scores, .c_row = score_row};
    tile_product(&product, count, (to - from) / PANEL);
}

/* The scores of a part, for queries first .. first + count. Sinks are seen by queries of their own. */
static void score_part(const struct attention_tile *t, const struct part *part, int64_t first, int64_t count, float *scores)
{
    const float *q = t->q + first * t->q_row, *q_sink = t->q_sink + first * t->q_row;
    if (part->only_sinks) {
        multiply_keys(t, part, q_sink, count, part->from, part->to, scores, t->score_row);
        return;
    }
    multiply_keys(t, part, q, count, part->from, part->to, scores, t->score_row);
    if (!part->sinks)
        return;
    multiply_keys(t, part, q_sink, count, 0, round_up(part->sinks, PANEL), t->sink_scores, PAGE);
    for (int64_t r = 0; r < count; r++)
        memcpy(scores + r * t->score_row, t->sink_scores + r * PAGE, (size_t)part->sinks * sizeof *scores);
}

/* The keys that come in a part's place in the next block; its own where none do, since these are in the cache. */
static const char *next_keys(const struct attention_tile *t, const struct part *part)
{
    int64_t page = t->next.page + part->place, heads = t->next.kv_head - t->kv_head;
    if (page >= tile_end_page(t))
        return part->at.keys;
    return tile_page(t, page).keys + heads * page_head_bytes(t->op->kv_dtype, t->op->head_dim);
}

static bool is_whole(const struct part *part) { return part->until - part->first == PAGE; }

/* out[queries first .. first + count] += weights · values, as many whole pages at a time as follow each other. Few rows fetch
 * the next keys meanwhile. */
static void multiply_values(const struct attention_tile *t, int64_t first, int64_t count, int64_t parts)
{
    const float *weights = t->scores;
    const int floats = line_floats(t->kind), line = line_bytes(t->kind);
    for (int64_t i = 0, run; i < parts; i += run) {
        const struct part *part = &t->part[i];
        for (run = 0; run == 0 || (i + run < parts && is_whole(part) && is_whole(part + run)); run++) {
            t->pieces[run] = part[run].at.values + part[run].first / t->inputs * line;
            t->ahead[run] = is_whole(part) ? next_keys(t, part + run) : t->pieces[run];
        }
        struct tile_product product = {.kind = t->kind, .a = weights + (part->first - part->from) / t->inputs * floats,
                                       .a_row = t->score_row, .b = t->pieces, .pieces = run,
                                       .depth = (part->until - part->first) / t->inputs, .b_step = line,
                                       .b_column = t->value_panel, .ahead = t->ahead, .ahead_step = line,
                                       .unit = t->weight_units + i, .unit_row = t->unit_row,
                                       .c = t->out + first * t->width, .c_row = t->width, .add = true};
        tile_product(&product, count, t->width / PANEL);
        weights += run * (part->to - part->from) / t->inputs * floats;
    }
}

void tile_attend_strip(struct attention_tile *t, int64_t first, int64_t count, int64_t pages)
{
    const struct attention *op = t->op;
    int64_t first_pos = op->pos[row_of(t, first)], last_pos = op->pos[row_of(t, first + count - 1)];
    int64_t parts = 0, columns = 0;
    for (int64_t i = 0; i < pages; i++) {
        struct part *part = &t->part[parts];
        *part = part_of(t, i, first_pos, last_pos);
        if (part->until <= part->first)
            continue;
        part->at = t->copied ? tile_copy_of(t, part->place) : tile_page(t, part->page);
        part->scales = scales_of(t, part->page);
        for (int64_t i = 0; i < page_scales(op->kv_dtype); i += 64 / (int64_t)sizeof *part->scales)
            FETCH_FAR(part->scales + i); /* for the softmax */
        score_part(t, part, first, count, t->scores + columns);
        columns += part->to - part->from;
        parts++;
    }
    if (parts == 0)
        return;
    tile_soften(t, first, count, parts, columns);
    multiply_values(t, first, count, parts);
}

/* Adds the keys and values of `count` pages, t->page, to the sums. */
static void attend_block(struct attention_tile *t, int64_t count)
{
    if (t->copied)
        tile_copy_pages(t, count);
    for (int64_t first = 0; first < t->queries; first += t->strip)
        tile_attend_strip(t, first, min_i64(t->strip, t->queries - first), count);
}

void tile_attend_blocks(struct attention_tile *t, int64_t first, int64_t until, int64_t size, struct ahead after)
{
    int64_t page = tile_next_page(t, first);
    until = min_i64(until, tile_end_page(t));
    while (page < until) {
        int64_t count = 0, end = min_i64(until, (page / size + 1) * size);
        for (; page < end; page = tile_next_page(t, page + 1))
            t->page[count++] = page;
        t->next = page < until ? (struct ahead){t->kv_head, page} : after;
        attend_block(t, count);
    }
}

void divide_by_sum(const struct attention *op, const float *sums, float sum, float *out)
{
    for (int64_t d = 0; d < op->head_dim; d += LANES) {
        int64_t left = op->head_dim - d;
        vec_store_upto(out + d, vec_mul(vec_load_upto(sums + d, left), vec_set(1.0f / sum)), left);
    }
}

void tile_store_outputs(const struct attention_tile *t)
{
    for (int64_t i = 0; i < t->queries; i++)
        divide_by_sum(t->op, t->out + i * t->width, t->sum[i], out_of(t, i));
}

/* next_head: the one that this thread is likely to come to next. */
static void attend_tile(struct attention_tile *t, int64_t block_size, int64_t next_head)
{
    if (is_narrow(t->op)) {
        attend_narrow_tile(t);
        return;
    }
    struct ahead after = {min_i64(next_head, t->op->kv_heads - 1), tile_next_page(t, 0)};
    tile_load_queries(t);
    tile_clear_sums(t);
    tile_attend_blocks(t, 0, tile_end_page(t), block_size, after);
    tile_store_outputs(t);
}

void attend_by_tiles(struct attention_tile *t, int64_t max_rows, int64_t block_size, struct worker *me)
{
    int64_t begin = *t->op->rows;
    int32_t item = 0, next = take(me);
    while (tile_before(t, &begin, ALL_ROWS))
        for (int64_t end = begin + t->rows, head = 0; head < t->op->kv_heads; head++)
            for (int64_t row = end; row > begin && tile_before(t, &row, max_rows);)
                if (item++ == next) {
                    t->kv_head = head;
                    attend_tile(t, block_size, head + next_work(me) - next);
                    next = take(me);
                }
}
