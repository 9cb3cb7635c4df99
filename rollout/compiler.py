"""Whether torch.compile can be used here; the first call of a compiled function takes seconds, kept on disk by torch's own cache."""

import os
import shutil
import subprocess
import sys
from functools import lru_cache


def has_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler that runs: it looks for CXX, else for one name alone."""
    compiler = shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))
    return compiler is not None and _runs(compiler)


@lru_cache
def _runs(compiler: str) -> bool:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True).returncode == 0
    except OSError:
        return False
