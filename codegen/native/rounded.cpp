// y = x W^T with x rounded to 16 or 8 bits, for one row of x or a few: whole numbers times whole numbers, added up without
// error, by AVX-512's products of bytes (VNNI).
//
//     x = q scale               a scale for each row and 8 neighbouring columns; q: whole numbers of one byte or two
//     W = (u - offset) unit scale     u: whole numbers of one or two bytes, looked up by code
//
// Formats whose numbers are not whole multiples of one number in 16 bits are multiplied in float32 (gemm.h).
#include "gemm.h"

namespace fxq {

// The numbers of a format as whole ones: (u - offset) * unit, u < 2^16.
struct alignas(64) Wholes {
    uint8_t low[256], high[256];
    int32_t offset = 0;
    int bytes = 0; // of u; 0: there are none
    float unit = 1;

    Wholes(const float *values, int bits) {
        const int count = 1 << bits;
        float least_value = 0, most = 0;
        for (int i = 0; i < count; i++) {
            if (!(values[i] - values[i] == 0)) return; // not a number, or infinite
            while (unit > 0x1p-24f && values[i] / unit != (float)(int64_t)(values[i] / unit)) unit /= 2;
            least_value = values[i] < least_value ? values[i] : least_value, most = values[i] > most ? values[i] : most;
        }
        if (unit <= 0x1p-24f || (most - least_value) / unit > 65535) return;
        offset = (int32_t)(-least_value / unit);
        bytes = (most - least_value) / unit > 255 ? 2 : 1;
        for (int i = 0; i < 256; i++) {
            const int32_t u = (int32_t)(values[i & (count - 1)] / unit) + offset;
            low[i] = (uint8_t)u, high[i] = (uint8_t)(u >> 8);
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

// x rounded, a row: of every block DIGITS times the bytes that meet its code vectors, highest digit first.
template <int BITS, int DIGITS> struct Rounded {
    static constexpr int V = Codes<BITS>::VECTORS, BLOCK = Codes<BITS>::BLOCK;
    struct alignas(64) Block {
        int8_t q[DIGITS][V][64];
        int32_t shift[DIGITS][LANES]; // -offset times what a lane's q add up to
        float lanes[LANES];           // what they add up to, all digits
        float scale[LANES];
    };

    // Rounds to the nearest; x beyond cols is 0. A number that is not finite makes the row's scales that are NaN.
    static void make(const float *x, int64_t cols, int32_t offset, Block *to) {
        constexpr float most = DIGITS == 1 ? 127.0f : 32512.0f;
        bool finite = true;
        const int64_t blocks = ceil_div(cols, BLOCK);
        for (int64_t b = 0; b < blocks; b++) {
            Block &block = to[b];
            alignas(64) int8_t natural[2][128]{};
            for (int part = 0; part < BLOCK / 16; part++) {
                const int64_t k = b * BLOCK + part * 16, left = cols - k;
                const __mmask16 mask = left >= 16 ? 0xFFFF : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
                const __m512 v = _mm512_maskz_loadu_ps(mask, x + k);
                finite = finite && !_mm512_fpclass_ps_mask(v, 0x81 | 0x08 | 0x10);
                __m512 top = _mm512_abs_ps(v); // of each 8
                top = _mm512_max_ps(top, _mm512_permute_ps(top, 0xB1));
                top = _mm512_max_ps(top, _mm512_permute_ps(top, 0x4E));
                top = _mm512_max_ps(top, _mm512_shuffle_f32x4(top, top, 0xB1));
                const __m512 ratio = _mm512_maskz_div_ps(_mm512_cmp_ps_mask(top, _mm512_setzero_ps(), _CMP_GT_OQ),
                                                         _mm512_set1_ps(most), top);
                const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v, ratio));
                if (DIGITS == 1) {
                    _mm_store_si128((__m128i *)(natural[0] + 16 * part), _mm512_cvtepi32_epi8(q));
                } else {
                    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
                    _mm_store_si128((__m128i *)(natural[0] + 16 * part), _mm512_cvtepi32_epi8(high));
                    _mm_store_si128((__m128i *)(natural[1] + 16 * part),
                                    _mm512_cvtepi32_epi8(_mm512_sub_epi32(q, _mm512_slli_epi32(high, 8))));
                }
                alignas(64) float tops[16];
                _mm512_store_ps(tops, top);
                for (int i = 0; i < 16 * LANES / BLOCK; i++) // lanes of these 16 columns
                    block.scale[part * (16 * LANES / BLOCK) + i] = tops[i * (BLOCK / LANES)] / most;
            }
            floats lanes{};
            for (int d = 0; d < DIGITS; d++) {
                __m512i q[2] = {_mm512_load_si512(natural[d]), _mm512_load_si512(natural[d] + 64)};
                if (V == 2) { // even columns, odd columns
                    const __m512i n[2] = {q[0], q[1]};
                    for (int odd = 0; odd < 2; odd++)
                        q[odd] = _mm512_inserti64x4(
                            _mm512_castsi256_si512(_mm512_cvtepi16_epi8(_mm512_srli_epi16(n[0], 8 * odd))),
                            _mm512_cvtepi16_epi8(_mm512_srli_epi16(n[1], 8 * odd)), 1);
                }
                __m512i sums = _mm512_setzero_si512();
                for (int i = 0; i < V; i++) {
                    _mm512_store_si512(block.q[d][i], q[i]);
                    sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), q[i]);
                }
                _mm512_store_si512(block.shift[d], _mm512_mullo_epi32(sums, _mm512_set1_epi32(-offset)));
                lanes = lanes * 256 + (floats)_mm512_cvtepi32_ps(sums);
            }
            store(block.lanes, lanes);
        }
        for (int64_t b = 0; !finite && b < blocks; b++)
            for (int l = 0; l < LANES; l++) to[b].scale[l] = __builtin_nanf("");
    }
};

template <int BITS, int DIGITS> struct RoundedProduct : Product<Lanes<BITS>> {
    using Product<Lanes<BITS>>::Product;
    const Wholes *wholes = nullptr;
    Room<typename Rounded<BITS, DIGITS>::Block> x; // [M][blocks]
};

// ROWS rows of x against row n of W; BYTES: of a whole number.
template <int BITS, int DIGITS, int BYTES, bool ZERO, int ROWS>
static FXQ_INLINE void rounded_rows(const RoundedProduct<BITS, DIGITS> &p, const Codes<BITS> &codes,
                                    const Lookup<BITS> &low, const Lookup<BITS> &high, const Scales<Lanes<BITS>> &scales,
                                    int64_t n, int64_t m) {
    constexpr int V = Codes<BITS>::VECTORS;
    const Row row = row_of(p.w, n);
    const auto *x = p.x + m * p.blocks;
    floats total[ROWS]{};
    for (int64_t block = 0; block < p.blocks; block++, x++) {
        __m512i c[2], u[V][BYTES];
        floats scale[1], zero[1];
        codes(row, block, c);
        scales.load(block, scale, zero);
#pragma GCC unroll 2
        for (int i = 0; i < V; i++) {
            u[i][0] = low(c[i]);
            if (BYTES == 2) u[i][BYTES - 1] = high(c[i]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            const auto &xs = x[r * p.blocks];
            floats found{};
#pragma GCC unroll 2
            for (int d = 0; d < DIGITS; d++) {
                __m512i sum = _mm512_load_si512(xs.shift[d]), upper = _mm512_setzero_si512();
#pragma GCC unroll 2
                for (int i = 0; i < V; i++) {
                    const __m512i q = _mm512_load_si512(xs.q[d][i]);
                    sum = _mm512_dpbusd_epi32(sum, u[i][0], q);
                    if (BYTES == 2) upper = _mm512_dpbusd_epi32(upper, u[i][BYTES - 1], q);
                }
                if (BYTES == 2) sum = _mm512_add_epi32(sum, _mm512_slli_epi32(upper, 8));
                found = found * 256 + (floats)_mm512_cvtepi32_ps(sum);
            }
            if (ZERO) found -= zero[0] * load(xs.lanes);
            total[r] += found * (scale[0] * load(xs.scale));
        }
    }
    for (int r = 0; r < ROWS; r++)
        p.y[(m + r) * p.y_stride + n] = sum(total[r]) * p.wholes->unit + (p.bias ? p.bias[n] : 0.0f);
}

template <int BITS, int DIGITS, int BYTES, bool ZERO> static void rounded_piece(void *data, int64_t piece) {
    const auto &p = *static_cast<const RoundedProduct<BITS, DIGITS> *>(data);
    const Codes<BITS> codes;
    const Lookup<BITS> low(p.wholes->low), high(p.wholes->high);
    Scales<Lanes<BITS>> scales(p.w, p.grouping);
    for (int64_t n = p.first(piece); n < p.last(piece); n++) {
        int64_t m = 0;
        scales.row(n);
        for (; m + 4 <= p.M; m += 4) rounded_rows<BITS, DIGITS, BYTES, ZERO, 4>(p, codes, low, high, scales, n, m);
        for (; m < p.M; m++) rounded_rows<BITS, DIGITS, BYTES, ZERO, 1>(p, codes, low, high, scales, n, m);
    }
}

template <int BITS, int DIGITS>
static const char *multiply_rounded(const Weight &w, const Wholes &wholes, const float *x, int64_t M, int64_t x_stride,
                                    const float *bias, float *y, int64_t y_stride, const Threads &threads) {
    typedef typename Rounded<BITS, DIGITS>::Block Block;
    const Tables tables(w.values, BITS);
    RoundedProduct<BITS, DIGITS> p(w, tables, x, M, x_stride, bias, y, y_stride);
    p.wholes = &wholes;
    p.x = Room<Block>(M * p.blocks);
    if (!p.x) return NO_MEMORY;
    for (int64_t m = 0; m < M; m++)
        Rounded<BITS, DIGITS>::make(x + m * x_stride, w.cols, wholes.offset, p.x + m * p.blocks);
    const auto one = w.zero ? rounded_piece<BITS, DIGITS, 1, true> : rounded_piece<BITS, DIGITS, 1, false>;
    const auto two = w.zero ? rounded_piece<BITS, DIGITS, 2, true> : rounded_piece<BITS, DIGITS, 2, false>;
    threads.run(threads.host, p.pieces(), wholes.bytes == 1 ? one : two, &p);
    return nullptr;
}

template <int BITS>
static bool rounded_of(const Weight &w, const float *x, int64_t M, int64_t x_stride, const float *bias, float *y,
                       int64_t y_stride, int32_t activation_bits, const Threads &threads, const char **failed) {
    if (Grouping<Lanes<BITS>>(w).kind == UNEVEN) return false;
    const Wholes wholes(w.values, BITS);
    if (!wholes.bytes) return false;
    *failed = activation_bits == 8 ? multiply_rounded<BITS, 1>(w, wholes, x, M, x_stride, bias, y, y_stride, threads)
                                   : multiply_rounded<BITS, 2>(w, wholes, x, M, x_stride, bias, y, y_stride, threads);
    return true;
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
