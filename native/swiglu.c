#include "swiglu.h"

void swiglu(const struct swiglu *op, struct worker *me)
{
    int64_t width = op->out_width, rows = *op->rows;
    /* Whole vectors of a row are the unit of work: one long row is shared out too. */
    int64_t pieces = (width + LANES - 1) / LANES;
    struct range share = my_share(me, rows * pieces);
    for (int64_t i = share.begin; i < share.end; i++) {
        int64_t row = i / pieces, column = i % pieces * LANES, left = width - column;
        const float *x = op->x + row * op->x_stride + column;
        vec gate = vec_load_upto(x, left), up = vec_load_upto(x + width, left);
        vec_store_upto(op->out + row * op->out_stride + column, swiglu_of(gate, up), left);
    }
}
