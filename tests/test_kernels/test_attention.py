"""Attention in parts against one naive softmax a row in fp64; packed segments on trees, with every
gradient, in parts, by flash-attn's contract, and by PyTorch's own attention."""

import inspect
import math
from itertools import pairwise

import pytest
import torch
from oracle import (
    BF16,
    FP16,
    FP32,
    INTERPRETED,
    KINDS,
    gappy,
    no_worse_than_plain,
    off,
    outputs_and_gradients,
    spread,
    strided,
)
from torch import Tensor

from kernels import attention
from kernels.attention import merge, partial, partial_reference, segments, segments_reference

TYPES = [FP32, BF16]
INF = float("inf")


def close(result: tuple[Tensor, ...], same: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> None:
    """error(result) <= 2 · error(the naive version in the same type) + one rounding."""
    for ours, theirs, exact in zip(result, same, truth, strict=True):
        small = torch.finfo(theirs.dtype).eps * exact.abs().max().item()
        assert off(ours, exact) <= 2 * off(theirs, exact) + small


def draw(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    return spread(*shape, dtype=dtype, seed=seed, size=1.5)


def queries_keys_values(N: int, H: int, K: int, E: int, dtype: torch.dtype = FP32) -> list[Tensor]:
    return [draw(N, heads, E, dtype=dtype, seed=s) for s, heads in enumerate((H, K, K))]


@pytest.mark.parametrize("in_slabs", [False, True])
@pytest.mark.parametrize("masked", ["", "of the keys", "of each row"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("n", "K", "M", "T", "E"), [(1, 1, 1, 1, 8), (2, 3, 5, 37, 16)])
def test_partial_is_its_reference(n, K, M, T, E, dtype, masked, in_slabs):
    q = draw(n, K, M, E, dtype=dtype)
    k, v = draw(n, K, T, E, dtype=dtype, seed=1), draw(n, K, T, E, dtype=dtype, seed=2)
    if in_slabs:  # heads inside rows, and a slab with room at the end
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


def test_merge_worked_example():
    """lse 0 and log 3 give weights 1/4 and 3/4; a third part of log 4 weighs as much as both."""
    first = torch.full((1, 1, 2), 8.0), torch.tensor([[0.0]])
    second = torch.full((1, 1, 2), 16.0), torch.tensor([[math.log(3)]])
    third = torch.full((1, 1, 2), 4.0), torch.tensor([[math.log(4)]])
    assert torch.allclose(merge([first, second]), torch.full((1, 1, 2), 14.0))
    assert torch.allclose(merge([first, second, third]), torch.full((1, 1, 2), 9.0))
    assert torch.equal(merge([first]), first[0])


TREES = [
    ([0, 7], [-1]),
    ([0, 4, 5, 9], [-1, -1, -1]),
    ([0, 5, 6, 9], [-1, 0, 0]),
    ([0, 3, 5, 6, 10, 12], [-1, 0, 1, 0, 3]),  # depth 3
    ([0, 4, 6, 9, 11, 14], [-1, -1, 0, 1, 0]),  # the rows under a prompt do not stand together
    ([0, 0, 3, 3, 5, 7], [-1, 0, 1, 1, 2]),  # empty segments, as roots, leaves and on the way
    ([0, 70, 170, 171, 240], [-1, 0, 0, 2]),  # longer than the blocks of PyTorch's kernel
]
# The signature of `flash_attn.flash_attn_varlen_func` in flash-attn 2.8.3
FLASH_ATTN = (
    "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, "
    "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False, block_table=None"
)


def plain(q: Tensor, k: Tensor, v: Tensor, starts: list[int], parents: list[int]) -> Tensor:
    """Every segment over its ancestors' keys and its own, masked, in the type of the inputs."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    outs = []
    for s, parent in enumerate(parents):
        rows = list(range(starts[s], starts[s + 1]))
        while parent >= 0:
            rows = [*range(starts[parent], starts[parent + 1]), *rows]
            parent = parents[parent]
        M, T = starts[s + 1] - starts[s], len(rows)
        hidden = torch.ones(M, T, dtype=torch.bool, device=q.device).triu(T - M + 1)
        asks = q[starts[s] : starts[s + 1]].transpose(0, 1)  # (H, M, E)
        scores = asks @ k[rows].permute(1, 2, 0) / math.sqrt(q.shape[2])
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outs.append((weights @ v[rows].transpose(0, 1)).transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("form", [segments, segments_reference])
@pytest.mark.parametrize(("device", "dtype"), KINDS)
@pytest.mark.parametrize("heads", [(1, 1, 8), (6, 2, 16)])
@pytest.mark.parametrize("tree", TREES)
def test_no_worse_than_plain_pytorch(tree, heads, device, dtype, form):
    """The parts are PyTorch's own attention, whose CPU kernel has approximate exponentials where
    AVX512 is: of 24 draws of the last tree its fp32 gradients were off by 2.4 times what the plain
    formula is off by, on a Zen 4. So its own attention is what the parts are held against."""
    inputs = queries_keys_values(tree[0][-1], *heads, dtype)
    peer = segments_reference if form is segments else plain
    no_worse_than_plain(
        lambda q, k, v: form(q, k, v, *tree),
        lambda q, k, v: plain(q, k, v, *tree),
        inputs,
        device,
        lambda q, k, v: peer(q, k, v, *tree),
    )


@pytest.mark.parametrize(("device", "dtype"), KINDS)
@pytest.mark.parametrize("layout", [strided, gappy])
def test_strided_inputs(device, dtype, layout):
    tree = TREES[4]
    no_worse_than_plain(
        lambda q, k, v: segments(q, k, v, *tree),
        lambda q, k, v: plain(q, k, v, *tree),
        [layout(x) for x in queries_keys_values(tree[0][-1], 6, 2, 16, dtype)],
        device,
    )


@pytest.mark.parametrize("tree", TREES[2:6])
def test_backward_against_finite_differences(tree):
    inputs = [x.double().requires_grad_() for x in queries_keys_values(tree[0][-1], 2, 1, 2)]
    assert torch.autograd.gradcheck(lambda *x: segments(*x, *tree), inputs)


@pytest.mark.skipif(INTERPRETED, reason="nothing of Triton in it")
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_gradients_of_keys_are_exact_to_a_rounding(dtype):
    """The backward computes in fp32; PyTorch's in 16 bits is several times less exact."""
    tree = TREES[6]
    inputs = queries_keys_values(tree[0][-1], 6, 2, 16, dtype)
    ours = outputs_and_gradients(lambda *x: segments(*x, *tree), inputs)
    exact = outputs_and_gradients(lambda *x: plain(*x, *tree), [x.double() for x in inputs])
    for x, truth in zip(ours[2:], exact[2:], strict=True):
        assert off(x, truth) <= 2 * torch.finfo(dtype).eps * truth.abs().max()


# flash-attn, played by PyTorch


def fake_flash_attn(calls: list[dict]):
    """What its documentation promises, and it takes nothing that was not promised."""
    signature = inspect.signature(eval(f"lambda {FLASH_ATTN}: None"))

    def flash_attn_varlen_func(*args, **options) -> Tensor:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        calls.append(given := bound.arguments)
        q, k, v = given["q"], given["k"], given["v"]
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        bounds = []
        for x, name in ((q, "q"), (k, "k")):
            cu, most = given[f"cu_seqlens_{name}"], given[f"max_seqlen_{name}"]
            assert cu.dtype == torch.int32
            assert cu.is_contiguous()
            assert cu.device == x.device
            assert isinstance(most, int)
            assert most == int(cu.diff().max())
            assert (int(cu[0]), int(cu[-1])) == (0, len(x))
            bounds.append(list(pairwise(cu.tolist())))
        assert k.shape == v.shape
        assert q.shape[1] % k.shape[1] == 0
        group, outs = q.shape[1] // k.shape[1], []
        for (a, b), (c, d) in zip(*bounds, strict=True):
            keys, values = (x[c:d].repeat_interleave(group, 1) for x in (k, v))
            scores = torch.einsum("mhe,the->hmt", q[a:b], keys) / math.sqrt(q.shape[2])
            if given["causal"]:  # aligned to the bottom right
                hidden = torch.ones(b - a, d - c, dtype=torch.bool).triu(d - c - (b - a) + 1)
                scores = scores.masked_fill(hidden, float("-inf"))
            outs.append(torch.einsum("hmt,the->mhe", scores.softmax(-1), values))
        return torch.cat(outs)

    return flash_attn_varlen_func


@pytest.mark.parametrize("tree", TREES)
def test_contract_with_flash_attn(tree, monkeypatch):
    """One call for all segments, however deep the tree, and the right gradients through it."""
    calls: list[dict] = []
    monkeypatch.setattr(attention, "flash_attn_varlen_func", fake_flash_attn(calls))
    no_worse_than_plain(
        lambda q, k, v: attention._segments_flash_attn(q, k, v, *tree),
        lambda q, k, v: plain(q, k, v, *tree),
        queries_keys_values(tree[0][-1], 6, 2, 16),
        "cpu",
    )
    assert len(calls) == 1
    assert calls[0]["cu_seqlens_q"].tolist() == tree[0]


def test_no_rows():
    q, k, v = queries_keys_values(0, 6, 2, 16)
    assert segments(q, k, v, [0], []).shape == segments(q, k, v, [0, 0], [-1]).shape == (0, 6, 16)
