"""What `bench.py` times: each operation on real shapes, beside plain PyTorch and beside peers.

A function here makes the cases of one operation for a device: the shapes of Qwen2.5-7B on a card
(8,192 packed tokens), those of SmolLM2-135M on a CPU. "ours" is the public function. "eager" is
what one writes in PyTorch without thinking of speed. Peers are what people use instead:
Liger-Kernel, bitsandbytes, cut-cross-entropy, flash-attn, PyTorch's own fused calls. Those that
need a GPU, or are not installed, come with the reason.

The bytes of a case: what our form reads and writes, and the least, which is every input once and
every output once.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import bench_attention, bench_products
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope, rotation
from kernels.sample import draw_key, sample
from kernels.swiglu import swiglu
from kernels.timing import Case, Run, peers, random, sizes, trained

EPS = 1e-6


def rms_norm_cases(device: str) -> list[Case]:
    size = sizes(device)
    N, D = size["N"], size["D"]
    x, residual, weight = random(device, N, D), random(device, N, D), random(device, D)
    row = x.numel() * x.element_size()

    def formula(x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight

    def formula_add(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return formula(h), h

    def liger() -> Callable[[Tensor], Tensor]:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return lambda x: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)

    def liger_add() -> Callable[[Tensor, Tensor], Any]:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return lambda x, r: LigerFusedAddRMSNormFunction.apply(
            x, r, weight, EPS, 0.0, "llama", False
        )

    def ours(x: Tensor) -> Tensor:
        return rms_norm(x, weight, EPS)

    def ours_add(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weight, EPS)

    cases = []
    for name, mine, plain, liger_side, inputs, passes in (
        ("", ours, formula, liger, (x,), 2),
        (", add", ours_add, formula_add, liger_add, (x, residual), 4),
    ):
        for mode, wrap, times in (
            ("forward", lambda run, *xs: lambda: run(*xs), passes),
            # backward reads h, the gradients, and writes one
            ("forward + backward", trained, passes + (3 if passes == 2 else 4)),
        ):
            others = {
                "Liger": ("liger_kernel", True, lambda w=wrap, m=liger_side, i=inputs: w(m(), *i))
            }
            if passes == 2:
                others["F.rms_norm"] = (
                    "torch", False,
                    lambda w=wrap, i=inputs: w(lambda x: F.rms_norm(x, (D,), weight, EPS), *i),
                )  # fmt: skip
            sides, missing = peers(device, others)
            sides = {"ours": wrap(mine, *inputs), "eager": wrap(plain, *inputs), **sides}
            cases.append(
                Case("rms_norm", f"({N}, {D}) bf16{name}, {mode}", sides, times * row, times * row,
                     missing=missing)
            )  # fmt: skip
    return cases


def rope_cases(device: str) -> list[Case]:
    size = sizes(device)
    N, H, K, E = (size[name] for name in "NHKE")
    frequencies = 1e5 ** -(torch.arange(E // 2, device=device) * 2 / E)
    q, k = random(device, N, H, E), random(device, N, K, E)
    cos, sin = rotation(torch.arange(N, device=device), frequencies, 1.0, q.dtype)

    def turn(x: Tensor) -> Tensor:
        one, two = x.chunk(2, -1)
        return x * cos + torch.cat([two, one], -1) * sin

    def ours(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rope(q.view_as(q), k.view_as(k), cos, sin)

    def liger() -> Run:
        from liger_kernel.ops.rope import LigerRopeFunction

        plain = sin[:, 0, E // 2 :]  # without the minus of our first half
        flat = cos[:, 0][None], torch.cat([plain, plain], -1)[None]
        asks, keys = q.transpose(0, 1)[None].contiguous(), k.transpose(0, 1)[None].contiguous()
        return lambda: LigerRopeFunction.apply(asks, keys, *flat)

    moved = 2 * (q.numel() + k.numel()) * 2 + 2 * cos.numel() * 2
    sides, missing = peers(device, {"Liger": ("liger_kernel", True, liger)})

    def forward() -> None:
        with torch.no_grad():
            ours(q, k)

    sides = {"ours": forward, "eager": lambda: (turn(q), turn(k)), **sides}
    return [Case("rope", f"q ({N}, {H}, {E}), k {K} heads, bf16, forward", sides, moved, moved,
                 missing=missing)]  # fmt: skip


def swiglu_cases(device: str) -> list[Case]:
    size = sizes(device)
    N, width = size["N"], size["F"]
    gate, up = random(device, N, width), random(device, N, width)
    row = gate.numel() * gate.element_size()

    def liger() -> Callable[[Tensor, Tensor], Tensor]:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        # it writes its gradients over its inputs: copies keep the rounds alike
        return lambda g, u: LigerSiLUMulFunction.apply(g, u)

    cases = []
    for mode, wrap, times in (
        ("forward", lambda run, *xs: lambda: run(*xs), 3),
        ("forward + backward", trained, 8),
    ):
        sides, missing = peers(
            device, {"Liger": ("liger_kernel", True, lambda w=wrap: w(liger(), gate, up))}
        )
        sides = {
            "ours": wrap(swiglu, gate, up),
            "eager": wrap(lambda g, u: F.silu(g) * u, gate, up),
            **sides,
        }
        cases.append(Case("swiglu", f"({N}, {width}) bf16, {mode}", sides, times * row, times * row,
                          missing=missing))  # fmt: skip
    return cases


def sample_cases(device: str) -> list[Case]:
    V = sizes(device)["V"]
    cases = []
    for rows in (1, 8, 32):
        logits = random(device, rows, V, dtype=torch.float32) * 3
        keys = torch.tensor([draw_key(0, i, 0) for i in range(rows)], dtype=torch.int32)
        keys = keys.to(device)

        def eager(logits: Tensor = logits) -> Tensor:
            p = (logits / 0.7).softmax(-1)
            ids = torch.multinomial(p, 1)
            return p.gather(-1, ids).log()

        sides = {"ours": lambda x=logits, k=keys: sample(x, k, 0.7), "eager": eager}
        least = logits.numel() * 4
        cases.append(Case("sample", f"({rows}, {V}) fp32, temperature 0.7", sides, least, least))
    return cases


OPS: dict[str, Callable[[str], list[Case]]] = {
    "rms_norm": rms_norm_cases,
    "rope": rope_cases,
    "swiglu": swiglu_cases,
    "logprob": bench_products.logprob_cases,
    "nf4": bench_products.nf4_cases,
    "nf4_linear": bench_products.nf4_linear_cases,
    "attention": bench_attention.train_cases,
    "decode_attention": bench_attention.decode_cases,
    "sample": sample_cases,
    "linear": bench_products.linear_cases,
}
