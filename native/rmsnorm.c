#include "simd.h"

static float sum_of_squares(const float *x, int64_t width)
{
    vec sum = vec_set(0.0f);
    for (int64_t i = 0; i < width; i += LANES) {
        vec v = vec_load_upto(x + i, width - i);
        sum = vec_fma(v, v, sum);
    }
    return vec_reduce_add(sum);
}

static void normalise(const float *x, const float *weight, float *out, int64_t width, float eps)
{
    vec scale = vec_set(1.0f / sqrtf(sum_of_squares(x, width) / (float)width + eps));
    for (int64_t i = 0; i < width; i += LANES) {
        vec v = vec_mul(vec_load_upto(x + i, width - i), scale);
        vec_store_upto(out + i, vec_mul(v, vec_load_upto(weight + i, width - i)), width - i);
    }
}

void rmsnorm(const struct rmsnorm *op, struct worker *me)
{
    struct range vectors = my_share(me, (int64_t)*op->rows * op->groups);
    for (int64_t i = vectors.begin; i < vectors.end; i++) {
        int64_t row = i / op->groups, group = i % op->groups;
        normalise(op->x + row * op->x_stride + group * op->weight_width, op->weight,
                  op->out + row * op->out_stride + group * op->weight_width, op->weight_width, op->eps);
    }
}

void add_rmsnorm(const struct add_rmsnorm *op, struct worker *me)
{
    struct range rows = my_share(me, *op->rows);
    int64_t width = op->weight_width;
    for (int64_t r = rows.begin; r < rows.end; r++) {
        float *x = op->x + r * op->x_stride;
        const float *delta = op->delta + r * op->delta_stride;
        for (int64_t i = 0; i < width; i += LANES)
            vec_store_upto(x + i, vec_add(vec_load_upto(x + i, width - i), vec_load_upto(delta + i, width - i)),
                           width - i);
        normalise(x, op->weight, op->out + r * op->out_stride, width, op->eps);
    }
}
