/* A block for each row. */
#include "quants.cuh"

template <class T> DEVICE void widen_row(const void *table, int64_t row, int width, float *out,
                                         const struct block &block)
{
    const T *from = (const T *)((const char *)table + row * row_bytes<T>(width));
    for (int i = threadIdx.x; i < width; i += block.threads)
        out[i] = to_float(from[i]);
}

template <class Q> DEVICE void widen_quants(const struct embedding &op, int64_t row, float *out, const struct block &block)
{
    for (int i = threadIdx.x; i < op.out_width; i += block.threads)
        out[i] = weight_at<Q>((const char *)op.table, op.out_width, op.table_group, row, i);
}

KERNEL(embedding, embedding, MAX_THREADS)
{
    for (int64_t row = block.index.x; row < *op.rows; row += block.grid.x) {
        int32_t token = op.token[row];
        int32_t entry = token - op.first_id;
        float *out = op.out + row * op.out_width;
        if (token < 0 || token >= op.vocab_size)
            fail(team, STATUS_TOKEN, (int32_t)row);
        else if (entry < 0 || entry >= op.ids)
            for (int i = threadIdx.x; i < op.out_width; i += block.threads)
                out[i] = 0.0f;
        else if (op.table_dtype == DTYPE_F32)
            widen_row<float>(op.table, entry, op.out_width, out, block);
        else if (op.table_dtype == DTYPE_BF16)
            widen_row<struct bf16>(op.table, entry, op.out_width, out, block);
        else if (op.table_dtype == DTYPE_I8)
            widen_quants<i8>(op, entry, out, block);
        else if (op.table_dtype == DTYPE_I4)
            widen_quants<i4>(op, entry, out, block);
        else if (op.table_dtype == DTYPE_U8)
            widen_quants<u8>(op, entry, out, block);
        else if (op.table_dtype == DTYPE_U4)
            widen_quants<u4>(op, entry, out, block);
        else
            widen_row<struct f16>(op.table, entry, op.out_width, out, block);
    }
}
