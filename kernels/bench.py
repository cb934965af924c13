"""Time the operations of this folder against the plain PyTorch they replace.

    python -m kernels.bench linear       every matrix of SmolLM2-135M's layers, once, by rows
    python -m kernels.bench attention    decode over a shared prompt, by replies

Each figure is the median of interleaved rounds, in milliseconds; all layers are walked in turn, so
that weights come from memory and not from a cache. These are the tables behind the choices in
`linear.py`, `q4_linear.py` and `attention.py`.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from kernels import attention, q4_linear
from kernels.linear import can_pack, linear, pack

LAYERS = 30
SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
H, K, E = 9, 3, 64  # of SmolLM2-135M
PROMPT, OWN = 384, 64  # tokens of the shared prompt, and of each reply so far
ROUNDS = 15


def interleaved(sides: dict[str, Callable[[], object]]) -> list[float]:
    """Median milliseconds of each side, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return [statistics.median(t) for t in times.values()]


def bench_linear() -> None:
    """Plain, packed and 4-bit products."""
    weights = [torch.randn(shape).bfloat16() for _ in range(LAYERS) for shape in SHAPES]
    packed = [pack(weight) for weight in weights]
    blocks = []
    for rows, width in (weight.shape for weight in weights):
        codes = torch.randint(16, (rows, width), dtype=torch.int32)
        blocks.append(q4_linear.quantize(codes, *torch.rand(2, rows, width // q4_linear.BLOCK)))
    print(f"rows {'plain':>8} {'packed':>8} {'4-bit':>8}   ms for all {len(weights)} matrices")
    for rows in (1, 4, 8, 16, 32):
        x = {width: torch.randn(rows, width).bfloat16() for width in (576, 1536)}
        figures = interleaved(
            {
                "plain": lambda x=x: [F.linear(x[w.shape[1]], w) for w in weights],
                "packed": lambda x=x: [linear(x[w.shape[1]], w) for w in packed],
                "q4": lambda x=x: [
                    q4_linear.q4_linear(x[w.shape[1]], q)
                    for w, q in zip(weights, blocks, strict=True)
                ],
            }
        )
        print(f"{rows:>4} " + " ".join(f"{ms:8.1f}" for ms in figures))


def bench_attention() -> None:
    """The prompt read once and merged, against a full copy of it for every reply."""
    print(f"replies {'shared':>8} {'copies':>8}   ms for {LAYERS} layers")
    for rows in (1, 8, 32):
        q = torch.randn(rows, H, E).bfloat16()
        prompts = [torch.randn(2, 1, K, PROMPT, E).bfloat16() for _ in range(LAYERS)]
        own = [torch.randn(2, rows, K, OWN, E).bfloat16() for _ in range(LAYERS)]
        whole = [
            torch.cat([p.expand(2, rows, K, PROMPT, E), o], 3).contiguous()
            for p, o in zip(prompts, own, strict=True)
        ]

        def shared(q=q, prompts=prompts, own=own) -> None:
            for p, o in zip(prompts, own, strict=True):
                attention.merge([attention.level(q, *o), attention.level(q, *p)])

        def copies(q=q, whole=whole) -> None:
            for keys, values in whole:
                F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)

        figures = interleaved({"shared": shared, "copies": copies})
        print(f"{rows:>7} " + " ".join(f"{ms:8.1f}" for ms in figures))


if __name__ == "__main__":
    choices = {"linear": bench_linear, "attention": bench_attention}
    if len(sys.argv) != 2 or sys.argv[1] not in choices:
        sys.exit(f"expected one of: {', '.join(choices)}")
    if not can_pack(torch.empty(0, dtype=torch.bfloat16)):
        sys.exit("expected a CPU on which PyTorch has native bf16")
    with torch.inference_mode():
        choices[sys.argv[1]]()
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"bf16, torch {torch.__version__}, {threads} CPU threads, load {load:.1f}")
