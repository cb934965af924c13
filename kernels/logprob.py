"""log p of chosen tokens and the entropy, from hidden states, without the matrix of logits.

    z[n, v] = (hidden[n] · head[v] + scale · (A hidden[n]) · B[v]) / temperature       A, B: adapter
    lse[n] = log Σ_v exp z[n, v]         p[n, v] = exp(z[n, v] - lse[n])
    log_probs[n] = z[n, id[n]] - lse[n]         entropies[n] = lse[n] - Σ_v p[n, v] z[n, v]

Worked example: hidden (1, 2), head rows (1, 0), (0, 1), (0, 0): z = (1, 2, 0), lse = 2.4076, p =
(0.2447, 0.6652, 0.0900); id 1 has log p = -0.4076, and the entropy is 2.4076 - 1.5752 = 0.8324.

Why: for 8,192 tokens and a vocabulary of 152,064 the logits alone are 5.0 GB in fp32, and plain
PyTorch holds them, their log-softmax and a gradient of each: 10 to 15 GB. Here rows go through in
chunks: a product with the head, two passes (`logprob_rows.py`), a product back. The products are
the vendor's. They need a few hundred rows to keep a GPU busy, so a chunk has what fits into
`chunk_bytes`, and never under 256 rows. (Liger sizes chunks by N D / V, which starves the product.)

Backward. With 1[v = id] for the chosen token, d log p[id] / dz_v = 1[v = id] - p_v. For the entropy
H = lse - Σ_u p_u z_u, with dp_u/dz_v = p_u (1[u = v] - p_v),

    dH/dz_v = p_v - p_v - Σ_u z_u p_u (1[u = v] - p_v)
            = -p_v (z_v - Σ_u p_u z_u) = -p_v (log p_v + H)

So for upstream gradients g, e of a row, c_v = g (1[v = id] - p_v) - e p_v (log p_v + H) is dL/dz_v.
Through z, with C (N, V) the rows c / temperature and low = hidden Aᵀ (N, R):

    dL/dhidden = C head + scale (C B) A        dL/dhead = Cᵀ hidden
    dL/dB = scale Cᵀ low                       dL/dA = scale (C B)ᵀ hidden

Two regimes:
- Only `hidden` is trained and only through log p: the usual case, where adapters sit below a frozen
  head. Then dL/dhidden[n] = g[n] U[n] / temperature, where U is `hidden`'s gradient for g = 1 and
  temperature 1. Forward computes it while a chunk's logits exist: two products in all, as many as
  with all logits kept. Saved for backward: U, the size of `hidden`. In the example
  U = head[1] - Σ_v p_v head[v] = (-0.2447, 0.3348).
- The head or its adapter is trained, or the entropy has a gradient: sums over rows need g and e
  first, so backward computes each chunk's logits again. Three products, and those of the other
  gradients. Saved beside the inputs: 16 bytes a row.

Memory beside inputs, results and gradients: one chunk of logits and coefficients, and U. For 8,192
tokens of Qwen2.5-7B (V 152,064, D 3,584, bf16, a GPU) 256 rows in fp32 and bf16 are 234 MB and U is
59 MB: 5.9 % of the fp32 logits. A trained head adds its gradient in fp32, and one chunk's share.

Speed, on two CPU cores with AMX that others used too (bf16, N 1,024, D 576, V 49,152, forward and
backward, least of 5 interleaved runs): 162 ms and 30 MiB in chunks of 256 rows, 305 ms with the
entropy's gradient; plain PyTorch with `log_softmax` 668 ms and 576 MiB.

Numerics: on a GPU products of 16-bit numbers leave fp32 logits (`torch.mm(..., out_dtype=)`). A CPU
has no such product: logits are rounded to 16 bits first (a bf16 logit of 33 to a multiple of 1/4),
as the model's own `logits` are, so sampler and trainer agree there. All that follows is fp32. For
the second product coefficients are rounded to the model's type, after g and e were divided by the
largest of them, so that small ones do not vanish in fp16. Sums over chunks are fp32.

What we chose: an id outside the vocabulary fails on a CPU; on a GPU looking would wait for it, so
log p is NaN there. What we left out: a product fused with its softmax (Wijmans et al., "Cut your
losses in large-vocabulary language models", arXiv 2411.09009), which holds no logits at all but has
to beat the vendor's product; and second derivatives.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.adapter import Adapter
from kernels.logprob_rows import Rows, coefficients, empty_rows, statistics

LEAST_ROWS = 256  # of a chunk: fewer leave the product waiting for the head to arrive
# Of logits and coefficients at a time. A GPU wants large products (448 rows of 49,152 bf16 logits);
# a CPU wants memory that it has just used: 1,024 rows at once took 201 ms, chunks of 256 took 162.
CHUNK_BYTES = {"cuda": 128 << 20, "cpu": 32 << 20}


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
        found = empty_rows(hidden)
        U = torch.empty_like(hidden) if prepare else None
        for at, z, c in chunks.each():
            rows = Rows(*(x[at] for x in found))
            statistics(z, ids[at], inverse, rows)
            if prepare:
                coefficients(z, ids[at], inverse, rows, None, c)
                U[at] = chunks.back(c)
        ctx.prepared, ctx.inverse, ctx.scale, ctx.chunk_bytes = prepare, inverse, scale, chunk_bytes
        if prepare:
            ctx.save_for_backward(U)
        else:
            ctx.save_for_backward(hidden, head, A, B, ids, *found)
        if not entropy_gradient:
            ctx.mark_non_differentiable(found.entropies)
        return found.log_probs, found.entropies

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
    hidden, head, A, B, ids, *found = ctx.saved_tensors
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
        rows = Rows(*(x[at] for x in found))
        coefficients(z, ids[at], ctx.inverse, rows, (g[at], e[at]), c)
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
