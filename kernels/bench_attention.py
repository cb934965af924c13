"""What `bench.py` times of attention: decoding over a shared prompt, and training on a tree.

Decoding: N replies of one prompt ask with one token each. "ours" reads the prompt once for all;
"eager" is softmax(q kᵀ) v with keys copied for every reply, as a batch of prompts holds them; SDPA
and flash-attn read the same copies. Training: replies that continue one prompt, forward and
backward. "ours" packs P + G·R rows; the others run G rows of P + R tokens each.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import segments
from kernels.decode_attention import Level, decode_attention, look
from kernels.timing import Case, Run, random

OWN = 64  # tokens of each reply so far
HEADS = {"cuda": (28, 4, 128), "cpu": (9, 3, 64)}  # H, K, E of Qwen2.5-7B and SmolLM2-135M


def _missing(device: str) -> dict[str, str]:
    if find_spec("flash_attn") is None:
        return {"flash-attn": "not installed"}
    return {} if device == "cuda" else {"flash-attn": "needs a GPU"}


def decode_cases(device: str) -> list[Case]:
    """As many layers as it takes to come from memory and not from a cache."""
    H, K, E = HEADS[device]
    layers = 8 if device == "cuda" else 30
    points = [(1, 384), (8, 384), (32, 384)]
    if device == "cuda":
        points = [(8, 512), (8, 1024), (8, 2048), (8, 4096), (8, 8192), (32, 2048)]
    return [_decode_case(device, layers, rows, prompt, H, K, E) for rows, prompt in points]


def _decode_case(device: str, layers: int, rows: int, prompt: int, H: int, K: int, E: int) -> Case:
    q = random(device, rows, H, E)
    prompts = [random(device, 2, 1, K, prompt, E) for _ in range(layers)]
    own = [random(device, 2, rows, K, OWN, E) for _ in range(layers)]
    whole = [
        torch.cat([p.expand(2, rows, K, prompt, E), o], 3).contiguous()
        for p, o in zip(prompts, own, strict=True)
    ]
    above = look([0] * rows, [prompt] * rows, 1, prompt, H // K, q, True, False)
    below = look(list(range(rows)), [OWN] * rows, rows, OWN, H // K, q, True, True)
    trees: list[list[Level]] = [
        [(*o, below), (*p, above)] for p, o in zip(prompts, own, strict=True)
    ]

    def ours() -> None:
        for levels in trees:
            decode_attention(q, levels)

    def eager() -> None:
        for keys, values in whole:
            asks = q.view(rows, K, H // K, E)
            scores = asks.float() @ keys.float().transpose(-1, -2) * E**-0.5
            (scores.softmax(-1) @ values.float()).to(q.dtype)

    def sdpa() -> None:
        for keys, values in whole:
            F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)

    sides: dict[str, Run] = {"ours": ours, "eager": eager, "SDPA": sdpa}
    missing = _missing(device)
    if not missing:
        sides["flash-attn"] = _flash_decode(q, whole)
    moved = 2 * layers * (2 * K * E * (prompt + rows * OWN) + 2 * rows * H * E)
    shape = f"{layers} layers, H {H}, K {K}, E {E}, prompt {prompt}, {rows} replies of {OWN}, bf16"
    return Case("decode_attention", shape, sides, moved, moved, missing=missing)


def _flash_decode(q: Tensor, whole: list[Tensor]) -> Run:
    from flash_attn import flash_attn_with_kvcache

    caches = [(k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()) for k, v in whole]

    def run() -> None:
        for keys, values in caches:
            flash_attn_with_kvcache(q[:, None], keys, values)

    return run


def train_cases(device: str) -> list[Case]:
    H, K, E = HEADS[device]
    points = [(2048, 8, 512)] if device == "cuda" else [(512, 8, 128)]
    return [_train_case(device, *point, H, K, E) for point in points]


def _train_case(device: str, prompt: int, replies: int, own: int, H: int, K: int, E: int) -> Case:
    starts = [0] + [prompt + own * i for i in range(replies + 1)]
    parents = [-1] + [0] * replies
    q, k, v = (random(device, starts[-1], heads, E).requires_grad_() for heads in (H, K, K))
    rows = [
        torch.cat([x[:prompt].expand(replies, prompt, *x.shape[1:]),
                   x[prompt:].view(replies, own, *x.shape[1:])], 1)
        .transpose(1, 2).detach().requires_grad_()
        for x in (q, k, v)
    ]  # fmt: skip

    def both(attend: Callable[[], Tensor], *leaves: Tensor) -> Run:
        def run() -> None:
            out = attend()
            torch.autograd.grad(out, leaves, torch.ones_like(out))

        return run

    def formula() -> Tensor:
        group, T = H // K, prompt + own
        keys, values = (x.repeat_interleave(group, 1).float() for x in rows[1:])
        hidden = torch.full((T, T), float("-inf"), device=device).triu(1)
        scores = rows[0].float() @ keys.transpose(-1, -2) * E**-0.5 + hidden
        return (scores.softmax(-1) @ values).to(q.dtype)

    sides: dict[str, Run] = {
        "ours": both(lambda: segments(q, k, v, starts, parents), q, k, v),
        "eager": both(formula, *rows),
        "SDPA": both(
            lambda: F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True), *rows
        ),
    }
    missing = _missing(device)
    if not missing:
        from flash_attn import flash_attn_func

        flat = [x.transpose(1, 2).detach().requires_grad_() for x in rows]
        sides["flash-attn"] = both(lambda: flash_attn_func(*flat, causal=True), *flat)
    shape = f"H {H}, K {K}, E {E}, prompt {prompt}, {replies} replies of {own}, bf16"
    return Case("attention", f"{shape}, forward + backward", sides, missing=missing)
