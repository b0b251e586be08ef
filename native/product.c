/* How a product is shared out: a handful of panels at a time, and what is done with each. */
#include "product.h"
#include "swiglu.h"

enum {
    HANDFUL = 32 << 10, /* bytes of weights to take at a time for few rows: some 3 µs */
    GATES = 2           /* panels of gates at a time, and as many of what they gate */
};

int64_t handful(const struct product *p, const struct panel_kernels *k, int64_t bytes)
{
    if (p->rows > k->tile_rows)
        return k->columns;
    return max_i64(k->single_columns, round_up(HANDFUL / max_i64(1, bytes), k->single_columns));
}

void multiply_panels(const struct product *p, const void *packed, const struct panel_kernels *k, struct range panels)
{
    int64_t panel = panels.begin, tiled = p->rows / k->tile_rows * k->tile_rows;
    if (k->single_columns > 1 && p->rows == 1)
        for (; panel + k->single_columns <= panels.end; panel += k->single_columns)
            k->single(p, packed, 0, panel);
    if (k->columns > 1 && p->rows > k->tile_rows)
        for (; panel + k->columns <= panels.end; panel += k->columns) {
            for (int64_t first = 0; first < tiled; first += k->tile_rows)
                k->tile(p, packed, first, panel);
            for (int64_t c = 0; c < k->columns && tiled < p->rows; c++)
                k->rest(p, packed, tiled, panel + c);
        }
    for (; panel < panels.end; panel++)
        for (int64_t first = 0; first < p->rows; first += k->tile_rows)
            k->rest(p, packed, first, panel);
}

int64_t gates_bytes(int64_t rows) { return rows * 2 * GATES * PANEL * 4; }

/* The outputs [column, column + width) of a product, which go somewhere else. */
static struct product outputs_of(const struct product *p, int64_t column, int64_t width, int64_t panel_bytes, float *out)
{
    struct product some = *p;
    some.weight += column / PANEL * panel_bytes;
    some.bias = p->bias ? p->bias + column : NULL;
    some.out = out;
    some.out_width = width;
    some.out_stride = 2 * width;
    return some;
}

/* Panels of gates and those of what they gate, and then silu(gate) · up, while all of it is in the cache. */
static void multiply_gates(const struct product *p, const void *packed, const struct shared_panels *shared,
                           struct range panels, struct worker *me)
{
    const struct swiglu *gated = p->gated;
    int64_t first = panels.begin * PANEL, width = (panels.end - panels.begin) * PANEL, stride = 2 * width;
    float *own = (float *)(p->gates + me->index * gates_bytes(p->rows));
    struct product gate = outputs_of(p, first, width, shared->bytes, own);
    struct product up = outputs_of(p, gated->out_width + first, width, shared->bytes, own + width);
    shared->multiply(&gate, packed, (struct range){0, width / PANEL}, me);
    shared->multiply(&up, packed, (struct range){0, width / PANEL}, me);
    for (int64_t r = 0; r < p->rows; r++)
        for (int64_t i = 0; i < width; i += LANES) {
            const float *at = own + r * stride + i;
            vec_store(gated->out + r * gated->out_stride + first + i, swiglu_of(vec_load(at), vec_load(at + width)));
        }
}

void share_panels(const struct product *p, const void *packed, const struct shared_panels *shared, struct worker *me)
{
    struct range panels;
    share_out(me);
    if (!team_wait(me))
        return;
    if (p->gated)
        while (take_next(me, panels_of(p) / 2, min_i64(shared->together, GATES), &panels))
            multiply_gates(p, packed, shared, panels, me);
    else
        while (take_next(me, panels_of(p), shared->together, &panels))
            shared->multiply(p, packed, panels, me);
}
