"""The kernels around a product compile for every architecture they are launched on."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxquant.codegen import triton_source
from fxquant.codegen.aot import compile_variant
from fxquant.codegen.sass import statistics
from fxquant.codegen.variants import Variant
from fxquant.decodings import decoding
from fxquant.formats import parse_format

pytest.importorskip("triton")
_ROUND = {"x": "*fp16", "given": "*fp32", "before": "*i32", "after": "*i32", "row_scale": "*fp32", "K": "i32",
          "x_stride": "i32", "up": "fp32", "down": "fp32"}  # fmt: skip
_E4M3 = {"MBITS": 3, "BIAS": 7, "MAX": 448.0, "INTEGER": False, "STATIC": False, "BEFORE": True, "AFTER": True,
         "BK": 1024}  # fmt: skip
_ALONG = {"ROW_SCALE": True, "BIAS": True, "ACTIVATION": "silu", "RESIDUAL": True, "RANK": 16}
_REDUCE = {
    "partial": "*fp32", "row_scale": "*fp32", "bias": "*bf16", "residual": "*bf16", "thin": "*bf16", "wide": "*bf16",
    "out": "*bf16", "M": "i32", "N": "i32", "residual_stride": "i32", "out_stride": "i32",
}  # fmt: skip
_DENSE = {"w": "*i32", "scale": "*fp32", "zero": "*fp16", "out": "*bf16", "N": "i32", "K": "i32", "blocks": "i32",
          "out_stride": "i32"}  # fmt: skip
CASES = {
    "to_half": ({"x": "*bf16", "out": "*fp16", "row_scale": "*fp32", "K": "i32", "x_stride": "i32"}, {"BK": 1024}),
    "round_rows_to_bytes": ({**_ROUND, "out": "*u8"}, {**_E4M3, "TO_MBITS": 3, "TO_BIAS": 7}),
    "round_rows_to_half": ({**_ROUND, "out": "*fp16"}, {**_E4M3, "INTEGER": True, "MAX": 127.0, "TO_MBITS": 0,
                                                       "TO_BIAS": 0}),
    "reduce": (_REDUCE, {"BM": 16, "BN": 64, "SPLITS": 3, **_ALONG}),
    "dense": (_DENSE, {"BN": 16, "RUN": 16, "GROUP": 64, "PADDED": 64, "ZERO": True, "USE_ASM": True}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 120])
@pytest.mark.parametrize("name", CASES)
def test_compiles_and_spills_nothing(tmp_path: Path, name: str, arch: int) -> None:
    signature, constants = CASES[name]
    rows = name.startswith(("to", "round"))
    source = triton_source.rows() if rows else triton_source.gemm(decoding(parse_format("e3m2")))
    path = tmp_path / f"{source.name}.py"
    path.write_text(source.text)
    function = name.removesuffix("_to_bytes") if name != "round_rows_to_half" else "round_rows"
    aligned = frozenset(signature) - {"M", "blocks", "up", "down"}
    variant = Variant(name, "rows", source.name, function, signature, constants, aligned, 4, 1)
    figures = statistics(compile_variant(variant, path, arch))
    assert figures.spills == 0
    assert figures.instructions > 20
