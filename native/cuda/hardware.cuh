/* The GPU's own instructions under short names; emulation.h has the same names for a CPU. */
#ifndef HARDWARE_CUH
#define HARDWARE_CUH

#define DEVICE __device__ __forceinline__
#define ENTRY(name, type, ...) \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__) name(const struct type op, const struct team team)
/* Waits until the first `count` threads of a block are here, whole warps; the others do not ask. */
DEVICE void wait_for_threads(unsigned count) { asm volatile("barrier.sync 1, %0;" ::"r"(count) : "memory"); }

/* Waits until a bit of a word is no longer what it was before, and sees what was written until then. */
DEVICE void wait_for_change(const unsigned *word, unsigned before, unsigned bit)
{
    unsigned now;
    do
        asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(now) : "l"(word) : "memory");
    while (((now ^ before) & bit) == 0);
}
DEVICE void fetch_into_l2(const char *at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]

DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }

/* 2 to the power of x, to a few units in the last place; 0 where it would be subnormal. */
DEVICE float power_of_two(float x)
{
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}

DEVICE float f16_to_f32(uint16_t x)
{
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x));
    return f;
}

/* Two numbers rounded to nearest even, the first in the low half. */
DEVICE uint32_t pack_bf16(float low, float high)
{
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
DEVICE uint32_t pack_f16(float low, float high)
{
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

/* (x & mask) | bits and (x & mask) ^ bits, each as the one instruction that the compiler does not find for two constants. */
DEVICE uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits)
{
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(x), "r"(mask), "r"(bits));
    return result;
}
DEVICE uint32_t and_xor(uint32_t x, uint32_t mask, uint32_t bits)
{
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(result) : "r"(x), "r"(mask), "r"(bits));
    return result;
}

/* Sums of two pairs in bf16. */
DEVICE uint32_t add_bf16(uint32_t a, uint32_t b)
{
    uint32_t sum; /* as a · 1 + b: sums by themselves came later than sm_80 */
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
    return sum;
}

/* c [16][8] += a [16][16] · b [16][8] by a warp: the fragments of mma.m16n8k16. */
DEVICE void mma_bf16(float *c, const uint32_t *a, const uint32_t *b)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_f16(float *c, const uint32_t *a, const uint32_t *b)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* Four 8 × 8 matrices of 16-bit numbers, lane i giving the address of row i % 8 of matrix i / 8. */
DEVICE void load_matrices(uint32_t *r, const void *row)
{
    uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
DEVICE void load_transposed(uint32_t *r, const void *row)
{
    uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

/* Copies a line into shared memory in the background, of which the first `bytes` come from `from` and the rest is 0. */
DEVICE void copy_line(void *to, const void *from, int bytes)
{
    uint32_t at = (uint32_t)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}
/* Ends a group of copies; waits until all but the last N groups of this thread have arrived. */
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

#endif
