"""How torch keeps a GPU's memory, which has to be said before torch is imported.

By default it takes memory in pieces whose sizes stay as they are, and whatever is left of one is lost to all that is
larger. Segments that grow leave fewer such gaps (see benchmarks/README.md for what that saves). Old versions of torch
do not know the variable that is set here; they go on as before.
"""

from __future__ import annotations

import os
import sys

_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")  # the others are older names


def grow_segments() -> None:
    """Let torch's GPU memory grow in place; for commands. Whoever has set one of torch's own variables is obeyed."""
    if sys.platform == "linux" and not any(name in os.environ for name in _NAMES):
        os.environ[_NAMES[0]] = "expandable_segments:True"
