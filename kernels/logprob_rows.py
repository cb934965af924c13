"""The row-wise half of `logprob.py`: what happens to a chunk of logits between two matrix products.

A chunk holds logits (M, V), a few hundred rows of a vocabulary of up to 152,064. With z = logits /
temperature, two passes work on it:

    statistics      read once:          m, s, log p[id], entropy H      (M,) each; see below
    coefficients    read, write once:   c_v = g (1[v = id] - p_v) - e p_v (log p_v + H)     (M, V)

c is the gradient of g log p[id] + e H with respect to z; its derivation is in `logprob.py`. In the
model's type, c is what the second matrix product reads.

The log-sum-exp of a row that does not fit in registers is taken *online* (Milakov & Gimelshein,
arXiv 1805.02867). With the largest z so far m, keep s = Σ exp(z - m) and t = Σ exp(z - m) (z - m).
When a block raises m to m', what was summed belongs to the old m, and catches up by

    a = exp(m - m')          s <- a s          t <- a (t + (m - m') s)

At the end lse = m + log s, log p[id] = (z[id] - m) - log s, H = log s - t / s. Worked example: z =
(1, 2, 0) in blocks of one. With m = 1: s = 1, t = 0. Then m' = 2, a = 0.3679: s = 0.3679 + 1, t =
-0.3679. Then exp(-2) joins: s = 1.5032, t = -0.6386; lse = 2.4076, H = 0.4076 + 0.4248 = 0.8324.

Numerics: fp32 throughout (fp64 for fp64). All is relative to the largest z, so nothing cancels and
s >= 1: m and s are handed on, not their lse, whose rounding at 30 would be an error of 10⁻⁶ in
each p = exp(z - m) / s. log p is at most 0 and H at least 0, and a NaN stays one. A logit of -inf
is a token that cannot come: p = 0, and 0 · log 0 counts as 0. On a GPU an id outside the vocabulary
gives NaN.

What we chose: m is one number a row, but s and t are kept per lane and summed after the loop: one
reduction over the block in each turn, not three. On a CPU the same formulas walk over a few rows at
a time, which stay in the cache. What we left out: keeping exp(z - m) from the first pass for the
second. It would have to be stored in 16 bits and be rounded twice; a second exp costs less.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels._compile import Variant
from kernels._dispatch import jit, on_triton, tl, triton, wide

# Columns that a program holds at a time. 16 fp32 numbers a thread in four 128-bit loads; 16 KB in
# flight a program, enough with two programs on each of 132 multiprocessors (256 rows).
BLOCK = 4096
PART = 1 << 19  # numbers a CPU works on at a time: 2 MB in fp32, the second-level cache of a core
LOWEST = -1e38  # stands for -inf where -inf - -inf would be NaN
NEVER = -1e4  # its exp is 0 in fp32 and fp64, and unlike -inf · 0, -1e4 · 0 is 0


class Rows(NamedTuple):
    """What `statistics` finds, a number a row: (M,) each, fp32 (fp64 for fp64)."""

    log_probs: Tensor
    entropies: Tensor
    top: Tensor  # m, the largest logit / temperature
    total: Tensor  # s, the sum of exp(z - m)


def empty_rows(like: Tensor) -> Rows:
    """Room for every row of `like`."""
    kind = torch.promote_types(like.dtype, torch.float32)
    return Rows(*(torch.empty(len(like), dtype=kind, device=like.device) for _ in range(4)))


def _statistics_reference(logits: Tensor, ids: Tensor, inverse: float, rows: Rows) -> None:
    for part in _parts(logits):
        z = _scaled(logits[part], inverse, rows.top.dtype)  # (m, V)
        top = z.amax(-1, keepdim=True).clamp_(min=LOWEST)
        z.sub_(top)
        weight = z.exp()
        total = weight.sum(-1)
        log_total = total.log()
        chosen = z.gather(1, ids[part, None])[:, 0]
        mean = weight.mul_(z).nansum(-1) / total  # the NaN of 0 · -inf; a real one is in total
        rows.top[part], rows.total[part] = top[:, 0], total
        rows.log_probs[part] = (chosen - log_total).clamp_(max=0)
        rows.entropies[part] = (log_total - mean).clamp_(min=0)


def _coefficients_reference(
    logits: Tensor, ids: Tensor, inverse: float, rows: Rows,
    upstream: tuple[Tensor, Tensor] | None, out: Tensor,
) -> None:  # fmt: skip
    for part in _parts(logits):
        c = _scaled(logits[part], inverse, rows.top.dtype).sub_(rows.top[part, None])  # (m, V)
        chosen, total = ids[part, None], rows.total[part, None]
        if upstream is None:
            c.exp_().mul_(-1 / total)
            c.scatter_add_(1, chosen, torch.ones_like(total))
        else:
            g, e = (u[part, None] for u in upstream)
            p = c.exp().div_(total)
            surprise = c.clamp_(min=NEVER).sub_(total.log() - rows.entropies[part, None])
            c = surprise.mul_(-e).sub_(g).mul_(p)
            c.scatter_add_(1, chosen, g)
        out[part] = c


def _parts(logits: Tensor) -> list[slice]:
    step = max(1, PART // logits.shape[1])
    return [slice(at, at + step) for at in range(0, len(logits), step)]


def _scaled(logits: Tensor, inverse: float, dtype: torch.dtype) -> Tensor:
    """A copy of logits / temperature."""
    z = logits.to(dtype, copy=True)
    return z if inverse == 1 else z.mul_(inverse)


@jit
def _statistics_kernel(
    Logits, Ids, LogProbs, Entropies, Top, Total,
    stride, V, inverse,
    BLOCK: tl.constexpr, LOWEST: tl.constexpr, NEVER: tl.constexpr,
):  # fmt: skip
    """One program, one row, block by block."""
    row = tl.program_id(0).to(tl.int64)
    Logits += row * stride
    chosen_id = tl.load(Ids + row)
    inside = (chosen_id >= 0) & (chosen_id < V)
    chosen = wide(tl.load(Logits + chosen_id, mask=inside, other=float("nan"))) * inverse
    columns = tl.arange(0, BLOCK)
    top = tl.maximum(wide(tl.load(Logits)) * inverse, LOWEST)
    s = tl.zeros((BLOCK,), dtype=top.dtype)
    t = tl.zeros((BLOCK,), dtype=top.dtype)
    for start in range(0, V, BLOCK):
        z = tl.load(Logits + start + columns, mask=start + columns < V, other=-float("inf"))
        z = wide(z) * inverse
        higher = tl.maximum(top, tl.max(z))
        step = top - higher
        decay = tl.exp(step)
        z -= higher
        weight = tl.exp(z)
        t = decay * (t + step * s) + weight * tl.maximum(z, NEVER)
        s = decay * s + weight
        top = higher
    total = tl.sum(s)
    log_total = tl.log(total)
    log_prob = chosen - top - log_total
    entropy = log_total - tl.sum(t) / total
    # A comparison with NaN is false, so NaN stays; tl.minimum and tl.maximum would drop it.
    tl.store(LogProbs + row, tl.where(log_prob > 0, 0.0, log_prob))
    tl.store(Entropies + row, tl.where(entropy < 0, 0.0, entropy))
    tl.store(Top + row, top)
    tl.store(Total + row, total)


@jit
def _coefficients_kernel(
    Logits, Ids, Entropies, Top, Total, G, E, Out,
    stride, out_stride, V, inverse,
    UPSTREAM: tl.constexpr, BLOCK: tl.constexpr, NEVER: tl.constexpr,
):  # fmt: skip
    """One program, one block of one row. Out may be Logits: a number is read before its write."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    z = wide(tl.load(Logits + row * stride + columns, mask=inside, other=-float("inf")))
    z = z * inverse - tl.load(Top + row)
    total = tl.load(Total + row)
    p = tl.exp(z) * (1.0 / total)
    chosen = columns == tl.load(Ids + row)
    if UPSTREAM:
        g, e = tl.load(G + row), tl.load(E + row)
        surprise = tl.maximum(z, NEVER) - (tl.log(total) - tl.load(Entropies + row))
        c = tl.where(chosen, g, 0.0) - p * (g + e * surprise)
    else:
        c = tl.where(chosen, 1.0, 0.0) - p
    tl.store(Out + row * out_stride + columns, c, mask=inside)


def _shape(V: int) -> tuple[int, int]:
    """Columns in a block (a power of two) and warps: 16 columns a thread."""
    block = min(triton.next_power_of_2(V), BLOCK)
    return block, max(block // 512, 1)


def _launch_statistics(logits: Tensor, ids: Tensor, inverse: float, rows: Rows) -> None:
    M, V = logits.shape
    block, warps = _shape(V)
    _statistics_kernel[(M,)](
        logits, ids, *rows, logits.stride(0), V, inverse,
        BLOCK=block, LOWEST=LOWEST, NEVER=NEVER,
        num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip


def _launch_coefficients(
    logits: Tensor, ids: Tensor, inverse: float, rows: Rows,
    upstream: tuple[Tensor, Tensor] | None, out: Tensor,
) -> None:  # fmt: skip
    M, V = logits.shape
    block, warps = _shape(V)
    g, e = (rows.top, rows.top) if upstream is None else upstream  # something to point at
    _coefficients_kernel[(M, triton.cdiv(V, block))](
        logits, ids, *rows[1:], g, e, out, logits.stride(0), out.stride(0), V, inverse,
        UPSTREAM=upstream is not None, BLOCK=block, NEVER=NEVER,
        num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip


def variants() -> list[Variant]:
    """What the launchers ask for at the vocabularies of SmolLM2-135M and Qwen2.5-7B, in bf16."""
    made = []
    for V in (49_152, 152_064):
        block, warps = _shape(V)
        rows = {"Entropies": "*fp32", "Top": "*fp32", "Total": "*fp32"}
        made.append(
            Variant(
                f"logprob statistics, V {V:,}",
                _statistics_kernel,
                {"Logits": "*fp32", "Ids": "*i64", "LogProbs": "*fp32", **rows,
                 "stride": "i32", "V": "i32", "inverse": "fp32"},
                {"BLOCK": block, "LOWEST": LOWEST, "NEVER": NEVER},
                warps,
            )
        )  # fmt: skip
        for upstream in (False, True):
            made.append(
                Variant(
                    f"logprob coefficients, V {V:,}{', upstream' * upstream}",
                    _coefficients_kernel,
                    {"Logits": "*fp32", "Ids": "*i64", **rows, "G": "*fp32", "E": "*fp32",
                     "Out": "*bf16", "stride": "i32", "out_stride": "i32", "V": "i32",
                     "inverse": "fp32"},
                    {"UPSTREAM": upstream, "BLOCK": block, "NEVER": NEVER},
                    warps,
                )
            )  # fmt: skip
    return made


def _check(logits: Tensor, *others: Tensor) -> None:
    M, V = logits.shape
    assert logits.stride(1) == 1 or V == 1, f"logits of strides {logits.stride()}: rows have gaps"
    for x in others:
        assert x.shape == (M,), f"{tuple(x.shape)} for {M} rows"
        assert x.is_contiguous(), f"stride {x.stride(0)}"


def statistics(logits: Tensor, ids: Tensor, inverse: float, rows: Rows) -> None:
    """logits (M, V), ids (M,) int64, inverse = 1 / temperature; fills `rows`."""
    _check(logits, ids, *rows)
    form = _launch_statistics if on_triton(logits) else _statistics_reference
    form(logits, ids, inverse, rows)


def coefficients(
    logits: Tensor, ids: Tensor, inverse: float, rows: Rows,
    upstream: tuple[Tensor, Tensor] | None, out: Tensor,
) -> None:  # fmt: skip
    """What `statistics` was given and gave, and upstream (g, e), (M,) fp32 each, or None for g = 1,
    e = 0; fills out (M, V), of any floating type, which may be `logits` itself."""
    _check(logits, ids, *rows, *(upstream or ()))
    assert out.shape == logits.shape, f"{tuple(out.shape)} for logits {tuple(logits.shape)}"
    assert out.stride(1) == 1 or out.shape[1] == 1, f"out of strides {out.stride()}"
    form = _launch_coefficients if on_triton(logits) else _coefficients_reference
    form(logits, ids, inverse, rows, upstream, out)
