"""Compile kernels for cards that are not here, and read what came out.

Triton needs no GPU to compile for one: a `Variant` names a kernel, the types of its arguments and
its compile-time constants; `build` turns it into the machine code of a compute capability and
returns a `Build` with what decides its speed and whether it runs at all:

    registers     a thread, of 255; 65,536 a multiprocessor are shared by the threads on it
    shared        bytes of shared memory a block; sm_86, 89 and 120 stop at 101,376
    stack         bytes a thread spills to memory (stack and local): should be 0
    mma           tensor core instructions in the code: a kernel with `tl.dot` must have some
    loop          instructions in the body of the largest loop that has them (of any, without dots)

Arguments are taken as Triton meets them in a real launch: pointers and row strides are multiples of
16, which allows 128-bit loads. cuobjdump comes with Triton.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Ampere (A100; RTX 30), Ada (RTX 40), Hopper (H100, H200), Blackwell (RTX 50).
CAPABILITIES = (80, 86, 89, 90, 120)
SHARED_LIMIT = 101_376  # bytes: the least of them


@dataclass(frozen=True)
class Variant:
    """One compilation of one kernel."""

    name: str
    kernel: Any  # a triton.jit function
    signature: Mapping[str, str]  # argument -> "*bf16", "i32", "fp32"; in the kernel's order
    constants: Mapping[str, Any]  # compile-time arguments
    warps: int
    stages: int = 3
    dot: bool = False  # it multiplies on tensor cores
    fusion: bool = True  # of products and sums, as its launcher asks
    most_registers: int = 128
    odd: frozenset[str] = field(default_factory=frozenset)  # arguments not divisible by 16
    weights: int = 0  # quantized weights that one turn of the main loop consumes, a block
    most_per_weight: float = 0.0  # instructions for each of them, as reached: the tests' ratchet


@dataclass(frozen=True)
class Build:
    registers: int
    shared: int
    stack: int
    mma: int
    loop: int
    vector_loads: int  # 128-bit loads from global memory (LDG.E.128 and asynchronous copies)

    def per_weight(self, variant: Variant) -> float:
        """Instructions that a thread issues for each weight it handles in the main loop."""
        return self.loop * variant.warps * 32 / variant.weights


def build(variant: Variant, capability: int) -> Build:
    """Compile for `capability` (80: sm_80) and read the result; needs Triton, no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    signature = {
        name: "constexpr" if name in variant.constants else variant.signature[name]
        for name in names
    }
    divisible = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in variant.signature.items()
        if kind[0] in "*i" and name not in variant.odd
    }
    source = ASTSource(variant.kernel, signature, dict(variant.constants), divisible)
    options = {
        "num_warps": variant.warps,
        "num_stages": variant.stages,
        "enable_fp_fusion": variant.fusion,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage, sass = _dump(compiled.asm["cubin"])
    loop, mma = _main_loop(sass)
    return Build(
        registers=_number(r"REG:(\d+)", usage),
        shared=compiled.metadata.shared,
        stack=_number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        mma=mma,
        loop=loop,
        vector_loads=sum("LDG.E.128" in line or "LDGSTS.E" in line for line in sass),
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in {text!r}"
    return int(found[1])


def _dump(cubin: bytes) -> tuple[str, list[str]]:
    """(resource usage, lines of machine code) of a compiled kernel."""
    import triton

    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(cubin)
        run = [
            subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        ]
    return run[0], [
        line for line in run[1].splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line)
    ]


def _main_loop(sass: list[str]) -> tuple[int, int]:
    """Instructions in the largest loop (of those with tensor core work, if any have), and the
    tensor core instructions of the whole kernel."""
    places = [int(line.split("/*", 1)[1].split("*/")[0], 16) for line in sass]
    is_mma = [bool(re.search(r"\b(HMMA|IMMA|QMMA|HGMMA|WGMMA|UTCMMA|DMMA)", line)) for line in sass]
    loops = []
    for i, line in enumerate(sass):
        jump = re.search(r"\bBRA(?:\.\w+)*\s+(?:\w+,\s*)?`?\(?.*?0x([0-9a-f]+)", line)
        if jump and int(jump[1], 16) < places[i]:  # backwards
            start = places.index(int(jump[1], 16))
            loops.append((any(is_mma[start : i + 1]), i + 1 - start))
    return max(loops, default=(False, 0))[1], sum(is_mma)
