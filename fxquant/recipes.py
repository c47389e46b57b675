"""Recipes: the main settings of each paper, as configs with a name. ``config`` makes ``RECIPES`` of these rows.

A recipe says where its settings come from, and in ``note`` where they differ from the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ZQ42 = "ZeroQuant(4+2), arXiv 2312.08583"
ZQFP = "ZeroQuant-FP, arXiv 2307.09782"
ZQV2 = "ZeroQuant-V2, arXiv 2303.08302"
LLMFP4 = "LLM-FP4, arXiv 2310.16836"
MX = "OCP Microscaling Formats (MX) v1.0"
EXPERIENCE = "fxquant, docs/results.md"


@dataclass(frozen=True)
class Row:
    """A recipe as plain data: one rule for all layers, what the inputs of linears become, the methods in order."""

    name: str
    weight: str
    summary: str
    source: str
    activation: str | None = None
    passes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    note: str = ""

    @property
    def config(self) -> dict[str, Any]:
        """The recipe as ``load_config`` takes it."""
        activation = {} if self.activation is None else {"activation": self.activation}
        rule = {"match": "*", "weight": self.weight, **activation}
        return {"rules": [rule], "passes": [{name: dict(options)} for name, options in self.passes.items()]}


_AIMED: dict[str, Any] = {"float_targets": True}
_GPTQ = {"gptq": _AIMED}
_PAPER_GPTQ = {"gptq": {"act_order": False, "damp_percent": 0.01, "clip": "absmax", "block_size": 128}}
_PAPER_LORC = {"lorc": {"weighting": "none"}}
_FPQ: dict[str, dict[str, Any]] = {"pre_shift": {}, "search_formats": {}, "fold_activation_scales": {}}
_AS_PUBLISHED = "GPTQ as first published: columns in order, scales from the largest magnitude, damping 0.01"
_AIMED_NOTE = "GPTQ here also aims at the float model's outputs (float_targets), which the paper does not"
_FGQ = "groups of 256 are the paper's fine-grained setting; one scale a row, as in its main table, is int4/channel"

ROWS = (
    # --- ZeroQuant(4+2): FP6 -----------------------------------------------------------------------------------------
    Row("W6A16-E3M2", "e3m2/channel", "FP6 E3M2 weights, one scale a row (ZeroQuant(4+2))",
        f"{ZQ42}, its FP6 with coarse-grained scales",
        note="scales are fp32; FP6-LLM's kernels store fp16: e3m2/channel:fp16"),
    Row("W6A16-E2M3", "e2m3/channel", "FP6 E2M3 weights, one scale a row: more mantissa, often the better FP6",
        f"{ZQ42} has E3M2; {EXPERIENCE}: E2M3 is the better one on SmolLM2"),
    Row("W6A16-GPTQ", "e3m2/channel", "FP6 E3M2 weights a row by GPTQ", f"{ZQ42}, which tries GPTQ beside RTN",
        passes=_GPTQ, note=_AIMED_NOTE),
    # --- ZeroQuant-FP: FP4 and FP8 weights, FP8 activations -----------------------------------------------------------
    Row("W4A16-RTN", "e2m1/group64", "FP4 E2M1 weights in groups of 64, round-to-nearest", f"{ZQFP}, its FP4 format",
        note="groups of 64; the paper's are of 256"),
    Row("W4A16-GPTQ", "e2m1/group64", "FP4 E2M1 weights in groups of 64, GPTQ that aims at the float model's outputs",
        f"{ZQFP}, its FP4 format; GPTQ, arXiv 2210.17323", passes=_GPTQ, note=_AIMED_NOTE),
    Row("W4A16-GPTQ-LoRC", "e2m1/group64",
        "W4A16-GPTQ, and two thin INT8 factors of rank 8 a layer that give back what is lost",
        f"{ZQFP} and {ZQV2}, LoRC", passes={**_GPTQ, "lorc": _AIMED},
        note="factors are weighted by the inputs; those of the paper are not (weighting: none)"),
    Row("W4A8-FP", "e2m1/group256", "FP4 E2M1 in groups of 256 by GPTQ, E4M3 inputs a token (ZeroQuant-FP)",
        f"{ZQFP}, W4A8 FP-FP", "e4m3/token", _GPTQ, _AIMED_NOTE),
    Row("W4A8-FP-Paper", "e2m1/group256", "W4A8-FP with GPTQ as first published", f"{ZQFP}, W4A8 FP-FP", "e4m3/token",
        _PAPER_GPTQ, _AS_PUBLISHED),
    Row("W4A8-FP-LoRC", "e2m1/group256", "W4A8-FP, and LoRC factors of rank 8 (ZeroQuant-FP)",
        f"{ZQFP}, W4A8 FP-FP with LoRC", "e4m3/token", {**_GPTQ, "lorc": _AIMED}, _AIMED_NOTE),
    Row("W4A8-FP-M1", "e2m1/group256:m1", "W4A8-FP with scales that are powers of two (M1)",
        f"{ZQFP}, scales restricted to powers of 2: M1", "e4m3/token", _GPTQ,
        "each power of two is the one of least squared error; :m1.ceil is the paper's formula"),
    Row("W4A8-FP-M2", "e2m1/group256:m2", "W4A8-FP with scales a power of two below one scale a row (M2)",
        f"{ZQFP}, scales restricted to powers of 2: M2", "e4m3/token", _GPTQ,
        "each power of two is the one of least squared error; :m2.ceil is the paper's formula"),
    Row("W8A16-FP8", "e4m3/channel", "FP8 E4M3 weights, one scale a row", f"{ZQFP}, its FP8 format"),
    Row("W8A8-FP8", "e4m3/channel", "FP8 E4M3 weights a row, FP8 E4M3 activations a token", f"{ZQFP}, W8A8 FP-FP",
        "e4m3/token", note="rounded to nearest; the paper runs GPTQ"),
    Row("W4A8-INT-FP", "int4/group256", "INT4 in groups of 256 by GPTQ, E4M3 inputs a token (ZeroQuant-FP's INT-FP)",
        f"{ZQFP}, W4A8 INT-FP", "e4m3/token", _GPTQ, _AIMED_NOTE),
    # --- ZeroQuant-V2: INT weights, INT8 activations a token ----------------------------------------------------------
    Row("W4A16-V2-RTN", "int4/channel", "INT4 weights a row, round-to-nearest (ZeroQuant-V2's base)",
        f"{ZQV2}, W4A16 RTN", note="symmetric; asymmetric is uint4/channel"),
    Row("W4A16-V2-GPTQ", "int4/channel", "INT4 weights a row by GPTQ as first published", f"{ZQV2}, W4A16 GPTQ",
        passes=_PAPER_GPTQ, note=_AS_PUBLISHED),
    Row("W4A16-V2-GPTQ-LoRC", "int4/channel", "W4A16-V2-GPTQ, and LoRC factors of rank 8 in INT8",
        f"{ZQV2}, W4A16 GPTQ with LoRC", passes={**_PAPER_GPTQ, **_PAPER_LORC}, note=_AS_PUBLISHED),
    Row("W4A8-V2-RTN", "int4/group256", "INT4 in groups of 256, INT8 inputs a token, round-to-nearest",
        f"{ZQV2}, W4A8 RTN, fine-grained", "int8/token", note=_FGQ),
    Row("W4A8-V2-GPTQ", "int4/group256", "INT4 in groups of 256 by GPTQ, INT8 inputs a token",
        f"{ZQV2}, W4A8 GPTQ, fine-grained", "int8/token", _GPTQ, f"{_AIMED_NOTE}; {_FGQ}"),
    Row("W4A8-V2-Local", "int4/group256", "INT4 in groups of 256 by ZQ-Local, INT8 inputs a token",
        f"{ZQV2}, W4A8 ZQ-Local", "int8/token", {"zq_local": {}}, _FGQ),
    Row("W4A8-V2-Global", "int4/group256", "INT4 in groups of 256 by ZQ-Global, INT8 inputs a token",
        f"{ZQV2}, W4A8 ZQ-Global", "int8/token", {"zq_global": {}},
        f"the loss is relative to each token's size, the paper's is loss: mse; {_FGQ}"),
    Row("W4A8-V2-GPTQ-LoRC", "int4/group256", "W4A8-V2-GPTQ, and LoRC factors of rank 8 in INT8",
        f"{ZQV2}, W4A8 GPTQ with LoRC", "int8/token", {**_GPTQ, "lorc": _AIMED}, f"{_AIMED_NOTE}; {_FGQ}"),
    Row("W8A8-INT", "int8/channel", "INT8 symmetric weights a row by GPTQ, INT8 activations a token",
        f"{ZQV2}, W8A8 GPTQ", "int8/token", _GPTQ, _AIMED_NOTE),
    Row("W8A8-V2-RTN", "int8/channel", "INT8 weights a row, INT8 inputs a token, round-to-nearest", f"{ZQV2}, W8A8 RTN",
        "int8/token"),
    # --- LLM-FP4 ------------------------------------------------------------------------------------------------------
    Row("W4A4-FPQ", "e2m1/channel",
        "FP4 weights a row and FP4 activations a tensor: formats and clips searched, shifts folded (LLM-FP4)",
        f"{LLMFP4}, FPQ, 4/4/4", "e2m1/tensor", _FPQ,
        "embedding and head stay in float; the paper's 4/4/4 counts them in"),
    Row("W6A6-FPQ", "e3m2/channel", "FP6 weights a row and FP6 activations a tensor, as W4A4-FPQ (LLM-FP4)",
        f"{LLMFP4}, FPQ on BERT, 6/6/6", "e3m2/tensor", _FPQ),
    Row("W4A8-FPQ", "e2m1/channel", "FP4 weights a row and FP8 activations a tensor, as W4A4-FPQ (LLM-FP4)",
        f"{LLMFP4}, FPQ, 4/4/8", "e4m3/tensor", _FPQ,
        "with 8-bit activations pre_shift brings little; the paper's own base line without it is as good"),
    Row("W8A8-MinMax", "e4m3/channel", "FP8 E4M3 weights a row and activations a tensor, ranges from the data (MinMax)",
        f"{LLMFP4}, 8/8/8, which it advises at 8 bits", "e4m3/tensor"),
    # --- block formats ------------------------------------------------------------------------------------------------
    Row("MXFP4", "mxfp4", "OCP MXFP4 weights: E2M1 in blocks of 32, E8M0 scales", MX),
    Row("MXFP6", "mxfp6", "OCP MXFP6 weights: E3M2 in blocks of 32, E8M0 scales", MX),
    Row("MXFP8", "mxfp8", "OCP MXFP8 weights: E4M3 in blocks of 32, E8M0 scales", MX),
    Row("NVFP4", "nvfp4", "NVFP4 weights: E2M1 in blocks of 16, E4M3 scales under one fp32 scale",
        "NVIDIA Blackwell's NVFP4: blocks of 16, E4M3 scales, an fp32 scale a tensor"),
    # --- other grids, integers ----------------------------------------------------------------------------------------
    Row("W4A16-NF4", "nf4", "NF4 weights in groups of 64", "QLoRA, arXiv 2305.14314",
        note="scales are fp32; the paper quantizes them once more"),
    Row("W4A16-HIGGS", "higgs4/group64", "the Gaussian grid of HIGGS in groups of 64, after a rotation of each",
        "HIGGS, arXiv 2411.17525", passes={"rotate": {"size": 64}}),
    Row("W4A16-INT", "int4/group64", "INT4 symmetric weights in groups of 64, round-to-nearest",
        "the INT4 base line of all of these papers"),
    Row("W8A16-INT", "int8/channel", "INT8 symmetric weights, one scale a row", f"{ZQV2}, W8A16"),
    Row("W8A8-Smooth", "int8/channel", "INT8 weights a row and activations a token, outliers moved by SmoothQuant",
        "SmoothQuant, arXiv 2211.10438", "int8/token", {"smooth": {}}),
)  # fmt: skip
"""Linears and convolutions are quantized; embeddings, and weights tied to one, stay in float."""
