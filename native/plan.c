/* Replays a plan: one parallel region, a barrier after each node. */
#include <stdlib.h>
#include <time.h>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#define give_way() sched_yield()
#else
#define give_way() ((void)0)
#endif

#include "amx.h"

/* A wait is normally tens of nanoseconds. After this many looks the other thread has no core: give it this one. */
enum { PATIENCE = 2000 };

static inline void relax(void)
{
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
    __asm__ volatile("yield");
#endif
}

void keep_waiting(int32_t looks, int32_t patience)
{
    relax();
    if (looks > patience)
        give_way();
}

static inline int32_t look(const int32_t *shared)
{
    return *(const volatile int32_t *)shared;
}

bool team_wait(struct worker *me)
{
    struct team *team = me->team;
    int epoch = atomic_load_explicit(&team->epoch, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) + 1 == team->threads) {
        /* Last to arrive: only one thread decides whether to go on, so all decide alike. */
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&team->next, 0, memory_order_relaxed);
        team->stop = look(&team->control->cancel) || look(&team->control->status);
        atomic_store_explicit(&team->epoch, epoch + 1, memory_order_release);
    } else {
        for (int32_t looks = 0; atomic_load_explicit(&team->epoch, memory_order_acquire) == epoch; looks += looks <= PATIENCE)
            keep_waiting(looks, PATIENCE);
    }
    return !team->stop;
}

bool cancelled(const struct worker *me)
{
    return look(&me->team->control->cancel);
}

int32_t take(struct worker *me)
{
    if (cancelled(me))
        return INT32_MAX;
    return atomic_fetch_add_explicit(&me->team->next, 1, memory_order_relaxed);
}

void share_out(struct worker *me)
{
    me->helped = 0;
    atomic_store_explicit(&me->taken, 0, memory_order_relaxed);
}

bool take_next(struct worker *me, int64_t count, int64_t most, struct range *taken)
{
    struct team *team = me->team;
    for (; me->helped < 2 * team->threads && !cancelled(me); me->helped++) {
        int32_t other = (me->index + me->helped) % team->threads;
        bool near = team->workers[other].domain == me->domain;
        if (near != (me->helped < team->threads))
            continue;
        struct range share = share_of(count, other, team->threads);
        int64_t begin = share.begin + atomic_fetch_add_explicit(&team->workers[other].taken, most, memory_order_relaxed);
        if (begin < share.end) {
            *taken = (struct range){begin, min_i64(begin + most, share.end)};
            return true;
        }
    }
    return false;
}

void fail(struct worker *me, int32_t status, int32_t detail)
{
    if (atomic_flag_test_and_set(&me->team->failed))
        return;
    me->team->control->detail = detail;
    me->team->control->status = status;
}

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* This thread's part of the nodes. times: NULL, or its own [count]. */
static void run_nodes(const struct node *nodes, int32_t count, struct worker *me, struct node_times *times)
{
    int64_t begin = times ? now() : 0;
    bool go_on = true;
    for (int32_t i = 0; i < count && go_on; i++) {
        bool with_next = nodes[i].run_with_next && i + 1 < count && !times; /* else each node has a time of its own */
        if (with_next)
            nodes[i].run_with_next(nodes[i].op, nodes[i + 1].op, me);
        else
            nodes[i].run(nodes[i].op, me);
        int64_t end = times ? now() : 0;
        go_on = team_wait(me);
        if (times) {
            times[i] = (struct node_times){begin, end, now()};
            begin = times[i].passed;
        }
        i += with_next;
    }
}

/* The NUMA node on which thread `index` runs. */
static int32_t domain_of(int32_t index, int32_t threads, int32_t pretended)
{
    unsigned node = 0;
    if (pretended)
        return (int32_t)((int64_t)index * pretended / threads);
#ifdef SYS_getcpu
    syscall(SYS_getcpu, NULL, &node, NULL);
#endif
    return (int32_t)node;
}

void release_threads(void)
{
#if defined(_OPENMP) && (_OPENMP >= 201811 || (defined(__GNUC__) && __GNUC__ >= 9 && !defined(__clang__)))
    omp_pause_resource_all(omp_pause_soft);
#endif
}

enum { WORTH_A_THREAD = 4 << 20 }; /* bytes: some 200 µs, a quarter of which it takes to start a thread */

/* How many threads there is work for, up to `threads`. With fewer than there are cores, a short step also waits for no core
 * that another program has. */
static int32_t threads_for(const struct node *nodes, int32_t count, int32_t threads)
{
    int64_t work = 0;
    bool is_known = false;
    for (int32_t i = 0; i < count && work < (int64_t)threads * WORTH_A_THREAD; i++)
        if (nodes[i].work) {
            is_known = true;
            work += nodes[i].work(nodes[i].op);
        }
    return is_known ? (int32_t)max_i64(1, min_i64(threads, work / WORTH_A_THREAD)) : threads;
}

int32_t plan_run(const struct node *nodes, int32_t count, int32_t threads, int32_t domains, struct control *control,
                 void *scratch, struct node_times *times)
{
    struct worker workers[threads];
    struct team team = {.control = control, .scratch = scratch, .workers = workers, .threads = 1, .failed = ATOMIC_FLAG_INIT};
    control->status = STATUS_OK;
    threads = threads_for(nodes, count, threads);
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
    {
        int32_t index = 0;
#ifdef _OPENMP
        index = omp_get_thread_num();
#pragma omp single
        team.threads = omp_get_num_threads(); /* fewer than asked for, inside somebody's parallel region */
#endif
        struct worker *me = &workers[index];
        *me = (struct worker){.team = &team, .index = index, .domain = domain_of(index, team.threads, domains)};
        amx_begin();
        run_nodes(nodes, count, me, times ? times + (int64_t)index * count : NULL);
        amx_end();
    }
    (void)threads;
    if (control->status == STATUS_OK && look(&control->cancel))
        control->status = STATUS_CANCELLED;
    return control->status;
}
