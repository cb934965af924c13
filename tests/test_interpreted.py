"""Every test file of `tests/test_kernels` once more, on the Triton kernels, not the references.

Triton decides on import whether it interprets, so each file runs in a Python of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernels._dispatch import triton

FILES = sorted(Path(__file__).parent.glob("test_kernels/test_*.py"))
# No Triton form to run, or none that the interpreter can.
OTHERS = (
    "test_compiled.py",
    "test_linear.py",
    "test_logprob_memory.py",
    "test_process.py",
)

pytestmark = pytest.mark.skipif(triton is None, reason="Triton is not installed")


@pytest.mark.parametrize("file", [f for f in FILES if f.name not in OTHERS], ids=lambda f: f.stem)
def test_kernels_pass_under_the_interpreter(file: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "not gpu and not base", str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=file.parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed, f"no test ran:\n{result.stdout}"
