// y = x W^T in float32: one row of x, a few, or many. Every y[m][n] is summed in an order that depends on nothing but the
// shape: the same bits for any number of threads.
//
//     one    a dot product along k; what a block adds up to is scaled
//     few    rows of W against up to 12 rows of x, four at a time
//     many   a strip of W is decoded to floats, then multiplied by panels of x in which neighbours are rows
#pragma once
#include "codes.h"
#include <new>
#include <type_traits>
#include <vector>

namespace fxq {

constexpr int64_t STRIP = 48; // rows of W of one piece of work
constexpr int64_t CHUNK = 512; // columns that many takes at a time, and of 8 rows of x few: in the first cache
constexpr int64_t PITCH = CHUNK + 16; // floats between rows of them: a power of two would put all into few sets of the cache
constexpr int64_t MOST = 512; // rows of x that many takes at a time

enum Spacing { WIDE, EVEN, UNEVEN }; // a group has whole blocks; a block has whole groups; neither

// Where the scale of every column is, for blocks of a decoder D.
template <class D> struct Grouping {
    Spacing kind;
    int64_t groups, per_block;
    std::vector<int32_t> first;       // group of a block's first column
    std::vector<int32_t> uneven;      // UNEVEN: group of every column in the decoder's order
    int32_t lane[D::HALVES][LANES]{}; // EVEN: group of a lane, counted from the first of the block

    explicit Grouping(const Weight &w) : groups(ceil_div(w.cols, w.group)) {
        const int64_t g = w.group, blocks = ceil_div(w.cols, D::BLOCK);
        kind = g % D::BLOCK == 0 || g >= w.cols ? WIDE : D::BLOCK % g == 0 ? EVEN : UNEVEN;
        per_block = D::BLOCK / g > 0 ? D::BLOCK / g : 1;
        for (int64_t b = 0; b < blocks; b++) first.push_back((int32_t)(b * D::BLOCK / g));
        for (int v = 0; kind == EVEN && v < D::VECTORS; v++)
            for (int l = 0; l < LANES; l++) {
                int32_t group = (int32_t)(D::column(v, l) / g), &known = lane[D::half_of(v)][l];
                bool seen = false;
                for (int u = 0; u < v; u++) seen = seen || D::half_of(u) == D::half_of(v);
                if (seen && known != group) kind = UNEVEN; // groups too short for the order of the columns
                known = group;
            }
        for (int64_t b = 0; kind == UNEVEN && b < blocks; b++)
            for (int v = 0; v < D::VECTORS; v++)
                for (int l = 0; l < LANES; l++)
                    uneven.push_back((int32_t)least((b * D::BLOCK + D::column(v, l)) / g, groups - 1));
    }
};

static inline float scale_at(const Weight &w, int64_t i) {
    return w.half_scale ? from_half(static_cast<const uint16_t *>(w.scale)[i])
                        : static_cast<const float *>(w.scale)[i];
}

// Scales (and zero points) of a block's lanes.
template <class D> struct Scales {
    const Weight &w;
    const Grouping<D> &grouping;
    int64_t at; // of the row's first group
#if FXQ_AVX512
    __m512i lane[D::HALVES];
#endif

    Scales(const Weight &w, const Grouping<D> &grouping) : w(w), grouping(grouping), at(0) {
#if FXQ_AVX512
        for (int h = 0; h < D::HALVES; h++) lane[h] = _mm512_loadu_si512(grouping.lane[h]);
#endif
    }

    FXQ_INLINE void row(int64_t n) { at = w.one_scale_row ? 0 : n * grouping.groups; }

    FXQ_INLINE void load(int64_t block, floats *scale, floats *zero) const { // by halves; not for UNEVEN
        const int64_t i = at + grouping.first[block];
        if (grouping.kind == WIDE) {
            floats s = all(scale_at(w, i)), z = w.zero ? all(w.zero[i]) : floats{};
            for (int h = 0; h < D::HALVES; h++) scale[h] = s, zero[h] = z;
            return;
        }
        const int64_t there = least(grouping.per_block, grouping.groups - grouping.first[block]);
#if FXQ_AVX512
        const __mmask16 mask = (__mmask16)((1u << there) - 1);
        __m512 s = w.half_scale
            ? _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t *>(w.scale) + i))
            : _mm512_maskz_loadu_ps(mask, static_cast<const float *>(w.scale) + i);
        for (int h = 0; h < D::HALVES; h++) scale[h] = (floats)_mm512_permutexvar_ps(lane[h], s);
        for (int h = 0; h < D::HALVES; h++) zero[h] = floats{};
        if (w.zero) {
            __m512 z = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, w.zero + i)));
            for (int h = 0; h < D::HALVES; h++) zero[h] = (floats)_mm512_permutexvar_ps(lane[h], z);
        }
#else
        for (int h = 0; h < D::HALVES; h++)
            for (int l = 0; l < LANES; l++) {
                const int64_t g = grouping.lane[h][l];
                scale[h][l] = g < there ? scale_at(w, i + g) : 0.0f;
                zero[h][l] = w.zero && g < there ? (float)w.zero[i + g] : 0.0f;
            }
#endif
    }

    __attribute__((noinline)) void one_by_one(const int32_t *group, float *scale, float *zero) const {
        for (int l = 0; l < LANES; l++) {
            scale[l] = scale_at(w, at + group[l]);
            if (w.zero) zero[l] = w.zero[at + group[l]];
        }
    }

    // out = (out - zero) * scale
    FXQ_INLINE void apply(int64_t block, floats *out) const {
        if (grouping.kind == UNEVEN) {
#pragma GCC unroll 8
            for (int v = 0; v < D::VECTORS; v++) {
                float scale[LANES], zero[LANES]{};
                one_by_one(grouping.uneven.data() + block * D::BLOCK + v * LANES, scale, zero);
                out[v] = (out[v] - fxq::load(zero)) * fxq::load(scale);
            }
            return;
        }
        floats scale[D::HALVES], zero[D::HALVES];
        load(block, scale, zero);
#pragma GCC unroll 8
        for (int v = 0; v < D::VECTORS; v++) out[v] = (out[v] - zero[D::half_of(v)]) * scale[D::half_of(v)];
    }
};

// x[m][k] in the order of D's columns, zeros beyond the last: to[k'], one every stride.
template <class D>
static void arrange(const float *x, int64_t cols, int64_t from_block, int64_t to_block, float *to, int64_t stride) {
    for (int64_t b = from_block; b < to_block; b++)
        for (int v = 0; v < D::VECTORS; v++)
            for (int l = 0; l < LANES; l++, to += stride) {
                const int64_t k = b * D::BLOCK + D::column(v, l);
                *to = k < cols ? x[k] : 0.0f;
            }
}

// A product under way: what all of its pieces share.
template <class D> struct Product {
    const Weight &w;
    const float *x, *bias;
    int64_t M, x_stride, y_stride;
    float *y;
    const Tables *tables; // of the decoder, null where there is none
    Grouping<D> grouping;
    int64_t blocks, step, width; // step: blocks that few takes at a time; width: rows of x side by side in a panel of many
    Room<float> arranged; // one: [K']  few: [chunk][M][pitch]  many: [chunk][panel][CHUNK][width]
    Room<float> lanes;    // one, with zero points: what the lanes of x add up to, [blocks][HALVES][LANES]
    const char *failed = nullptr;

    Product(const Weight &w, const Tables *tables, const float *x, int64_t M, int64_t x_stride, const float *bias,
            float *y, int64_t y_stride)
        : w(w), x(x), bias(bias), M(M), x_stride(x_stride), y_stride(y_stride), y(y), tables(tables), grouping(w),
          blocks(ceil_div(w.cols, D::BLOCK)), step(0), width(0) {}

    int64_t pieces() const { return ceil_div(w.rows, STRIP); }
    int64_t first(int64_t piece) const { return piece * STRIP; }
    int64_t last(int64_t piece) const { return least((piece + 1) * STRIP, w.rows); }
};

// --- one row of x ---------------------------------------------------------------------------------------------------
template <class D, bool ZERO> static void one_piece(void *data, int64_t piece) {
    const Product<D> &p = *static_cast<const Product<D> *>(data);
    const D decode(*p.tables);
    Scales<D> scales(p.w, p.grouping);
    for (int64_t n = p.first(piece); n < p.last(piece); n++) {
        const Row row = row_of(p.w, n);
        scales.row(n);
        floats total[2]{};
        for (int64_t block = 0; block < p.blocks; block++) {
            floats out[D::VECTORS], sums[2]{}, scale[D::HALVES], zero[D::HALVES];
            decode(row, block, out);
            scales.load(block, scale, zero);
            const float *xs = p.arranged + block * D::BLOCK;
#pragma GCC unroll 8
            for (int v = 0; v < D::VECTORS; v++)
                sums[D::HALVES == 2 ? D::half_of(v) : v & 1] += out[v] * load(xs + v * LANES);
            if (D::HALVES == 1) sums[0] += sums[1];
#pragma GCC unroll 2
            for (int h = 0; h < D::HALVES; h++) {
                if (ZERO) sums[h] -= zero[h] * load(p.lanes + (block * D::HALVES + h) * LANES);
                total[h] += sums[h] * scale[h];
            }
        }
        p.y[n] = sum(total[0] + total[1]) + (p.bias ? p.bias[n] : 0.0f);
    }
}

template <class D, bool ZERO> static void one(Product<D> &p, const Threads &threads) {
    const int64_t size = p.blocks * D::BLOCK;
    p.arranged = Room<float>(size);
    if (ZERO) p.lanes = Room<float>(p.blocks * D::HALVES * LANES);
    if (!p.arranged || (ZERO && !p.lanes)) return void(p.failed = NO_MEMORY);
    arrange<D>(p.x, p.w.cols, 0, p.blocks, p.arranged, 1);
    if (ZERO) std::memset(p.lanes, 0, sizeof(float) * (size_t)(p.blocks * D::HALVES * LANES));
    for (int64_t b = 0; ZERO && b < p.blocks; b++)
        for (int v = 0; v < D::VECTORS; v++)
            for (int l = 0; l < LANES; l++)
                p.lanes[(b * D::HALVES + D::half_of(v)) * LANES + l] += p.arranged[(b * D::VECTORS + v) * LANES + l];
    threads.run(threads.host, p.pieces(), one_piece<D, ZERO>, &p);
}

// --- a few ----------------------------------------------------------------------------------------------------------
constexpr int FEW = 12; // rows of x, which are taken by fours

// ROWS rows of x against a row of W: sums of a block are scaled, or the numbers before, where that is less or zero points
// or uneven groups ask for it.
template <class D, int ROWS>
__attribute__((noinline)) static void few_rows(const D &decode, const Scales<D> &scales, const Row &row, int64_t from,
                                               int64_t to, const float *x, int64_t pitch, floats *total) {
    floats sums[ROWS]{};
    if (D::HALVES <= 2 && !scales.w.zero && scales.grouping.kind != UNEVEN) {
        constexpr int PARTS = ROWS < 3 && D::HALVES == 1 ? 2 : D::HALVES; // a single sum would wait for itself
        for (int64_t block = from; block < to; block++, x += D::BLOCK) {
            floats out[D::VECTORS], parts[ROWS][PARTS]{}, scale[D::HALVES], zero[D::HALVES];
            decode(row, block, out);
            scales.load(block, scale, zero);
#pragma GCC unroll 8
            for (int v = 0; v < D::VECTORS; v++)
#pragma GCC unroll 8
                for (int m = 0; m < ROWS; m++)
                    parts[m][D::HALVES == 2 ? D::half_of(v) : v % PARTS] += out[v] * load(x + m * pitch + v * LANES);
#pragma GCC unroll 8
            for (int m = 0; m < ROWS; m++) {
                if (PARTS > D::HALVES) parts[m][0] += parts[m][PARTS - 1];
#pragma GCC unroll 2
                for (int h = 0; h < D::HALVES; h++) sums[m] += parts[m][h] * scale[h];
            }
        }
    } else {
        for (int64_t block = from; block < to; block++, x += D::BLOCK) {
            floats out[D::VECTORS];
            decode(row, block, out);
            scales.apply(block, out);
#pragma GCC unroll 8
            for (int v = 0; v < D::VECTORS; v++)
#pragma GCC unroll 8
                for (int m = 0; m < ROWS; m++) sums[m] += out[v] * load(x + m * pitch + v * LANES);
        }
    }
    for (int m = 0; m < ROWS; m++) total[m] += sums[m];
}

template <class D> static void few_piece(void *data, int64_t piece) {
    Product<D> &p = *static_cast<Product<D> *>(data);
    const D decode(*p.tables);
    Scales<D> scales(p.w, p.grouping);
    const int64_t step = p.step, pitch = step * D::BLOCK + PITCH - CHUNK;
    const Room<floats> totals(STRIP * p.M);
    if (!totals) return void(p.failed = NO_MEMORY);
    std::memset(totals, 0, sizeof(floats) * (size_t)(STRIP * p.M));
    for (int64_t from = 0; from < p.blocks; from += step) {
        const int64_t to = least(from + step, p.blocks);
        const float *x = p.arranged + from / step * p.M * pitch;
        for (int64_t n = p.first(piece); n < p.last(piece); n++) {
            const Row row = part_of_row(p.w, n);
            scales.row(n);
            floats *total = totals + (n - p.first(piece)) * p.M;
            int64_t m = 0;
            for (; m + 4 <= p.M; m += 4) few_rows<D, 4>(decode, scales, row, from, to, x + m * pitch, pitch, total + m);
            for (; m + 2 <= p.M; m += 2) few_rows<D, 2>(decode, scales, row, from, to, x + m * pitch, pitch, total + m);
            for (; m < p.M; m++) few_rows<D, 1>(decode, scales, row, from, to, x + m * pitch, pitch, total + m);
        }
    }
    for (int64_t n = p.first(piece); n < p.last(piece); n++)
        for (int64_t m = 0; m < p.M; m++)
            p.y[m * p.y_stride + n] = sum(totals[(n - p.first(piece)) * p.M + m]) + (p.bias ? p.bias[n] : 0.0f);
}

template <class D> static void few(Product<D> &p, const Threads &threads) {
    const int64_t step = p.step = least(p.blocks, 8 * CHUNK / D::BLOCK / least(p.M, 8)), pitch = step * D::BLOCK + PITCH - CHUNK;
    p.arranged = Room<float>(ceil_div(p.blocks, step) * p.M * pitch);
    if (!p.arranged) return void(p.failed = NO_MEMORY);
    for (int64_t from = 0; from < p.blocks; from += step)
        for (int64_t m = 0; m < p.M; m++)
            arrange<D>(p.x + m * p.x_stride, p.w.cols, from, least(from + step, p.blocks),
                       p.arranged + (from / step * p.M + m) * pitch, 1);
    threads.run(threads.host, p.pieces(), few_piece<D>, &p);
}

// --- many -----------------------------------------------------------------------------------------------------------
#if FXQ_AVX512
constexpr int HIGH = 12; // rows of W times two vectors of rows of x: sums in 24 registers of 32
#else
constexpr int HIGH = 6; // in 12 of 16
#endif

// sums[i][m] += over k of w[i][k] x[k][m], for ROWS rows of W and VECTORS * LANES rows of x
template <int ROWS, int VECTORS>
__attribute__((noinline)) static void corner(const float *w, const float *x, int64_t count, float *sums, int64_t stride) {
    floats acc[ROWS][VECTORS];
#pragma GCC unroll 24
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) acc[i][v] = load(sums + i * stride + v * LANES);
    for (int64_t k = 0; k < count; k++) {
        floats b[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) b[v] = load(x + (k * VECTORS + v) * LANES);
#pragma GCC unroll 24
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) acc[i][v] += all(w[i * PITCH + k]) * b[v];
    }
#pragma GCC unroll 24
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) store(sums + i * stride + v * LANES, acc[i][v]);
}

template <class D> static void many_piece(void *data, int64_t piece) {
    Product<D> &p = *static_cast<Product<D> *>(data);
    const D decode(*p.tables);
    Scales<D> scales(p.w, p.grouping);
    constexpr int64_t STEP = CHUNK / D::BLOCK;
    const int64_t panels = ceil_div(p.M, p.width), stride = panels * p.width;
    const int64_t count = p.last(piece) - p.first(piece), high = ceil_div(count, 2 * HIGH) * 2 * HIGH;
    const Room<float> decoded(STRIP * PITCH + STRIP * stride);
    if (!decoded) return void(p.failed = NO_MEMORY);
    float *sums = decoded + STRIP * PITCH;
    std::memset(decoded, 0, sizeof(float) * (size_t)(STRIP * PITCH + STRIP * stride));
    for (int64_t from = 0; from < p.blocks; from += STEP) {
        const int64_t to = least(from + STEP, p.blocks), columns = (to - from) * D::BLOCK;
        for (int64_t i = 0; i < count; i++) {
            const Row row = part_of_row(p.w, p.first(piece) + i);
            scales.row(p.first(piece) + i);
            for (int64_t block = from; block < to; block++) {
                floats out[D::VECTORS];
                decode(row, block, out);
                scales.apply(block, out);
                for (int v = 0; v < D::VECTORS; v++)
                    store(decoded + i * PITCH + (block - from) * D::BLOCK + v * LANES, out[v]);
            }
        }
        for (int64_t panel = 0; panel < panels; panel++) {
            const float *x = p.arranged + (from / STEP * panels + panel) * CHUNK * p.width;
            for (int64_t i = 0; i < high; i += p.width == LANES ? 2 * HIGH : HIGH) {
                float *to_sums = sums + i * stride + panel * p.width;
                if (p.width == LANES) corner<2 * HIGH, 1>(decoded + i * PITCH, x, columns, to_sums, stride);
                else corner<HIGH, 2>(decoded + i * PITCH, x, columns, to_sums, stride);
            }
        }
    }
    for (int64_t m = 0; m < p.M; m++)
        for (int64_t i = 0; i < count; i++) {
            const int64_t n = p.first(piece) + i;
            p.y[m * p.y_stride + n] = sums[i * stride + m] + (p.bias ? p.bias[n] : 0.0f);
        }
}

template <class D> static void panel_piece(void *data, int64_t piece) { // a panel of x for a chunk of columns
    Product<D> &p = *static_cast<Product<D> *>(data);
    constexpr int64_t STEP = CHUNK / D::BLOCK;
    const int64_t panels = ceil_div(p.M, p.width), from = piece / panels * STEP, first = piece % panels * p.width;
    float *to = p.arranged + piece * CHUNK * p.width;
    for (int64_t i = 0; i < p.width; i++) {
        if (first + i < p.M) {
            arrange<D>(p.x + (first + i) * p.x_stride, p.w.cols, from, least(from + STEP, p.blocks), to + i, p.width);
        } else {
            for (int64_t k = 0; k < CHUNK; k++) to[k * p.width + i] = 0.0f;
        }
    }
}

template <class D> static void many(Product<D> &p, const Threads &threads) {
    p.width = p.M <= LANES ? LANES : 2 * LANES;
    const int64_t chunks = ceil_div(p.blocks, CHUNK / D::BLOCK), panels = ceil_div(p.M, p.width);
    p.arranged = Room<float>(chunks * panels * CHUNK * p.width);
    if (!p.arranged) return void(p.failed = NO_MEMORY);
    threads.run(threads.host, chunks * panels, panel_piece<D>, &p);
    threads.run(threads.host, p.pieces(), many_piece<D>, &p);
}

// --- rows of W ------------------------------------------------------------------------------------------------------
constexpr int64_t AT_ONCE = 16; // rows of a piece of work

template <class D> struct Wanted {
    const Weight &w;
    const Tables &tables;
    Grouping<D> grouping;
    const int64_t *index;
    int64_t count;
    float *to;
};

template <class D> static void rows_piece(void *data, int64_t piece) {
    const Wanted<D> &p = *static_cast<const Wanted<D> *>(data);
    const D decode(p.tables);
    Scales<D> scales(p.w, p.grouping);
    const int64_t cols = p.w.cols;
    for (int64_t i = piece * AT_ONCE; i < least((piece + 1) * AT_ONCE, p.count); i++) {
        const Row row = row_of(p.w, p.index[i]);
        scales.row(p.index[i]);
        float *to = p.to + i * cols;
        for (int64_t block = 0; block * D::BLOCK < cols; block++) {
            floats out[D::VECTORS];
            decode(row, block, out);
            scales.apply(block, out);
            for (int v = 0; v < D::VECTORS; v++)
                for (int l = 0; l < LANES; l++) {
                    const int64_t k = block * D::BLOCK + D::column(v, l);
                    if (k < cols) to[k] = out[v][l];
                }
        }
    }
}

template <class D>
static void decode_rows(const Weight &w, const Tables &tables, const int64_t *index, int64_t count, float *to,
                        const Threads &threads) {
    Wanted<D> wanted{w, tables, Grouping<D>(w), index, count, to};
    threads.run(threads.host, ceil_div(count, AT_ONCE), rows_piece<D>, &wanted);
}

// --- which ----------------------------------------------------------------------------------------------------------
template <class D>
static const char *multiply(const Weight &w, const Tables &tables, const float *x, int64_t M, int64_t x_stride,
                            const float *bias, float *y, int64_t y_stride, const Threads &threads) {
    for (int64_t m = 0; m < M; m += MOST) {
        Product<D> p(w, &tables, x + m * x_stride, least(MOST, M - m), x_stride, bias, y + m * y_stride, y_stride);
        if (p.M > FEW) {
            many(p, threads);
        } else if constexpr (D::HALVES <= 2) {
            if (p.M > 1 || p.grouping.kind == UNEVEN) few(p, threads);
            else if (w.zero) one<D, true>(p, threads);
            else one<D, false>(p, threads);
        } else {
            few(p, threads);
        }
        if (p.failed) return p.failed;
    }
    return nullptr;
}

} // namespace fxq
