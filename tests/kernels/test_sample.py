"""Drawing: is it the right distribution, and does a draw depend on its own key only?

Statistics use fixed keys, so each test gives the same number every time. Their bounds are 4 to 5
standard deviations: a sound generator passes with nearly every choice of keys.
"""

import math
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from kernels.sample import ROUND_2, draw_key, sample, uniform

DRAWS = 40_000
INF = float("inf")


def keys_of(count: int, seed: int = 0, position: int = 0) -> Tensor:
    """The keys of `count` samples."""
    rows = [draw_key(seed, number, position) for number in range(count)]
    return torch.tensor(rows, dtype=torch.int32)


@pytest.fixture(scope="module")
def keys() -> Tensor:
    return keys_of(DRAWS)


def surprise(ids: Tensor, p: Tensor) -> float:
    """Pearson's chi-square of the counts, in standard deviations (Wilson and Hilferty, 1931)."""
    counts, expected = torch.bincount(ids, minlength=len(p)).double(), p.double() * len(ids)
    assert expected.min() >= 5, "a cell too rare for the test"
    chi2, k = ((counts - expected) ** 2 / expected).sum().item(), len(p) - 1
    return ((chi2 / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("width", [2, 3, 9, 60])
def test_draws_follow_softmax(width, temperature, keys):
    torch.manual_seed(width)
    logits = torch.rand(width) * 2  # the rarest is drawn ten times
    p = (logits / temperature).double().softmax(-1)
    ids, _ = sample(logits.expand(DRAWS, -1), keys, temperature)
    assert surprise(ids, p) < 4


def test_draws_along_positions_follow_softmax():
    """One reply, token after token: the position is the only thing that changes."""
    p = torch.tensor([0.7, 0.2, 0.1])
    rows = [draw_key(3, 12345678901234567890, position) for position in range(20_000)]
    ids, _ = sample(p.log().expand(20_000, -1), torch.tensor(rows, dtype=torch.int32), 1.0)
    assert surprise(ids, p) < 4
    pairs = ids[:-1] * 3 + ids[1:]  # neighbours are independent of each other
    assert surprise(pairs, torch.outer(p, p).flatten()) < 4


def test_where_a_token_stands_does_not_matter(keys):
    """Equal logits over a wide vocabulary: every eighth of it is drawn alike."""
    ids, _ = sample(torch.zeros(1, 4096).expand(5000, -1), keys[:5000], 1.0)
    assert surprise(ids // 512, torch.full((8,), 1 / 8)) < 4
    assert surprise(ids % 8, torch.full((8,), 1 / 8)) < 4


def test_worked_example():
    """p = (0.7, 0.3), E = (1.4, 0.3): the second is drawn; the op agrees on its own numbers."""
    p = torch.tensor([[0.7, 0.3]])
    assert (p / torch.tensor([[1.4, 0.3]])).argmax() == 1
    keys = keys_of(500)
    noise = -uniform(keys, 2).double().log()
    expected = (p.double() / noise).argmax(-1)
    ids, _ = sample(p.log().expand(500, -1), keys, 1.0)
    assert torch.equal(ids, expected)
    gumbel = (p.double().log() - noise.log()).argmax(-1)
    assert torch.equal(ids, gumbel)


def test_a_draw_depends_on_its_key_only():
    torch.manual_seed(0)
    logits, keys = torch.randn(64, 50), keys_of(64)
    before = logits.clone()
    ids, log_probs = sample(logits, keys, 1.3)
    assert torch.equal(logits, before)
    again, _ = sample(logits, keys, 1.3)
    assert torch.equal(ids, again)
    order = torch.randperm(64)
    shuffled, moved = sample(logits[order], keys[order], 1.3)
    assert torch.equal(shuffled, ids[order])
    assert torch.allclose(moved, log_probs[order], atol=1e-6)
    for i in (0, 31, 63):
        alone, _ = sample(logits[i : i + 1], keys[i : i + 1], 1.3)
        assert alone.tolist() == ids[i : i + 1].tolist()
    other, _ = sample(logits, keys_of(64, seed=1), 1.3)
    assert not torch.equal(ids, other)


def test_both_words_of_a_key_count():
    """Rows that agree in one word only have nothing to do with each other."""
    (a, b), (c, d) = draw_key(0, 0, 0), draw_key(0, 1, 0)
    u = uniform(torch.tensor([[a, b], [a, d], [c, b]], dtype=torch.int32), 2000).double()
    correlations = torch.corrcoef(u).fill_diagonal_(0)
    assert correlations.abs().max().item() < 4.5 / math.sqrt(2000)


def test_a_wider_vocabulary_keeps_the_noise():
    keys = keys_of(7)
    assert torch.equal(uniform(keys, 100)[:, :33], uniform(keys, 33))


def test_strided_and_broadcast_logits():
    torch.manual_seed(1)
    wide, keys = torch.randn(9, 40), keys_of(9)
    ids, log_probs = sample(wide[:, ::2], keys, 0.8)
    same, values = sample(wide[:, ::2].contiguous(), keys, 0.8)
    assert torch.equal(ids, same)
    assert torch.equal(log_probs, values)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 3.0])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 77), (13, 501)])
def test_log_prob_is_that_of_the_drawn_id(rows, width, temperature):
    torch.manual_seed(width)
    logits = torch.randn(rows, width) * 4
    ids, log_probs = sample(logits, keys_of(rows), temperature)
    assert ids.shape == log_probs.shape == (rows,)
    assert (ids.dtype, log_probs.dtype) == (torch.int64, torch.float32)
    told = (logits / (temperature or 1)).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    truth = (logits.double() / (temperature or 1)).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    error = (log_probs.double() - truth).abs().max().item()
    assert error <= 2 * (told.double() - truth).abs().max().item() + 1e-6


def test_temperature_zero_takes_the_largest():
    logits = torch.tensor([[1.0, 5.0, 5.0 - 1e-5], [-3.0, -2.0, -1.0], [7.0, 0.0, -INF]])
    for seed in range(20):
        ids, _ = sample(logits, keys_of(3, seed), 0)
        assert ids.tolist() == [1, 2, 0]


def test_forbidden_tokens_are_never_drawn(keys):
    logits = torch.zeros(1, 32)
    logits[0, 1::2] = -INF
    ids, log_probs = sample(logits.expand(5000, -1), keys[:5000], 2.0)
    assert (ids % 2 == 0).all()
    assert surprise(ids // 2, torch.full((16,), 1 / 16)) < 4
    assert log_probs.tolist() == pytest.approx([-math.log(16)] * 5000, abs=1e-5)
    only = torch.full((200, 9), -INF)
    only[:, 4] = -50.0
    ids, log_probs = sample(only, keys[:200], 1.0)
    assert set(ids.tolist()) == {4}
    assert log_probs.abs().max() == 0


def test_logits_of_any_size(keys):
    """Only differences matter: neither overflow nor underflow."""
    p = torch.tensor([0.5, 0.3, 0.2])
    for shift in (-1e4, 1e4):
        ids, log_probs = sample((p.log() + shift).expand(DRAWS, -1), keys, 1.0)
        assert surprise(ids, p) < 5  # fp32 holds 1e4 plus a logit to 5e-4
        assert log_probs.isfinite().all()


def test_uniform_lies_strictly_inside(keys):
    u = uniform(keys[:4000], 300)
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
