/* The softmax between the two products of attention, mended from block to block: the scores of a query become weights
 * under the highest score so far, and what was summed up under a lower one is shrunk (Milakov and Gimelshein, 2018). */
#include "attention_tile.h"

/* Puts minus infinity into the scores of a part where a row that sees `seen` and the sinks does not look. */
static void hide(const struct part *part, struct span seen, int64_t sink, float *scores)
{
    int64_t begin = part->page * PAGE + part->from, end = part->page * PAGE + part->to;
    for (int64_t pos = max_i64(begin, sink); pos < min_i64(end, seen.first); pos++)
        scores[pos - begin] = -INFINITY;
    for (int64_t pos = max_i64(begin, seen.last + 1); pos < end; pos++)
        scores[pos - begin] = -INFINITY;
}

/* Each vector of a page has a chain of its own in a reduction: one chain would wait for itself. */
enum { CHAINS = PAGE / LANES };

/* A statement for each vector of a part, with its number in the page as a constant. */
#define EACH_VECTOR(part, statement)                                                                   \
    do {                                                                                               \
        if ((part)->to - (part)->from == PAGE) {                                                       \
            _Pragma("GCC unroll 16") for (int chain = 0; chain < CHAINS; chain++) { statement }         \
        } else {                                                                                       \
            _Pragma("GCC unroll 16") for (int chain = 0; chain < CHAINS; chain++)                       \
                if (chain * LANES >= (part)->from && chain * LANES < (part)->to) { statement }          \
        }                                                                                              \
    } while (0)

INLINE float highest_score(const struct attention_tile *t, int64_t row, int64_t parts, float *scores, const int32_t dtype)
{
    struct span seen = visible(t->op, row);
    vec highest[CHAINS];
    for (int j = 0; j < CHAINS; j++)
        highest[j] = vec_set(-INFINITY);
    for (const struct part *part = t->part; part < t->part + parts; part++) {
        int64_t begin = part->page * PAGE + part->from, end = part->page * PAGE + part->to;
        if (dtype == DTYPE_I8)
            for (int64_t i = 0; i < end - begin; i += LANES)
                vec_store(scores + i, vec_mul(vec_load(scores + i), vec_load(part->scales + part->from + i)));
        if (begin < seen.first || end - 1 > seen.last)
            hide(part, seen, t->op->sink, scores);
        EACH_VECTOR(part, highest[chain] = vec_max(highest[chain], vec_load(scores)); scores += LANES;);
    }
    for (int j = 1; j < CHAINS; j++)
        highest[0] = vec_max(highest[0], highest[j]);
    return vec_reduce_max(highest[0]);
}

/* Stores the weights of positions i .. i + LANES where the micro-kernel will read them as A. */
INLINE void store_weights(float *weights, int64_t i, vec w, int32_t dtype)
{
#ifdef BF16_DOT
    if (dtype == DTYPE_BF16) {
        vec_store_bf16((uint16_t *)weights + i, w);
        return;
    }
#endif
    (void)dtype;
    vec_store(weights + i, w);
}

/* Weights that have been multiplied by the values' scales become words, in place, those that meet values. units: [parts]. */
static void round_weights(const struct attention_tile *t, int64_t parts, float *weights, float *units)
{
    int64_t begin = 0;
    for (const struct part *part = t->part; part < t->part + parts; part++) {
        int64_t at = begin + part->first - part->from;
        *units++ = round_words(weights + at, part->until - part->first, weights + at / 2);
        begin += part->to - part->from;
    }
}

/* Scores become weights 2^((score - max) · scale), in place. Returns their sum. */
INLINE float weigh(const struct attention_tile *t, int64_t parts, float max, float *scores, const int32_t dtype)
{
    vec top = vec_set(max), scale = vec_set(exponent_scale(t->op)), sum[CHAINS];
    int64_t at = 0;
    for (int j = 0; j < CHAINS; j++)
        sum[j] = vec_set(0.0f);
    for (const struct part *part = t->part; part < t->part + parts; part++)
        EACH_VECTOR(part, vec w = vec_exp2(vec_mul(vec_sub(vec_load(scores + at), top), scale));
                    sum[chain] = vec_add(sum[chain], w);
                    if (dtype == DTYPE_I8)
                        w = vec_mul(w, vec_load(part->scales + PAGE + chain * LANES));
                    store_weights(scores, at, w, dtype); at += LANES;);
    for (int j = 1; j < CHAINS; j++)
        sum[0] = vec_add(sum[0], sum[j]);
    return vec_reduce_add(sum[0]);
}

/* A maximum passes over NaN. Where nothing else is left, this tells NaN from nothing. */
static bool has_nan(const float *scores, int64_t count)
{
    bool found = false;
    for (int64_t i = 0; i < count; i++)
        found |= scores[i] != scores[i];
    return found;
}

/* Brings what a query has summed up so far to a new highest score. */
static void raise_max(struct attention_tile *t, int64_t query, float highest)
{
    float old = t->max[query], *out = t->out + query * t->width;
    t->max[query] = highest;
    if (old == -INFINITY)
        return;
    float shrink = exp2_of((old - highest) * exponent_scale(t->op));
    t->sum[query] *= shrink;
    for (int64_t d = 0; d < t->width; d += LANES)
        vec_store(out + d, vec_mul(vec_load(out + d), vec_set(shrink)));
}

/* One step for all queries, then the next: the vectors of a query's step wait for each other, those of different queries
 * do not. */
INLINE void soften(struct attention_tile *t, int64_t first, int64_t count, int64_t parts, int64_t columns, const int32_t dtype)
{
    for (int64_t r = 0; r < count; r++)
        t->highest[r] = highest_score(t, row_of(t, first + r), parts, t->scores + r * t->score_row, dtype);
    for (int64_t r = 0; r < count; r++) {
        if (t->highest[r] == -INFINITY && has_nan(t->scores + r * t->score_row, columns))
            t->highest[r] = NAN;
        if (!(t->highest[r] <= t->max[first + r]))
            raise_max(t, first + r, t->highest[r]);
    }
    for (int64_t r = 0; r < count; r++) {
        float *scores = t->scores + r * t->score_row;
        if (t->highest[r] == -INFINITY) /* it sees nothing of this block */
            memset(scores, 0, (size_t)columns * sizeof *scores);
        else
            t->sum[first + r] += weigh(t, parts, t->max[first + r], scores, dtype);
        if (dtype == DTYPE_I8)
            round_weights(t, parts, scores, t->weight_units + r * t->unit_row);
    }
}

/* A function for each dtype, of which f16 is softened as f32 is. */
#define SOFTEN(name, dtype)                                                                                          \
    static void name(struct attention_tile *t, int64_t first, int64_t count, int64_t parts, int64_t columns)         \
    {                                                                                                                \
        soften(t, first, count, parts, columns, dtype);                                                              \
    }
SOFTEN(soften_f32, DTYPE_F32)
SOFTEN(soften_bf16, DTYPE_BF16)
SOFTEN(soften_i8, DTYPE_I8)

void tile_soften(struct attention_tile *t, int64_t first, int64_t count, int64_t parts, int64_t columns)
{
    switch (t->op->kv_dtype) {
    case DTYPE_BF16: soften_bf16(t, first, count, parts, columns); break;
    case DTYPE_I8: soften_i8(t, first, count, parts, columns); break;
    default: soften_f32(t, first, count, parts, columns);
    }
}
