/* The layout of one head in a page of the KV cache: keys as lines of PAGE positions, then values as lines of
 * value_width columns. In bf16 a line holds pairs, of dimensions for keys and of positions for values. */
#ifndef PAGE_H
#define PAGE_H

#include "native.h"

/* Values are padded to whole panels, so that the last columns can be read as any others. */
static inline int64_t value_width(int64_t head_dim) { return round_up(head_dim, PANEL); }
static inline int64_t page_element_bytes(int32_t dtype) { return dtype == DTYPE_F32 ? 4 : 2; }
static inline int64_t page_key_bytes(int32_t dtype, int64_t head_dim)
{
    return PAGE * head_dim * page_element_bytes(dtype);
}
static inline int64_t page_head_bytes(int32_t dtype, int64_t head_dim)
{
    return PAGE * (head_dim + value_width(head_dim)) * page_element_bytes(dtype);
}

#endif
