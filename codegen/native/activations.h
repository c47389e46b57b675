// Activations on their way in and out: float16 and bfloat16 to float and back, and rounding to a low-bit grid.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace fxq {

// The magnitudes that activations are rounded to: multiples of 2^-mbits of their binade, of that of 2^lowest below it.
// Integers are multiples of 1 everywhere (mbits 23, lowest 23). max 0: no activations in this format.
struct Grid {
    int32_t mbits, lowest;
    float max;
};

struct Format {
    const char *name;
    int32_t bits;
    bool zero_point;
    const float *values; // [2^bits]
    Grid grid;
};

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// --- float16 and bfloat16 -------------------------------------------------------------------------------------------
static inline float from_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7FFF;
    if (rest < 0x0400) return of_bits(sign | bits_of((float)rest * 0x1p-24f)); // subnormal
    return of_bits(sign | ((rest << 13) + ((rest < 0x7C00 ? 112u : 224u) << 23)));
}

// To nearest, ties to even.
static inline uint16_t to_half(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
    if (rest > 0x7F800000) return (uint16_t)(sign | 0x7E00);
    if (rest >= 0x47800000) return (uint16_t)(sign | 0x7C00);                                   // 65536
    if (rest < 0x38800000) return (uint16_t)(sign | (bits_of(of_bits(rest) + 0.5f) - 0x3F000000)); // below 2^-14
    return (uint16_t)(sign | ((rest + 0xFFF + (rest >> 13 & 1) - (112u << 23)) >> 13));
}

static inline float from_bfloat(uint16_t high) { return of_bits((uint32_t)high << 16); }

static inline uint16_t to_bfloat(float value) {
    uint32_t bits = bits_of(value);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static inline void halves_to_floats(const uint16_t *from, int64_t count, float *to) {
    int64_t i = 0;
#ifdef __F16C__
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i))));
#endif
    for (; i < count; i++) to[i] = from_half(from[i]);
}

static inline void floats_to_halves(const float *from, int64_t count, uint16_t *to) {
    int64_t i = 0;
#ifdef __F16C__
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i *>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
    for (; i < count; i++) to[i] = to_half(from[i]);
}

static inline void bfloats_to_floats(const uint16_t *from, int64_t count, float *to) {
    for (int64_t i = 0; i < count; i++) to[i] = from_bfloat(from[i]);
}

static inline void floats_to_bfloats(const float *from, int64_t count, uint16_t *to) {
    for (int64_t i = 0; i < count; i++) to[i] = to_bfloat(from[i]);
}

// --- rounding to a grid ---------------------------------------------------------------------------------------------
// The nearest value of the grid, ties to the even code, saturating; NaN stays.
//
// Adding a power of two 2^23 times as large as the step between neighbours rounds to a multiple of the step, as any
// float addition does, and taking it away again leaves that multiple.
static inline float rounded(float ratio, const Grid &grid) {
    uint32_t bits = bits_of(ratio), sign = bits & 0x80000000u, rest = bits & 0x7FFFFFFF, most = bits_of(grid.max);
    if (rest > most && rest <= 0x7F800000) rest = most;
    uint32_t binade = rest & 0x7F800000, lowest = (uint32_t)(grid.lowest + 127) << 23;
    if (grid.mbits == 0 && binade >= lowest) { // neighbours are powers of two, and 1.5 times one the middle of two
        uint32_t fraction = rest & 0x007FFFFF, odd = (((rest - lowest) >> 23) + 1) & 1;
        if (rest <= most) rest = binade + (fraction + odd > 0x00400000 ? 1u << 23 : 0);
        return of_bits(sign | rest);
    }
    float step = of_bits((binade > lowest ? binade : lowest) + ((uint32_t)(23 - grid.mbits) << 23));
    return of_bits(sign | bits_of(of_bits(rest) + step - step));
}

// y = rounded(x / scale) * scale
static inline void fake_quantize(const float *x, int64_t count, float scale, const Grid &grid, float *y) {
    for (int64_t i = 0; i < count; i++) y[i] = rounded(x[i] / scale, grid) * scale;
}

// The largest magnitude of x and of `most`; NaN where there is one.
static inline float absmax(const float *x, int64_t count, float most) {
    uint32_t found = bits_of(most); // floats without their sign are ordered as integers, NaN above all
    for (int64_t i = 0; i < count; i++) {
        uint32_t rest = bits_of(x[i]) & 0x7FFFFFFF;
        found = rest > found ? rest : found;
    }
    return of_bits(found);
}

// The scale of a row: absmax / max, at least the smallest normal float; 1 for zeros. NaN and Inf give NaN and Inf.
static inline float dynamic_scale(float most, const Grid &grid) {
    float ideal = most / grid.max;
    return ideal == 0 ? 1.0f : ideal < 0x1p-126f ? 0x1p-126f : ideal;
}

} // namespace fxq
