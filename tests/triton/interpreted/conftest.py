"""The tests in this folder run kernels in Triton's interpreter, in a process of their own (see test_interpreter.py).

Whether a kernel is interpreted is decided when its file is imported. By hand: TRITON_INTERPRET=1 pytest FILE
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
