/* Floats as whole numbers of 16 bits, for products with a cache of bytes: what is lost is a 65,534th of the largest of
 * them. Bytes have lost a 254th of theirs. */
#ifndef WORDS_H
#define WORDS_H

#include "simd.h"

/* Numbers whose largest is below this are taken for zero, whatever they are multiplied by: what a word is worth, and what
 * it is divided by, stay in range. */
static const float LEAST_WORTH = 0x1p-100f;

/* The largest word: `count` of them times bytes stay below 2^31. */
INLINE float most_word(int64_t count) { return (float)min_i64(32767, (1 << 24) / max_i64(count, 1)); }

/* Rounds x [count] to words, in the order of vec_store_words and padded with zeros, at `words`, which may be x itself.
 * Returns what one of them is worth: NaN if their magnitudes do not add up to a finite number. */
INLINE float round_words(const float *x, int64_t count, void *words)
{
    vec most = vec_set(0.0f), sum = most;
    for (int64_t i = 0; i < count; i += LANES) {
        vec part = vec_load_upto(x + i, count - i), magnitude = vec_max(part, vec_sub(vec_set(0.0f), part));
        most = vec_max(most, magnitude);
        sum = vec_add(sum, magnitude);
    }
    float largest = vec_reduce_max(most), word = largest < LEAST_WORTH ? 0.0f : most_word(count);
    vec factor = vec_set(word > 0.0f ? word / largest : 0.0f);
    for (int64_t i = 0; i < count; i += LANES)
        vec_store_words((int16_t *)words + i, vec_mul(vec_load_upto(x + i, count - i), factor));
    return !isfinite(vec_reduce_add(sum)) ? NAN : word > 0.0f ? largest / word : 0.0f;
}

#endif
