"""Symbolic sizes, and the operators that a saved graph may call."""

from __future__ import annotations

import pytest
import torch

from fxquant import ops
from fxquant.dims import evaluate, names
from fxquant.targets import ATEN, decode_target, encode_target


def test_operators_have_one_name_each_and_none_writes() -> None:
    for base in sorted(ATEN):
        packet = getattr(torch.ops.aten, base, None)
        for overload in packet.overloads() if packet is not None else ():
            target = getattr(packet, overload)
            if target._schema.is_mutable:
                with pytest.raises(ValueError, match="writes to its arguments"):
                    encode_target(target)
            else:
                assert decode_target(encode_target(target)) is target
    assert not {n for n in ATEN if n.endswith("_") and not n.endswith("__")}
    assert not ATEN & {"from_file", "save", "_pin_memory", "set_", "copy_", "_print"}
    names = [f"fxquant.{schema.partition('(')[0]}.default" for schema in ops.SCHEMAS]
    for name in names:
        if name == "fxquant.linear_wq_fused.default":  # made for running, never saved
            with pytest.raises(ValueError, match="not one that a saved graph may call"):
                decode_target(name)
        else:
            assert decode_target(name)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("sequence - 2*(((sequence + 2)//3))", 1),
        ("TruncToInt(1.7*ToFloat(batch))", 30),
        ("-(((-sequence)//4))", 2),
        ("sequence**2 + (Mod(batch, 4))", 51),
        ("Max(1, batch, sequence) - Min(batch, 3)", 15),
        ("Max(batch) + Min(3)", 21),
        ("3*batch/2", 27),
        ("-2**2", -4),
    ],
)
def test_sizes_that_export_writes_are_read(expression: str, value: int) -> None:
    assert evaluate(expression, {"batch": 18, "sequence": 7}) == value
    assert names(expression) <= {"batch", "sequence"}


@pytest.mark.parametrize(
    "expression",
    ["__import__('os')", "a b", "(a", "a +", "", "9**9**9", "f(a)", "Max()", "Mod(a)", "a.b", "a[0]", "(" * 400,
     "-" * 500, "1" * 600, "9.9**999*9.9**999"],
)  # fmt: skip
def test_other_text_is_no_size(expression: str) -> None:
    with pytest.raises(ValueError, match=r"size|expected|too large"):
        names(expression)


def test_a_size_without_a_value_is_a_value_error() -> None:
    for expression in ("a//b", "a/2", "c"):
        with pytest.raises(ValueError, match="size"):
            evaluate(expression, {"a": 3, "b": 0})
    assert names("a//(b - c)") == {"a", "b", "c"}
