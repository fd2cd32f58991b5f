/* Bicubic, antialiased resize of a box of RGB pixels, with the same bits as Pillow's Image.resize(size, BICUBIC, box).
 *
 * Pillow's rule: Keys' kernel with a = -1/2, stretched by the scale if the image shrinks; normalised weights in fixed
 * point with 22 fractional bits; first along rows, then along columns, with 8-bit values in between. All sums are in
 * integers, so that no machine, compiler or vector width changes a pixel. AVX2 multiplies 16-bit numbers, so a weight k
 * is split into k >> 11 and k & 2047, which loses no bit.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { BITS = 22, LOW = 11, PAD = 64, GROUP = 4 }; /* PAD: bytes after a row that vector loads and stores may touch */

typedef struct {
    int size, taps, groups; /* outputs; largest number of weights of an output; the same in groups of GROUP */
    int *first, *count;     /* per output: its first input, its number of inputs */
    int *weight;            /* [size][taps] */
    int16_t *halves;        /* [size][groups][2][GROUP]: high and low parts of the weights */
} Axis;

/* Keys' cubic convolution kernel, a = -1/2, in Pillow's order of operations. */
static double keys(double x) {
    x = fabs(x);
    if (x < 1.0) return ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * -0.5;
    return 0.0;
}

static void axis_free(Axis *axis) {
    free(axis->first);
    free(axis->count);
    free(axis->weight);
    free(axis->halves);
}

/* The weights of `size` outputs over [low, high) of `inputs` pixels. Returns 0 if there is no memory. */
static int axis_make(Axis *axis, int inputs, float low, float high, int size) {
    double scale = (double)(high - low) / size, stretch = scale < 1.0 ? 1.0 : scale;
    double support = 2.0 * stretch, inverse = 1.0 / stretch;
    int taps = (int)ceil(support) * 2 + 1;
    axis->size = size;
    axis->taps = taps;
    axis->groups = (taps + GROUP - 1) / GROUP;
    axis->first = malloc(sizeof(int) * size);
    axis->count = malloc(sizeof(int) * size);
    axis->weight = calloc((size_t)size * taps, sizeof(int));
    axis->halves = calloc((size_t)size * axis->groups * 2 * GROUP, sizeof(int16_t));
    double *exact = malloc(sizeof(double) * taps);
    if (!axis->first || !axis->count || !axis->weight || !axis->halves || !exact) {
        free(exact);
        return 0;
    }
    for (int at = 0; at < size; at++) {
        double center = low + (at + 0.5) * scale, sum = 0.0;
        int first = (int)(center - support + 0.5), last = (int)(center + support + 0.5);
        if (first < 0) first = 0;
        if (last > inputs) last = inputs;
        int count = last - first;
        for (int i = 0; i < count; i++) sum += exact[i] = keys((i + first - center + 0.5) * inverse);
        for (int i = 0; i < count; i++) {
            double part = sum != 0.0 ? exact[i] / sum : exact[i];
            int weight = (int)((part < 0 ? -0.5 : 0.5) + part * (1 << BITS));
            int16_t *half = axis->halves + ((size_t)at * axis->groups + i / GROUP) * 2 * GROUP + i % GROUP;
            axis->weight[(size_t)at * taps + i] = weight;
            half[0] = (int16_t)(weight >> LOW);
            half[GROUP] = (int16_t)(weight & ((1 << LOW) - 1));
        }
        axis->first[at] = first;
        axis->count[at] = count;
    }
    free(exact);
    return 1;
}

static inline uint8_t clip(int sum) {
    sum >>= BITS;
    return sum < 0 ? 0 : sum > 255 ? 255 : (uint8_t)sum;
}

/* One row of pixels to one row of outputs, reversed if `mirror`. */
static void across_plain(const Axis *axis, const uint8_t *row, uint8_t *out, int mirror) {
    for (int at = 0; at < axis->size; at++) {
        const uint8_t *pixel = row + 3 * (size_t)axis->first[at];
        const int *weight = axis->weight + (size_t)at * axis->taps;
        int red = 1 << (BITS - 1), green = red, blue = red;
        for (int i = 0; i < axis->count[at]; i++, pixel += 3) {
            red += pixel[0] * weight[i];
            green += pixel[1] * weight[i];
            blue += pixel[2] * weight[i];
        }
        uint8_t *to = out + 3 * (size_t)(mirror ? axis->size - 1 - at : at);
        to[0] = clip(red), to[1] = clip(green), to[2] = clip(blue);
    }
}

/* `count` rows, `stride` bytes apart, to one row of `width` bytes. */
static void down_plain(const uint8_t *rows, size_t stride, const int *weight, int count, uint8_t *out, int width) {
    for (int x = 0; x < width; x++) {
        int sum = 1 << (BITS - 1);
        for (int i = 0; i < count; i++) sum += rows[i * stride + x] * weight[i];
        out[x] = clip(sum);
    }
}

#if defined(__x86_64__)
/* across_plain for two rows, which share the loaded weights. Rows and outputs are followed by PAD bytes. */
__attribute__((target("avx2"))) static void across_avx2(
    const Axis *axis, const uint8_t *a, const uint8_t *b, uint8_t *out_a, uint8_t *out_b, int mirror) {
    const __m256i pairs = _mm256_setr_epi8(
        0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1,
        6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
    const __m256i spread = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    const __m128i half = _mm_set1_epi32(1 << (BITS - 1));
    int size = axis->size, groups = axis->groups;
    for (int to = 0; to < size; to++) { /* ascending: each store of 4 bytes overwrites a byte of the next pixel */
        int at = mirror ? size - 1 - to : to;
        size_t from = 3 * (size_t)axis->first[at];
        const int16_t *weight = axis->halves + (size_t)at * groups * 2 * GROUP;
        int used = (axis->count[at] + GROUP - 1) / GROUP;
        __m256i high_a = _mm256_setzero_si256(), low_a = high_a, high_b = high_a, low_b = high_a;
        for (int i = 0; i < used; i++, from += 3 * GROUP, weight += 2 * GROUP) {
            __m256i both = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)weight));
            __m256i high = _mm256_permutevar8x32_epi32(both, spread);
            __m256i low = _mm256_permutevar8x32_epi32(both, _mm256_add_epi32(spread, _mm256_set1_epi32(2)));
            __m256i of_a = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(a + from)));
            __m256i of_b = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(b + from)));
            of_a = _mm256_shuffle_epi8(of_a, pairs);
            of_b = _mm256_shuffle_epi8(of_b, pairs);
            high_a = _mm256_add_epi32(high_a, _mm256_madd_epi16(of_a, high));
            low_a = _mm256_add_epi32(low_a, _mm256_madd_epi16(of_a, low));
            high_b = _mm256_add_epi32(high_b, _mm256_madd_epi16(of_b, high));
            low_b = _mm256_add_epi32(low_b, _mm256_madd_epi16(of_b, low));
        }
        __m256i sum_a = _mm256_add_epi32(_mm256_slli_epi32(high_a, LOW), low_a);
        __m256i sum_b = _mm256_add_epi32(_mm256_slli_epi32(high_b, LOW), low_b);
        __m128i pixel_a = _mm_add_epi32(_mm256_castsi256_si128(sum_a), _mm256_extracti128_si256(sum_a, 1));
        __m128i pixel_b = _mm_add_epi32(_mm256_castsi256_si128(sum_b), _mm256_extracti128_si256(sum_b, 1));
        pixel_a = _mm_srai_epi32(_mm_add_epi32(pixel_a, half), BITS);
        pixel_b = _mm_srai_epi32(_mm_add_epi32(pixel_b, half), BITS);
        __m128i packed = _mm_packs_epi32(pixel_a, pixel_b);
        packed = _mm_packus_epi16(packed, packed);
        int one = _mm_cvtsi128_si32(packed), other = _mm_extract_epi32(packed, 1);
        memcpy(out_a + 3 * (size_t)to, &one, 4);
        memcpy(out_b + 3 * (size_t)to, &other, 4);
    }
}

/* down_plain, 16 bytes at a time. */
__attribute__((target("avx2"))) static void down_avx2(
    const uint8_t *rows, size_t stride, const int *weight, int count, uint8_t *out, int width) {
    int x = 0;
    for (; x + 16 <= width; x += 16) {
        __m256i left = _mm256_set1_epi32(1 << (BITS - 1)), right = left;
        const uint8_t *row = rows + x;
        for (int i = 0; i < count; i++, row += stride) {
            __m256i by = _mm256_set1_epi32(weight[i]);
            __m128i bytes = _mm_loadu_si128((const __m128i *)row);
            left = _mm256_add_epi32(left, _mm256_mullo_epi32(_mm256_cvtepu8_epi32(bytes), by));
            right = _mm256_add_epi32(
                right, _mm256_mullo_epi32(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)), by));
        }
        __m256i words = _mm256_packs_epi32(_mm256_srai_epi32(left, BITS), _mm256_srai_epi32(right, BITS));
        words = _mm256_permute4x64_epi64(words, 0xD8);
        __m256i packed = _mm256_packus_epi16(words, words);
        packed = _mm256_permute4x64_epi64(packed, 0xD8);
        _mm_storeu_si128((__m128i *)(out + x), _mm256_castsi256_si128(packed));
    }
    down_plain(rows + x, stride, weight, count, out + x, width - x);
}
#endif

/* Resizes the box [left, right) x [top, bottom) of an image of `height` rows of `width` pixels, `stride` bytes apart,
 * to `size` x `size`, mirrored left to right if `mirror`. `plain`: without vector instructions.
 * Returns 0, or 1 if there is no memory. */
int dromos_resize(
    const uint8_t *pixels, int width, int height, int64_t stride, float left, float top, float right, float bottom,
    uint8_t *out, int size, int mirror, int plain) {
    Axis columns = {0}, rows = {0};
    uint8_t *between = NULL, *lines = NULL;
    int failed = 1;
    if (axis_make(&columns, width, left, right, size) && axis_make(&rows, height, top, bottom, size)) {
        int first = rows.first[0], last = rows.first[size - 1] + rows.count[size - 1];
        size_t row = 3 * (size_t)size + PAD, line = 3 * (size_t)width + PAD;
        between = malloc(row * (last - first + 1));
        lines = calloc(2, line);
        if (between && lines) {
            failed = 0;
            int y = first;
#if defined(__x86_64__)
            int vectors = !plain && __builtin_cpu_supports("avx2");
            for (; vectors && y < last; y += 2) { /* copies with PAD bytes after them; an odd last row twice */
                memcpy(lines, pixels + y * stride, 3 * (size_t)width);
                memcpy(lines + line, pixels + (y + 1 < last ? y + 1 : y) * stride, 3 * (size_t)width);
                uint8_t *to = between + (y - first) * row;
                across_avx2(&columns, lines, lines + line, to, to + row, mirror);
            }
#endif
            for (; y < last; y++)
                across_plain(&columns, pixels + y * stride, between + (y - first) * row, mirror);
            for (y = 0; y < size; y++) {
                const uint8_t *from = between + (rows.first[y] - first) * row;
                const int *weight = rows.weight + (size_t)y * rows.taps;
                uint8_t *to = out + 3 * (size_t)size * y;
#if defined(__x86_64__)
                if (vectors)
                    down_avx2(from, row, weight, rows.count[y], to, 3 * size);
                else
#endif
                    down_plain(from, row, weight, rows.count[y], to, 3 * size);
            }
        }
    }
    free(between);
    free(lines);
    axis_free(&columns);
    axis_free(&rows);
    return failed;
}
