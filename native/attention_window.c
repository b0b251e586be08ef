/* Narrow windows: all that a tile sees is one block, so each strip of queries is done with before the next is begun, and
 * what it needs stays in the L1 cache. Queries and outputs of the next strip are fetched meanwhile: beside so little arithmetic
 * they are a sixth of the time. */
#include "attention_tile.h"

enum { PAGES = 8, FEWEST_ROWS = PAGE }; /* of a block at most; of a tile that is worth one */

static int64_t pages_for(int64_t positions) { return (positions + PAGE - 1) / PAGE; }

/* The most rows of a tile whose sinks and windows, wherever they begin, lie on so many pages. */
static int64_t most_rows(const struct attention *op)
{
    return (PAGES - pages_for(op->sink) - 1) * PAGE - op->window + 2;
}

bool is_narrow(const struct attention *op) { return op->window > 0 && most_rows(op) >= FEWEST_ROWS; }

int64_t block_keys(const struct attention *op) { return is_narrow(op) ? PAGES * PAGE : op->kv_block; }

int64_t narrow_rows(const struct attention *op, int64_t rows) { return min_i64(rows, most_rows(op)); }

/* Brings into the cache what queries [first, until) are loaded from, and what their outputs overwrite. */
static void fetch_queries(const struct attention_tile *t, int64_t first, int64_t until)
{
    const struct attention *op = t->op;
    for (int64_t i = first; i < until; i++)
        for (int64_t d = 0; d < op->head_dim; d += 16) {
            FETCH_SOON(query_of(t, op->q, op->q_stride, i) + d);
            if (op->sink)
                FETCH_SOON(query_of(t, op->q_sink, op->q_sink_stride, i) + d);
            FETCH_SOON(out_of(t, i) + d);
        }
}

void attend_narrow_tile(const struct attention_tile *t)
{
    struct attention_tile strip = *t;
    int64_t pages = 0;
    strip.next = (struct ahead){t->kv_head, tile_end_page(t)}; /* there is no other block */
    for (int64_t page = tile_next_page(t, 0); page < tile_end_page(t); page = tile_next_page(t, page + 1))
        t->page[pages++] = page;
    if (t->copied)
        tile_copy_pages(t, pages);
    for (int64_t first = 0; first < t->queries; first += t->strip) {
        strip.row = row_of(t, first);
        strip.skipped = first % t->group;
        strip.queries = min_i64(t->strip, t->queries - first);
        strip.rows = row_of(t, first + strip.queries - 1) + 1 - strip.row;
        fetch_queries(t, first + t->strip, min_i64(first + 2 * t->strip, t->queries));
        tile_load_queries(&strip);
        tile_clear_sums(&strip);
        tile_attend_strip(&strip, 0, strip.queries, pages);
        tile_store_outputs(&strip);
    }
}
