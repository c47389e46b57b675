"""The methods that a config may ask for, each with its options: what they are called, what they take, what they need.

``docs/config.md`` explains them. The passes themselves are joined to these names in ``pipeline``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    WithJsonSchema,
    field_validator,
)

from fxquant.errors import near
from fxquant.scheme import PerChannel, QuantSpec, parse_spec


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


Damping = Annotated[
    float | Literal["auto"],
    AfterValidator(_fraction),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "number", "minimum": 0, "maximum": 1}]}),
]
_DAMPING = "fraction of the mean diagonal added to H; auto: of 0.03 and 0.3 the one that is better on held-out data"
_SEQUENTIAL = "a layer's inputs come from the refined layers before it; false: from the float weights"
_FLOAT_TARGETS = "with sequential inputs, aim at the outputs that the float model's layer has on its own inputs"


class GptqOptions(CalibratedOptions):
    """GPTQ (2210.17323): refines codes so that each layer's output, not its weight, changes least."""

    act_order: StrictBool = Field(
        True, description="columns with the largest inputs first, group scales found before; false: left to right"
    )
    damp_percent: Damping = Field("auto", description=_DAMPING)
    block_size: int = Field(32, ge=1, description="columns updated at a time; speed only")
    clip: Literal["absmax", "mse", "hessian"] = Field(
        "hessian",
        description=(
            "how scales are chosen: absmax; mse, least squared weight error; hessian, least error that "
            "later columns cannot make up for"
        ),
    )
    sequential: StrictBool = Field(True, description=_SEQUENTIAL)
    float_targets: StrictBool = Field(False, description=_FLOAT_TARGETS)


class ZqGlobalOptions(CalibratedOptions):
    """ZQ-Global (ZeroQuant-V2, 2303.08302): trains a block's weights until its output is the float block's."""

    iterations: int = Field(48, ge=0, le=1_000_000, description="steps of Adam a block; 0 changes nothing")
    learning_rate: float = Field(
        0.025,
        gt=0,
        allow_inf_nan=False,
        description="in steps of codes, so that it suits weights of any size; falls to 0",
    )
    batch: int = Field(1, ge=1, description="calibration batches an iteration")
    train_scales: StrictBool = Field(False, description="train scales too, where they are fp32, fp16 or bf16")
    blocks: str = Field(
        "auto",
        min_length=1,
        description=(
            "auto, or a glob over module paths such as model.layers.*; weights that it does not match keep their codes"
        ),
    )
    sequential: StrictBool = Field(
        True, description="a block's inputs come from the trained blocks before it; false: from the float model"
    )
    float_targets: StrictBool = Field(
        True,
        description=(
            "with sequential inputs, aim at what the float model's block gives on its own inputs; false: on "
            "the same inputs"
        ),
    )
    loss: Literal["relative", "mse"] = Field(
        "relative",
        description=(
            "relative: each token's squared error relative to its own size; mse: the mean over all, as in the paper"
        ),
    )


class SmoothOptions(CalibratedOptions):
    """SmoothQuant (2211.10438): moves outliers of activations into the weights that read them."""

    on = "float"
    changes_graph = True

    alpha: float = Field(0.5, ge=0, le=1, description="share of the activations' range that the weights take")


class QuantizeAttentionOptions(MethodOptions):
    """Rounds queries, keys, probabilities and values, the operands of attention's two products."""

    on = "float"
    changes_graph = True

    spec: str = Field(
        "e4m3/tensor",
        description="what they become: <format>/tensor, one scale from calibration data, or <format>/token, one a row",
    )

    @field_validator("spec")
    @classmethod
    def _known_spec(cls, value: str) -> str:
        check_operand_spec(parse_spec(value), value)
        return value

    @property
    def calibrated(self) -> bool:
        return parse_spec(self.spec).static


def check_operand_spec(spec: QuantSpec, text: str = "") -> None:
    """Raise a ValueError unless operands of attention can be of ``spec``, which was written ``text``."""
    if not (spec.static or spec.dynamic) or spec.kind.outer is not None or spec.has_zero_point:
        raise ValueError(
            f"{(text or str(spec))!r}: products of activations take <format>/tensor or <format>/token, such as "
            f"e4m3/tensor"
        )


class QuantizeKvCacheOptions(MethodOptions):
    """Stores the keys and values of past tokens as codes, in models that have a KV cache."""

    on = "float"
    changes_graph = True

    key: str = Field(
        "int8/channel",
        description=(
            "<format>/channel[:scale], a scale a head and channel from calibration data, or <format>/token[:scale]"
        ),
    )
    value: str = Field("int8/token", description="as key")

    @field_validator("key", "value")
    @classmethod
    def _known_spec(cls, value: str) -> str:
        check_cache_spec(parse_spec(value), value)
        return value

    @property
    def calibrated(self) -> bool:
        return any(not parse_spec(spec).dynamic for spec in (self.key, self.value))


def check_cache_spec(spec: QuantSpec, text: str = "") -> None:
    """Raise a ValueError unless keys and values of a cache can be of ``spec``, which was written ``text``."""
    channel = isinstance(spec.granularity, PerChannel) and not spec.granularity.axis
    if not (channel or spec.dynamic) or spec.scale not in ("fp32", "fp16") or spec.has_zero_point:
        raise ValueError(
            f"{(text or str(spec))!r}: a KV cache takes <format>/channel or <format>/token, with fp32 or fp16 scales, "
            f"such as int4/channel:fp16"
        )


class PreShiftOptions(CalibratedOptions):
    """LLM-FP4 (2310.16836): multiplies each channel of an activation by a power of two before it is rounded."""

    changes_graph = True

    max_shift: int | None = Field(
        None, ge=0, le=64, description="largest exponent of a channel; null: 2^E - 1 of a format with E exponent bits"
    )


class RotateOptions(MethodOptions):
    """Turns inputs and weights of linears by blocks of a Hadamard matrix with random signs (2404.00456, 2411.17525)."""

    on = "float"
    changes_graph = True

    size: int | None = Field(
        None,
        ge=2,
        le=1 << 15,
        description="channels of a block, a power of two; null: the largest that divides the channels, at most 128",
        json_schema_extra={"enum": [None, *(1 << n for n in range(1, 16))]},
    )
    seed: int = Field(0, description="of the signs")

    @field_validator("size")
    @classmethod
    def _power_of_two(cls, value: int | None) -> int | None:
        if value is not None and value & (value - 1):
            raise ValueError(f"{value} is no power of two; expected one such as 32, 64 or 128")
        return value


class SearchFormatsOptions(PreShiftOptions):
    """LLM-FP4 (2310.16836): searches the format and the clipping of activations and weights together."""

    rounds: int = Field(3, ge=1, le=100, description="how often activation and weights are searched in turn")
    steps: int = Field(100, ge=2, le=10_000, description="how many clips are tried, evenly in log2")
    octaves: float = Field(2.0, gt=0, le=16, description="clips go down to 2^-octaves of the largest magnitude")
    formats: Literal["all", "same"] = Field(
        "all", description="all float formats of as many bits, or the same: only the clipping is searched"
    )
    float_targets: StrictBool = Field(
        False, description="weights also make up, by least squares, for the rounding of the activations"
    )
    loss: Literal["mse", "fisher"] = Field(
        "mse", description="mse: errors of outputs cost alike; fisher: what the squares of their gradients say"
    )


class FoldActivationScalesOptions(MethodOptions):
    """LLM-FP4 (2310.16836): folds shifts of activations into weights and producers; no bit of the output changes."""

    changes_graph = True
    last = True

    into: Literal["exponent_bias", "e4m3"] = Field(
        "exponent_bias",
        description=(
            "exponent_bias: an int8 an input channel beside the codes; e4m3: codes that hold the shift, "
            "where that is exact"
        ),
    )


class LorcOptions(MethodOptions):
    """LoRC (ZeroQuant-V2, 2303.08302): gives back what quantization took as a product of two thin matrices."""

    last = True

    rank: int = Field(8, ge=1, description="columns of U and rows of V")
    rounds: int = Field(
        0, ge=0, le=100, description="how often GPTQ solves the codes anew around the factors; 0: the codes stay"
    )
    factors: Literal["int8/channel", "e4m3/channel"] = Field(
        "int8/channel", description="the spec that U and V are stored in"
    )
    weighting: Literal["none", "act_rms", "hessian"] = Field(
        "hessian",
        description=(
            "what error is least: hessian, that of the output; act_rms, the weight's with columns weighted "
            "by their inputs; none, the weight's, as in the paper"
        ),
    )
    damp_percent: Damping = Field("auto", description=_DAMPING)
    sequential: StrictBool = Field(True, description=_SEQUENTIAL)
    float_targets: StrictBool = Field(False, description=_FLOAT_TARGETS)

    @property
    def calibrated(self) -> bool:
        return self.weighting != "none" or self.float_targets or self.rounds > 0


class ZqLocalOptions(CalibratedOptions):
    """ZQ-Local (ZeroQuant-V2, 2303.08302): gradient descent on each layer's output error, through the rounding."""

    iterations: int = Field(64, ge=1, le=1_000_000, description="steps of Adam; the rate falls to 0")
    learning_rate: float = Field(
        0.01, gt=0, description="what a weight moves at most in the first step, in units of its scale"
    )
    damp_percent: float = Field(0.01, ge=0, le=1, description="added to H for float_targets alone")
    sequential: StrictBool = Field(True, description=_SEQUENTIAL)
    float_targets: StrictBool = Field(False, description=_FLOAT_TARGETS)


class GwqOptions(CalibratedOptions):
    """GWQ (2411.00850): keeps the weights that the loss depends on most in 16 bits, sparse."""

    changes_graph = True

    fraction: float = Field(
        0.01,
        ge=0,
        le=0.5,
        description="of each layer's weights that are kept, those with the largest gradients; 6 bytes each",
    )
    samples: int = Field(
        1, ge=1, le=1_000_000, description="batches of calibration data that the gradients are taken on"
    )


class PbLlmOptions(MethodOptions):
    """PB-LLM (2310.00034): one bit for most weights, with rules of lut(-1,1); salient ones stay in INT8, sparse."""

    changes_graph = True

    fraction: float = Field(0.1, ge=0, le=0.5, description="of each layer's weights that are kept; 5 bytes each")
    criterion: Literal["magnitude", "hessian"] = Field(
        "magnitude",
        description="magnitude: the largest weights; hessian: those whose change would cost most, needs data",
    )

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
