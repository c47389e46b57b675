// Ranges of floats, floats to codes and what that loses, codes to the bytes of the planar layout and back, activations to
// a grid: what torch calls for whole matrices (library.cpp). Each is the reference of fxquant bit for bit, but for NaN and
// Inf in activations.
#pragma once
#include "activations.h"
#include "packed.h"

namespace fxq {

enum class Real : int32_t { FLOAT, HALF, BFLOAT };

enum class Kind : int32_t { FLOAT, POWERS, INTEGERS }; // POWERS is a float format without mantissa

// How ratios become codes, to nearest with ties to the even code, saturating.
struct Encoding {
    Kind kind;
    int32_t bits, mbits;
    int32_t lowest;    // exponent of the smallest normal magnitude
    int32_t most;      // the highest code of a finite magnitude
    int32_t nan;       // the code of NaN; -1 where NaN saturates. Integers: 0
    int32_t no_minus;  // the code of a negative zero becomes 0 (fnuz)
    float low, max;    // ratios are kept inside
};

// One number for every block of `high` rows and `group` columns; rows 1: for all rows.
template <class T> struct Blocks {
    const T *at; // [rows][groups]
    int64_t rows, groups, high, group;
    const T *of_row(int64_t row) const { return at + (rows == 1 ? 0 : row / high) * groups; }
};

struct Matrix {
    const void *x; // [rows][cols], rows so many values apart
    int64_t rows, cols, stride;
    Blocks<float> scale;
    const uint8_t *zero; // as scale.at, or null
    int32_t multiply;    // ratio = x * scale, not x / scale
    Real type;
};

// The least and the largest of every `group` columns of a row, [rows][ceil(cols / group)]; NaN where there is one.
void extremes(const void *x, Real type, int64_t rows, int64_t cols, int64_t stride, int64_t group, float *least,
              float *most, const Threads &threads);

// to[r][c] = the code of x / scale, or of round(x / scale) + zero.
void encode(const Matrix &matrix, const Encoding &encoding, uint8_t *to, const Threads &threads);

// to[r][2]: the sums over a row's columns of (x - x')^2 and of x^2, where x' = (table[code] - zero) * scale.
void row_squares(const Matrix &matrix, const uint8_t *codes, const float *table, double *to, const Threads &threads);

// Codes [rows][cols], rows `stride` apart, to rows of row_bytes(bits, cols). Gives all bits of all codes, or'ed.
int32_t pack(const uint8_t *codes, int64_t rows, int64_t cols, int64_t stride, int32_t bits, uint8_t *to,
             const Threads &threads);
void unpack(const uint8_t *packed, int64_t rows, int64_t cols, int64_t stride, int32_t bits, uint8_t *to,
            const Threads &threads);

// Activations [rows][cols] and where they go, of one type.
struct Activations {
    const void *x;
    void *y;
    int64_t rows, cols;
    Blocks<float> scale; // at null: found for every block, which is of one row
    Grid grid;
    float zero; // added to what is rounded: -0 changes nothing, +0 makes -0 to 0, for grids that have no -0
    Real type;
};

// y = rounded(x / scale) * scale. False where x or a scale is not finite: y is then undefined.
bool round_activations(const Activations &all, const Threads &threads);

} // namespace fxq
