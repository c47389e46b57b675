// Products of float activations and packed weights: y[m][n] = sum over k of x[m][k] * W[n][k].
//
// Compiled once for every instruction set, in the namespace FXQ_ISA. The vector types are the compiler's own, so that one
// source serves AVX2, AVX-512, NEON and anything else; a format is a struct whose decode is printed from its layout
// (fxquant.decodings, units of 8 words side by side):
//
//     words   uint32 [N][blocks][WORDS][8]        decode: WORDS vectors -> SLICES vectors of 16 float16,
//     scale   float  [N][groups]                          slice s has columns 16 s .. 16 s + 15 of the block
//     zero    float  [N][groups] or null          W = (float16 - zero) * scale
//
// Every y[m][n] is summed by one thread, in an order that depends on nothing but the shape: the same bits for any number
// of threads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace FXQ_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16; // floats of a vector
constexpr int R = 6, C = 4; // rows of x and of W whose products are summed at once: R * C + C + 1 registers of 32
#else
constexpr int LANES = 8;
constexpr int R = 4, C = 3; // of 16 registers
#endif
constexpr int RUN = 8;     // words of a unit that lie side by side
constexpr int WIDTH = 16;  // columns of a slice
constexpr int VECTORS = WIDTH / LANES;
constexpr int AHEAD = 512; // words that are fetched before they are needed: 2 KB, farther than the CPU fetches by itself

typedef uint32_t loose_words __attribute__((vector_size(32), aligned(4)));
typedef uint32_t words __attribute__((vector_size(32)));
typedef uint16_t halves __attribute__((vector_size(32)));
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef float loose_floats __attribute__((vector_size(4 * LANES), aligned(4)));

struct Weight {
    const uint32_t *words;
    const float *scale, *zero;
    int64_t rows, blocks, groups, per_scale; // per_scale: slices that share a scale
};

static inline floats load(const float *from) { return *reinterpret_cast<const loose_floats *>(from); }
static inline void store(float *to, floats value) { *reinterpret_cast<loose_floats *>(to) = value; }
static inline floats all(float value) { return floats{} + value; }

static inline float sum(floats v) {
    float part[LANES];
    std::memcpy(part, &v, sizeof part);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}

#if !defined(__AVX512F__) && !(defined(__AVX2__) && defined(__F16C__)) && !defined(__aarch64__)
#define FXQ_BY_HAND 1 // no instruction for it: a function, since a copy of it at every place takes minutes to compile
#endif

// 16 float16, two a word, as floats in the same order
#ifdef FXQ_BY_HAND
__attribute__((noinline)) static void to_floats(words w, floats *to);
#else
static inline void to_floats(words w, floats *to);
#endif
static void to_floats(words w, floats *to) {
#if defined(__AVX512F__)
    to[0] = (floats)_mm512_cvtph_ps((__m256i)w);
#elif defined(__AVX2__) && defined(__F16C__)
    to[0] = (floats)_mm256_cvtph_ps(_mm256_castsi256_si128((__m256i)w));
    to[1] = (floats)_mm256_cvtph_ps(_mm256_extracti128_si256((__m256i)w, 1));
#elif defined(__aarch64__)
    float16x4_t h[4];
    std::memcpy(h, &w, sizeof h);
    float32x4_t f[4] = {vcvt_f32_f16(h[0]), vcvt_f32_f16(h[1]), vcvt_f32_f16(h[2]), vcvt_f32_f16(h[3])};
    std::memcpy(to, f, sizeof f);
#else
    uint16_t h[WIDTH];
    std::memcpy(h, &w, sizeof h);
    float f[WIDTH];
    for (int i = 0; i < WIDTH; i++) {
        const uint32_t one = 113u << 23;
        uint32_t bits = (uint32_t)(h[i] & 0x7FFF) << 13, exponent = bits & 0x0F800000u;
        float value, less = 0;
        if (exponent == 0) { // a subnormal, as (1 + m) - 1 in units of 2^-14
            bits += one;
            std::memcpy(&less, &one, sizeof less);
        } else {
            bits += exponent == 0x0F800000u ? 224u << 23 : 112u << 23;
        }
        std::memcpy(&value, &bits, sizeof value);
        f[i] = h[i] & 0x8000 ? less - value : value - less;
    }
    std::memcpy(to, f, sizeof f);
#endif
}

template <class Format> static inline const uint32_t *decode(const uint32_t *q, words *out) {
    words in[Format::WORDS];
    for (int i = 0; i < Format::WORDS; i++) in[i] = (words) * reinterpret_cast<const loose_words *>(q + i * RUN);
    Format::decode(in, out);
    return q + Format::WORDS * RUN;
}

// One row of x: what EVERY slices add up to is scaled at once.
template <class Format, int EVERY>
static void row(const Weight &w, const float *x, float *y, int64_t from, int64_t to) {
    for (int64_t n = from; n < to; n++) {
        const uint32_t *q = w.words + n * w.blocks * Format::WORDS * RUN;
        const float *scale = w.scale + n * w.groups, *xs = x;
        floats total[2]{};
        int64_t done = 0;
        for (int64_t block = 0; block < w.blocks; block++, xs += Format::SLICES * WIDTH) {
            words out[Format::SLICES];
            for (int line = 0; line < Format::WORDS * RUN; line += 16) __builtin_prefetch(q + AHEAD + line);
            q = decode<Format>(q, out);
#pragma GCC unroll 16
            for (int part = 0; part < Format::SLICES / EVERY; part++) {
                floats sums[2]{};
#pragma GCC unroll 16
                for (int s = part * EVERY; s < (part + 1) * EVERY; s++) {
                    floats value[VECTORS];
                    to_floats(out[s], value);
#pragma GCC unroll 2
                    for (int v = 0; v < VECTORS; v++)
                        sums[(s * VECTORS + v) % 2] += value[v] * load(xs + s * WIDTH + v * LANES);
                }
                total[part % 2] += (sums[0] + sums[1]) * *scale;
                if ((done += EVERY) == w.per_scale) done = 0, scale++;
            }
        }
        y[n] = sum(total[0] + total[1]);
    }
}

// The values of a block of a row: SLICES * WIDTH floats.
template <class Format> static inline void dense(const Weight &w, int64_t n, int64_t block, float *to) {
    words out[Format::SLICES];
    decode<Format>(w.words + (n * w.blocks + block) * Format::WORDS * RUN, out);
    int64_t at = n * w.groups + block * Format::SLICES / w.per_scale, done = block * Format::SLICES % w.per_scale;
#pragma GCC unroll 16
    for (int s = 0; s < Format::SLICES; s++) {
        floats value[VECTORS], scale = all(w.scale[at]), zero = w.zero ? all(w.zero[at]) : floats{};
        to_floats(out[s], value);
        for (int v = 0; v < VECTORS; v++) store(to + s * WIDTH + v * LANES, (value[v] - zero) * scale);
        if (++done == w.per_scale) done = 0, at++;
    }
}

// ROWS rows of x times COLS rows of values, both along k: what is summed are vectors, each added up at the end.
template <int ROWS, int COLS>
static inline void corner(const float *x, int64_t x_stride, const float *v, int64_t v_stride, int64_t count, float *y,
                          int64_t y_stride, bool first) {
    floats acc[ROWS][COLS]{};
    for (int64_t k = 0; k < count; k += LANES) {
        floats b[COLS];
#pragma GCC unroll 8
        for (int c = 0; c < COLS; c++) b[c] = load(v + c * v_stride + k);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            floats a = load(x + r * x_stride + k);
#pragma GCC unroll 8
            for (int c = 0; c < COLS; c++) acc[r][c] += a * b[c];
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLS; c++) y[r * y_stride + c] = (first ? 0.0f : y[r * y_stride + c]) + sum(acc[r][c]);
}

template <int COLS>
static inline void strip(const float *x, int64_t M, int64_t x_stride, const float *v, int64_t v_stride, int64_t count,
                         float *y, int64_t y_stride, bool first) {
    int64_t m = 0;
    for (; m + R <= M; m += R)
        corner<R, COLS>(x + m * x_stride, x_stride, v, v_stride, count, y + m * y_stride, y_stride, first);
    for (; m + 4 <= M; m += 4)
        corner<4, COLS>(x + m * x_stride, x_stride, v, v_stride, count, y + m * y_stride, y_stride, first);
    for (; m + 2 <= M; m += 2)
        corner<2, COLS>(x + m * x_stride, x_stride, v, v_stride, count, y + m * y_stride, y_stride, first);
    for (; m < M; m++)
        corner<1, COLS>(x + m * x_stride, x_stride, v, v_stride, count, y + m * y_stride, y_stride, first);
}

constexpr int64_t PANEL = 24;   // rows of W that are decoded at a time
constexpr int64_t DEPTH = 1024; // columns of them: a panel is 96 KB and stays in the second cache

// Several rows of x: panels of W are decoded to floats, then multiplied. ``panel`` holds PANEL * DEPTH floats.
template <class Format>
static void rows(const Weight &w, const float *x, int64_t M, int64_t x_stride, float *y, int64_t y_stride, int64_t from,
                 int64_t to, float *panel) {
    constexpr int64_t BLOCK = Format::SLICES * WIDTH, STEP = DEPTH / BLOCK;
    for (int64_t n = from; n < to; n += PANEL) {
        int64_t high = to - n < PANEL ? to - n : PANEL;
        for (int64_t block = 0; block < w.blocks; block += STEP) {
            int64_t wide = w.blocks - block < STEP ? w.blocks - block : STEP;
            for (int64_t i = 0; i < high; i++)
                for (int64_t j = 0; j < wide; j++) dense<Format>(w, n + i, block + j, panel + i * DEPTH + j * BLOCK);
            const float *xs = x + block * BLOCK;
            int64_t i = 0;
            for (; i + C <= high; i += C)
                strip<C>(xs, M, x_stride, panel + i * DEPTH, DEPTH, wide * BLOCK, y + n + i, y_stride, block == 0);
            for (; i < high; i++)
                strip<1>(xs, M, x_stride, panel + i * DEPTH, DEPTH, wide * BLOCK, y + n + i, y_stride, block == 0);
        }
    }
}

template <class Format>
static void product(const Weight &w, const float *x, int64_t M, int64_t x_stride, float *y, int64_t y_stride, int64_t from,
                    int64_t to, float *panel) {
    if (M == 1 && !w.zero) {
        constexpr int S = Format::SLICES;
        if (w.per_scale % S == 0) return row<Format, S>(w, x, y, from, to);
        if (S >= 8 && w.per_scale % (S / 2) == 0) return row<Format, (S >= 2 ? S / 2 : 1)>(w, x, y, from, to);
        if (S >= 8 && w.per_scale % (S / 4) == 0) return row<Format, (S >= 4 ? S / 4 : 1)>(w, x, y, from, to);
        return row<Format, 1>(w, x, y, from, to);
    }
    rows<Format>(w, x, M, x_stride, y, y_stride, from, to, panel);
}

} // namespace FXQ_ISA
