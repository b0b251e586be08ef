/* What every native source includes: the ABI, the threads' side of a running plan, and small helpers. */
#ifndef NATIVE_H
#define NATIVE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "abi.h"

/* The threads that run a plan together. */
struct team {
    struct control *control;
    char *scratch;
    struct worker *workers;         /* [threads] */
    int32_t threads;
    bool stop;                      /* agreed upon at the last barrier */
    atomic_flag failed;             /* only the first failure is reported */
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_int epoch;  /* barriers passed */
    _Alignas(64) atomic_int next;   /* work handed out since the last barrier */
};

struct worker {
    struct team *team;
    int32_t index;
    int32_t domain;                  /* NUMA node it runs on */
    int32_t helped;                  /* shares it has looked at and found taken, first those of its domain, then the rest */
    _Alignas(64) atomic_llong taken; /* of its own share, by whomever */
};

/* Waits for all threads; false when the plan has been cancelled or has failed. */
bool team_wait(struct worker *me);

/* The next piece of work since the last barrier, INT32_MAX once the plan is being cancelled. */
int32_t take(struct worker *me);
/* The one that a thread would get now. */
static inline int32_t next_work(struct worker *me)
{
    return atomic_load_explicit(&me->team->next, memory_order_relaxed);
}

/* Between two looks at what another thread or process is to do: gives way to others after `patience` looks. */
void keep_waiting(int32_t looks, int32_t patience);

bool cancelled(const struct worker *me);
void fail(struct worker *me, int32_t status, int32_t detail);

/* This thread's contiguous share of `count` things. Weights are loaded by the same split that reads them. */
struct range { int64_t begin, end; };
static inline struct range share_of(int64_t count, int32_t index, int32_t parts)
{
    return (struct range){count * index / parts, count * (index + 1) / parts};
}
static inline struct range my_share(const struct worker *me, int64_t count)
{
    return share_of(count, me->index, me->team->threads);
}

/* Things that follow each other in memory: every thread takes what comes next of its own share, then of what others have
 * not come to, first those whose memory is near. All threads call share_out, wait for each other, and take until there is
 * nothing. */
void share_out(struct worker *me);
bool take_next(struct worker *me, int64_t count, int64_t most, struct range *taken);

/* Brings what is needed later into the L2 cache, or what is needed soon into the L1 cache. */
#ifdef __GNUC__
#define FETCH_FAR(p) __builtin_prefetch(p, 0, 2)
#define FETCH_SOON(p) __builtin_prefetch(p, 0, 3)
#else
#define FETCH_FAR(p) ((void)0)
#define FETCH_SOON(p) ((void)0)
#endif
enum { AHEAD = 4096 }; /* bytes that a straight walk through memory fetches before it reads them */
#define FETCH_AHEAD(p) FETCH_FAR((const char *)(p) + AHEAD)

static inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
static inline int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }

/* Packed matrices: panels of PANEL outputs. f32 and f16: [n/16][k][16]; bf16: [n/16][ceil(k/2)][16][2], so that a
 * 64-byte line is 16 outputs times two inputs, which is what the bf16 dot instruction wants. */
static inline int64_t panel_bytes(int32_t dtype, int64_t k)
{
    if (dtype == DTYPE_F32)
        return k * PANEL * 4;
    return (dtype == DTYPE_F16 ? k : round_up(k, 2)) * PANEL * 2;
}

static inline float bf16_to_f32(uint16_t x)
{
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* Rounds to nearest even; NaN stays NaN. */
static inline uint16_t f32_to_bf16(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, bits = (uint32_t)(h & 0x7fff) << 13;
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude *= 0x1p112f; /* rebias the exponent; exact for subnormals too */
    memcpy(&bits, &magnitude, 4);
    if ((h & 0x7c00) == 0x7c00)
        bits |= 0x7f800000;
    bits |= sign;
    memcpy(&magnitude, &bits, 4);
    return magnitude;
}

/* Rounds to nearest even; too large becomes infinity, NaN stays NaN. */
static inline uint16_t f32_to_f16(float f)
{
    uint32_t bits, sign;
    memcpy(&bits, &f, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (bits >= 0x477ff000) /* rounds to 65,536 or more */
        return (uint16_t)(sign | 0x7c00);
    if (bits < 0x38800000) { /* subnormal: adding 0.5 leaves the right bits at the end */
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        memcpy(&bits, &magnitude, 4);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    return (uint16_t)(sign | (bits + 0xc8000fff + (bits >> 13 & 1)) >> 13);
}

#endif
