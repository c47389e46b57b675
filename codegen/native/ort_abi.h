// What is needed of onnxruntime's C API. No package carries its header, so this is our own description of it.
//
// The API is a table of function pointers that only ever grows: a function keeps its slot for good, and GetApi(version)
// answers for every version up to the runtime's own. OrtApi version 17 (onnxruntime 1.17) is the first with all of these.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t VERSION = 17;

struct Status;
struct Value;
struct TensorInfo;
struct KernelInfo;
struct KernelContext;
struct ShapeContext;
struct SessionOptions;
struct Domain;
struct OpAttr;
struct CustomOp;

enum class Type : int { UNKNOWN = 0, FLOAT = 1, UINT8 = 2, INT32 = 6, INT64 = 7, FLOAT16 = 10, BFLOAT16 = 16 };
enum class Attribute : int { INT = 1, INTS = 2 };
enum Code : int { FAIL = 1, INVALID_ARGUMENT = 2, NOT_IMPLEMENTED = 9 };

// slot, result, name, arguments
#define FXQ_ORT_SLOTS(SLOT)                                                                                            \
    SLOT(0, Status *, CreateStatus, (int code, const char *message))                                                   \
    SLOT(26, Status *, CreateCustomOpDomain, (const char *name, Domain **domain))                                      \
    SLOT(27, Status *, CustomOpDomain_Add, (Domain * domain, const CustomOp *op))                                      \
    SLOT(28, Status *, AddCustomOpDomain, (SessionOptions * options, Domain *domain))                                  \
    SLOT(51, Status *, GetTensorMutableData, (Value * value, void **data))                                             \
    SLOT(57, Status *, CreateTensorTypeAndShapeInfo, (TensorInfo * *info))                                             \
    SLOT(58, Status *, SetTensorElementType, (TensorInfo * info, Type type))                                           \
    SLOT(59, Status *, SetDimensions, (TensorInfo * info, const int64_t *dims, size_t rank))                           \
    SLOT(60, Status *, GetTensorElementType, (const TensorInfo *info, Type *type))                                     \
    SLOT(61, Status *, GetDimensionsCount, (const TensorInfo *info, size_t *rank))                                     \
    SLOT(62, Status *, GetDimensions, (const TensorInfo *info, int64_t *dims, size_t rank))                            \
    SLOT(63, Status *, GetSymbolicDimensions, (const TensorInfo *info, const char **names, size_t rank))               \
    SLOT(65, Status *, GetTensorTypeAndShape, (const Value *value, TensorInfo **info))                                 \
    SLOT(86, Status *, KernelInfoGetAttribute_int64, (const KernelInfo *info, const char *name, int64_t *value))       \
    SLOT(88, Status *, KernelContext_GetInputCount, (const KernelContext *context, size_t *count))                     \
    SLOT(90, Status *, KernelContext_GetInput, (const KernelContext *context, size_t i, const Value **value))          \
    SLOT(91, Status *, KernelContext_GetOutput,                                                                        \
         (KernelContext * context, size_t i, const int64_t *dims, size_t rank, Value **value))                         \
    SLOT(93, void, ReleaseStatus, (Status * status))                                                                   \
    SLOT(99, void, ReleaseTensorTypeAndShapeInfo, (TensorInfo * info))                                                 \
    SLOT(101, void, ReleaseCustomOpDomain, (Domain * domain))                                                          \
    SLOT(163, Status *, KernelInfoGetAttributeArray_int64,                                                             \
         (const KernelInfo *info, const char *name, int64_t *values, size_t *count))                                   \
    SLOT(244, Status *, KernelInfo_GetNodeName, (const KernelInfo *info, char *name, size_t *size))                    \
    SLOT(249, Status *, KernelInfoGetConstantInput_tensor,                                                             \
         (const KernelInfo *info, size_t i, int *constant, const Value **value))                                       \
    SLOT(268, Status *, ShapeInferContext_GetInputTypeShape, (const ShapeContext *context, size_t i, TensorInfo **info)) \
    SLOT(269, Status *, ShapeInferContext_GetAttribute,                                                                \
         (const ShapeContext *context, const char *name, const OpAttr **attribute))                                    \
    SLOT(270, Status *, ShapeInferContext_SetOutputTypeShape,                                                          \
         (const ShapeContext *context, size_t i, const TensorInfo *info))                                              \
    SLOT(271, Status *, SetSymbolicDimensions, (TensorInfo * info, const char **names, size_t rank))                   \
    SLOT(272, Status *, ReadOpAttr, (const OpAttr *attribute, Attribute type, void *data, size_t size, size_t *found)) \
    SLOT(274, Status *, KernelContext_ParallelFor,                                                                     \
         (const KernelContext *context, void (*piece)(void *data, size_t i), size_t pieces, size_t batches, void *data))

struct Api {
#define FXQ_MEMBER(slot, result, name, arguments) result(*name) arguments;
    FXQ_ORT_SLOTS(FXQ_MEMBER)
#undef FXQ_MEMBER

    // Takes the functions out of the runtime's table; the name of one that is missing, or null.
    const char *take(void *const *table) {
        const char *missing = nullptr;
#define FXQ_TAKE(slot, result, name, arguments)                                                                        \
    name = reinterpret_cast<result(*) arguments>(table[slot]);                                                         \
    if (!table[slot]) missing = #name;
        FXQ_ORT_SLOTS(FXQ_TAKE)
#undef FXQ_TAKE
        return missing;
    }
};

// The one thing the runtime hands to a library.
struct ApiBase {
    void *const *(*GetApi)(uint32_t version);
    const char *(*GetVersionString)();
};

// An operator as the library describes it. The runtime looks at members up to those of `version`; what came later, how an
// output may share an input's memory, is null.
struct CustomOp {
    uint32_t version;
    void *(*CreateKernel)(const CustomOp *, void *const *api, const KernelInfo *); // V2 is used where there is one
    const char *(*GetName)(const CustomOp *);
    const char *(*GetExecutionProviderType)(const CustomOp *);
    Type (*GetInputType)(const CustomOp *, size_t);
    size_t (*GetInputTypeCount)(const CustomOp *);
    Type (*GetOutputType)(const CustomOp *, size_t);
    size_t (*GetOutputTypeCount)(const CustomOp *);
    void (*KernelCompute)(void *kernel, KernelContext *); // V2 is used where there is one
    void (*KernelDestroy)(void *kernel);
    int (*GetInputCharacteristic)(const CustomOp *, size_t); // 0: required
    int (*GetOutputCharacteristic)(const CustomOp *, size_t);
    int (*GetInputMemoryType)(const CustomOp *, size_t); // 0: the provider's own
    int (*GetVariadicInputMinArity)(const CustomOp *);
    int (*GetVariadicInputHomogeneity)(const CustomOp *);
    int (*GetVariadicOutputMinArity)(const CustomOp *);
    int (*GetVariadicOutputHomogeneity)(const CustomOp *);
    Status *(*CreateKernelV2)(const CustomOp *, void *const *api, const KernelInfo *, void **kernel);
    Status *(*KernelComputeV2)(void *kernel, KernelContext *);
    Status *(*InferOutputShapeFn)(const CustomOp *, ShapeContext *);
    int (*GetStartVersion)(const CustomOp *);
    int (*GetEndVersion)(const CustomOp *);
    size_t (*GetMayInplace)(int **, int **);
    void (*ReleaseMayInplace)(int *, int *);
    size_t (*GetAliasMap)(int **, int **);
    void (*ReleaseAliasMap)(int *, int *);
};

} // namespace ort
