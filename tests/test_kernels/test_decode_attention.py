"""Attention over cached levels against one naive softmax a row; alone or in a crowd; and a cache in
use against the packed whole. The kernels themselves run under the interpreter and on a GPU."""

import math
from itertools import accumulate

import numpy as np
import pytest
import torch
from oracle import FP32, INTERPRETED, KINDS, gappy, no_worse_than_plain, off, spread, strided
from torch import Tensor

from kernels.attention import segments
from kernels.decode_attention import decode_attention, kernel_serves, visible_positions
from nanopersrm.model.cache import KVCache

KERNEL = pytest.mark.skipif(not INTERPRETED, reason="of the kernels")

# capacity, and for each row its node and how much of it the row sees; one dictionary a level
ROOT = {"capacity": 9, "owners": [0], "ends": [9]}
SHARED = {"capacity": 300, "owners": [0] * 7, "ends": [300, 257, 256, 128, 129, 1, 31]}
CROWD = {"capacity": 40, "owners": [0] * 12, "ends": [33, *[40, 7, 1] * 3, 39, 32]}
UNEVEN = {"capacity": 130, "owners": [2, 0, 2, 4, 2, 0, 4], "ends": [5, 1, 130, 64, 65, 63, 2]}
OWN = {"capacity": 50, "owners": [*range(7)], "ends": [1, 50, 3, 49, 17, 32, 33]}
LEVELS = [[ROOT], [SHARED], [CROWD], [OWN], [OWN, SHARED], [OWN, UNEVEN, SHARED]]
HEADS = [(1, 1, 8), (6, 2, 24), (14, 2, 16), (7, 1, 128)]  # H, K, E


def nodes(level: dict) -> int:
    return max(level["owners"]) + 1


def slabs(levels: list[dict], K: int, E: int, dtype: torch.dtype) -> list[Tensor]:
    """Keys and values of each level, one after the other."""
    return [
        spread(nodes(level), K, level["capacity"], E, dtype=dtype, seed=seed + 2 * i + 1, size=1.5)
        for i, level in enumerate(levels)
        for seed in (0, 1)
    ]


def attend(
    q: Tensor, slabs: tuple[Tensor, ...], levels: list[dict], decoding: bool = True
) -> Tensor:
    """`decode_attention` with what each row sees as the cache would make it."""
    group = q.shape[1] // slabs[0].shape[1]
    seen = [
        visible_positions(
            level["owners"], level["ends"], len(keys), level["capacity"], group, q, decoding,
            len(set(level["owners"])) == len(q),
        )
        for level, keys in zip(levels, slabs[::2], strict=True)
    ]  # fmt: skip
    return decode_attention(q, list(zip(slabs[::2], slabs[1::2], seen, strict=True)))


def plain(q: Tensor, slabs: tuple[Tensor, ...], levels: list[dict]) -> Tensor:
    """One softmax a row over all it sees, nothing shared."""
    N, H, E = q.shape
    out = []
    for i in range(N):
        keys, values = (
            torch.cat([x[le["owners"][i], :, : le["ends"][i]] for le, x in paired], 1)
            for paired in (list(zip(levels, slabs[kind::2], strict=True)) for kind in (0, 1))
        )  # (K, T, E)
        keys, values = (x.repeat_interleave(H // len(x), 0) for x in (keys, values))
        scores = (keys @ q[i, :, :, None])[..., 0] / math.sqrt(E)
        out.append((scores.softmax(-1)[:, None] @ values)[:, 0])
    return torch.stack(out)


def check(levels, heads, device, dtype, layout=Tensor.contiguous, decoding=True) -> None:
    H, K, E = heads
    q = layout(spread(len(levels[0]["owners"]), H, E, dtype=dtype, size=1.5))
    with torch.no_grad():
        no_worse_than_plain(
            lambda q, *slabs: attend(q, slabs, levels, decoding),
            lambda q, *slabs: plain(q, slabs, levels),
            [q, *slabs(levels, K, E, dtype)],
            device,
        )


@pytest.mark.parametrize(("device", "dtype"), KINDS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("levels", LEVELS)
def test_no_worse_than_plain_pytorch(levels, heads, device, dtype):
    check(levels, heads, device, dtype)


@pytest.mark.parametrize(("device", "dtype"), KINDS)
@pytest.mark.parametrize("layout", [strided, gappy])
def test_strided_rows(device, dtype, layout):
    check([OWN, SHARED], HEADS[1], device, dtype, layout)


@pytest.mark.parametrize(("device", "dtype"), KINDS)
def test_one_split_when_not_decoding(device, dtype):
    check([CROWD], HEADS[2], device, dtype, decoding=False)
    check([OWN, SHARED], HEADS[1], device, dtype, decoding=False)


def test_worked_example():
    """A level of score 0 and one of score log 3 weigh 1/4 and 3/4."""
    q = torch.tensor([[[math.sqrt(2.0), 0.0]]])
    slabs = []
    for score, value in ((0.0, 8.0), (math.log(3), 16.0)):
        slabs += [torch.tensor([[[[score, 5.0]]]]), torch.full((1, 1, 1, 2), value)]
    level = {"capacity": 1, "owners": [0], "ends": [1]}
    assert torch.allclose(attend(q, tuple(slabs), [level, level]), torch.full((1, 1, 2), 14.0))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_do_not_vanish(bad, which):
    """One key or value of the shared level is not finite: nobody who sees it may look healthy."""
    levels = [OWN, SHARED]
    q, slab = spread(7, 6, 24), slabs(levels, 2, 24, FP32)
    slab[2 + which][0, :, 200] = bad
    q = q.abs()  # so that an infinite key has an infinite score
    healthy = attend(q, tuple(slab), levels).isfinite().any(-1).any(-1)
    assert not any(ok for ok, end in zip(healthy, SHARED["ends"], strict=True) if end > 200)


@KERNEL
@pytest.mark.parametrize("levels", [[SHARED], [OWN, UNEVEN, SHARED]])
def test_neighbours_do_not_move_a_bit(levels, monkeypatch):
    """A row alone, its levels' nodes and capacity as before, is the row in the crowd. numpy's
    product sums in an order of its own at the edges of a tile; one in order replaces it here."""
    in_order = lambda a, b, dtype: (a[:, :, None] * b).sum(1, dtype=dtype)  # noqa: E731
    monkeypatch.setattr(np, "matmul", in_order)
    q, slab = spread(7, 6, 24), slabs(levels, 2, 24, FP32)
    together = attend(q, tuple(slab), levels)
    for i in (0, 3, 5):
        alone = [
            visible_positions(
                [le["owners"][i]], [le["ends"][i]], nodes(le), le["capacity"], 3, q, True,
                le is OWN,
            )
            for le in levels
        ]  # fmt: skip
        row = decode_attention(q[i : i + 1], list(zip(slab[::2], slab[1::2], alone, strict=True)))
        assert torch.equal(row[0], together[i]), f"row {i}"


@pytest.mark.parametrize(("device", "dtype"), KINDS)
@pytest.mark.parametrize("feeds", [[[1, 1, 1]], [[4, 1, 3]], [[2, 0, 1], [0, 1, 0], [1, 1, 1]]])
def test_a_cache_in_use_is_the_packed_whole(feeds, device, dtype):
    """A root of 5, two prompts of 3 and 6, three replies fed by turns; every row at every turn is
    what `segments` makes of the whole texts, packed."""
    H, K, E = 6, 2, 16
    steps = [([0], [[5]]), ([0, 0], [[3, 6]]), ([1, 0, 1], feeds)]  # parents, lengths of each turn
    totals = [sum(new) for _, turns in steps for new in zip(*turns, strict=True)]
    starts, parents = [0, *accumulate(totals)], [-1, 0, 0, 2, 1, 2]
    q, k, v = (
        spread(starts[-1], heads, E, dtype=dtype, seed=s, size=1.5).to(device)
        for s, heads in enumerate((H, K, K))
    )
    whole = segments(q, k, v, starts, parents)
    truth = segments(*(x.double() for x in (q, k, v)), starts, parents)
    cache, first = KVCache(1, H, K, E, q), 0
    for above, turns in steps:
        cache.grow(above, 12)
        done = [0] * len(above)
        for lengths in turns:
            rows = torch.cat(
                [
                    torch.arange(starts[first + i] + done[i], starts[first + i] + done[i] + new)
                    for i, new in enumerate(lengths)
                ]
            ).to(device)
            step = cache.step(lengths)
            assert step.fresh == (not any(done) and not kernel_serves(q))
            step.write(0, k[rows], v[rows])
            out = step.attend(0, q[rows], k[rows], v[rows])
            allowed = 2 * off(whole[rows], truth[rows]) + 4 * torch.finfo(dtype).eps
            assert off(out, truth[rows]) <= allowed
            done = [have + new for have, new in zip(done, lengths, strict=True)]
        first += len(above)
