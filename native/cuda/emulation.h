/* A GPU for tests, on a CPU: kernels are compiled by the host's C++ compiler and run block after block, the threads of a
 * block as fibres that take turns wherever they wait for each other. The names are those of hardware.cuh and of CUDA.
 *
 * It is stricter than hardware where that finds mistakes: background copies arrive as late as they may, a warp
 * operation needs every lane, and threads that wait for ever are reported. */
#ifndef EMULATION_H
#define EMULATION_H

#include <string.h>

#define __device__
#define __shared__ static thread_local /* blocks that run together are threads of the host */
#define DEVICE static inline
#define DYNAMIC_SHARED(name) char *const name = emulation::dynamic_shared
#define ENTRY(name, type, ...)                                                                         \
    static void name##_of_thread(const struct type &op, const struct team &team);                      \
    extern "C" void name##_kernel(const void *arguments)                                               \
    {                                                                                                  \
        struct both { struct type op; struct team team; } const *a = (const struct both *)arguments;   \
        name##_of_thread(a->op, a->team);                                                              \
    }                                                                                                  \
    static void name##_of_thread([[maybe_unused]] const struct type &op, [[maybe_unused]] const struct team &team)

struct dim3 { unsigned x, y, z; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };

namespace emulation {
struct thread;
extern thread *self;
extern dim3 thread_index, block_index, block_size, grid_size;
extern char *dynamic_shared;

void wait_for_block();
void wait_for_threads(int count);
void wait_for_change(const unsigned *word, unsigned before, unsigned bit);
void wait_for_warp();
/* Gives each lane's `size` bytes to all lanes of its warp: the address of lane 0's, SLOT bytes before lane 1's. */
enum { SLOT = 32 };
const char *exchange(const void *mine, size_t size);
int lane();
int thread_number(); /* in its block */
void yield();        /* a turn for the others; reported where nobody gets anywhere any more */
void progress();     /* somebody did */
void stop(const char *why);
void begin_block_on_hopper(int count);
const char *end_block_on_hopper(); /* what is amiss, or NULL */
void add_copy(void *to, const void *from, int bytes);
void end_copies();
void finish_copies(int but);
float dot_of_pairs(const char *slots, int row, int column, float (*widen)(uint16_t));
}

/* Fibres move only at waits, so the indices of the running thread can be plain variables. */
#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_size
#define gridDim emulation::grid_size

static inline void __syncthreads() { emulation::wait_for_block(); }
static inline void __syncwarp() { emulation::wait_for_warp(); }
static inline void __threadfence() {}
static inline void wait_for_threads(unsigned count) { emulation::wait_for_threads((int)count); }
static inline void wait_for_change(const unsigned *word, unsigned before, unsigned bit)
{
    emulation::wait_for_change(word, before, bit);
}
static inline void fetch_into_l2(const char *at) { (void)*(const volatile char *)at; /* there must be something */ }

template <class T> static inline T __shfl_sync(unsigned, T x, int from)
{
    const char *slots = emulation::exchange(&x, sizeof x);
    memcpy(&x, slots + from % 32 * emulation::SLOT, sizeof x);
    return x;
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T x, int with)
{
    return __shfl_sync(mask, x, emulation::lane() ^ with);
}

/* Blocks and threads take turns: plain operations are atomic. */
template <class T> static inline T atomicAdd(T *at, T x) { T old = *at; *at = old + x; return old; }
template <class T> static inline T atomicOr(T *at, T x) { T old = *at; *at = old | x; return old; }
template <class T> static inline T atomicMin(T *at, T x) { T old = *at; *at = old < x ? old : x; return old; }
template <class T> static inline T atomicCAS(T *at, T expected, T x)
{
    T old = *at;
    if (old == expected)
        *at = x;
    return old;
}
static inline int atomicCAS(int *at, enum status expected, int x) { return atomicCAS(at, (int)expected, x); }

static inline float bits_to_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline uint32_t float_to_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }
static inline float power_of_two(float x) { return exp2f(x); }
static inline float bf16_to_f32(uint16_t x) { return bits_to_float((uint32_t)x << 16); }

static inline float f16_to_f32(uint16_t x)
{
    int exponent = x >> 10 & 31, fraction = x & 1023;
    float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                      : exponent     ? ldexpf((float)(1024 + fraction), exponent - 25)
                                     : ldexpf((float)fraction, -24);
    return x >> 15 ? -magnitude : magnitude;
}
static inline uint16_t f32_to_bf16(float f)
{
    uint32_t bits = float_to_bits(f);
    return (uint16_t)(f != f ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline uint16_t f32_to_f16(float f)
{
    uint16_t sign = (uint16_t)(float_to_bits(f) >> 16 & 0x8000);
    float magnitude = fabsf(f);
    if (!(magnitude < 65520.0f))
        return (uint16_t)(f != f ? 0x7fff : sign | 0x7c00);
    int exponent = 0;
    frexpf(magnitude, &exponent);
    exponent = exponent < -13 || magnitude == 0.0f ? -13 : exponent; /* below it numbers are subnormal */
    int count = (int)rintf(ldexpf(magnitude, 11 - exponent));
    return (uint16_t)(sign | (count + (exponent + 13) * 1024)); /* a count of 2,048 carries into the exponent */
}
static inline uint32_t pack_bf16(float low, float high) { return f32_to_bf16(low) | (uint32_t)f32_to_bf16(high) << 16; }
static inline uint32_t pack_f16(float low, float high) { return f32_to_f16(low) | (uint32_t)f32_to_f16(high) << 16; }
static inline uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }
static inline uint32_t and_xor(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) ^ bits; }
static inline uint32_t add_bf16(uint32_t a, uint32_t b)
{
    return pack_bf16(bf16_to_f32((uint16_t)a) + bf16_to_f32((uint16_t)b),
                     bf16_to_f32((uint16_t)(a >> 16)) + bf16_to_f32((uint16_t)(b >> 16)));
}

/* Where the fragments of mma.m16n8k16 lie: lane = 4 · g + t. a: rows g and g + 8, inputs 2t and 2t + 8; b: inputs 2t and
 * 2t + 8 of column g; c: columns 2t and 2t + 1 of rows g and g + 8. */
static inline void multiply_fragments(float *c, const uint32_t *a, const uint32_t *b, float (*widen)(uint16_t))
{
    uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const char *slots = emulation::exchange(mine, sizeof mine);
    int g = emulation::lane() / 4, t = emulation::lane() % 4;
    for (int i = 0; i < 4; i++)
        c[i] += emulation::dot_of_pairs(slots, g + i / 2 * 8, 2 * t + i % 2, widen);
}
static inline void mma_bf16(float *c, const uint32_t *a, const uint32_t *b) { multiply_fragments(c, a, b, bf16_to_f32); }
static inline void mma_f16(float *c, const uint32_t *a, const uint32_t *b) { multiply_fragments(c, a, b, f16_to_f32); }

static inline void load_fragments(uint32_t *r, const void *row, bool transposed)
{
    const char *slots = emulation::exchange(&row, sizeof row);
    int g = emulation::lane() / 4, t = emulation::lane() % 4;
    for (int matrix = 0; matrix < 4; matrix++)
        for (int half = 0; half < 2; half++) {
            int from = transposed ? 2 * t + half : g, column = transposed ? g : 2 * t + half;
            const uint16_t *line;
            memcpy(&line, slots + (matrix * 8 + from) * emulation::SLOT, sizeof line);
            memcpy((uint16_t *)&r[matrix] + half, line + column, 2);
        }
}
static inline void load_matrices(uint32_t *r, const void *row) { load_fragments(r, row, false); }
static inline void load_transposed(uint32_t *r, const void *row) { load_fragments(r, row, true); }

static inline void copy_line(void *to, const void *from, int bytes) { emulation::add_copy(to, from, bytes); }
static inline void commit_copies() { emulation::end_copies(); }
template <int N> static inline void wait_for_copies() { emulation::finish_copies(N); }

#endif
