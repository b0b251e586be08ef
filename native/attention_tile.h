/* What the kinds of attention share. A tile is some rows of one sequence times the query heads that share one KV head,
 * so that a page of keys is read once for all of them. It meets the keys in blocks of pages; after each, its sums stand
 * as if the softmax had known the highest score from the start (Milakov and Gimelshein, 2018).
 *
 * A row's arithmetic does not depend on its tile: every score is one chain over head_dim, every output one chain over
 * the positions of the blocks, or over their pages where whole numbers are added up in each, and what a row does not see
 * adds exact zeros. The blocks do decide its bits. */
#ifndef ATTENTION_TILE_H
#define ATTENTION_TILE_H

#include "exponentials.h"
#include "page.h"
#include "tile.h"
#include "words.h"

struct span { int64_t first, last; }; /* positions, both included */

/* Where the first lines of a page's keys and values lie. */
struct page_lines { const char *keys, *values; };

/* What a strip of queries needs of a page. */
struct part {
    int64_t page, place;           /* the page's number in the sequence, and in the block */
    int64_t from, to;              /* positions whose keys it meets: whole panels */
    int64_t first, until;          /* and those of them whose values it meets: whole lines */
    int64_t sinks;                 /* how many of the page's positions are sinks */
    bool only_sinks;               /* and whether they are all that is seen of it */
    struct page_lines at;
    const float *scales;           /* [keys, values][PAGE]: int8 only */
};

/* Where the walk goes on after a block. */
struct ahead { int64_t kv_head, page; };

struct attention_tile {
    const struct attention *op;
    int64_t row, rows;             /* of one sequence, in order of position */
    int64_t skipped;               /* queries of the first row that are not the tile's */
    int64_t kv_head, group;        /* group: query heads to a KV head */
    int64_t queries, width;        /* rows * group; floats of a query's sums, whole panels */
    int64_t strip;                 /* queries whose scores exist at a time */
    float *q, *q_sink;             /* [queries][q_row], as the micro-kernel takes them; int8: last, a row's unit */
    int64_t q_row;
    float *scores, *sink_scores;   /* [strip][score_row], [strip][PAGE] */
    int64_t score_row;
    float *weight_units;           /* [strip][unit_row] of each part's weights: int8 only */
    int64_t unit_row;
    float *highest;                /* [strip] of a block */
    float *out, *max, *sum;        /* [queries][width]: sums of weight · value; highest score; sum of weights */
    float *copies;                 /* of a block's pages (attention_copies.c); NULL where there are never any */
    bool copied;                   /* whether the tile at hand reads copies */
    enum line kind;                /* of the lines it reads: the cache's, or f32 */
    int64_t inputs, key_lines;     /* inputs that share a line; lines of a page's keys */
    int64_t key_panel, value_panel; /* bytes from panel to panel */
    int64_t *page;                 /* numbers of a block's pages */
    struct part *part;             /* what the strip at hand needs of them */
    const char **pieces, **ahead;  /* where the values of some of them lie, and what is fetched meanwhile */
    struct ahead next;             /* after the block at hand */
};

/* Lays out the memory of a tile of so many queries and keys to a block. Returns its bytes; memory may be NULL. */
int64_t tile_place(struct attention_tile *t, char *memory, int64_t queries, int64_t strip, int64_t keys);

/* Walks the rows of a step from the last to the first, which in a prompt is the longest work first: moves to the up to
 * max_rows rows before *end that are of one sequence and within the op's positions. False when there are none left. */
bool tile_before(struct attention_tile *t, int64_t *end, int64_t max_rows);
enum { ALL_ROWS = INT32_MAX };

/* Where a page lies in the cache. */
struct page_lines tile_page(const struct attention_tile *t, int64_t page);

/* Copies of a block's pages: what they take for so many queries at most, whether and how the tile at hand reads them, to
 * make them of the first `count` pages of t->page, and where they then lie. */
int64_t tile_copies_bytes(const struct attention_tile *t, int64_t queries, int64_t pages);
void tile_choose_lines(struct attention_tile *t);
void tile_copy_pages(const struct attention_tile *t, int64_t count);
struct page_lines tile_copy_of(const struct attention_tile *t, int64_t place);

void tile_load_queries(struct attention_tile *t);
void tile_clear_sums(struct attention_tile *t);
void tile_store_outputs(const struct attention_tile *t);

/* What a row sees beside the sinks. */
struct span visible(const struct attention *op, int64_t row);
/* The first page from `page` on that a tile sees anything of, and the page after the last. */
int64_t tile_next_page(const struct attention_tile *t, int64_t page);
int64_t tile_end_page(const struct attention_tile *t);

/* Adds to the sums the keys and values of those of pages [first, until) that the tile sees, in blocks of `size` pages cut
 * at multiples of it. `after`: where the walk goes on then. */
void tile_attend_blocks(struct attention_tile *t, int64_t first, int64_t until, int64_t size, struct ahead after);

/* Adds to the sums of `count` queries those of the first `pages` pages of t->page that they see. */
void tile_attend_strip(struct attention_tile *t, int64_t first, int64_t count, int64_t pages);

/* Turns the scores of `count` queries, `columns` each, those of t->part[0 .. parts], into weights in place, as the
 * micro-kernel reads A, and counts them into the queries' highest scores and sums. */
void tile_soften(struct attention_tile *t, int64_t first, int64_t count, int64_t parts, int64_t columns);

/* The output of one query: weighted values over the sum of weights. sums may be out. */
void divide_by_sum(const struct attention *op, const float *sums, float sum, float *out);

/* All of it, for all rows of the step, by tiles of so many rows: each tile and KV head is some thread's. All tiles of a
 * sequence meet a head before the next: its keys and values, which all of them read, stay in the last cache. */
void attend_by_tiles(struct attention_tile *t, int64_t max_rows, int64_t block_size, struct worker *me);

/* Query i of a tile is head i % group of row i / group, where none are skipped. */
static inline int64_t row_of(const struct attention_tile *t, int64_t query) { return t->row + (t->skipped + query) / t->group; }
static inline int64_t column_of(const struct attention_tile *t, int64_t query)
{
    return (t->kv_head * t->group + (t->skipped + query) % t->group) * t->op->head_dim;
}
static inline float *out_of(const struct attention_tile *t, int64_t query)
{
    return t->op->out + row_of(t, query) * t->op->out_stride + column_of(t, query);
}
/* q: op->q or op->q_sink. */
static inline const float *query_of(const struct attention_tile *t, const float *q, int64_t stride, int64_t query)
{
    return q + row_of(t, query) * stride + column_of(t, query);
}
/* Queries that fill the micro-kernel. */
static inline int64_t strip_of(const struct attention *op) { return tile_product_rows(line_of(op->kv_dtype)); }
static inline int64_t group_of(const struct attention *op) { return op->heads / op->kv_heads; }

/* Factor from scores to exponents of two. */
static inline float exponent_scale(const struct attention *op) { return op->scale * 1.44269504089f; }

/* 2^x of one number, with the bits of vec_exp2. */
static inline float exp2_of(float x)
{
    float lane[LANES];
    vec_store(lane, vec_exp2(vec_set(x)));
    return lane[0];
}

/* Whether windows are so narrow that what a tile sees, of so many rows at most, is one block; such a tile. */
bool is_narrow(const struct attention *op);
int64_t narrow_rows(const struct attention *op, int64_t rows);
void attend_narrow_tile(const struct attention_tile *t);

/* The blocks of flash and streaming attention: the most queries to a tile, and the most keys and pages. */
int64_t q_block_of(const struct attention *op);
int64_t block_keys(const struct attention *op);
static inline int64_t block_pages(const struct attention *op) { return block_keys(op) / PAGE; }
/* Rows to a tile in a step of so many: fewer than fill a tile where threads would otherwise have nothing to do. */
int64_t tile_rows(const struct attention *op, int32_t threads);

#endif
