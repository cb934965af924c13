"""The noise of a draw: is it uniform, are its keys distinct, and has the kernel the same bits?

Statistics use fixed keys; their bounds are 4 to 5 standard deviations, as in `test_sample.py`.
"""

import math
from itertools import pairwise, product

import pytest
import torch
from oracle import INTERPRETED, NO_GPU
from torch import Tensor

from kernels._dispatch import jit, tl, triton
from kernels.sample import ROUND_2, _uniform, draw_key, uniform


def keys_of(count: int, seed: int = 0, position: int = 0) -> Tensor:
    """The keys of `count` samples."""
    rows = [draw_key(seed, number, position) for number in range(count)]
    return torch.tensor(rows, dtype=torch.int32)


def surprise(ids: Tensor, p: Tensor) -> float:
    """Pearson's chi-square of the counts, in standard deviations (Wilson and Hilferty, 1931)."""
    counts, expected = torch.bincount(ids, minlength=len(p)).double(), p.double() * len(ids)
    assert expected.min() >= 5, "a cell too rare for the test"
    chi2, k = ((counts - expected) ** 2 / expected).sum().item(), len(p) - 1
    return ((chi2 / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))


def test_uniform_lies_strictly_inside():
    u = uniform(keys_of(4000), 300)
    assert u.dtype == torch.float32
    assert u.min() > 0
    assert u.max() < 1
    assert u.min() < 1e-5  # both ends are reached
    assert u.max() > 1 - 1e-5


def test_uniform_at_its_ends():
    """Keys whose last hash words are the smallest, middle and largest 32-bit integers.

    Element 0 of a row with a first key of 0 is a hash of the second key alone, and the last rounds,
    w = k · ROUND_2 and w ^ (w >>> 16), can be undone."""
    for word, expected in ((0x80000000, 2.0**-23), (0, 0.5), (0x7FFFFFFF, 1 - 2.0**-23)):
        before = word ^ (word >> 16)
        key = before * pow(ROUND_2, -1, 1 << 32) & 0xFFFFFFFF
        key -= (key >> 31) << 32
        u = uniform(torch.tensor([[0, key]], dtype=torch.int32), 1)
        assert u.item() == pytest.approx(expected, abs=2.0**-24)
        assert 0 < u.item() < 1


@pytest.mark.parametrize("moving", ["seed", "sample", "position"])
def test_uniform_is_uniform_over_neighbouring_keys(moving):
    """2,000 rows whose keys differ by one in one part, 100 columns."""
    rows = []
    for i in range(2000):
        parts = {"seed": 5, "sample": 77, "position": 3, moving: i}
        rows.append(draw_key(**parts))
    u = uniform(torch.tensor(rows, dtype=torch.int32), 100).double()
    n = u.numel()
    assert u.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / n))
    assert u.var().item() == pytest.approx(1 / 12, abs=4 * math.sqrt(1 / 180 / n))
    cells = (u.flatten() * 64).long()
    assert surprise(cells, torch.full((64,), 1 / 64)) < 4
    z = (u - 0.5) * math.sqrt(12)
    for lag in (1, 2, 3, 16):
        assert abs((z[lag:] * z[:-lag]).mean().item()) < 4.5 / math.sqrt(n)  # down the rows
        assert abs((z[:, lag:] * z[:, :-lag]).mean().item()) < 4.5 / math.sqrt(n)  # along a row
    assert (z.mean(0).abs() < 5 / math.sqrt(2000)).all()  # no column leans
    assert (z.mean(1).abs() < 5 / math.sqrt(100)).all()


def test_every_bit_of_a_draw_is_even():
    """The upper 16 bits of u, one by one: each is set in half of the draws."""
    u = uniform(keys_of(2000), 100)
    bits = (u.double() * 2**16).long()
    for place in range(16):
        share = ((bits >> place) & 1).double().mean().item()
        assert share == pytest.approx(0.5, abs=4.5 * 0.5 / math.sqrt(u.numel()))


def test_both_words_of_a_key_count():
    """Rows that agree in one word only have nothing to do with each other."""
    (a, b), (c, d) = draw_key(0, 0, 0), draw_key(0, 1, 0)
    u = uniform(torch.tensor([[a, b], [a, d], [c, b]], dtype=torch.int32), 2000).double()
    correlations = torch.corrcoef(u).fill_diagonal_(0)
    assert correlations.abs().max().item() < 4.5 / math.sqrt(2000)


def test_a_wider_vocabulary_keeps_the_noise():
    keys = keys_of(7)
    assert torch.equal(uniform(keys, 100)[:, :33], uniform(keys, 33))


@jit
def _noise_kernel(Keys, U, V, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    u = _uniform(columns, tl.load(Keys + row * 2), tl.load(Keys + row * 2 + 1))
    tl.store(U + row * V + columns, u, mask=columns < V)


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="of the kernel")),
        pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU]),
    ],
)
def test_noise_has_the_same_bits(device):
    keys = keys_of(20, seed=6).to(device)
    u = torch.empty(20, 5000, device=device)
    _noise_kernel[(20,)](keys, u, 5000, BLOCK=triton.next_power_of_2(5000))
    assert torch.equal(u, uniform(keys, 5000))
    assert torch.equal(u.cpu(), uniform(keys.cpu(), 5000))


def test_draw_keys_are_int32_and_distinct():
    edges = (0, 1, 2, 3, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) + 1, (1 << 64) - 1)
    grid = list(product(edges, edges, edges)) + list(product((0,), range(40), range(200)))
    found = {draw_key(*parts) for parts in grid}
    assert len(found) == len(set(grid))
    for word in (word for key in found for word in key):
        assert -(1 << 31) <= word < 1 << 31
    assert len({key[0] for key in found}) > len(found) - 5  # either word alone is nearly a name
    assert len({key[1] for key in found}) > len(found) - 5
    torch.tensor(sorted(found), dtype=torch.int32)


def test_draw_key_tells_its_parts_apart():
    assert len({draw_key(a, b, c) for a, b, c in ((1, 2, 3), (2, 1, 3), (3, 2, 1), (1, 3, 2))}) == 4
    assert draw_key(-1, 0, 0) == draw_key((1 << 64) - 1, 0, 0)
    steps = [draw_key(0, 0, position)[0] & 0xFFFFFFFF for position in range(4000)]
    changed = [bin(a ^ b).count("1") for a, b in pairwise(steps)]
    assert sum(changed) / len(changed) == pytest.approx(16, abs=0.25)  # half of 32 bits
