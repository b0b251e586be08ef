/* What only Hopper has (sm_90a), under short names: products by warpgroups (wgmma), copies of boxes by tensor maps (TMA),
 * barriers that count bytes (mbarrier). emulated_hopper.h has the same names for a CPU. Sources that include this are
 * called *_hopper.cu, and are built for sm_90a alone. */
#ifndef HOPPER_CUH
#define HOPPER_CUH

#include "common.cuh"

enum { WARPGROUP = 128, BOX_COLUMNS = 64 /* of 16 bits: 128 bytes, as wide as the swizzle */ };

#ifndef __CUDACC__
#include "emulated_hopper.h"
#else

/* A matrix in global memory as the copy engine sees it; the driver encodes it (engine/cuda/tensor_map.py). */
struct alignas(64) tensor_map { char opaque[128]; };

#define KERNEL_WITH_MAP(name, type, threads)                    \
    extern "C" __global__ void __launch_bounds__(threads, 1)    \
        name(const __grid_constant__ struct tensor_map map, const struct type op, const struct team team)

DEVICE uint32_t shared_address(const void *at) { return (uint32_t)__cvta_generic_to_shared(at); }

/* A barrier's phase ends when `count` threads have arrived and all bytes that they announced are there. Barriers are
 * made by one thread, which then lets the copy engine know, too. */
DEVICE void make_barrier(uint64_t *barrier, int count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void arrive(uint64_t *barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
DEVICE void arrive_expecting(uint64_t *barrier, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
/* Waits for the end of the last phase of that parity: the first has parity 0, and before it all of parity 1 is over. */
DEVICE void wait_for(uint64_t *barrier, int parity)
{
    for (uint32_t over = 0; !over;)
        asm volatile("{ .reg .pred over; mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2; selp.u32 %0, 1, 0, over; }"
                     : "=r"(over) : "r"(shared_address(barrier)), "r"(parity) : "memory");
}

/* Starts to copy a box of a matrix, whose bytes the barrier then counts; what is outside the matrix becomes 0. Each row of
 * 64 columns takes 128 bytes, whose eighths change places by the lowest three bits of the row. */
DEVICE void copy_box(void *to, const struct tensor_map &map, int column, int row, uint64_t *barrier)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(shared_address(to)), "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)) : "memory");
}

/* A barrier of some threads of the block, by number from 1: those who wait at it and those who only arrive. */
DEVICE void wait_at(int number, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory"); }
DEVICE void arrive_at(int number, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory"); }

/* From the registers that a kernel starts with to COUNT for each thread of this warpgroup. */
template <int COUNT> DEVICE void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT> DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }

/* Products. Registers that they use may be touched until begin_products() and again after wait_for_products(), which
 * waits for all but the last PENDING groups of this thread, and gives `sum` back. */
DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void end_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING, int COUNT> DEVICE void wait_for_products(float (&sum)[COUNT][4])
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#pragma unroll
    for (int i = 0; i < 4 * COUNT; i++)
        asm volatile("" : "+f"(sum[i / 4][i % 4])::"memory"); /* so that no use of it moves before the wait */
}

#define SUMS_OF(i) "+f"(sum[i][0]), "+f"(sum[i][1]), "+f"(sum[i][2]), "+f"(sum[i][3])
#define SUMS_OF_32(i) SUMS_OF(i), SUMS_OF(i + 1), SUMS_OF(i + 2), SUMS_OF(i + 3), \
                      SUMS_OF(i + 4), SUMS_OF(i + 5), SUMS_OF(i + 6), SUMS_OF(i + 7)
#define NUMBERS_TO_31 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
                      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NUMBERS_TO_63 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
                      "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

/* sum [64][64 or 128] += a [64][16] · b by a warpgroup, of which each warp has 16 rows; without `add`, sum is written. a:
 * fragments as mma_bf16 has them. b: a described tile, of which a row is a column of the product, or, if TRANSPOSED, one
 * of its 16 steps. */
template <bool TRANSPOSED> DEVICE void multiply(float (&sum)[8][4], const uint32_t (&a)[4], uint64_t b, bool add)
{
    asm volatile("{ .reg .pred add; setp.ne.b32 add, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                 NUMBERS_TO_31 "}, {%32, %33, %34, %35}, %36, add, 1, 1, %38; }"
                 : SUMS_OF_32(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"(TRANSPOSED));
}
template <bool TRANSPOSED> DEVICE void multiply(float (&sum)[16][4], const uint32_t (&a)[4], uint64_t b, bool add)
{
    asm volatile("{ .reg .pred add; setp.ne.b32 add, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
                 NUMBERS_TO_31 ", " NUMBERS_TO_63 "}, {%64, %65, %66, %67}, %68, add, 1, 1, %70; }"
                 : SUMS_OF_32(0), SUMS_OF_32(8)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"(TRANSPOSED));
}

#endif

/* Describes a tile of boxes in shared memory to multiply(). leading: bytes to the next 64 columns, if it is transposed;
 * stride: to the next 8 rows. */
DEVICE uint64_t describe(const void *at, int leading, int stride)
{
    const uint64_t swizzled_128 = 1;
    return (shared_address(at) & 0x3ffff) >> 4 | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 |
           swizzled_128 << 62;
}
/* The same tile from `bytes` further on. */
DEVICE uint64_t advance(uint64_t described, int bytes) { return described + (bytes >> 4); }

#endif
