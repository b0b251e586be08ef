/* What a caller asks a library about itself. */
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "page.h"

int64_t kv_head_bytes(int32_t dtype, int32_t head_dim)
{
    return page_head_bytes(dtype, head_dim) + page_scales(dtype) * 4;
}

/* AVX-512 and AMX by emulated_avx512.h: wherever there is AVX2. */
#ifdef EMULATED
#define HAS(feature) true
#else
#define HAS(feature) __builtin_cpu_supports(feature)
#endif

/* Whether there is a tile unit for bf16 and int8, and whether the kernel lets this process use it: it must be asked. */
static bool has_amx(void)
{
#if defined(EMULATED)
    return true;
#elif defined(__x86_64__) && defined(__linux__)
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18, AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24, AMX_INT8 = 1 << 25 };
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_BF16) && (d & AMX_TILE) && (d & AMX_INT8) &&
           syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

int32_t isa_supported(const char *name)
{
#if defined(__x86_64__) && defined(__GNUC__)
    /* The compiler's run-time checks ask the CPU and whether the operating system saves the registers. */
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    bool avx512 = avx2 && HAS("avx512f") && HAS("avx512bw") && HAS("avx512vl") && HAS("avx512dq");
    bool vnni = avx512 && HAS("avx512vnni"), bf16 = vnni && HAS("avx512bf16");
    if (!strcmp(name, "avx2"))
        return avx2;
    if (!strcmp(name, "avx512f"))
        return avx512;
    if (!strcmp(name, "avx512_vnni"))
        return vnni;
    if (!strcmp(name, "avx512_bf16"))
        return bf16;
    if (!strcmp(name, "avx512_amx"))
        return bf16 && has_amx();
#endif
    return !strcmp(name, "baseline");
}

int64_t struct_size(const char *name)
{
#define SIZE(s)            \
    if (!strcmp(name, #s)) \
        return sizeof(struct s)
    SIZE(control);
    SIZE(node);
    SIZE(node_times);
    SIZE(embedding);
    SIZE(rmsnorm);
    SIZE(add_rmsnorm);
    SIZE(matmul);
    SIZE(logits);
    SIZE(rope_angles);
    SIZE(rope);
    SIZE(kv_store);
    SIZE(attention);
    SIZE(swiglu);
    SIZE(meeting);
    SIZE(all_reduce);
    SIZE(gather);
    SIZE(sampling);
    SIZE(sample);
    SIZE(source);
    return -1;
}
