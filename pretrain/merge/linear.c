/* sum_i w_i x_i of bf16 numbers, as pretrain/merge/kernels.py computes it in many passes: each product rounded to fp32,
 * then added in the order given, without FMA (built with -ffp-contract=off); one rounding to nearest even at the end;
 * every NaN becomes the same quiet NaN. One pass: bound by reading and writing.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* A tensor begins where its file says, at odd bytes too. */
typedef uint16_t anywhere __attribute__((aligned(1), may_alias));

enum { TILE = 512 }; /* sums that stay in the first-level cache */

#if defined(__x86_64__) && defined(__GNUC__) && defined(__gnu_linux__)
#define CLONES __attribute__((target_clones("avx2", "default"), optimize("no-math-errno")))
#else
#define CLONES
#endif

CLONES void dromos_linear_bf16(
    const anywhere *const *inputs, const float *weights, int terms, size_t count, uint16_t *out) {
    float total[TILE];
    uint32_t bits[TILE];
    for (size_t at = 0; at < count; at += TILE) {
        size_t length = count - at < TILE ? count - at : TILE;
        for (int term = 0; term < terms; term++) {
            const anywhere *stored = inputs[term] + at;
            float weight = weights[term];
            float wide[TILE];
            for (size_t i = 0; i < length; i++) bits[i] = (uint32_t)stored[i] << 16;
            memcpy(wide, bits, sizeof(float) * length);
            if (term == 0)
                for (size_t i = 0; i < length; i++) total[i] = wide[i] * weight;
            else
                for (size_t i = 0; i < length; i++) total[i] = total[i] + wide[i] * weight;
        }
        memcpy(bits, total, sizeof(float) * length);
        for (size_t i = 0; i < length; i++) {
            uint32_t rounded = (bits[i] + 0x7FFF + (bits[i] >> 16 & 1)) >> 16;
            uint32_t nan = (bits[i] & 0x7FFFFFFF) > 0x7F800000 ? 0xFFFFFFFF : 0;
            out[at + i] = (uint16_t)((rounded & ~nan) | (0x7FC0 & nan));
        }
    }
}
