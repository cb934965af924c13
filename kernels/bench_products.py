"""What `bench.py` times of products: logits that are never stored, 4-bit weights, packed ones."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.adapter import Adapter
from kernels.linear import can_pack, linear, pack
from kernels.logprob import logprob
from kernels.nf4 import BLOCK as NF4_BLOCK
from kernels.nf4 import NF4, dequantize, quantize
from kernels.nf4_linear import nf4_linear
from kernels.timing import Case, Run, peers, random, sizes, trained


def logprob_cases(device: str) -> list[Case]:
    size = sizes(device)
    N, D, V = size["N"], size["D"], size["V"]
    hidden, head = random(device, N, D), random(device, V, D) * D**-0.5
    ids = torch.randint(V, (N,), device=device)

    def plain(hidden: Tensor) -> tuple[Tensor, Tensor]:
        rows = (hidden @ head.T).float().log_softmax(-1)
        return rows.gather(-1, ids[:, None])[:, 0], -(rows.exp() * rows).sum(-1).detach()

    def first(run: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
        return lambda hidden: run(hidden)[0]

    def liger() -> Run:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        return trained(
            lambda x: LigerFusedLinearCrossEntropyFunction.apply(x, head, ids)[0], hidden
        )

    def cce() -> Run:
        from cut_cross_entropy import linear_cross_entropy

        return trained(lambda x: linear_cross_entropy(x, head, ids), hidden)

    sides, missing = peers(
        device, {"Liger": ("liger_kernel", True, liger), "CCE": ("cut_cross_entropy", True, cce)}
    )
    sides = {
        "ours": trained(first(lambda x: logprob(x, head, ids)), hidden),
        "eager": trained(first(plain), hidden),
        **sides,
    }
    return [Case("logprob", f"({N}, {D}) x {V:,} bf16, forward + backward", sides, missing=missing)]


def nf4_cases(device: str) -> list[Case]:
    size = sizes(device)
    weight = random(device, size["F"], size["D"])
    packed, out = quantize(weight), torch.empty_like(weight)

    def peer() -> Run:
        from bitsandbytes import functional as bnb

        codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        return lambda: bnb.dequantize_4bit(codes, state)

    sides, missing = peers(device, {"bitsandbytes": ("bitsandbytes", False, peer)})
    codebook = torch.linspace(-1, 1, 16, device=device)

    def plain() -> Tensor:
        both = torch.stack([packed.codes >> 4, packed.codes & 15], -1).long()
        scales = torch.repeat_interleave(packed.absmax.float(), NF4_BLOCK)
        return (codebook[both].flatten() * scales).to(weight.dtype).view(weight.shape)

    moved = packed.codes.numel() + packed.absmax.numel() + 2 * weight.numel()
    sides = {"ours": lambda: dequantize(packed, weight.dtype, out), "eager": plain, **sides}
    shape = f"({size['F']}, {size['D']}) to bf16"
    return [Case("nf4", shape, sides, moved, moved, missing=missing)]


def nf4_linear_cases(device: str) -> list[Case]:
    """Every matrix of a layer, as often as it takes to come from memory and not from a cache."""
    size = sizes(device)
    D, kv, wide = size["D"], size["K"] * size["E"], size["F"]
    copies = 4 if device == "cuda" else 2
    cases = []
    for out, width in ((D, D), (kv, D), (wide, D), (D, wide)):
        weights = [random(device, out, width) * 0.02 for _ in range(copies)]
        packed = [quantize(weight) for weight in weights]
        adapters = [
            Adapter(random(device, 16, width) * 0.02, random(device, out, 16) * 0.02, 2.0)
            for _ in weights
        ]
        for N in (1, 8, 16, 32):
            x = random(device, N, width)
            cases.append(_nf4_linear_case(device, x, weights, packed, None))
        cases.append(_nf4_linear_case(device, x, weights, packed, adapters))
    return cases


def _nf4_linear_case(
    device: str, x: Tensor, weights: list[Tensor], packed: list[NF4], adapters: list[Adapter] | None
) -> Case:
    (N, width), (out, _) = x.shape, weights[0].shape
    extra = adapters or [None] * len(packed)

    def ours() -> None:
        with torch.no_grad():
            for weight, adapter in zip(packed, extra, strict=True):
                nf4_linear(x, weight, None, adapter)

    def plus(y: Tensor, adapter: Adapter | None) -> Tensor:
        return y if adapter is None else y + adapter.scale * (x @ adapter.A.T @ adapter.B.T)

    def eager() -> None:
        with torch.no_grad():
            for weight, adapter in zip(packed, extra, strict=True):
                plus(F.linear(x, dequantize(weight, x.dtype)), adapter)

    def peer() -> Run:
        import bitsandbytes as bnb

        states = [
            bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
            for w in weights
        ]

        def run() -> None:
            with torch.no_grad():
                for (codes, state), adapter in zip(states, extra, strict=True):
                    plus(bnb.matmul_4bit(x, codes.t(), state), adapter)

        return run

    sides, missing = peers(device, {"bitsandbytes": ("bitsandbytes", False, peer)})
    bytes_ = len(packed) * (out * width * 0.516 + 2 * N * (width + out))
    name = f"{len(packed)} x ({out}, {width}), {N} rows{', adapter' * bool(adapters)}"
    sides = {"ours": ours, "eager": eager, **sides}
    return Case("nf4_linear", name, sides, int(bytes_), int(bytes_), missing=missing)


def linear_cases(device: str) -> list[Case]:
    """The CPU's packed order; a card has nothing to pack."""
    size, cases = sizes(device), []
    weights = [random(device, size["F"], size["D"]) for _ in range(30)]
    packed = [pack(w) if can_pack(w) else w for w in weights]
    for rows in (1, 8, 32, 512):
        x = random(device, rows, size["D"])

        def ours(x: Tensor = x) -> None:
            for weight in packed:
                linear(x, weight)

        def eager(x: Tensor = x) -> None:
            for weight in weights:
                F.linear(x, weight)

        moved = 2 * sum(w.numel() for w in weights)
        shape = f"30 x ({size['F']}, {size['D']}) bf16, {rows} rows"
        cases.append(Case("linear", shape, {"ours": ours, "eager": eager}, moved, moved))
    return cases if device == "cpu" else []
