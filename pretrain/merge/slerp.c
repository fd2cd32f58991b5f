/* x.x, y.y and x.y of blocks in fp64: products rounded, without FMA, added pairwise as numpy's add.reduce does. */
#include "numbers.h"

enum { LEAF = 128 }; /* numbers that are added in eight lanes; more are split in two */

INLINE double product(const double *restrict x, const double *restrict y, size_t count) {
    double lane[8], total = 0;
    size_t at = 0;
    if (count >= 8) {
        for (int j = 0; j < 8; j++) lane[j] = x[j] * y[j];
        for (at = 8; at + 8 <= count; at += 8)
            for (int j = 0; j < 8; j++) lane[j] = lane[j] + x[at + j] * y[at + j];
        total = ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
    }
    for (; at < count; at++) total = total + x[at] * y[at];
    return total;
}

CLONES void dromos_products(
    const void *x, int x_dtype, const void *y, int y_dtype, size_t from, size_t count, double *sums) {
    if (count > LEAF) {
        size_t half = count / 2 - count / 2 % 8;
        double other[3];
        dromos_products(x, x_dtype, y, y_dtype, from, half, sums);
        dromos_products(x, x_dtype, y, y_dtype, from + half, count - half, other);
        for (int i = 0; i < 3; i++) sums[i] = sums[i] + other[i];
        return;
    }
    double one[LEAF], two[LEAF];
    widen_double(one, x, x_dtype, from, count);
    widen_double(two, y, y_dtype, from, count);
    sums[0] = product(one, one, count);
    sums[1] = product(two, two, count);
    sums[2] = product(one, two, count);
}
