"""These tests run kernels in Triton's interpreter. A process interprets or compiles, never both: they are collected
only where TRITON_INTERPRET=1 is set from the start (``tests/codegen/test_interpreter.py`` does so, in a process of its
own)."""

from __future__ import annotations

import os

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETS else ["test_*.py"]

if INTERPRETS:
    import triton_interpreter

    triton_interpreter.install()
