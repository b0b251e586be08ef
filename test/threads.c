/* Teams of threads, and ranks that share a memory, as plan_run has them, but of POSIX threads, which the thread sanitizer
 * knows: barriers, shares that others help with, sums and gathers. For test_threads.py. */
#include <pthread.h>
#include <stdio.h>

#include "native.h"

enum { RANKS = 3, THREADS = 2, ROWS = 4, WIDTH = 64, THINGS = 50, ROUNDS = 300, HALF = RANKS * ROWS * WIDTH };

static int64_t arrived[RANKS * 8];
static float halves[2 * HALF];

struct rank {
    struct team team;
    struct worker workers[THREADS];
    struct control control;
    struct meeting meeting;
    int32_t rows;
    float x[ROWS * WIDTH];
    int taken[THINGS];
};
static struct rank ranks[RANKS];
static atomic_int wrong;

static void add_up(struct rank *rank, struct worker *me)
{
    struct all_reduce op = {&rank->rows, rank->x, &rank->meeting, WIDTH};
    struct range mine = my_share(me, ROWS * WIDTH);
    for (int64_t i = mine.begin; i < mine.end; i++)
        rank->x[i] = (float)(rank - ranks + 1);
    team_wait(me);
    all_reduce(&op, me);
    team_wait(me);
    for (int64_t i = mine.begin; i < mine.end; i++)
        if (rank->x[i] != RANKS * (RANKS + 1) / 2)
            atomic_store(&wrong, 1);
    team_wait(me);
}

static void *run(void *worker)
{
    struct worker *me = worker;
    struct rank *rank = (struct rank *)me->team;
    for (int round = 0; round < ROUNDS; round++) {
        add_up(rank, me);
        struct gather op = {&rank->rows, rank->x, &rank->meeting, WIDTH, WIDTH};
        gather(&op, me);
        team_wait(me);
        share_out(me);
        team_wait(me);
        for (struct range some; take_next(me, THINGS, 3, &some);)
            for (int64_t i = some.begin; i < some.end; i++)
                rank->taken[i]++;
        team_wait(me);
    }
    return NULL;
}

int main(void)
{
    pthread_t threads[RANKS * THREADS];
    for (int r = 0; r < RANKS; r++) {
        struct rank *rank = &ranks[r];
        rank->rows = ROWS;
        rank->meeting = (struct meeting){.rank = r, .ranks = RANKS, .patience = 20, .arrived = arrived, .halves = halves,
                                         .half = HALF};
        rank->team.control = &rank->control;
        rank->team.workers = rank->workers;
        rank->team.threads = THREADS;
        for (int t = 0; t < THREADS; t++) {
            rank->workers[t].team = &rank->team;
            rank->workers[t].index = t;
        }
    }
    for (int i = 0; i < RANKS * THREADS; i++)
        pthread_create(&threads[i], NULL, run, &ranks[i / THREADS].workers[i % THREADS]);
    for (int i = 0; i < RANKS * THREADS; i++)
        pthread_join(threads[i], NULL);
    for (int r = 0; r < RANKS; r++)
        for (int i = 0; i < THINGS; i++)
            if (ranks[r].taken[i] != ROUNDS)
                atomic_store(&wrong, 1);
    if (atomic_load(&wrong))
        puts("wrong sums, or something was not taken once");
    return atomic_load(&wrong);
}
