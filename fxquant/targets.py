"""The operators a saved graph may call, and how each is written: ``aten.linear.default``, ``operator.mul``.

A file can name nothing but what stands in these tables: functions of tensors and numbers that touch no file and leave
their arguments as they are. Any other name is refused before it is looked up.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxquant import ops
from fxquant.graph import ScalarType, TensorType, info

_ATEN = """
    __and__ __lshift__ __or__ __rshift__ __xor__ _adaptive_avg_pool2d _adaptive_avg_pool3d _assert_scalar
    _assert_tensor_metadata _cdist_forward _conj _conv_depthwise2d _convolution _fft_c2c _fft_c2r _fft_r2c
    _fused_rms_norm _grouped_mm _local_scalar_dense _log_softmax _native_batch_norm_legit
    _native_batch_norm_legit_no_training _native_multi_head_attention _pdist_forward _prelu_kernel _reshape_copy
    _safe_softmax _scaled_dot_product_attention_math _scaled_dot_product_efficient_attention
    _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu _shape_as_tensor _softmax _stack
    _to_copy _transformer_encoder_layer_fwd _trilinear _unique2 _unsafe_index _unsafe_index_put _unsafe_view
    _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d _weight_norm abs acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d add addbmm addcdiv addcmul addmm addmv addr adjoint
    affine_grid_generator alias alias_copy all alpha_dropout amax amin aminmax angle any arange argmax argmin argsort
    as_strided as_strided_copy asin asinh atan atan2 atanh atleast_1d atleast_2d atleast_3d avg_pool1d avg_pool2d
    avg_pool3d baddbmm bartlett_window batch_norm bernoulli bilinear binary_cross_entropy
    binary_cross_entropy_with_logits bincount bitwise_and bitwise_left_shift bitwise_not bitwise_or
    bitwise_right_shift bitwise_xor blackman_window block_diag bmm broadcast_tensors broadcast_to bucketize
    cartesian_prod cat cdist ceil celu chain_matmul channel_shuffle cholesky chunk clamp clamp_max clamp_min clip
    clone col2im column_stack combinations complex concat concatenate conj conj_physical constant_pad_nd contiguous
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution copysign cos cosh
    cosine_similarity count_nonzero cross cross_entropy_loss cummax cummin cumprod cumsum cumulative_trapezoid deg2rad
    det detach detach_copy diag diag_embed diagflat diagonal diagonal_copy diagonal_scatter diff digamma dist div
    divide dot dropout dsplit dstack einsum elu embedding embedding_bag empty empty_like empty_permuted empty_strided
    eq equal erf erfc erfinv exp exp2 expand expand_as expand_copy expm1 eye feature_alpha_dropout feature_dropout
    fft_fft fft_fft2 fft_fftfreq fft_fftn fft_fftshift fft_hfft fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_ihfft
    fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftfreq fft_rfftn fill fix flatten flip fliplr flipud
    float_power floor floor_divide fmax fmin fmod frac frexp full full_like gather gcd ge gelu ger glu greater
    greater_equal grid_sampler grid_sampler_2d grid_sampler_3d group_norm gru gru_cell gt hamming_window hann_window
    hardshrink hardsigmoid hardswish hardtanh heaviside histc hsplit hstack hypot i0 im2col imag index index_add
    index_copy index_fill index_put index_reduce index_select inner instance_norm inverse is_complex is_floating_point
    isclose isfinite isin isinf isnan isneginf isposinf isreal istft item kaiser_window kl_div kron kthvalue
    layer_norm lcm ldexp le leaky_relu lerp less less_equal lgamma lift_fresh lift_fresh_copy linalg_cholesky
    linalg_cross linalg_det linalg_diagonal linalg_eigh linalg_inv linalg_matmul linalg_matrix_norm
    linalg_matrix_power linalg_multi_dot linalg_norm linalg_pinv linalg_qr linalg_solve linalg_solve_triangular
    linalg_svd linalg_vecdot linalg_vector_norm linear linspace log log10 log1p log2 log_sigmoid log_softmax logaddexp
    logaddexp2 logcumsumexp logdet logical_and logical_not logical_or logical_xor logit logspace logsumexp lstm
    lstm_cell lt mH mT masked_fill masked_scatter masked_select matmul matrix_power max max_pool1d
    max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices max_unpool2d maximum
    mean median meshgrid min minimum mish mm mode moveaxis movedim mse_loss msort mul multinomial multiply mv
    nan_to_num nanmean nanmedian nanquantile nansum narrow narrow_copy native_batch_norm native_channel_shuffle
    native_dropout native_group_norm native_layer_norm ne neg negative new_empty new_empty_strided new_full new_ones
    new_zeros nextafter nll_loss nll_loss_nd nonzero nonzero_numpy nonzero_static norm norm_except_dim normal
    not_equal numpy_T one_hot ones ones_like outer pad pairwise_distance pdist permute permute_copy pinverse
    pixel_shuffle pixel_unshuffle poisson polar polygamma positive pow prelu prod quantile rad2deg rand rand_like
    randint randint_like randn randn_like randperm ravel real reciprocal reflection_pad1d reflection_pad2d
    reflection_pad3d relu relu6 remainder renorm repeat repeat_interleave replication_pad1d replication_pad2d
    replication_pad3d reshape reshape_as resolve_conj resolve_neg rms_norm rnn_relu rnn_relu_cell rnn_tanh
    rnn_tanh_cell roll rot90 round rrelu rsqrt rsub scalar_tensor scaled_dot_product_attention scatter scatter_add
    scatter_reduce searchsorted select select_copy select_scatter selu sgn sigmoid sign signbit silu sin sinc sinh
    size slice slice_copy slice_scatter slogdet smooth_l1_loss softmax softplus softshrink sort special_entr
    special_erf special_exp2 special_expit special_expm1 special_i0 special_log1p special_log_softmax special_logit
    special_softmax split split_copy split_with_sizes split_with_sizes_copy sqrt square squeeze squeeze_copy stack std
    std_mean stft sub subtract sum svd swapaxes swapdims sym_constrain_range sym_constrain_range_for_size sym_numel
    sym_size sym_storage_offset sym_stride t t_copy take take_along_dim tan tanh tensor_split tensordot threshold tile
    to topk trace transpose transpose_copy trapezoid tril tril_indices triu triu_indices true_divide trunc type_as
    unbind unbind_copy unflatten unfold unfold_copy unique_consecutive unique_dim unsafe_chunk unsafe_split
    unsafe_split_with_sizes unsqueeze unsqueeze_copy upsample_bicubic2d upsample_bilinear2d upsample_linear1d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d vander var var_mean vdot view
    view_as view_as_complex view_as_real view_copy vsplit vstack where xlogy zeros zeros_like
"""
ATEN = frozenset(_ATEN.split())
"""Names of aten operators; every overload of one that does not write to its arguments may be called."""

FXQUANT = frozenset(schema.partition("(")[0] for schema in ops.SCHEMAS) - {"linear_wq_fused"}  # for running only

_OPERATOR = {"neg": 1, "pos": 1, "abs": 1, "not_": 1, "index": 1} | dict.fromkeys(
    ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "getitem", "eq", "ne", "lt", "le", "gt", "ge", "and_",
     "or_", "xor", "lshift", "rshift"), 2)  # fmt: skip
_SYMBOLIC = {"sym_int": 1, "sym_float": 1, "sym_not": 1, "sym_max": 2, "sym_min": 2, "sym_ite": 3, "sym_sum": 1}
PYTHON: dict[str, tuple[Callable[..., Any], int]] = {
    **{f"operator.{name}": (getattr(operator, name), arity) for name, arity in _OPERATOR.items()},
    **{f"math.{name}": (getattr(math, name), 1) for name in ("ceil", "floor", "trunc")},
    **{f"torch.{name}": (getattr(torch, name), arity) for name, arity in _SYMBOLIC.items() if hasattr(torch, name)},
}
"""Functions of sizes by name, and how many arguments each takes."""

_PYTHON_NAMES = {function: name for name, (function, _) in PYTHON.items()}
_NAMESPACES: dict[str, tuple[frozenset[str], Any]] = {
    "aten": (ATEN, torch.ops.aten),
    "fxquant": (FXQUANT, torch.ops.fxquant),
    "transformers": (frozenset({"grouped_mm_fallback"}), torch.ops.transformers),  # there once transformers is imported
}


def encode_target(target: Any) -> str:
    """The name of an operator; ValueError for one that may not stand in a saved graph."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)  # namespace.name.overload
    else:
        name = _PYTHON_NAMES.get(target) if callable(target) else None  # type: ignore[assignment]
        name = name or f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"
    if decode_target(name) is not target:
        raise ValueError(f"operator {name!r} is not one that a saved graph may call")
    return name


def decode_target(name: str) -> Callable[..., Any]:
    """The operator called ``name``; ValueError for one that is not in the tables, or that this torch does not have."""
    if name in PYTHON:
        return PYTHON[name][0]
    namespace, base, overload = [*name.split("."), "", ""][:3]
    known, owner = _NAMESPACES.get(namespace, (frozenset(), None))
    if name.count(".") != 2 or base not in known:
        raise ValueError(f"operator {name[:100]!r} is not one that a saved graph may call")
    packet = getattr(owner, base, None)
    if packet is None or overload not in packet.overloads():
        raise ValueError(f"torch {torch.__version__} has no operator {name[:100]!r}; import the package it comes from")
    found: torch._ops.OpOverload = getattr(packet, overload)
    if found._schema.is_mutable:
        raise ValueError(f"operator {name!r} writes to its arguments; a saved graph may not call it")
    return found


def check_call(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise a ValueError unless the arguments fit: their number, names and kinds, none missing, none given twice."""
    if isinstance(target, torch._ops.OpOverload):
        _check_schema(target, args, kwargs)
        return
    name = _PYTHON_NAMES[target]
    if kwargs or len(args) != PYTHON[name][1]:
        raise ValueError(f"{name} takes {PYTHON[name][1]} arguments, got {len(args)} and {len(kwargs)} by name")
    allowed = (fx.Node, int, float, list) if name == "torch.sym_sum" else (fx.Node, int, float)
    wrong = [a for a in args if not isinstance(a, allowed)]
    if wrong:
        raise ValueError(f"{name} takes numbers and results of nodes, got {_text(wrong[0])}")
    if name == "operator.getitem":
        _check_element(*args)


def _check_element(value: Any, index: Any) -> None:
    """Raise a ValueError unless ``index`` is a result of the node ``value``, as far as its type says."""
    found = info(value).type if isinstance(value, fx.Node) else ()
    if isinstance(found, tuple) and not (type(index) is int and -len(found) <= index < len(found)):
        raise ValueError(f"operator.getitem asks for result {_text(index)} of {_text(value)}, which has {len(found)}")


def _check_schema(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    arguments: dict[str, Any] = {a.name: a for a in target._schema.arguments}
    positional = [a.name for a in arguments.values() if not a.kwarg_only]
    if len(args) > len(positional):
        raise ValueError(f"{target} takes {len(positional)} positional arguments, got {len(args)}")
    given = dict(zip(positional, args, strict=False))
    if twice := sorted(given.keys() & kwargs.keys()):
        raise ValueError(f"{target} is given {twice[0]!r} twice")
    if unknown := sorted(kwargs.keys() - arguments.keys()):
        raise ValueError(f"{target} has no argument {unknown[0][:60]!r}")
    # what an operator cannot do without stands in its place, never by name: passes and reports read it there
    missing = [
        a.name for a in arguments.values()
        if not a.has_default_value() and a.name not in (kwargs if a.kwarg_only else given)
    ]  # fmt: skip
    if missing:
        raise ValueError(f"{target} is missing its argument {missing[0]!r}")
    for name, value in {**given, **kwargs}.items():
        if not _fits(value, arguments[name].real_type, arguments[name].N):
            raise ValueError(f"{target} takes {arguments[name].real_type} as {name!r}, got {_text(value)}")


def _text(value: Any) -> str:
    return repr(str(value)[:60])


_NUMBERS = (int, float, complex)
_KINDS: dict[str, tuple[type, ...]] = {
    "IntType": (int,), "SymIntType": (int,), "FloatType": (int, float), "SymFloatType": (int, float),
    "BoolType": (int,), "SymBoolType": (int,), "NumberType": _NUMBERS, "TensorType": _NUMBERS, "StringType": (str,),
    "ScalarTypeType": (torch.dtype,), "DeviceObjType": (torch.device,), "LayoutType": (torch.layout,),
    "MemoryFormatType": (torch.memory_format,),
}  # fmt: skip
"""Kinds of a schema's arguments, and what may be given for each beside the result of a node."""
_NEVER_NODES = ("StringType", "ScalarTypeType", "DeviceObjType", "LayoutType", "MemoryFormatType")


def _fits(value: Any, kind: Any, length: int | None) -> bool:
    """Whether ``value`` may be an argument of ``kind``; lists of a set length may have one for all, or none at all."""
    name = kind.kind()
    if name == "OptionalType":
        return value is None or _fits(value, kind.getElementType(), length)
    if name == "ListType":
        element = kind.getElementType()
        if isinstance(value, (list, tuple)):
            right = length in (None, 1) or len(value) in (0, 1, length)
            return right and all(_fits(v, element, None) for v in value)
        if isinstance(value, fx.Node):
            return not isinstance(info(value).type, TensorType | ScalarType)
        return length is not None and _fits(value, element, None)  # one number for a list of a set length
    if isinstance(value, fx.Node):
        return name not in _NEVER_NODES and _node_fits(value, name)
    return isinstance(value, _KINDS.get(name, ()))


def _node_fits(node: fx.Node, kind: str) -> bool:
    """Whether the result of ``node`` may be given for a tensor or a number, as far as its type says."""
    found = info(node).type
    return not isinstance(found, tuple) and (kind == "TensorType" or not isinstance(found, TensorType))
