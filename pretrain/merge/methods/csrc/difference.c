/* Methods that add sparse task vectors to a base, in one pass. Same bits as pretrain/merge/methods/compute.py: each
 * operation is rounded to the accumulation type, in the order of the terms, without FMA; one rounding at the end.
 */
#ifndef REAL
#include "numbers.h"

enum { LATTICE = 1 << 16 }; /* elements that share a hash key: task_vectors.ELEMENTS_PER_KEY */

/* One sparse task vector; native.Difference has the same layout.
 *
 * keys:         DARE hash keys per lattice, from the lattice of the first element on; NULL keeps all entries.
 * below:        DARE keeps an element if its hash is below this number.
 * cut, end:     task_vectors.Threshold of the entries to keep; cut -1 keeps all.
 * top, top_end: task_vectors.Threshold of the largest entries to remove; top -1 removes none.
 */
typedef struct {
    const void *stored;
    const uint64_t *keys;
    double factor, weight;
    int64_t cut, end, top, top_end;
    uint32_t below;
    int dtype;
} Term;

/* True if DARE keeps an element: a keyed integer hash, lowbias32 of hash-prospector. */
INLINE int dare_keeps(uint32_t number, uint64_t key, uint32_t below) {
    uint32_t mixed = number ^ (uint32_t)key;
    mixed = (mixed ^ mixed >> 16) * 0x7FEB352D;
    mixed = (mixed ^ mixed >> 15) * 0x846CA68B;
    mixed += (uint32_t)(key >> 32);
    return (mixed ^ mixed >> 16) < below;
}

/* Magnitude key: bits of abs(difference) as float; all NaN share one key above infinity. */
INLINE int32_t key_of(float difference) {
    int32_t key = (int32_t)(bits32(difference) & 0x7FFFFFFF);
    return key < 0x7F800001 ? key : 0x7F800001;
}

/* Number of elements of a tile that come before `end`. */
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

/* x - base, zero where dropped or trimmed. The tile starts at element first + at and stays within one lattice. */
INLINE void OF(difference)(
    const Term *term, const REAL *restrict base, uint64_t first, size_t at, size_t length, REAL *restrict out) {
    uint64_t start = first + at;
    widen(out, term->stored, term->dtype, at, length);
    for (size_t i = 0; i < length; i++) out[i] = out[i] - base[i];
    if (term->keys) {
        uint64_t key = term->keys[start / LATTICE - first / LATTICE];
        uint32_t number = (uint32_t)(start % LATTICE), below = term->below;
        for (size_t i = 0; i < length; i++) out[i] = dare_keeps(number + (uint32_t)i, key, below) ? out[i] : (REAL)0;
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

/* base + sum_i f_i d_i, from element `first` on. Returns 1 if an output is infinite or NaN. */
CLONES int OF(dromos_arithmetic)(
    const Term *terms, int number, const void *stored, int stored_dtype, uint64_t first, size_t count, void *out,
    int dtype) {
    REAL base[TILE], total[TILE], entries[TILE];
    int not_finite = 0;
    for (size_t at = 0, length; at < count; at += length) {
        length = OF(tile)(first, at, count);
        widen(base, stored, stored_dtype, at, length);
        for (int term = 0; term < number; term++) {
            REAL factor = (REAL)terms[term].factor;
            OF(difference)(terms + term, base, first, at, length, entries);
            if (term == 0)
                for (size_t i = 0; i < length; i++) total[i] = entries[i] * factor;
            else
                for (size_t i = 0; i < length; i++) total[i] = total[i] + entries[i] * factor;
        }
        for (size_t i = 0; i < length; i++) total[i] = base[i] + total[i];
        not_finite |= narrow(total, out, dtype, at, length);
    }
    return not_finite;
}

/* base + scale * elected sum of f_i d_i (sparsify.elected_sum); `divided`: by the weights that agree in sign.
 *
 * work: memory of one tile per term. Returns 1 if an output is infinite or NaN.
 */
CLONES int OF(dromos_consensus)(
    const Term *terms, int number, const void *stored, int stored_dtype, uint64_t first, size_t count, void *out,
    int dtype, double scale, int divided, REAL *work) {
    REAL base[TILE], total[TILE], sign[TILE], share[TILE], factor, scaled = (REAL)scale;
    int not_finite = 0;
    for (size_t at = 0, length; at < count; at += length) {
        length = OF(tile)(first, at, count);
        widen(base, stored, stored_dtype, at, length);
        for (int term = 0; term < number; term++) {
            REAL *entries = work + (size_t)term * TILE;
            OF(difference)(terms + term, base, first, at, length, entries);
            factor = (REAL)terms[term].factor;
            for (size_t i = 0; i < length; i++) entries[i] = entries[i] * factor;
            if (term == 0)
                for (size_t i = 0; i < length; i++) total[i] = entries[i];
            else
                for (size_t i = 0; i < length; i++) total[i] = total[i] + entries[i];
        }
        for (size_t i = 0; i < length; i++) {
            sign[i] = total[i] >= 0 ? (REAL)1 : (REAL)-1;
            total[i] = share[i] = 0;
        }
        for (int term = 0; term < number; term++) {
            const REAL *entries = work + (size_t)term * TILE;
            REAL weight = (REAL)terms[term].weight;
            for (size_t i = 0; i < length; i++) {
                REAL agreed = entries[i] * sign[i];
                total[i] = total[i] + (agreed <= 0 ? (REAL)0 : agreed); /* keeps NaN */
                share[i] = share[i] + (agreed > 0 ? weight : (REAL)0);
            }
        }
        if (divided)
            for (size_t i = 0; i < length; i++) total[i] = total[i] / (share[i] == 0 ? (REAL)1 : share[i]);
        for (size_t i = 0; i < length; i++) total[i] = base[i] + total[i] * sign[i] * scaled;
        not_finite |= narrow(total, out, dtype, at, length);
    }
    return not_finite;
}

/* fp64 L1 norms of the full difference and of the sparse task vector, over `count` <= LEAF elements from `from` on. */
CLONES void OF(dromos_leaf_norms)(
    const Term *term, const void *stored, int stored_dtype, uint64_t first, size_t from, size_t count, double *sums) {
    REAL base[LEAF], entries[LEAF];
    double size[LEAF];
    Term whole = *term;
    const Term *both[2] = {&whole, term};
    whole.keys = NULL;
    whole.cut = whole.top = -1;
    widen(base, stored, stored_dtype, from, count);
    for (int k = 0; k < 2; k++) {
        for (size_t at = 0, length; at < count; at += length) {
            length = OF(tile)(first, from + at, from + count);
            OF(difference)(both[k], base + at, first, from + at, length, entries + at);
        }
        for (size_t i = 0; i < count; i++) size[i] = __builtin_fabs((double)entries[i]);
        sums[k] = added(size, count);
    }
}

/* The same for any number of elements, added pairwise. */
void OF(dromos_norms)(
    const Term *term, const void *stored, int stored_dtype, uint64_t first, size_t from, size_t count, double *sums) {
    if (count <= LEAF) {
        OF(dromos_leaf_norms)(term, stored, stored_dtype, first, from, count, sums);
        return;
    }
    size_t first_half = half(count);
    double other[2];
    OF(dromos_norms)(term, stored, stored_dtype, first, from, first_half, sums);
    OF(dromos_norms)(term, stored, stored_dtype, first, from + first_half, count - first_half, other);
    sums[0] = sums[0] + other[0];
    sums[1] = sums[1] + other[1];
}
#endif
