// From planes of bits to floats: a block of columns at a time, by tables of the format's numbers.
//
// A decoder gives the floats of a block in an order of its own, column(vector, lane); x is put into that order once. A
// number is looked up as the two upper bytes of a float (bfloat16: every format's numbers fit) where bytes can be looked
// up 64 at a time (AVX-512 VBMI), else it is made by shifts of a float16's fields, or read from a table.
#pragma once
#include "kernels.h"

namespace fxq {

constexpr int64_t AHEAD = 3072; // bytes from the beginning of a row to what is fetched while it is read

struct Row { // where the planes of a row begin
    const uint8_t *plane8, *plane4, *plane2, *plane1;
    int64_t cols;
    const uint8_t *later; // what is fetched while the row is read: a row's bytes in their order from here on, or null
    int64_t ahead;        // then: bytes from what is read of a plane to what is fetched of it
};

static inline Row row_of(const Weight &w, int64_t n) {
    const int64_t bytes = row_bytes(w.bits, w.cols);
    const uint8_t *at = w.packed + n * bytes;
    Row row{at, at, at, at, w.cols, at + AHEAD, 2 * bytes};
    const uint8_t **planes[] = {&row.plane8, &row.plane4, &row.plane2, &row.plane1};
    const int widths[] = {8, 4, 2, 1};
    for (int i = 0; i < 4; i++)
        if (has_plane(w.bits, widths[i])) *planes[i] = at, at += ceil_div(w.cols * widths[i], 8);
    return row;
}

// The same where only some columns of many rows are read.
static inline Row part_of_row(const Weight &w, int64_t n) {
    Row row = row_of(w, n);
    row.later = nullptr;
    return row;
}

// What is made of a format's numbers, once a product.
struct alignas(64) Tables {
    uint16_t words[256]; // the upper bytes of the float of every code; codes repeat beyond 2^bits
    uint8_t high[256], low[256];
    float values[256];
    bool upper;                  // no float has a bit below those two bytes
    int shift = -1;              // of 8 bits, by which a code has the fields of a float16, the number / factor
    float factor = 1;
    int nan = -1;                // the magnitude that is not a number, though the float16 is

    Tables(const float *numbers, int bits) : upper(true) {
        for (int i = 0; i < 256; i++) {
            values[i] = numbers[i & ((1 << bits) - 1)];
            const uint32_t float_bits = bits_of(values[i]);
            words[i] = (uint16_t)(float_bits >> 16);
            high[i] = (uint8_t)(float_bits >> 24), low[i] = (uint8_t)(float_bits >> 16);
            upper = upper && !(float_bits & 0xFFFF);
        }
    }

    bool find_shift() { // E5M2 has its mantissa 8 bits below, E4M3 7, ...
        nan = values[127] != values[127] && values[126] == values[126] ? 127 : -1;
        for (int up = 2; shift < 0 && up < 10; up++) {
            factor = values[64] / from_half((uint16_t)(64 << up));
            if (shifted(up)) shift = up;
        }
        return shift >= 0;
    }

    bool mirrored() const { // the upper half is the lower one with the sign
        for (int i = 0; i < 128; i++)
            if (words[i + 128] != (words[i] | 0x8000) || words[i] & 0x8000) return false;
        return true;
    }

    bool shifted(int up) const {
        for (int i = 0; i < 256; i++) {
            const float is = from_half((uint16_t)((i & 0x80) << 8 | (i & 0x7F) << up)) * factor;
            if ((i & 0x7F) == nan ? values[i] == values[i] : std::memcmp(&is, &values[i], 4)) return false;
        }
        return true;
    }

    bool whole(bool is_signed) const {
        for (int i = 0; i < 256; i++)
            if (values[i] != (float)(is_signed ? (int8_t)i : i)) return false;
        return true;
    }
};

// Fetches some of what will be read: the CPU does not foresee planes side by side.
template <int BITS> static FXQ_INLINE void fetch(const Row &row, int64_t block, int columns) {
    if (row.later) {
        for (int at = 0; at < columns * BITS / 8; at += 64) __builtin_prefetch(row.later + block * columns * BITS / 8 + at);
        return;
    }
    const uint8_t *planes[] = {row.plane8, row.plane4, row.plane2, row.plane1};
    const int widths[] = {8, 4, 2, 1};
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        if (has_plane(BITS, widths[i])) __builtin_prefetch(planes[i] + block * columns * widths[i] / 8 + row.ahead);
}

#if FXQ_AVX512

// The codes of a block: 64 a vector, of 128 columns those with an even number and those with an odd one; what is above
// a code's bits is anything. 8 bits: 64 columns.
template <int BITS> struct Codes {
    static constexpr int VECTORS = BITS == 8 ? 1 : 2, BLOCK = 64 * VECTORS;
    __m512i pairs[2], singles[2]; // where a lane finds its bits of the planes of 2 and of 1 among 64 of their bits

    Codes() {
        const int two = BITS & 4, one = two + (BITS & 2);
        uint8_t p[2][64], s[2][64];
        for (int v = 0; v < 2; v++)
            for (int lane = 0; lane < 64; lane++) {
                p[v][lane] = (uint8_t)((4 * (lane % 8) + 2 * v - two) & 63);
                s[v][lane] = (uint8_t)((2 * (lane % 8) + v - one) & 63);
            }
        for (int v = 0; v < 2; v++) pairs[v] = _mm512_loadu_si512(p[v]), singles[v] = _mm512_loadu_si512(s[v]);
    }

    FXQ_INLINE void operator()(const Row &row, int64_t block, __m512i *c) const {
        fetch<BITS>(row, block, BLOCK);
        const int64_t left = row.cols - block * BLOCK; // what is beyond them is not read
        auto mask = [&](int width) {
            return __builtin_expect(left >= BLOCK, 1) ? ~0ull : ~0ull >> (64 - ceil_div(left * width, 8));
        };
        if constexpr (BITS == 8) return void(c[0] = _mm512_maskz_loadu_epi8(mask(8), row.plane8 + block * 64));
        int at = 0;
        auto put = [&](__m512i a, __m512i b) { // those bits above the ones that are there
            if (at == 0) {
                c[0] = a, c[1] = b;
            } else {
                const __m512i below = _mm512_set1_epi8((char)((1 << at) - 1));
                c[0] = _mm512_ternarylogic_epi32(below, c[0], a, 0xCA);
                c[1] = _mm512_ternarylogic_epi32(below, c[1], b, 0xCA);
            }
        };
        if constexpr (has_plane(BITS, 4)) {
            __m512i both = _mm512_maskz_loadu_epi8(mask(4), row.plane4 + block * 64);
            put(both, _mm512_srli_epi16(both, 4));
            at += 4;
        }
        if constexpr (has_plane(BITS, 2)) {
            __m256i bits = _mm256_maskz_loadu_epi8((__mmask32)mask(2), row.plane2 + block * 32);
            __m512i wide = _mm512_cvtepu32_epi64(bits);
            put(_mm512_multishift_epi64_epi8(pairs[0], wide), _mm512_multishift_epi64_epi8(pairs[1], wide));
            at += 2;
        }
        if constexpr (has_plane(BITS, 1)) {
            __m128i bits = _mm_maskz_loadu_epi8((__mmask16)mask(1), row.plane1 + block * 16);
            __m512i wide = _mm512_cvtepu16_epi64(bits);
            put(_mm512_multishift_epi64_epi8(singles[0], wide), _mm512_multishift_epi64_epi8(singles[1], wide));
        }
    }
};

// The two upper bytes of the float of every code: of 64 codes two vectors of words, from bytes with an even and with an
// odd number. A look-up takes as many bits of an index as it needs, whatever is above them. MIRRORED: the highest bit of
// 8 is the sign of a float, and the other 7 are looked up.
template <int BITS, bool MIRRORED = false> struct Upper {
    static constexpr int PARTS = BITS < 6 ? 1 : BITS < 8 || MIRRORED ? 2 : 4;
    __m512i part[PARTS], more[PARTS]; // words; for 7 and 8 bits the higher byte, and the lower

    explicit Upper(const Tables &t) {
        for (int i = 0; i < PARTS; i++)
            if (BITS < 7) {
                part[i] = more[i] = _mm512_loadu_si512(t.words + 32 * i);
            } else {
                part[i] = _mm512_loadu_si512(t.high + 64 * i), more[i] = _mm512_loadu_si512(t.low + 64 * i);
            }
    }

    static FXQ_INLINE __m512i bytes(const __m512i *table, __m512i c) {
        const __m512i found = _mm512_permutex2var_epi8(table[0], c, table[1]);
        if constexpr (PARTS == 4)
            return _mm512_mask_mov_epi8(found, _mm512_movepi8_mask(c),
                                        _mm512_permutex2var_epi8(table[2], c, table[PARTS - 1]));
        return found;
    }

    FXQ_INLINE void operator()(__m512i c, __m512i *words) const {
        if constexpr (BITS < 6) {
            words[0] = _mm512_permutexvar_epi16(c, part[0]);
            words[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(c, 8), part[0]);
        } else if constexpr (BITS == 6) {
            words[0] = _mm512_permutex2var_epi16(part[0], c, part[1]);
            words[1] = _mm512_permutex2var_epi16(part[0], _mm512_srli_epi16(c, 8), part[1]);
        } else {
            __m512i high = bytes(part, c), low = bytes(more, c);
            if (MIRRORED) high = _mm512_ternarylogic_epi32(high, c, _mm512_set1_epi8((char)0x80), 0xF8); // | c & 0x80
            const __m512i lower = _mm512_set1_epi16(0x00FF);
            words[0] = _mm512_ternarylogic_epi32(lower, low, _mm512_slli_epi16(high, 8), 0xCA);
            words[1] = _mm512_ternarylogic_epi32(lower, _mm512_srli_epi16(low, 8), high, 0xCA);
        }
    }
};

// Of every decoder here a lane has BLOCK / LANES neighbouring columns: vectors 4 i + b come from byte b of a lane's four
// bytes of code vector i.
template <int BITS> struct Lanes {
    static constexpr int BLOCK = Codes<BITS>::BLOCK, VECTORS = BLOCK / LANES, HALVES = 1;
    static constexpr int column(int v, int lane) { return (4 * lane + v % 4) * Codes<BITS>::VECTORS + v / 4; }
    static constexpr int half_of(int) { return 0; }
};

// By the two upper bytes.
template <int BITS, bool MIRRORED = false> struct ByUpper : Lanes<BITS> {
    Codes<BITS> codes;
    Upper<BITS, MIRRORED> upper;

    explicit ByUpper(const Tables &t) : upper(t) {}

    FXQ_INLINE void operator()(const Row &row, int64_t block, floats *out) const {
        __m512i c[2], words[2];
        codes(row, block, c);
        const __m512i mask = _mm512_set1_epi32((int)0xFFFF0000);
#pragma GCC unroll 2
        for (int i = 0; i < Codes<BITS>::VECTORS; i++) {
            upper(c[i], words); // of each four bytes: 0 and 2, 1 and 3
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; odd++) {
                out[4 * i + odd] = (floats)_mm512_slli_epi32(words[odd], 16);
                out[4 * i + 2 + odd] = (floats)_mm512_and_si512(words[odd], mask);
            }
        }
    }
};

// 8 bits: whole numbers, in two's complement or without a sign.
template <bool SIGNED> struct ByWhole : Lanes<8> {
    Codes<8> codes;

    explicit ByWhole(const Tables &) {}

    FXQ_INLINE void operator()(const Row &row, int64_t block, floats *out) const {
        __m512i c;
        codes(row, block, &c);
        const __m512i mask = _mm512_set1_epi32(0xFF);
#pragma GCC unroll 4
        for (int b = 0; b < 4; b++)
            out[b] = (floats)_mm512_cvtepi32_ps(
                SIGNED ? _mm512_srai_epi32(b == 3 ? c : _mm512_slli_epi32(c, 24 - 8 * b), 24)
                       : _mm512_and_si512(b == 0 ? c : _mm512_srli_epi32(c, 8 * b), mask));
    }
};

// Any floats.
template <int BITS> struct ByGather : Lanes<BITS> {
    Codes<BITS> codes;
    const Tables &tables;
    const __m512 first; // of 4 bits and fewer all of them

    explicit ByGather(const Tables &t) : tables(t), first(_mm512_loadu_ps(t.values)) {}

    FXQ_INLINE void operator()(const Row &row, int64_t block, floats *out) const {
        __m512i c[2];
        codes(row, block, c);
#pragma GCC unroll 8
        for (int v = 0; v < Lanes<BITS>::VECTORS; v++) {
            __m512i index = _mm512_srli_epi32(c[v / 4], 8 * (v % 4));
            if constexpr (BITS <= 4) out[v] = (floats)_mm512_permutexvar_ps(index, first);
            else out[v] = (floats)_mm512_i32gather_ps(_mm512_and_si512(index, _mm512_set1_epi32(255)), tables.values, 4);
        }
    }
};

#else

// Codes of 32 columns as bytes, in their order.
template <int BITS> static FXQ_INLINE void codes_of(const Row &row, int64_t block, uint8_t *c) {
    constexpr int COUNT = 32;
    const int64_t left = least(row.cols - block * COUNT, COUNT);
    fetch<BITS>(row, block, COUNT);
    uint8_t part[COUNT]{}; // of the row's last columns, and zeros
    auto plane = [&](const uint8_t *begin, int width) {
        const uint8_t *from = begin + block * COUNT * width / 8;
        if (__builtin_expect(left == COUNT, 1)) return from;
        std::memcpy(part, from, (size_t)ceil_div(left * width, 8));
        return (const uint8_t *)part;
    };
    if constexpr (BITS == 8) return void(std::memcpy(c, plane(row.plane8, 8), COUNT));
    int at = 0;
#if FXQ_AVX2
    __m256i found = _mm256_setzero_si256();
    const __m256i lanes = _mm256_setr_epi64x(0x0101010100000000, 0x0303030302020202, 0x0505050504040404,
                                             0x0707070706060606);
    auto bit = [&](__m256i bytes, __m256i which, int to) {
        const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, which), which);
        found = _mm256_or_si256(found, _mm256_and_si256(set, _mm256_set1_epi8((char)(1 << to))));
    };
    if constexpr (has_plane(BITS, 4)) {
        const __m128i both = _mm_loadu_si128((const __m128i *)plane(row.plane4, 4)), mask = _mm_set1_epi8(15);
        const __m128i low = _mm_and_si128(both, mask), high = _mm_and_si128(_mm_srli_epi16(both, 4), mask);
        found = _mm256_set_m128i(_mm_unpackhi_epi8(low, high), _mm_unpacklo_epi8(low, high));
        at = 4;
    }
    if constexpr (has_plane(BITS, 2)) {
        int64_t bits;
        std::memcpy(&bits, plane(row.plane2, 2), sizeof bits);
        const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi64x(bits), lanes);
        bit(bytes, _mm256_set1_epi32(0x40100401), at), bit(bytes, _mm256_set1_epi32((int)0x80200802), at + 1);
        at += 2;
    }
    if constexpr (has_plane(BITS, 1)) {
        int32_t bits;
        std::memcpy(&bits, plane(row.plane1, 1), sizeof bits);
        const __m256i lanes8 = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        bit(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), lanes8), _mm256_set1_epi64x((int64_t)0x8040201008040201), at);
    }
    _mm256_storeu_si256((__m256i *)c, found);
#else
    if constexpr (has_plane(BITS, 4)) {
        const uint8_t *bytes = plane(row.plane4, 4);
        for (int i = 0; i < COUNT / 2; i++) c[2 * i] = bytes[i] & 15, c[2 * i + 1] = bytes[i] >> 4;
        at = 4;
    }
    if constexpr (has_plane(BITS, 2)) {
        const uint8_t *bytes = plane(row.plane2, 2);
        for (int i = 0; i < COUNT; i++)
            c[i] = (uint8_t)((at ? c[i] : 0) | (bytes[i / 4] >> 2 * (i % 4) & 3) << at);
        at += 2;
    }
    if constexpr (has_plane(BITS, 1)) {
        const uint8_t *bytes = plane(row.plane1, 1);
        for (int i = 0; i < COUNT; i++) c[i] = (uint8_t)(c[i] | (bytes[i / 8] >> i % 8 & 1) << at);
    }
#endif
}

#if FXQ_AVX2
// Bytes of a table by codes of up to 6 bits: one look-up for each 16 entries.
template <int BITS> struct Lookup16 {
    static constexpr int PARTS = BITS <= 4 ? 1 : 1 << (BITS - 4);
    __m256i part[PARTS];

    explicit Lookup16(const uint8_t *table) {
        for (int i = 0; i < PARTS; i++)
            part[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(table + 16 * i)));
    }

    FXQ_INLINE __m256i operator()(__m256i c) const { // codes have no bit above 2^6, so that the highest bit is clear
        if constexpr (PARTS == 1) return _mm256_shuffle_epi8(part[0], c);
        const __m256i fifth = _mm256_slli_epi16(c, 3);
        const __m256i low = _mm256_blendv_epi8(_mm256_shuffle_epi8(part[0], c), _mm256_shuffle_epi8(part[1], c), fifth);
        if constexpr (PARTS == 2) return low;
        const __m256i high = _mm256_blendv_epi8(_mm256_shuffle_epi8(part[PARTS / 2], c),
                                                _mm256_shuffle_epi8(part[PARTS - 1], c), fifth);
        return _mm256_blendv_epi8(low, high, _mm256_slli_epi16(c, 2));
    }
};

// By the two upper bytes. Vectors 2 h + odd: of the 16 bytes of each half, 8 h and the 7 after it, those with an even and
// an odd number.
template <int BITS> struct ByUpper {
    static constexpr int BLOCK = 32, VECTORS = 4, HALVES = 2;
    Lookup16<BITS> high, low;

    explicit ByUpper(const Tables &t) : high(t.high), low(t.low) {}

    static constexpr int column(int v, int lane) { return 16 * (lane / 4) + 8 * (v / 2) + 2 * (lane % 4) + v % 2; }
    static constexpr int half_of(int v) { return v / 2; }

    FXQ_INLINE void operator()(const Row &row, int64_t block, floats *out) const {
        uint8_t bytes[BLOCK];
        codes_of<BITS>(row, block, bytes);
        const __m256i c = _mm256_loadu_si256((const __m256i *)bytes), h = high(c), l = low(c);
        const __m256i mask = _mm256_set1_epi32((int)0xFFFF0000);
        const __m256i words[2] = {_mm256_unpacklo_epi8(l, h), _mm256_unpackhi_epi8(l, h)};
        for (int half = 0; half < 2; half++) {
            out[2 * half] = (floats)_mm256_slli_epi32(words[half], 16);
            out[2 * half + 1] = (floats)_mm256_and_si256(words[half], mask);
        }
    }
};

// 8 bits: a whole number, or the fields of a float16 shifted.
template <bool WHOLE, bool SIGNED> struct ByShift {
    static constexpr int BLOCK = 32, VECTORS = 4, HALVES = 2;
    const __m128i up, nan;
    const __m256 factor;

    explicit ByShift(const Tables &t)
        : up(_mm_cvtsi32_si128(t.shift)), nan(_mm_set1_epi16((short)t.nan)), factor(_mm256_set1_ps(t.factor)) {}

    static constexpr int column(int v, int lane) { return LANES * v + lane; }
    static constexpr int half_of(int v) { return v / 2; }

    FXQ_INLINE void operator()(const Row &row, int64_t block, floats *out) const {
        uint8_t c[BLOCK];
        codes_of<8>(row, block, c);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            const __m128i eight = _mm_loadl_epi64((const __m128i *)(c + 8 * v));
            if (WHOLE) {
                out[v] = (floats)_mm256_cvtepi32_ps(SIGNED ? _mm256_cvtepi8_epi32(eight) : _mm256_cvtepu8_epi32(eight));
            } else {
                const __m128i words = _mm_cvtepu8_epi16(eight), magnitude = _mm_and_si128(words, _mm_set1_epi16(0x7F));
                const __m128i sign = _mm_slli_epi16(_mm_xor_si128(words, magnitude), 8);
                const __m128i none = _mm_and_si128(_mm_cmpeq_epi16(magnitude, nan), _mm_set1_epi16(0x7E00));
                const __m128i half = _mm_or_si128(_mm_or_si128(sign, none), _mm_sll_epi16(magnitude, up));
                out[v] = (floats)_mm256_mul_ps(_mm256_cvtph_ps(half), factor);
            }
        }
    }
};
#endif

// Floats from a table, columns in their order.
template <int BITS> struct ByTable {
    static constexpr int BLOCK = 32, VECTORS = BLOCK / LANES, HALVES = VECTORS;
    const Tables &tables;

    explicit ByTable(const Tables &t) : tables(t) {}

    static constexpr int column(int v, int lane) { return LANES * v + lane; }
    static constexpr int half_of(int v) { return v; }

    FXQ_INLINE void operator()(const Row &row, int64_t block, floats *out) const {
        uint8_t c[BLOCK];
        codes_of<BITS>(row, block, c);
        float values[BLOCK];
        for (int i = 0; i < BLOCK; i++) values[i] = tables.values[c[i]];
        std::memcpy(out, values, sizeof values);
    }
};

#endif

} // namespace fxq
