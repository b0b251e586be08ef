/* The layout of the KV cache: see struct kv_store in abi.h. A line of keys is PAGE positions, a line of values
 * value_width columns; in bf16 a line holds pairs, in int8 quads, of dimensions for keys and of positions for values. */
#ifndef PAGE_H
#define PAGE_H

#include "native.h"

/* Values are padded to whole panels, so that the last columns can be read as any others. */
static inline int64_t value_width(int64_t head_dim) { return round_up(head_dim, PANEL); }
static inline int64_t page_element_bytes(int32_t dtype) { return dtype == DTYPE_F32 ? 4 : dtype == DTYPE_I8 ? 1 : 2; }
/* Inputs that share a line. */
static inline int64_t line_inputs(int32_t dtype) { return dtype == DTYPE_BF16 ? 2 : dtype == DTYPE_I8 ? 4 : 1; }

static inline int64_t page_key_bytes(int32_t dtype, int64_t head_dim)
{
    return PAGE * round_up(head_dim, line_inputs(dtype)) * page_element_bytes(dtype);
}
static inline int64_t page_head_bytes(int32_t dtype, int64_t head_dim)
{
    return page_key_bytes(dtype, head_dim) + PAGE * value_width(head_dim) * page_element_bytes(dtype);
}
/* Scales of one head in a page: of its keys, then of its values. */
static inline int64_t page_scales(int32_t dtype) { return dtype == DTYPE_I8 ? 2 * PAGE : 0; }

/* Which entry of a sequence's row in the page table names its page number `page`. */
static inline int64_t page_entry(int64_t page, int32_t sink_pages, int32_t ring_pages)
{
    return ring_pages == 0 || page < sink_pages ? page : sink_pages + (page - sink_pages) % ring_pages;
}

#endif
