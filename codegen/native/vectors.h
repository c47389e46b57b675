// The compiler's vector types, and what the kernels do with vectors of floats. One source for every instruction set.
#pragma once
#include "activations.h"
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define FXQ_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define FXQ_AVX2 1
#endif

#define FXQ_INLINE inline __attribute__((always_inline)) // a call would put the registers of a sum into memory

namespace fxq {

#if FXQ_AVX512
constexpr int LANES = 16; // floats of a vector
#elif FXQ_AVX2
constexpr int LANES = 8;
#else
constexpr int LANES = 4; // SSE2, NEON
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef float loose_floats __attribute__((vector_size(4 * LANES), aligned(4)));

static inline floats load(const float *from) { return *reinterpret_cast<const loose_floats *>(from); }
static inline void store(float *to, floats value) { *reinterpret_cast<loose_floats *>(to) = value; }
static inline floats all(float value) { return floats{} + value; }

static inline float sum(floats v) {
#if FXQ_AVX512
    return _mm512_reduce_add_ps((__m512)v);
#else
    float part[LANES];
    std::memcpy(part, &v, sizeof part);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
#endif
}

// Numbers that begin at a cache line: a vector across two lines takes two loads. Not initialized; null where memory ran out.
template <class T> class Room {
  public:
    explicit Room(int64_t count = 0)
        : begin(count ? static_cast<T *>(::operator new((size_t)count * sizeof(T), LINE, std::nothrow)) : nullptr) {}
    Room(Room &&other) noexcept : begin(other.begin) { other.begin = nullptr; }
    Room &operator=(Room &&other) noexcept {
        T *mine = begin;
        begin = other.begin, other.begin = mine;
        return *this;
    }
    ~Room() { ::operator delete(begin, LINE); }
    operator T *() const { return begin; }

  private:
    static constexpr std::align_val_t LINE{64};
    T *begin;
};

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

} // namespace fxq
