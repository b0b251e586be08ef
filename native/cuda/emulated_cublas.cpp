/* As much of cuBLAS as the engine calls, on a CPU, for tests: NVIDIA's names and signatures, matrices column by column.
 * What NVIDIA's refuses is refused with the same status. Beyond that, it refuses to work without a workspace, since it
 * would have to allocate one, and float32 that is not asked for as pedantic is multiplied as TF32. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "abi.h"
#include "emulation.h"

namespace {
enum { SUCCESS = 0, NOT_INITIALIZED = 1, ALLOC_FAILED = 3, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum { OP_N = 0, OP_T = 1, DEFAULT = -1 };
enum { R_32F = 0, R_16F = 2, R_16BF = 14, COMPUTE_32F = 68, COMPUTE_32F_PEDANTIC = 69 };

/* What a handle is of. */
struct context {
    void *stream;
    char *workspace;
    size_t size;
};

float number_at(const void *matrix, int type, int64_t at, bool exact)
{
    if (type == R_16F)
        return f16_to_f32(((const uint16_t *)matrix)[at]);
    if (type == R_16BF)
        return bf16_to_f32(((const uint16_t *)matrix)[at]);
    float number = ((const float *)matrix)[at];
    return exact ? number : bits_to_float(float_to_bits(number) & 0xffffe000u);
}
}

/* What cublasCreate_v2 returns, for tests of its failure; handles that are open; products so far. */
extern "C" {
int emulated_status = SUCCESS, emulated_handles = 0, emulated_products = 0;
}

extern "C" int cublasCreate_v2(void **handle)
{
    if (emulated_status)
        return emulated_status;
    *handle = new context {};
    emulated_handles++;
    return SUCCESS;
}
extern "C" int cublasDestroy_v2(void *handle)
{
    delete (context *)handle;
    emulated_handles--;
    return SUCCESS;
}
extern "C" int cublasGetVersion_v2(void *handle, int *version)
{
    *version = 130402;
    return handle ? SUCCESS : NOT_INITIALIZED;
}
extern "C" int cublasSetStream_v2(void *handle, void *stream)
{
    if (!handle)
        return NOT_INITIALIZED;
    *(context *)handle = {stream, NULL, 0}; /* the workspace is cuBLAS's own again */
    return SUCCESS;
}
extern "C" int cublasSetWorkspace_v2(void *handle, void *workspace, size_t size)
{
    if (!handle)
        return NOT_INITIALIZED;
    if ((uintptr_t)workspace % 256)
        return INVALID_VALUE;
    ((context *)handle)->workspace = (char *)workspace, ((context *)handle)->size = size;
    return SUCCESS;
}
extern "C" const char *cublasGetStatusString(int status)
{
    return status == SUCCESS ? "success" : status == NOT_INITIALIZED ? "the library was not initialized" :
           status == ALLOC_FAILED ? "the resource allocation failed" :
           status == INVALID_VALUE ? "an unsupported value or parameter was passed to the function" :
           "the functionality requested is not supported";
}

/* c [m, n] = alpha · a' [m, k] · b' [k, n] + beta · c, a' being a or its transpose. */
extern "C" int cublasGemmEx(void *handle, int a_operation, int b_operation, int m, int n, int k, const void *alpha,
                            const void *a, int a_type, int a_stride, const void *b, int b_type, int b_stride,
                            const void *beta, void *c, int c_type, int c_stride, int compute, int algorithm)
{
    const context *own = (const context *)handle;
    if (!own)
        return NOT_INITIALIZED;
    bool a_lies = a_operation == OP_N, b_lies = b_operation == OP_N;
    bool known = (a_lies || a_operation == OP_T) && (b_lies || b_operation == OP_T) && alpha && beta;
    if (!known || m < 0 || n < 0 || k < 0 || a_stride < std::max(1, a_lies ? m : k) ||
        b_stride < std::max(1, b_lies ? k : n) || c_stride < std::max(1, m))
        return INVALID_VALUE;
    if (a_type != b_type || (a_type != R_32F && a_type != R_16F && a_type != R_16BF) || c_type != R_32F ||
        (compute != COMPUTE_32F && compute != COMPUTE_32F_PEDANTIC) || algorithm != DEFAULT)
        return NOT_SUPPORTED;
    if (!own->workspace)
        return ALLOC_FAILED;
    memset(own->workspace, 0xff, 256);
    memset(own->workspace + own->size - 256, 0xff, 256);
    emulated_products++;
    float times = *(const float *)alpha, keep = *(const float *)beta;
    bool exact = compute == COMPUTE_32F_PEDANTIC;
    for (int64_t column = 0; column < n; column++)
        for (int64_t row = 0; row < m; row++) {
            float sum = 0.0f, *out = (float *)c + column * c_stride + row;
            for (int64_t i = 0; i < k; i++)
                sum += number_at(a, a_type, a_lies ? i * a_stride + row : row * a_stride + i, exact) *
                       number_at(b, b_type, b_lies ? column * b_stride + i : i * b_stride + column, exact);
            *out = times * sum + (keep == 0.0f ? 0.0f : keep * *out); /* what c held is not read for 0 */
        }
    return SUCCESS;
}
