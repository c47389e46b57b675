"""Capture: a PyTorch module to a Program in one spelling of fx.

``torch.export(strict=False)`` first, ``torch.fx.symbolic_trace`` where export cannot. Either way the result is a flat
graph of aten calls: inputs are placeholders, weights are get_attr nodes that share the model's memory, every node
knows its type, its module's path and the source line it came from. What is captured is run on the example inputs and
compared with the model; a form of it that differs is not taken.
"""

from __future__ import annotations

import inspect
import io
import keyword
import logging
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram, export
from torch.utils import _pytree as pytree

from fxquant.eager import (
    copies,
    difference,
    evaluating,
    run_example_inputs,
    summary,
    where,
)  # fmt: skip
from fxquant.errors import CaptureError, InputError, WeightError
from fxquant.flatten import from_export
from fxquant.graph import dtype_name, info
from fxquant.program import Program, record, target_name
from fxquant.rewrite import Log, unwritable
from fxquant.signature import Input, as_call, by_parameter, named_leaves, parameters_of
from fxquant.sizes import (
    UnkeptGuardError,
    declared_shapes,
    default_dynamic_shapes,
    enlarge,
    no_such_limit,
    run_program,
    small_limits,
)  # fmt: skip
from fxquant.symbolic import trace_symbolically
from fxquant.valueless import give_values, without_values

Inputs = Any
"""A tuple of positional inputs, or a dict of keyword inputs."""

_ONE_AT_A_TIME = threading.RLock()
"""torch.export keeps global state, and capture sets the model's mode for a while."""


def capture(
    model: nn.Module | ExportedProgram, example_inputs: Inputs = None, *, dynamic_shapes: Any = None
) -> Program:
    """The program of ``model``, which runs as the model does in eval mode, with no difference in any bit.

    ``dynamic_shapes`` is torch.export's; by default the batch dimension of every input, and the sequence dimension of
    integer, boolean and 3-D inputs, may vary where the model allows. An example of size 1 there is repeated to 2, since
    export would otherwise fix it. Inputs whose examples have the same batch size share that dimension. Sizes at which
    the model takes another path than on the example are refused by the signature's limits.

    Of a model with Lazy weights shapes alone are traced and compared: none of its weights is read.

    Raises InputError for example inputs that the model fails on, CaptureError, naming the module and the source line,
    or WeightError for weights without values.
    """
    begin = time.perf_counter()
    with _ONE_AT_A_TIME:
        if isinstance(model, ExportedProgram):
            program = _from_exported_program(model)
        else:
            check_model(model)
            with evaluating(model), torch.no_grad(), warnings.catch_warnings(), without_values(model) as weights:
                warnings.simplefilter("ignore")
                program = _capture_module(model, example_inputs, dynamic_shapes, compared=not weights)
            give_values(program.gm, weights)
    _check_float(program)
    program.gm.graph.lint()
    program.gm.recompile()
    record(program, "capture", Log(), time.perf_counter() - begin)
    return program


_WATCHERS = ("ObserverBase", "FakeQuantizeBase", "AffineQuantizedObserverBase")
_QUANTIZERS = ("quantized_decomposed", "quantized", "torchao", "pt2e_quant")
_GIVE_FLOAT = (
    "give the float model, or its ExportedProgram as torch.export.export made it, before prepare_pt2e, and a config "
    "that says the same, such as the recipe W8A8-INT"
)


def _check_float(program: Program) -> None:
    """CaptureError for a program that another quantizer wrote its operators into."""
    for node in program.gm.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in _QUANTIZERS:
            raise CaptureError(
                f"the program is quantized already: {info(node).path or node.name} calls {target_name(node.target)}, "
                f"as PT2E's convert_pt2e writes it; {_GIVE_FLOAT}"
            )


_PATH = "; from the disk fxquant.hf.load_model(path) reads one, with .model and .example_inputs"


def check_model(model: nn.Module) -> None:
    """Raise an error for what cannot be captured: not a module, weights without values or of integers, names."""
    if not isinstance(model, nn.Module):
        raise CaptureError(f"cannot capture a {type(model).__name__}; expected a torch.nn.Module or an ExportedProgram"
                           f"{_PATH if isinstance(model, (str, Path)) else ''}")  # fmt: skip
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("cannot capture a torch.jit.ScriptModule; give the nn.Module that it was made from")
    if (bad := unwritable(model)) is not None:
        raise CaptureError(f"the module or tensor {bad[:100]!r} has a name with quotes, backslashes or what cannot be "
                           f"printed, which code of torch.fx must not hold; rename it")  # fmt: skip
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if torch.nn.parameter.is_lazy(value):
            raise WeightError(f"{name} is not initialized yet; run the model once, or load its weights, first")
        if value.is_meta:
            raise WeightError(f"{name} is on the meta device and has no values; load the model's weights first")
        head = name.partition(".")[0]
        if hasattr(fx.GraphModule, head) or head in ("meta", "_graph"):
            raise CaptureError(f"{name}: torch.fx keeps the name {head!r} for itself; rename that attribute")
        if word := next((part for part in name.split(".") if keyword.iskeyword(part)), None):
            raise CaptureError(f"{name}: {word!r} is a keyword of Python, which torch.fx cannot write; rename it")
    for path, module in model.named_modules():
        if watcher := next((c.__name__ for c in type(module).__mro__ if c.__name__ in _WATCHERS), None):
            raise CaptureError(f"{path} is a {type(module).__name__} ({watcher}): the model is prepared for another "
                               f"quantizer, torch.ao's or torchao's; {_GIVE_FLOAT}")  # fmt: skip
        weight = getattr(module, "weight", None) if isinstance(module, _WITH_FLOAT_WEIGHT) else None
        if isinstance(weight, Tensor) and _is_integer(weight):
            raise _integer_weight(f"{path}.weight" if path else "weight", weight)


def _is_integer(value: Tensor) -> bool:
    return not value.is_floating_point() and not value.is_complex()


def _integer_weight(name: str, value: Tensor) -> WeightError:
    return WeightError(
        f"{name} holds {dtype_name(value.dtype)}; expected floating point values; load the float model, which fxquant "
        f"then quantizes"
    )


_WITH_FLOAT_WEIGHT = (nn.Linear, nn.Bilinear, nn.Embedding, nn.modules.conv._ConvNd)


def _capture_module(model: nn.Module, example_inputs: Inputs, dynamic_shapes: Any, *, compared: bool) -> Program:
    """The first form of the program that gives what the model gives on the example: of sizes as free as can be.

    Not ``compared`` with a model without values that cannot run so: some operators have no shapes without them.
    """
    if example_inputs is None:
        raise CaptureError("example_inputs is missing; give a tuple of positional inputs or a dict of keyword inputs")
    args, kwargs = as_call(example_inputs)
    kwargs = _in_order_of_forward(model, kwargs)
    try:
        want = _run_example(model, args, kwargs)
        compared = True
    except InputError:
        if compared:
            raise
    first: Exception | None = None
    for attempt in _attempts(model, args, kwargs, dynamic_shapes):
        try:
            program = attempt()
            if compared:
                _check_same(program, args, kwargs, want)
        except Exception as error:
            if isinstance(error, CaptureError) and not isinstance(error, _DifferentError):
                raise
            first = first or error
            continue
        own = getattr(model, "declared_limits", ())
        program.signature = replace(program.signature, limits=(*program.signature.limits, *own))
        if compared:
            limits = (*program.signature.limits, *small_limits(model, program, args, kwargs))
            program.signature = replace(program.signature, limits=limits)
        return program
    assert first is not None
    if dynamic_shapes is not None or any(isinstance(p, FakeTensor) for p in model.parameters()):
        raise _capture_error(model, first) from first
    try:
        return trace_symbolically(model, args, kwargs)
    except Exception as trace_error:
        raise _capture_error(model, first, trace_error) from first


def _run_example(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    try:
        return run_example_inputs(model, args, kwargs)
    except InputError as error:
        integers = [(n, p) for n, p in model.named_parameters() if p.dim() > 1 and _is_integer(p)]
        if integers and "dtype" in str(error):
            raise _integer_weight(*integers[0]) from error
        raise


class _DifferentError(CaptureError):
    """A program that does not give what the model gives."""


def _check_same(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], want: list[Any]) -> None:
    try:
        different = difference(run_program(program, args, kwargs), want)
    except Exception as error:
        different = f"{type(error).__name__}: {summary(error, 200)}"
    if different is not None:
        raise _DifferentError(
            f"the captured graph does not give what the model gives on the example inputs ({different}): forward "
            f"depends on something else than its inputs\nWhat to do: make it a function of its inputs and weights"
        )


def _in_order_of_forward(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword inputs in the order of forward's parameters, which is their order in a positional call."""
    names = list(inspect.signature(model.forward).parameters)
    return dict(sorted(kwargs.items(), key=lambda item: names.index(item[0]) if item[0] in names else len(names)))


def _fixed(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are no tensors, by name, with forward's defaults for what the example leaves out.

    A default of None that stands for a setting of ``model.config`` (use_cache) is that setting.
    """
    call = inspect.signature(model.forward).bind(*args, **kwargs)
    given = set(call.arguments)
    call.apply_defaults()
    values, config = by_parameter(call), getattr(model, "config", None)
    for name in set(call.arguments) - given:
        if values.get(name, 0) is None and type(setting := getattr(config, name, None)) is bool:
            values[name] = setting
    return {k: v for k, v in named_leaves(values).items() if v is None or type(v) in (bool, int, float, str)}


# --- attempts ---------------------------------------------------------------------------------------------------------
def _attempts(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> Iterator[Callable[[], Program]]:
    """Ways to export, best first: dynamic sizes on an enlarged example, then on the example, then its own sizes.

    A model that says what it takes, ``declared_inputs``, is exported with those dimensions dynamic, under those names.
    """
    declared: tuple[Input, ...] = getattr(model, "declared_inputs", ())
    about: dict[str, Any] = {"fixed": _fixed(model, args, kwargs), "parameters": parameters_of(model)}
    example = args, kwargs
    if declared and dynamic_shapes is None:
        dynamic_shapes = declared_shapes(declared)
        about["declared"] = declared
    if dynamic_shapes is not None:
        yield lambda: _export_as_told(model, example, dynamic_shapes, about)
        return
    large = enlarge(example)
    if any(a is not b for a, b in zip(pytree.tree_leaves(large), pytree.tree_leaves(example), strict=True)):
        yield lambda: _export_dynamic(model, large, about)
    if default_dynamic_shapes(example):
        yield lambda: _export_dynamic(model, example, about)
    yield lambda: from_export(_export(model, copies(example, alias=False), None), **about)


def _export_as_told(model: nn.Module, example: Any, dynamic_shapes: Any, about: dict[str, Any]) -> Program:
    try:
        return from_export(_export(model, copies(example, alias=False), dynamic_shapes), **about)
    except UnkeptGuardError as error:
        raise no_such_limit(error) from error


def _export_dynamic(model: nn.Module, example: Any, about: dict[str, Any]) -> Program:
    """With dynamic sizes, save those that the model looks at in a way that cannot be kept as a limit.

    Where it looks at several at once, the batch is the last to be fixed.
    """
    static: frozenset[tuple[int, int]] = frozenset()
    while True:
        inputs = copies(example, alias=False)
        shapes = default_dynamic_shapes(inputs, static)
        exported = _export(model, inputs, shapes or None)
        try:
            return from_export(exported, share_batch=True, **about)
        except UnkeptGuardError as error:
            if error.dims <= static:
                raise no_such_limit(error) from error
            others = frozenset((i, d) for i, d in error.dims if d) - static
            static |= others or error.dims


def _from_exported_program(exported: ExportedProgram) -> Program:
    try:
        return from_export(exported)
    except UnkeptGuardError as error:
        raise no_such_limit(error) from error


def _export(model: nn.Module, inputs: Any, shapes: Any) -> ExportedProgram:
    """Export without what torch prints on the way to an error: the graph so far, and hints for its developers.

    ``inputs`` are (args, kwargs) that hold every tensor once: export takes a tensor given twice for one input.
    """
    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith("torch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with redirect_stderr(io.StringIO()), _named_keywords(model, inputs[1]):
            return export(model, *inputs, dynamic_shapes=shapes, strict=False)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _named_keywords(model: nn.Module, kwargs: dict[str, Any]) -> Iterator[None]:
    """``forward(x, **kw)`` with a parameter for each keyword given: torch.export keeps no size of ``kw`` dynamic."""
    forward, held = model.forward, vars(model).get("forward")
    signature = inspect.signature(forward)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    more = [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY) for k in kwargs if k not in signature.parameters]
    if not more:
        yield
        return

    def call(*args: Any, **given: Any) -> Any:
        return forward(*args, **given)

    call.__signature__ = signature.replace(parameters=[*named, *more])  # type: ignore[attr-defined]
    vars(model)["forward"] = call
    try:
        yield
    finally:
        vars(model).pop("forward")
        if held is not None:
            vars(model)["forward"] = held


# --- errors -----------------------------------------------------------------------------------------------------------
_CONTROL_FLOW = re.compile(r"data-dependent|DataDependent|control flow|item\(\)|tolist|Could not guard", re.IGNORECASE)


def _capture_error(model: nn.Module, exported: Exception, traced: Exception | None = None) -> CaptureError:
    """What torch says, where, and what to do; an error of ours is passed on."""
    if isinstance(exported, CaptureError):
        return exported
    place = where(model, exported)
    told = f"cannot capture {type(model).__name__}{place}: {_said(exported, 400)}"
    if traced is not None:
        told += f"\ntorch.fx.symbolic_trace could not either: {_said(traced, 200)}"
    if traced is None and not _CONTROL_FLOW.search(_said(exported, 2000)):
        return CaptureError(f"{told}\nWhat to do: give dynamic_shapes that fit the model's forward, or leave them out")
    advice = ""
    if hasattr(model, "set_experts_implementation") and "Experts)" in place:
        advice = "call model.set_experts_implementation('batched_mm') first, which has no loop over the experts; or "
    if "_apply()" in str(exported):
        advice += "leave out the module.to(...) at that line, which is made while forward runs; or "
    if _CONTROL_FLOW.search(_said(exported, 2000)):
        advice += (
            "replace data-dependent Python control flow at that line by tensor operators (torch.where, masks), move it "
            "out of forward, or "
        )
    return CaptureError(f"{told}\nWhat to do: {advice}compile the part of the model that torch.export takes")


def _said(error: Exception, length: int) -> str:
    return f"{type(error).__name__}: {summary(error, length)}"
