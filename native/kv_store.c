#include "page.h"

static void store_f32(float *page, int64_t slot, const float *k, const float *v, int64_t head_dim)
{
    for (int64_t d = 0; d < head_dim; d++)
        page[d * PAGE + slot] = k[d];
    memcpy(page + PAGE * head_dim + slot * value_width(head_dim), v, (size_t)head_dim * sizeof *v);
}

static void store_bf16(uint16_t *page, int64_t slot, const float *k, const float *v, int64_t head_dim)
{
    uint16_t *values = page + PAGE * head_dim + slot / 2 * value_width(head_dim) * 2 + slot % 2;
    for (int64_t d = 0; d < head_dim; d++) {
        page[(d / 2 * PAGE + slot) * 2 + d % 2] = f32_to_bf16(k[d]);
        values[d * 2] = f32_to_bf16(v[d]);
    }
}

static char *head_of_row(const struct kv_store *op, int64_t row, int64_t head)
{
    int64_t heads = op->k_width / op->head_dim;
    int64_t page = op->page_table[(int64_t)op->seq[row] * op->page_table_stride + op->pos[row] / PAGE];
    return (char *)op->kv + (page * heads + head) * page_head_bytes(op->kv_dtype, op->head_dim);
}

/* A page is handed out when its first position is written. What an earlier sequence left in it is cleared then: its
 * unused tail is read with a weight of zero, and zero times a stale NaN is NaN. */
static bool clear_fresh_pages(const struct kv_store *op, struct worker *me)
{
    int64_t heads = op->k_width / op->head_dim, fresh = 0;
    for (int64_t row = 0; row < *op->rows; row++)
        if (op->pos[row] % PAGE == 0)
            for (int64_t head = 0; head < heads; head++)
                if (fresh++ % me->team->threads == me->index)
                    memset(head_of_row(op, row, head), 0, (size_t)page_head_bytes(op->kv_dtype, op->head_dim));
    return fresh == 0 || team_wait(me);
}

void kv_store(const struct kv_store *op, struct worker *me)
{
    int64_t head_dim = op->head_dim, heads = op->k_width / head_dim;
    if (!clear_fresh_pages(op, me))
        return;
    struct range share = my_share(me, *op->rows * heads);
    for (int64_t i = share.begin; i < share.end; i++) {
        int64_t row = i / heads, head = i % heads, slot = op->pos[row] % PAGE;
        const float *k = op->k + row * op->k_stride + head * head_dim;
        const float *v = op->v + row * op->v_stride + head * head_dim;
        char *page = head_of_row(op, row, head);
        if (op->kv_dtype == DTYPE_F32)
            store_f32((float *)page, slot, k, v, head_dim);
        else
            store_bf16((uint16_t *)page, slot, k, v, head_dim);
    }
}
