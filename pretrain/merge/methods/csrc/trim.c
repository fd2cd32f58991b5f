/* Histograms of the magnitudes of x - base, from which pretrain/merge/methods/sparsify.py finds exact thresholds. */
#ifndef REAL
#include "numbers.h"

/* Magnitude key: bits of abs(difference) as float; all NaN share one key above infinity. */
INLINE uint32_t key_of(float difference) {
    uint32_t key = bits32(difference) & 0x7FFFFFFF;
    return key < 0x7F800001 ? key : 0x7F800001;
}

#define REAL float
#define OF(name) name##_float
#include "trim.c"
#undef REAL
#undef OF
#define REAL double
#define OF(name) name##_double
#include "trim.c"
#else

INLINE void OF(keys)(
    const void *x, int x_dtype, const void *base, int base_dtype, size_t at, size_t length, uint32_t *restrict out) {
    REAL wide[TILE], other[TILE];
    widen(wide, x, x_dtype, at, length);
    widen(other, base, base_dtype, at, length);
    for (size_t i = 0; i < length; i++) out[i] = key_of((float)(wide[i] - other[i]));
}

/* Count keys whose upper half is `high`. Few keys have it, so eight keys are tested at once. */
INLINE void OF(within)(const uint32_t *restrict keys, size_t length, uint32_t high, uint32_t *histogram) {
    uint8_t in[TILE];
    uint64_t eight;
    for (size_t i = 0; i < length; i++) in[i] = keys[i] >> 16 == high;
    memset(in + length, 0, TILE - length);
    for (size_t i = 0; i < length; i += 8) {
        memcpy(&eight, in + i, 8);
        if (!eight) continue;
        for (size_t j = i; j < i + 8; j++)
            if (in[j]) histogram[keys[j] & 0xFFFF]++;
    }
}

/* Add keys to a histogram, [65536]: their upper halves, or for high >= 0 the lower halves of keys with that upper half.
 */
CLONES void OF(dromos_histogram)(
    const void *x, int x_dtype, const void *base, int base_dtype, size_t count, int high, uint32_t *histogram) {
    uint32_t keys[TILE];
    for (size_t at = 0; at < count; at += TILE) {
        size_t length = count - at < TILE ? count - at : TILE;
        OF(keys)(x, x_dtype, base, base_dtype, at, length, keys);
        if (high < 0)
            for (size_t i = 0; i < length; i++) histogram[keys[i] >> 16]++;
        else
            OF(within)(keys, length, (uint32_t)high, histogram);
    }
}

/* The index after the `rank`-th key equal to `key`, else `count`; `counted`: number of such keys before that index. */
CLONES size_t OF(dromos_place)(
    const void *x, int x_dtype, const void *base, int base_dtype, size_t count, uint32_t key, uint64_t rank,
    uint64_t *counted) {
    uint32_t keys[TILE];
    *counted = 0;
    for (size_t at = 0; at < count; at += TILE) {
        size_t length = count - at < TILE ? count - at : TILE;
        uint32_t equal = 0;
        OF(keys)(x, x_dtype, base, base_dtype, at, length, keys);
        for (size_t i = 0; i < length; i++) equal += keys[i] == key;
        if (*counted + equal < rank) {
            *counted += equal;
            continue;
        }
        for (size_t i = 0; i < length; i++)
            if (keys[i] == key && ++*counted == rank) return at + i + 1;
    }
    return count;
}
#endif
