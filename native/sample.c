/* The plan's last node: draws a token of each row of logits. A row is one thread's work from start to end, so its
 * token depends neither on the threads nor on the rows beside it. */
#include "drawing.h"
#include "ranking.h"

static int64_t row_bytes(int64_t count)
{
    struct row row;
    char *const start = (char *)64; /* any address: only the distance counts */
    return lay_out(&row, count, start) - start;
}

int64_t sample_scratch(const struct sample *op, int32_t threads, int32_t max_rows)
{
    (void)max_rows;
    return threads * row_bytes(op->vocab_size);
}

/* Penalises these tokens, each once. */
static void penalise(struct row *row, const int32_t *token, int64_t count, float repetition, float presence)
{
    memset(row->seen, 0, (size_t)((row->count + 63) / 64 * 8));
    for (int64_t i = 0; i < count; i++) {
        int32_t id = token[i];
        if (id < 0 || id >= row->count || row->seen[id / 64] >> id % 64 & 1)
            continue;
        row->seen[id / 64] |= (uint64_t)1 << id % 64;
        row->penalised[id] = penalised(row->penalised[id], repetition, presence);
    }
}

static void apply_penalties(struct row *row, const struct sampling *s, const int32_t *history)
{
    if (s->repetition_penalty == 1 && s->presence_penalty == 0)
        return;
    history += s->history_start;
    memcpy(row->penalised, row->logits, (size_t)row->count * 4);
    penalise(row, history, s->history_length, s->repetition_penalty, 0);
    penalise(row, history + s->prompt_length, s->history_length - s->prompt_length, 1, s->presence_penalty);
    row->logits = row->penalised;
    scan(row);
}

static int32_t argmax(const struct row *row)
{
    int64_t b = 0, i;
    while (row->block_max[b] != row->max)
        b++;
    for (i = b * BLOCK; row->logits[i] != row->max; i++)
        ;
    return (int32_t)i;
}

/* All tokens, in order of their ids: the first at which the sum of weights exceeds u of the whole. Should rounding
 * leave nothing to exceed it, the last that has a weight. */
static int32_t draw_from_all(struct row *row, double u)
{
    double left = u * weigh_all(row);
    int64_t block = 0, token = 0;
    for (int64_t b = 0; b < row->blocks; b++) {
        if (row->block_mass[b] == 0)
            continue;
        block = b;
        if (left < row->block_mass[b])
            break;
        left -= row->block_mass[b];
    }
    for (int64_t i = block * BLOCK; i < min_i64((block + 1) * BLOCK, row->count); i++) {
        float weight = weight_of(row, row->logits[i]);
        if (weight == 0)
            continue;
        token = i;
        if (left < weight)
            break;
        left -= weight;
    }
    return (int32_t)token;
}

/* How many of the n sorted tokens top_p and min_p leave; 0 when n are too few to tell. */
static int64_t cut(const struct row *row, int64_t n, double wanted, float min_p)
{
    double mass = 0;
    for (int64_t i = 0; i < n; i++) {
        if (i > 0 && row->top[i].weight < min_p)
            return i;
        mass += row->top[i].weight;
        if (mass >= wanted)
            return i + 1;
    }
    return 0;
}

static double mass_of(const struct row *row, int64_t n)
{
    double mass = 0;
    for (int64_t i = 0; i < n; i++)
        mass += row->top[i].weight;
    return mass;
}

/* Sorts as many tokens as top_k, top_p and min_p leave, and returns their number. */
static int64_t keep_likely(struct row *row, const struct sampling *s)
{
    if (s->top_k > 0 && s->top_k < row->count) {
        sort_top(row, s->top_k);
        double wanted = s->top_p < 1 ? s->top_p * mass_of(row, s->top_k) : DBL_MAX;
        int64_t kept = cut(row, s->top_k, wanted, s->min_p);
        return kept ? kept : s->top_k;
    }
    double wanted = s->top_p < 1 ? s->top_p * weigh_all(row) : DBL_MAX;
    for (int64_t n = min_i64(FIRST_TRY, row->count);; n = min_i64(n * GROWTH, row->count)) {
        sort_top(row, n);
        int64_t kept = cut(row, n, wanted, s->min_p);
        if (kept || n == row->count)
            return kept ? kept : n;
    }
}

/* The tokens kept, the most likely first: the first at which the sum of weights exceeds u of the whole. */
static int32_t draw_from_likely(struct row *row, const struct sampling *s, double u)
{
    int64_t kept = keep_likely(row, s), i = 0;
    double left = u * mass_of(row, kept);
    while (i + 1 < kept && left >= row->top[i].weight && row->top[i + 1].weight > 0)
        left -= row->top[i++].weight;
    return row->top[i].id;
}

static int32_t choose(struct row *row, const struct sampling *s, const int32_t *history)
{
    if (s->target >= 0)
        return s->target;
    apply_penalties(row, s, history);
    if (s->temperature == 0)
        return argmax(row);
    row->inverse_temperature = fminf(1.0f / s->temperature, FLT_MAX);
    double u = uniform(s->seed, (uint64_t)s->index);
    bool all = (s->top_k <= 0 || s->top_k >= row->count) && s->top_p >= 1 && s->min_p <= 0;
    return all ? draw_from_all(row, u) : draw_from_likely(row, s, u);
}

/* Writes the alternatives; returns what to subtract from a logit for its log probability. */
static double report(struct row *row, int32_t alternatives, int32_t *token, float *logprob)
{
    row->inverse_temperature = 1;
    double log_sum = row->max + log(weigh_all(row));
    int64_t n = min_i64(min_i64(alternatives, MAX_LOGPROBS), row->count);
    if (n > 0)
        sort_top(row, n);
    for (int64_t i = 0; i < n; i++) {
        token[i] = row->top[i].id;
        logprob[i] = (float)(row->logits[token[i]] - log_sum);
    }
    return log_sum;
}

static void sample_row(const struct sample *op, struct worker *me, int64_t r)
{
    const struct sampling *s = op->sampling + r;
    const float *logits = op->logits + r * op->logits_stride;
    int32_t *top_token = op->top_token + r * MAX_LOGPROBS;
    float *top_logprob = op->top_logprob + r * MAX_LOGPROBS;
    struct row row = {.logits = logits};
    lay_out(&row, op->vocab_size, me->team->scratch + me->index * row_bytes(op->vocab_size));
    if (!scan(&row)) {
        fail(me, STATUS_NOT_FINITE, (int32_t)r);
        return;
    }
    for (int i = 0; i < MAX_LOGPROBS; i++) {
        top_token[i] = -1;
        top_logprob[i] = -INFINITY;
    }
    double log_sum = s->logprobs >= 0 ? report(&row, s->logprobs, top_token, top_logprob) : 0;
    int32_t token = choose(&row, s, op->history);
    op->token[r] = token;
    op->logprob[r] = s->logprobs < 0 ? 0 : token < op->vocab_size ? (float)(logits[token] - log_sum) : -INFINITY;
}

void sample(const struct sample *op, struct worker *me)
{
    for (int32_t r = take(me); r < *op->rows; r = take(me))
        sample_row(op, me, r);
}
