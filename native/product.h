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
};

static inline const float *product_row(const struct product *p, int64_t row)
{
    return p->x + (p->row_index ? p->row_index[row] : row) * p->x_stride;
}

#endif
