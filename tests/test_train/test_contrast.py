"""The contrast by hand, against plain loops, and where a model is sure of itself."""

import math

import pytest
import torch
from torch import Tensor

from nanopersrm.train.contrast import contrast, log_odds


def random(*shape: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def slowly(
    s: list[float],
    lists: list[tuple[int, int, int]],
    weights: list[float],
    pair: float,
    listed: float,
) -> float:
    """Both losses with probabilities and nothing else."""
    total = 0.0
    for (first, count, chosen), weight in zip(lists, weights, strict=True):
        own = s[first : first + count]
        share = math.exp(own[chosen]) / sum(math.exp(x) for x in own)
        rivals = [x for k, x in enumerate(own) if k != chosen]
        lost = [-math.log(1 / (1 + math.exp(x - own[chosen]))) for x in rivals]
        mean = sum(lost) / len(lost) if lost else 0.0
        total += weight * (listed * -math.log(share) + pair * mean)
    return total


def test_the_worked_example():
    z = torch.zeros(2, 9)
    z[1, 8] = math.log(5)
    s = log_odds(z)
    assert s.tolist() == pytest.approx([0.0, math.log(2)], abs=1e-6)
    ones = torch.ones(1)
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)):
        loss, right = contrast(s, [(0, 2, 1)], ones, *weights)
        assert float(loss) == pytest.approx(math.log(3 / 2), abs=1e-6)  # 0.405
        assert right.tolist() == [True]
    assert float(contrast(s, [(0, 2, 0)], ones, 1.0, 0.0)[0]) == pytest.approx(
        math.log(3), abs=1e-6
    )


def test_five_takes_no_side():
    z = random(4, 9)
    raised = z.clone()
    raised[:, 4] += 50
    torch.testing.assert_close(log_odds(z), log_odds(raised), rtol=0, atol=0)
    torch.testing.assert_close(log_odds(z), log_odds(z + 7.5), rtol=0, atol=1e-12)  # no normaliser
    torch.testing.assert_close(log_odds(z), -log_odds(z.flip(-1)), rtol=0, atol=1e-12)


LISTS = [(0, 4, 2), (4, 1, 0), (5, 2, 1), (8, 3, 0)]  # one candidate alone; 7 is of no list
WEIGHTS = [1.0, 3.0, 0.5, 2.0]


@pytest.mark.parametrize(("pair", "listed"), [(1.0, 0.0), (0.0, 1.0), (0.3, 0.9)])
def test_equals_plain_loops(pair, listed):
    s = random(11)
    loss, right = contrast(s, LISTS, torch.tensor(WEIGHTS), pair, listed)
    assert float(loss) == pytest.approx(slowly(s.tolist(), LISTS, WEIGHTS, pair, listed), rel=1e-9)
    own = s.tolist()
    assert right.tolist() == [
        all(own[first + chosen] > own[first + k] for k in range(count) if k != chosen)
        for first, count, chosen in LISTS
    ]


def test_gradients_against_finite_differences():
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)

    def loss(z: Tensor) -> Tensor:
        return contrast(log_odds(z), LISTS, weights, 0.4, 0.7)[0]

    z = random(11, 9).requires_grad_()
    assert torch.autograd.gradcheck(loss, (z,))
    loss(z).backward()
    assert z.grad is not None
    assert not z.grad[[4, 7]].any()  # a list of one, and a row of no list
    assert not z.grad[:, 4].any()


def test_sums_of_parts_and_weights():
    """Two lists are the sum of each alone; weight 2 is the list twice, weight 0 nothing."""
    s = random(7)
    one, two = (0, 3, 1), (3, 4, 0)

    def of(lists: list[tuple[int, int, int]], *weights: float) -> float:
        return float(contrast(s, lists, torch.tensor(weights), 0.5, 0.5)[0])

    assert of([one, two], 1, 1) == pytest.approx(of([one], 1) + of([two], 1), rel=1e-12)
    assert of([one, two], 2, 1) == pytest.approx(of([one, one, two], 1, 1, 1), rel=1e-12)
    assert of([one, two], 0, 1) == of([two], 1)


def test_equal_scores_are_not_right():
    loss, right = contrast(torch.zeros(4), [(0, 2, 0), (2, 2, 1)], torch.ones(2), 0.5, 0.5)
    assert right.tolist() == [False, False]
    assert float(loss) == pytest.approx(2 * math.log(2))


def test_nothing_is_zero():
    loss, right = contrast(torch.zeros(3), [], torch.zeros(0), 0.5, 0.5)
    assert (float(loss), right.tolist(), right.dtype) == (0.0, [], torch.bool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", [60.0, 400.0, 2000.0])
def test_a_sure_model_still_learns(dtype, lead):
    """Both candidates stand at 9 by far, the wrong one further: the slope is there in full.

    The expected digit would have none: 9 - 9 = 0.
    """
    z = torch.zeros(2, 9, dtype=dtype)
    z[0, 8], z[1, 8] = lead, lead + lead / 4
    z.requires_grad_()
    s = log_odds(z)
    assert s.dtype == torch.float32
    loss, right = contrast(s, [(0, 2, 0)], torch.ones(1), 0.5, 0.5)
    loss.backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()
    assert loss.item() == pytest.approx(lead / 4, rel=1e-2)
    assert float(z.grad[0, 8]) == pytest.approx(-1.0, abs=1e-2)
    assert float(z.grad[1, 8]) == pytest.approx(1.0, abs=1e-2)
    assert right.tolist() == [False]


def test_a_lead_that_is_large_enough_is_left_alone():
    s = torch.tensor([300.0, 0.0, -300.0], requires_grad=True)
    loss, right = contrast(s, [(0, 3, 0)], torch.ones(1), 0.5, 0.5)
    loss.backward()
    assert s.grad is not None
    assert loss.item() == 0.0
    assert s.grad.tolist() == pytest.approx([0.0] * 3, abs=1e-30)
    assert right.tolist() == [True]


def test_more_of_the_right_digit_is_less_loss():
    z = random(3, 9, seed=3)
    z.requires_grad_()
    loss, _ = contrast(log_odds(z), [(0, 3, 1)], torch.ones(1), 0.5, 0.5)
    (slope,) = torch.autograd.grad(loss, z)
    assert (slope[1, 5:] < 0).all()
    assert (slope[1, :4] > 0).all()
    assert (slope[[0, 2]][:, 5:] > 0).all()
    assert (slope[[0, 2]][:, :4] < 0).all()
    torch.testing.assert_close(
        slope.sum(-1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    ("fault", "call"),
    [
        ("expected \\(n, 9\\)", lambda: log_odds(torch.zeros(9))),
        ("expected \\(n, 9\\)", lambda: log_odds(torch.zeros(2, 10))),
        ("0 weights for 1", lambda: contrast(torch.zeros(2), [(0, 2, 0)], torch.zeros(0), 1, 1)),
        ("candidate 2 of 2", lambda: contrast(torch.zeros(2), [(0, 2, 2)], torch.ones(1), 1, 1)),
        ("candidate -1 of 2", lambda: contrast(torch.zeros(2), [(0, 2, -1)], torch.ones(1), 1, 1)),
    ],
)
def test_what_makes_no_sense_is_refused(fault, call):
    with pytest.raises(AssertionError, match=fault):
        call()
