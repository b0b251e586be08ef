/* What a row of attention sees: positions in order, and where their keys and values lie. */
#ifndef CACHE_CUH
#define CACHE_CUH

#include "common.cuh"

/* The positions that a row sees: the first `sinks`, then those from `first` up to its own; `count` in all, of which it
 * sees the first `by_sink` by q_sink. */
struct view {
    int64_t row;
    int sinks, first, count, by_sink;
};

DEVICE bool sees(const struct attention &op, int64_t row, struct view &view)
{
    if (row >= *op.rows || op.pos[row] < op.from_pos || op.pos[row] >= op.until_pos)
        return false;
    int pos = op.pos[row], first = op.window > 0 ? max_of(0, pos - op.window + 1) : 0, sinks = min_of(op.sink, first);
    view = {row, sinks, first, sinks + pos - first + 1, op.q_sink ? min_of(op.sink, pos + 1) : 0};
    return true;
}

DEVICE int position_of(const struct view &view, int index)
{
    return index < view.sinks ? index : view.first + index - view.sinks;
}

/* The page of a row that holds a position. */
DEVICE int64_t page_of(const struct attention &op, int64_t row, int position)
{
    int64_t entry = page_entry(position / PAGE, op.sink_pages, op.ring_pages);
    return op.page_table[(int64_t)op.seq[row] * op.page_table_stride + entry];
}

/* The first key of a head in a page; values lie PAGE positions further on. Scales likewise. */
template <class T> DEVICE const char *head_of(const struct attention &op, int64_t page, int64_t kv_head)
{
    return (const char *)op.kv + (page * op.kv_heads + kv_head) * 2 * PAGE * row_bytes<T>(op.head_dim);
}
template <class T> DEVICE const float *scales_of(const struct attention &op, int64_t page, int64_t kv_head)
{
    const char *scales = (const char *)op.kv + op.kv_pages * op.kv_heads * 2 * PAGE * row_bytes<T>(op.head_dim);
    return (const float *)scales + (page * op.kv_heads + kv_head) * 2 * PAGE;
}

/* A query head of a row, as the window or as the sinks see it. */
DEVICE const float *query_of(const struct attention &op, int64_t row, int64_t head, bool of_sinks)
{
    return of_sinks ? op.q_sink + row * op.q_sink_stride + head * op.head_dim
                    : op.q + row * op.q_stride + head * op.head_dim;
}

#endif
