// Products in float32, and rows of W: the decoders that an instruction set has.
#include "gemm.h"

namespace fxq {

// Calls what(D) for the decoder of w's numbers.
template <int BITS, class What> static void with_decoder_of(const Weight &w, What what) {
    Tables tables(w.values, BITS);
#if FXQ_AVX512
    if constexpr (BITS == 8) {
        if (tables.upper && tables.mirrored()) return what(std::common_type<ByUpper<8, true>>{}, tables);
        if (tables.whole(true)) return what(std::common_type<ByWhole<true>>{}, tables);
        if (tables.whole(false)) return what(std::common_type<ByWhole<false>>{}, tables);
    }
    if (tables.upper) return what(std::common_type<ByUpper<BITS>>{}, tables);
    return what(std::common_type<ByGather<BITS>>{}, tables);
#else
#if FXQ_AVX2
    if constexpr (BITS <= 6) {
        if (tables.upper) return what(std::common_type<ByUpper<BITS>>{}, tables);
    } else if constexpr (BITS == 8) {
        if (tables.whole(true)) return what(std::common_type<ByShift<true, true>>{}, tables);
        if (tables.whole(false)) return what(std::common_type<ByShift<true, false>>{}, tables);
        if (tables.find_shift()) return what(std::common_type<ByShift<false, false>>{}, tables);
    }
#endif
    return what(std::common_type<ByTable<BITS>>{}, tables);
#endif
}

template <class What> static void with_decoder(const Weight &w, What what) {
    switch (w.bits) {
    case 2: return with_decoder_of<2>(w, what);
    case 3: return with_decoder_of<3>(w, what);
    case 4: return with_decoder_of<4>(w, what);
    case 5: return with_decoder_of<5>(w, what);
    case 6: return with_decoder_of<6>(w, what);
    case 7: return with_decoder_of<7>(w, what);
    case 8: return with_decoder_of<8>(w, what);
    }
}

const char *exact(const Weight &w, const float *x, int64_t M, int64_t x_stride, const float *bias, float *y,
                  int64_t y_stride, const Threads &threads) {
    const char *failed = nullptr;
    with_decoder(w, [&](auto of, const Tables &tables) {
        failed = multiply<typename decltype(of)::type>(w, tables, x, M, x_stride, bias, y, y_stride, threads);
    });
    return failed;
}

void rows(const Weight &w, const int64_t *index, int64_t count, float *to, const Threads &threads) {
    with_decoder(w, [&](auto of, const Tables &tables) {
        decode_rows<typename decltype(of)::type>(w, tables, index, count, to, threads);
    });
}

} // namespace fxq
