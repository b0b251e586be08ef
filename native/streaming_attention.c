/* Streaming attention: the cache is walked in ranges of 1,024 keys. Each range has a softmax of its own, and ranges are
 * merged in order by their highest scores and sums of weights, whoever computed them. A single query's ranges are
 * shared out among the threads, each a straight walk over the pages with all their heads; of many queries, a tile goes
 * through its ranges one after the other. A window that is no longer than a range is walked without them. */
#include "attention_tile.h"

enum { RANGE = 1024 / PAGE }; /* pages */

/* The sums of one row over one range: [heads] highest scores, [heads] sums of weights, [heads][width] weighted values. */
struct partial { float *max, *sum, *out; };

struct scratch {
    char *tile;
    float *total_max, *total_sum; /* of a tile: [queries]. Its weighted values gather in op->out */
    float *row_max, *row_sum;     /* of rows whose ranges are shared out: [rows][heads] */
    float *partials;
    int64_t partial_floats, slots; /* partials that exist at once */
};

static int64_t place(struct attention_tile *t, char *memory)
{
    return tile_place(t, memory, max_i64(q_block_of(t->op), t->op->heads), strip_of(t->op), block_keys(t->op));
}

static int64_t divide(const struct attention *op, int32_t threads, int64_t max_rows, struct worker *me, struct scratch *s)
{
    struct attention_tile t = {.op = op};
    int64_t tile = place(&t, NULL), totals = round_up(q_block_of(op), 16), rows = round_up(max_rows * op->heads, 16);
    int64_t mine = tile + 2 * totals * 4;
    s->partial_floats = op->heads * (2 + value_width(op->head_dim));
    s->slots = max_i64(32, 4 * threads);
    if (me) {
        char *own = me->team->scratch + me->index * mine;
        float *shared = (float *)(me->team->scratch + threads * mine);
        s->tile = own;
        s->total_max = (float *)(own + tile);
        s->total_sum = s->total_max + totals;
        s->row_max = shared;
        s->row_sum = shared + rows;
        s->partials = shared + 2 * rows;
    }
    return threads * mine + (2 * rows + s->slots * s->partial_floats) * 4;
}

int64_t streaming_attention_scratch(const struct attention *op, int32_t threads, int32_t max_rows)
{
    struct scratch s;
    return divide(op, threads, max_rows, NULL, &s);
}

/* total += part, of one query. Sums under different highest scores meet under the higher one. */
static void merge(const struct attention *op, float *total, float *total_max, float *total_sum, const float *part,
                  float part_max, float part_sum)
{
    if (part_max == -INFINITY)
        return;
    bool first = *total_max == -INFINITY;
    float max = part_max > *total_max || part_max != part_max ? part_max : *total_max;
    float a = first ? 0.0f : exp2_of((*total_max - max) * exponent_scale(op));
    float b = exp2_of((part_max - max) * exponent_scale(op));
    for (int64_t d = 0; d < op->head_dim; d += LANES) {
        int64_t left = op->head_dim - d;
        vec sums = vec_load(part + d);
        if (!first)
            sums = vec_fma(sums, vec_set(b), vec_mul(vec_load_upto(total + d, left), vec_set(a)));
        vec_store_upto(total + d, sums, left);
    }
    *total_sum = first ? part_sum : *total_sum * a + part_sum * b;
    *total_max = max;
}

/* A tile of many queries: range after range. */
static void attend_tile(struct attention_tile *t, const struct scratch *s)
{
    int64_t end = tile_end_page(t), until;
    tile_load_queries(t);
    for (int64_t i = 0; i < t->queries; i++)
        s->total_max[i] = -INFINITY;
    for (int64_t page = tile_next_page(t, 0); page < end; page = tile_next_page(t, until)) {
        until = (page / RANGE + 1) * RANGE;
        tile_clear_sums(t);
        tile_attend_blocks(t, page, until, block_pages(t->op), (struct ahead){t->kv_head, until});
        for (int64_t i = 0; i < t->queries; i++)
            merge(t->op, out_of(t, i), &s->total_max[i], &s->total_sum[i], t->out + i * t->width, t->max[i], t->sum[i]);
    }
    for (int64_t i = 0; i < t->queries; i++)
        divide_by_sum(t->op, out_of(t, i), s->total_sum[i], out_of(t, i));
}

/* The first range behind `range` of which a tile sees anything, -1 behind the last. */
static int64_t next_range(const struct attention_tile *t, int64_t range)
{
    int64_t page = tile_next_page(t, (range + 1) * RANGE);
    return page < tile_end_page(t) ? page / RANGE : -1;
}

/* Whether the ranges of a tile are shared out: a single row that sees more than two. Fewer are not worth a barrier. */
static bool is_split(const struct attention_tile *t)
{
    int64_t behind_sinks = tile_next_page(t, (t->op->sink + PAGE - 1) / PAGE);
    return t->rows == 1 && tile_end_page(t) - behind_sinks > 2 * RANGE;
}

static bool split_before(struct attention_tile *t, int64_t *end, int64_t max_rows)
{
    while (tile_before(t, end, max_rows))
        if (is_split(t))
            return true;
    return false;
}

static struct partial partial_of(const struct attention *op, const struct scratch *s, int64_t slot)
{
    float *start = s->partials + slot * s->partial_floats;
    return (struct partial){start, start + op->heads, start + 2 * op->heads};
}

/* One range of one row, all heads of a block of pages before the next: a straight walk through memory. */
static void attend_range(const struct attention_tile *whole, int64_t range, struct partial part)
{
    int64_t size = block_pages(whole->op), end = (range + 1) * RANGE;
    for (int64_t first = range * RANGE; first < end; first += size) {
        struct attention_tile t = *whole;
        for (t.kv_head = 0; t.kv_head < t.op->kv_heads; t.kv_head++) {
            int64_t head = t.kv_head * t.group;
            t.q = whole->q + head * t.q_row, t.q_sink = whole->q_sink + head * t.q_row;
            t.max = part.max + head, t.sum = part.sum + head, t.out = part.out + head * t.width;
            if (first == range * RANGE) {
                tile_load_queries(&t);
                tile_clear_sums(&t);
            }
            bool is_last = t.kv_head + 1 == t.op->kv_heads;
            tile_attend_blocks(&t, first, first + size, size,
                               is_last ? (struct ahead){0, first + size} : (struct ahead){t.kv_head + 1, first});
        }
    }
}

/* Adds a range to its row, for some of the heads. */
static void merge_range(const struct attention_tile *t, const struct scratch *s, int64_t range, struct partial part,
                        struct range heads)
{
    const struct attention *op = t->op;
    bool first = range == next_range(t, -1), last = next_range(t, range) < 0;
    for (int64_t head = heads.begin; head < heads.end; head++) {
        float *total = op->out + t->row * op->out_stride + head * op->head_dim;
        float *max = s->row_max + t->row * op->heads + head, *sum = s->row_sum + t->row * op->heads + head;
        if (first)
            *max = -INFINITY;
        merge(op, total, max, sum, part.out + head * t->width, part.max[head], part.sum[head]);
        if (last)
            divide_by_sum(op, total, *sum, total);
    }
}

/* The ranges of rows that are shared out, in waves of as many as have a slot. They are numbered in the order in which
 * every thread walks through them. */
static void attend_ranges(struct attention_tile *t, int64_t max_rows, const struct scratch *s, struct worker *me)
{
    struct range heads = my_share(me, t->op->heads);
    int64_t wave = 0, count = 0, end = *t->op->rows;
    while (split_before(t, &end, max_rows))
        for (int64_t range = next_range(t, -1); range >= 0; range = next_range(t, range))
            count++;
    for (; wave < count; wave += s->slots) {
        if (!team_wait(me))
            return;
        int64_t index = 0, next = wave + take(me);
        for (end = *t->op->rows; split_before(t, &end, max_rows);)
            for (int64_t range = next_range(t, -1); range >= 0; range = next_range(t, range), index++)
                if (index == next && index < wave + s->slots) {
                    attend_range(t, range, partial_of(t->op, s, index - wave));
                    next = wave + take(me);
                }
        if (!team_wait(me))
            return;
        index = 0;
        for (end = *t->op->rows; split_before(t, &end, max_rows);)
            for (int64_t range = next_range(t, -1); range >= 0; range = next_range(t, range), index++)
                if (index >= wave && index < wave + s->slots)
                    merge_range(t, s, range, partial_of(t->op, s, index - wave), heads);
    }
}

void streaming_attention(const struct attention *op, struct worker *me)
{
    struct attention_tile t = {.op = op};
    struct scratch s;
    divide(op, me->team->threads, *op->rows, me, &s);
    place(&t, s.tile);
    int64_t begin = *op->rows, rows = tile_rows(op, me->team->threads);
    if (op->window > 0 && op->window <= RANGE * PAGE) { /* so little is seen that ranges would be in the way */
        attend_by_tiles(&t, rows, block_pages(op), me);
        return;
    }
    int32_t item = 0, next = take(me);
    while (tile_before(&t, &begin, ALL_ROWS))
        for (int64_t end = begin + t.rows, head = 0; head < op->kv_heads; head++)
            for (int64_t row = end; row > begin && tile_before(&t, &row, rows);)
                if (!is_split(&t) && item++ == next) {
                    t.kv_head = head;
                    attend_tile(&t, &s);
                    next = take(me);
                }
    attend_ranges(&t, rows, &s, me);
}
