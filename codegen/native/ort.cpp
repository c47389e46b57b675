// The operators of the domain fxquant for onnxruntime: what the functions in an exported file spell out, as one call each.
//
//     Linear_<format>(x, packed, scale[, zero_point])            y = x W^T           cols, group_size, activation_bits
//     LinearBias_<format>(x, packed, scale[, zero_point], bias)  y = x W^T + bias    cols, group_size, activation_bits
//     Embedding_<format>(indices, packed, scale[, zero_point])   rows of W           cols, group_size
//     Dequantize_<format>(packed, scale[, zero_point])           W                   cols, group_size, weight_shape
//     FakeQuantizeDynamic_<format>(x)                            x rounded row by row
//     FakeQuantize_<format>(x, scale)                            x rounded
//
// x and y are float, float16 or bfloat16, all sums float; scale is float or float16; Embedding and Dequantize give float.
// Whatever does not fit together is a status that names the node. Weights are read where the runtime has them.
#include "ort_node.h"
#include <mutex>

namespace fxq {
namespace {

constexpr int64_t VERSION = 1; // of the domain
constexpr int64_t MOST_COLUMNS = (int64_t)1 << 40;
constexpr int64_t PIECE = 1 << 14; // numbers of activations that are worth a thread

// --- what the operators do ------------------------------------------------------------------------------------------
Status *compute_linear(const Node &node, ort::KernelContext *context) {
    const Operator &op = node.op;
    Tensor x, bias;
    Weight weight;
    FXQ_TRY(read_input(node, "x", context, 0, x));
    FXQ_TRY(read_weight(node, context, weight));
    if (x.rank == 0 || x.dims[x.rank - 1] != weight.cols)
        return wrong(node, "x has shape %s; its last dimension is to be %lld, as the weight has columns", text(x).c_str(),
                     (long long)weight.cols);
    if (op.kind == Kind::LINEAR_BIAS) {
        FXQ_TRY(read_input(node, "bias", context, op.inputs() - 1, bias));
        if (bias.rank != 1 || bias.dims[0] != weight.rows)
            return wrong(node, "bias has shape %s; [%lld] is expected, as the weight has rows", text(bias).c_str(),
                         (long long)weight.rows);
    }
    int64_t M = x.count / weight.cols;
    void *to = nullptr;
    x.dims[x.rank - 1] = weight.rows;
    FXQ_TRY(make_output(node, context, x.dims, x.rank, &to));
    if (M == 0 || weight.rows == 0) return nullptr;
    std::unique_ptr<float[]> x_room, bias_room, y_room;
    const float *from = floats(x, x_room), *plus = op.kind == Kind::LINEAR_BIAS ? floats(bias, bias_room) : nullptr;
    float *y = static_cast<float *>(to);
    if (x.type != Type::FLOAT) y_room.reset(y = new float[(size_t)(M * weight.rows)]);
    Pool pool(node, context);
    const char *failed = linear(weight, from, M, weight.cols, plus, y, weight.rows, (int32_t)node.activation_bits,
                                pool.threads());
    if (failed) return wrong(node, "%s", failed);
    if (x.type != Type::FLOAT) round_to(x.type, y, M * weight.rows, to);
    return nullptr;
}

Status *compute_embedding(const Node &node, ort::KernelContext *context) {
    Tensor indices;
    Weight weight;
    FXQ_TRY(read_input(node, "indices", context, 0, indices));
    FXQ_TRY(read_weight(node, context, weight));
    if (indices.rank == RANK) return wrong(node, "indices have %zu dimensions; at most %zu are allowed", RANK, RANK - 1);
    std::unique_ptr<int64_t[]> index(new int64_t[(size_t)indices.count]);
    for (int64_t i = 0; i < indices.count; i++) {
        int64_t given = indices.type == Type::INT64 ? indices.as<int64_t>()[i] : indices.as<int32_t>()[i];
        if (given < -weight.rows || given >= weight.rows)
            return wrong(node, "index %lld at position %lld is out of range for %lld rows; -%lld to %lld are allowed",
                         (long long)given, (long long)i, (long long)weight.rows, (long long)weight.rows,
                         (long long)weight.rows - 1);
        index[(size_t)i] = given < 0 ? given + weight.rows : given; // counted from the end, as Gather has it
    }
    void *to = nullptr;
    indices.dims[indices.rank] = weight.cols;
    FXQ_TRY(make_output(node, context, indices.dims, indices.rank + 1, &to));
    Pool pool(node, context);
    if (indices.count) rows(weight, index.get(), indices.count, static_cast<float *>(to), pool.threads());
    return nullptr;
}

Status *compute_dequantize(const Node &node, ort::KernelContext *context) {
    Weight weight;
    FXQ_TRY(read_weight(node, context, weight));
    int64_t count = 1;
    bool fits = true;
    for (int64_t size : node.shape) fits = fits && !__builtin_mul_overflow(count, size, &count);
    if (!fits || count != weight.rows * weight.cols)
        return wrong(node, "weight_shape does not have the %lld x %lld values of the weight", (long long)weight.rows,
                     (long long)weight.cols);
    void *to = nullptr;
    FXQ_TRY(make_output(node, context, node.shape.data(), node.shape.size(), &to));
    std::unique_ptr<int64_t[]> index(new int64_t[(size_t)weight.rows]);
    for (int64_t n = 0; n < weight.rows; n++) index[(size_t)n] = n;
    Pool pool(node, context);
    if (count) rows(weight, index.get(), weight.rows, static_cast<float *>(to), pool.threads());
    return nullptr;
}

// Rows of activations, a few at a time; one scale for all, or null.
struct Rounding {
    const Tensor &x;
    void *to;
    int64_t cols, rows, at_once;
    const float *scale;
    const Grid &grid;
};

void round_rows(void *data, int64_t i) {
    const Rounding &all = *static_cast<Rounding *>(data);
    constexpr int64_t SOME = 1024;
    float room[SOME];
    bool wide = all.x.type == Type::FLOAT;
    for (int64_t row = i * all.at_once; row < all.rows && row < (i + 1) * all.at_once; row++) {
        // two passes over a row, each through `room` where x is not float: its scale, then its values
        float most = 0;
        for (int pass = all.scale ? 1 : 0; pass < 2; pass++) {
            float scale = all.scale ? *all.scale : dynamic_scale(most, all.grid);
            for (int64_t at = 0; at < all.cols; at += SOME) {
                int64_t first = row * all.cols + at, count = std::min(SOME, all.cols - at);
                const float *x = all.x.as<float>() + (wide ? first : 0);
                const uint16_t *half = all.x.as<uint16_t>() + first;
                if (!wide) {
                    (all.x.type == Type::FLOAT16 ? halves_to_floats : bfloats_to_floats)(half, count, room);
                    x = room;
                }
                if (pass == 0) {
                    most = absmax(x, count, most);
                } else {
                    fake_quantize(x, count, scale, all.grid, wide ? static_cast<float *>(all.to) + first : room);
                    if (!wide) round_to(all.x.type, room, count, static_cast<uint16_t *>(all.to) + first);
                }
            }
        }
    }
}

Status *compute_rounding(const Node &node, ort::KernelContext *context) {
    Tensor x, scale;
    FXQ_TRY(read_input(node, "x", context, 0, x));
    if (node.op.kind == Kind::STATIC) {
        FXQ_TRY(read_input(node, "scale", context, 1, scale));
        if (scale.count != 1) return wrong(node, "scale has shape %s; one for all is expected", text(scale).c_str());
    }
    void *to = nullptr;
    FXQ_TRY(make_output(node, context, x.dims, x.rank, &to));
    if (x.count == 0) return nullptr;
    int64_t cols = x.rank ? x.dims[x.rank - 1] : 1, at_once = std::max<int64_t>(1, PIECE / cols);
    Rounding all{x, to, cols, x.count / cols, at_once, scale.as<float>(), node.op.format->grid};
    Pool pool(node, context);
    Pool::run(&pool, (all.rows + at_once - 1) / at_once, round_rows, &all);
    return nullptr;
}

Status *compute(void *kernel, ort::KernelContext *context) {
    const Node &node = *static_cast<Node *>(kernel);
    return guarded(node.api(), [&] {
        switch (node.op.kind) {
        case Kind::LINEAR:
        case Kind::LINEAR_BIAS: return compute_linear(node, context);
        case Kind::EMBEDDING: return compute_embedding(node, context);
        case Kind::DEQUANTIZE: return compute_dequantize(node, context);
        default: return compute_rounding(node, context);
        }
    });
}

// --- nodes ----------------------------------------------------------------------------------------------------------
bool has_attribute(const Node &node, const ort::KernelInfo *info, const char *name, int64_t &to) {
    return !ignored(node.api(), node.api().KernelInfoGetAttribute_int64(info, name, &to));
}

Status *read_attribute(const Node &node, const ort::KernelInfo *info, const char *name, int64_t most, int64_t &to) {
    if (!has_attribute(node, info, name, to)) return wrong(node, "it has no INT attribute %s", name);
    if (to < 1 || to > most) return wrong(node, "%s is %lld; 1 to %lld are allowed", name, (long long)to, (long long)most);
    return nullptr;
}

// Constant inputs, which all weights of an exported file are, are checked before the first run.
Status *check_constants(const Node &node, const ort::KernelInfo *info) {
    Tensor found[3];
    const char *names[] = {"packed", "scale", "zero_point"};
    for (size_t i = 0; i < 2u + node.op.format->zero_point; i++) {
        int constant = 0;
        const ort::Value *value = nullptr;
        FXQ_TRY(node.api().KernelInfoGetConstantInput_tensor(info, node.op.packed() + i, &constant, &value));
        if (!constant) continue;
        FXQ_TRY(read(node, names[i], value, node.op.input(node.op.packed() + i), found[i]));
        FXQ_TRY(i == 0 ? check_packed(node, found[0]) : check_scale(node, names[i], found[i], found[0].dims[0]));
    }
    return nullptr;
}

Status *read_node(Node &node, const ort::KernelInfo *info) {
    size_t size = 0;
    FXQ_TRY(node.api().KernelInfo_GetNodeName(info, nullptr, &size));
    node.name.resize(size);
    FXQ_TRY(node.api().KernelInfo_GetNodeName(info, &node.name[0], &size));
    node.name.resize(size ? size - 1 : 0);
    int64_t version = 1; // later ones stand at the node: the version of a domain is not told to a library
    if (has_attribute(node, info, "version", version) && version > VERSION)
        return wrong(node,
                     "it is of version %lld of the operators, this library has version %lld: update fxquant, or run the "
                     "file without the library",
                     (long long)version, (long long)VERSION);
    if (!node.op.has_weight()) return nullptr;
    FXQ_TRY(read_attribute(node, info, "cols", MOST_COLUMNS, node.cols));
    FXQ_TRY(read_attribute(node, info, "group_size", INT64_MAX, node.group));
    node.group = std::min(node.group, node.cols);
    if (node.op.kind == Kind::LINEAR || node.op.kind == Kind::LINEAR_BIAS) {
        if (!has_attribute(node, info, "activation_bits", node.activation_bits)) node.activation_bits = 32;
        if (node.activation_bits != 8 && node.activation_bits != 16 && node.activation_bits != 32)
            return wrong(node, "activation_bits is %lld; 8, 16 and 32 are allowed", (long long)node.activation_bits);
    }
    if (node.op.kind == Kind::DEQUANTIZE) {
        size_t rank = 0;
        if (ignored(node.api(), node.api().KernelInfoGetAttributeArray_int64(info, "weight_shape", nullptr, &rank)))
            return wrong(node, "it has no INTS attribute weight_shape");
        node.shape.resize(rank);
        if (rank) FXQ_TRY(node.api().KernelInfoGetAttributeArray_int64(info, "weight_shape", node.shape.data(), &rank));
        for (int64_t size : node.shape)
            if (size < 0) return wrong(node, "weight_shape has the size %lld", (long long)size);
    }
    return check_constants(node, info);
}

Status *create(const ort::CustomOp *op, void *const *, const ort::KernelInfo *info, void **kernel) {
    return guarded(*static_cast<const Operator *>(op)->api, [&]() -> Status * {
        std::unique_ptr<Node> node(new Node{*static_cast<const Operator *>(op), {}, 0, 0, 32, {}});
        FXQ_TRY(read_node(*node, info));
        *kernel = node.release();
        return nullptr;
    });
}

// --- shapes, before there are data ----------------------------------------------------------------------------------
struct Shape {
    int64_t dims[RANK + 1];
    const char *names[RANK + 1]; // of symbolic sizes, which are -1; else empty
    size_t rank;
    Type type;
};

// The shape of an input; false where it is not known.
bool known(const ort::Api &api, ort::ShapeContext *context, size_t i, Shape &shape) {
    ort::TensorInfo *info = nullptr; // the context's own
    if (ignored(api, api.ShapeInferContext_GetInputTypeShape(context, i, &info)) || !info) return false;
    if (ignored(api, api.GetTensorElementType(info, &shape.type))) return false;
    if (ignored(api, api.GetDimensionsCount(info, &shape.rank)) || shape.rank == 0 || shape.rank > RANK) return false;
    return !ignored(api, api.GetDimensions(info, shape.dims, shape.rank)) &&
           !ignored(api, api.GetSymbolicDimensions(info, shape.names, shape.rank));
}

// An INT or INTS attribute; false where there is none, or too many.
bool attribute(const ort::Api &api, ort::ShapeContext *context, const char *name, ort::Attribute type, Shape &shape) {
    const ort::OpAttr *found = nullptr;
    size_t size = 0;
    if (ignored(api, api.ShapeInferContext_GetAttribute(context, name, &found)) || !found) return false;
    if (ignored(api, api.ReadOpAttr(found, type, shape.dims, RANK * sizeof(int64_t), &size))) return false;
    shape.rank = size / sizeof(int64_t);
    shape.type = Type::FLOAT;
    std::fill_n(shape.names, shape.rank, "");
    return true;
}

bool infer(const Operator &op, ort::ShapeContext *context, Shape &shape) {
    const ort::Api &api = *op.api;
    Shape other;
    if (op.kind == Kind::DEQUANTIZE) return attribute(api, context, "weight_shape", ort::Attribute::INTS, shape);
    if (!known(api, context, 0, shape)) return false;
    if (op.kind == Kind::DYNAMIC || op.kind == Kind::STATIC) return true;
    size_t last = op.kind == Kind::EMBEDDING ? shape.rank++ : shape.rank - 1;
    if (op.kind == Kind::EMBEDDING) {
        shape.type = Type::FLOAT;
        if (!attribute(api, context, "cols", ort::Attribute::INT, other)) return false;
    } else if (!known(api, context, op.packed(), other)) {
        return false;
    }
    shape.dims[last] = other.dims[0], shape.names[last] = other.names[0];
    return true;
}

// Tells the runtime the shape of the output where all of it is known or has a name; says nothing otherwise. Of operators
// of one name, which differ in types, the runtime asks the first for all of them.
Status *infer_shape(const ort::CustomOp *custom, ort::ShapeContext *context) {
    const Operator &op = *static_cast<const Operator *>(custom);
    const ort::Api &api = *op.api;
    Shape shape;
    if (!infer(op, context, shape)) return nullptr;
    for (size_t i = 0; i < shape.rank; i++)
        if (shape.dims[i] < 0 && !*shape.names[i]) return nullptr;
    ort::TensorInfo *info = nullptr;
    if (ignored(api, api.CreateTensorTypeAndShapeInfo(&info))) return nullptr;
    if (!ignored(api, api.SetTensorElementType(info, shape.type)) &&
        !ignored(api, api.SetDimensions(info, shape.dims, shape.rank)) &&
        !ignored(api, api.SetSymbolicDimensions(info, shape.names, shape.rank)))
        ignored(api, api.ShapeInferContext_SetOutputTypeShape(context, 0, info));
    api.ReleaseTensorTypeAndShapeInfo(info);
    return nullptr;
}

// --- registration ---------------------------------------------------------------------------------------------------
const Operator &as_operator(const ort::CustomOp *op) { return *static_cast<const Operator *>(op); }
int zero(const ort::CustomOp *, size_t) { return 0; }
int one(const ort::CustomOp *) { return 1; }

Operator make(const ort::Api &api, Kind kind, const Format &format, Type x, Type scale) {
    Operator op{};
    op.version = ort::VERSION;
    op.GetName = [](const ort::CustomOp *op) { return as_operator(op).name.c_str(); };
    op.GetExecutionProviderType = [](const ort::CustomOp *) { return "CPUExecutionProvider"; };
    op.GetInputType = [](const ort::CustomOp *op, size_t i) { return as_operator(op).input(i); };
    op.GetInputTypeCount = [](const ort::CustomOp *op) { return as_operator(op).inputs(); };
    op.GetOutputType = [](const ort::CustomOp *op, size_t) { return as_operator(op).output(); };
    op.GetOutputTypeCount = [](const ort::CustomOp *) { return (size_t)1; };
    op.KernelDestroy = [](void *kernel) { delete static_cast<Node *>(kernel); };
    op.GetInputCharacteristic = op.GetOutputCharacteristic = op.GetInputMemoryType = zero;
    op.GetVariadicInputMinArity = op.GetVariadicInputHomogeneity = one;
    op.GetVariadicOutputMinArity = op.GetVariadicOutputHomogeneity = one;
    op.CreateKernelV2 = create;
    op.KernelComputeV2 = compute;
    op.InferOutputShapeFn = infer_shape;
    op.GetStartVersion = op.GetEndVersion = one;
    op.api = &api, op.kind = kind, op.format = &format, op.x = x, op.scale = scale;
    op.name = std::string(KIND[(int)kind]) + "_" + format.name;
    return op;
}

std::vector<Operator> make_all(const ort::Api &api) {
    constexpr Type FLOATS[] = {Type::FLOAT, Type::FLOAT16, Type::BFLOAT16};
    std::vector<Operator> all;
    for (const Format &format : FORMATS) {
        for (Type scale : {Type::FLOAT, Type::FLOAT16}) {
            for (Type x : FLOATS)
                for (Kind kind : {Kind::LINEAR, Kind::LINEAR_BIAS}) all.push_back(make(api, kind, format, x, scale));
            for (Type x : {Type::INT64, Type::INT32}) all.push_back(make(api, Kind::EMBEDDING, format, x, scale));
            all.push_back(make(api, Kind::DEQUANTIZE, format, Type::UNKNOWN, scale));
        }
        if (format.grid.max > 0)
            for (Type x : FLOATS)
                for (Kind kind : {Kind::DYNAMIC, Kind::STATIC}) all.push_back(make(api, kind, format, x, Type::FLOAT));
    }
    return all;
}

// What one runtime knows of the library. The runtime keeps pointers to it: it stays until the library is unloaded.
struct Runtime {
    void *const *table;
    ort::Api api;
    std::vector<Operator> operators;
    ort::Domain *domain = nullptr;

    explicit Runtime(void *const *table) : table(table) {}
    Runtime(const Runtime &) = delete;
    ~Runtime() {
        if (domain) api.ReleaseCustomOpDomain(domain);
    }

    Status *make_domain() {
        operators = make_all(api);
        FXQ_TRY(api.CreateCustomOpDomain("fxquant", &domain));
        for (const Operator &op : operators) FXQ_TRY(api.CustomOpDomain_Add(domain, &op));
        return nullptr;
    }
};

// The functions of a runtime that lacks some have one that makes a status; it has been the first since version 1.
Status *refusal(const ort::ApiBase &base, const std::string &why) {
    void *const *table = base.GetApi(1);
    if (!table || !table[0]) return nullptr;
    auto create = reinterpret_cast<Status *(*)(int, const char *)>(table[0]);
    return create(ort::NOT_IMPLEMENTED,
                  ("fxquant's operators need onnxruntime 1.17 or newer, this is " + std::string(base.GetVersionString()) +
                   ": " + why + ". Files of fxquant run without the library too")
                      .c_str());
}

Status *register_with(ort::SessionOptions *options, const ort::ApiBase &base) {
    static std::mutex lock; // sessions may be made at the same time
    static std::vector<std::unique_ptr<Runtime>> runtimes;
    std::lock_guard<std::mutex> held(lock);
    void *const *table = base.GetApi(ort::VERSION);
    if (!table) return refusal(base, "it has no API of version " + std::to_string(ort::VERSION));
    for (const auto &runtime : runtimes)
        if (runtime->table == table) return runtime->api.AddCustomOpDomain(options, runtime->domain);
    std::unique_ptr<Runtime> runtime(new Runtime(table));
    if (const char *missing = runtime->api.take(table)) return refusal(base, std::string("it has no ") + missing);
    FXQ_TRY(runtime->make_domain());
    runtimes.push_back(std::move(runtime));
    return runtimes.back()->api.AddCustomOpDomain(options, runtimes.back()->domain);
}

} // namespace
} // namespace fxq

// What onnxruntime calls when a session's options name the library.
extern "C" __attribute__((visibility("default"))) ort::Status *RegisterCustomOps(ort::SessionOptions *options,
                                                                                 const ort::ApiBase *base) {
    try {
        return fxq::register_with(options, *base);
    } catch (const std::exception &error) {
        return fxq::refusal(*base, error.what());
    }
}
