/* AVX-512 and its dot instructions for tests, on a CPU that has AVX2: what the sources take of them, under the names of
 * the compiler's intrinsics. `make native EMULATED=1` puts it before every source of an AVX-512 row. The results are
 * those of Intel's manual, bit for bit but for what a NaN carries; test_avx512.py holds them to it. */
#ifndef EMULATED_AVX512_H
#define EMULATED_AVX512_H

#pragma GCC system_header /* some of the names are macros already */
#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* A row of isa.mk says what it is to have. */
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
#ifdef EMULATED_avx512vnni
#define __AVX512VNNI__ 1
#endif
#ifdef EMULATED_avx512bf16
#define __AVX512BF16__ 1
#endif
#ifdef EMULATED_amx_tile
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define __AMX_INT8__ 1
#endif

#define __m512 emulated_m512
#define __m512i emulated_m512i
#define _mm512_add_epi16 emulated_add_epi16
#define _mm512_add_epi32 emulated_add_epi32
#define _mm512_add_ps emulated_add_ps
#define _mm512_and_si512 emulated_and_si512
#define _mm512_castps_si512 emulated_castps_si512
#define _mm512_castsi512_ps emulated_castsi512_ps
#define _mm512_cmp_ps_mask emulated_cmp_ps_mask
#define _mm512_cvtepi32_epi16 emulated_cvtepi32_epi16
#define _mm512_cvtepi32_epi8 emulated_cvtepi32_epi8
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_cvtneps_pbh emulated_cvtneps_pbh
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#define _mm512_div_ps emulated_div_ps
#define _mm512_fmadd_ps emulated_fmadd_ps
#define _mm512_loadu_ps emulated_loadu_ps
#define _mm512_loadu_si512 emulated_loadu_si512
#define _mm512_madd_epi16 emulated_madd_epi16
#define _mm512_maddubs_epi16 emulated_maddubs_epi16
#define _mm512_maskz_mov_ps emulated_maskz_mov_ps
#define _mm512_max_ps emulated_max_ps
#define _mm512_mul_ps emulated_mul_ps
#define _mm512_reduce_add_ps emulated_reduce_add_ps
#define _mm512_reduce_max_ps emulated_reduce_max_ps
#define _mm512_reduce_ps emulated_reduce_ps
#define _mm512_roundscale_ps emulated_roundscale_ps
#define _mm512_scalef_ps emulated_scalef_ps
#define _mm512_set1_epi16 emulated_set1_epi16
#define _mm512_set1_epi32 emulated_set1_epi32
#define _mm512_set1_epi8 emulated_set1_epi8
#define _mm512_set1_ps emulated_set1_ps
#define _mm512_shuffle_i32x4 emulated_shuffle_i32x4
#define _mm512_slli_epi16 emulated_slli_epi16
#define _mm512_slli_epi32 emulated_slli_epi32
#define _mm512_srai_epi16 emulated_srai_epi16
#define _mm512_srli_epi16 emulated_srli_epi16
#define _mm512_storeu_ps emulated_storeu_ps
#define _mm512_storeu_si512 emulated_storeu_si512
#define _mm512_sub_ps emulated_sub_ps
#define _mm512_unpackhi_epi32 emulated_unpackhi_epi32
#define _mm512_unpackhi_epi64 emulated_unpackhi_epi64
#define _mm512_unpacklo_epi32 emulated_unpacklo_epi32
#define _mm512_unpacklo_epi64 emulated_unpacklo_epi64

typedef struct { __m256 half[2]; } __m512;
typedef struct { __m256i half[2]; } __m512i;

#define EMULATED_INLINE static inline __attribute__((always_inline))
EMULATED_INLINE void emulated_fault_unless(bool right)
{
    if (!right)
        __builtin_trap();
}
/* A function of two vectors, or of a vector and a number, that does to each half what AVX2 does. */
#define OF_HALVES(type, expression) \
    type out; { enum { i = 0 }; out.half[i] = (expression); } { enum { i = 1 }; out.half[i] = (expression); } return out
#define OF_TWO(type, name) \
    EMULATED_INLINE type _mm512_##name(type a, type b) { OF_HALVES(type, _mm256_##name(a.half[i], b.half[i])); }
#define OF_NUMBER(type, name, number) \
    EMULATED_INLINE type _mm512_##name(number x) { OF_HALVES(type, _mm256_##name(x)); }
#define OF_BITS(name) \
    EMULATED_INLINE __m512i _mm512_##name(__m512i x, int bits) { OF_HALVES(__m512i, _mm256_##name(x.half[i], bits)); }

OF_NUMBER(__m512, set1_ps, float)
OF_NUMBER(__m512i, set1_epi8, char)
OF_NUMBER(__m512i, set1_epi16, short)
OF_NUMBER(__m512i, set1_epi32, int)
OF_TWO(__m512, add_ps)
OF_TWO(__m512, sub_ps)
OF_TWO(__m512, mul_ps)
OF_TWO(__m512, div_ps)
OF_TWO(__m512, max_ps)
OF_TWO(__m512i, add_epi16)
OF_TWO(__m512i, add_epi32)
OF_TWO(__m512i, madd_epi16)
OF_TWO(__m512i, maddubs_epi16)
OF_TWO(__m512i, unpacklo_epi32)
OF_TWO(__m512i, unpackhi_epi32)
OF_TWO(__m512i, unpacklo_epi64)
OF_TWO(__m512i, unpackhi_epi64)
OF_BITS(slli_epi16)
OF_BITS(slli_epi32)
OF_BITS(srai_epi16)
OF_BITS(srli_epi16)
EMULATED_INLINE __m512 _mm512_loadu_ps(const void *p) { OF_HALVES(__m512, _mm256_loadu_ps((const float *)p + 8 * i)); }
EMULATED_INLINE __m512i _mm512_loadu_si512(const void *p)
{
    OF_HALVES(__m512i, _mm256_loadu_si256((const __m256i *)p + i));
}
EMULATED_INLINE void _mm512_storeu_ps(void *p, __m512 x)
{
    for (int i = 0; i < 2; i++)
        _mm256_storeu_ps((float *)p + 8 * i, x.half[i]);
}
EMULATED_INLINE void _mm512_storeu_si512(void *p, __m512i x)
{
    for (int i = 0; i < 2; i++)
        _mm256_storeu_si256((__m256i *)p + i, x.half[i]);
}
EMULATED_INLINE __m512 _mm512_castsi512_ps(__m512i x) { OF_HALVES(__m512, _mm256_castsi256_ps(x.half[i])); }
EMULATED_INLINE __m512i _mm512_castps_si512(__m512 x) { OF_HALVES(__m512i, _mm256_castps_si256(x.half[i])); }
EMULATED_INLINE __m512i _mm512_and_si512(__m512i a, __m512i b)
{
    OF_HALVES(__m512i, _mm256_and_si256(a.half[i], b.half[i]));
}
EMULATED_INLINE __m512 _mm512_cvtepi32_ps(__m512i x) { OF_HALVES(__m512, _mm256_cvtepi32_ps(x.half[i])); }
EMULATED_INLINE __m512i _mm512_cvtps_epi32(__m512 x) { OF_HALVES(__m512i, _mm256_cvtps_epi32(x.half[i])); }
EMULATED_INLINE __m512 _mm512_cvtph_ps(__m256i x)
{
    const __m128i half[2] = {_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)};
    OF_HALVES(__m512, _mm256_cvtph_ps(half[i]));
}
EMULATED_INLINE __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c)
{
    OF_HALVES(__m512, _mm256_fmadd_ps(a.half[i], b.half[i], c.half[i]));
}
EMULATED_INLINE __m512 _mm512_roundscale_ps(__m512 x, int how)
{
    emulated_fault_unless(how == (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); /* what else there is, nobody uses */
    OF_HALVES(__m512, _mm256_round_ps(x.half[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
EMULATED_INLINE unsigned _mm512_cmp_ps_mask(__m512 a, __m512 b, int how)
{
    unsigned mask[2];
    emulated_fault_unless(how == _CMP_NLT_UQ);
    for (int i = 0; i < 2; i++)
        mask[i] = (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a.half[i], b.half[i], _CMP_NLT_UQ));
    return mask[1] << 8 | mask[0];
}
EMULATED_INLINE __m512 _mm512_maskz_mov_ps(unsigned mask, __m512 x)
{
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    OF_HALVES(__m512, _mm256_and_ps(x.half[i], _mm256_castsi256_ps(_mm256_cmpeq_epi32(
                          _mm256_and_si256(_mm256_set1_epi32((int)(mask >> 8 * i)), bit), bit))));
}
EMULATED_INLINE __m128i _mm512_cvtepi32_epi8(__m512i x) /* the lowest byte of each */
{
    int8_t bytes[64], out[16];
    _mm512_storeu_si512(bytes, x);
    for (int i = 0; i < 16; i++)
        out[i] = bytes[4 * i];
    return _mm_loadu_si128((const __m128i *)out);
}
EMULATED_INLINE __m256i _mm512_cvtepi32_epi16(__m512i x) /* the lower half of each */
{
    int16_t words[32], out[16];
    _mm512_storeu_si512(words, x);
    for (int i = 0; i < 16; i++)
        out[i] = words[2 * i];
    return _mm256_loadu_si256((const __m256i *)out);
}
EMULATED_INLINE __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, const int from) /* two quarters of each */
{
    __m128i quarters[2][4], out[4];
    _mm512_storeu_si512(quarters[0], a);
    _mm512_storeu_si512(quarters[1], b);
    for (int i = 0; i < 4; i++)
        out[i] = quarters[i / 2][from >> 2 * i & 3];
    return _mm512_loadu_si512(out);
}
/* The compilers' order. */
EMULATED_INLINE float _mm512_reduce_add_ps(__m512 x)
{
    __m256 of_8 = _mm256_add_ps(x.half[1], x.half[0]);
    __m128 of_4 = _mm_add_ps(_mm256_extractf128_ps(of_8, 1), _mm256_castps256_ps128(of_8));
    __m128 of_2 = _mm_add_ps(of_4, _mm_movehl_ps(of_4, of_4));
    return of_2[0] + of_2[1];
}
EMULATED_INLINE float _mm512_reduce_max_ps(__m512 x)
{
    __m256 of_8 = _mm256_max_ps(x.half[1], x.half[0]);
    __m128 of_4 = _mm_max_ps(_mm256_extractf128_ps(of_8, 1), _mm256_castps256_ps128(of_8));
    __m128 of_2 = _mm_max_ps(of_4, _mm_movehl_ps(of_4, of_4));
    return _mm_cvtss_f32(_mm_max_ps(of_2, _mm_movehdup_ps(of_2)));
}
/* x - floor(x), rounded down like the floor: below 1 always. An exact 0 is -0, and of an infinity it is 0. */
EMULATED_INLINE __m256 emulated_fraction(__m256 x)
{
    const __m256 sign = _mm256_set1_ps(-0.0f), infinity = _mm256_set1_ps(INFINITY);
    __m256 floor = _mm256_floor_ps(x), out = _mm256_sub_ps(x, floor);
    __m256 rounded_up = _mm256_cmp_ps(_mm256_add_ps(out, floor), x, _CMP_GT_OQ); /* that sum is exact */
    out = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(out), _mm256_castps_si256(rounded_up)));
    out = _mm256_or_ps(out, _mm256_and_ps(_mm256_cmp_ps(out, _mm256_setzero_ps(), _CMP_EQ_OQ), sign));
    return _mm256_andnot_ps(_mm256_cmp_ps(_mm256_andnot_ps(sign, x), infinity, _CMP_EQ_OQ), out);
}
EMULATED_INLINE __m512 _mm512_reduce_ps(__m512 x, const int how)
{
    emulated_fault_unless(how == (_MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    OF_HALVES(__m512, emulated_fraction(x.half[i]));
}
/* x · 2^floor(y). The product is exact in double, so it is rounded once. */
EMULATED_INLINE float emulated_scale(float x, float y)
{
    if (isinf(y))
        return isnan(x) ? fmaxf(y, 0.0f) : x * (y > 0.0f ? y : 0.0f);
    if (isnan(y))
        return y;
    uint64_t bits = (uint64_t)(1023 + (int64_t)floorf(fmaxf(-1000.0f, fminf(y, 1000.0f)))) << 52;
    double power;
    memcpy(&power, &bits, 8);
    return (float)(x * power);
}
EMULATED_INLINE __m512 _mm512_scalef_ps(__m512 x, __m512 y)
{
    float a[16], b[16];
    _mm512_storeu_ps(a, x);
    _mm512_storeu_ps(b, y);
    for (int i = 0; i < 16; i++)
        a[i] = emulated_scale(a[i], b[i]);
    return _mm512_loadu_ps(a);
}

/* To bf16, ties to even. Subnormals become zero, as in all instructions for bf16. */
EMULATED_INLINE __m256i _mm512_cvtneps_pbh(__m512 x)
{
    uint32_t bits[16];
    uint16_t out[16];
    _mm512_storeu_ps(bits, x);
    for (int i = 0; i < 16; i++) {
        uint32_t magnitude = bits[i] & 0x7fffffff, sign = bits[i] & 0x80000000;
        uint32_t nearest = bits[i] + 0x7fff + (bits[i] >> 16 & 1), quiet = bits[i] | 0x400000;
        out[i] = (uint16_t)((magnitude < 0x800000 ? sign : magnitude > 0x7f800000 ? quiet : nearest) >> 16);
    }
    return _mm256_loadu_si256((const __m256i *)out);
}
EMULATED_INLINE __m256 emulated_flush(__m256 x)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 small = _mm256_cmp_ps(_mm256_andnot_ps(sign, x), _mm256_set1_ps(FLT_MIN), _CMP_LT_OQ);
    return _mm256_andnot_ps(_mm256_andnot_ps(sign, small), x);
}
EMULATED_INLINE __m256 emulated_even(__m256i pairs)
{
    return emulated_flush(_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)));
}
EMULATED_INLINE __m256 emulated_odd(__m256i pairs)
{
    return emulated_flush(_mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000))));
}
EMULATED_INLINE __m256 emulated_add_product(__m256 acc, __m256 a, __m256 b)
{
    return emulated_flush(_mm256_fmadd_ps(a, b, acc));
}
/* acc + the dot of unsigned quads with signed ones, modulo 2^32. */
EMULATED_INLINE __m256i emulated_add_quads(__m256i acc, __m256i w, __m256i x)
{
    __m256i w_even = _mm256_and_si256(w, _mm256_set1_epi16(255)), w_odd = _mm256_srli_epi16(w, 8);
    __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
    return _mm256_add_epi32(acc, _mm256_add_epi32(_mm256_madd_epi16(w_even, x_even), _mm256_madd_epi16(w_odd, x_odd)));
}

/* What simd.h writes in assembly. The odd products of a pair are added first. */
#define ADD_DOT(instruction, acc, w, x) ((acc) = emulated_##instruction(acc, w, x))
static inline __m512i emulated_vpdpbusd(__m512i acc, __m512i w, __m512i x)
{
    OF_HALVES(__m512i, emulated_add_quads(acc.half[i], w.half[i], x.half[i]));
}
static inline __m512 emulated_vpdpwssd(__m512 acc, __m512 w, __m512 x)
{
    __m512i products = _mm512_madd_epi16(_mm512_castps_si512(w), _mm512_castps_si512(x));
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(acc), products));
}
static inline __m512 emulated_vdpbf16ps(__m512 acc, __m512 a, __m512 b)
{
    for (int i = 0; i < 2; i++) {
        __m256i w = _mm256_castps_si256(a.half[i]), x = _mm256_castps_si256(b.half[i]);
        __m256 sum = emulated_add_product(emulated_flush(acc.half[i]), emulated_odd(w), emulated_odd(x));
        acc.half[i] = emulated_add_product(sum, emulated_even(w), emulated_even(x));
    }
    return acc;
}

#ifdef __AMX_TILE__
#include "emulated_amx.h"
#endif
#endif
