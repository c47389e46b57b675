"""The operators' library in onnxruntime: what the file's functions and the reference give; a status for bad input."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx
import ort_models as models
import pytest
import torch
from ort_models import attributes, function, model, run, run_session, session, weight, weight_inputs
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

import fxquant
from fxquant import cli, ops
from fxquant.codegen import cpu_library, ort_formats, ort_library
from fxquant.errors import KernelError
from fxquant.qtensor import QuantizedTensor

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(
        not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="there is no C++ compiler here"
    ),
]
FORMATS = [str(format) for format in ort_formats.FORMATS]
ROUNDED = [name for name in FORMATS if not name.startswith(("uint", "nf", "higgs"))]


@pytest.fixture(scope="module")
def library() -> str:
    return fxquant.custom_ops_library()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def values(q: QuantizedTensor, *, half: bool = False) -> Tensor:
    """W in float64, from codes and scales, as float32 has it; scales are float16 where they are kept so."""
    scale = q.scale.half().float() if half else q.scale.float()
    zero = None if q.zero_point is None else q.zero_point
    return torch.as_tensor(ops.dequantize(q.codes, scale, zero, str(q.spec), q.codes.shape)).double()


def near(got: Tensor, want: Tensor, bound: float = 2e-6) -> bool:
    return got.shape == want.shape and float((got.double() - want).norm()) <= bound * float(want.norm())


def test_the_header_has_the_formats() -> None:
    assert ort_formats.PATH.read_text() == ort_formats.header(), "run python -m fxquant.codegen.ort_formats"


# --- parity -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("format", FORMATS)
def test_linear_is_the_function_and_float64(format: str, library: str) -> None:
    for granularity, (rows, cols), half in [
        ("channel", (20, 96), False), ("group64", (33, 128), True), ("group24", (7, 109), False),
        ("tensor", (5, 33), False),
    ]:  # fmt: skip
        if granularity == "tensor" and format.startswith(("higgs", "uint")):
            continue
        q, x = weight(f"{format}/{granularity}", rows, cols), {"x": normal(2, 3, cols)}
        weights, bias = weight_inputs(q, half=half), normal(rows, seed=2)
        want = x["x"].double() @ values(q, half=half).T
        got = run(model("Linear_" + format, x, weights, **attributes(q)), x, library)
        assert near(got, want), (granularity, half)
        local = function("Linear", q, half=half)
        assert near(run(model("Linear_" + format, x, weights, function=local, **attributes(q)), x), want)
        with_bias = model("LinearBias_" + format, x, {**weights, "bias": bias}, **attributes(q))
        assert near(run(with_bias, x, library), want + bias.double())


@pytest.mark.parametrize("format", FORMATS)
def test_rows_are_the_function_bit_by_bit(format: str, library: str) -> None:
    for granularity, half in [("channel", True), ("group24", False)]:
        q = weight(f"{format}/{granularity}", 13, 109)
        weights, shape = weight_inputs(q, half=half), [13, 109]
        for dtype in (torch.int64, torch.int32):
            indices = {"indices": torch.tensor([[0, 12, -1], [-13, 5, 5]], dtype=dtype)}
            found = [
                run(model(f"Embedding_{format}", indices, weights, function=local, **attributes(q)), indices, path)
                for local, path in ((None, library), (function("Embedding", q, half=half), None))
            ]
            assert torch.equal(*found)
            assert torch.equal(found[0].double(), values(q, half=half)[indices["indices"].long() % 13])
        whole = model(f"Dequantize_{format}", {}, weights, weight_shape=shape, **attributes(q))
        assert torch.equal(run(whole, {}, library).double(), values(q, half=half))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype, library: str) -> None:
    q, x, bias = weight("e3m2/group64", 40, 130), {"x": normal(3, 130).to(dtype)}, normal(40, seed=2).to(dtype)
    made = model("LinearBias_e3m2", x, {**weight_inputs(q), "bias": bias}, y=dtype, **attributes(q))
    got = run(made, x, library)
    assert got.dtype == dtype
    want = x["x"].double() @ values(q).T + bias.double()
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 16])
def test_few_bits_for_activations(bits: int, library: str) -> None:
    q, x = weight("e2m3/group64", 64, 256), {"x": normal(4, 256)}
    got = run(model("Linear_e2m3", x, weight_inputs(q), activation_bits=bits, **attributes(q)), x, library)
    assert near(got, x["x"].double() @ values(q).T, {8: 8e-3, 16: 1e-4}[bits])


@pytest.mark.parametrize("format", ROUNDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_activations_are_rounded_as_the_reference_rounds_them(format: str, dtype: torch.dtype, library: str) -> None:
    """All values of the grid, what lies half way between neighbours and beside that, zeros, and any numbers."""
    grid = fxquant.format(format).table()
    grid = grid[grid.isfinite()].sort().values
    middle = ((grid[1:] + grid[:-1]) / 2).float()
    beside = (torch.nextafter(middle, torch.tensor(side)) for side in (9e9, -9e9))
    ties = torch.stack([torch.cat([grid[:1].float(), some]) for some in (middle, *beside, grid[1:].float())])
    for x in (ties, ties * 0.37, normal(40, 1500), normal(3, 70) * 1e-39, torch.zeros(2, 5), normal(70)):
        given = {"x": x.to(dtype)}
        got = run(model(f"FakeQuantizeDynamic_{format}", given, {}, y=dtype), given, library)
        assert torch.equal(got, ops.fake_quantize_dynamic(given["x"], f"{format}/token"))
        scale = torch.tensor([[0.083]])
        got = run(model(f"FakeQuantize_{format}", given, {"scale": scale}, y=dtype), given, library)
        assert torch.equal(got, ops.fake_quantize(given["x"], scale, None, f"{format}/tensor"))


def test_rounding_is_the_function(library: str) -> None:
    given = {"x": normal(7, 3, 130)}
    for format in ("e4m3", "e5m2", "e2m1", "e3m0", "int8"):
        q = weight(f"{format}/channel", 4, 8)
        names = ("FakeQuantizeDynamic", {}), ("FakeQuantize", {"scale": torch.tensor([0.02])})
        for op, weights in names:
            local = function(op, q)
            assert torch.equal(
                run(model(f"{op}_{format}", given, weights), given, library),
                run(model(f"{op}_{format}", given, weights, function=local), given),
            )


def test_not_a_number_stays_where_it_is(library: str) -> None:
    q, x = weight("e3m2/group64", 24, 128), torch.zeros(3, 128)
    x[0, 5], x[1, 7] = float("nan"), float("inf")
    y = run(model("Linear_e3m2", {"x": x}, weight_inputs(q), **attributes(q)), {"x": x}, library)
    assert bool(y[0].isnan().all())
    assert not bool(y[1].isfinite().any())
    assert bool((y[2] == 0).all())
    rounded = run(model("FakeQuantizeDynamic_e4m3", {"x": x}, {}), {"x": x}, library)
    assert bool(rounded[0].isnan().all())
    assert not bool(rounded[1].isfinite().all())
    assert bool((rounded[2] == 0).all())


def test_nothing_in_nothing_out(library: str) -> None:
    q = weight("e3m2/group64", 24, 128)
    for shape in ((0, 128), (2, 0, 128)):
        x = {"x": torch.zeros(shape)}
        made = model("Linear_e3m2", x, weight_inputs(q), **attributes(q))
        assert run(made, x, library).shape == (*shape[:-1], 24)
        assert run(model("FakeQuantizeDynamic_e4m3", x, {}), x, library).shape == shape
    indices = {"indices": torch.zeros(0, 3, dtype=torch.int64)}
    made = model("Embedding_e3m2", indices, weight_inputs(q), **attributes(q))
    assert run(made, indices, library).shape == (0, 3, 128)
    assert run(
        model("FakeQuantizeDynamic_e4m3", {"x": torch.zeros(3, 0)}, {}), {"x": torch.zeros(3, 0)}, library
    ).shape == (3, 0)


# --- sessions ---------------------------------------------------------------------------------------------------------
class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = torch.nn.Embedding(50, 64), torch.nn.Linear(64, 96), torch.nn.Linear(96, 50)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(F.silu(self.up(self.embed(ids))))


@pytest.mark.parametrize("config", [
    "W6A16-E3M2", {"rules": [{"match": "*", "weight": "uint5/group32"}]},
    {"rules": [{"match": "*", "weight": "e2m3/group32", "activation": "e4m3/token"}]},
])  # fmt: skip
def test_one_file_with_and_without_the_library(config: Any, library: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (2, 7))
    q = fxquant.compile(Net().eval(), (ids,), config=config)
    q.export_onnx(tmp_path / "m.onnx")
    found = [
        torch.from_numpy(loaded.run(None, {loaded.get_inputs()[0].name: ids.numpy()})[0])
        for loaded in (fxquant.onnx_session(tmp_path / "m.onnx", library=which) for which in (True, False))
    ]
    assert near(found[0], found[1].double(), 1e-5)
    assert near(found[0], q(ids).double(), 1e-5)


def test_a_file_in_half_precision(library: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (2, 7))
    q = fxquant.compile(Net().eval().half(), (ids,), config="W6A16-E3M2")
    q.export_onnx(tmp_path / "m.onnx")
    loaded = fxquant.onnx_session(tmp_path / "m.onnx", library=True)
    found = torch.from_numpy(loaded.run(None, {loaded.get_inputs()[0].name: ids.numpy()})[0])
    assert found.dtype == torch.float16
    assert near(found, q(ids).double(), 2e-3)


@pytest.mark.parametrize("M", [1, 5, 33])
def test_bits_do_not_depend_on_threads(M: int, library: str) -> None:
    q, x = weight("e3m2/group64", 2000, 512), {"x": normal(M, 512)}
    made = model("Linear_e3m2", x, weight_inputs(q), **attributes(q))
    found = [run(made, x, library, threads) for threads in (1, 2, 3, 7)]
    assert all(torch.equal(found[0], other) for other in found)


def test_sessions_at_the_same_time(library: str) -> None:
    q = weight("e3m2/group64", 300, 256)
    made = model("Linear_e3m2", {"x": normal(1, 256)}, weight_inputs(q), **attributes(q))
    loaded = [session(made, library, threads) for threads in (1, 3)]
    given = [{"x": normal(m % 5 + 1, 256, seed=m)} for m in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda m: run_session(loaded[m % 2], given[m]), range(40)))
    assert all(near(y, x["x"].double() @ values(q).T) for x, y in zip(given, found, strict=True))


def test_sessions_made_at_the_same_time(library: str) -> None:
    q, x = weight("e3m2/group64", 24, 128), {"x": normal(2, 128)}
    made = model("Linear_e3m2", x, weight_inputs(q), **attributes(q))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: run(made, x, library), range(12)))
    assert all(torch.equal(found[0], other) for other in found)


def test_a_process_without_torch(library: str, tmp_path: Path) -> None:
    q = weight("e3m2/group64", 24, 128)
    made = model("Linear_e3m2", {"x": normal(2, 128)}, weight_inputs(q), **attributes(q))
    onnx.save(made, str(tmp_path / "m.onnx"))
    code = f"""
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.register_custom_ops_library({library!r})
session = onnxruntime.InferenceSession({str(tmp_path / "m.onnx")!r}, options, providers=["CPUExecutionProvider"])
y = session.run(None, {{"x": numpy.ones((2, 128), numpy.float32)}})[0]
print(y.shape, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(2, 24) False"


def test_shapes_are_known_before_there_are_data(library: str) -> None:
    q = weight("e3m2/group64", 24, 128)
    x, indices = {"x": normal(2, 3, 128)}, {"indices": torch.zeros(2, 3, dtype=torch.int64)}
    halves = {"x": x["x"].half()}
    for op, inputs, more, last, dtype in [
        ("Linear", x, {}, 24, torch.float32), ("Linear", halves, {}, 24, torch.float16),
        ("Embedding", indices, {}, 128, torch.float32),
        ("Dequantize", {}, {"weight_shape": [24, 2, 64]}, 64, torch.float32),
    ]:  # fmt: skip
        made = model(f"{op}_e3m2", inputs, weight_inputs(q, half=True), y=dtype, **attributes(q), **more)
        for value in made.graph.input:
            for i, dim in enumerate(value.type.tensor_type.shape.dim):
                dim.dim_param = f"size{i}"
        shape = session(made, library).get_outputs()[0].shape
        assert shape == ([24, 2, 64] if op == "Dequantize" else ["size0", "size1", last])
    for dtype in models.KINDS:
        if dtype.is_floating_point and dtype != torch.float64:
            rounded = model(
                "FakeQuantize_e4m3", {"x": torch.zeros(2, 5, dtype=dtype)}, {"scale": torch.ones(1)}, y=dtype
            )
            rounded.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
            rounded.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5
            assert session(rounded, library).get_outputs()[0].shape == ["n", 5]


# --- bad input --------------------------------------------------------------------------------------------------------
def broken(change: Callable[[dict[str, Any]], None], op: str = "Linear", format: str = "e3m2") -> dict[str, Any]:
    """What a model of one node is made of, after ``change``."""
    q = weight(f"{format}/group64", 24, 130)
    inputs = {"indices": torch.zeros(2, dtype=torch.int64)} if op == "Embedding" else {"x": normal(2, 130)}
    weights = {**weight_inputs(q), **({"bias": normal(24)} if op == "LinearBias" else {})}
    more = {"weight_shape": [24, 130]} if op == "Dequantize" else {}
    made = {"op": f"{op}_{format}", "inputs": inputs, "weights": weights, "attributes": {**attributes(q), **more}}
    if op == "Dequantize":
        made["inputs"] = {}
    change(made)
    return made


def put(part: str, name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda made: made[part].__setitem__(name, value)


def drop(part: str, name: str) -> Callable[[dict[str, Any]], None]:
    return lambda made: made[part].pop(name)


BAD = [
    (broken(put("inputs", "x", normal(2, 129))), "x has shape [2, 129]; its last dimension is to be 130"),
    (broken(put("inputs", "x", torch.tensor(1.0))), "x has shape []; its last dimension is to be 130"),
    (broken(put("attributes", "cols", 140)), "packed has shape [24, 98]; rows of 140 columns (cols) of 6 bits"),
    (broken(put("attributes", "cols", 2**62)), "cols is 4611686018427387904; 1 to 1099511627776 are allowed"),
    (broken(put("attributes", "cols", 0)), "cols is 0; 1 to"),
    (broken(put("attributes", "group_size", 0)), "group_size is 0; 1 to"),
    (broken(put("attributes", "group_size", -64)), "group_size is -64; 1 to"),
    (broken(put("attributes", "group_size", 32)), "scale has shape [24, 3]; [rows, 5] or [1, 5] is expected"),
    (broken(drop("attributes", "cols")), "it has no INT attribute cols"),
    (broken(put("attributes", "cols", "130")), "it has no INT attribute cols"),
    (broken(put("attributes", "activation_bits", 4)), "activation_bits is 4; 8, 16 and 32 are allowed"),
    (broken(put("attributes", "version", 2)), "it is of version 2 of the operators, this library has version 1"),
    (broken(put("weights", "packed", torch.zeros(24, 97, dtype=torch.uint8))), "packed has shape [24, 97]"),
    (broken(put("weights", "packed", torch.zeros(24 * 98, dtype=torch.uint8))), "packed has shape [2352]"),
    (broken(put("weights", "packed", torch.zeros(24, 98))), "(packed) of operator (Linear_e3m2) in node (the.node)"),
    (broken(put("weights", "scale", torch.ones(23, 3))), "scale has shape [23, 3]; [rows, 3] or [1, 3] is expected"),
    (broken(put("weights", "scale", torch.ones(24))), "scale has shape [24]"),
    (broken(put("weights", "scale", torch.ones(24, 3).double())), "(scale) of operator (Linear_e3m2)"),
    (broken(put("inputs", "x", normal(2, 130).double())), "tensor(double)"),
    (broken(drop("weights", "scale")), "has input size 2 not in range"),
    (broken(put("weights", "bias", torch.ones(23)), "LinearBias"), "bias has shape [23]; [24] is expected"),
    (broken(put("weights", "bias", torch.ones(24).half()), "LinearBias"), "the.node"),
    (broken(put("weights", "zero_point", torch.zeros(24, 1, dtype=torch.uint8)), format="uint4"),
     "zero_point has shape [24, 1]; [rows, 3] or [1, 3] is expected"),
    (broken(put("weights", "zero_point", torch.zeros(1, 3, dtype=torch.uint8)), format="uint4"),
     "scale has shape [24, 3], zero_point [1, 3]; they are to be the same"),
    (broken(put("inputs", "indices", torch.tensor([3, 24])), "Embedding"), "index 24 at position 1 is out of range"),
    (broken(put("inputs", "indices", torch.tensor([-25])), "Embedding"), "index -25 at position 0 is out of range"),
    (broken(put("inputs", "indices", torch.tensor([2**62])), "Embedding"), "index 4611686018427387904 at position 0"),
    (broken(put("attributes", "weight_shape", [24, 131]), "Dequantize"), "weight_shape does not have the 24 x 130"),
    (broken(put("attributes", "weight_shape", [2**33, 2**33]), "Dequantize"), "weight_shape does not have"),
    (broken(put("attributes", "weight_shape", [-24, -130]), "Dequantize"), "weight_shape has the size -24"),
    (broken(drop("attributes", "weight_shape"), "Dequantize"), "it has no INTS attribute weight_shape"),
]  # fmt: skip


@pytest.mark.parametrize(("made", "message"), BAD, ids=[message[:40] for _, message in BAD])
@pytest.mark.parametrize("constant", [True, False], ids=["initializers", "inputs"])
def test_bad_input_is_an_error_of_the_node(made: dict[str, Any], message: str, constant: bool, library: str) -> None:
    """At load where weights are in the file, else at the run."""
    inputs, weights = dict(made["inputs"]), dict(made["weights"])
    if not constant:
        inputs, weights = {**inputs, **weights}, {}
    y = torch.float64 if "double" in message else torch.float32
    with pytest.raises(Exception) as error:  # noqa: PT011 onnxruntime's own exceptions have no common base
        run(model(made["op"], inputs, weights, y=y, **made["attributes"]), inputs, library)
    assert message in str(error.value)
    assert "the.node" in str(error.value)


def test_a_scale_for_all_is_one(library: str) -> None:
    x = {"x": normal(2, 5)}
    with pytest.raises(Exception, match=r"'the.node': scale has shape \[2\]; one for all is expected"):
        run(model("FakeQuantize_e4m3", x, {"scale": torch.ones(2)}), x, library)


def test_a_format_of_no_name_is_left_to_its_function(library: str) -> None:
    q, x = weight("e2m3b4/group64", 24, 128), {"x": normal(2, 128)}
    made = model("Linear_e2m3b4", x, weight_inputs(q), function=function("Linear", q), **attributes(q))
    assert near(run(made, x, library), x["x"].double() @ values(q).T)


# --- other runtimes ---------------------------------------------------------------------------------------------------
CREATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
GET_API = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
VERSION = ctypes.CFUNCTYPE(ctypes.c_void_p)


def register(library: str, table_of: Callable[[int, Any], Any]) -> list[str]:
    """Statuses that the library makes for a runtime whose tables are those of ``table_of(version, create_status)``."""
    said: list[str] = []

    @CREATE
    def create_status(code: int, message: bytes) -> int:
        said.append(message.decode())
        return 1

    kept = {version: table_of(version, ctypes.cast(create_status, ctypes.c_void_p).value) for version in (1, 17)}
    get_api = GET_API(lambda version: ctypes.addressof(kept[version]) if kept.get(version) is not None else None)
    number = ctypes.create_string_buffer(b"1.2.3")
    get_version = VERSION(lambda: ctypes.addressof(number))
    base = (ctypes.c_void_p * 2)(*(ctypes.cast(f, ctypes.c_void_p).value for f in (get_api, get_version)))
    call = ctypes.CDLL(library).RegisterCustomOps
    call.restype = ctypes.c_void_p
    assert call(None, ctypes.byref(base)) == 1
    return said


def test_a_runtime_that_is_too_old(library: str) -> None:
    said = register(library, lambda version, create: (ctypes.c_void_p * 1)(create) if version == 1 else None)
    assert said == [
        "fxquant's operators need onnxruntime 1.17 or newer, this is 1.2.3: it has no API of version 17. "
        "Files of fxquant run without the library too"
    ]


def test_a_runtime_that_lacks_a_function(library: str) -> None:
    def table(version: int, create: int) -> Any:
        return (ctypes.c_void_p * 300)(create, *[1] * 273, 0, *[1] * 25)

    assert "1.2.3: it has no KernelContext_ParallelFor" in register(library, table)[0]


# --- trials -----------------------------------------------------------------------------------------------------------
def test_a_trial_is_made_once(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    ort_library._check.cache_clear()
    monkeypatch.setattr(ort_library, "trial", lambda path: pytest.fail("it was tried before"))
    assert fxquant.custom_ops_library() == library


@pytest.mark.parametrize(("source", "why"), [
    ('extern "C" void RegisterCustomOps(void *, void *) { __builtin_trap(); }', "killed by signal"),
    ('extern "C" void *RegisterCustomOps(void *, void *) { return nullptr; }', "Linear_e3m2"),
    ("int nothing;", "undefined symbol: RegisterCustomOps"),
])  # fmt: skip
def test_a_library_that_fails_its_trial(source: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.cpp").write_text(source)
    compiler = cpu_library.compiler().path
    subprocess.run([compiler, "-shared", "-fPIC", "bad.cpp", "-o", "bad.so"], cwd=tmp_path, check=True)

    class Bad:
        path = tmp_path / "bad.so"

    monkeypatch.setattr(cpu_library, "library", lambda: Bad)
    with pytest.raises(KernelError, match=why) as error:
        fxquant.custom_ops_library()
    assert "The file runs without the library too" in str(error.value)


def test_no_process_to_try_it_in(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert str(ort_library.trial(Path(library))).startswith("it could not be tried: ")


def test_wrong_numbers_are_found(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, want = ort_library._example()
    monkeypatch.setattr(ort_library, "_example", lambda: (model, x, want + 1))
    assert ort_library.trial(Path(library)) == "wrong numbers"


def test_a_session_goes_without_the_library_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def none() -> None:
        raise KernelError("no C++ compiler found")

    monkeypatch.setattr(cpu_library, "library", none)
    q, x = weight("e3m2/group64", 24, 128), {"x": normal(2, 128)}
    made = model("Linear_e3m2", x, weight_inputs(q), function=function("Linear", q), **attributes(q))
    onnx.save(made, str(tmp_path / "m.onnx"))
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler found. The file runs without the library too"):
        loaded = fxquant.onnx_session(tmp_path / "m.onnx")
    assert near(models.run_session(loaded, x), x["x"].double() @ values(q).T)
    with pytest.raises(KernelError, match="no C"):
        fxquant.onnx_session(tmp_path / "m.onnx", library=True)


def test_the_command_line_says_what_there_is(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = CliRunner().invoke(cli.app, ["kernels", "--cpu"])
    assert said.exit_code == 0
    assert library in said.stdout
    assert "passed in onnxruntime" in said.stdout
    monkeypatch.setattr(ort_library, "custom_ops_library", lambda: (_ for _ in ()).throw(KernelError("it has gone")))
    shown = json.loads(CliRunner().invoke(cli.app, ["kernels", "--cpu", "--json"]).stdout)
    assert shown["library"] == "it has gone"
    assert "trial" not in shown
