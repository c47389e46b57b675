// Codes of floats, planes of codes, rounded activations. Inner loops run over BLOCK values in local arrays and have no
// branches, so that a compiler makes vectors of them.
#include "encode.h"
#include "kernels.h"
#include <atomic>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3") // before GCC 12, -O2 makes no vectors
#endif

namespace fxq {

constexpr int BLOCK = 64;
constexpr int64_t PIECE = 1 << 16; // values that a thread takes at a time

// Calls what(first, last) for runs of rows, on the host's threads.
template <class What> static void by_rows(int64_t rows, int64_t cols, const Threads &threads, const What &what) {
    struct Some {
        const What &what;
        int64_t rows, at_once;
    } some{what, rows, PIECE / (cols + 1) + 1};
    auto piece = [](void *data, int64_t i) {
        const Some &some = *static_cast<Some *>(data);
        some.what(i * some.at_once, least(some.rows, (i + 1) * some.at_once));
    };
    threads.run(threads.host, ceil_div(rows, some.at_once), piece, &some);
}

// --- floats -------------------------------------------------------------------------------------------------------------
static void read(const void *x, Real type, int64_t first, int64_t count, float *to) {
    const uint16_t *half = static_cast<const uint16_t *>(x) + first;
    switch (type) {
    case Real::FLOAT:
        std::memcpy(to, static_cast<const float *>(x) + first, (size_t)count * sizeof(float));
        return;
    case Real::HALF: return halves_to_floats(half, count, to);
    case Real::BFLOAT: return bfloats_to_floats(half, count, to);
    }
}

// The same where they are, if they are floats, else in `some`.
static const float *floats_of(const void *x, Real type, int64_t first, int64_t count, float *some) {
    if (type == Real::FLOAT) return static_cast<const float *>(x) + first;
    read(x, type, first, count, some);
    return some;
}

// BLOCK columns of a row, zeros after the last.
static const float *block_of(const Matrix &m, int64_t row, int64_t at, float (&some)[BLOCK]) {
    int64_t count = least(BLOCK, m.cols - at);
    if (count == BLOCK) return floats_of(m.x, m.type, row * m.stride + at, count, some);
    read(m.x, m.type, row * m.stride + at, count, some);
    for (int64_t i = count; i < BLOCK; i++) some[i] = 0;
    return some;
}

// --- ranges -------------------------------------------------------------------------------------------------------------
// Bits as integers in the order of floats, NaN outside of the infinities; and back.
static inline int32_t ordered(int32_t bits) { return bits ^ (bits >> 31 & 0x7FFFFFFF); }

static void range(const void *x, Real type, int64_t first, int64_t count, float *least, float *most) {
    constexpr int64_t SOME = 16 * BLOCK;
    float some[SOME];
    int32_t low = 0x7FFFFFFF, high = -0x7FFFFFFF - 1;
    for (int64_t at = 0; at < count; at += SOME) {
        int64_t now = fxq::least(SOME, count - at);
        const float *values = floats_of(x, type, first + at, now, some);
        for (int64_t i = 0; i < now; i++) {
            int32_t key = ordered((int32_t)bits_of(values[i]));
            low = key < low ? key : low;
            high = key > high ? key : high;
        }
    }
    bool numbers = low >= ordered((int32_t)0xFF800000) && high <= 0x7F800000;
    *least = of_bits(numbers ? (uint32_t)ordered(low) : 0x7FC00000);
    *most = of_bits(numbers ? (uint32_t)ordered(high) : 0x7FC00000);
}

void extremes(const void *x, Real type, int64_t rows, int64_t cols, int64_t stride, int64_t group, float *low,
              float *high, const Threads &threads) {
    by_rows(rows, cols, threads, [&](int64_t first, int64_t last) {
        int64_t to = first * ceil_div(cols, group);
        for (int64_t row = first; row < last; row++)
            for (int64_t at = 0; at < cols; at += group, to++)
                range(x, type, row * stride + at, least(group, cols - at), low + to, high + to);
    });
}

// --- encode -----------------------------------------------------------------------------------------------------------
static inline int32_t signed_bits(float value) { return (int32_t)bits_of(value); }

// The code of a ratio. A float plus c, 2^23 steps of its binade (of the lowest one for subnormals), is rounded to a step by
// the addition; its bits less those of c count steps, and the exponent fields below add their codes.
template <Kind KIND> static FXQ_INLINE int32_t code_of(float ratio, float zero, const Encoding &to) {
    if (KIND == Kind::INTEGERS) {
        constexpr float ONES = 12582912; // 1.5 * 2^23, where a step is 1
        float kept = ratio > -512.0f ? ratio : -512.0f; // beyond every code and zero point
        kept = kept < 512.0f ? kept : 512.0f;
        float whole = kept + ONES - ONES + zero;
        whole = whole > to.low ? whole : to.low;
        whole = whole < to.max ? whole : to.max;
        int32_t code = (int32_t)whole & ((1 << to.bits) - 1);
        return ratio == ratio ? code : 0;
    }
    int32_t bits = signed_bits(ratio), sign = (int32_t)((uint32_t)bits >> (32 - to.bits)) & 1 << (to.bits - 1);
    int32_t whole = bits & 0x7FFFFFFF, most = signed_bits(to.max), rest = whole < most ? whole : most, code;
    if (KIND == Kind::FLOAT) {
        int32_t drop = 23 - to.mbits, low = (to.lowest + 127) << 23, binade = rest & 0x7F800000;
        int32_t above = binade > low ? binade : low, c = above + (drop << 23);
        code = signed_bits(of_bits((uint32_t)rest) + of_bits((uint32_t)c)) - c + ((above - low) >> drop);
    } else { // neighbours are powers of two; a tie goes to the even code
        int32_t one = (to.lowest + 126) << 23, from = rest - one;
        float magic = of_bits((uint32_t)(to.lowest + 127 + 23) << 23);
        int32_t high = (from + ((1 << 22) - 1) + (from >> 23 & 1)) >> 23;
        int32_t low = signed_bits(of_bits((uint32_t)rest) + magic) - signed_bits(magic);
        code = rest < one + (1 << 23) ? low : high;
        code = code < to.most ? code : to.most;
    }
    code |= sign;
    code = code == to.no_minus ? 0 : code;
    return whole > (to.nan < 0 ? 0x7FFFFFFF : 0x7F800000) ? to.nan : code;
}

// Scales and zero points of BLOCK columns, one for each.
struct Spread {
    float scale[BLOCK], zero[BLOCK];
    int64_t group = -1; // that all of them are of

    void fill(const Matrix &m, int64_t row, int64_t first, int64_t count) {
        int64_t begin = first / m.scale.group, end = (first + count - 1) / m.scale.group;
        if (begin == end && begin == group) return;
        const float *scales = m.scale.of_row(row);
        const uint8_t *zeros = m.zero ? m.zero + (scales - m.scale.at) : nullptr;
        group = begin == end ? begin : -1;
        if (begin == end) {
            float own = scales[begin], offset = zeros ? zeros[begin] : 0.0f;
            for (int i = 0; i < BLOCK; i++) scale[i] = own, zero[i] = offset;
            return;
        }
        int64_t left = (begin + 1) * m.scale.group - first, i = 0;
        for (int64_t g = begin; i < BLOCK; g++, left = m.scale.group) {
            int64_t to = g == end ? BLOCK : least(BLOCK, i + left);
            float own = scales[g], offset = zeros ? zeros[g] : 0.0f;
            for (; i < to; i++) scale[i] = own, zero[i] = offset;
        }
    }
};

template <Kind KIND, bool MULTIPLY>
static void encode_rows(const Matrix &m, Encoding encoding, uint8_t *to, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        Spread spread;
        for (int64_t at = 0; at < m.cols; at += BLOCK) {
            int64_t count = least(BLOCK, m.cols - at);
            float some[BLOCK];
            const float *x = block_of(m, row, at, some);
            spread.fill(m, row, at, count);
            uint8_t codes[BLOCK];
            for (int i = 0; i < BLOCK; i++) {
                float ratio = MULTIPLY ? x[i] * spread.scale[i] : x[i] / spread.scale[i];
                codes[i] = (uint8_t)code_of<KIND>(ratio, spread.zero[i], encoding);
            }
            std::memcpy(to + row * m.cols + at, codes, (size_t)count);
        }
    }
}

void encode(const Matrix &matrix, const Encoding &encoding, uint8_t *to, const Threads &threads) {
    by_rows(matrix.rows, matrix.cols, threads, [&](int64_t first, int64_t last) {
        auto run = [&](auto rows, auto times) { (matrix.multiply ? times : rows)(matrix, encoding, to, first, last); };
        switch (encoding.kind) {
        case Kind::FLOAT: return run(encode_rows<Kind::FLOAT, false>, encode_rows<Kind::FLOAT, true>);
        case Kind::POWERS: return run(encode_rows<Kind::POWERS, false>, encode_rows<Kind::POWERS, true>);
        case Kind::INTEGERS: return run(encode_rows<Kind::INTEGERS, false>, encode_rows<Kind::INTEGERS, true>);
        }
    });
}

// --- errors -------------------------------------------------------------------------------------------------------------
// The sum of squares of a row, in runs of RUN columns: sum i of a run is of its columns i, i + SUMS and so on.
struct Squares {
    static constexpr int SUMS = 16, RUN = 1024;
    double all[SUMS] = {}, run[SUMS] = {};

    FXQ_INLINE void add(const float *x) {
        for (int at = 0; at < BLOCK; at += SUMS)
            for (int i = 0; i < SUMS; i++) run[i] += (double)x[at + i] * (double)x[at + i]; // which is exact
    }
    void end_run() {
        for (int i = 0; i < SUMS; i++) all[i] += run[i], run[i] = 0;
    }
    double sum() {
        for (int half = SUMS / 2; half; half /= 2)
            for (int i = 0; i < half; i++) all[i] += all[i + half];
        return all[0];
    }
};

void row_squares(const Matrix &m, const uint8_t *codes, const float *table, double *to, const Threads &threads) {
    by_rows(m.rows, m.cols, threads, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            Spread spread;
            Squares lost, all;
            for (int64_t at = 0; at < m.cols; at += BLOCK) {
                int64_t count = least(BLOCK, m.cols - at);
                float some[BLOCK], lack[BLOCK];
                const float *x = block_of(m, row, at, some);
                const uint8_t *code = codes + row * m.cols + at;
                uint8_t few[BLOCK] = {};
                if (count < BLOCK) std::memcpy(few, code, (size_t)count), code = few;
                spread.fill(m, row, at, count);
                for (int i = 0; i < BLOCK; i++) lack[i] = table[code[i]];
                for (int i = 0; i < BLOCK; i++) lack[i] = (lack[i] - spread.zero[i]) * spread.scale[i];
                asm volatile("" : : "r"(lack) : "memory"); // or product and difference became one operation
                for (int i = 0; i < BLOCK; i++) lack[i] -= x[i];
                for (int64_t i = count; i < BLOCK; i++) lack[i] = 0;
                lost.add(lack), all.add(x);
                if ((at + BLOCK) % Squares::RUN == 0 || at + BLOCK >= m.cols) lost.end_run(), all.end_run();
            }
            to[2 * row] = lost.sum(), to[2 * row + 1] = all.sum();
        }
    });
}

// --- planes -------------------------------------------------------------------------------------------------------------
// Words that hold as many codes, a byte each, as a byte of the plane does: 2, 4 or 8 of them.
template <int WIDTH> struct Plane;
template <> struct Plane<4> {
    using Word = uint16_t;
    static Word gather(Word v) { return (Word)((v & 0x000F) | (v >> 4 & 0x00F0)); }
    static Word spread(Word v) { return (Word)((v & 0x000F) | (v & 0x00F0) << 4); }
};
template <> struct Plane<2> {
    using Word = uint32_t;
    static Word gather(Word v) {
        v &= 0x03030303;
        v |= v >> 6;
        return v | v >> 12;
    }
    static Word spread(Word v) {
        v = (v | v << 12) & 0x000F000F;
        return (v | v << 6) & 0x03030303;
    }
};
template <> struct Plane<1> {
    using Word = uint64_t;
    static Word gather(Word v) {
        v &= 0x0101010101010101;
        v |= v >> 7;
        v |= v >> 14;
        return v | v >> 28;
    }
    static Word spread(Word v) {
        v = (v | v << 28) & 0x0000000F0000000F;
        v = (v | v << 14) & 0x0003000300030003;
        return (v | v << 7) & 0x0101010101010101;
    }
};

// The columns at..at + BLOCK of one plane: bits SHIFT.. of codes, and the bytes of the plane.
template <int WIDTH, int SHIFT> static FXQ_INLINE void pack_plane(const uint8_t *codes, uint8_t *plane, int64_t bytes) {
    using Word = typename Plane<WIDTH>::Word;
    constexpr int COUNT = BLOCK * WIDTH / 8;
    Word words[COUNT];
    uint8_t packed[COUNT];
    std::memcpy(words, codes, BLOCK);
    for (int i = 0; i < COUNT; i++) packed[i] = (uint8_t)Plane<WIDTH>::gather((Word)(words[i] >> SHIFT));
    if (bytes >= COUNT) std::memcpy(plane, packed, COUNT);
    else std::memcpy(plane, packed, (size_t)bytes);
}

template <int WIDTH, int SHIFT>
static FXQ_INLINE void unpack_plane(uint8_t *codes, const uint8_t *plane, int64_t bytes) {
    using Word = typename Plane<WIDTH>::Word;
    constexpr int COUNT = BLOCK * WIDTH / 8;
    Word words[COUNT];
    uint8_t packed[COUNT] = {};
    if (bytes >= COUNT) std::memcpy(packed, plane, COUNT);
    else std::memcpy(packed, plane, (size_t)bytes);
    std::memcpy(words, codes, BLOCK);
    for (int i = 0; i < COUNT; i++) words[i] |= (Word)(Plane<WIDTH>::spread(packed[i]) << SHIFT);
    std::memcpy(codes, words, BLOCK);
}

// what(plane's bytes of this block, how many are left in its row) for every plane of codes of BITS bits.
template <int BITS, class What> static FXQ_INLINE void each_plane(int64_t cols, int64_t at, const What &what) {
    int64_t begin = 0;
    auto one = [&](auto width, auto shift) {
        int64_t all = ceil_div(cols * width, 8), skip = at * width / 8;
        what(width, shift, begin + skip, all - skip);
        begin += all;
    };
    if constexpr (BITS & 4) one(std::integral_constant<int, 4>{}, std::integral_constant<int, 0>{});
    if constexpr (BITS & 2) one(std::integral_constant<int, 2>{}, std::integral_constant<int, BITS & 4>{});
    if constexpr (BITS & 1) one(std::integral_constant<int, 1>{}, std::integral_constant<int, BITS & 6>{});
}

template <int BITS> static int32_t pack_row(const uint8_t *codes, int64_t cols, uint8_t *to) {
    uint8_t seen[BLOCK] = {}, some[BLOCK];
    for (int64_t at = 0; at < cols; at += BLOCK) {
        const uint8_t *from = codes + at;
        if (cols - at < BLOCK) {
            std::memset(some, 0, BLOCK);
            std::memcpy(some, from, (size_t)(cols - at)), from = some;
        }
        for (int i = 0; i < BLOCK; i++) seen[i] |= from[i];
        each_plane<BITS>(cols, at, [&](auto width, auto shift, int64_t begin, int64_t bytes) {
            pack_plane<width(), shift()>(from, to + begin, bytes);
        });
    }
    int32_t all = 0;
    for (uint8_t one : seen) all |= one;
    return all;
}

template <int BITS> static void unpack_row(const uint8_t *packed, int64_t cols, uint8_t *to) {
    for (int64_t at = 0; at < cols; at += BLOCK) {
        uint8_t codes[BLOCK] = {};
        each_plane<BITS>(cols, at, [&](auto width, auto shift, int64_t begin, int64_t bytes) {
            unpack_plane<width(), shift()>(codes, packed + begin, bytes);
        });
        if (cols - at >= BLOCK) std::memcpy(to + at, codes, BLOCK);
        else std::memcpy(to + at, codes, (size_t)(cols - at));
    }
}

template <> int32_t pack_row<8>(const uint8_t *codes, int64_t cols, uint8_t *to) {
    std::memcpy(to, codes, (size_t)cols);
    return 0;
}

template <> void unpack_row<8>(const uint8_t *packed, int64_t cols, uint8_t *to) {
    std::memcpy(to, packed, (size_t)cols);
}

using PackRow = int32_t (*)(const uint8_t *, int64_t, uint8_t *);
using UnpackRow = void (*)(const uint8_t *, int64_t, uint8_t *);
constexpr PackRow PACK[] = {nullptr,     pack_row<1>, pack_row<2>, pack_row<3>, pack_row<4>,
                            pack_row<5>, pack_row<6>, pack_row<7>, pack_row<8>};
constexpr UnpackRow UNPACK[] = {nullptr,       unpack_row<1>, unpack_row<2>, unpack_row<3>, unpack_row<4>,
                                unpack_row<5>, unpack_row<6>, unpack_row<7>, unpack_row<8>};

int32_t pack(const uint8_t *codes, int64_t rows, int64_t cols, int64_t stride, int32_t bits, uint8_t *to,
             const Threads &threads) {
    int64_t bytes = row_bytes(bits, cols);
    std::atomic<int32_t> seen{0};
    by_rows(rows, cols, threads, [&](int64_t first, int64_t last) {
        int32_t mine = 0;
        for (int64_t row = first; row < last; row++) mine |= PACK[bits](codes + row * stride, cols, to + row * bytes);
        seen |= mine;
    });
    return seen;
}

void unpack(const uint8_t *packed, int64_t rows, int64_t cols, int64_t stride, int32_t bits, uint8_t *to,
            const Threads &threads) {
    by_rows(rows, cols, threads, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) UNPACK[bits](packed + row * stride, cols, to + row * cols);
    });
}

// --- activations --------------------------------------------------------------------------------------------------------
static void write(const Activations &all, int64_t first, int64_t count, const float *from) {
    uint16_t *half = static_cast<uint16_t *>(all.y) + first;
    switch (all.type) {
    case Real::FLOAT:
        std::memcpy(static_cast<float *>(all.y) + first, from, (size_t)count * sizeof(float));
        return;
    case Real::HALF: return floats_to_halves(from, count, half);
    case Real::BFLOAT: return floats_to_bfloats(from, count, half);
    }
}

template <bool POWERS> static void round_block(float *some, float scale, Grid grid, float zero) {
    grid.mbits = POWERS ? 0 : grid.mbits ? grid.mbits : 1; // so that the compiler knows which
    for (int i = 0; i < BLOCK; i++) some[i] = (rounded(some[i] / scale, grid) + zero) * scale;
}

// The values first..first + count of x, which share a scale; two passes where it is to be found.
static bool round_run(const Activations &all, int64_t first, int64_t count, const float *given) {
    constexpr int64_t SOME = 16 * BLOCK;
    float some[SOME], most = 0, scale = given ? *given : 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t at = 0; at < count; at += SOME) {
            int64_t now = least(SOME, count - at), whole = ceil_div(now, BLOCK) * BLOCK;
            if (pass == 0 || count > SOME) {
                read(all.x, all.type, first + at, now, some);
                for (int64_t i = now; i < whole; i++) some[i] = 0;
            }
            if (pass == 0) {
                most = absmax(some, now, most);
                continue;
            }
            for (int64_t i = 0; i < whole; i += BLOCK)
                (all.grid.mbits ? round_block<false> : round_block<true>)(some + i, scale, all.grid, all.zero);
            write(all, first + at, now, some);
        }
        if (pass == 0) {
            if (!given) scale = dynamic_scale(most, all.grid);
            if (bits_of(most) >= 0x7F800000 || (bits_of(scale) & 0x7FFFFFFF) >= 0x7F800000) return false;
        }
    }
    return true;
}

bool round_activations(const Activations &all, const Threads &threads) {
    std::atomic<bool> finite{true};
    by_rows(all.rows, all.cols, threads, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last && finite; row++)
            for (int64_t g = 0; g * all.scale.group < all.cols; g++) {
                int64_t at = g * all.scale.group;
                const float *scale = all.scale.at ? all.scale.of_row(row) + g : nullptr;
                if (!round_run(all, row * all.cols + at, least(all.scale.group, all.cols - at), scale)) finite = false;
            }
    });
    return finite;
}

} // namespace fxq
