"""Whether an exported file computes what the program does: loaded in onnxruntime, run at several sizes, compared.

For every output and set of sizes: the largest difference, the largest relative error of a row (``||y - y_torch|| /
||y_torch||`` over the last dimension), and for logits how often the largest one is the same. A row may be off by

    1e-4, at most 1e-2       where sums are in float32
    1e-3, at most 1          where kernels may round activations to 16 bits
    0.1, at most 1           where activations are rounded

and by more than the first, up to the second, where torch itself is as unsure: by 4 times what becomes of the program's
own outputs when the inputs of its linears are changed. They are changed in the last bits, which grows from layer to
layer, and where the program rounds activations decides now and then to which of two neighbours. Where a kernel may
round them to 8 bits (MatMulNBits at accuracy_level 4, nodes with ``activation_bits`` of 8) they are rounded to INT8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, fx

from fxquant.draw import made_up
from fxquant.errors import ExportError
from fxquant.ops import ROUNDINGS
from fxquant.ops import operators as ops
from fxquant.program import Program, Progress, quiet
from fxquant.rewrite import aten
from fxquant.signature import as_call, output_names

EXACT, ROUNDED_16, ROUNDED = 1e-4, 1e-3, 0.1
"""How far a row of an output may be off anyway, relative to its norm."""
UNSURE = 1e-2
"""How far where nothing is rounded, however little torch's own last bits mean."""
_FEW = 4

_LINEARS = (ops.linear_wq.default, aten.linear.default)


@dataclass(frozen=True)
class Compared:
    """One output of one run: its largest difference and relative error of a row, and what is allowed."""

    runtime: str
    sizes: str
    output: str
    difference: float
    relative: float
    bound: float
    same_top: float | None

    @property
    def ok(self) -> bool:
        return self.relative <= self.bound and self.relative < 1  # NaN is neither


@dataclass(frozen=True)
class OnnxCheck:
    """What ``check_onnx`` found; ``str`` is a table."""

    path: str
    rows: tuple[Compared, ...]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "rows": [asdict(row) | {"ok": row.ok} for row in self.rows]}

    def __str__(self) -> str:
        head = ("runtime", "sizes", "output", "max diff", "row error", "allowed", "same top-1", "")
        table = [head, *(_cells(row) for row in _shown(self.rows))]
        widths = [max(len(cells[i]) for cells in table) for i in range(len(head))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip() for cells in table)


def _shown(rows: Sequence[Compared]) -> Iterator[Compared]:
    """All outputs of a run where there are few, else the first, those that are too far off and the worst."""
    for _, run in groupby(rows, lambda row: (row.runtime, row.sizes)):
        same = list(run)
        worst = max(same, key=lambda row: row.relative)
        yield from (row for i, row in enumerate(same) if len(same) <= _FEW or i == 0 or row is worst or not row.ok)


def _cells(row: Compared) -> tuple[str, ...]:
    top = "" if row.same_top is None else f"{row.same_top:.1%}"
    numbers = (f"{row.difference:.1e}", f"{row.relative:.1e}", f"{row.bound:.0e}")
    return row.runtime, row.sizes, row.output, *numbers, top, "ok" if row.ok else "TOO FAR"


def check_onnx(
    program: Program, path: str | Path, *, inputs: Sequence[Any] | None = None, library: str | Path | None = None,
    progress: Progress = quiet,
) -> OnnxCheck:  # fmt: skip
    """Run the file in onnxruntime and the program in torch on ``inputs``, or on made-up ones, and compare.

    ``inputs`` are example inputs as ``fxquant.compile`` takes them; without them tokens and numbers are drawn (seeded)
    for up to three sets of dynamic sizes. With ``library``, a custom-op library, everything is run with it too. Raises
    ExportError, naming the node where onnxruntime does, if the file cannot be loaded or run.
    """
    calls = [as_call(example) for example in inputs] if inputs is not None else list(made_up(program))
    if not calls:
        raise ExportError("no inputs could be made up that the program takes; give check_onnx(path, inputs=[...])")
    runtimes: dict[str, str | Path | None] = {"onnxruntime": None}
    if library is not None:
        runtimes["with library"] = library
    rows: list[Compared] = []
    for name, ops_library in runtimes.items():
        session = _session(Path(path), ops_library)
        rounding = _rounding(program, Path(path), own_kernels=ops_library is not None)
        for done, (args, kwargs) in enumerate(calls):
            progress(f"check in {name}", done, len(calls))
            rows += _compare(program, session, program.signature.bind(args, kwargs), name, rounding, Path(path))
    progress("check", len(calls), len(calls))
    return OnnxCheck(str(path), tuple(rows))


def _session(path: Path, library: str | Path | None) -> Any:
    options = onnxruntime.SessionOptions()
    try:
        if library is not None:
            options.register_custom_ops_library(str(library))
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} cannot load {path}: {error}. The file stays where it is"
        ) from error


def _rounding(program: Program, path: Path, *, own_kernels: bool) -> Rounding:
    """What the runtime does to the inputs of linears."""
    bits = 32
    for node in onnx.load(str(path), load_external_data=False).graph.node:
        settings = {a.name: a.i for a in node.attribute}
        own = settings.get("activation_bits", 32) if own_kernels else 32
        bits = min(bits, own, 8 if settings.get("accuracy_level") == 4 else 32)
    if any(node.target in ROUNDINGS for node in program.gm.graph.nodes):
        return Rounding(ROUNDED, _to_int8 if bits == 8 else _noise)
    least = {32: EXACT, 16: ROUNDED_16, 8: ROUNDED}[bits]
    return Rounding(least, _to_int8 if bits == 8 else _noise, most=UNSURE if bits == 32 else 1.0)


@dataclass(frozen=True)
class Rounding:
    """How far a row may be off anyway, a change of the inputs of linears that shows how far else, and at most."""

    least: float
    change: Callable[[Tensor], Tensor]
    most: float = 1.0


def _to_int8(x: Tensor) -> Tensor:
    found: Tensor = ops.fake_quantize_dynamic(x, "int8/group32")
    return found


def _noise(x: Tensor) -> Tensor:
    """A few units in the last place of float32."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(x.numel()))
    return x * (1 + noise.to(x) * 2.0**-22)


class _Changed(fx.Interpreter):
    """The program with the inputs of its linears changed."""

    def __init__(self, gm: fx.GraphModule, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(gm)
        self.change = change

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in _LINEARS:
            args = (self.change(args[0]), *args[1:])
        return super().call_function(target, args, kwargs)


def _compare(
    program: Program, session: Any, flat: list[Tensor], runtime: str, rounding: Rounding, path: Path
) -> list[Compared]:
    given = [item.name for item in program.signature.inputs]
    feeds = {n: x.detach().cpu().numpy() for n, x in zip(given, flat, strict=True)}
    with torch.no_grad():
        outputs = program.gm(*flat)
    try:
        found = session.run(None, feeds)
    except Exception as error:
        raise ExportError(f"{path} does not run in onnxruntime: {error}. The file stays where it is") from error
    names = output_names(program.signature.output)
    wanted = [i for i, y in enumerate(outputs) if y is not None and not isinstance(y, str)]
    sizes = " ".join(f"{k}={v}" for k, v in program.signature.sizes(flat).items()) or "fixed"

    def rows(others: Sequence[Any], bounds: Sequence[float]) -> list[Compared]:
        return [
            compared(torch.as_tensor(outputs[i]), torch.as_tensor(other), runtime, sizes, names[i], bound)
            for i, other, bound in zip(wanted, others, bounds, strict=True)
        ]

    mine = [np.asarray(y) for y in found]
    first = rows(mine, [rounding.least] * len(wanted))
    if all(row.ok for row in first):
        return first
    with torch.no_grad():
        changed = _Changed(program.gm, rounding.change).run(*flat)
    noise = rows([changed[i] for i in wanted], [1.0] * len(wanted))
    return rows(mine, [min(max(rounding.least, 4 * row.relative), rounding.most) for row in noise])


def compared(want: Tensor, got: Tensor, runtime: str, sizes: str, name: str, bound: float) -> Compared:
    """How far ``got`` is from ``want``; shapes that differ are infinitely far."""
    if want.shape != got.shape:
        return Compared(runtime, sizes, name, float("inf"), float("inf"), bound, None)
    if not want.numel():
        return Compared(runtime, sizes, name, 0.0, 0.0, bound, None)
    x, y = want.detach().double(), got.double()
    both_nan = x.isnan() & y.isnan()
    off = torch.where((x == y) | both_nan, torch.zeros_like(x), x - y)  # Inf - Inf is no difference
    matrix = off.reshape(-1, x.shape[-1]) if x.dim() else off.reshape(1, 1)
    norms = x.nan_to_num(0.0, 0.0, 0.0).reshape(matrix.shape).norm(dim=1)
    floor = max(float(norms.max()) * 1e-3, 1e-30)
    relative = float((matrix.norm(dim=1) / norms.clamp(min=floor)).max())
    logits = want.is_floating_point() and x.dim() >= 2 and x.shape[-1] > 1 and ("logit" in name or x.dim() == 2)
    top = float((x.argmax(-1) == y.argmax(-1)).double().mean()) if logits else None
    return Compared(runtime, sizes, name, float(off.abs().max()), relative, bound, top)
