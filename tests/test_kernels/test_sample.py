"""Drawing: is the noise uniform, is it the right distribution, does a draw depend on its own key
only, and do the kernels draw what the reference draws?

Statistics use fixed keys, so each test gives the same number every time. Their bounds are 4 to 5
standard deviations: a sound generator passes with nearly every choice of keys. They need thousands
of rows, so they are asked of the reference; the kernels then have to agree with it, row by row.
"""

import math
from itertools import product

import pytest
import torch
from oracle import FP32, INTERPRETED, NO_GPU, gappy, no_worse_than_plain, spread, strided
from torch import Tensor

import kernels.sample
from kernels._dispatch import jit, tl, triton
from kernels.sample import ROUND_2, _uniform, draw_key, sample, sample_reference, uniform

DRAWS = 40_000
INF = float("inf")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


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


@pytest.fixture(scope="module")
def keys() -> Tensor:
    return keys_of(DRAWS)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("width", [2, 3, 9, 60])
def test_draws_follow_softmax(width, temperature, keys):
    torch.manual_seed(width)
    logits = torch.rand(width) * 2  # the rarest is drawn ten times
    p = (logits / temperature).double().softmax(-1)
    ids, _ = sample_reference(logits.expand(DRAWS, -1), keys, temperature)
    assert surprise(ids, p) < 4


def test_a_draw_depends_on_its_key_only():
    torch.manual_seed(0)
    logits, keys = torch.randn(12, 50), keys_of(12)
    before = logits.clone()
    ids, log_probs = sample(logits, keys, 1.3)
    assert torch.equal(logits, before)
    again, _ = sample(logits, keys, 1.3)
    assert torch.equal(ids, again)
    order = torch.randperm(12)
    shuffled, moved = sample(logits[order], keys[order], 1.3)
    assert torch.equal(shuffled, ids[order])
    assert torch.allclose(moved, log_probs[order], atol=1e-6)
    for i in (0, 5, 11):
        alone, _ = sample(logits[i : i + 1], keys[i : i + 1], 1.3)
        assert alone.tolist() == ids[i : i + 1].tolist()
    other, _ = sample(logits, keys_of(12, seed=1), 1.3)
    assert not torch.equal(ids, other)


def test_forbidden_tokens_are_never_drawn(keys):
    logits = torch.zeros(1, 32)
    logits[0, 1::2] = -INF
    ids, log_probs = sample_reference(logits.expand(5000, -1), keys[:5000], 2.0)
    assert (ids % 2 == 0).all()
    assert surprise(ids // 2, torch.full((16,), 1 / 16)) < 4
    assert log_probs.tolist() == pytest.approx([-math.log(16)] * 5000, abs=1e-5)
    only = torch.full((10, 9), -INF)
    only[:, 4] = -50.0
    ids, log_probs = sample(only, keys[:10], 1.0)
    assert set(ids.tolist()) == {4}
    assert log_probs.abs().max() == 0
    ids, log_probs = sample(logits.expand(10, -1), keys[:10], 2.0)
    assert (ids % 2 == 0).all()
    assert log_probs.tolist() == pytest.approx([-math.log(16)] * 10, abs=1e-5)


@torch.no_grad()
def plain(logits: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The formula in the type of the logits, in the order of the docstring."""
    scaled = logits / (temperature or 1)
    noise = -(-uniform(keys, logits.shape[1]).to(logits.dtype).log()).log() if temperature else 0
    ids = (scaled + noise).argmax(-1)
    return ids, scaled.log_softmax(-1).gather(-1, ids[:, None])[:, 0]


@pytest.mark.parametrize("layout", [Tensor.contiguous, strided, gappy])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 64), (1, 200)])
def test_no_worse_than_plain_pytorch(shape, device, temperature, layout, monkeypatch):
    """A split of 64: one and several, with a remainder and without."""
    monkeypatch.setattr(kernels.sample, "SPLIT", 64)
    logits, keys = layout(spread(*shape, size=4)), keys_of(shape[0])

    def op(form):
        return lambda logits: form(logits, keys.to(device), temperature)

    no_worse_than_plain(op(sample), op(plain), [logits], device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("split", "temperature"), [(16, 0.5), (64, 1.0), (1024, 2.0)])
def test_draws_what_the_reference_draws(split, temperature, device, monkeypatch):
    """Up to rounding: both winners have (nearly) the largest perturbed logit there is.

    In units of 2⁻²³, a share's logarithm x is off by 3.5 |x| (half a unit for the difference, 2 for
    the GPU's quotient, 1 for the product by log2(e)), then exp 2, log 1 and the division 2. Two
    tokens are compared. A log-probability has x once more, and the mean error of the shares.
    """
    monkeypatch.setattr(kernels.sample, "SPLIT", split)
    rows = 8 if INTERPRETED else 400
    logits, keys = spread(rows, 150, size=3), keys_of(rows, seed=2)
    scaled = (logits - logits.amax(-1, keepdim=True)).double() / temperature
    perturbed = scaled - (-uniform(keys, 150).double().log()).log()
    ids, log_probs = sample(logits.to(device), keys.to(device), temperature)
    same, expected = sample_reference(logits, keys, temperature)
    size = (scaled.softmax(-1) * scaled.abs()).sum(-1)  # the mean |x|
    for found, told in ((ids.cpu(), log_probs.cpu()), (same, expected)):
        two = torch.stack([found, perturbed.argmax(-1)], -1)  # (rows, 2): the drawn and the best
        x = scaled.gather(-1, two)
        lost = perturbed.gather(-1, two).diff()[:, 0]
        assert (lost <= (3.5 * x.abs() + 5).sum(-1) * 2.0**-23).all()
        error = told - (x[:, 0] - scaled.logsumexp(-1))
        assert (error.abs() <= (3.5 * (x[:, 0].abs() + size) + 5) * 2.0**-23).all()
    assert (ids.cpu() == same).double().mean() > 0.99  # such near ties are rare


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_first_of_equals_wins(temperature, monkeypatch):
    """Equal logits in one split and across splits, and noise that cannot tell them apart."""
    monkeypatch.setattr(kernels.sample, "SPLIT", 16)
    logits = torch.full((6, 40), -INF)
    places = [[0, 1], [15, 16], [3, 39], [9, 12], [38, 39], [5, 30]]
    for row, pair in enumerate(places):
        logits[row, pair] = 2.5
    ids, log_probs = sample(logits, keys_of(6), 0)
    assert ids.tolist() == [pair[0] for pair in places]
    assert log_probs.tolist() == pytest.approx([-math.log(2)] * 6)
    ids, _ = sample(torch.zeros(6, 40), keys_of(6), temperature)
    assert torch.equal(ids, sample_reference(torch.zeros(6, 40), keys_of(6), temperature)[0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_rows_and_rows_of_nothing(temperature):
    ids, log_probs = sample(torch.empty(0, 9), torch.empty(0, 2, dtype=torch.int32), temperature)
    assert (ids.shape, ids.dtype) == ((0,), torch.int64)
    assert (log_probs.shape, log_probs.dtype) == ((0,), FP32)
    for nothing in (-INF, float("nan")):
        ids, log_probs = sample(torch.full((2, 9), nothing), keys_of(2), temperature)
        assert ((ids >= 0) & (ids < 9)).all()  # still the name of a token
        assert log_probs.isnan().all()


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
