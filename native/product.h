/* A packed matrix times rows: what matmul and logits hand to the kernels. */
#ifndef PRODUCT_H
#define PRODUCT_H

#include "native.h"

struct product {
    const int32_t *row_index; /* which rows of x; NULL: all, in order */
    const float *x;
    const char *weight;
    const float *bias;
    float *out;
    int64_t rows, k, x_stride, out_width, out_stride;
    int32_t dtype, group;     /* group: of a quantised matrix */
    const struct swiglu *gated; /* NULL; or outputs are gates and then as many that they gate, and this is made of them */
    char *gates;                /* then of each thread, gates_bytes, in place of out */
};

static inline int64_t panels_of(const struct product *p) { return round_up(p->out_width, PANEL) / PANEL; }

static inline const float *product_row(const struct product *p, int64_t row)
{
    return p->x + (p->row_index ? p->row_index[row] : row) * p->x_stride;
}

/* out[some rows from `first` on][of some panels from `panel` on], x packed as the kernel wants it. */
typedef void panel_kernel(const struct product *p, const void *packed, int64_t first, int64_t panel);

/* tile: exactly tile_rows rows of `columns` panels; rest: one panel, of as many rows as there are left, at most that;
 * single: one row of single_columns panels. */
struct panel_kernels { panel_kernel *tile, *rest, *single; int64_t tile_rows, columns, single_columns; };

/* All rows times these panels. Few rows wait for memory, and one panel at a time reads fastest. Full tiles share each load
 * of x. */
void multiply_panels(const struct product *p, const void *packed, const struct panel_kernels *k, struct range panels);

/* How many panels of so many bytes a thread takes at a time. */
int64_t handful(const struct product *p, const struct panel_kernels *k, int64_t bytes);

/* multiply: one thread's work on all rows of some panels; together: how many it takes at a time; bytes: of a panel. */
struct shared_panels {
    void (*multiply)(const struct product *p, const void *packed, struct range panels, struct worker *me);
    int64_t together, bytes;
};

/* Once this thread has packed its rows of x: waits for the others, and takes panels until there are none. */
void share_panels(const struct product *p, const void *packed, const struct shared_panels *shared, struct worker *me);
int64_t gates_bytes(int64_t rows);

#endif
