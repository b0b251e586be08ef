/* Rounds matrices to few bits, number for number as engine/quantised.py does, which says why. */
#include "quantised.h"
#include "simd.h"

enum { MOST_INPUTS = 128, SUMS = 8 }; /* of a group; of a dot product at once, which would wait for itself else */

/* The nearest whole multiples of a scale within limits. */
static void divide(const float *x, int64_t count, uint16_t scale, float low, float high, float *out)
{
    float divisor = f16_to_f32(scale), factor = divisor != 0.0f ? 1.0f / divisor : 0.0f;
    for (int64_t i = 0; i < count; i += LANES)
        vec_store(out + i, vec_round(vec_mul(vec_load(x + i), vec_set(factor))));
    for (int64_t i = 0; i < count; i++)
        out[i] = out[i] < low ? low : out[i] > high ? high : out[i];
}

static double dot(const float *a, const float *b, int64_t count)
{
    double sum[SUMS] = {0.0};
    for (int64_t i = 0; i < count; i += SUMS)
        for (int j = 0; j < SUMS; j++)
            sum[j] += (double)a[i + j] * (double)b[i + j];
    for (int j = 1; j < SUMS; j++)
        sum[0] += sum[j];
    return sum[0];
}

static float largest_of(const float *x, int64_t count)
{
    float largest = 0.0f;
    for (int64_t i = 0; i < count; i++)
        largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
    return largest;
}

static uint16_t round_int8(const float *x, int64_t count, float *rounded)
{
    float largest = largest_of(x, count);
    uint16_t scale = f32_to_f16(largest / 127.0f);
    if (f16_to_f32(scale) * 127.5f < largest) /* of the smallest float16s the next is far away */
        scale++;
    divide(x, count, scale, -127.0f, 127.0f, rounded);
    return scale;
}

static uint16_t round_int4(const float *x, int64_t count, float *rounded)
{
    static const float shares[] = {0.85f, 0.95f, 1.05f};
    float largest = largest_of(x, count), tried[MOST_INPUTS];
    double least = INFINITY;
    uint16_t best = 0;
    int64_t at = 0;
    while (fabsf(x[at]) != largest)
        at++;
    for (int s = 0; s < 3; s++) {
        divide(x, count, f32_to_f16(x[at] / -8.0f * shares[s]), -8.0f, 7.0f, tried);
        double squares = dot(tried, tried, count);
        uint16_t fitted = f32_to_f16((float)(dot(x, tried, count) / (squares > 1.0 ? squares : 1.0)));
        divide(x, count, fitted, -8.0f, 7.0f, tried);
        double scale = f16_to_f32(fitted);
        double error = scale * (scale * dot(tried, tried, count) - 2.0 * dot(x, tried, count));
        if (error < least) {
            least = error;
            best = fitted;
            memcpy(rounded, tried, (size_t)count * sizeof *tried);
        }
    }
    return best;
}

void quantise_rows(const float *values, int32_t n, int32_t k, int32_t dtype, int32_t group, uint8_t *quants, uint16_t *scales)
{
    float x[MOST_INPUTS], rounded[MOST_INPUTS], zero = (float)quant_zero(dtype);
    for (int64_t row = 0; row < n; row++)
        for (int64_t first = 0; first < k; first += group) {
            int64_t count = min_i64(group, k - first);
            const float *from = values + row * k + first;
            for (int64_t i = 0; i < group; i++)
                x[i] = i < count ? from[i] : 0.0f;
            *scales++ = dtype == DTYPE_I8 ? round_int8(x, group, rounded) : round_int4(x, group, rounded);
            for (int64_t i = 0; i < count; i++)
                quants[row * k + first + i] = (uint8_t)(rounded[i] + zero);
        }
}
