/* Quantised matrices. A weight is `(quant - zero) * scale + minimum`, where the quants are small numbers from zero up, and
 * scale and minimum belong to a group of consecutive inputs of one output.
 *
 * A panel of PANEL outputs is a row of blocks, each of whole cache lines, so that a straight walk reads everything:
 *   64 bytes of f16: the scales of two groups, or the scale and the minimum of one, [2][PANEL]
 *   for each of its groups, lines of 64 bytes: quads of inputs, [PANEL][4]; of 4-bit quants two quads to a line, the first
 *   one in the low halves of the bytes.
 * Inputs beyond k are zero. */
#ifndef QUANTISED_H
#define QUANTISED_H

#include "product.h"

static inline bool is_quantised(int32_t dtype) { return dtype >= DTYPE_I8; }
static inline bool has_minimums(int32_t dtype) { return dtype == DTYPE_U8 || dtype == DTYPE_U4; }
static inline int64_t quant_bits(int32_t dtype) { return dtype == DTYPE_I4 || dtype == DTYPE_U4 ? 4 : 8; }
/* The quant that stands for zero. */
static inline int32_t quant_zero(int32_t dtype) { return has_minimums(dtype) ? 0 : dtype == DTYPE_I4 ? 8 : 128; }

static inline int64_t block_groups(int32_t dtype) { return has_minimums(dtype) ? 1 : 2; }
static inline int64_t group_bytes(int32_t dtype, int64_t group) { return group * PANEL * quant_bits(dtype) / 8; }
static inline int64_t block_bytes(int32_t dtype, int64_t group)
{
    return 64 + block_groups(dtype) * group_bytes(dtype, group);
}
static inline int64_t quant_blocks(int32_t dtype, int64_t group, int64_t k)
{
    int64_t inputs = group * block_groups(dtype);
    return (k + inputs - 1) / inputs;
}
static inline int64_t quantised_panel_bytes(int32_t dtype, int64_t group, int64_t k)
{
    return quant_blocks(dtype, group, k) * block_bytes(dtype, group);
}

/* A row of scales, or of minimums, in the head of a group's block. */
static inline char *group_head(char *panel, int32_t dtype, int64_t group, int64_t g, bool minimums)
{
    int64_t groups = block_groups(dtype);
    return panel + g / groups * block_bytes(dtype, group) + (minimums ? 1 : g % groups) * PANEL * 2;
}

static inline uint8_t *group_lines(char *panel, int32_t dtype, int64_t group, int64_t g)
{
    int64_t groups = block_groups(dtype);
    return (uint8_t *)panel + g / groups * block_bytes(dtype, group) + 64 + g % groups * group_bytes(dtype, group);
}

/* One row of a matrix, as f32. */
void unpack_quantised_row(const void *packed, int32_t dtype, int64_t group, int64_t k, int64_t row, float *out);

/* The product of rows with such a matrix. Inputs are rounded to 8 bits with a scale for each group, the sums of a group
 * are integers and so exact, and a group after the other is added in float32: one chain, whatever the tile. */
void multiply_quantised(const struct product *p, struct worker *me);
int64_t quantised_scratch(int32_t dtype, int64_t group, int64_t k, int64_t rows, int32_t threads);

#endif
