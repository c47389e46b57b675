"""The errors fxquant raises. Each says what was wrong, what was given, what is allowed and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FxquantError(Exception):
    """Base of every error that fxquant raises on purpose; the command line prints its text and exits with 1."""


class FormatError(FxquantError, ValueError):
    """An unknown number format, granularity or spec, or values that a format cannot take."""


class ConfigError(FxquantError, ValueError):
    """A config that is not valid: an unknown key, recipe or pass, or a rule that matches no layer."""


class CaptureError(FxquantError, RuntimeError):
    """A model that cannot be captured as a graph; names the module, the source line and what to do."""


class WeightError(FxquantError, ValueError):
    """A weight that cannot be quantized: NaN or Inf, integer values, no rows, or no storage (meta device)."""


class CalibrationError(FxquantError, ValueError):
    """Calibration data, or statistics of it, that a method cannot use: too little, NaN, or not a Hessian."""


class InputError(FxquantError, ValueError):
    """Inputs of a compiled model that do not fit its signature."""


class VerifyError(FxquantError, RuntimeError):
    """A graph that breaks an invariant after a pass: a bug in the pass, not in the user's model."""


class ExportError(FxquantError, RuntimeError):
    """A program that a back end cannot express; names the node and the operator."""


class ArchError(FxquantError, ValueError):
    """A GPU architecture that kernels are not made for; lists those that they are."""


class KernelError(FxquantError, RuntimeError):
    """A kernel that cannot be compiled or taken apart here; names the kernel, or what is missing."""


class SaveError(FxquantError, OSError):
    """An output that cannot be written, for instance because it exists already."""


class LoadError(FxquantError, ValueError):
    """A saved model that is truncated, tampered with, or of another version."""


class JobError(FxquantError, RuntimeError):
    """An unfinished job that cannot be continued: another process has it, or it is another job; says what differs."""


class MemoryLimitError(FxquantError, MemoryError):
    """Memory that ran out; says how much was asked for and what there is."""


class CacheError(FxquantError, OSError):
    """A cache folder that cannot be made, or that others could write to."""


class ModelError(FxquantError, ValueError):
    """A model path that cannot be read: no such file, or a kind that is not supported."""


class TaskError(FxquantError, RuntimeError):
    """A task that no worker could finish: each one died, or is another version; names the task."""


def near(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'a' or 'b'?)`` for the known names closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(repr(c) for c in close)}?)" if close else ""
