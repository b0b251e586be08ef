/* What a caller asks a library about itself. */
#include "page.h"

int64_t kv_head_bytes(int32_t dtype, int32_t head_dim)
{
    return page_head_bytes(dtype, head_dim);
}

int32_t isa_supported(const char *name)
{
#if defined(__x86_64__) && defined(__GNUC__)
    /* The compiler's run-time checks ask the CPU and whether the operating system saves the registers. */
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (!strcmp(name, "avx2"))
        return avx2;
    if (!strcmp(name, "avx512f"))
        return avx512;
    if (!strcmp(name, "avx512_vnni"))
        return vnni;
    if (!strcmp(name, "avx512_bf16"))
        return vnni && __builtin_cpu_supports("avx512bf16");
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
    SIZE(sampling);
    SIZE(sample);
    SIZE(source);
    return -1;
}
