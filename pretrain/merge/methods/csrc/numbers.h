/* Stored numbers, one tile at a time: widened exactly, rounded once to nearest even; same bits as
 * pretrain/weights/dtypes.py. Built with -ffp-contract=off and -fno-fast-math, which overrides -ffast-math in CFLAGS.
 */
#ifndef DROMOS_NUMBERS_H
#define DROMOS_NUMBERS_H
#include <float.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* FLT_EVAL_METHOD 16 concerns only 16-bit types, which are not used here. If the build fails, numpy computes merges. */
#if defined(__FAST_MATH__) || (FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16)
#error "every operation must be rounded to its own type"
#endif

enum { F64, F32, F16, BF16 };  /* indices of pretrain.weights.dtypes.FLOATS */
enum { TILE = 512 };           /* numbers per step; they stay in the L1 cache */
enum { LEAF = 128 };           /* longest pairwise sum that is not split in two */

/* A tensor may start at any byte of its file, so loads must not assume alignment. */
typedef uint16_t any16 __attribute__((aligned(1), may_alias));
typedef uint32_t any32 __attribute__((aligned(1), may_alias));
typedef uint64_t any64 __attribute__((aligned(1), may_alias));
typedef float any_float __attribute__((aligned(1), may_alias));
typedef double any_double __attribute__((aligned(1), may_alias));

/* Compiles an exported function for several vector widths; the processor's widest version runs. */
#ifndef CLONES
#if !defined(__x86_64__) || !defined(__GNUC__) || !defined(__gnu_linux__)
#define CLONES
#elif __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define CLONES __attribute__((target_clones("avx2", "default")))
#endif
#endif
#define INLINE static inline __attribute__((always_inline, unused))

INLINE uint32_t bits32(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE uint64_t bits64(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE double double_of(uint64_t bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE float from_bf16(uint16_t stored) { return float_of((uint32_t)stored << 16); }

/* Shift exponent and mantissa to their positions and correct the bias; a subtraction normalises subnormals. */
INLINE float from_f16(uint16_t stored) {
    uint32_t shifted = (uint32_t)(stored & 0x7FFF) << 13, exponent = shifted & 0x0F800000;
    uint32_t small = bits32(float_of(shifted + (113u << 23)) - float_of(113u << 23));
    uint32_t large = shifted + (exponent == 0x0F800000 ? 224u << 23 : 112u << 23);
    return float_of((exponent == 0 ? small : large) | (uint32_t)(stored & 0x8000) << 16);
}

/* Widen `length` numbers of `stored`, from number `at` on. */
INLINE void widen_float(float *restrict wide, const void *stored, int dtype, size_t at, size_t length) {
    if (dtype == BF16)
        for (size_t i = 0; i < length; i++) wide[i] = from_bf16(((const any16 *)stored + at)[i]);
    else if (dtype == F16)
        for (size_t i = 0; i < length; i++) wide[i] = from_f16(((const any16 *)stored + at)[i]);
}

INLINE void widen_double(double *restrict wide, const void *stored, int dtype, size_t at, size_t length) {
    if (dtype == BF16)
        for (size_t i = 0; i < length; i++) wide[i] = from_bf16(((const any16 *)stored + at)[i]);
    else if (dtype == F16)
        for (size_t i = 0; i < length; i++) wide[i] = from_f16(((const any16 *)stored + at)[i]);
    else if (dtype == F32)
        for (size_t i = 0; i < length; i++) wide[i] = ((const any_float *)stored + at)[i];
    else
        for (size_t i = 0; i < length; i++) wide[i] = ((const any_double *)stored + at)[i];
}

INLINE uint16_t bf16_of_float(float x) {
    uint32_t bits = bits32(x), rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

/* One addition rounds; dtypes._narrow_small explains the method. */
INLINE uint16_t f16_of_float(float x) {
    uint32_t bits = bits32(x), size = bits & 0x7FFFFFFF;
    uint32_t bounded = size < 143u << 23 ? size : 143u << 23, power = bounded & 0x7F800000;
    power = (power > 113u << 23 ? power : 113u << 23) + (13u << 23);
    uint32_t sum = bits32(float_of(bounded) + float_of(power)) + (power >> 13) - (126u << 10);
    return (uint16_t)(size > 0x7F800000 ? 0x7E00 : (sum & 0x7FFF) | (bits >> 16 & 0x8000));
}

INLINE uint16_t small_of_double(double x, int mantissa, int bias, uint16_t nan) {
    int shift = 52 - mantissa;
    uint64_t bits = bits64(x), size = bits & (UINT64_MAX >> 1), bias64 = 1023;
    uint64_t most = (bias64 + bias + 1) << 52, least = (bias64 + 1 - bias) << 52;
    uint64_t bounded = size < most ? size : most, power = bounded & (uint64_t)0x7FF << 52;
    power = (power > least ? power : least) + ((uint64_t)shift << 52);
    uint64_t sum = bits64(double_of(bounded) + double_of(power)) + (power >> shift) - ((shift + bias64 + 1 - bias) << mantissa);
    return (uint16_t)(size > (uint64_t)0x7FF << 52 ? nan : (sum & 0x7FFF) | (bits >> 48 & 0x8000));
}

/* Round `length` numbers to `out`, from number `at` on; every NaN becomes the same quiet NaN. Returns 1 if a number is
 * infinite or NaN.
 */
INLINE int narrow_float(const float *restrict total, void *out, int dtype, size_t at, size_t length) {
    uint32_t seen = 0; /* adding 1 to an exponent of all ones carries into the sign bit */
    if (dtype == BF16) {
        any16 *to = (any16 *)out + at;
        for (size_t i = 0; i < length; i++) {
            uint16_t rounded = bf16_of_float(total[i]);
            to[i] = rounded;
            seen |= (rounded & 0x7F80u) + 0x80u;
        }
        return (seen & 0x8000) != 0;
    }
    if (dtype == F16) {
        any16 *to = (any16 *)out + at;
        for (size_t i = 0; i < length; i++) {
            uint16_t rounded = f16_of_float(total[i]);
            to[i] = rounded;
            seen |= (rounded & 0x7C00u) + 0x400u;
        }
        return (seen & 0x8000) != 0;
    }
    for (size_t i = 0; i < length; i++) {
        uint32_t bits = bits32(total[i]);
        int nan = (bits & 0x7FFFFFFF) > 0x7F800000;
        seen |= (bits & 0x7F800000) + 0x800000;
        if (dtype == F32)
            ((any32 *)out + at)[i] = nan ? 0x7FC00000 : bits;
        else
            ((any64 *)out + at)[i] = nan ? (uint64_t)0x7FF8 << 48 : bits64(total[i]);
    }
    return (int)(seen >> 31);
}

INLINE int narrow_double(const double *restrict total, void *out, int dtype, size_t at, size_t length) {
    uint64_t seen = 0;
    if (dtype == F64) {
        any64 *to = (any64 *)out + at;
        for (size_t i = 0; i < length; i++) {
            uint64_t bits = bits64(total[i]), nan = (bits & (UINT64_MAX >> 1)) > (uint64_t)0x7FF << 52;
            to[i] = nan ? (uint64_t)0x7FF8 << 48 : bits;
            seen |= (bits & (uint64_t)0x7FF << 52) + ((uint64_t)1 << 52);
        }
        return (int)(seen >> 63);
    }
    if (dtype == F32) {
        any32 *to = (any32 *)out + at;
        for (size_t i = 0; i < length; i++) {
            uint32_t bits = bits32((float)total[i]);
            to[i] = (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC00000 : bits;
            seen |= (bits & 0x7F800000) + 0x800000;
        }
        return (seen & 0x80000000) != 0;
    }
    int mantissa = dtype == F16 ? 10 : 7, bias = dtype == F16 ? 15 : 127;
    uint16_t nan = dtype == F16 ? 0x7E00 : 0x7FC0, ones = dtype == F16 ? 0x7C00 : 0x7F80;
    any16 *to = (any16 *)out + at;
    for (size_t i = 0; i < length; i++) {
        uint16_t rounded = small_of_double(total[i], mantissa, bias, nan);
        to[i] = rounded;
        seen |= (uint32_t)(rounded & ones) + (1u << mantissa);
    }
    return (seen & 0x8000) != 0;
}

/* Sum of at most LEAF numbers in eight lanes, as numpy's add.reduce adds them. Callers split longer sums by `half`. */
INLINE double added(const double *restrict x, size_t count) {
    double lane[8], total = 0;
    size_t at = 0;
    if (count >= 8) {
        for (int j = 0; j < 8; j++) lane[j] = x[j];
        for (at = 8; at + 8 <= count; at += 8)
            for (int j = 0; j < 8; j++) lane[j] = lane[j] + x[at + j];
        total = ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
    }
    for (; at < count; at++) total = total + x[at];
    return total;
}

INLINE size_t half(size_t count) { return count / 2 - count / 2 % 8; }

/* For files that include themselves twice, once with REAL float and once with REAL double. */
#define widen(wide, ...) _Generic((wide), float *: widen_float, double *: widen_double)(wide, __VA_ARGS__)
#define narrow(total, ...) _Generic((total), float *: narrow_float, double *: narrow_double)(total, __VA_ARGS__)
#endif
