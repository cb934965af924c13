"""What importing `kernels.process` changes in a fresh process."""

import os
import platform
import subprocess
import sys

import pytest

PROBE = """
import ctypes, os
import kernels.process

class Info(ctypes.Structure):  # glibc's mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
before = libc.mallinfo2()
place = libc.malloc(ctypes.c_size_t(64 << 20))
apart = libc.mallinfo2().hblkhd - before.hblkhd  # bytes fetched from the system on their own
libc.free(place)
kept = libc.mallinfo2().arena - before.arena
print(apart >= 64 << 20, kept >= 64 << 20, os.environ["GOMP_SPINCOUNT"])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ["False", "True", "1000"]),
        ({"GOMP_SPINCOUNT": "7", "MALLOC_MMAP_THRESHOLD_": "1000000"}, ["True", "False", "7"]),
    ],
)
def test_freed_memory_stays_and_threads_spin_briefly(variables, expected):
    """Unless somebody has said otherwise."""
    names = ("GOMP_SPINCOUNT", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    env = {k: v for k, v in os.environ.items() if k not in names} | variables
    run = [sys.executable, "-c", PROBE]
    result = subprocess.run(run, env=env, capture_output=True, text=True, check=True)
    assert result.stdout.split() == expected
