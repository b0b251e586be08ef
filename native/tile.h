/* The micro-kernel that matmul and attention share: a few rows of A times a few panels of B, full depth, with every
 * sum in registers. Each output is one chain of additions in order of depth, whatever the shape of the tile around
 * it: that is what makes the bits of a row independent of the rows beside it.
 *
 * B is read in lines (see simd.h). A holds, for each line, what B's kind wants:
 *   LINE_F32, LINE_F16   one float
 *   LINE_BF16            a pair: two bf16 in an int32 where the dot instruction exists, else two floats */
#ifndef TILE_H
#define TILE_H

#include "simd.h"

enum line { LINE_F32, LINE_F16, LINE_BF16 };

#ifdef BF16_DOT
enum { BF16_FLOATS = 1 }; /* floats of A that a bf16 line takes */
#else
enum { BF16_FLOATS = 2 };
#endif

struct tile {
    const float *a;
    int64_t a_row, a_step;        /* floats from row to row, from line to line */
    const char *b;
    int64_t b_step, b_column;     /* bytes from line to line, from panel to panel */
    int64_t depth;                /* lines */
};

INLINE enum line line_of(int32_t dtype)
{
    return dtype == DTYPE_F32 ? LINE_F32 : dtype == DTYPE_F16 ? LINE_F16 : LINE_BF16;
}

/* One vector of a line. `half`: of a bf16 line that is widened, the even or the odd inputs. */
INLINE vec line_load(const char *p, const enum line kind, const int half)
{
    if (kind == LINE_F32)
        return vec_load((const float *)p);
    if (kind == LINE_F16)
        return line_f16(p);
#ifdef BF16_DOT
    (void)half;
    return vec_load((const float *)p);
#else
    return half ? line_odd(p) : line_even(p);
#endif
}

INLINE vec multiply_add(vec w, vec x, vec acc, const enum line kind)
{
#ifdef BF16_DOT
    if (kind == LINE_BF16)
        return vec_dot_bf16(w, x, acc);
#endif
    (void)kind;
    return vec_fma(w, x, acc);
}

/* acc[rows][columns * VECTORS] += tile. `rows`, `columns` and `kind` must be constants where this is called. */
INLINE void tile_accumulate(vec *acc, const struct tile *t, const int rows, const int columns, const enum line kind)
{
    const int width = columns * VECTORS, halves = kind == LINE_BF16 ? BF16_FLOATS : 1;
    const int lane_bytes = kind == LINE_F16 ? 2 : 4;
    const int64_t a_row = t->a_row, a_step = t->a_step, b_step = t->b_step, b_column = t->b_column;
    const float *a = t->a;
    const char *b = t->b;
    for (int64_t k = 0; k < t->depth; k++, a += a_step, b += b_step)
#pragma GCC unroll 2
        for (int half = 0; half < halves; half++) {
            vec w[ACCUMULATORS];
#pragma GCC unroll 24
            for (int i = 0; i < width; i++)
                w[i] = line_load(b + i / VECTORS * b_column + i % VECTORS * LANES * lane_bytes, kind, half);
#pragma GCC unroll 24
            for (int r = 0; r < rows; r++) {
                vec x = vec_set(a[r * a_row + half]);
#pragma GCC unroll 24
                for (int i = 0; i < width; i++)
                    acc[r * width + i] = multiply_add(w[i], x, acc[r * width + i], kind);
            }
        }
}

INLINE void tile_clear(vec *acc, const int rows, const int columns)
{
#pragma GCC unroll 24
    for (int i = 0; i < rows * columns * VECTORS; i++)
        acc[i] = vec_set(0.0f);
}

#endif
