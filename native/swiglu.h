#ifndef SWIGLU_H
#define SWIGLU_H

#include "exponentials.h"

/* silu(gate) · up, where silu(x) = x / (1 + e^-x); e^-x is kept below the overflow of floats. */
INLINE vec swiglu_of(vec gate, vec up)
{
    vec e = vec_exp(vec_sub(vec_set(0.0f), vec_max(vec_set(-87.0f), gate)));
    return vec_mul(vec_div(gate, vec_add(vec_set(1.0f), e)), up);
}

#endif
