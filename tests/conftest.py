"""Operators run their reference bodies: tests compare graphs bit by bit, and a CPU kernel adds up in another order.

Tests of the kernels themselves are marked ``kernels``.
"""

from __future__ import annotations

import pytest

from fxquant.codegen import cpu


@pytest.fixture(autouse=True)
def reference_operators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("kernels") is None:
        monkeypatch.setattr(cpu, "available", lambda: None)
        monkeypatch.setattr(cpu, "at_hand", lambda values: None)
