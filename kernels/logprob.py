"""log p of chosen tokens and the entropy, from hidden states, without the matrix of logits.

    z[n, v] = (hidden[n] · head[v] + scale · (A hidden[n]) · B[v]) / temperature       A, B: adapter
    lse[n] = log Σ_v exp z[n, v]         p[n, v] = exp(z[n, v] - lse[n])
    log_probs[n] = z[n, id[n]] - lse[n]         entropies[n] = lse[n] - Σ_v p[n, v] z[n, v]

Worked example: hidden (1, 2), head rows (1, 0), (0, 1), (0, 0): z = (1, 2, 0), lse = 2.4076, p =
(0.2447, 0.6652, 0.0900); id 1 has log p = -0.4076, and the entropy is 2.4076 - 1.5752 = 0.8324.

Why: for 8,192 tokens and a vocabulary of 152,064 plain PyTorch holds 10 to 15 GB of logits. Here
rows go through in chunks of at least 256: a product with the head, two passes over the chunk's
logits (M, V), a product back. Beside inputs and results 6 % of the fp32 logits are held at most.

    statistics      read once:          m, s, log p[id], entropy H      (M,) each
    coefficients    read, write once:   c_v = g (1[v = id] - p_v) - e p_v (log p_v + H)     (M, V)

A row that does not fit in registers is summed *online* (Milakov & Gimelshein, arXiv 1805.02867).
With the largest z so far m, keep s = Σ exp(z - m) and t = Σ exp(z - m) (z - m). When a block raises
m to m', with a = exp(m - m'): s <- a s, t <- a (t + (m - m') s). At the end log p[id] = (z[id] - m)
- log s and H = log s - t / s. In the example, block by block of one: (s, t) = (1, 0), (1.3679,
-0.3679), (1.5032, -0.6386), so H = 0.4076 + 0.4248 = 0.8324.

Backward. d log p[id] / dz_v = 1[v = id] - p_v, and dp_u/dz_v = p_u (1[u = v] - p_v) gives
dH/dz_v = -p_v (z_v - Σ_u p_u z_u) = -p_v (log p_v + H). So for upstream gradients g, e of a row the
c_v above is dL/dz_v. With C (N, V) the rows c / temperature and low = hidden Aᵀ (N, R):

    dL/dhidden = C head + scale (C B) A        dL/dhead = Cᵀ hidden
    dL/dB = scale Cᵀ low                       dL/dA = scale (C B)ᵀ hidden

Two regimes:
- Only `hidden` is trained, only through log p: adapters sit below a frozen head. Then dL/dhidden[n]
  = g[n] U[n] / temperature, where U is the gradient for g = 1, which forward computes while a
  chunk's logits exist. Two products; saved: U. In the example U = head[1] - Σ_v p_v head[v].
- The head or its adapter is trained, or the entropy has a gradient: backward computes each chunk's
  logits again. Three products, and those of the other gradients; saved: 16 bytes a row.

Numerics: fp32 (fp64 for fp64) and relative to the largest z: m and s are handed on, not their lse,
whose rounding at 30 would be an error of 10⁻⁶ in each p. On a CPU logits are rounded to 16 bits
first, as the model's own are. A logit of -inf has p = 0, and 0 · log 0 is 0; a NaN stays one.
For the second product coefficients are rounded to the model's type, after g and e were divided by
the largest of them, so that small ones do not vanish in fp16. An id outside the vocabulary fails on
a CPU; on a GPU looking would wait for it, so log p is NaN there. Left out: a product fused with its
softmax (Wijmans et al., arXiv 2411.09009), which has to beat the vendor's, and second derivatives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._dispatch import jit, on_triton, tl, triton, wide
from kernels.linear import Adapter

LEAST_ROWS = 256  # of a chunk: fewer leave the product waiting for the head to arrive
# Of logits and coefficients at a time. A GPU wants large products (448 rows of 49,152 bf16 logits);
# a CPU wants memory that it has just used: 1,024 rows at once took 201 ms, chunks of 256 took 162.
CHUNK_BYTES = {"cuda": 128 << 20, "cpu": 32 << 20}
# Columns that a program holds at a time. 16 fp32 numbers a thread in four 128-bit loads; 16 KB in
# flight a program, enough with two programs on each of 132 multiprocessors (256 rows).
BLOCK = 4096
PART = 1 << 19  # numbers a CPU works on at a time: 2 MB in fp32, the second-level cache of a core
LOWEST = -1e38  # stands for -inf where -inf - -inf would be NaN
NEVER = -1e4  # its exp is 0 in fp32 and fp64, and unlike -inf · 0, -1e4 · 0 is 0


def logprob_reference(
    hidden: Tensor,
    head: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    adapter: Adapter | None = None,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """hidden (N, D), head (V, D), ids (N,) -> log_probs, entropies (N,), by way of all logits."""
    kind = torch.promote_types(hidden.dtype, torch.float32)
    hidden = hidden.to(kind)
    z = hidden @ head.to(kind).T  # (N, V)
    if adapter is not None:
        z = z + adapter.scale * (hidden @ adapter.A.to(kind).T) @ adapter.B.to(kind).T
    log_p = torch.log_softmax(z / temperature, -1)
    p = log_p.exp()
    entropies = -(p * log_p.masked_fill(p == 0, 0)).sum(-1)
    log_probs = log_p.gather(1, ids[:, None])[:, 0]
    return log_probs, entropies if entropy_gradient else entropies.detach()


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


def rows_of_chunk(V: int, bytes_each: int, chunk_bytes: int) -> int:
    """Rows of V logits, `bytes_each` for a logit and its coefficient: a multiple of 64, for the
    product's tiles, and at least LEAST_ROWS."""
    return max(LEAST_ROWS, chunk_bytes // (V * bytes_each) // 64 * 64)


def wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 at least; from 16-bit numbers on a CPU, rounded to 16 bits on the way."""
    if a.is_cuda and a.element_size() == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).to(torch.promote_types(a.dtype, torch.float32))


class _Chunks:
    """The head, its adapter, and the room for one chunk of logits, used again for each."""

    def __init__(self, hidden: Tensor, head: Tensor, adapter: Adapter | None, chunk_bytes: int):
        kind = hidden.dtype
        self.hidden, self.head = hidden, head
        self.wide = torch.promote_types(kind, torch.float32)
        logits = self.wide if hidden.is_cuda else kind
        self.separate = logits != kind  # else the coefficients take the place of the logits
        bytes_each = logits.itemsize + self.separate * kind.itemsize
        self.rows = min(rows_of_chunk(len(head), bytes_each, chunk_bytes), len(hidden))
        self.room = torch.empty(self.rows, len(head), dtype=logits, device=hidden.device)
        self.other = torch.empty_like(self.room, dtype=kind) if self.separate else self.room
        self.adapter = adapter
        if adapter is not None:
            self.A = adapter.A.to(self.wide)  # (R, D)
            self.B = adapter.B.to(logits)  # (V, R)
            self.narrow_B = adapter.B.to(kind)

    def each(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(the rows, their logits (M, V), room for their coefficients) of each chunk."""
        for start in range(0, len(self.hidden), max(self.rows, 1)):
            at = slice(start, min(start + self.rows, len(self.hidden)))
            x = self.hidden[at]  # (M, D)
            z = self.room[: len(x)]  # (M, V)
            if self.separate:
                torch.mm(x, self.head.T, out_dtype=z.dtype, out=z)
            else:
                torch.mm(x, self.head.T, out=z)
            if self.adapter is not None:
                z.addmm_(self.low(at).to(z.dtype), self.B.T, alpha=self.adapter.scale)
            yield at, z, self.other[: len(x)]

    def low(self, at: slice) -> Tensor:
        """(M, R) in fp32."""
        return self.hidden[at].to(self.wide) @ self.A.T

    def low_back(self, c: Tensor) -> Tensor:
        """c (M, V) -> scale · c B (M, R) in fp32."""
        assert self.adapter is not None
        return wide_mm(c, self.narrow_B).mul_(self.adapter.scale)

    def back(self, c: Tensor) -> Tensor:
        """c (M, V) -> c head + scale (c B) A (M, D) in fp32."""
        d_x = wide_mm(c, self.head)
        return d_x if self.adapter is None else d_x.addmm_(self.low_back(c), self.A)


class _LogProb(torch.autograd.Function):
    """Saves U where it can be known beforehand; else its inputs and four numbers a row."""

    @staticmethod
    def forward(
        ctx, hidden, head, A, B, scale, ids, inverse, chunk_bytes, prepare, entropy_gradient
    ):
        adapter = None if A is None else Adapter(A, B, scale)
        chunks = _Chunks(hidden, head, adapter, chunk_bytes)
        rows = empty_rows(hidden)
        U = torch.empty_like(hidden) if prepare else None
        for at, z, c in chunks.each():
            part = Rows(*(x[at] for x in rows))
            statistics(z, ids[at], inverse, part)
            if prepare:
                coefficients(z, ids[at], inverse, part, None, c)
                U[at] = chunks.back(c)
        ctx.prepared, ctx.inverse, ctx.scale, ctx.chunk_bytes = prepare, inverse, scale, chunk_bytes
        if prepare:
            ctx.save_for_backward(U)
        else:
            ctx.save_for_backward(hidden, head, A, B, ids, *rows)
        if not entropy_gradient:
            ctx.mark_non_differentiable(rows.entropies)
        return rows.log_probs, rows.entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, g, e):
        if ctx.prepared:
            (U,) = ctx.saved_tensors
            g = (g * ctx.inverse)[:, None]
            d_hidden = torch.mul(U, g, out=torch.empty_like(U))  # no fp32 copy of U
            return (d_hidden, *[None] * 9)
        return (*_recompute(ctx, g, e), *[None] * 6)


def _recompute(ctx, g: Tensor, e: Tensor) -> list[Tensor | None]:
    """g, e (N,) -> dL/dhidden, dL/dhead, dL/dA, dL/dB, where wanted."""
    hidden, head, A, B, ids, *rows = ctx.saved_tensors
    adapter = None if A is None else Adapter(A, B, ctx.scale)
    chunks = _Chunks(hidden, head, adapter, ctx.chunk_bytes)
    wanted = ctx.needs_input_grad[:4]
    # Sums over chunks, in fp32; dL/dhidden is no sum, and its rows are written once.
    d_hidden, d_head, d_A, d_B = (
        torch.zeros_like(x, dtype=None if x is hidden else chunks.wide) if want else None
        for x, want in zip((hidden, head, A, B), wanted, strict=True)
    )
    size = torch.maximum(_largest(g), _largest(e))  # on the device: nobody waits for it
    g, e = g / size, e / size
    size = size * ctx.inverse
    for at, z, c in chunks.each():
        part = Rows(*(x[at] for x in rows))
        coefficients(z, ids[at], ctx.inverse, part, (g[at], e[at]), c)
        if d_hidden is not None:
            d_hidden[at] = chunks.back(c).mul_(size)
        if d_head is not None:
            d_head += wide_mm(c.T, hidden[at])
        if d_A is not None:
            d_A += chunks.low_back(c).T @ hidden[at].to(chunks.wide)
        if d_B is not None:
            d_B += wide_mm(c.T, chunks.low(at).to(c.dtype)).mul_(ctx.scale)
    for total in (d_head, d_A, d_B):
        if total is not None:
            total *= size
    return [
        None if d is None else d.to(x.dtype)
        for d, x in zip((d_hidden, d_head, d_A, d_B), (hidden, head, A, B), strict=True)
    ]


def _largest(g: Tensor) -> Tensor:
    """() the largest magnitude, or the least positive number if there is none."""
    least = torch.finfo(g.dtype).tiny
    return g.abs().amax().clamp_(min=least) if len(g) else g.new_tensor(least)


def logprob(
    hidden: Tensor,
    head: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    adapter: Adapter | None = None,
    entropy_gradient: bool = False,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """hidden (N, D), head (V, D), ids (N,) int64 -> log_probs and entropies (N,) in fp32.

    The head is the matrix of the output, tied to the embedding or not; its adapter may be of
    another type. Entropies are constants unless `entropy_gradient`, which costs a third product.
    A chunk takes `chunk_bytes`; None: CHUNK_BYTES of the device.
    """
    N, D = hidden.shape
    V = len(head)
    assert temperature > 0, f"expected a temperature above 0, got {temperature}"
    assert head.shape == (V, D), f"head {tuple(head.shape)} for hidden states of width {D}"
    assert head.dtype == hidden.dtype, f"head in {head.dtype}, hidden states in {hidden.dtype}"
    assert ids.shape == (N,), f"ids {tuple(ids.shape)} for {N} rows"
    assert ids.dtype == torch.int64, f"expected ids in int64, got {ids.dtype}"
    if N and ids.device.type == "cpu":
        least, most = (int(i) for i in ids.aminmax())
        assert 0 <= least <= most < V, f"ids {least} to {most} in a vocabulary of {V}"
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
    A, B, scale = adapter or (None, None, 0.0)
    if A is not None:
        assert A.shape == (len(A), D), f"A {tuple(A.shape)} for hidden states of width {D}"
        assert B.shape == (V, len(A)), f"B {tuple(B.shape)} for {V} ids and rank {len(A)}"
    trained = any(x is not None and x.requires_grad for x in (head, A, B)) or entropy_gradient
    prepare = hidden.requires_grad and not trained and torch.is_grad_enabled()
    return _LogProb.apply(
        hidden, head, A, B, scale, ids.contiguous(), 1.0 / temperature, chunk_bytes, prepare,
        entropy_gradient,
    )  # fmt: skip
