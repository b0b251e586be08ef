/* Draws a token of each row of logits, a block for each row, as native/sample.c does. Masses of tokens add up in
 * float64, in a fixed order. */
#include "common.cuh"
#include "drawing.h"

/* A row and its scratch memory. A weight is e^((logit - max) / temperature). */
struct row {
    const float *logits;
    int count, groups; /* ids that exist; groups of them */
    float max, inverse_temperature;
    double *mass;       /* [groups] sums of weights */
    uint64_t *key;      /* [count, rounded up to a power of two]: candidates to be sorted */
    float *penalised;   /* [count] */
    uint32_t *seen;     /* a bit for each id */
};

/* One number for all threads of a block. */
template <class T> DEVICE T from_first(T x)
{
    __shared__ T shared;
    __syncthreads();
    if (threadIdx.x == 0)
        shared = x;
    __syncthreads();
    return shared;
}

DEVICE float weight_of(const struct row &row, int id)
{
    return expf((row.logits[id] - row.max) * row.inverse_temperature);
}

/* Finds the maximum; false where a logit is NaN or infinite. */
DEVICE bool scan(struct row &row)
{
    float max = -FLT_MAX, poison = 0.0f;
    for (int i = threadIdx.x; i < row.count; i += blockDim.x) {
        max = fmaxf(max, row.logits[i]);
        poison += row.logits[i] * 0.0f; /* NaN unless finite */
    }
    row.max = block_max(max);
    return block_sum(poison) == 0.0f;
}

/* The lowest id of the greatest logit. */
DEVICE int argmax(const struct row &row)
{
    __shared__ int best;
    __syncthreads();
    if (threadIdx.x == 0)
        best = row.count;
    __syncthreads();
    for (int i = threadIdx.x; i < row.count; i += blockDim.x)
        if (row.logits[i] == row.max) {
            atomicMin(&best, i);
            break;
        }
    __syncthreads();
    return best;
}

/* Penalises these tokens, each once. */
DEVICE void penalise(struct row &row, const int32_t *token, int count, float repetition, float presence)
{
    for (int i = threadIdx.x; i < (row.count + 31) / 32; i += blockDim.x)
        row.seen[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        int id = token[i];
        if (id < 0 || id >= row.count || atomicOr(&row.seen[id / 32], 1u << id % 32) >> id % 32 & 1)
            continue;
        row.penalised[id] = penalised(row.penalised[id], repetition, presence);
    }
    __syncthreads();
}

DEVICE void apply_penalties(struct row &row, const struct sampling &s, const int32_t *history)
{
    if (s.repetition_penalty == 1.0f && s.presence_penalty == 0.0f)
        return;
    for (int i = threadIdx.x; i < row.count; i += blockDim.x)
        row.penalised[i] = row.logits[i];
    history += s.history_start;
    penalise(row, history, s.history_length, s.repetition_penalty, 0.0f);
    penalise(row, history + s.prompt_length, s.history_length - s.prompt_length, 1.0f, s.presence_penalty);
    row.logits = row.penalised;
    scan(row);
}

/* Weighs all tokens, a warp for each group; returns the sum. */
DEVICE double weigh_all(const struct row &row)
{
    int warps = blockDim.x / WARP, lane = threadIdx.x % WARP;
    for (int group = threadIdx.x / WARP; group < row.groups; group += warps) {
        float sum = 0.0f;
        for (int i = group * GROUP + lane; i < min_of((group + 1) * GROUP, row.count); i += WARP)
            sum += weight_of(row, i);
        sum = warp_sum(sum);
        if (lane == 0)
            row.mass[group] = sum;
    }
    __syncthreads();
    double total = 0.0;
    if (threadIdx.x == 0)
        for (int group = 0; group < row.groups; group++)
            total += row.mass[group];
    return from_first(total);
}

/* All tokens, in order of their ids: the first at which the sum of weights exceeds u of the whole. Should rounding leave
 * nothing to exceed it, the last that has a weight. One thread looks. */
DEVICE int find_among_all(const struct row &row, double left)
{
    int group = 0, token = 0;
    for (int g = 0; g < row.groups; g++) {
        if (row.mass[g] == 0.0)
            continue;
        group = g;
        if (left < row.mass[g])
            break;
        left -= row.mass[g];
    }
    for (int i = group * GROUP; i < min_of((group + 1) * GROUP, row.count); i++) {
        float weight = weight_of(row, i);
        if (weight == 0.0f)
            continue;
        token = i;
        if (left < weight)
            break;
        left -= weight;
    }
    return token;
}

/* The n-th greatest of all keys, found eight bits at a time. Keys differ, so exactly n are no smaller. */
DEVICE uint64_t nth_key(const struct row &row, int n)
{
    __shared__ int of_digit[256];
    uint64_t prefix = 0, mask = 0;
    for (int shift = 56; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < 256; i += blockDim.x)
            of_digit[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < row.count; i += blockDim.x) {
            uint64_t key = key_of(row.logits[i], i);
            if ((key & mask) == prefix)
                atomicAdd(&of_digit[key >> shift & 255], 1);
        }
        __syncthreads();
        int digit = 255;
        for (; digit > 0 && of_digit[digit] < n; digit--)
            n -= of_digit[digit];
        prefix |= (uint64_t)digit << shift;
        mask |= (uint64_t)255 << shift;
        __syncthreads();
    }
    return prefix;
}

/* Sorts row.key[0 .. size), a power of two, the greatest first (Batcher, 1968). */
DEVICE void sort_keys(const struct row &row, int size)
{
    for (int run = 2; run <= size; run *= 2)
        for (int step = run / 2; step > 0; step /= 2) {
            for (int i = threadIdx.x; i < size; i += blockDim.x) {
                int other = i ^ step;
                uint64_t a = row.key[i], b = row.key[other];
                if (other > i && (i & run ? a > b : a < b))
                    row.key[i] = b, row.key[other] = a;
            }
            __syncthreads();
        }
}

/* Puts the keys of the n most likely tokens into row.key, the first first. */
DEVICE void sort_top(const struct row &row, int n)
{
    __shared__ int found;
    int size = 1;
    while (size < n)
        size *= 2;
    uint64_t least = nth_key(row, n);
    if (threadIdx.x == 0)
        found = 0;
    for (int i = threadIdx.x; i < size; i += blockDim.x)
        row.key[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < row.count; i += blockDim.x) {
        uint64_t key = key_of(row.logits[i], i);
        if (key >= least)
            row.key[atomicAdd(&found, 1)] = key;
    }
    __syncthreads();
    sort_keys(row, size);
}

/* How many of the n sorted tokens top_p and min_p leave; 0 when n are too few to tell. */
DEVICE int cut(const struct row &row, int n, double wanted, float min_p)
{
    double mass = 0.0;
    for (int i = 0; i < n; i++) {
        float weight = weight_of(row, id_of(row.key[i]));
        if (i > 0 && weight < min_p)
            return i;
        mass += weight;
        if (mass >= wanted)
            return i + 1;
    }
    return 0;
}
DEVICE double mass_of(const struct row &row, int n)
{
    double mass = 0.0;
    for (int i = 0; i < n; i++)
        mass += weight_of(row, id_of(row.key[i]));
    return mass;
}

/* Sorts as many tokens as top_k, top_p and min_p leave, and returns their number. */
DEVICE int keep_likely(const struct row &row, const struct sampling &s)
{
    if (s.top_k > 0 && s.top_k < row.count) {
        sort_top(row, s.top_k);
        int kept = 0;
        if (threadIdx.x == 0)
            kept = cut(row, s.top_k, s.top_p < 1.0f ? s.top_p * mass_of(row, s.top_k) : DBL_MAX, s.min_p);
        kept = from_first(kept);
        return kept ? kept : s.top_k;
    }
    double wanted = s.top_p < 1.0f ? s.top_p * weigh_all(row) : DBL_MAX;
    for (int n = min_of(FIRST_TRY, row.count);; n = min_of(n * GROWTH, row.count)) {
        sort_top(row, n);
        int kept = from_first(threadIdx.x == 0 ? cut(row, n, wanted, s.min_p) : 0);
        if (kept || n == row.count)
            return kept ? kept : n;
    }
}

/* The tokens kept, the most likely first: the first at which the sum of weights exceeds u of the whole. */
DEVICE int find_among_likely(const struct row &row, int kept, double u)
{
    int i = 0;
    double left = u * mass_of(row, kept);
    while (i + 1 < kept) {
        float weight = weight_of(row, id_of(row.key[i]));
        if (left < weight || weight_of(row, id_of(row.key[i + 1])) == 0.0f)
            break;
        left -= weight;
        i++;
    }
    return id_of(row.key[i]);
}

DEVICE int choose(struct row &row, const struct sampling &s, const int32_t *history)
{
    if (s.target >= 0)
        return s.target;
    apply_penalties(row, s, history);
    if (s.temperature == 0.0f)
        return argmax(row);
    row.inverse_temperature = fminf(1.0f / s.temperature, FLT_MAX);
    double u = uniform(s.seed, (uint64_t)s.index);
    if ((s.top_k <= 0 || s.top_k >= row.count) && s.top_p >= 1.0f && s.min_p <= 0.0f) {
        double mass = weigh_all(row);
        return from_first(threadIdx.x == 0 ? find_among_all(row, u * mass) : 0);
    }
    int kept = keep_likely(row, s);
    return from_first(threadIdx.x == 0 ? find_among_likely(row, kept, u) : 0);
}

/* Writes the alternatives; with less than none, nothing is reported. Returns what to subtract from a logit for its log probability. */
DEVICE double report(struct row &row, int alternatives, int32_t *token, float *logprob)
{
    row.inverse_temperature = 1.0f;
    double log_sum = alternatives < 0 ? 0.0 : row.max + log(weigh_all(row));
    int n = min_of(min_of(alternatives, MAX_LOGPROBS), row.count);
    if (n > 0)
        sort_top(row, n);
    for (int i = threadIdx.x; i < MAX_LOGPROBS; i += blockDim.x) {
        token[i] = i < n ? id_of(row.key[i]) : -1;
        logprob[i] = i < n ? (float)(row.logits[token[i]] - log_sum) : -INFINITY;
    }
    __syncthreads();
    return log_sum;
}

DEVICE struct row row_of(const struct sample &op, const struct team &team, int64_t r)
{
    int count = op.vocab_size, groups = (count + GROUP - 1) / GROUP;
    int64_t keys = 1;
    while (keys < count)
        keys *= 2;
    char *at = team.scratch + r * team.share;
    uint64_t *key = (uint64_t *)at;
    double *mass = (double *)(key + keys);
    float *penalised = (float *)(mass + groups);
    return {op.logits + r * op.logits_stride, count, groups, 0.0f, 1.0f, mass, key, penalised,
            (uint32_t *)(penalised + count)};
}

KERNEL(sample, sample, MAX_THREADS)
{
    int64_t r = blockIdx.x;
    if (r >= *op.rows)
        return;
    const struct sampling s = op.sampling[r];
    struct row row = row_of(op, team, r);
    const float *logits = row.logits;
    if (!scan(row)) {
        if (threadIdx.x == 0)
            fail(team, STATUS_NOT_FINITE, (int32_t)r);
        return;
    }
    double log_sum = report(row, s.logprobs, op.top_token + r * MAX_LOGPROBS, op.top_logprob + r * MAX_LOGPROBS);
    int token = choose(row, s, op.history);
    if (threadIdx.x == 0) {
        op.token[r] = token;
        op.logprob[r] = s.logprobs < 0 ? 0.0f : token < op.vocab_size ? (float)(logits[token] - log_sum) : -INFINITY;
    }
}
