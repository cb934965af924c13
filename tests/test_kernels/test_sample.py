"""Drawing: is it the right distribution, does a draw depend on its own key only, and do the kernels
draw what the reference draws?

Statistics use fixed keys, so each test gives the same number every time. Their bounds are 4 to 5
standard deviations: a sound generator passes with nearly every choice of keys. They need thousands
of rows, so they are asked of the reference; the kernels then have to agree with it, row by row.
"""

import math

import pytest
import torch
from oracle import FP32, INTERPRETED, NO_GPU, gappy, no_worse_than_plain, spread, strided
from test_sample_noise import keys_of, surprise
from torch import Tensor

import kernels.sample
from kernels.sample import draw_key, sample, sample_reference, uniform

DRAWS = 40_000
INF = float("inf")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


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


def test_draws_along_positions_follow_softmax():
    """One reply, token after token: the position is the only thing that changes."""
    p = torch.tensor([0.7, 0.2, 0.1])
    rows = [draw_key(3, 12345678901234567890, position) for position in range(20_000)]
    ids, _ = sample_reference(
        p.log().expand(20_000, -1), torch.tensor(rows, dtype=torch.int32), 1.0
    )
    assert surprise(ids, p) < 4
    pairs = ids[:-1] * 3 + ids[1:]  # neighbours are independent of each other
    assert surprise(pairs, torch.outer(p, p).flatten()) < 4


def test_where_a_token_stands_does_not_matter(keys):
    """Equal logits over a wide vocabulary: every eighth of it is drawn alike."""
    ids, _ = sample_reference(torch.zeros(1, 4096).expand(5000, -1), keys[:5000], 1.0)
    assert surprise(ids // 512, torch.full((8,), 1 / 8)) < 4
    assert surprise(ids % 8, torch.full((8,), 1 / 8)) < 4


def test_worked_example():
    """p = (0.7, 0.3), E = (1.4, 0.3): the second is drawn; the op agrees on its own numbers."""
    p = torch.tensor([[0.7, 0.3]])
    assert (p / torch.tensor([[1.4, 0.3]])).argmax() == 1
    rows = 20 if INTERPRETED else 500
    keys = keys_of(rows)
    noise = -uniform(keys, 2).double().log()
    expected = (p.double() / noise).argmax(-1)
    ids, _ = sample(p.log().expand(rows, -1), keys, 1.0)
    assert torch.equal(ids, expected)
    gumbel = (p.double().log() - noise.log()).argmax(-1)
    assert torch.equal(ids, gumbel)


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
    for seed in range(4):
        ids, _ = sample(logits, keys_of(3, seed), 0)
        assert ids.tolist() == [1, 2, 0]


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


def test_logits_of_any_size(keys):
    """Only differences matter: neither overflow nor underflow."""
    p = torch.tensor([0.5, 0.3, 0.2])
    for shift in (-1e4, 1e4):
        ids, log_probs = sample_reference((p.log() + shift).expand(DRAWS, -1), keys, 1.0)
        assert surprise(ids, p) < 5  # fp32 holds 1e4 plus a logit to 5e-4
        assert log_probs.isfinite().all()
        some, _ = sample((p.log() + shift).expand(5, -1), keys[:5], 1.0)
        assert torch.equal(some, ids[:5])


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


def test_more_splits_than_sixteen(monkeypatch):
    """Some of the 32 that come of 17 lie past the end; the best may lie in the last inside."""
    monkeypatch.setattr(kernels.sample, "SPLIT", 8)
    logits = spread(1, 131, size=2) - 200
    logits[0, 130] = 3
    assert sample(logits, keys_of(1), 0)[0].tolist() == [130]
    ids, log_probs = sample(logits, keys_of(1), 1.0)
    assert (ids.tolist(), log_probs.tolist()) == ([130], [0.0])
    logits[0, 130] = -INF
    ids, log_probs = sample(logits, keys_of(1), 1.0)
    expected = sample_reference(logits, keys_of(1), 1.0)
    assert torch.equal(ids, expected[0])
    assert torch.allclose(log_probs, expected[1])


def test_a_row_does_not_depend_on_the_batch(monkeypatch):
    monkeypatch.setattr(kernels.sample, "SPLIT", 64)
    logits, keys = spread(3, 90, size=3), keys_of(3)
    ids, log_probs = sample(logits, keys, 0.9)
    for i in range(3):
        alone = sample(logits[i : i + 1], keys[i : i + 1], 0.9)
        assert torch.equal(alone[0], ids[i : i + 1])
        assert torch.equal(alone[1], log_probs[i : i + 1])


def test_the_reference_in_parts(monkeypatch):
    """Hashing a few rows at a time changes nothing."""
    logits, keys = spread(7, 96), keys_of(7)
    whole = sample_reference(logits, keys, 0.9)
    monkeypatch.setattr(kernels.sample, "AT_ONCE", 200)
    assert all(map(torch.equal, whole, sample_reference(logits, keys, 0.9)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_rows_and_rows_of_nothing(temperature):
    ids, log_probs = sample(torch.empty(0, 9), torch.empty(0, 2, dtype=torch.int32), temperature)
    assert (ids.shape, ids.dtype) == ((0,), torch.int64)
    assert (log_probs.shape, log_probs.dtype) == ((0,), FP32)
    for nothing in (-INF, float("nan")):
        ids, log_probs = sample(torch.full((2, 9), nothing), keys_of(2), temperature)
        assert ((ids >= 0) & (ids < 9)).all()  # still the name of a token
        assert log_probs.isnan().all()


def test_refuses_other_shapes_and_types():
    with pytest.raises(AssertionError, match=r"keys \(3, 2\), got"):
        sample(torch.zeros(3, 4), keys_of(2), 1.0)
    with pytest.raises(AssertionError, match=r"float32, got torch\.float64"):
        sample(torch.zeros(3, 4).double(), keys_of(3), 1.0)
    with pytest.raises(AssertionError, match=r"int32, got torch\.int64"):
        sample(torch.zeros(3, 4), keys_of(3).long(), 1.0)
