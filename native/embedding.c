#include "quantised.h"
#include "simd.h"

/* Input `k` of output `lane` in a packed panel. */
static float panel_value(const char *panel, int32_t dtype, int64_t k, int32_t lane)
{
    if (dtype == DTYPE_F32)
        return ((const float *)panel)[k * PANEL + lane];
    if (dtype == DTYPE_F16)
        return f16_to_f32(((const uint16_t *)panel)[k * PANEL + lane]);
    return bf16_to_f32(((const uint16_t *)panel)[(k / 2 * PANEL + lane) * 2 + k % 2]);
}

static void unpack_row(const void *packed, int32_t dtype, int64_t group, int64_t k, int64_t row, float *out)
{
    if (is_quantised(dtype)) {
        unpack_quantised_row(packed, dtype, group, k, row, out);
        return;
    }
    const char *panel = (const char *)packed + row / PANEL * panel_bytes(dtype, k);
    for (int64_t i = 0; i < k; i++)
        out[i] = panel_value(panel, dtype, i, (int32_t)(row % PANEL));
}

/* The table is the packed matrix that a tied model multiplies by for its logits: one copy serves both. */
void embedding(const struct embedding *op, struct worker *me)
{
    struct range rows = my_share(me, *op->rows);
    for (int64_t r = rows.begin; r < rows.end; r++) {
        int32_t token = op->token[r];
        if (token < 0 || token >= op->vocab_size) {
            fail(me, STATUS_TOKEN, (int32_t)r);
            return;
        }
        float *out = op->out + r * op->out_width;
        int32_t row = token - op->first_id;
        if (row >= 0 && row < op->ids)
            unpack_row(op->table, op->table_dtype, op->table_group, op->out_width, row, out);
        else
            memset(out, 0, (size_t)op->out_width * sizeof *out);
    }
}

void unpack_matrix(const void *packed, int32_t dtype, int32_t group, int32_t k, int32_t first, int32_t count, float *out)
{
    for (int32_t r = 0; r < count; r++)
        unpack_row(packed, dtype, group, k, first + r, out + (int64_t)r * k);
}
