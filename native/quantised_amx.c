/* Quantised products by the tile unit: two panels at a time, of 4-bit quants widened to bytes first. */
#include "quantised_inputs.h"

#ifdef __AMX_INT8__
#include "amx.h"

enum { FEWEST_ROWS = 16 }; /* from so many on it is faster */

/* Bytes of a panel whose quants have a byte each. */
static int64_t widened_bytes(int32_t dtype, int64_t group, int64_t k)
{
    return quant_blocks(dtype, group, k) * block_groups(dtype) * group * PANEL;
}

int64_t quantised_tiles_scratch(int32_t dtype, int64_t group, int64_t k, int32_t threads)
{
    return quant_bits(dtype) == 4 ? threads * 2 * widened_bytes(dtype, group, k) : 0;
}

/* Puts 4-bit quants into bytes of their own, all groups of a panel one after the other. */
static void widen_panel(const struct product *p, const char *panel, char *out)
{
    int64_t groups = block_groups(p->dtype), bytes = group_bytes(p->dtype, p->group);
    const char *end = panel + quantised_panel_bytes(p->dtype, p->group, p->k);
    for (; panel < end; panel += 64 + groups * bytes)
        for (int64_t i = 0; i < groups * bytes; i += 64, out += 128) {
            ivec both = ivec_load(panel + 64 + i);
            _mm512_storeu_si512(out, ivec_low_halves(both));
            _mm512_storeu_si512(out + 64, ivec_high_halves(both));
        }
}

/* acc[rows][2 * PANEL] += the sums of a group, scaled: the arithmetic of multiply_tile in quantised.c. */
INLINE void add_group(const int32_t *a, int64_t a_row, int64_t rows, const char *const heads[2],
                      const int32_t *sums, float *acc, const bool minimums)
{
    for (int c = 0; c < 2; c++) {
        vec scales = line_f16(heads[c]), lowest = line_f16(heads[c] + (minimums ? PANEL * 2 : 0));
        for (int64_t r = 0; r < rows; r++) {
            const int32_t *x = a + r * a_row;
            float *to = acc + r * 2 * PANEL + c * PANEL;
            ivec sum = ivec_add(ivec_load(sums + r * 2 * PANEL + c * PANEL), ivec_set(x[START]));
            vec total = vec_fma(ivec_to_vec(sum), vec_mul(scales, vec_set(as_float(x[SCALE]))), vec_load(to));
            if (minimums)
                total = vec_fma(lowest, vec_set(as_float(x[SUM])), total);
            vec_store(to, total);
        }
    }
}

/* out[first .. first + rows][of two panels]. quants: of each, as bytes, the first group of a block at a time. */
static void multiply_by_tiles(const struct product *p, const int32_t *packed, int64_t first, int64_t rows, int64_t panel,
                              const char *const widened[2])
{
    _Alignas(64) int32_t sums[AMX_DOT_ROWS * 2 * PANEL];
    _Alignas(64) float acc[AMX_DOT_ROWS * 2 * PANEL];
    int64_t a_row = row_words(p->dtype, p->group, p->k), record = record_words(p->dtype, p->group);
    int64_t panel_size = quantised_panel_bytes(p->dtype, p->group, p->k), groups = a_row / record;
    const int32_t *a = packed + first * a_row;
    char *panels = (char *)p->weight + panel * panel_size;
    memset(acc, 0, (size_t)rows * 2 * PANEL * sizeof *acc);
    for (int64_t g = 0; g < groups; g++, a += record) {
        const char *quants[2], *heads[2];
        for (int c = 0; c < 2; c++) {
            char *own = panels + c * panel_size;
            heads[c] = group_head(own, p->dtype, p->group, g, false);
            quants[c] = widened[c] ? widened[c] + g * p->group * PANEL : (char *)group_lines(own, p->dtype, p->group, g);
        }
        amx_dots((const char *)(a + QUADS), a_row * 4, rows, quants, p->group / 4, sums);
        if (has_minimums(p->dtype))
            add_group(a, a_row, rows, heads, sums, acc, true);
        else
            add_group(a, a_row, rows, heads, sums, acc, false);
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < 2 * PANEL; i += LANES) {
            int64_t column = panel * PANEL + i, left = p->out_width - column;
            if (left <= 0)
                break;
            vec sum = vec_load(acc + r * 2 * PANEL + i);
            if (p->bias)
                sum = vec_add(sum, vec_load_upto(p->bias + column, left));
            vec_store_upto(p->out + (first + r) * p->out_stride + column, sum, left);
        }
}

int64_t multiply_quantised_tiles(const struct product *p, const int32_t *packed, struct range panels,
                                 const struct worker *me)
{
    int64_t size = widened_bytes(p->dtype, p->group, p->k), panel = panels.begin;
    if (p->rows < FEWEST_ROWS)
        return panel;
    char *own = (char *)packed + inputs_bytes(p->dtype, p->group, p->k, p->rows) + me->index * 2 * size;
    for (; panel + 2 <= panels.end; panel += 2) {
        const char *widened[2] = {NULL, NULL};
        if (quant_bits(p->dtype) == 4)
            for (int c = 0; c < 2; c++) {
                widen_panel(p, p->weight + (panel + c) * quantised_panel_bytes(p->dtype, p->group, p->k), own + c * size);
                widened[c] = own + c * size;
            }
        for (int64_t first = 0; first < p->rows; first += AMX_DOT_ROWS)
            multiply_by_tiles(p, packed, first, min_i64(AMX_DOT_ROWS, p->rows - first), panel, widened);
    }
    return panel;
}
#endif
