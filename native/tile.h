/* The micro-kernel that matmul and attention share: a few rows of A times a few panels of B, full depth, with every
 * sum in registers. Each output is one chain of additions in order of depth, whatever the shape of the tile around
 * it: that is what makes the bits of a row independent of the rows beside it. Whole numbers are exact within a piece of B.
 *
 * B is read in lines (see simd.h). A holds, for each line, what B's kind wants:
 *   LINE_F32, LINE_F16   one float
 *   LINE_BF16            a pair: two bf16 in an int32 where the dot instruction exists, else two floats
 *   LINE_I8              four whole numbers of 16 bits in two floats, as round_words makes them; what one of them is worth
 *                        is told apart, and each piece of B is summed up in 32 bits */
#ifndef TILE_H
#define TILE_H

#include "simd.h"

enum line { LINE_F32, LINE_F16, LINE_BF16, LINE_I8 };

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
    const char *ahead;            /* what few rows fetch meanwhile: as many lines as B has */
    int64_t ahead_step, ahead_column;
};

INLINE enum line line_of(int32_t dtype)
{
    return dtype == DTYPE_F32 ? LINE_F32 : dtype == DTYPE_F16 ? LINE_F16 : dtype == DTYPE_I8 ? LINE_I8 : LINE_BF16;
}

/* Floats of A that a line of B takes; bytes of a line of one panel. */
INLINE int line_floats(const enum line kind) { return kind == LINE_BF16 ? BF16_FLOATS : kind == LINE_I8 ? 2 : 1; }
INLINE int line_bytes(const enum line kind) { return PANEL * (kind == LINE_F16 ? 2 : 4); }

/* One vector of a line. `part`: which inputs, where a line is widened: the even or the odd ones. */
INLINE vec line_load(const char *p, const enum line kind, const int part)
{
    if (kind == LINE_I8)
        return line_words(p, part);
    if (kind == LINE_F32)
        return vec_load((const float *)p);
    if (kind == LINE_F16)
        return line_f16(p);
#ifdef BF16_DOT
    (void)part;
    return vec_load((const float *)p);
#else
    return part ? line_odd(p) : line_even(p);
#endif
}

/* Whether values of a dtype are widened to f32 before they are multiplied: not where the CPU takes them as they are. */
static inline bool is_widened(int32_t dtype)
{
#ifdef BF16_DOT
    if (dtype == DTYPE_BF16)
        return false;
#endif
    return dtype != DTYPE_F32 && dtype != DTYPE_I8;
}

/* A line of one panel in f32: as many lines as it has inputs. Returns where the next ones go. */
INLINE float *widen_line(const char *from, float *to, const enum line kind)
{
    const int inputs = kind == LINE_BF16 ? 2 : 1, vector_bytes = line_bytes(kind) / VECTORS;
#pragma GCC unroll 2
    for (int part = 0; part < inputs; part++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++, to += LANES)
            vec_store(to, line_load(from + v * vector_bytes, kind, part));
    return to;
}

INLINE vec multiply_add(vec w, vec x, vec acc, const enum line kind)
{
#ifdef BF16_DOT
    if (kind == LINE_BF16)
        return vec_dot_bf16(w, x, acc);
#endif
    return kind == LINE_I8 ? vec_dot_words(w, x, acc) : vec_fma(w, x, acc);
}

/* So few rows do nothing but wait for memory; more have time to bring a line into the L1 cache before they need it: as
 * long before as is right for the time that a line takes. */
enum { WAITING_ROWS = 3, LINES_AHEAD = LANES == 16 ? 16 : 6 };

/* acc[rows][columns * VECTORS] += tile. Up to `far` rows fetch what lies ahead. `rows`, `columns`, `kind` and `far` must be
 * constants where this is called. */
INLINE void tile_accumulate(vec *acc, const struct tile *t, const int rows, const int columns, const enum line kind,
                            const int far)
{
    const int width = columns * VECTORS, parts = line_floats(kind), vector_bytes = line_bytes(kind) / VECTORS;
    const int64_t a_row = t->a_row, a_step = t->a_step, b_step = t->b_step, b_column = t->b_column;
    const float *a[4]; /* rows 0, 3, 6 and 9: three rows to a pointer is what addresses can express */
#pragma GCC unroll 4
    for (int i = 0; i < (rows + 2) / 3; i++)
        a[i] = t->a + 3 * i * a_row;
    const char *b = t->b, *ahead = t->ahead;
    for (int64_t k = 0; k < t->depth; k++, b += b_step, ahead += t->ahead_step) {
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++) {
            if (part == 0)
#pragma GCC unroll 24
                for (int i = 0; i < columns; i++) {
                    if (rows <= far)
                        FETCH_FAR(ahead + i * t->ahead_column);
                    if (rows > WAITING_ROWS)
                        FETCH_SOON(b + LINES_AHEAD * b_step + i * b_column);
                }
            if (rows == 1) { /* so many sums leave no registers for more than one vector of B */
                vec x = vec_set(a[0][part]);
#pragma GCC unroll 24
                for (int i = 0; i < width; i++) {
                    const char *w = b + i / VECTORS * b_column + i % VECTORS * vector_bytes;
                    acc[i] = multiply_add(line_load(w, kind, part), x, acc[i], kind);
                }
                continue;
            }
            vec w[ACCUMULATORS];
#pragma GCC unroll 24
            for (int i = 0; i < width; i++)
                w[i] = line_load(b + i / VECTORS * b_column + i % VECTORS * vector_bytes, kind, part);
#pragma GCC unroll 24
            for (int r = 0; r < rows; r++) {
                vec x = vec_set(a[r / 3][r % 3 * a_row + part]);
#pragma GCC unroll 24
                for (int i = 0; i < width; i++)
                    acc[r * width + i] = multiply_add(w[i], x, acc[r * width + i], kind);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < (rows + 2) / 3; i++) {
            a[i] += a_step;
            HIDE(a[i]);
        }
    }
}

INLINE void tile_clear(vec *acc, const int rows, const int columns)
{
#pragma GCC unroll 24
    for (int i = 0; i < rows * columns * VECTORS; i++)
        acc[i] = vec_set(0.0f);
}

/* C (+)= A · B for any number of rows and panels, where B is cut along its depth into pieces that lie anywhere. */
struct tile_product {
    enum line kind;
    const float *a;
    int64_t a_row;                  /* floats */
    const char *const *b;           /* [pieces] */
    int64_t pieces, depth;          /* depth of a piece in lines */
    int64_t b_step, b_column;       /* bytes from line to line, from panel to panel */
    const char *const *ahead;       /* [pieces] what few rows fetch while they meet a piece: as many lines as it has, in */
    int64_t ahead_step;             /* the order in which its panels are walked; bytes from one to the next */
    const float *unit;              /* LINE_I8: [rows][pieces], `unit_row` floats from row to row: what one of A is worth */
    int64_t unit_row;
    float *c;
    int64_t c_row;
    bool add;
};
void tile_product(const struct tile_product *p, int64_t rows, int64_t panels);
/* Lines that count as one in a sum: a product must be cut at multiples of them. */
static inline int64_t tile_product_lines(const enum line kind)
{
#ifdef __AMX_BF16__
    if (kind == LINE_BF16)
        return 16;
#endif
    (void)kind;
    return 1;
}
/* Rows that fill a register tile. */
static inline int64_t tile_product_rows(const enum line kind)
{
#ifdef __AMX_BF16__
    if (kind == LINE_BF16)
        return 32;
#endif
    (void)kind;
    return ACCUMULATORS / (VECTORS * (LANES == 16 ? 2 : 1));
}

#endif
