"""The pipeline: the one place that joins capture, passes and back ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from fxquant import store
from fxquant.calibrate import Batch, Calibration, batches_of
from fxquant.capture import capture
from fxquant.codegen import cpu
from fxquant.codegen.lower import LOWER
from fxquant.compiled import CompiledModel
from fxquant.config import Config, ConfigLike, load_config
from fxquant.errors import ConfigError, LoadError, near
from fxquant.examples import default_inputs, is_hugging_face
from fxquant.jobs import Job, kept
from fxquant.journal import Journaled
from fxquant.layers import Layer, find_layers
from fxquant.memory import limited
from fxquant.modules import PackedWeight, write_back
from fxquant.observe import observe
from fxquant.origin import origin
from fxquant.passes.fold_activation_scales import FOLD_ACTIVATION_SCALES
from fxquant.passes.gptq import GPTQ
from fxquant.passes.gwq import GWQ
from fxquant.passes.insert_qdq import INSERT_QDQ
from fxquant.passes.lorc import LORC
from fxquant.passes.normalize import NORMALIZE
from fxquant.passes.pb_llm import PB_LLM
from fxquant.passes.pre_shift import PRE_SHIFT
from fxquant.passes.quantize_activations import QUANTIZE_ACTIVATIONS
from fxquant.passes.quantize_attention import QUANTIZE_ATTENTION
from fxquant.passes.quantize_kv_cache import QUANTIZE_KV_CACHE
from fxquant.passes.remove_dead import REMOVE_DEAD
from fxquant.passes.rotate import ROTATE
from fxquant.passes.search_formats import SEARCH_FORMATS
from fxquant.passes.smooth import SMOOTH
from fxquant.passes.store_kv_cache import STORE_KV_CACHE
from fxquant.passes.zq_global import ZQ_GLOBAL
from fxquant.passes.zq_local import ZQ_LOCAL
from fxquant.program import Measure, Measured, Pass, Program, Progress, Stage, quiet, relative_error, run
from fxquant.scheme import LayerRule
from fxquant.show.summary import model_bytes
from fxquant.signature import as_call
from fxquant.tasks import IN_PROCESS, Executor, Keep, Prefixed, computed
from fxquant.verify import verify


@limited("compile the model")
def compile(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    config: ConfigLike = "W6A16-E3M2",
    *,
    calibration: Calibration | None = None,
    passes: Sequence[Pass] = (),
    dynamic_shapes: Any = None,
    job: str | Path | Job | None = None,
    progress: Progress = quiet,
    executor: Executor = IN_PROCESS,
) -> CompiledModel:
    """Compile ``model`` with a quantization config: capture it, rewrite the graph pass by pass, pack the weights.

    ``example_inputs``: a tuple of positional or a dict of keyword inputs; their batch and sequence sizes may vary later
    where the model allows, ``dynamic_shapes`` (as torch.export takes it) says otherwise. ``config``: a recipe's name, a
    path to YAML, TOML or JSON, a dict, or a Config. ``calibration``: batches of inputs (dicts, tuples or tensors), or
    token windows ``[n, length]``, for configs with methods that need data. ``passes``: passes of your own, run on the
    float graph before the config's. ``job``: a folder in which finished tasks of the config's methods are kept, so that
    the same call continues after it was stopped; it stays until you remove it. ``executor``: where layers are solved,
    by default here, one after the other; ``with fxquant.executor("processes") as executor`` makes one with workers. The
    bits are the same from each. The model itself is not changed.

    Raises ConfigError (unknown recipe, key or format; a rule that matches no layer; no calibration where it is needed),
    CaptureError (what cannot be captured, and where), WeightError (NaN or Inf in a weight, weights on the meta device),
    CalibrationError (data that do not fit, too little of them, NaN activations), TaskError (a task whose workers die),
    JobError (a folder of another job), MemoryLimitError (too little memory).
    """
    torch.set_num_threads(torch.get_num_threads())  # said, else MKL chooses by size, until a task runs with one
    settings = load_config(config)
    check_calibration(settings, calibration)
    progress("capture", 0, 0)
    program = capture(model, example_inputs, dynamic_shapes=dynamic_shapes)
    measure = _measure(program, example_inputs)
    batches = batches_for(settings, program, calibration)
    made_from = origin(
        program, settings, source=job.source if isinstance(job, Job) else None, examples=example_inputs,
        calibration=batches, passes=passes, packages=packages_of(model),
    )  # fmt: skip
    with kept(executor, job if settings.passes or passes else None, made_from, settings) as keeping:
        given = {"calibration": batches, "progress": progress, "executor": executor}
        to_qdq(program, settings, given, keeping, passes=passes, measure=measure)
    progress("observe", 0, 0)
    program.observations = observe(program, _example(program, example_inputs))
    to_packed(program, settings, measure=measure, progress=progress)
    return CompiledModel(program, settings, origin=made_from)


def to_qdq(
    program: Program, settings: Config, given: Mapping[str, Any], keeping: Executor, *, passes: Sequence[Pass] = (),
    measure: Measure | None = None,
) -> None:  # fmt: skip
    """A captured program to QDQ form, by ``passes`` of one's own and those of the config.

    ``given``: ``calibration`` (batches), ``progress`` and ``executor``; ``keeping`` is the executor of methods. Raises
    as ``compile`` does.
    """
    rules = settings.layer_rules()
    run(program, [Stage(NORMALIZE)], check=verify, measure=measure)
    check_rules(rules, find_layers(program.gm))
    stages = _stages(settings, passes, {"rules": rules, **given}, keeping)
    run(program, stages, check=verify, measure=measure, progress=given["progress"])


def to_packed(
    program: Program, settings: Config, *, measure: Measure | None = None, progress: Progress = quiet
) -> None:
    """A program in QDQ form to packed weights and operators on them."""
    cached = any(METHODS[name] is QUANTIZE_KV_CACHE for name, _ in settings.methods())
    lowering = [Stage(LOWER), *([Stage(STORE_KV_CACHE)] if cached else []), Stage(REMOVE_DEAD)]
    run(program, lowering, check=verify, measure=measure, progress=progress)


def packages_of(model: Any) -> tuple[str, ...]:
    """What made the model, beside torch."""
    return ("transformers",) if isinstance(model, nn.Module) and is_hugging_face(model) else ()


def _stages(settings: Config, passes: Sequence[Pass], given: Mapping[str, Any], keeping: Executor) -> list[Stage]:
    """What a config makes of a float graph, up to its codes. Rounding to nearest is done again sooner than kept."""
    solving = {**given, "executor": keeping, "keep": keeping.keep if isinstance(keeping, Journaled) else computed}
    rules, methods = given["rules"], _methods(settings, solving)
    activations = [Stage(QUANTIZE_ACTIVATIONS, given)] if any(rule.activation for rule in rules) else []
    return [
        *(Stage(own, given) for own in passes),
        *methods["float"],
        *activations,
        Stage(INSERT_QDQ, given),
        Stage(REMOVE_DEAD),
        *methods["codes"],
    ]


METHODS = {
    method.name: method
    for method in (
        SMOOTH, ROTATE, QUANTIZE_ATTENTION, QUANTIZE_KV_CACHE, PRE_SHIFT, SEARCH_FORMATS, GPTQ, ZQ_LOCAL, ZQ_GLOBAL,
        GWQ, PB_LLM, LORC, FOLD_ACTIVATION_SCALES,
    )
}  # fmt: skip
"""The passes that a config may ask for; ``config.METHODS`` holds their options."""


def batches_for(settings: Config, program: Program, calibration: Calibration | None) -> list[Batch]:
    """The calibration data as the graph takes it, nothing where no method needs any."""
    if calibration is None or settings.needs_data() is None:
        return []
    return batches_of(calibration, program.signature)


def _methods(settings: Config, given: Mapping[str, Any]) -> dict[str, list[Stage]]:
    """The methods a config asks for, in its order: those on float weights, and those on codes."""
    stages: dict[str, list[Stage]] = {"float": [], "codes": []}
    seen = Counter[str]()
    for name, options in settings.methods():
        seen[name] += 1
        own = dict(given)
        if seen[name] > 1:  # a pass that runs again has tasks of its own
            own["executor"] = Prefixed(given["executor"], f"{seen[name]}:")
            own["keep"] = partial(_keep_prefixed, given["keep"], f"{seen[name]}:")
        stages[options.on].append(Stage(METHODS[name], {**options.model_dump(), **own}))
    return stages


def _keep_prefixed(keep: Keep, prefix: str, name: str, compute: Callable[[], Any]) -> Any:
    return keep(prefix + name, compute)


def check_calibration(settings: Config, calibration: Calibration | None) -> None:
    """Raise a ConfigError where a method needs data and there is none."""
    if (needy := settings.needs_data()) and calibration is None:
        raise ConfigError(
            f"{needy} needs calibration data; give calibration=batches, an iterable of inputs as the model takes "
            f"them, or token windows [n, length]: fxquant.evaluate.calibration_windows(tokenizer) makes some"
        )


@limited("load the model")
def load(directory: str | Path) -> CompiledModel:
    """The compiled model saved in ``directory``. Nothing in it is executed. Raises LoadError for a damaged folder."""
    program, config = store.load(directory)
    manifest = store.read_manifest(Path(directory))
    try:
        return CompiledModel(program, load_config(config), origin=manifest["origin"] if manifest else None)
    except ConfigError as error:
        raise LoadError(f"{directory}: the saved config is not valid, the folder was changed: {error}") from error


def quantize_(
    model: nn.Module,
    config: ConfigLike = "W6A16-E3M2",
    example_inputs: Any = None,
    *,
    calibration: Calibration | None = None,
    job: str | Path | Job | None = None,
    progress: Progress = quiet,
    executor: Executor = IN_PROCESS,
) -> CompiledModel:
    """Compile ``model`` and write the packed weights back into it, so that its own methods (``generate``) run on them.

    Modules whose weight was quantized are replaced in place; what replaces them keeps their attributes and hooks, and
    decodes ``weight`` when it is read. ``example_inputs`` may be left out for Hugging Face models and others that have
    ``dummy_inputs``. Returns the compiled model, for its report. A transformers model's own ``save_pretrained`` writes
    packed weights afterwards. ``job`` is as for ``compile``. ConfigError for methods that change more of the graph than
    codes, such as ``rotate``: modules cannot hold that.
    """
    config = load_config(config)
    check_modules(config)
    if example_inputs is None:
        example_inputs = default_inputs(model)
    try:
        compiled = compile(
            model, example_inputs, config, calibration=calibration, job=job, progress=progress, executor=executor
        )
    except ConfigError as error:
        if any(isinstance(module, PackedWeight) for module in model.modules()):
            raise ConfigError(
                f"{error}. Layers that are packed already are left out: start from the float model"
            ) from error
        raise
    write_back(model, compiled.program)
    if is_hugging_face(model):
        from fxquant.hf_quantizer import attach  # loads transformers, as the model's class did

        attach(model, config)
    return compiled


def check_modules(config: Config) -> None:
    """Raise a ConfigError for a config whose result modules cannot hold."""
    if changing := [name for name, options in config.methods() if options.changes_graph]:
        raise ConfigError(
            f"{changing[0]} changes more of the graph than the codes of weights, which cannot be written back into "
            f"modules; use fxquant.compile, or leave it out of passes"
        )


def check_rules(rules: Sequence[LayerRule], layers: Sequence[Layer]) -> None:
    """Raise a ConfigError for a rule that matches no layer."""
    names = [layer.name for layer in layers]
    if not names:
        raise ConfigError(
            "the model has no layer that can be quantized: no linear, convolution, embedding or expert weight"
        )
    for rule in rules:
        if not any(rule.matches(name) for name in names):
            shown = ", ".join(names[:6]) + (f", ... ({len(names)} layers)" if len(names) > 6 else "")
            raise ConfigError(
                f"rule {rule.match!r} matches no layer{_near_rule(rule.match, names)}; the layers are {shown}"
            )
        if not any(rule.takes(layer.name, layer.type) for layer in layers):
            raise ConfigError(
                f"rule {rule.match!r} applies to no layer: what it matches is of another type "
                f"({', '.join(sorted({y.type for y in layers if rule.matches(y.name)}))}); give the exact path of an "
                f"embedding, or list its type in types"
            )


def _near_rule(match: str, names: Sequence[str]) -> str:
    """Layers near to a path; for a glob such as ``*.q_porj``, the same with a layer's last name that is near."""
    head, dot, last = match.rpartition(".")
    if "*" not in head or "*" in last:
        return near(match, names)
    return near(match, [f"{head}{dot}{name}" for name in dict.fromkeys(name.rpartition(".")[2] for name in names)])


def _example(program: Program, example_inputs: Any) -> list[Any] | None:
    """The example inputs as the graph takes them; None where there are none."""
    if example_inputs is None:
        return None
    args, kwargs = as_call(example_inputs)
    return list(program.signature.bind(args, kwargs))


def _measure(program: Program, example_inputs: Any) -> Measure:
    """Bytes, and the relative error against the captured program's output on the example inputs.

    There is no error without example inputs, nor once the program takes other inputs than it was captured with.
    """
    captured, inputs = program.signature.inputs, _example(program, example_inputs)
    with torch.no_grad():
        want = program.gm(*inputs) if inputs is not None else ()

    def measure(program: Program) -> Measured:
        nbytes = model_bytes(program.gm)
        if inputs is None or program.signature.inputs != captured:
            return Measured(None, nbytes)
        with torch.no_grad(), cpu.reference_only():
            return Measured(relative_error(program.gm(*inputs), want), nbytes)

    return measure
