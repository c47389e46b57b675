// The interface of packed.h, code by code: slow, and plain enough to be right.
#include "packed.h"
#include <cstring>
#include <initializer_list>

namespace fxq {

int64_t row_bytes(int32_t bits, int64_t cols) {
    int64_t bytes = 0;
    for (int32_t width : {4, 2, 1, 8})
        if (bits & width) bytes += (cols * width + 7) / 8;
    return bytes;
}

static int32_t code(const Weight &w, int64_t n, int64_t k) {
    const uint8_t *plane = w.packed + n * row_bytes(w.bits, w.cols);
    int32_t found = 0, low = 0;
    for (int32_t width : {4, 2, 1, 8}) {
        if (!(w.bits & width)) continue;
        found |= (plane[k * width / 8] >> k * width % 8 & ((1 << width) - 1)) << low;
        low += width;
        plane += (w.cols * width + 7) / 8;
    }
    return found;
}

static float half(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 1023, bits;
    float value;
    if (e == 0) {
        value = (float)m * 0x1p-24f;
        std::memcpy(&bits, &value, 4);
    } else {
        bits = (e == 31 ? 255u : e + 112) << 23 | m << 13;
    }
    bits |= sign;
    std::memcpy(&value, &bits, 4);
    return value;
}

static float number(const Weight &w, int64_t n, int64_t k) {
    int64_t groups = (w.cols + w.group - 1) / w.group, at = (w.one_scale_row ? 0 : n) * groups + k / w.group;
    float scale = w.half_scale ? half(static_cast<const uint16_t *>(w.scale)[at]) : static_cast<const float *>(w.scale)[at];
    return (w.values[code(w, n, k)] - (w.zero ? (float)w.zero[at] : 0.0f)) * scale;
}

struct Product {
    const Weight &w;
    const float *x, *bias;
    int64_t M, x_stride;
    float *y;
    int64_t y_stride;
};

const char *linear(const Weight &w, const float *x, int64_t M, int64_t x_stride, const float *bias, float *y,
                   int64_t y_stride, int32_t, const Threads &threads) {
    Product all{w, x, bias, M, x_stride, y, y_stride};
    threads.run(threads.host, w.rows, [](void *data, int64_t n) {
        const Product &p = *static_cast<Product *>(data);
        for (int64_t m = 0; m < p.M; m++) {
            float sum = 0;
            for (int64_t k = 0; k < p.w.cols; k++) sum += p.x[m * p.x_stride + k] * number(p.w, n, k);
            p.y[m * p.y_stride + n] = sum + (p.bias ? p.bias[n] : 0.0f);
        }
    }, &all);
    return nullptr;
}

struct Rows {
    const Weight &w;
    const int64_t *index;
    float *to;
};

void rows(const Weight &w, const int64_t *index, int64_t count, float *to, const Threads &threads) {
    Rows all{w, index, to};
    threads.run(threads.host, count, [](void *data, int64_t i) {
        const Rows &r = *static_cast<Rows *>(data);
        for (int64_t k = 0; k < r.w.cols; k++) r.to[i * r.w.cols + k] = number(r.w, r.index[i], k);
    }, &all);
}

} // namespace fxq
