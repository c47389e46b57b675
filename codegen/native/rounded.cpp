// y = x W^T with x rounded to 16 or 8 bits, for one row of x or a few: whole numbers times whole numbers, added up without
// error, by AVX-512's products of bytes (VNNI).
//
//     x = q scale                 a scale for each row and 8 neighbouring columns; q: whole numbers of a byte or two
//     W = (u - offset) unit scale     u: whole numbers of a byte, looked up by code; or of two, with their sign
//
// Formats whose numbers are not whole multiples of one number in 16 bits are multiplied in float32 (gemm.h).
#include "gemm.h"

namespace fxq {

// The numbers of a format as whole ones: (u - offset) * unit for u of a byte, or w * unit for w of two with their sign.
struct alignas(64) Wholes {
    static constexpr int32_t MOST = 8191; // 8 products with 16 bits add up in 32
    uint8_t u[256];
    int16_t w[256];
    int32_t offset = 0;
    int bytes = 0; // 0: there are none
    float unit = 1;

    Wholes(const float *values, int bits) {
        const int count = 1 << bits;
        float lowest = 0, highest = 0;
        for (int i = 0; i < count; i++) {
            if (!(values[i] - values[i] == 0)) return; // not a number, or infinite
            while (unit > 0x1p-24f && values[i] / unit != (float)(int64_t)(values[i] / unit)) unit /= 2;
            lowest = values[i] < lowest ? values[i] : lowest, highest = values[i] > highest ? values[i] : highest;
        }
        lowest /= unit, highest /= unit;
        if (unit <= 0x1p-24f || -lowest > MOST || highest > MOST) return;
        offset = (int32_t)-lowest;
        bytes = highest - lowest > 255 ? 2 : 1;
        for (int i = 0; i < 256; i++) {
            const float whole = values[i & (count - 1)] / unit;
            u[i] = (uint8_t)((int32_t)whole + offset), w[i] = (int16_t)whole;
        }
    }
};

#if FXQ_AVX512

// Bytes of a table by codes.
template <int BITS> struct Lookup {
    static constexpr int PARTS = BITS == 8 ? 4 : BITS == 7 ? 2 : 1;
    __m512i part[PARTS];

    explicit Lookup(const uint8_t *table) {
        for (int i = 0; i < PARTS; i++) part[i] = _mm512_loadu_si512(table + 64 * i);
    }

    FXQ_INLINE __m512i operator()(__m512i c) const {
        if constexpr (BITS < 7) return _mm512_permutexvar_epi8(c, part[0]);
        else if constexpr (BITS == 7) return _mm512_permutex2var_epi8(part[0], c, part[1]);
        else
            return _mm512_mask_mov_epi8(_mm512_permutex2var_epi8(part[0], c, part[1]), _mm512_movepi8_mask(c),
                                        _mm512_permutex2var_epi8(part[2], c, part[3]));
    }
};

// x rounded: a scale for each 8 neighbouring columns, absmax / most.
constexpr float MOST8 = 127, MOST16 = 32512; // of 16 bits as two bytes with signs: 256 * 127

// The next 16 numbers of a row as whole ones, and their scales; false where one is not finite.
static FXQ_INLINE bool round16(const float *x, int64_t left, float most, __m512i *q, __m512 *scale) {
    const __mmask16 mask = left >= 16 ? 0xFFFF : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
    const __m512 v = _mm512_maskz_loadu_ps(mask, x);
    __m512 top = _mm512_abs_ps(v);
    top = _mm512_max_ps(top, _mm512_permute_ps(top, 0xB1));
    top = _mm512_max_ps(top, _mm512_permute_ps(top, 0x4E));
    top = _mm512_max_ps(top, _mm512_shuffle_f32x4(top, top, 0xB1));
    *scale = _mm512_div_ps(top, _mm512_set1_ps(most));
    const __mmask16 some = _mm512_cmp_ps_mask(*scale, _mm512_setzero_ps(), _CMP_GT_OQ); // of the least numbers it is 0
    *q = _mm512_cvtps_epi32(_mm512_maskz_div_ps(some, v, *scale));
    return !_mm512_fpclass_ps_mask(v, 0x81 | 0x08 | 0x10);
}

// The scales of a block's lanes, each of BLOCK / LANES columns: 8, or 4 of the same 8.
template <int BLOCK> static FXQ_INLINE void put_scales(__m512 scale, int part, float *to) {
    alignas(64) float all[16];
    _mm512_store_ps(all, scale);
    constexpr int EACH = 16 * LANES / BLOCK;
    for (int i = 0; i < EACH; i++) to[part * EACH + i] = all[i * (BLOCK / LANES)];
}

// As bytes, DIGITS of them: what meets the code vectors of a block, highest digit first.
template <int BITS, int DIGITS> struct Bytes {
    static constexpr int V = Codes<BITS>::VECTORS, BLOCK = Codes<BITS>::BLOCK;
    static constexpr bool ZEROS = true; // W may have zero points

    struct alignas(64) Block {
        int8_t q[DIGITS][V][64];
        int32_t shift[DIGITS][LANES]; // -offset times what a lane's q add up to
        float lanes[LANES];           // what they add up to, all digits
        float scale[LANES];

        bool make(const float *x, int64_t left, int32_t offset) {
            bool finite = true;
            alignas(64) int8_t natural[2][128]{};
            for (int part = 0; part < BLOCK / 16; part++) {
                __m512i whole;
                __m512 scales;
                finite &= round16(x + part * 16, left - part * 16, DIGITS == 1 ? MOST8 : MOST16, &whole, &scales);
                put_scales<BLOCK>(scales, part, scale);
                const __m512i high =
                    DIGITS == 1 ? whole : _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
                _mm_store_si128((__m128i *)(natural[0] + 16 * part), _mm512_cvtepi32_epi8(high));
                _mm_store_si128((__m128i *)(natural[1] + 16 * part),
                                _mm512_cvtepi32_epi8(_mm512_sub_epi32(whole, _mm512_slli_epi32(high, 8))));
            }
            floats added{};
            for (int d = 0; d < DIGITS; d++) {
                __m512i found[2] = {_mm512_load_si512(natural[d]), _mm512_load_si512(natural[d] + 64)};
                if (V == 2) { // even columns, odd columns
                    const __m512i n[2] = {found[0], found[1]};
                    for (int odd = 0; odd < 2; odd++)
                        found[odd] = _mm512_inserti64x4(
                            _mm512_castsi256_si512(_mm512_cvtepi16_epi8(_mm512_srli_epi16(n[0], 8 * odd))),
                            _mm512_cvtepi16_epi8(_mm512_srli_epi16(n[1], 8 * odd)), 1);
                }
                __m512i sums = _mm512_setzero_si512();
                for (int i = 0; i < V; i++) {
                    _mm512_store_si512(q[d][i], found[i]);
                    sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), found[i]);
                }
                _mm512_store_si512(shift[d], _mm512_mullo_epi32(sums, _mm512_set1_epi32(-offset)));
                added = added * 256 + (floats)_mm512_cvtepi32_ps(sums);
            }
            store(lanes, added);
            return finite;
        }
    };

    const Codes<BITS> codes;
    const Lookup<BITS> table;
    explicit Bytes(const Wholes &wholes) : table(wholes.u) {}

    struct Decoded {
        __m512i u[V];
    };

    FXQ_INLINE Decoded decode(const Row &row, int64_t block) const {
        __m512i c[2];
        Decoded found;
        codes(row, block, c);
#pragma GCC unroll 2
        for (int i = 0; i < V; i++) found.u[i] = table(c[i]);
        return found;
    }

    static FXQ_INLINE floats times(const Decoded &w, const Block &x) {
        floats found{};
#pragma GCC unroll 2
        for (int d = 0; d < DIGITS; d++) {
            __m512i sum = _mm512_load_si512(x.shift[d]);
#pragma GCC unroll 2
            for (int i = 0; i < V; i++) sum = _mm512_dpbusd_epi32(sum, w.u[i], _mm512_load_si512(x.q[d][i]));
            const floats part = (floats)_mm512_cvtepi32_ps(sum);
            found = d == 0 ? part : found * 256 + part;
        }
        return found;
    }
};

// As words of 16 bits, for numbers of two bytes: what meets the even and the odd bytes of each code vector.
template <int BITS> struct Words {
    static constexpr int V = 2, BLOCK = 128;
    static constexpr bool ZEROS = false;
    static_assert(BITS < 7, "look-ups of words have 64 entries");

    struct alignas(64) Block {
        int16_t q[4][32]; // columns 4 j + t in q[t][j]
        float scale[LANES];

        bool make(const float *x, int64_t left, int32_t) {
            bool finite = true;
            for (int part = 0; part < BLOCK / 16; part++) {
                __m512i whole;
                __m512 scales;
                finite &= round16(x + part * 16, left - part * 16, MOST16, &whole, &scales);
                put_scales<BLOCK>(scales, part, scale);
                const __m256i by_four = _mm256_setr_epi16(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
                alignas(32) int16_t words[16];
                _mm256_store_si256((__m256i *)words, _mm256_permutexvar_epi16(by_four, _mm512_cvtepi32_epi16(whole)));
                for (int t = 0; t < 4; t++) std::memcpy(q[t] + part * 4, words + 4 * t, 4 * sizeof(int16_t));
            }
            return finite;
        }
    };

    const Codes<BITS> codes;
    __m512i table[2];
    explicit Words(const Wholes &wholes) : table{_mm512_loadu_si512(wholes.w), _mm512_loadu_si512(wholes.w + 32)} {}

    struct Decoded {
        __m512i w[4]; // as Block::q
    };

    FXQ_INLINE Decoded decode(const Row &row, int64_t block) const {
        __m512i c[2];
        Decoded found;
        codes(row, block, c);
#pragma GCC unroll 2
        for (int i = 0; i < V; i++) {
            found.w[i] = _mm512_permutex2var_epi16(table[0], c[i], table[1]);
            found.w[2 + i] = _mm512_permutex2var_epi16(table[0], _mm512_srli_epi16(c[i], 8), table[1]);
        }
        return found;
    }

    static FXQ_INLINE floats times(const Decoded &w, const Block &x) {
        __m512i sum = _mm512_setzero_si512(), more = _mm512_setzero_si512();
#pragma GCC unroll 2
        for (int t = 0; t < 2; t++) {
            sum = _mm512_dpwssd_epi32(sum, w.w[t], _mm512_load_si512(x.q[t]));
            more = _mm512_dpwssd_epi32(more, w.w[2 + t], _mm512_load_si512(x.q[2 + t]));
        }
        return (floats)_mm512_cvtepi32_ps(_mm512_add_epi32(sum, more));
    }
};

template <int BITS, class How> struct RoundedProduct : Product<Lanes<BITS>> {
    using Product<Lanes<BITS>>::Product;
    const Wholes *wholes = nullptr;
    Room<typename How::Block> x; // [M][blocks]
};

// ROWS rows of x against row n of W.
template <int BITS, class How, bool ZERO, int ROWS>
static FXQ_INLINE void rounded_rows(const RoundedProduct<BITS, How> &p, const How &how, const Scales<Lanes<BITS>> &scales,
                                    int64_t n, int64_t m) {
    const Row row = row_of(p.w, n);
    const typename How::Block *x = p.x + m * p.blocks;
    floats total[ROWS]{};
    for (int64_t block = 0; block < p.blocks; block++, x++) {
        floats scale[1], zero[1];
        const auto decoded = how.decode(row, block);
        scales.load(block, scale, zero);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            const auto &xs = x[r * p.blocks];
            floats found = How::times(decoded, xs);
            if constexpr (ZERO) found -= zero[0] * load(xs.lanes);
            total[r] += found * (scale[0] * load(xs.scale));
        }
    }
    for (int r = 0; r < ROWS; r++)
        p.y[(m + r) * p.y_stride + n] = sum(total[r]) * p.wholes->unit + (p.bias ? p.bias[n] : 0.0f);
}

template <int BITS, class How, bool ZERO> static void rounded_piece(void *data, int64_t piece) {
    const auto &p = *static_cast<const RoundedProduct<BITS, How> *>(data);
    const How how(*p.wholes);
    Scales<Lanes<BITS>> scales(p.w, p.grouping);
    for (int64_t n = p.first(piece); n < p.last(piece); n++) {
        int64_t m = 0;
        scales.row(n);
        for (; m + 4 <= p.M; m += 4) rounded_rows<BITS, How, ZERO, 4>(p, how, scales, n, m);
        for (; m < p.M; m++) rounded_rows<BITS, How, ZERO, 1>(p, how, scales, n, m);
    }
}

template <int BITS, class How>
static bool multiply_rounded(const Weight &w, const Wholes &wholes, const float *x, int64_t M, int64_t x_stride,
                             const float *bias, float *y, int64_t y_stride, const Threads &threads, const char **failed) {
    RoundedProduct<BITS, How> p(w, nullptr, x, M, x_stride, bias, y, y_stride);
    if (p.grouping.kind == UNEVEN) return false;
    p.wholes = &wholes;
    p.x = Room<typename How::Block>(M * p.blocks);
    if (!p.x) return *failed = NO_MEMORY, true;
    for (int64_t m = 0; m < M; m++) {
        bool finite = true;
        auto *blocks = p.x + m * p.blocks;
        for (int64_t b = 0; b < p.blocks; b++)
            finite &= blocks[b].make(x + m * x_stride + b * How::BLOCK, w.cols - b * How::BLOCK, wholes.offset);
        for (int64_t b = 0; !finite && b < p.blocks; b++) store(blocks[b].scale, all(__builtin_nanf("")));
    }
    auto piece = rounded_piece<BITS, How, false>;
    if constexpr (How::ZEROS)
        if (w.zero) piece = rounded_piece<BITS, How, true>;
    threads.run(threads.host, p.pieces(), piece, &p);
    return true;
}

template <int BITS>
static bool rounded_of(const Weight &w, const float *x, int64_t M, int64_t x_stride, const float *bias, float *y,
                       int64_t y_stride, int32_t activation_bits, const Threads &threads, const char **failed) {
    const Wholes wholes(w.values, BITS);
    const auto with = [&](auto how) {
        typedef typename decltype(how)::type How;
        return multiply_rounded<BITS, How>(w, wholes, x, M, x_stride, bias, y, y_stride, threads, failed);
    };
    if (wholes.bytes == 1)
        return activation_bits == 8 ? with(std::common_type<Bytes<BITS, 1>>{}) : with(std::common_type<Bytes<BITS, 2>>{});
    if constexpr (BITS == 5 || BITS == 6) // as fast with 16 bits as with 8
        if (wholes.bytes == 2 && !w.zero) return with(std::common_type<Words<BITS>>{});
    return false;
}

#endif

bool rounded(const Weight &w, const float *x, int64_t M, int64_t x_stride, const float *bias, float *y, int64_t y_stride,
             int32_t activation_bits, const Threads &threads, const char **failed) {
#if FXQ_AVX512
    switch (w.bits) {
    case 2: return rounded_of<2>(w, x, M, x_stride, bias, y, y_stride, activation_bits, threads, failed);
    case 3: return rounded_of<3>(w, x, M, x_stride, bias, y, y_stride, activation_bits, threads, failed);
    case 4: return rounded_of<4>(w, x, M, x_stride, bias, y, y_stride, activation_bits, threads, failed);
    case 5: return rounded_of<5>(w, x, M, x_stride, bias, y, y_stride, activation_bits, threads, failed);
    case 6: return rounded_of<6>(w, x, M, x_stride, bias, y, y_stride, activation_bits, threads, failed);
    case 7: return rounded_of<7>(w, x, M, x_stride, bias, y, y_stride, activation_bits, threads, failed);
    case 8: return rounded_of<8>(w, x, M, x_stride, bias, y, y_stride, activation_bits, threads, failed);
    }
#else
    (void)w, (void)x, (void)M, (void)x_stride, (void)bias, (void)y, (void)y_stride, (void)activation_bits;
    (void)threads, (void)failed;
#endif
    return false;
}

} // namespace fxq
