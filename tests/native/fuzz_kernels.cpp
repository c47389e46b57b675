// Random weights through fxq::linear and fxq::rows, in buffers of exactly their size, against sums in double; random floats
// through their ranges, codes, bytes and roundings.
//
//     fuzz_kernels SECONDS SEED      prints how many calls it made; 1, and the case, where a number is wrong
//
// Built with -fsanitize=address,undefined: a byte read or written beside a buffer ends the process.
#include "encode.h"
#include "formats.h"
#include "packed.h"
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

using namespace fxq;

static std::mt19937_64 random_bits;

static int64_t any(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }
static bool one_in(int64_t n) { return any(1, n) == 1; }
static float normal() { return std::normal_distribution<float>()(random_bits); }

// A buffer that ends where its last value ends, `shift` bytes behind an aligned address.
template <class T> struct Buffer {
    std::unique_ptr<uint8_t[]> bytes;
    T *data;

    explicit Buffer(int64_t count, int64_t shift = 0)
        : bytes(new uint8_t[(size_t)(count * (int64_t)sizeof(T) + shift)]), data(reinterpret_cast<T *>(bytes.get() + shift)) {}
};

// --- threads --------------------------------------------------------------------------------------------------------
static void backwards(void *, int64_t pieces, void (*piece)(void *, int64_t), void *data) {
    for (int64_t i = pieces; i-- > 0;) piece(data, i);
}

static void at_once(void *, int64_t pieces, void (*piece)(void *, int64_t), void *data) {
    std::vector<std::thread> threads;
    for (int64_t t = 0; t < 3; t++)
        threads.emplace_back([=] {
            for (int64_t i = t; i < pieces; i += 3) piece(data, i);
        });
    for (auto &thread : threads) thread.join();
}

// --- a weight -------------------------------------------------------------------------------------------------------
struct Case {
    const Format &format;
    int64_t rows, cols, group, groups, scales;
    bool half, zeros;
    Buffer<uint8_t> packed, zero;
    Buffer<float> scale;
    Buffer<uint16_t> half_scale;

    static Case random() {
        const Format &format = FORMATS[any(0, sizeof FORMATS / sizeof *FORMATS - 1)];
        int64_t rows = one_in(4) ? any(1, 300) : any(1, 20), cols = one_in(3) ? 64 * any(1, 20) : any(1, 700);
        int64_t group = one_in(3) ? cols : one_in(2) ? any(1, cols) : std::min<int64_t>(cols, 16 << any(0, 4));
        return Case(format, rows, cols, group, one_in(5) ? 1 : rows);
    }

    Case(const Format &format, int64_t rows, int64_t cols, int64_t group, int64_t scales)
        : format(format), rows(rows), cols(cols), group(group), groups((cols + group - 1) / group), scales(scales),
          half(one_in(3)), zeros(format.zero_point), packed(rows * row_bytes(format.bits, cols), any(0, 7)),
          zero(scales * groups, any(0, 7)), scale(scales * groups, 4 * any(0, 3)), half_scale(scales * groups, 2 * any(0, 3)) {
        for (int64_t i = 0; i < rows * row_bytes(format.bits, cols); i++) packed.data[i] = (uint8_t)any(0, 255);
        for (int64_t i = 0; i < scales * groups; i++) {
            zero.data[i] = (uint8_t)any(0, 255);
            half_scale.data[i] = to_half(normal() * 0.1f);
            scale.data[i] = half ? from_half(half_scale.data[i]) : normal() * 0.1f;
        }
    }

    Weight weight() const {
        const void *scales_at = half ? static_cast<const void *>(half_scale.data) : scale.data;
        return Weight{packed.data, scales_at, zeros ? zero.data : nullptr, format.values, rows, cols, group, format.bits, half,
                      scales == 1};
    }

    int32_t code(int64_t n, int64_t k) const { // planes of 4, 2 and 1 bits, lowest bits first, or of 8
        const uint8_t *plane = packed.data + n * row_bytes(format.bits, cols);
        int32_t found = 0, low = 0;
        const int32_t widths[] = {4, 2, 1, 8};
        for (int32_t width : widths) {
            if (!(format.bits & width)) continue;
            found |= (plane[k * width / 8] >> (k * width % 8) & ((1 << width) - 1)) << low;
            low += width;
            plane += (cols * width + 7) / 8;
        }
        return found;
    }

    int64_t at(int64_t n, int64_t k) const { return (scales == 1 ? 0 : n) * groups + k / group; }

    float value(int64_t n, int64_t k) const {
        return (format.values[code(n, k)] - (zeros ? (float)zero.data[at(n, k)] : 0.0f)) * scale.data[at(n, k)];
    }
};

static int wrong(const char *what, const Case &c, int64_t M, int64_t bits, int64_t m, int64_t n, double got, double want) {
    std::printf("%s: %s [%lld, %lld] group %lld, scales [%lld, %lld]%s, M %lld, activation_bits %lld: [%lld][%lld] is %g, not %g\n",
                what, c.format.name, (long long)c.rows, (long long)c.cols, (long long)c.group, (long long)c.scales,
                (long long)c.groups, c.half ? " float16" : "", (long long)M, (long long)bits, (long long)m, (long long)n, got,
                want);
    return 1;
}

// --- what is tried --------------------------------------------------------------------------------------------------
static int try_linear(const Case &c) {
    Weight w = c.weight();
    int64_t M = one_in(3) ? 1 : any(1, 40), x_stride = c.cols + (one_in(3) ? any(1, 9) : 0),
            y_stride = c.rows + (one_in(3) ? any(1, 9) : 0);
    int64_t bits = one_in(2) ? 32 : one_in(2) ? 16 : 8;
    bool with_bias = one_in(2);
    Buffer<float> x((M - 1) * x_stride + c.cols, 4 * any(0, 3)), y((M - 1) * y_stride + c.rows, 4 * any(0, 3)), bias(c.rows);
    Buffer<float> again((M - 1) * y_stride + c.rows);
    for (int64_t i = 0; i < (M - 1) * x_stride + c.cols; i++) x.data[i] = i % x_stride < c.cols ? normal() : NAN;
    for (int64_t n = 0; n < c.rows; n++) bias.data[n] = normal();
    if (one_in(20)) x.data[any(0, c.cols - 1)] = one_in(2) ? NAN : INFINITY;
    Threads some{backwards, nullptr}, others{one_in(8) ? at_once : backwards, nullptr};
    const float *plus = with_bias ? bias.data : nullptr;
    if (linear(w, x.data, M, x_stride, plus, y.data, y_stride, (int32_t)bits, some)) return 0; // no memory
    if (linear(w, x.data, M, x_stride, plus, again.data, y_stride, (int32_t)bits, others)) return 0;
    // values, and what they are made of: (code - zero) * scale may be summed as two parts
    std::vector<double> values((size_t)(c.rows * c.cols)), parts(values.size());
    for (int64_t n = 0; n < c.rows; n++)
        for (int64_t k = 0; k < c.cols; k++) {
            double value = c.value(n, k), zero = c.zeros ? c.zero.data[c.at(n, k)] * (double)c.scale.data[c.at(n, k)] : 0;
            values[(size_t)(n * c.cols + k)] = value;
            parts[(size_t)(n * c.cols + k)] = std::fabs(value) + 2 * std::fabs(zero);
        }
    for (int64_t m = 0; m < M; m++) {
        float most = 0;
        for (int64_t k = 0; k < c.cols; k++) most = std::fmax(most, std::fabs(x.data[m * x_stride + k]));
        for (int64_t n = 0; n < c.rows; n++) {
            double want = with_bias ? bias.data[n] : 0, around = std::fabs(want), weights = 0;
            const double *value = &values[(size_t)(n * c.cols)], *part = &parts[(size_t)(n * c.cols)];
            for (int64_t k = 0; k < c.cols; k++) {
                double from = x.data[m * x_stride + k];
                want += from * value[k], around += std::fabs(from) * part[k], weights += part[k];
            }
            double bound = 3e-6 * around + (bits == 32 ? 0 : 0.51 * most / ((1 << (bits - 1)) - 1) * weights) + 1e-30;
            float got = y.data[m * y_stride + n], second = again.data[m * y_stride + n];
            if (bits_of(got) != bits_of(second) && !(std::isnan(got) && std::isnan(second)))
                return wrong("linear by other threads", c, M, bits, m, n, second, got);
            if (std::isfinite(want) ? !(std::fabs(got - want) <= bound) : std::isnan(want) && std::isfinite(got))
                return wrong("linear", c, M, bits, m, n, got, want);
        }
    }
    return 0;
}

static int try_rows(const Case &c) {
    int64_t count = any(1, 30);
    Buffer<int64_t> index(count);
    Buffer<float> to(count * c.cols, 4 * any(0, 3));
    for (int64_t i = 0; i < count; i++) index.data[i] = any(0, c.rows - 1);
    rows(c.weight(), index.data, count, to.data, Threads{one_in(8) ? at_once : backwards, nullptr});
    for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < c.cols; k++) {
            float got = to.data[i * c.cols + k], want = c.value(index.data[i], k);
            if (got != want && !(std::isnan(got) && std::isnan(want))) return wrong("rows", c, count, 32, i, k, got, want);
        }
    return 0;
}

// Codes of random floats are those of the nearest values, survive their bytes, and stand for what activations become.
static int try_codes(const Case &c) {
    const Grid &grid = c.format.grid;
    if (grid.max == 0) return 0;
    int64_t stride = c.cols + any(0, 5), all = c.rows * c.cols;
    Buffer<float> x((c.rows - 1) * stride + c.cols, 4 * any(0, 3)), low(c.rows * c.groups), high(c.rows * c.groups);
    for (int64_t i = 0; i < (c.rows - 1) * stride + c.cols; i++) x.data[i] = i % stride < c.cols ? normal() : NAN;
    Threads some{one_in(8) ? at_once : backwards, nullptr};
    extremes(x.data, Real::FLOAT, c.rows, c.cols, stride, c.group, low.data, high.data, some);
    int32_t most = 0, half = 1 << (c.format.bits - 1), kind = grid.mbits == 23 ? 2 : grid.mbits ? 0 : 1;
    while (most + 1 < half && std::isfinite(c.format.values[most + 1])) most++;
    int32_t no_minus = std::isnan(c.format.values[half]) ? half : -1;
    Encoding encoding{(Kind)kind, c.format.bits, grid.mbits, grid.lowest, most, -1, no_minus, -grid.max, grid.max};
    Matrix matrix{x.data, c.rows, c.cols, stride, {c.scale.data, c.scales, c.groups, 1, c.group}, nullptr, 0, Real::FLOAT};
    Buffer<uint8_t> codes(all), packed(c.rows * row_bytes(c.format.bits, c.cols)), again(all);
    encode(matrix, encoding, codes.data, some);
    if (pack(codes.data, c.rows, c.cols, c.cols, c.format.bits, packed.data, some) >> c.format.bits)
        return wrong("encode", c, 0, 0, 0, 0, NAN, 0);
    unpack(packed.data, c.rows, c.cols, row_bytes(c.format.bits, c.cols), c.format.bits, again.data, some);
    Buffer<float> y(all, 4 * any(0, 3)), tight(all);
    for (int64_t i = 0; i < all; i++) tight.data[i] = x.data[i / c.cols * stride + i % c.cols];
    Activations activations{tight.data, y.data, c.rows, c.cols, matrix.scale, grid, 0, Real::FLOAT};
    if (!round_activations(activations, some)) return wrong("round", c, 0, 0, 0, 0, NAN, 0);
    Buffer<double> squares(2 * c.rows), lost(2 * c.rows);
    Buffer<float> table(256);
    for (int code = 0; code < 256; code++) table.data[code] = code < 1 << c.format.bits ? c.format.values[code] : 0;
    row_squares(matrix, codes.data, table.data, squares.data, some);
    for (int64_t i = 0; i < 2 * c.rows; i++) lost.data[i] = 0;
    for (int64_t i = 0; i < all; i++) {
        int64_t n = i / c.cols, k = i % c.cols;
        float scale = c.scale.data[c.at(n, k)], value = c.format.values[codes.data[i]] * scale, from = tight.data[i];
        double least = INFINITY;
        for (int32_t code = 0; code <= most; code++)
            least = std::fmin(least, std::fabs(std::fabs(from) - c.format.values[code] * (double)scale));
        if (codes.data[i] != again.data[i]) return wrong("pack", c, 0, 0, n, k, again.data[i], codes.data[i]);
        if (!(std::fabs(value - from) <= least + 1e-6 * std::fabs(from))) return wrong("encode", c, 0, 0, n, k, value, from);
        if (!(y.data[i] == value)) return wrong("round", c, 0, 0, n, k, y.data[i], value);
        lost.data[2 * n] += std::pow((double)(value - from), 2), lost.data[2 * n + 1] += std::pow((double)from, 2);
        int64_t group = n * c.groups + k / c.group;
        if (!(low.data[group] <= from && from <= high.data[group])) return wrong("extremes", c, 0, 0, n, k, low.data[group], from);
    }
    for (int64_t i = 0; i < 2 * c.rows; i++)
        if (!(std::fabs(squares.data[i] - lost.data[i]) <= 1e-12 * lost.data[i]))
            return wrong("row_squares", c, 0, 0, i / 2, i % 2, (float)squares.data[i], (float)lost.data[i]);
    return 0;
}

int main(int count, char **given) {
    if (count != 3) return std::printf("fuzz_kernels SECONDS SEED\n"), 2;
    random_bits.seed((uint64_t)std::atoll(given[2]));
    auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::atof(given[1]));
    int64_t calls = 0;
    for (; std::chrono::steady_clock::now() < end; calls++) {
        Case c = Case::random();
        if (try_linear(c) || try_rows(c) || try_codes(c)) return 1;
    }
    std::printf("%lld weights, nothing wrong\n", (long long)calls);
    return 0;
}
