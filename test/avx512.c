/* What simd.h and amx.c take of AVX-512 and of AMX, each by itself: test_avx512.py compiles it like the libraries. */
#include "simd.h"

int has_vnni(void)
{
#ifdef __AVX512VNNI__
    return 1;
#else
    return 0;
#endif
}

/* Vectors of 16. */
void of_one(const char *name, const float *x, float *out)
{
    vec a = vec_load(x);
    if (!strcmp(name, "round"))
        a = vec_round(a);
    if (!strcmp(name, "fraction"))
        a = vec_fraction(a);
    if (!strcmp(name, "exp2i"))
        a = vec_exp2i(a);
    vec_store(out, a);
}
void of_two(const char *name, const float *x, const float *y, float *out)
{
    vec a = vec_load(x), b = vec_load(y);
    if (!strcmp(name, "max"))
        a = vec_max(a, b);
    else
        a = !strcmp(name, "scale2") ? vec_scale2(a, b) : vec_unless_below(a, 1.0f, b);
    vec_store(out, a);
}
void reductions(const float *x, float *sum, float *max)
{
    *sum = vec_reduce_add(vec_load(x));
    *max = vec_reduce_max(vec_load(x));
}
void round_bytes(const float *x, int8_t *out) { vec_round_bytes(vec_load(x), out); }
void dot_quads(int32_t *acc, const uint8_t *w, const int32_t *x)
{
    ivec sum = ivec_dot(ivec_load(acc), ivec_load(w), x);
    memcpy(acc, &sum, sizeof sum);
}
/* acc + a line of quads of bytes times a quad of 16 bits, x[0 .. 4]. */
void dot_words(int32_t *acc, const int8_t *line, const float *x)
{
    float words[LANES / 2];
    vec sum;
    vec_store_words(words, vec_load(x));
    memcpy(&sum, acc, sizeof sum);
    sum = vec_dot_words(line_words(line, 0), vec_set(words[0]), sum);
    sum = vec_dot_words(line_words(line, 1), vec_set(words[1]), sum);
    memcpy(acc, &sum, sizeof sum);
}
void transpose(const char *const *row, int64_t at, uint32_t *out) { transpose_units(row, at, out); }
#ifdef HALF_QUADS
void dot_halves(int32_t *acc, const uint8_t *w, const int32_t *x)
{
    ivec sum = ivec_add_halves(ivec_load(acc), ivec_dot_halves(ivec_set(0), ivec_load(w), x));
    memcpy(acc, &sum, sizeof sum);
}
#endif
#ifdef BF16_DOT
void dot_pairs(float *acc, const float *w, const float *x)
{
    vec_store(acc, vec_dot_bf16(vec_load(w), vec_load(x), vec_load(acc)));
}
void store_bf16(const float *x, uint16_t *out) { vec_store_bf16(out, vec_load(x)); }
#endif

#ifdef __AMX_BF16__
/* c[rows][64 bytes] (+)= a · b, with tiles of that shape; all have rows of `stride` bytes. Where `b_lines` is not what a
 * row of A has, hardware refuses. */
void multiply_tiles(int of_bytes, int rows, int lines, int b_lines, const void *a, const void *b, void *c,
                    int64_t stride, int add)
{
    struct { uint8_t palette, start, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config = {.palette = 1};
    memcpy(config.rows, (uint8_t[]){(uint8_t)rows, (uint8_t)rows, (uint8_t)b_lines}, 3);
    memcpy(config.row_bytes, (uint16_t[]){64, (uint16_t)(lines * 4), 64}, 6);
    __asm__ volatile("" : : "r"(&config), "r"(a), "r"(b), "r"(c) : "memory");
    _tile_loadconfig(&config);
    if (add)
        _tile_loadd(0, c, stride);
    else
        _tile_zero(0);
    _tile_loadd(1, a, stride);
    _tile_loadd(2, b, stride);
    if (of_bytes)
        _tile_dpbsud(0, 1, 2);
    else
        _tile_dpbf16ps(0, 1, 2);
    _tile_stored(0, c, stride);
    _tile_release();
    __asm__ volatile("" : : "r"(c) : "memory");
}
#endif
