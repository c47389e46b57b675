// The parts of the library, each compiled by itself.
#pragma once
#include "packed.h"
#include "vectors.h"

namespace fxq {

// The planes of a code, widest first: 6 bits are 4 + 2.
constexpr bool has_plane(int bits, int width) { return width == 8 ? bits == 8 : bits != 8 && (bits & width); }

constexpr const char *NO_MEMORY = "no memory for rows of x and decoded rows of W";

// y = x W^T + bias in float32 (exact.cpp). Null, or why not.
const char *exact(const Weight &w, const float *x, int64_t M, int64_t x_stride, const float *bias, float *y,
                  int64_t y_stride, const Threads &threads);

// The same with x rounded to activation_bits (rounded.cpp); false where there is no such kernel for w.
bool rounded(const Weight &w, const float *x, int64_t M, int64_t x_stride, const float *bias, float *y, int64_t y_stride,
             int32_t activation_bits, const Threads &threads, const char **failed);

} // namespace fxq
