/* e^x and 2^x of vectors, the same polynomials on every ISA. */
#ifndef EXPONENTIALS_H
#define EXPONENTIALS_H

#include "simd.h"

/* e^x for x <= 88, within 2 ulp; 0 below -87, NaN for NaN. Cody–Waite reduction and the minimax polynomial of degree 6 that
 * Cephes' expf uses. */
INLINE vec vec_exp(vec x)
{
    vec clamped = vec_max(vec_set(-87.0f), x); /* in this order NaN stays */
    vec n = vec_round(vec_mul(clamped, vec_set(1.44269504089f)));
    vec r = vec_fma(n, vec_set(-0.693359375f), clamped);
    r = vec_fma(n, vec_set(2.12194440e-4f), r);
    vec p = vec_set(1.9875691500e-4f);
    p = vec_fma(p, r, vec_set(1.3981999507e-3f));
    p = vec_fma(p, r, vec_set(8.3334519073e-3f));
    p = vec_fma(p, r, vec_set(4.1665795894e-2f));
    p = vec_fma(p, r, vec_set(1.6666665459e-1f));
    p = vec_fma(p, r, vec_set(5.0000001201e-1f));
    p = vec_fma(vec_mul(r, r), p, vec_add(r, vec_set(1.0f)));
    return vec_unless_below(x, -87.0f, vec_mul(p, vec_exp2i(n)));
}

/* 2^x for x < 128, within 2e-7; 0 below -126 or further down, NaN for NaN. A minimax polynomial of degree 5. */
INLINE vec vec_exp2(vec x)
{
    vec r = vec_fraction(x), p = vec_set(1.8671300495e-3f);
    p = vec_fma(p, r, vec_set(9.0170307084e-3f));
    p = vec_fma(p, r, vec_set(5.5799912661e-2f));
    p = vec_fma(p, r, vec_set(2.4016444385e-1f));
    p = vec_fma(p, r, vec_set(6.9315129519e-1f));
    p = vec_fma(p, r, vec_set(1.0f));
    return vec_scale2(p, x);
}

#endif
