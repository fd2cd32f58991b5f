/* base + what is made of differences x_i - base, as pretrain/merge/methods.py computes it in many passes: each operation
 * rounded to the accumulation type, in the order of the terms, without FMA; one rounding at the end.
 */
#ifndef REAL
#include "numbers.h"

enum { LATTICE = 1 << 16 }; /* elements that share a key of pretrain.merge.dare */

/* One term, as pretrain.merge.fused.Difference lays it out.
 *
 * keys:     DARE's, of the lattices from that of the first element on; NULL where nothing is dropped.
 * cut, end: TIES' (pretrain.merge.ties.Cut); cut -1 where nothing is trimmed.
 * top, top_end: such a cut, of which what would stay goes; top -1 where nothing is too large.
 */
typedef struct {
    const void *stored;
    const uint64_t *keys;
    double factor, weight;
    int64_t cut, end, top, top_end;
    uint32_t below;
    int dtype;
} Term;

/* Whether DARE keeps an element: a keyed integer hash, constants of hash-prospector's lowbias32. */
INLINE int chosen(uint32_t number, uint64_t key, uint32_t below) {
    uint32_t mixed = number ^ (uint32_t)key;
    mixed = (mixed ^ mixed >> 16) * 0x7FEB352D;
    mixed = (mixed ^ mixed >> 15) * 0x846CA68B;
    mixed += (uint32_t)(key >> 32);
    return (mixed ^ mixed >> 16) < below;
}

/* Bits of the magnitude as float; every NaN above infinity, and none above another. */
INLINE int32_t key_of(float difference) {
    int32_t key = (int32_t)(bits32(difference) & 0x7FFFFFFF);
    return key < 0x7F800001 ? key : 0x7F800001;
}

/* How many elements of a tile lie before `end`. */
INLINE size_t before(int64_t end, uint64_t start, size_t length) {
    int64_t left = end - (int64_t)start;
    return left < 0 ? 0 : (uint64_t)left < length ? (size_t)left : length;
}

#define REAL float
#define OF(name) name##_float
#include "difference.c"
#undef REAL
#undef OF
#define REAL double
#define OF(name) name##_double
#include "difference.c"
#else

/* x - base, zero where it is dropped or trimmed; the tile begins at element `start` and lies within a lattice. */
INLINE void OF(difference)(
    const Term *term, const REAL *restrict base, uint64_t first, size_t at, size_t length, REAL *restrict out) {
    uint64_t start = first + at;
    widen(out, term->stored, term->dtype, at, length);
    for (size_t i = 0; i < length; i++) out[i] = out[i] - base[i];
    if (term->keys) {
        uint64_t key = term->keys[start / LATTICE - first / LATTICE];
        uint32_t number = (uint32_t)(start % LATTICE), below = term->below;
        for (size_t i = 0; i < length; i++) out[i] = chosen(number + (uint32_t)i, key, below) ? out[i] : (REAL)0;
    }
    if (term->cut >= 0) {
        int32_t above = (int32_t)term->cut;
        size_t equal = before(term->end, start, length);
        for (size_t i = 0; i < equal; i++) out[i] = key_of((float)out[i]) > above - 1 ? out[i] : (REAL)0;
        for (size_t i = equal; i < length; i++) out[i] = key_of((float)out[i]) > above ? out[i] : (REAL)0;
    }
    if (term->top >= 0) {
        int32_t above = (int32_t)term->top;
        size_t equal = before(term->top_end, start, length);
        for (size_t i = 0; i < equal; i++) out[i] = key_of((float)out[i]) > above - 1 ? (REAL)0 : out[i];
        for (size_t i = equal; i < length; i++) out[i] = key_of((float)out[i]) > above ? (REAL)0 : out[i];
    }
}

INLINE size_t OF(tile)(uint64_t first, size_t at, size_t count) {
    size_t left = count - at, lattice = LATTICE - (size_t)((first + at) % LATTICE);
    size_t length = left < lattice ? left : lattice;
    return length < TILE ? length : TILE;
}

/* base + sum_i f_i d_i of the elements from `first` on. Whether a number that was written is not finite. */
CLONES int OF(dromos_arithmetic)(
    const Term *terms, int number, const void *stored, int stored_dtype, uint64_t first, size_t count, void *out,
    int dtype) {
    REAL base[TILE], total[TILE], one[TILE];
    int strange = 0;
    for (size_t at = 0, length; at < count; at += length) {
        length = OF(tile)(first, at, count);
        widen(base, stored, stored_dtype, at, length);
        for (int term = 0; term < number; term++) {
            REAL factor = (REAL)terms[term].factor;
            OF(difference)(terms + term, base, first, at, length, one);
            if (term == 0)
                for (size_t i = 0; i < length; i++) total[i] = one[i] * factor;
            else
                for (size_t i = 0; i < length; i++) total[i] = total[i] + one[i] * factor;
        }
        for (size_t i = 0; i < length; i++) total[i] = base[i] + total[i];
        strange |= narrow(total, out, dtype, at, length);
    }
    return strange;
}

/* base + scale * elect_i(f_i d_i), where `divided` divided by the weights of those that agree (pretrain.merge.ties.elect).
 *
 * work: room for a tile of every term. Whether a number that was written is not finite.
 */
CLONES int OF(dromos_consensus)(
    const Term *terms, int number, const void *stored, int stored_dtype, uint64_t first, size_t count, void *out,
    int dtype, double scale, int divided, REAL *work) {
    REAL base[TILE], total[TILE], sign[TILE], share[TILE], factor, scaled = (REAL)scale;
    int strange = 0;
    for (size_t at = 0, length; at < count; at += length) {
        length = OF(tile)(first, at, count);
        widen(base, stored, stored_dtype, at, length);
        for (int term = 0; term < number; term++) {
            REAL *one = work + (size_t)term * TILE;
            OF(difference)(terms + term, base, first, at, length, one);
            factor = (REAL)terms[term].factor;
            for (size_t i = 0; i < length; i++) one[i] = one[i] * factor;
            if (term == 0)
                for (size_t i = 0; i < length; i++) total[i] = one[i];
            else
                for (size_t i = 0; i < length; i++) total[i] = total[i] + one[i];
        }
        for (size_t i = 0; i < length; i++) {
            sign[i] = total[i] >= 0 ? (REAL)1 : (REAL)-1;
            total[i] = share[i] = 0;
        }
        for (int term = 0; term < number; term++) {
            const REAL *one = work + (size_t)term * TILE;
            REAL weight = (REAL)terms[term].weight;
            for (size_t i = 0; i < length; i++) {
                REAL agreed = one[i] * sign[i];
                total[i] = total[i] + (agreed <= 0 ? (REAL)0 : agreed); /* NaN stays */
                share[i] = share[i] + (agreed > 0 ? weight : (REAL)0);
            }
        }
        if (divided)
            for (size_t i = 0; i < length; i++) total[i] = total[i] / (share[i] == 0 ? (REAL)1 : share[i]);
        for (size_t i = 0; i < length; i++) total[i] = base[i] + total[i] * sign[i] * scaled;
        strange |= narrow(total, out, dtype, at, length);
    }
    return strange;
}

/* |x - base|_1 of the whole difference, then of what is left of it, in fp64: of `count` elements from number `from` on,
 * at most LEAF of them.
 */
CLONES void OF(dromos_leaf_norms)(
    const Term *term, const void *stored, int stored_dtype, uint64_t first, size_t from, size_t count, double *sums) {
    REAL base[LEAF], one[LEAF];
    double size[LEAF];
    Term whole = *term;
    const Term *both[2] = {&whole, term};
    whole.keys = NULL;
    whole.cut = whole.top = -1;
    widen(base, stored, stored_dtype, from, count);
    for (int k = 0; k < 2; k++) {
        for (size_t at = 0, length; at < count; at += length) {
            length = OF(tile)(first, from + at, from + count);
            OF(difference)(both[k], base + at, first, from + at, length, one + at);
        }
        for (size_t i = 0; i < count; i++) size[i] = __builtin_fabs((double)one[i]);
        sums[k] = added(size, count);
    }
}

/* The same of any number of elements, added pairwise. */
void OF(dromos_norms)(
    const Term *term, const void *stored, int stored_dtype, uint64_t first, size_t from, size_t count, double *sums) {
    if (count <= LEAF) {
        OF(dromos_leaf_norms)(term, stored, stored_dtype, first, from, count, sums);
        return;
    }
    size_t some = half(count);
    double other[2];
    OF(dromos_norms)(term, stored, stored_dtype, first, from, some, sums);
    OF(dromos_norms)(term, stored, stored_dtype, first, from + some, count - some, other);
    sums[0] = sums[0] + other[0];
    sums[1] = sums[1] + other[1];
}
#endif
