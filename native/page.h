/* The layout of the KV cache: see struct kv_store in abi.h. Keys and values lie in panels like those of a packed matrix, so
 * that a head of a page is read straight through: of PANEL positions for keys, with a line for each dimension, and of PANEL
 * columns for values, with a line for each position. In bf16 a line holds pairs, in int8 quads, of dimensions or positions. */
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
/* Where in its page's keys dimension d of a position lies, and in its values column d; lines: of a panel. */
static inline int64_t panel_index(int64_t lines, int64_t input, int64_t output, int64_t inputs)
{
    return ((output / PANEL * lines + input / inputs) * PANEL + output % PANEL) * inputs + input % inputs;
}
static inline int64_t key_index(int64_t head_dim, int64_t slot, int64_t d, int64_t inputs)
{
    return panel_index((head_dim + inputs - 1) / inputs, d, slot, inputs);
}
static inline int64_t value_index(int64_t slot, int64_t d, int64_t inputs)
{
    return panel_index(PAGE / inputs, slot, d, inputs);
}

/* Scales of one head in a page: of its keys, then of its values. */
static inline int64_t page_scales(int32_t dtype) { return dtype == DTYPE_I8 ? 2 * PAGE : 0; }

/* Which entry of a sequence's row in the page table names its page number `page`. */
static inline int64_t page_entry(int64_t page, int32_t sink_pages, int32_t ring_pages)
{
    return ring_pages == 0 || page < sink_pages ? page : sink_pages + (page - sink_pages) % ring_pages;
}

#endif
