"""Settings of the process for PyTorch on a CPU, for speed and memory; importing this makes them.

Threads. GNU OpenMP's threads spin while they wait for each other, by default for a long time. When
another program wants the same core, that turned a decode step of 15 ms into one of 230 to 580.
Spinning briefly costs little on idle and on busy cores. The variable is read once, when torch is
first imported, so import this before.

Memory. Every PyTorch operation asks for memory for its result. glibc fetches large pieces from the
system and gives them back at once, so each result costs a page fault every 4 KB, which can be more
than the operation (RMSNorm of (1024, 576) in bf16: 11.2 ms that way, 0.6 with memory that is kept).
So freed memory stays with the process, up to its peak; `trim` gives it back.

Kernels that are kept. oneDNN makes a kernel for each shape of a 16-bit product, and rows differ
from text to text. It keeps the last 1,024 and PyTorch's layer above it as many again, of each kind,
at 0.3 MB each: a server grew by 700 MB and more. The last KERNELS are enough: all layers and all
steps of a reply share theirs, and the next judgement mostly needs others.

A variable that is already set is left alone: GOMP_SPINCOUNT for the threads,
ONEDNN_PRIMITIVE_CACHE_CAPACITY and LRU_CACHE_CAPACITY for the kernels, glibc's own
MALLOC_MMAP_THRESHOLD_ or MALLOC_TRIM_THRESHOLD_ for the memory. Without glibc (macOS, Windows,
Alpine) memory is left as it is.
"""

import ctypes
import os
import platform

KERNELS = 128  # that oneDNN keeps, and PyTorch of each kind: those of two judgements or more

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))
os.environ.setdefault("LRU_CACHE_CAPACITY", str(KERNELS))

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEEP = 1 << 30  # bytes: smaller pieces come from, and go back to, the process's own heap

if platform.libc_ver()[0] == "glibc" and not os.environ.keys() & {
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
}:
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, KEEP)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def trim() -> None:
    """Give free memory back to the system, holes between living pieces too; for between steps.

    Steps of many sizes leave holes that fit nothing later: training SmolLM2 (`train_sft.py`, two
    packed trees at a time), a process had 5.2 GB at step 1, 7.4 at step 7 and 10.5 at step 57.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
