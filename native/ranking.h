/* One row of logits: its most likely tokens and their weights.
 *
 * The largest logit of every BLOCK ids is found first: looking for the most likely tokens then means looking into the
 * few blocks that can hold them. */
#ifndef RANKING_H
#define RANKING_H

#include "drawing.h"
#include "exponentials.h"

enum { BLOCK = 128 }; /* ids that share one maximum */

struct candidate {
    int32_t id;
    float weight;
};

/* One row, and a thread's scratch memory for it. A weight is e^((logit − max) / temperature). */
struct row {
    const float *logits;
    int64_t count; /* the ids that exist */
    int64_t blocks;
    float max;
    float inverse_temperature;
    float *block_max;      /* [blocks] */
    double *block_mass;    /* [blocks], sums of weights */
    uint64_t *heap;        /* [count] */
    struct candidate *top; /* [count], most likely first */
    float *penalised;      /* [count] */
    uint64_t *seen;        /* a bit for each id */
};

static void *carve(char **at, int64_t bytes)
{
    char *piece = *at;
    *at += round_up(bytes, 64);
    return piece;
}

/* Lays a row's memory out from `at` on; returns its end. */
static char *lay_out(struct row *row, int64_t count, char *at)
{
    row->count = count;
    row->blocks = (count + BLOCK - 1) / BLOCK;
    row->block_max = carve(&at, row->blocks * 4);
    row->block_mass = carve(&at, row->blocks * 8);
    row->heap = carve(&at, count * 8);
    row->top = carve(&at, count * (int64_t)sizeof *row->top);
    row->penalised = carve(&at, count * 4);
    row->seen = carve(&at, (count + 63) / 64 * 8);
    return at;
}

/* Logits past the end read as the lowest number: they never win and weigh nothing. */
INLINE vec load_logits(const float *p, int64_t left)
{
    float lane[LANES];
    if (left >= LANES)
        return vec_load(p);
    for (int i = 0; i < LANES; i++)
        lane[i] = i < left ? p[i] : -FLT_MAX;
    return vec_load(lane);
}

/* Finds the maxima. False where a logit is NaN or infinite. */
static bool scan(struct row *row)
{
    vec poison = vec_set(0.0f); /* 0 · x is NaN unless x is finite */
    row->max = -FLT_MAX;
    for (int64_t b = 0; b < row->blocks; b++) {
        int64_t end = min_i64((b + 1) * BLOCK, row->count);
        vec best = vec_set(-FLT_MAX);
        for (int64_t i = b * BLOCK; i < end; i += LANES) {
            vec x = load_logits(row->logits + i, end - i);
            best = vec_max(best, x);
            poison = vec_fma(x, vec_set(0.0f), poison);
        }
        row->block_max[b] = vec_reduce_max(best);
        row->max = row->block_max[b] > row->max ? row->block_max[b] : row->max;
    }
    return vec_reduce_add(poison) == 0.0f;
}

INLINE vec weigh(const struct row *row, vec x)
{
    return vec_exp(vec_mul(vec_sub(x, vec_set(row->max)), vec_set(row->inverse_temperature)));
}

static float weight_of(const struct row *row, float x)
{
    float lane[LANES];
    vec_store(lane, weigh(row, vec_set(x)));
    return lane[0];
}

/* Weighs all tokens, block by block; returns the sum. */
static double weigh_all(struct row *row)
{
    double total = 0;
    for (int64_t b = 0; b < row->blocks; b++) {
        int64_t end = min_i64((b + 1) * BLOCK, row->count);
        vec sum = vec_set(0.0f);
        for (int64_t i = b * BLOCK; i < end; i += LANES)
            sum = vec_add(sum, weigh(row, load_logits(row->logits + i, end - i)));
        total += row->block_mass[b] = vec_reduce_add(sum);
    }
    return total;
}

static void sift_down(uint64_t *heap, int64_t count, int64_t at)
{
    uint64_t key = heap[at];
    for (int64_t child; (child = 2 * at + 1) < count; at = child) {
        child += child + 1 < count && heap[child + 1] > heap[child];
        if (heap[child] <= key)
            break;
        heap[at] = heap[child];
    }
    heap[at] = key;
}

static void heapify(uint64_t *heap, int64_t count)
{
    for (int64_t i = count / 2; i-- > 0;)
        sift_down(heap, count, i);
}

/* Takes the largest of `count` keys out. */
static uint64_t pop(uint64_t *heap, int64_t count)
{
    uint64_t largest = heap[0];
    heap[0] = heap[count - 1];
    sift_down(heap, count - 1, 0);
    return largest;
}

/* At least n tokens have this logit or more: the n-th largest of the blocks' maxima. */
static float lower_bound(struct row *row, int64_t n)
{
    if (n > row->blocks)
        return -FLT_MAX;
    for (int64_t b = 0; b < row->blocks; b++)
        row->heap[b] = key_of(row->block_max[b], (int32_t)b);
    heapify(row->heap, row->blocks);
    uint64_t key = 0;
    for (int64_t i = 0; i < n; i++)
        key = pop(row->heap, row->blocks - i);
    return row->block_max[id_of(key)];
}

/* Puts the n most likely tokens into row->top, the first first. */
static void sort_top(struct row *row, int64_t n)
{
    float bound = lower_bound(row, n);
    int64_t count = 0;
    for (int64_t b = 0; b < row->blocks; b++) {
        if (row->block_max[b] < bound)
            continue;
        int64_t end = min_i64((b + 1) * BLOCK, row->count);
        for (int64_t i = b * BLOCK; i < end; i++)
            if (row->logits[i] >= bound)
                row->heap[count++] = key_of(row->logits[i], (int32_t)i);
    }
    heapify(row->heap, count);
    for (int64_t i = 0; i < n; i++) {
        int32_t id = id_of(pop(row->heap, count - i));
        row->top[i] = (struct candidate){id, weight_of(row, row->logits[id])};
    }
}

#endif
