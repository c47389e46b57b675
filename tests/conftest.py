"""Operators run their reference bodies: tests compare graphs bit by bit, and a CPU kernel adds up in another order.

Tests of the kernels themselves are marked ``kernels``.
"""

from __future__ import annotations

import signal

import pytest

from fxquant.codegen import cpu

# a process that a shell put into the background ignores Ctrl-C, and so would all that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def reference_operators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("kernels") is None:
        monkeypatch.setattr(cpu, "available", lambda: None)
        monkeypatch.setattr(cpu, "at_hand", lambda values: None)
