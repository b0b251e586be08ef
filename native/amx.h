/* Products by the tile unit (AMX), of bf16 matrices and of quantised ones. For bf16, one instruction multiplies up to 16
 * rows of A, 32 inputs long, with 16 lines of a panel. For each output it adds up the even and the odd inputs of those 32
 * and then both to the sum, so an output is one chain over blocks of 32 inputs, whatever the rows beside it. */
#ifndef AMX_H
#define AMX_H

#include "native.h"

#ifdef __AMX_BF16__

/* C (+)= A · B. A holds bf16 in blocks of 16 rows: row r of block i begins at i * a_block + r * a_row, and 16 pairs of
 * inputs further on a_step later. B is cut along its depth into pieces that lie anywhere. All strides in bytes. */
struct amx_product {
    const char *a;
    int64_t a_row, a_step, a_block;
    const char *const *b;             /* [pieces] */
    int64_t pieces, depth;            /* depth of a piece in lines */
    int64_t b_step, b_column;         /* from line to line, from panel to panel */
    float *c;
    int64_t c_row;                    /* floats */
    bool add;
};
void amx_product(const struct amx_product *p, int64_t rows, int64_t panels);

/* sums[rows][2 * PANEL] = the dots of at most AMX_DOT_ROWS rows of signed bytes, a_row bytes apart, with `quads` lines of
 * two panels of unsigned ones: whole numbers, exact in any order. */
enum { AMX_DOT_ROWS = 32 };
void amx_dots(const char *a, int64_t a_row, int64_t rows, const char *const b[2], int64_t quads, int32_t *sums);

/* A thread calls these before its first product and after its last: others may have used the unit in between. */
void amx_begin(void);
void amx_end(void);

/* Does `rounds` of products with everything in tiles, to be timed. Returns multiplications a round. */
int64_t amx_in_registers(int64_t rounds);

#else
static inline void amx_begin(void) {}
static inline void amx_end(void) {}
#endif
#endif
