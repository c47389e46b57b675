"""These tests run Triton's interpreter, which is chosen when triton is imported: a process of their own has it on.

``python -m pytest tests/interpreter`` in an environment with TRITON_INTERPRET=1; ``test_interpreter.py`` does that.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
