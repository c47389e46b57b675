// The entries of the CPU kernels for torch, through ctypes, and which kernel a product takes.
#include "encode.h"
#include "kernels.h"
#include <atomic>
#include <initializer_list>

namespace fxq {

int64_t row_bytes(int32_t bits, int64_t cols) {
    int64_t bytes = 0;
    for (int width : {8, 4, 2, 1})
        if (has_plane(bits, width)) bytes += ceil_div(cols * width, 8);
    return bytes;
}

constexpr int64_t ROUNDED = 16; // rows of x up to which rounding them is worth while

const char *linear(const Weight &w, const float *x, int64_t M, int64_t x_stride, const float *bias, float *y,
                   int64_t y_stride, int32_t activation_bits, const Threads &threads) {
    if (w.bits < 2 || w.bits > 8) return "codes of 2 to 8 bits are known";
    if (activation_bits != 8 && activation_bits != 16 && activation_bits != 32) return "activation_bits is 8, 16 or 32";
    if (M == 0 || w.rows == 0) return nullptr;
    const char *failed = nullptr;
    if (activation_bits < 32 && M <= ROUNDED &&
        rounded(w, x, M, x_stride, bias, y, y_stride, activation_bits, threads, &failed))
        return failed;
    return exact(w, x, M, x_stride, bias, y, y_stride, threads);
}

// --- threads of OpenMP, where the process has it ---------------------------------------------------------------------
typedef void (*Parallel)(void (*)(void *), void *, unsigned threads, unsigned flags); // GOMP_parallel

struct Work {
    Parallel parallel;
    int64_t threads;
    std::atomic<int64_t> next{0};
    int64_t pieces = 0;
    void (*piece)(void *, int64_t) = nullptr;
    void *data = nullptr;

    Work(Parallel parallel, int64_t threads) : parallel(parallel), threads(threads) {}
};

static void take(void *given) {
    Work &work = *static_cast<Work *>(given);
    for (int64_t i; (i = work.next.fetch_add(1)) < work.pieces;) work.piece(work.data, i);
}

static void run(void *host, int64_t pieces, void (*piece)(void *, int64_t), void *data) {
    Work &work = *static_cast<Work *>(host);
    work.next = 0, work.pieces = pieces, work.piece = piece, work.data = data;
    if (work.parallel && work.threads > 1 && pieces > 1) work.parallel(take, &work, (unsigned)work.threads, 0);
    else take(&work);
}

} // namespace fxq

#define FXQ_VISIBLE extern "C" __attribute__((visibility("default")))

FXQ_VISIBLE const char *fxquant_linear(const fxq::Weight *w, const float *x, int64_t M, int64_t x_stride,
                                       const float *bias, float *y, int64_t y_stride, int32_t activation_bits,
                                       fxq::Parallel parallel, int64_t threads) {
    fxq::Work work(parallel, threads);
    return fxq::linear(*w, x, M, x_stride, bias, y, y_stride, activation_bits, {fxq::run, &work});
}

FXQ_VISIBLE void fxquant_rows(const fxq::Weight *w, const int64_t *index, int64_t count, float *to,
                              fxq::Parallel parallel, int64_t threads) {
    fxq::Work work(parallel, threads);
    fxq::rows(*w, index, count, to, {fxq::run, &work});
}

FXQ_VISIBLE void fxquant_extremes(const void *x, fxq::Real type, int64_t rows, int64_t cols, int64_t stride, int64_t group,
                                  float *least, float *most, fxq::Parallel parallel, int64_t threads) {
    fxq::Work work(parallel, threads);
    fxq::extremes(x, type, rows, cols, stride, group, least, most, {fxq::run, &work});
}

FXQ_VISIBLE void fxquant_encode(const fxq::Matrix *matrix, const fxq::Encoding *encoding, uint8_t *to,
                                fxq::Parallel parallel, int64_t threads) {
    fxq::Work work(parallel, threads);
    fxq::encode(*matrix, *encoding, to, {fxq::run, &work});
}

FXQ_VISIBLE void fxquant_row_squares(const fxq::Matrix *matrix, const uint8_t *codes, const float *table, double *to,
                                     fxq::Parallel parallel, int64_t threads) {
    fxq::Work work(parallel, threads);
    fxq::row_squares(*matrix, codes, table, to, {fxq::run, &work});
}

FXQ_VISIBLE int32_t fxquant_pack(const uint8_t *codes, int64_t rows, int64_t cols, int64_t stride, int32_t bits,
                                 uint8_t *to, fxq::Parallel parallel, int64_t threads) {
    fxq::Work work(parallel, threads);
    return fxq::pack(codes, rows, cols, stride, bits, to, {fxq::run, &work});
}

FXQ_VISIBLE void fxquant_unpack(const uint8_t *packed, int64_t rows, int64_t cols, int64_t stride, int32_t bits,
                                uint8_t *to, fxq::Parallel parallel, int64_t threads) {
    fxq::Work work(parallel, threads);
    fxq::unpack(packed, rows, cols, stride, bits, to, {fxq::run, &work});
}

FXQ_VISIBLE int32_t fxquant_round(const fxq::Activations *all, fxq::Parallel parallel, int64_t threads) {
    fxq::Work work(parallel, threads);
    return fxq::round_activations(*all, {fxq::run, &work});
}
