/* Flash attention: tiles of queries meet blocks of keys, the scores of a block live in the L1 cache, and one running
 * softmax is mended from block to block (Dao, 2023). Tiles and heads are shared out among threads. */
#include "attention_tile.h"

#if USE_FLASH_ATTENTION

static int64_t place(struct attention_tile *t, char *memory)
{
    return tile_place(t, memory, q_block_of(t->op), strip_of(t->op), block_keys(t->op));
}

int64_t flash_attention_scratch(const struct attention *op, int32_t threads, int32_t max_rows)
{
    struct attention_tile t = {.op = op};
    (void)max_rows;
    return place(&t, NULL) * threads;
}

void flash_attention(const struct attention *op, struct worker *me)
{
    struct attention_tile t = {.op = op};
    place(&t, me->team->scratch + me->index * place(&t, NULL));
    attend_by_tiles(&t, tile_rows(op, me->team->threads), block_pages(op), me);
}

#endif
