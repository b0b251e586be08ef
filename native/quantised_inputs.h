/* The other operand of a quantised product: inputs rounded to 8 bits, as the kernels read them. */
#ifndef QUANTISED_INPUTS_H
#define QUANTISED_INPUTS_H

#include "quantised.h"
#include "simd.h"

/* For each row and group a record of words, that is: */
enum {
    SCALE,      /* f32 */
    START,      /* -zero · Σ: where the dots begin */
    SUM,        /* f32: scale · Σ */
    QUADS = 4   /* from here on quads of bytes */
};

static inline int64_t quad_words(int32_t dtype) { return QUAD_WORDS(quant_bits(dtype)); }
static inline int64_t record_words(int32_t dtype, int64_t group) { return QUADS + group / 4 * quad_words(dtype); }
static inline int64_t row_words(int32_t dtype, int64_t group, int64_t k)
{
    return quant_blocks(dtype, group, k) * block_groups(dtype) * record_words(dtype, group);
}

static inline int64_t inputs_bytes(int32_t dtype, int64_t group, int64_t k, int64_t rows)
{
    return round_up(rows * row_words(dtype, group, k) * 4, 64);
}

INLINE float as_float(int32_t word)
{
    float f;
    memcpy(&f, &word, 4);
    return f;
}

/* With many rows the tile unit (AMX) is faster. Its sums are the same whole numbers, so the bits are, too. */
#ifdef __AMX_INT8__
/* Bytes of scratch behind the inputs. */
int64_t quantised_tiles_scratch(int32_t dtype, int64_t group, int64_t k, int32_t threads);
/* All rows times as many of these panels as suit the unit. Returns the first panel that is left. */
int64_t multiply_quantised_tiles(const struct product *p, const int32_t *packed, struct range panels,
                                 const struct worker *me);
#else
static inline int64_t quantised_tiles_scratch(int32_t dtype, int64_t group, int64_t k, int32_t threads)
{
    (void)dtype, (void)group, (void)k, (void)threads;
    return 0;
}
static inline int64_t multiply_quantised_tiles(const struct product *p, const int32_t *packed, struct range panels,
                                               const struct worker *me)
{
    (void)p, (void)packed, (void)me;
    return panels.begin;
}
#endif
#endif
