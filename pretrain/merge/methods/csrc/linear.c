/* sum_i w_i x_i in one pass, limited by memory bandwidth. Same bits as pretrain/merge/methods/compute.py: each product
 * is rounded to the accumulation type, then added in the order of the terms, without FMA; one rounding at the end.
 */
#ifndef REAL
#include "numbers.h"
#define REAL float
#define LINEAR dromos_linear_float
#include "linear.c"
#undef REAL
#undef LINEAR
#define REAL double
#define LINEAR dromos_linear_double
#include "linear.c"
#else

/* Returns 1 if an output is infinite or NaN. */
CLONES int LINEAR(
    const void *const *inputs, const int *dtypes, const double *factors, int terms, size_t count, void *out, int dtype) {
    REAL total[TILE], wide[TILE];
    int not_finite = 0;
    for (size_t at = 0; at < count; at += TILE) {
        size_t length = count - at < TILE ? count - at : TILE;
        for (int term = 0; term < terms; term++) {
            REAL factor = (REAL)factors[term];
            widen(wide, inputs[term], dtypes[term], at, length);
            if (term == 0)
                for (size_t i = 0; i < length; i++) total[i] = wide[i] * factor;
            else
                for (size_t i = 0; i < length; i++) total[i] = total[i] + wide[i] * factor;
        }
        not_finite |= narrow(total, out, dtype, at, length);
    }
    return not_finite;
}
#endif
