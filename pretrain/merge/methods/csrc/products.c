/* fp64 Gram matrices of blocks, for pretrain/merge/methods/gram.py. Each product is rounded, without FMA; sums are
 * pairwise, as in numpy's add.reduce.
 */
#include "numbers.h"

enum { MOST = 16 }; /* vectors */

CLONES void dromos_leaf(
    const void *const *vectors, const int *dtypes, int number, const void *base, int base_dtype, size_t from,
    size_t count, double *sums) {
    double wide[MOST][LEAF], base_wide[LEAF], product[LEAF];
    if (base) widen_double(base_wide, base, base_dtype, from, count);
    for (int i = 0; i < number; i++) {
        widen_double(wide[i], vectors[i], dtypes[i], from, count);
        if (base)
            for (size_t at = 0; at < count; at++) wide[i][at] = wide[i][at] - base_wide[at];
        for (int j = 0; j <= i; j++) {
            for (size_t at = 0; at < count; at++) product[at] = wide[i][at] * wide[j][at];
            *sums++ = added(product, count);
        }
    }
}

/* x_i . x_j for every i and every j <= i, over `count` elements from number `from` on, for at most MOST vectors. If
 * the base is not NULL, it is subtracted from each vector.
 */
void dromos_products(
    const void *const *vectors, const int *dtypes, int number, const void *base, int base_dtype, size_t from,
    size_t count, double *sums) {
    if (count <= LEAF) {
        dromos_leaf(vectors, dtypes, number, base, base_dtype, from, count, sums);
        return;
    }
    size_t first = half(count);
    double other[MOST * (MOST + 1) / 2];
    dromos_products(vectors, dtypes, number, base, base_dtype, from, first, sums);
    dromos_products(vectors, dtypes, number, base, base_dtype, from + first, count - first, other);
    for (int i = 0; i < number * (number + 1) / 2; i++) sums[i] = sums[i] + other[i];
}
