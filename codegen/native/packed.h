// Packed weights and what is done with them: what the hosts, torch (library.cpp) and onnxruntime (ort.cpp), call.
//
//     W[n][k] = (values[code[n][k]] - zero[n][g]) * scale[n][g]        g = k / group
//
// The codes lie as fxquant.packing.planar has them, on disk, in an ONNX file, and here: a row is its planes one after
// another, each filled up to a byte; planes are of 4, 2 and 1 bits, lowest bits of a code first (6 bits: 4 + 2), or of 8.
// Nothing is repacked: kernels read these bytes.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fxq {

struct Weight {
    const uint8_t *packed; // [rows][row_bytes(bits, cols)]
    const void *scale;     // [rows][groups], or [1][groups] for all rows; float, or float16 where half_scale
    const uint8_t *zero;   // as scale, or null
    const float *values;   // [2^bits]: the number of every code
    int64_t rows, cols;
    int64_t group;         // columns that share a scale; cols where a row has one
    int32_t bits;          // 2 to 8
    int32_t half_scale;
    int32_t one_scale_row;
};

// Threads of the host: run calls piece(data, i) for every i < pieces, in any order, at the same time, and comes back when
// all are done. It must not throw.
struct Threads {
    void (*run)(void *host, int64_t pieces, void (*piece)(void *data, int64_t i), void *data);
    void *host;
};

// Bytes of a row of codes.
int64_t row_bytes(int32_t bits, int64_t cols);

// y[m][n] = sum over k of x[m][k] W[n][k] + bias[n] for x [M][cols] and y [M][rows], rows of either so many floats apart;
// bias may be null. Sums are float32 (activation_bits 32), or x may be rounded to 16 or 8 bits, a scale for each row and 8
// columns, where there is a kernel for that (rounded.cpp). The same bits for any number of threads. Null when it is done, else why it is not (memory for a panel ran out).
const char *linear(const Weight &w, const float *x, int64_t M, int64_t x_stride, const float *bias, float *y,
                   int64_t y_stride, int32_t activation_bits, const Threads &threads);

// Rows of W: to[i][k] = W[index[i]][k]. Indices are to be within rows.
void rows(const Weight &w, const int64_t *index, int64_t count, float *to, const Threads &threads);

} // namespace fxq
