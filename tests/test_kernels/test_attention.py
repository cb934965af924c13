"""Attention in parts against one naive softmax a row, in fp64.

`naive` is the definition: one query, the keys it may see, nothing shared. Everything else must come
as close to it as PyTorch does in the same type.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels import attention
from kernels.attention import level, merge, partial, partial_reference, segments, segments_partial

TYPES = [torch.float32, torch.bfloat16]
INF = float("inf")


def naive(q: Tensor, k: Tensor, v: Tensor, sees: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Row i of q (N, H, E) over rows sees[i] of k and v (n, K, E) -> out (N, H, E), lse (N, H)."""
    group = q.shape[1] // k.shape[1]
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
    for i, rows in enumerate(sees):
        seen, told = (x[rows].repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        scores = (seen @ q[i, :, :, None])[..., 0] / math.sqrt(q.shape[2])  # (H, T)
        lse[i] = scores.logsumexp(-1)
        out[i] = (scores.softmax(-1)[:, None] @ told)[:, 0]
    return out, lse


def close(result: tuple[Tensor, ...], same: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> None:
    """error(result) <= 2 · error(the naive version in the same type) + one rounding."""
    for ours, theirs, exact in zip(result, same, truth, strict=True):
        assert ours.shape == exact.shape
        small = torch.finfo(theirs.dtype).eps * exact.abs().max().item()
        error = (ours.double() - exact).abs().max().item()
        assert error <= 2 * (theirs.double() - exact).abs().max().item() + small


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 1.5).to(dtype)


def chain(starts: list[int], parents: list[int]) -> list[list[int]]:
    """What each packed row sees, found row by row."""
    sees = []
    for s, parent in enumerate(parents):
        above: list[int] = []
        while parent >= 0:
            above = [*range(starts[parent], starts[parent + 1]), *above]
            parent = parents[parent]
        for row in range(starts[s], starts[s + 1]):
            sees.append([*above, *range(starts[s], row + 1)])
    return sees


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("masked", ["", "of the keys", "of each row"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("n", "K", "M", "T", "E"), [(1, 1, 1, 1, 8), (2, 3, 5, 37, 16)])
def test_partial_is_its_reference(n, K, M, T, E, dtype, masked, strided):
    q = draw(n, K, M, E, dtype=dtype)
    k, v = draw(n, K, T, E, dtype=dtype, seed=1), draw(n, K, T, E, dtype=dtype, seed=2)
    if strided:  # heads inside rows, and a slab with room at the end
        q = draw(n, M, K, E, dtype=dtype).transpose(1, 2)
        k = draw(n, K, T + 9, E, dtype=dtype, seed=1)[:, :, :T]
        v = draw(n, T, K, E, dtype=dtype, seed=2).transpose(1, 2)
    mask = None
    if masked:
        rows = 1 if masked == "of the keys" else M
        mask = torch.zeros(n, 1, rows, T, dtype=dtype)
        mask[torch.rand(n, 1, rows, T, generator=torch.Generator().manual_seed(3)) < 0.4] = -INF
        mask[..., 0] = 0.5
    results = [op(q, k, v, mask) for op in (partial, partial_reference)]
    scores = q.double() @ k.double().transpose(-1, -2) / math.sqrt(E)
    if mask is not None:
        scores = scores + mask.double()
    truth = (scores.softmax(-1) @ v.double(), scores.logsumexp(-1))
    rough = q @ k.transpose(-1, -2) / math.sqrt(E)
    if mask is not None:
        rough = rough + mask
    same = (rough.softmax(-1) @ v, rough.logsumexp(-1))
    for out, lse in results:
        assert (out.dtype, lse.dtype) == (dtype, torch.float32)
        close((out, lse), same, truth)


def test_partial_hides_what_the_mask_hides():
    """A hidden key may hold anything finite, at no effect at all."""
    q, k, v = draw(1, 2, 3, 8), draw(1, 2, 6, 8, seed=1), draw(1, 2, 6, 8, seed=2)
    mask = torch.zeros(1, 1, 1, 6)
    mask[..., 4:] = -INF
    before = partial(q, k, v, mask)
    k[:, :, 4:], v[:, :, 4:] = 1e4, -1e4
    after = partial(q, k, v, mask)
    short = partial(q, k[:, :, :4], v[:, :, :4])
    for a, b, c in zip(before, after, short, strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a, c, atol=1e-6)


def test_merge_worked_example():
    """lse 0 and log 3 give weights 1/4 and 3/4; a third part of log 4 weighs as much as both."""
    first = torch.full((1, 1, 2), 8.0), torch.tensor([[0.0]])
    second = torch.full((1, 1, 2), 16.0), torch.tensor([[math.log(3)]])
    third = torch.full((1, 1, 2), 4.0), torch.tensor([[math.log(4)]])
    assert torch.allclose(merge([first, second]), torch.full((1, 1, 2), 14.0))
    assert torch.allclose(merge([first, second, third]), torch.full((1, 1, 2), 9.0))
    assert torch.equal(merge([first]), first[0])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("cuts", [[0, 29], [0, 1, 29], [0, 13, 14, 29]])
def test_merged_parts_are_the_whole(cuts, dtype):
    N, H, K, E, T = 4, 6, 2, 16, 29
    q = draw(N, H, E, dtype=dtype)
    k, v = draw(T, K, E, dtype=dtype, seed=1), draw(T, K, E, dtype=dtype, seed=2)
    k[7] *= 8  # one part holds nearly all the weight
    parts = []
    for begin, end in pairwise(cuts):
        keys, values = (x[begin:end].transpose(0, 1)[None] for x in (k, v))
        parts.append(level(q, keys, values))
    everything = [list(range(T))] * N
    truth = naive(q.double(), k.double(), v.double(), everything)
    same = naive(q, k, v, everything)
    merged = merge(parts)
    assert merged.dtype == dtype
    # a part is rounded to q's type before it is merged: one rounding a part more than the whole
    error = (merged.double() - truth[0]).abs().max().item()
    allowed = 2 * (same[0].double() - truth[0]).abs().max().item()
    assert error <= allowed + torch.finfo(dtype).eps * truth[0].abs().max().item()


def test_merge_of_far_apart_parts_is_finite():
    parts = [(torch.ones(1, 1, 4), torch.tensor([[s]])) for s in (-500.0, 500.0, 3e4)]
    assert torch.equal(merge(parts), torch.ones(1, 1, 4))
    empty = torch.zeros(1, 1, 4), torch.tensor([[-INF]])
    assert torch.equal(merge([parts[0], empty]), torch.ones(1, 1, 4))


@pytest.mark.parametrize("dtype", TYPES)
def test_level_in_equal_shares(dtype):
    """Without `rows`, node i owns rows i·M to (i+1)·M; grouped heads share their key head."""
    n, M, H, K, T, E = 3, 2, 6, 2, 11, 8
    q = draw(n * M, H, E, dtype=dtype)
    keys, values = (draw(n, K, T, E, dtype=dtype, seed=s) for s in (1, 2))
    k, v = (x.transpose(1, 2).reshape(n * T, K, E) for x in (keys, values))
    sees = [list(range(i // M * T, i // M * T + T)) for i in range(n * M)]
    truth = naive(q.double(), k.double(), v.double(), sees)
    close(level(q, keys, values), naive(q, k, v, sees), truth)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("owners", [[0, 2, 0, 2, 2], [1, 1, 1, 0], [2]])
def test_level_with_padding_and_a_mask(owners, dtype):
    """Rows in any order under three nodes, some without rows, each row with its own limit."""
    n, H, K, T, E = 3, 4, 2, 9, 8
    N, group = len(owners), H // K
    limits = [(5 * i + 3) % T + 1 for i in range(N)]
    q = draw(N, H, E, dtype=dtype)
    keys, values = (draw(n, K, T, E, dtype=dtype, seed=s) for s in (1, 2))
    under = [[i for i in range(N) if owners[i] == node] for node in range(n)]
    M = max(map(len, under))
    padded = [mine + [N - 1] * (M - len(mine)) for mine in under]
    places = [owners[i] * M + under[owners[i]].index(i) for i in range(N)]
    mask = torch.zeros(n, 1, M * group, T, dtype=dtype)
    for node, mine in enumerate(padded):
        for j, row in enumerate(mine):
            mask[node, :, j * group : (j + 1) * group, limits[row] :] = -INF
    result = level(q, keys, values, torch.tensor(padded), torch.tensor(places), mask)
    k, v = (x.transpose(1, 2).reshape(n * T, K, E) for x in (keys, values))
    sees = [list(range(owners[i] * T, owners[i] * T + limits[i])) for i in range(N)]
    truth = naive(q.double(), k.double(), v.double(), sees)
    close(result, naive(q, k, v, sees), truth)


TREES = [
    ([0, 1], [-1]),
    ([0, 7], [-1]),
    ([0, 4, 5, 9], [-1, -1, -1]),
    ([0, 5, 7, 10], [-1, 0, 0]),
    ([0, 3, 5, 6, 10, 12], [-1, 0, 1, 0, 3]),
]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("starts", "parents"), TREES)
@pytest.mark.parametrize(("H", "K", "E"), [(1, 1, 8), (6, 2, 16)])
def test_segments_see_their_chain(H, K, E, starts, parents, dtype, strided):
    N = starts[-1]
    q, k, v = (draw(N, heads, E, dtype=dtype, seed=s) for s, heads in enumerate((H, K, K)))
    if strided:
        q, k, v = draw(N, H + 2 * K, E, dtype=dtype).split([H, K, K], 1)
        assert N == 1 or not q.is_contiguous()
    sees = chain(starts, parents)
    truth = naive(q.double(), k.double(), v.double(), sees)[:1]
    out = segments(q, k, v, starts, parents)
    assert out.dtype == dtype
    close((out,), naive(q, k, v, sees)[:1], truth)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("starts", [[0, 1], [0, 6], [0, 4, 4, 5, 9]])
def test_segments_partial_is_segments_with_its_sum(starts, dtype):
    q, k, v = (
        draw(starts[-1], heads, 16, dtype=dtype, seed=s) for s, heads in enumerate((6, 2, 2))
    )
    sees = chain(starts, [-1] * (len(starts) - 1))
    truth = naive(q.double(), k.double(), v.double(), sees)
    result = segments_partial(q, k, v, starts)
    assert result[1].dtype == torch.float32
    close(result, naive(q, k, v, sees), truth)
    full = [s for s in range(len(starts) - 1) if starts[s] < starts[s + 1]]
    bounds = [starts[s] for s in full] + [starts[-1]]
    whole = segments(q, k, v, bounds, [-1] * len(full))
    assert torch.allclose(result[0].float(), whole.float(), atol=4 * torch.finfo(dtype).eps)


def test_a_cached_prefix_and_own_keys_are_the_packed_whole():
    """level + segments_partial, merged, is what `segments` computes on concatenated keys."""
    starts, parents = [0, 5, 7, 10], [-1, 0, 0]
    q, k, v = (draw(10, heads, 8, seed=s) for s, heads in enumerate((4, 2, 2)))
    whole = segments(q, k, v, starts, parents)
    keys, values = (x[:5].transpose(0, 1)[None] for x in (k, v))  # (1, K, 5, E)
    parts = [level(q[5:], keys, values), segments_partial(q[5:], k[5:], v[5:], [0, 2, 5])]
    assert torch.allclose(merge(parts), whole[5:], atol=1e-6)


@pytest.mark.parametrize(("starts", "parents"), [([0, 1], [-1]), ([0, 2, 4, 5], [-1, 0, 0])])
def test_gradient_of_segments(starts, parents):
    """Finite differences, through a prefix that two segments share."""
    q, k, v = (
        draw(starts[-1], heads, 3, seed=s).double().requires_grad_()
        for s, heads in enumerate((2, 1, 1))
    )
    assert torch.autograd.gradcheck(
        lambda *x: segments(x[0], x[1], x[2], starts, parents), (q, k, v)
    )


def test_the_other_device_path_agrees(monkeypatch):
    """Where the flash kernel is not used, `partial` is the reference itself."""
    q, k, v = draw(6, 4, 8), draw(2, 2, 5, 8, seed=1), draw(2, 2, 5, 8, seed=2)
    fast = level(q, k, v)
    monkeypatch.setattr(attention, "partial", partial_reference)
    for a, b in zip(fast, level(q, k, v), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
