/* Copies of a block's keys and values, widened to f32. Where many queries meet a block, each of its lines is widened once
 * instead of for every few of them. The order of additions stays, and so do the bits. */
#include "attention_tile.h"

enum { FEWEST_STRIPS = 4 }; /* for which copying pays */

static int64_t key_floats(const struct attention *op)
{
    return PAGE * round_up(op->head_dim, line_inputs(op->kv_dtype));
}

static int64_t page_floats(const struct attention *op) { return key_floats(op) + PAGE * value_width(op->head_dim); }

int64_t tile_copies_bytes(const struct attention_tile *t, int64_t queries, int64_t pages)
{
    return queries >= FEWEST_STRIPS * t->strip && is_widened(t->op->kv_dtype) ? pages * page_floats(t->op) * 4 : 0;
}

void tile_choose_lines(struct attention_tile *t)
{
    const struct attention *op = t->op;
    int64_t inputs = line_inputs(op->kv_dtype);
    t->copied = t->copies && t->queries >= FEWEST_STRIPS * t->strip;
    t->kind = t->copied ? LINE_F32 : line_of(op->kv_dtype);
    t->inputs = t->copied ? 1 : inputs;
    t->key_lines = round_up(op->head_dim, inputs) / t->inputs;
    t->key_panel = t->key_lines * line_bytes(t->kind);
    t->value_panel = PAGE / t->inputs * line_bytes(t->kind);
}

INLINE void widen_lines(const char *from, int64_t lines, float *to, const enum line kind)
{
    for (int64_t line = 0; line < lines; line++, from += line_bytes(kind))
        to = widen_line(from, to, kind);
}

struct page_lines tile_copy_of(const struct attention_tile *t, int64_t place)
{
    const float *keys = t->copies + place * page_floats(t->op);
    return (struct page_lines){(const char *)keys, (const char *)(keys + key_floats(t->op))};
}

void tile_copy_pages(const struct attention_tile *t, int64_t count)
{
    const struct attention *op = t->op;
    int64_t lines = page_floats(op) / PANEL / line_inputs(op->kv_dtype); /* values follow keys here and there */
    for (int64_t i = 0; i < count; i++) {
        const char *from = tile_page(t, t->page[i]).keys;
        float *to = t->copies + i * page_floats(op);
        if (op->kv_dtype == DTYPE_F16)
            widen_lines(from, lines, to, LINE_F16);
        else
            widen_lines(from, lines, to, LINE_BF16);
    }
}
