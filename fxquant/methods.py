"""The methods that a config may ask for, each with its options: what they are called, what they take, what they need.

``docs/config.md`` explains them. The passes themselves are joined to these names in ``pipeline``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, ValidationError, field_validator

from fxquant.errors import near
from fxquant.scheme import PerChannel, parse_spec


class MethodOptions(BaseModel):
    """Options of a method; ``calibrated`` methods need data to run on.

    ``on`` says what it works on: weights in ``float``, before they are quantized, or their ``codes`` afterwards.
    ``changes_graph``: what it makes is more than new codes, so that it cannot be written back into modules.
    ``last``: it makes up for what the others left, so that only such methods may come after it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    on: ClassVar[Literal["float", "codes"]] = "codes"
    changes_graph: ClassVar[bool] = False
    last: ClassVar[bool] = False

    @property
    def calibrated(self) -> bool:
        return False


class CalibratedOptions(MethodOptions):
    """Options of a method that always needs data."""

    @property
    def calibrated(self) -> bool:
        return True


def _fraction(value: float | Literal["auto"]) -> float | Literal["auto"]:
    if value != "auto" and not 0 <= value <= 1:
        raise ValueError("expected auto, or a number from 0 to 1")
    return value


Damping = Annotated[float | Literal["auto"], AfterValidator(_fraction)]


class GptqOptions(CalibratedOptions):
    """GPTQ. ``damp_percent`` is a fraction of H's mean diagonal, ``auto``: what is best on held-out data; ``clip``: how
    scales are chosen.

    ``sequential``: a layer's inputs come from the layers before it as they were refined, else from the float weights.
    ``float_targets``: with sequential inputs, aim at the outputs that the float model's layer has on its own inputs.
    """

    act_order: StrictBool = True
    damp_percent: Damping = "auto"
    block_size: int = Field(32, ge=1)
    clip: Literal["absmax", "mse", "hessian"] = "hessian"
    sequential: StrictBool = True
    float_targets: StrictBool = False


class ZqGlobalOptions(CalibratedOptions):
    """ZQ-Global. ``learning_rate``: in steps of codes; ``batch``: calibration batches an iteration.

    ``train_scales``: scales too, where they are fp32, fp16 or bf16. ``blocks``: ``auto``, or a glob over module paths.
    ``sequential``: a block's inputs come from the blocks before it as they were trained, else from the float model.
    ``float_targets``: with sequential inputs, aim at what the float model's block gives on its own inputs.
    ``loss``: each token's squared error relative to its size, or ``mse``, the mean over all.
    """

    iterations: int = Field(48, ge=0)
    learning_rate: float = Field(0.025, gt=0, allow_inf_nan=False)
    batch: int = Field(1, ge=1)
    train_scales: StrictBool = False
    blocks: str = Field("auto", min_length=1)
    sequential: StrictBool = True
    float_targets: StrictBool = True
    loss: Literal["relative", "mse"] = "relative"


class SmoothOptions(CalibratedOptions):
    """SmoothQuant. ``alpha``: how much of the activations' range goes into the weights, 0 to 1."""

    on = "float"
    changes_graph = True

    alpha: float = Field(0.5, ge=0, le=1)


class QuantizeAttentionOptions(MethodOptions):
    """The products of attention. ``spec``: what queries, keys, probabilities and values are rounded to."""

    on = "float"
    changes_graph = True

    spec: str = "e4m3/tensor"

    @field_validator("spec")
    @classmethod
    def _known_spec(cls, value: str) -> str:
        spec = parse_spec(value)
        if not (spec.static or spec.dynamic) or spec.kind.outer is not None or spec.has_zero_point:
            raise ValueError(f"{value!r}: products of activations take <format>/tensor or <format>/token, such as "
                             f"e4m3/tensor")  # fmt: skip
        return value

    @property
    def calibrated(self) -> bool:
        return parse_spec(self.spec).static


class QuantizeKvCacheOptions(MethodOptions):
    """The KV cache. ``key`` and ``value``: <format>/channel, one scale a head and channel from calibration data, or
    <format>/token, one a head and token."""

    on = "float"
    changes_graph = True

    key: str = "int8/channel"
    value: str = "int8/token"

    @field_validator("key", "value")
    @classmethod
    def _known_spec(cls, value: str) -> str:
        spec = parse_spec(value)
        channel = isinstance(spec.granularity, PerChannel) and not spec.granularity.axis
        if not (channel or spec.dynamic) or spec.scale not in ("fp32", "fp16") or spec.has_zero_point:
            raise ValueError(f"{value!r}: a KV cache takes <format>/channel or <format>/token, with fp32 or fp16 "
                             f"scales, such as int4/channel:fp16")  # fmt: skip
        return value

    @property
    def calibrated(self) -> bool:
        return any(not parse_spec(spec).dynamic for spec in (self.key, self.value))


class PreShiftOptions(CalibratedOptions):
    """LLM-FP4's pre-shifted exponent bias. ``max_shift``: the most for a channel; null: 2^E - 1 of the format."""

    changes_graph = True

    max_shift: int | None = Field(None, ge=0, le=64)


class RotateOptions(MethodOptions):
    """Hadamard rotation. ``size``: channels of a block, a power of two; None: the largest that fits, at most 128."""

    on = "float"
    changes_graph = True

    size: int | None = Field(None, ge=2, le=1 << 15)
    seed: int = 0

    @field_validator("size")
    @classmethod
    def _power_of_two(cls, value: int | None) -> int | None:
        if value is not None and value & (value - 1):
            raise ValueError(f"{value} is no power of two; expected one such as 32, 64 or 128")
        return value


class SearchFormatsOptions(PreShiftOptions):
    """LLM-FP4's search. ``steps`` clips over ``octaves`` below the largest magnitude, ``rounds`` of activation, weight.

    ``formats``: all float formats of as many bits, or the same. ``float_targets``: weights make up for the rounding of
    activations by least squares. ``loss``: squared errors of outputs, all alike, or weighted by squared gradients.
    """

    rounds: int = Field(3, ge=1, le=100)
    steps: int = Field(100, ge=2, le=10_000)
    octaves: float = Field(2.0, gt=0, le=16)
    formats: Literal["all", "same"] = "all"
    float_targets: StrictBool = False
    loss: Literal["mse", "fisher"] = "mse"


class FoldActivationScalesOptions(MethodOptions):
    """Where the shifts of activations go: an ``exponent_bias`` of the weights, or their codes as ``e4m3``."""

    changes_graph = True
    last = True

    into: Literal["exponent_bias", "e4m3"] = "exponent_bias"


class LorcOptions(MethodOptions):
    """LoRC. ``factors``: the spec that U and V are stored in; ``weighting``: what the error is measured by.

    ``none`` is the weight's own error, as the paper has it; ``act_rms`` weights columns by their inputs, ``hessian`` is
    the error of the output. ``damp_percent``, ``sequential`` and ``float_targets`` as for GPTQ.
    ``rounds``: how often the codes are solved anew, around the factors, by GPTQ; 0: they stay as they are.
    """

    last = True

    rank: int = Field(8, ge=1)
    rounds: int = Field(0, ge=0, le=100)
    factors: Literal["int8/channel", "e4m3/channel"] = "int8/channel"
    weighting: Literal["none", "act_rms", "hessian"] = "hessian"
    damp_percent: Damping = "auto"
    sequential: StrictBool = True
    float_targets: StrictBool = False

    @property
    def calibrated(self) -> bool:
        return self.weighting != "none" or self.float_targets or self.rounds > 0


class ZqLocalOptions(CalibratedOptions):
    """ZQ-Local. ``learning_rate`` is in units of a weight's scale; the others as for GPTQ."""

    iterations: int = Field(64, ge=1)
    learning_rate: float = Field(0.01, gt=0)
    damp_percent: float = Field(0.01, ge=0, le=1)
    sequential: StrictBool = True
    float_targets: StrictBool = False


class GwqOptions(CalibratedOptions):
    """GWQ. ``fraction`` of each layer's weights that stay in 16 bits; ``samples``: how many batches choose them."""

    changes_graph = True

    fraction: float = Field(0.01, ge=0, le=0.5)
    samples: int = Field(1, ge=1)


class PbLlmOptions(MethodOptions):
    """PB-LLM. ``fraction`` of each layer's weights that stay in INT8; ``criterion``: how they are chosen."""

    changes_graph = True

    fraction: float = Field(0.1, ge=0, le=0.5)
    criterion: Literal["magnitude", "hessian"] = "magnitude"

    @property
    def calibrated(self) -> bool:
        return self.criterion == "hessian"


METHODS: dict[str, type[MethodOptions]] = {
    "smooth": SmoothOptions,
    "rotate": RotateOptions,
    "quantize_attention": QuantizeAttentionOptions,
    "quantize_kv_cache": QuantizeKvCacheOptions,
    "pre_shift": PreShiftOptions,
    "search_formats": SearchFormatsOptions,
    "gptq": GptqOptions,
    "zq_local": ZqLocalOptions,
    "lorc": LorcOptions,
    "zq_global": ZqGlobalOptions,
    "gwq": GwqOptions,
    "pb_llm": PbLlmOptions,
    "fold_activation_scales": FoldActivationScalesOptions,
}
"""The passes a config may ask for, each with its options."""


def method_options(name: str, options: Mapping[str, Any]) -> MethodOptions:
    """The options of the method ``name``; ValueError names an unknown method or option, or a value that is wrong."""
    if name not in METHODS:
        raise ValueError(f"unknown pass {name!r}{near(name, METHODS)}; expected one of {', '.join(METHODS)}")
    known = METHODS[name].model_fields
    for option in options:
        if option not in known:
            raise ValueError(f"pass {name!r}: unknown option {option!r}{near(option, known)}; expected one of "
                             f"{', '.join(known)}")  # fmt: skip
    try:
        return METHODS[name].model_validate(options)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors())
        raise ValueError(f"pass {name!r}: {told}") from error
