"""Every test of `tests/test_kernels` once more, on the Triton kernels, not the references.

Triton decides on import whether it interprets, so the tests run in a Python of their own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernels._dispatch import triton

# No Triton form to run, or none that the interpreter can.
OTHERS = ("test_compiled.py", "test_linear.py", "test_process.py")


@pytest.mark.slow
@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_kernels_pass_under_the_interpreter() -> None:
    folder = Path(__file__).parent / "test_kernels"
    files = [f for f in sorted(folder.glob("test_*.py")) if f.name not in OTHERS]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "not gpu and not base and not slow", *files],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=folder.parents[1],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert int(re.findall(r"(\d+) passed", result.stdout)[0]) > 300
