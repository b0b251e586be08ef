/* Collectives of the ranks of one machine, through memory that they share: what is short is over before a message would
 * have been sent. Each rank writes what the others need, says so, and waits until all have; then it reads. Two halves of
 * the memory are used in turns: who writes into one knows that all have come to the meeting since it was read. */
#include "simd.h"

enum { LINE = 16 }; /* floats of a cache line */

static float *half_of(const struct meeting *m, int64_t epoch) { return m->halves + (epoch & 1) * m->half; }

/* Waits for all ranks to come to a meeting; false as team_wait. What this rank's threads have written is seen by those who
 * come back. */
static bool meet(struct meeting *m, int64_t epoch, struct worker *me)
{
    if (!team_wait(me))
        return false;
    if (me->index == 0) {
        m->waits++; /* odd: whoever watches over this rank sees that it waits */
        m->epoch = epoch;
        atomic_store_explicit((_Atomic int64_t *)(m->arrived + 8 * m->rank), epoch, memory_order_release);
    }
    for (int32_t rank = 0; rank < m->ranks; rank++)
        for (int32_t looks = 0;
             atomic_load_explicit((_Atomic int64_t *)(m->arrived + 8 * rank), memory_order_acquire) < epoch;
             looks += looks <= m->patience)
            keep_waiting(looks, m->patience);
    if (me->index == 0)
        m->waits++;
    return true;
}

/* Neighbours first, then neighbours of those: as messages are summed up by recursive doubling. Of what goes beyond a power
 * of two, neighbours come before. */
INLINE vec sum_pairwise(vec *parts, int32_t count)
{
    int32_t power = 1;
    while (2 * power <= count)
        power *= 2;
    for (int32_t i = 0; i < count - power; i++)
        parts[i] = vec_add(parts[2 * i], parts[2 * i + 1]);
    for (int32_t i = count - power; i < power; i++)
        parts[i] = parts[i + count - power];
    for (; power > 1; power /= 2)
        for (int32_t i = 0; i < power / 2; i++)
            parts[i] = vec_add(parts[2 * i], parts[2 * i + 1]);
    return parts[0];
}

void all_reduce(const struct all_reduce *op, struct worker *me)
{
    struct meeting *m = op->meeting;
    int64_t epoch = m->epoch + 1, size = *op->rows * (int64_t)op->x_width;
    struct range lines = my_share(me, (size + LINE - 1) / LINE);
    int64_t begin = lines.begin * LINE, end = min_i64(lines.end * LINE, size);
    float *half = half_of(m, epoch);
    if (begin < end)
        memcpy(half + m->rank * size + begin, op->x + begin, (size_t)(end - begin) * sizeof *half);
    if (!meet(m, epoch, me))
        return;
    for (int64_t i = begin; i < end; i += LANES) {
        vec parts[MOST_MEETING];
        for (int32_t rank = 0; rank < m->ranks; rank++)
            parts[rank] = vec_load_upto(half + rank * size + i, end - i);
        vec_store_upto(op->x + i, sum_pairwise(parts, m->ranks), end - i);
    }
}

void gather(const struct gather *op, struct worker *me)
{
    struct meeting *m = op->meeting;
    struct range own = share_of(op->x_width, m->rank, m->ranks);
    int64_t first_epoch = m->epoch + 1;
    for (int64_t row = 0; row < *op->rows; row++) {
        float *x = op->x + row * op->x_stride, *half = half_of(m, first_epoch + row);
        if (m->rank > 0) {
            struct range mine = my_share(me, own.end - own.begin);
            memcpy(half + own.begin + mine.begin, x + own.begin + mine.begin,
                   (size_t)(mine.end - mine.begin) * sizeof *x);
        }
        if (!meet(m, first_epoch + row, me))
            return;
        if (m->rank == 0) {
            struct range theirs = my_share(me, op->x_width - own.end);
            memcpy(x + own.end + theirs.begin, half + own.end + theirs.begin,
                   (size_t)(theirs.end - theirs.begin) * sizeof *x);
        }
    }
}
