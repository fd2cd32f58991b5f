/* sum_i w_i x_i as pretrain/merge/methods.py computes it in many passes: each product rounded to the accumulation type,
 * then added in the order given, without FMA; one rounding at the end. One pass: bound by reading and writing.
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

/* Whether a number that was written is not finite. */
CLONES int LINEAR(
    const void *const *inputs, const int *dtypes, const double *factors, int terms, size_t count, void *out, int dtype) {
    REAL total[TILE], wide[TILE];
    int strange = 0;
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
        strange |= narrow(total, out, dtype, at, length);
    }
    return strange;
}
#endif
