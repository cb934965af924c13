"""Time each operation beside plain PyTorch and, where one is installed, the best known peer.

    python -m kernels.bench                  every operation, as a Markdown table
    python -m kernels.bench rms_norm rope    some of them

Shapes are those of Qwen2.5-7B on a CUDA card and of SmolLM2-135M on a CPU, where "ours" is the path
that a CPU takes. The sides of a case take turns, round by round, so that a noisy machine is noisy
for all. A time is the median of the rounds; a ratio is the median over rounds of theirs / ours.
"""

import argparse
import logging
import os
import platform
import statistics
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import kernels.process  # noqa: F401  (threads and memory, before anything imports torch)

import torch  # isort: skip
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

from kernels.attention import segments
from kernels.decode_attention import decode_attention, visible_positions
from kernels.linear import can_pack, linear, pack
from kernels.logprob import logprob
from kernels.nf4 import dequantize, quantize
from kernels.nf4_linear import nf4_linear
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rope, rotation
from kernels.sample import draw_key, sample
from kernels.swiglu import swiglu

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
N, D, H, K, E, F_, V = (
    (8192, 3584, 28, 4, 128, 18_944, 152_064) if CUDA else (1024, 576, 9, 3, 64, 1536, 49_152)
)
PROMPT, REPLIES, OWN = (2048, 8, 512) if CUDA else (512, 8, 128)
EPS = 1e-6
Run = Callable[..., Any]


class Case(NamedTuple):
    op: str
    shape: str
    ours: Run
    plain: Run
    inputs: tuple[Tensor, ...]
    peer: str | None = None  # its module; all but bitsandbytes need a card
    make_peer: Callable[[], Run] | None = None
    backward: bool = False  # time forward and backward


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def elementwise_cases() -> list[Case]:
    x, residual, weight, gate, up = random(N, D), random(N, D), random(D), *random(2, N, F_)
    q, k = random(N, H, E), random(N, K, E)
    frequencies = 10_000.0 ** -(torch.arange(0, E, 2, device=DEVICE) / E)
    turn = rotation(torch.arange(N, device=DEVICE), frequencies, 1.0, q.dtype)  # cos and sin

    def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight

    def liger() -> Run:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)

    return [
        Case("rms_norm", f"({N}, {D})", lambda x, w: rms_norm(x, w, EPS), plain_norm, (x, weight),
             "liger_kernel", liger, backward=True),
        Case("add_rms_norm", f"({N}, {D})", lambda x, r, w: add_rms_norm(x, r, w, EPS)[0],
             lambda x, r, w: plain_norm(x + r, w), (x, residual, weight), backward=True),
        Case("rope", f"q ({N}, {H}, {E}), k {K} heads", rope,
             lambda q, k, c, s: [x * c + x.roll(E // 2, -1) * s for x in (q, k)], (q, k, *turn)),
        Case("swiglu", f"({N}, {F_})", swiglu, lambda g, u: F.silu(g) * u, (gate, up),
             backward=True),
    ]  # fmt: skip


def attention_cases() -> list[Case]:
    """Replies of one prompt: ours reads the prompt once, the others a copy for each reply."""
    starts = [0, *range(PROMPT, PROMPT + REPLIES * OWN + 1, OWN)]
    q, k, v = (random(starts[-1], heads, E) for heads in (H, K, K))

    def copied(x: Tensor) -> Tensor:  # (REPLIES, heads, PROMPT + OWN, E)
        prompt = x[:PROMPT].expand(REPLIES, *x[:PROMPT].shape)
        return torch.cat([prompt, x[PROMPT:].view(REPLIES, OWN, *x.shape[1:])], 1).transpose(1, 2)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    token, prompt = random(REPLIES, H, E), random(2, 1, K, PROMPT, E)
    own = random(2, REPLIES, K, OWN, E)
    whole = torch.cat([prompt.expand(2, REPLIES, K, PROMPT, E), own], 3)
    sees = partial(visible_positions, group=H // K, like=token, decoding=True)
    above = sees([0] * REPLIES, [PROMPT] * REPLIES, 1, PROMPT, last=False)
    below = sees(list(range(REPLIES)), [OWN] * REPLIES, REPLIES, OWN, last=True)

    def flash() -> Run:
        from flash_attn import flash_attn_with_kvcache

        keys, values = whole.transpose(2, 3).contiguous()
        return lambda token: flash_attn_with_kvcache(token[:, None], keys, values)

    shape = f"H {H}, K {K}, E {E}, prompt {PROMPT}, {REPLIES} replies of {OWN}"
    return [
        Case("attention", shape, lambda q, k, v: segments(q, k, v, starts, [-1] + [0] * REPLIES),
             lambda q, k, v: sdpa(copied(q), copied(k), copied(v)), (q, k, v), backward=True),
        Case("decode_attention", shape,
             lambda q: decode_attention(q, [(*own, below), (*prompt, above)]),
             lambda q: F.scaled_dot_product_attention(q[:, :, None], *whole, enable_gqa=True),
             (token,), "flash_attn", flash),
    ]  # fmt: skip


def product_cases() -> list[Case]:
    hidden, head, weight = random(N, D), random(V, D) * D**-0.5, random(F_, D) * 0.02
    ids = torch.randint(V, (N,), device=DEVICE)
    nf4, packed = quantize(weight), pack(weight) if can_pack(weight) else weight

    def cce() -> Run:
        from cut_cross_entropy import linear_cross_entropy

        return lambda hidden: linear_cross_entropy(hidden, head, ids, reduction="none")

    def bnb(product: bool) -> Run:
        import bitsandbytes as bnb

        codes, state = bnb.functional.quantize_4bit(weight, compress_statistics=True,
                                                    quant_type="nf4")  # fmt: skip
        if product:
            return lambda x: bnb.matmul_4bit(x, codes.t(), state)
        return lambda _: bnb.functional.dequantize_4bit(codes, state)

    cases = [
        Case("logprob", f"({N}, {D}) x {V:,}", lambda x: logprob(x, head, ids)[0],
             lambda x: F.cross_entropy((x @ head.T).float(), ids, reduction="none"),
             (hidden,), "cut_cross_entropy", cce, backward=True),
        Case("nf4", f"({F_}, {D}), plain: a copy in bf16", lambda w: dequantize(nf4, w.dtype),
             torch.clone, (weight,), "bitsandbytes", lambda: bnb(False)),
    ]  # fmt: skip
    for rows in (1, 16, 64):
        x, logits = random(rows, D), random(rows, V, dtype=torch.float32)
        keys = torch.tensor([draw_key(0, i, 0) for i in range(rows)], dtype=torch.int32)
        keys, shape = keys.to(DEVICE), f"{rows} rows, ({F_}, {D})"
        cases += [
            Case("nf4_linear", f"{shape}, plain: in bf16", lambda x: nf4_linear(x, nf4),
                 lambda x: F.linear(x, weight), (x,), "bitsandbytes", lambda: bnb(True)),
            Case("linear", shape, lambda x: linear(x, packed), lambda x: F.linear(x, weight), (x,)),
            Case("sample", f"({rows}, {V}) fp32", lambda z, keys=keys: sample(z, keys, 0.7),
                 lambda z: torch.multinomial((z / 0.7).softmax(-1), 1), (logits,)),
        ]  # fmt: skip
    return cases


def timer(case: Case, function: Run) -> Timer:
    """Of one call on the inputs of the case, with the gradients if the case has a backward."""
    leaves = [x.detach().clone().requires_grad_(case.backward) for x in case.inputs]
    names = {"torch": torch, "function": function, "leaves": leaves}
    if not case.backward:
        return Timer("with torch.no_grad(): function(*leaves)", globals=names)
    names["gradient"] = torch.randn_like(function(*leaves))
    return Timer("torch.autograd.grad(function(*leaves), leaves, gradient)", globals=names)


def measure(case: Case, rounds: int) -> list[str]:
    """The cells of a row of the table."""
    sides = {"ours": timer(case, case.ours), "plain": timer(case, case.plain)}
    note = "none"
    if case.peer is not None and case.make_peer is not None:
        note = f"{case.peer}: not here"
        if find_spec(case.peer) and (CUDA or case.peer == "bitsandbytes"):
            sides["peer"] = timer(case, case.make_peer())
    calls = {name: max(1, int(0.02 / side.timeit(2).mean)) for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            seconds[name].append(side.timeit(calls[name]).mean)
    ratio = {
        name: statistics.median(b / a for a, b in zip(seconds["ours"], times, strict=True))
        for name, times in seconds.items()
    }
    return [case.op, case.shape + ", forward + backward" * case.backward,
            f"{statistics.median(seconds['ours']) * 1e3:.3g} ms", f"{ratio['plain']:.2f}x",
            f"{ratio['peer']:.2f}x {case.peer}" if "peer" in ratio else note]  # fmt: skip


def main() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it looks for another `kernels`
    torch.manual_seed(0)
    cases = elementwise_cases() + attention_cases() + product_cases()
    known = list(dict.fromkeys(case.op for case in cases))
    parser = argparse.ArgumentParser(prog="python -m kernels.bench")
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"some of {', '.join(known)}")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (9)")
    options = parser.parse_args()
    if unknown := set(options.ops) - set(known):
        parser.error(f"expected some of {', '.join(known)}, got {', '.join(unknown)}")
    print("| operation | shape, bf16 | ours | plain PyTorch takes | peer takes |")
    print("| --- | --- | ---: | ---: | ---: |")
    for case in cases:
        if not options.ops or case.op in options.ops:
            print("| " + " | ".join(measure(case, options.rounds)) + " |", flush=True)
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    packages = (
        "torch",
        "triton",
        "bitsandbytes",
        "liger_kernel",
        "cut_cross_entropy",
        "flash_attn",
    )
    versions = [f"{name} {version(name)}" for name in packages if find_spec(name)]
    print(f"\n{device}, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}; "
          f"{', '.join(versions)}; {options.rounds} rounds, seed 0.")  # fmt: skip


if __name__ == "__main__":
    main()
