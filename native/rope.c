#include "simd.h"

void rope_angles(const struct rope_angles *op, struct worker *me)
{
    int64_t half = op->angles_width / 2;
    struct range share = my_share(me, (int64_t)*op->rows * half);
    for (int64_t i = share.begin; i < share.end; i++) {
        int64_t row = i / half, j = i % half;
        double angle = (double)min_i64(op->pos[row], op->last_pos) * op->inv_freq[j];
        float *angles = op->angles + row * op->angles_width;
        angles[j] = (float)(cos(angle) * op->scaling);
        angles[half + j] = (float)(sin(angle) * op->scaling);
    }
}

void rope(const struct rope *op, struct worker *me)
{
    int64_t head_dim = op->angles_width, half = head_dim / 2, heads = op->x_width / head_dim;
    struct range share = my_share(me, *op->rows * heads);
    for (int64_t i = share.begin; i < share.end; i++) {
        int64_t row = i / heads;
        const float *first = op->x + row * op->x_stride + i % heads * head_dim, *second = first + half;
        float *out = op->out + row * op->out_stride + i % heads * head_dim;
        const float *cosine = op->angles + row * head_dim, *sine = cosine + half;
        for (int64_t j = 0; j < half; j += LANES) {
            int64_t left = half - j;
            vec a = vec_load_upto(first + j, left), b = vec_load_upto(second + j, left);
            vec c = vec_load_upto(cosine + j, left), s = vec_load_upto(sine + j, left);
            vec_store_upto(out + j, vec_sub(vec_mul(a, c), vec_mul(b, s)), left);
            vec_store_upto(out + half + j, vec_fma(b, c, vec_mul(a, s)), left);
        }
    }
}
