/* Standard attention: all scores of a few queries, their softmax, then the weighted values. To the tile it is one
 * block that holds every key. */
#include "attention_tile.h"

enum { TILE_QUERIES = 24 }; /* whose scores exist at once */

static const int64_t EVERY_PAGE = (int64_t)1 << 40;

static int64_t place(struct attention_tile *t, char *memory)
{
    int64_t queries = max_i64(TILE_QUERIES, group_of(t->op));
    return tile_place(t, memory, queries, queries, (int64_t)t->op->page_table_stride * PAGE);
}

int64_t attention_scratch(const struct attention *op, int32_t threads, int32_t max_rows)
{
    struct attention_tile t = {.op = op};
    (void)max_rows;
    return place(&t, NULL) * threads;
}

void attention(const struct attention *op, struct worker *me)
{
    struct attention_tile t = {.op = op};
    place(&t, me->team->scratch + me->index * place(&t, NULL));
    attend_by_tiles(&t, max_i64(1, TILE_QUERIES / t.group), EVERY_PAGE, me);
}
