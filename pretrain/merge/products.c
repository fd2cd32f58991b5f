/* Products of any two of some vectors in fp64, block by block: what pretrain/merge/slerp.py and gram.py look at. Each
 * product rounded, without FMA, added pairwise as numpy's add.reduce does.
 */
#include "numbers.h"

enum { LEAF = 128, MOST = 16 }; /* numbers that are added in eight lanes, more are split in two; vectors */

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

CLONES void dromos_leaf(
    const void *const *vectors, const int *dtypes, int number, const void *base, int base_dtype, size_t from,
    size_t count, double *sums) {
    double wide[MOST][LEAF], under[LEAF];
    if (base) widen_double(under, base, base_dtype, from, count);
    for (int i = 0; i < number; i++) {
        widen_double(wide[i], vectors[i], dtypes[i], from, count);
        if (base)
            for (size_t at = 0; at < count; at++) wide[i][at] = wide[i][at] - under[at];
        for (int j = 0; j <= i; j++) *sums++ = product(wide[i], wide[j], count);
    }
}

/* Of `count` elements from number `from` on, of at most MOST vectors, each less the base unless that is NULL: x_i . x_j
 * for every i and every j up to i.
 */
void dromos_products(
    const void *const *vectors, const int *dtypes, int number, const void *base, int base_dtype, size_t from,
    size_t count, double *sums) {
    if (count <= LEAF) {
        dromos_leaf(vectors, dtypes, number, base, base_dtype, from, count, sums);
        return;
    }
    size_t half = count / 2 - count / 2 % 8;
    double other[MOST * (MOST + 1) / 2];
    dromos_products(vectors, dtypes, number, base, base_dtype, from, half, sums);
    dromos_products(vectors, dtypes, number, base, base_dtype, from + half, count - half, other);
    for (int i = 0; i < number * (number + 1) / 2; i++) sums[i] = sums[i] + other[i];
}
