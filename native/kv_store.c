#include <math.h>

#include "page.h"

/* Where a row's keys and values of one head go. */
struct place {
    char *keys, *values;
    float *scales; /* of the page's keys and values: int8 only */
    int64_t slot;
};

static struct place place_of(const struct kv_store *op, int64_t row, int64_t head)
{
    int64_t heads = op->k_width / op->head_dim, bytes = page_head_bytes(op->kv_dtype, op->head_dim);
    int64_t entry = page_entry(op->pos[row] / PAGE, op->sink_pages, op->ring_pages);
    int64_t page = op->page_table[(int64_t)op->seq[row] * op->page_table_stride + entry], index = page * heads + head;
    char *keys = (char *)op->kv + index * bytes, *scales = (char *)op->kv + op->kv_pages * heads * bytes;
    return (struct place){.keys = keys, .values = keys + page_key_bytes(op->kv_dtype, op->head_dim),
                          .scales = (float *)scales + index * page_scales(op->kv_dtype), .slot = op->pos[row] % PAGE};
}

/* A page is handed out when its first position is written. What an earlier sequence left in it is cleared then: its
 * unused tail is read with a weight of zero, and zero times a stale NaN is NaN. */
static bool clear_fresh_pages(const struct kv_store *op, struct worker *me)
{
    int64_t heads = op->k_width / op->head_dim, fresh = 0;
    for (int64_t row = 0; row < *op->rows; row++)
        if (op->pos[row] % PAGE == 0)
            for (int64_t head = 0; head < heads; head++)
                if (fresh++ % me->team->threads == me->index) {
                    struct place p = place_of(op, row, head);
                    memset(p.keys, 0, (size_t)page_head_bytes(op->kv_dtype, op->head_dim));
                    memset(p.scales, 0, (size_t)page_scales(op->kv_dtype) * sizeof *p.scales);
                }
    return fresh == 0 || team_wait(me);
}

static inline void put(char *line, int64_t i, float x, const int32_t dtype)
{
    switch (dtype) {
    case DTYPE_F32: ((float *)line)[i] = x; break;
    case DTYPE_BF16: ((uint16_t *)line)[i] = f32_to_bf16(x); break;
    case DTYPE_F16: ((uint16_t *)line)[i] = f32_to_f16(x); break;
    default: ((int8_t *)line)[i] = (int8_t)lrintf(x);
    }
}

/* The number that int8 counts in: the largest magnitude is 127 of it. NaN if there is NaN among them. */
static float scale_of(const float *x, int64_t count)
{
    float most = 0.0f;
    for (int64_t i = 0; i < count; i++) {
        if (x[i] != x[i])
            return NAN;
        most = fmaxf(most, fabsf(x[i]));
    }
    return most / 127.0f;
}

static inline void store(struct place p, const float *k, const float *v, int64_t head_dim, const int32_t dtype)
{
    const int64_t inputs = line_inputs(dtype);
    float k_unit = 1.0f, v_unit = 1.0f;
    if (dtype == DTYPE_I8) {
        p.scales[p.slot] = scale_of(k, head_dim);
        p.scales[PAGE + p.slot] = scale_of(v, head_dim);
        k_unit = isfinite(p.scales[p.slot]) && p.scales[p.slot] > 0 ? p.scales[p.slot] : 1.0f;
        v_unit = isfinite(p.scales[PAGE + p.slot]) && p.scales[PAGE + p.slot] > 0 ? p.scales[PAGE + p.slot] : 1.0f;
    }
    for (int64_t d = 0; d < head_dim; d++)
        put(p.keys, key_index(head_dim, p.slot, d, inputs), k[d] / k_unit, dtype);
    for (int64_t d = 0; d < head_dim; d++)
        put(p.values, value_index(p.slot, d, inputs), v[d] / v_unit, dtype);
}

void kv_store(const struct kv_store *op, struct worker *me)
{
    int64_t head_dim = op->head_dim, heads = op->k_width / head_dim;
    if (!clear_fresh_pages(op, me))
        return;
    struct range share = my_share(me, *op->rows * heads);
    for (int64_t i = share.begin; i < share.end; i++) {
        int64_t row = i / heads, head = i % heads;
        const float *k = op->k + row * op->k_stride + head * head_dim;
        const float *v = op->v + row * op->v_stride + head * head_dim;
        struct place p = place_of(op, row, head);
        switch (op->kv_dtype) {
        case DTYPE_F32: store(p, k, v, head_dim, DTYPE_F32); break;
        case DTYPE_BF16: store(p, k, v, head_dim, DTYPE_BF16); break;
        case DTYPE_F16: store(p, k, v, head_dim, DTYPE_F16); break;
        default: store(p, k, v, head_dim, DTYPE_I8);
        }
    }
}
