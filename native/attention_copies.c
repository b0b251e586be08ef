/* Copies of a block's keys and values, widened to f32, one panel behind the other. Where many queries meet a block, each
 * of its lines is widened once instead of for every few of them. The order of additions stays, and so do the bits. */
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
    int64_t inputs = line_inputs(op->kv_dtype), panels = t->width / PANEL;
    t->copied = t->copies && t->queries >= FEWEST_STRIPS * t->strip;
    t->kind = t->copied ? LINE_F32 : line_of(op->kv_dtype);
    t->inputs = t->copied ? 1 : inputs;
    t->key_lines = round_up(op->head_dim, inputs) / t->inputs;
    int64_t line = line_bytes(t->kind);
    if (t->copied) {
        t->keys = (struct panels){.step = line, .column = t->key_lines * line};
        t->values = (struct panels){.step = line, .column = PAGE * line};
    } else {
        t->keys = (struct panels){.step = PAGE / PANEL * line, .column = line};
        t->values = (struct panels){.step = panels * line, .column = line};
    }
}

INLINE void copy_panels(const char *from, int64_t lines, int64_t panels, float *to, const enum line kind)
{
    const int inputs = kind == LINE_BF16 ? 2 : kind == LINE_I8 ? 4 : 1;
    for (int64_t line = 0; line < lines; line++)
        for (int64_t panel = 0; panel < panels; panel++, from += line_bytes(kind))
            widen_line(from, to + (panel * lines + line) * inputs * PANEL, kind);
}

static void copy(const char *from, int64_t lines, int64_t panels, float *to, enum line kind)
{
    switch (kind) {
    case LINE_F16: copy_panels(from, lines, panels, to, LINE_F16); break;
    case LINE_BF16: copy_panels(from, lines, panels, to, LINE_BF16); break;
    default: copy_panels(from, lines, panels, to, LINE_I8);
    }
}

struct page_lines tile_copy_of(const struct attention_tile *t, int64_t place)
{
    const float *keys = t->copies + place * page_floats(t->op);
    return (struct page_lines){(const char *)keys, (const char *)(keys + key_floats(t->op))};
}

void tile_copy_pages(const struct attention_tile *t, int64_t count)
{
    const struct attention *op = t->op;
    int64_t inputs = line_inputs(op->kv_dtype);
    for (int64_t i = 0; i < count; i++) {
        struct page_lines from = tile_page(t, t->page[i]);
        float *to = t->copies + i * page_floats(op);
        copy(from.keys, round_up(op->head_dim, inputs) / inputs, PAGE / PANEL, to, line_of(op->kv_dtype));
        copy(from.values, PAGE / inputs, t->width / PANEL, to + key_floats(op), line_of(op->kv_dtype));
    }
}
