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


SHAPES = """
import os
import kernels.process
import torch
import torch.nn.functional as F

weight = torch.zeros(16, 576, dtype=torch.bfloat16)
x = torch.zeros(1000, 576, dtype=torch.bfloat16)
sizes = []
for rows in range(1, 501):
    F.linear(x[:rows], weight)
    if rows in (200, 500):
        with open("/proc/self/statm") as file:
            sizes.append(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
print(torch.ops.mkldnn._is_mkldnn_bf16_supported(), sizes[1] - sizes[0])
"""
CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def probe(program: str = PROBE, **variables: str) -> list[str]:
    names = ("GOMP_SPINCOUNT", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", *CAPACITIES)
    env = {k: v for k, v in os.environ.items() if k not in names} | variables
    run = [sys.executable, "-c", program]
    return subprocess.run(run, env=env, capture_output=True, text=True, check=True).stdout.split()


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")


@glibc
def test_freed_memory_stays_and_threads_spin_briefly():
    assert probe() == ["False", "True", "1000"]


@glibc
@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_shapes():
    """300 further shapes: 200 MB as PyTorch comes, where it has kernels for bf16."""
    native, grown = probe(SHAPES)
    assert float(grown) < 40
    if native == "True":
        _, grown = probe(SHAPES, **dict.fromkeys(CAPACITIES, "1024"))
        assert float(grown) > 100
