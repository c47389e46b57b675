// A node of onnxruntime's and what it is given: operators, statuses, tensors, weights, threads. What ort.cpp is made of.
#pragma once
#include "activations.h"
#include "formats.h"
#include "ort_abi.h"
#include "packed.h"
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

namespace fxq {
namespace {

using ort::Status;
using ort::Type;

constexpr size_t RANK = 16; // dimensions of a tensor, at most

// --- operators ------------------------------------------------------------------------------------------------------
enum class Kind { LINEAR, LINEAR_BIAS, EMBEDDING, DEQUANTIZE, DYNAMIC, STATIC };
constexpr const char *KIND[] = {"Linear", "LinearBias", "Embedding", "Dequantize", "FakeQuantizeDynamic", "FakeQuantize"};

struct Operator : ort::CustomOp {
    const ort::Api *api;
    Kind kind;
    const Format *format;
    Type x, scale; // what comes first (indices of an embedding), and what scales are
    std::string name;

    bool has_weight() const { return kind != Kind::DYNAMIC && kind != Kind::STATIC; }
    size_t packed() const { return kind == Kind::DEQUANTIZE ? 0 : 1; } // which input; scale and zero point follow
    size_t inputs() const {
        if (!has_weight()) return kind == Kind::STATIC ? 2 : 1;
        return packed() + 2 + format->zero_point + (kind == Kind::LINEAR_BIAS);
    }
    Type input(size_t i) const {
        if (i < packed() || (i + 1 == inputs() && kind == Kind::LINEAR_BIAS)) return x;
        if (!has_weight()) return Type::FLOAT;
        return i == packed() + 1 ? scale : Type::UINT8;
    }
    Type output() const { return kind == Kind::EMBEDDING || kind == Kind::DEQUANTIZE ? Type::FLOAT : x; }
};

// A node of a session.
struct Node {
    const Operator &op;
    std::string name;
    int64_t cols = 0, group = 0, activation_bits = 32;
    std::vector<int64_t> shape;

    const ort::Api &api() const { return *op.api; }
};

// --- statuses -------------------------------------------------------------------------------------------------------
__attribute__((format(printf, 2, 3))) Status *wrong(const Node &node, const char *format, ...) {
    char what[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    std::string text = node.op.name + " node '" + node.name + "': " + what;
    return node.api().CreateStatus(ort::INVALID_ARGUMENT, text.c_str());
}

// Runs what gives a status; an exception, of which there can be none but memory that ran out, becomes one too.
template <class Body> Status *guarded(const ort::Api &api, const Body &body) {
    try {
        return body();
    } catch (const std::exception &error) {
        return api.CreateStatus(ort::FAIL, (std::string("fxquant: ") + error.what()).c_str());
    }
}

// Whether there was an error; it is forgotten.
bool ignored(const ort::Api &api, Status *status) {
    if (status) api.ReleaseStatus(status);
    return status;
}

#define FXQ_TRY(call)                                                                                                  \
    if (Status *status = (call)) return status

// --- tensors --------------------------------------------------------------------------------------------------------
struct Tensor {
    void *data = nullptr;
    Type type = Type::UNKNOWN;
    size_t rank = 0;
    int64_t dims[RANK]{}, count = 1;

    template <class T> T *as() const { return static_cast<T *>(data); }
};

std::string text(const Tensor &tensor) {
    std::string found = "[";
    for (size_t i = 0; i < tensor.rank; i++) found += (i ? ", " : "") + std::to_string(tensor.dims[i]);
    return found + "]";
}

Status *describe(const Node &node, const char *what, const ort::TensorInfo *info, Tensor &to) {
    const ort::Api &api = node.api();
    FXQ_TRY(api.GetTensorElementType(info, &to.type));
    FXQ_TRY(api.GetDimensionsCount(info, &to.rank));
    if (to.rank > RANK) return wrong(node, "%s has %zu dimensions; at most %zu are allowed", what, to.rank, RANK);
    FXQ_TRY(api.GetDimensions(info, to.dims, to.rank));
    for (size_t i = 0; i < to.rank; i++) to.count *= to.dims[i];
    return nullptr;
}

Status *read(const Node &node, const char *what, const ort::Value *value, Type type, Tensor &to) {
    const ort::Api &api = node.api();
    if (!value) return wrong(node, "%s is missing", what);
    ort::TensorInfo *info = nullptr;
    FXQ_TRY(api.GetTensorTypeAndShape(value, &info));
    Status *status = describe(node, what, info, to);
    api.ReleaseTensorTypeAndShapeInfo(info);
    if (status) return status;
    if (to.type != type)
        return wrong(node, "%s has element type %d of ONNX; %d is expected", what, (int)to.type, (int)type);
    return api.GetTensorMutableData(const_cast<ort::Value *>(value), &to.data);
}

Status *read_input(const Node &node, const char *what, const ort::KernelContext *context, size_t i, Tensor &to) {
    size_t count = 0;
    const ort::Value *value = nullptr;
    FXQ_TRY(node.api().KernelContext_GetInputCount(context, &count));
    if (i < count) FXQ_TRY(node.api().KernelContext_GetInput(context, i, &value));
    return read(node, what, value, node.op.input(i), to);
}

Status *make_output(const Node &node, ort::KernelContext *context, const int64_t *dims, size_t rank, void **data) {
    ort::Value *value = nullptr;
    FXQ_TRY(node.api().KernelContext_GetOutput(context, 0, dims, rank, &value));
    return node.api().GetTensorMutableData(value, data);
}

// x as floats: where it is, or in `room`.
const float *floats(const Tensor &x, std::unique_ptr<float[]> &room) {
    if (x.type == Type::FLOAT) return x.as<float>();
    room.reset(new float[(size_t)x.count]);
    (x.type == Type::FLOAT16 ? halves_to_floats : bfloats_to_floats)(x.as<uint16_t>(), x.count, room.get());
    return room.get();
}

void round_to(Type type, const float *from, int64_t count, void *to) {
    (type == Type::FLOAT16 ? floats_to_halves : floats_to_bfloats)(from, count, static_cast<uint16_t *>(to));
}

// --- weights --------------------------------------------------------------------------------------------------------
int64_t groups(const Node &node) { return (node.cols + node.group - 1) / node.group; }

Status *check_packed(const Node &node, const Tensor &packed) {
    const Format &format = *node.op.format;
    int64_t bytes = row_bytes(format.bits, node.cols);
    if (packed.rank == 2 && packed.dims[1] == bytes) return nullptr;
    return wrong(node,
                 "packed has shape %s; rows of %lld columns (cols) of %d bits are uint8 [rows, %lld]: the weight is cut "
                 "short, or cols is not its number of columns",
                 text(packed).c_str(), (long long)node.cols, format.bits, (long long)bytes);
}

// rows: 0 where they are not known
Status *check_scale(const Node &node, const char *what, const Tensor &scale, int64_t rows) {
    bool right = scale.rank == 2 && scale.dims[1] == groups(node);
    if (right && (rows == 0 || scale.dims[0] == rows || scale.dims[0] == 1)) return nullptr;
    return wrong(node, "%s has shape %s; [rows, %lld] or [1, %lld] is expected for %lld columns in groups of %lld", what,
                 text(scale).c_str(), (long long)groups(node), (long long)groups(node), (long long)node.cols,
                 (long long)node.group);
}

Status *read_weight(const Node &node, const ort::KernelContext *context, Weight &weight) {
    const Operator &op = node.op;
    Tensor packed, scale, zero;
    FXQ_TRY(read_input(node, "packed", context, op.packed(), packed));
    FXQ_TRY(check_packed(node, packed));
    FXQ_TRY(read_input(node, "scale", context, op.packed() + 1, scale));
    FXQ_TRY(check_scale(node, "scale", scale, packed.dims[0]));
    if (op.format->zero_point) {
        FXQ_TRY(read_input(node, "zero_point", context, op.packed() + 2, zero));
        FXQ_TRY(check_scale(node, "zero_point", zero, packed.dims[0]));
        if (zero.dims[0] != scale.dims[0])
            return wrong(node, "scale has shape %s, zero_point %s; they are to be the same", text(scale).c_str(),
                         text(zero).c_str());
    }
    weight = Weight{packed.as<uint8_t>(), scale.data, zero.as<uint8_t>(), op.format->values, packed.dims[0], node.cols,
                    node.group, op.format->bits, op.scale == Type::FLOAT16, scale.dims[0] == 1};
    return nullptr;
}

// --- threads --------------------------------------------------------------------------------------------------------
// The pool of a session, through the context of a call. How many threads it has cannot be asked; pieces beyond them wait.
class Pool {
  public:
    Pool(const Node &node, ort::KernelContext *context) : api(node.api()), context(context) {}

    Threads threads() { return Threads{run, this}; }

    static void run(void *host, int64_t count, void (*piece)(void *data, int64_t i), void *data) {
        const Pool &pool = *static_cast<Pool *>(host);
        Pieces all{piece, data};
        if (count > 1) {
            Status *status = pool.api.KernelContext_ParallelFor(pool.context, one, (size_t)count, 0, &all);
            if (!status) return;
            pool.api.ReleaseStatus(status);
        }
        for (int64_t i = 0; i < count; i++) piece(data, i);
    }

  private:
    struct Pieces {
        void (*piece)(void *data, int64_t i);
        void *data;
    };

    static void one(void *given, size_t i) {
        const Pieces &pieces = *static_cast<Pieces *>(given);
        pieces.piece(pieces.data, (int64_t)i);
    }

    const ort::Api &api;
    ort::KernelContext *context;
};

} // namespace
} // namespace fxq
