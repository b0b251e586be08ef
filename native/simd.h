/* The vector type of the instruction set that a source is being built for: LANES floats, and the few operations
 * that the kernels need. One block for each family; everything above this file is portable C.
 *
 * A "line" is PANEL weights (f32, f16), pairs (bf16) or quads (int8) of a packed matrix or cache page: VECTORS vectors.
 * line_f16, line_even and line_odd (of pairs) load a vector of it in f32, line_words (of quads) the first and third or the
 * second and fourth byte of each as pairs of 16 bits, for vec_dot_words. */
#ifndef SIMD_H
#define SIMD_H

#include <math.h>

#include "native.h"

/* Keeps a compiler from deriving one pointer from another, or from keeping what it points to, for which it would run out of
 * registers. */
#ifdef __GNUC__
#define HIDE(pointer) __asm__("" : "+r"(pointer))
#else
#define HIDE(pointer) ((void)0)
#endif

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define LANES 16
#define ACCUMULATORS 24 /* vectors a tile may keep in registers */
#ifndef ADD_DOT /* ties the accumulator to its register: gcc 12 spills it else */
#define ADD_DOT(instruction, acc, w, x) __asm__(#instruction " %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x))
#endif
typedef __m512 vec;
INLINE vec vec_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vec_store(float *p, vec x) { _mm512_storeu_ps(p, x); }
INLINE vec vec_set(float x) { return _mm512_set1_ps(x); }
INLINE vec vec_add(vec a, vec b) { return _mm512_add_ps(a, b); }
INLINE vec vec_sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
INLINE vec vec_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
INLINE vec vec_div(vec a, vec b) { return _mm512_div_ps(a, b); }
INLINE vec vec_max(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE vec vec_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec vec_unless_below(vec x, float limit, vec y) /* y, or 0 where x < limit */
{
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLT_UQ), y);
}
INLINE vec vec_round(vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vec vec_exp2i(vec n) /* 2^n for integral n */
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
INLINE vec vec_fraction(vec x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); } /* x - floor(x) */
INLINE vec vec_scale2(vec x, vec y) { return _mm512_scalef_ps(x, y); } /* x · 2^floor(y) */
INLINE vec line_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
INLINE vec line_words(const void *p, const int part)
{
    __m512i bytes = _mm512_loadu_si512(p);
    return _mm512_castsi512_ps(_mm512_srai_epi16(part ? bytes : _mm512_slli_epi16(bytes, 8), 8));
}
/* acc + the products of the pairs of whole numbers in w and x, as whole numbers. */
INLINE vec vec_dot_words(vec w, vec x, vec acc)
{
#if defined(__AVX512VNNI__)
    ADD_DOT(vpdpwssd, acc, w, x);
    return acc;
#else
    __m512i products = _mm512_madd_epi16(_mm512_castps_si512(w), _mm512_castps_si512(x));
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(acc), products));
#endif
}
INLINE vec vec_from_whole(vec sums) { return _mm512_cvtepi32_ps(_mm512_castps_si512(sums)); }
INLINE void vec_store_words(void *p, vec x) /* rounded; of each quad the first and third, then the second and fourth */
{
    __m256i words = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x));
    _mm256_storeu_si256(p, _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xd8), 0xd8));
}
INLINE vec line_even(const void *p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
INLINE vec line_odd(const void *p)
{
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32((int)0xffff0000)));
}
INLINE float vec_reduce_add(vec x) { return _mm512_reduce_add_ps(x); }
INLINE float vec_reduce_max(vec x) { return _mm512_reduce_max_ps(x); }
typedef __m512i ivec; /* LANES integers of 32 bits, or as many quads of bytes */
INLINE ivec ivec_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE ivec ivec_set(int32_t x) { return _mm512_set1_epi32(x); }
INLINE ivec ivec_add(ivec a, ivec b) { return _mm512_add_epi32(a, b); }
INLINE ivec ivec_low_halves(ivec x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
INLINE ivec ivec_high_halves(ivec x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
INLINE vec ivec_to_vec(ivec x) { return _mm512_cvtepi32_ps(x); }
INLINE void vec_round_bytes(vec x, int8_t *out) /* whole numbers of a byte each, ties to even */
{
    _mm_storeu_si128((__m128i *)out, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}
#if defined(__AVX512VNNI__)
#define QUAD_WORDS(bits) ((void)(bits), 1)
/* acc + the products of the unsigned quads in w with the signed quad at x. */
INLINE ivec ivec_dot(ivec acc, ivec w, const int32_t *x)
{
    ADD_DOT(vpdpbusd, acc, w, _mm512_set1_epi32(x[0]));
    return acc;
}
#else
#define QUAD_WORDS(bits) ((bits) == 4 ? 1 : 2)
INLINE ivec ivec_dot(ivec acc, ivec w, const int32_t *x)
{
    __m512i even = _mm512_and_si512(w, _mm512_set1_epi16(255)), odd = _mm512_srli_epi16(w, 8);
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(even, _mm512_set1_epi32(x[0])));
    return _mm512_add_epi32(acc, _mm512_madd_epi16(odd, _mm512_set1_epi32(x[1])));
}
/* The same of quads of 4 bits at a signed quad of bytes, in sums of 16 bits, two to an output: HALF_QUADS of them fit. */
#define HALF_QUADS 8
INLINE ivec ivec_dot_halves(ivec acc, ivec w, const int32_t *x)
{
    return _mm512_add_epi16(acc, _mm512_maddubs_epi16(w, _mm512_set1_epi32(x[0])));
}
INLINE ivec ivec_add_halves(ivec acc, ivec halves)
{
    return _mm512_add_epi32(acc, _mm512_madd_epi16(halves, _mm512_set1_epi16(1)));
}
#endif
/* The 16 × 16 matrix of 4-byte units at byte `at` of 16 rows, turned: out[i] is column i. */
INLINE void transpose_units(const char *const row[PANEL], int64_t at, uint32_t *out)
{
    __m512i r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        r[i] = _mm512_loadu_si512(row[i] + at);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) { /* r[i + c], 128-bit lane l: column 4l + c of rows i to i + 3 */
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        __m512i low = _mm512_shuffle_i32x4(r[c], r[c + 4], 0x44), low2 = _mm512_shuffle_i32x4(r[c + 8], r[c + 12], 0x44);
        __m512i high = _mm512_shuffle_i32x4(r[c], r[c + 4], 0xee), high2 = _mm512_shuffle_i32x4(r[c + 8], r[c + 12], 0xee);
        _mm512_storeu_si512(out + c * PANEL, _mm512_shuffle_i32x4(low, low2, 0x88));
        _mm512_storeu_si512(out + (4 + c) * PANEL, _mm512_shuffle_i32x4(low, low2, 0xdd));
        _mm512_storeu_si512(out + (8 + c) * PANEL, _mm512_shuffle_i32x4(high, high2, 0x88));
        _mm512_storeu_si512(out + (12 + c) * PANEL, _mm512_shuffle_i32x4(high, high2, 0xdd));
    }
}
#if defined(__AVX512BF16__)
#define BF16_DOT 1
/* acc + the products of the bf16 pairs in w and x. */
INLINE vec vec_dot_bf16(vec w, vec x, vec acc)
{
    ADD_DOT(vdpbf16ps, acc, w, x);
    return acc;
}
INLINE void vec_store_bf16(uint16_t *p, vec x) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(x)); }
#endif

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define LANES 8
#define ACCUMULATORS 12
typedef __m256 vec;
INLINE vec vec_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void vec_store(float *p, vec x) { _mm256_storeu_ps(p, x); }
INLINE vec vec_set(float x) { return _mm256_set1_ps(x); }
INLINE vec vec_add(vec a, vec b) { return _mm256_add_ps(a, b); }
INLINE vec vec_sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
INLINE vec vec_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
INLINE vec vec_div(vec a, vec b) { return _mm256_div_ps(a, b); }
INLINE vec vec_max(vec a, vec b) { return _mm256_max_ps(a, b); }
INLINE vec vec_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vec vec_unless_below(vec x, float limit, vec y)
{
    return _mm256_and_ps(_mm256_cmp_ps(x, _mm256_set1_ps(limit), _CMP_NLT_UQ), y);
}
INLINE vec vec_round(vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vec vec_exp2i(vec n)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE vec line_f16(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128(p)); }
INLINE vec line_words(const void *p, const int part)
{
    __m256i bytes = _mm256_loadu_si256(p);
    return _mm256_castsi256_ps(_mm256_srai_epi16(part ? bytes : _mm256_slli_epi16(bytes, 8), 8));
}
INLINE vec vec_dot_words(vec w, vec x, vec acc)
{
    vec products; /* in this order: else gcc makes all products first, and runs out of registers */
    __asm__ volatile("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(products) : "x"(w), "x"(x));
    return acc;
}
INLINE vec vec_from_whole(vec sums) { return _mm256_cvtepi32_ps(_mm256_castps_si256(sums)); }
INLINE void vec_store_words(void *p, vec x)
{
    __m256i whole = _mm256_cvtps_epi32(x);
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storeu_si128(p, _mm_shufflehi_epi16(_mm_shufflelo_epi16(words, 0xd8), 0xd8));
}
INLINE vec line_even(const void *p) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(p), 16)); }
/* The mask is read from memory every time: in a register, it would cost a tile of 6 rows two of its sums. */
static const uint32_t ODD_MASK[LANES] = {0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000,
                                         0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000};
INLINE vec line_odd(const void *p)
{
    const uint32_t *mask = ODD_MASK;
    HIDE(mask);
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i *)mask), _mm256_loadu_si256(p)));
}
typedef __m256i ivec;
#define QUAD_WORDS(bits) ((bits) == 4 ? 1 : 2)
INLINE ivec ivec_load(const void *p) { return _mm256_loadu_si256(p); }
INLINE ivec ivec_set(int32_t x) { return _mm256_set1_epi32(x); }
INLINE ivec ivec_add(ivec a, ivec b) { return _mm256_add_epi32(a, b); }
INLINE ivec ivec_low_halves(ivec x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
INLINE ivec ivec_high_halves(ivec x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
INLINE vec ivec_to_vec(ivec x) { return _mm256_cvtepi32_ps(x); }
INLINE void vec_round_bytes(vec x, int8_t *out)
{
    __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x), _mm256_setzero_si256());
    __m256i bytes = _mm256_packs_epi16(words, words);
    int32_t low = _mm256_extract_epi32(bytes, 0), high = _mm256_extract_epi32(bytes, 4);
    memcpy(out, &low, 4);
    memcpy(out + 4, &high, 4);
}
INLINE ivec ivec_dot(ivec acc, ivec w, const int32_t *x)
{
    __m256i even = _mm256_and_si256(w, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(w, 8);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(even, _mm256_set1_epi32(x[0])));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(odd, _mm256_set1_epi32(x[1])));
}
/* The same of quads of 4 bits at a signed quad of bytes, in sums of 16 bits, two to an output: HALF_QUADS of them fit. */
#define HALF_QUADS 8
INLINE ivec ivec_dot_halves(ivec acc, ivec w, const int32_t *x)
{
    return _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, _mm256_set1_epi32(x[0])));
}
INLINE ivec ivec_add_halves(ivec acc, ivec halves)
{
    return _mm256_add_epi32(acc, _mm256_madd_epi16(halves, _mm256_set1_epi16(1)));
}
INLINE void transpose_units_8x8(const char *const row[8], int64_t at, uint32_t *out)
{
    __m256i r[8], t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        r[i] = _mm256_loadu_si256((const __m256i *)(row[i] + at));
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        _mm256_storeu_si256((__m256i *)(out + c * PANEL), _mm256_permute2x128_si256(r[c], r[c + 4], 0x20));
        _mm256_storeu_si256((__m256i *)(out + (4 + c) * PANEL), _mm256_permute2x128_si256(r[c], r[c + 4], 0x31));
    }
}
INLINE void transpose_units(const char *const row[PANEL], int64_t at, uint32_t *out)
{
    for (int i = 0; i < PANEL; i += 8)
        for (int j = 0; j < PANEL; j += 8)
            transpose_units_8x8(row + i, at + j * 4, out + j * PANEL + i);
}

#else /* portable C: compilers make SSE2, NEON or whatever they know out of these loops */
#define LANES 4
#define ACCUMULATORS 12
typedef struct { float lane[LANES]; } vec;
#define EACH(expression) vec out; for (int i = 0; i < LANES; i++) out.lane[i] = (expression); return out
INLINE vec vec_load(const float *p) { EACH(p[i]); }
INLINE void vec_store(float *p, vec x) { memcpy(p, x.lane, sizeof x.lane); }
INLINE vec vec_set(float x) { EACH(x); }
INLINE vec vec_add(vec a, vec b) { EACH(a.lane[i] + b.lane[i]); }
INLINE vec vec_sub(vec a, vec b) { EACH(a.lane[i] - b.lane[i]); }
INLINE vec vec_mul(vec a, vec b) { EACH(a.lane[i] * b.lane[i]); }
INLINE vec vec_div(vec a, vec b) { EACH(a.lane[i] / b.lane[i]); }
INLINE vec vec_max(vec a, vec b) { EACH(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
INLINE vec vec_fma(vec a, vec b, vec c) { EACH(a.lane[i] * b.lane[i] + c.lane[i]); }
INLINE vec vec_unless_below(vec x, float limit, vec y) { EACH(x.lane[i] < limit ? 0.0f : y.lane[i]); }
/* For |x| < 2^22: adding 1.5 · 2^23 leaves no bits for a fraction. */
INLINE vec vec_round(vec x) { EACH((x.lane[i] + 12582912.0f) - 12582912.0f); }
INLINE vec vec_exp2i(vec n)
{
    vec out;
    for (int i = 0; i < LANES; i++) {
        uint32_t bits = (uint32_t)((int32_t)n.lane[i] + 127) << 23;
        memcpy(&out.lane[i], &bits, 4);
    }
    return out;
}
INLINE vec line_f16(const void *p)
{
    uint16_t h[LANES];
    memcpy(h, p, sizeof h);
    EACH(f16_to_f32(h[i]));
}
typedef struct { int16_t word[2 * LANES]; } words;
INLINE words words_of(vec x) { words w; memcpy(&w, &x, sizeof w); return w; }
INLINE vec line_words(const void *p, const int part)
{
    int8_t bytes[4 * LANES];
    words w;
    vec out;
    memcpy(bytes, p, sizeof bytes);
    for (int i = 0; i < 2 * LANES; i++)
        w.word[i] = bytes[2 * i + part];
    memcpy(&out, &w, sizeof out);
    return out;
}
INLINE vec vec_dot_words(vec w, vec x, vec acc)
{
    words a = words_of(w), b = words_of(x);
    int32_t sums[LANES];
    memcpy(sums, &acc, sizeof sums);
    for (int i = 0; i < LANES; i++)
        sums[i] += a.word[2 * i] * b.word[2 * i] + a.word[2 * i + 1] * b.word[2 * i + 1];
    memcpy(&acc, sums, sizeof acc);
    return acc;
}
INLINE vec vec_from_whole(vec sums)
{
    int32_t whole[LANES];
    memcpy(whole, &sums, sizeof whole);
    EACH((float)whole[i]);
}
INLINE void vec_store_words(void *p, vec x)
{
    vec whole = vec_round(x);
    int16_t words[LANES];
    for (int i = 0; i < LANES; i++)
        words[i / 4 * 4 + (i % 4 & 1) * 2 + i % 4 / 2] = (int16_t)whole.lane[i];
    memcpy(p, words, sizeof words);
}
INLINE vec line_even(const void *p)
{
    uint32_t w[LANES];
    memcpy(w, p, sizeof w);
    for (int i = 0; i < LANES; i++)
        w[i] <<= 16;
    vec out;
    memcpy(&out, w, sizeof out);
    return out;
}
INLINE vec line_odd(const void *p)
{
    uint32_t w[LANES];
    memcpy(w, p, sizeof w);
    for (int i = 0; i < LANES; i++)
        w[i] &= 0xffff0000u;
    vec out;
    memcpy(&out, w, sizeof out);
    return out;
}
typedef struct { uint32_t lane[LANES]; } ivec;
#define QUAD_WORDS(bits) ((void)(bits), 1)
#define EACH_WORD(expression) ivec out; for (int i = 0; i < LANES; i++) out.lane[i] = (expression); return out
INLINE ivec ivec_load(const void *p) { ivec out; memcpy(&out, p, sizeof out); return out; }
INLINE ivec ivec_set(int32_t x) { EACH_WORD((uint32_t)x); }
INLINE ivec ivec_add(ivec a, ivec b) { EACH_WORD(a.lane[i] + b.lane[i]); }
INLINE ivec ivec_low_halves(ivec x) { EACH_WORD(x.lane[i] & 0x0f0f0f0f); }
INLINE ivec ivec_high_halves(ivec x) { EACH_WORD(x.lane[i] >> 4 & 0x0f0f0f0f); }
INLINE vec ivec_to_vec(ivec x) { EACH((float)(int32_t)x.lane[i]); }
INLINE void vec_round_bytes(vec x, int8_t *out)
{
    vec whole = vec_round(x);
    for (int i = 0; i < LANES; i++)
        out[i] = (int8_t)whole.lane[i];
}
INLINE ivec ivec_dot(ivec acc, ivec w, const int32_t *x)
{
    int8_t quad[4];
    memcpy(quad, x, sizeof quad);
    EACH_WORD(acc.lane[i] + (w.lane[i] & 255) * (uint32_t)quad[0] + (w.lane[i] >> 8 & 255) * (uint32_t)quad[1] +
              (w.lane[i] >> 16 & 255) * (uint32_t)quad[2] + (w.lane[i] >> 24) * (uint32_t)quad[3]);
}
#undef EACH_WORD
INLINE void transpose_units(const char *const row[PANEL], int64_t at, uint32_t *out)
{
    for (int lane = 0; lane < PANEL; lane++)
        for (int i = 0; i < PANEL; i++)
            memcpy(out + i * PANEL + lane, row[lane] + at + i * 4, 4);
}
#undef EACH
#endif

#define VECTORS (PANEL / LANES)

#if LANES < 16
/* Below -126.5 the floor is taken for -127, of which vec_exp2i makes zero. In this order NaN stays. */
INLINE vec vec_floor(vec x) { return vec_round(vec_sub(vec_max(vec_set(-126.5f), x), vec_set(0.5f))); }
INLINE vec vec_fraction(vec x) { return vec_sub(vec_max(vec_set(-126.5f), x), vec_floor(x)); }
INLINE vec vec_scale2(vec x, vec y) { return vec_mul(x, vec_exp2i(vec_floor(y))); }
INLINE float vec_reduce_add(vec x)
{
    float lane[LANES];
    vec_store(lane, x);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            lane[i] += lane[i + half];
    return lane[0];
}
INLINE float vec_reduce_max(vec x)
{
    float lane[LANES], best;
    vec_store(lane, x);
    best = lane[0];
    for (int i = 1; i < LANES; i++)
        best = lane[i] > best ? lane[i] : best;
    return best;
}
#endif

/* Loops over `width` floats, LANES at a time; the tail goes through a zero-filled copy, so that every element sees
 * the same arithmetic wherever it stands. */
INLINE vec vec_load_tail(const float *p, int64_t count)
{
    float lane[LANES] = {0};
    memcpy(lane, p, (size_t)count * sizeof *p);
    return vec_load(lane);
}
INLINE void vec_store_tail(float *p, vec x, int64_t count)
{
    float lane[LANES];
    vec_store(lane, x);
    memcpy(p, lane, (size_t)count * sizeof *p);
}
INLINE vec vec_load_upto(const float *p, int64_t left) { return left >= LANES ? vec_load(p) : vec_load_tail(p, left); }
INLINE void vec_store_upto(float *p, vec x, int64_t left)
{
    if (left >= LANES)
        vec_store(p, x);
    else
        vec_store_tail(p, x, left);
}

#endif
