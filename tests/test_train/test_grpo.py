"""The losses of GRPO and its relatives: against a plain loop with its gradient written out, in
micro-batches, at the edges, and the numbers that are logged."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from nanopersrm.train.grpo import (
    CLIPS,
    GrpoConfig,
    Variant,
    advantages,
    policy_loss,
    statistics,
    token_weights,
)

VARIANTS = tuple(CLIPS)
LENGTHS = (4, 1, 0, 7, 2, 5)  # one reply is empty
LONGEST = 9
A = (0.9, -1.1, 0.4, 0.0, -0.7, 1.3)
OWNER = torch.repeat_interleave(torch.arange(6), torch.tensor(LENGTHS))
N = sum(LENGTHS)


def drawn(seed: int = 0, spread: float = 0.4) -> dict[str, Tensor]:
    """log-probabilities of the same tokens by three models that differ by about `spread`."""
    generator = torch.Generator().manual_seed(seed)
    lp = -torch.rand(N, generator=generator, dtype=torch.float64) * 3
    noise = torch.randn(2, N, generator=generator, dtype=torch.float64) * spread
    return {"lp": lp, "old": lp + noise[0], "sampler": lp + noise[1]}


def ours(variant: Variant, lp: Tensor, **more: Any) -> tuple[Tensor, Tensor, Any]:
    """loss, gradient (N,), measured."""
    leaf, config = lp.clone().requires_grad_(), GrpoConfig(variant=variant)
    w = token_weights(torch.tensor(LENGTHS), LONGEST, config)
    loss, measured = policy_loss(leaf, OWNER, torch.tensor(A).double(), w, config, **more)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient, measured


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def reference_loss(
    variant: Variant, lp: Sequence[float], old: Sequence[float]
) -> tuple[float, list[float]]:
    """Loss and gradient from the papers' formulas, reply by reply, token by token."""
    low, high = 1 - CLIPS[variant][0], 1 + CLIPS[variant][1]
    loss, gradient, start = 0.0, [0.0] * len(lp), 0
    for length, a in zip(LENGTHS, A, strict=True):
        tokens = range(start, start + length)
        start += length
        if variant in ("dapo", "cispo"):
            w = 1 / sum(LENGTHS)
        elif variant == "dr_grpo":
            w = 1 / (len(LENGTHS) * LONGEST)
        else:
            w = 1 / (len(LENGTHS) * max(1, length))
        mean = sum(lp[t] - old[t] for t in tokens) / max(1, length)
        for t in tokens:
            rho = math.exp(mean if variant == "gspo" else lp[t] - old[t])
            if variant == "cispo":
                loss -= w * clip(rho, low, high) * a * lp[t]
                gradient[t] -= w * clip(rho, low, high) * a
            else:
                loss -= w * min(rho * a, clip(rho, low, high) * a)
                free = rho * a <= clip(rho, low, high) * a
                gradient[t] -= w * rho * a if free else 0
    return loss, gradient


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_each_variant_equals_the_loop(variant, first):
    x = drawn()
    loss, gradient, _ = ours(variant, x["lp"], old=None if first else x["old"])
    value, slopes = reference_loss(variant, x["lp"].tolist(), x["lp" if first else "old"].tolist())
    assert loss.item() == pytest.approx(value, rel=1e-6, abs=1e-7)
    assert gradient.tolist() == pytest.approx(slopes, rel=1e-6, abs=1e-8)
    clipped = any(g == 0 and a for g, a in zip(slopes, torch.tensor(A)[OWNER], strict=True))
    assert clipped == (not first and variant != "cispo")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_pass_has_ratio_one_exactly(variant, monkeypatch):
    monkeypatch.setitem(CLIPS, variant, (1e-9, 1e-9))
    _, gradient, measured = ours(variant, drawn()["lp"].float())
    w = token_weights(torch.tensor(LENGTHS), LONGEST, GrpoConfig(variant=variant))
    exact = -(w.double() * torch.tensor(A).double())[OWNER]
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-6, atol=0)
    assert statistics([measured]) == {"clip_low": 0, "clip_high": 0, "ratio": 1}


@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batches_add_up_to_the_step(variant):
    config = GrpoConfig(variant=variant)
    x = drawn()
    known = {"old": x["old"], "sampler": x["sampler"], "entropy": x["old"].neg()}
    whole, gradient, measured = ours(variant, x["lp"], **known)
    w = token_weights(torch.tensor(LENGTHS), LONGEST, config)
    leaf, total, seen = x["lp"].clone().requires_grad_(), 0.0, []
    for replies in ((5, 0), (2,), (1, 3, 4)):  # another order, and one without tokens
        rows = torch.cat([torch.nonzero(OWNER.eq(reply))[:, 0] for reply in replies])
        owner = torch.repeat_interleave(
            torch.arange(len(replies)), torch.tensor([LENGTHS[reply] for reply in replies])
        )
        some = {name: tensor[rows] for name, tensor in known.items()}
        advantage, weight = torch.tensor(A).double()[[*replies]], w[[*replies]]
        loss, part = policy_loss(leaf[rows], owner, advantage, weight, config, **some)
        loss.backward()
        total += loss.item()
        seen.append(part)
    assert total == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(leaf.grad, gradient)
    assert statistics(seen) == pytest.approx(statistics([measured]), rel=1e-12)


def test_the_worked_example():
    lengths, owner = torch.tensor([1, 3]), torch.tensor([0, 1, 1, 1])
    before = torch.tensor([-2.0, -1, -1, -1])
    moved = before + torch.tensor([math.log(1.5), 0, 0, 0])
    first: dict[tuple[Variant, ...], tuple[float, float]] = {
        ("grpo", "gspo", "gdpo"): (-0.354, 0.118),
        ("dr_grpo",): (-0.0625, 0.0625),
        ("dapo", "cispo"): (-0.177, 0.177),
    }
    for names, (up, down) in first.items():
        for name in names:
            config = GrpoConfig(variant=name)
            parts, group = torch.tensor([[1.0], [0.0]]), torch.tensor([0, 0])
            found = advantages(parts, torch.ones(1), group, 1, config)
            w = token_weights(lengths, 4, config)
            later = moved.clone().requires_grad_()
            policy_loss(later, owner, found, w, config, old=before)[0].backward()
            assert later.grad is not None
            assert later.grad[0].item() == pytest.approx(-0.265 if name == "cispo" else 0, abs=5e-4)
            leaf = before.clone().requires_grad_()
            policy_loss(leaf, owner, found, w, config)[0].backward()
            assert leaf.grad is not None
            # gdpo divides once more, by the deviation over this step of one group: here 1.
            assert leaf.grad.tolist() == pytest.approx([up, down, down, down], abs=5e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("far", [1e3, -1e3])
def test_log_probs_far_apart_stay_finite(variant, far):
    lp = drawn()["lp"].float() + min(0.0, far)
    loss, gradient, measured = ours(variant, lp, old=lp - far, sampler=lp + far)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert all(math.isfinite(value) for value in statistics([measured]).values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_tokens_no_loss(variant):
    config = GrpoConfig(variant=variant)
    for lengths in ([], [0, 0]):
        w = token_weights(torch.tensor(lengths, dtype=torch.int64), 4, config)
        assert torch.isfinite(w).all()
        leaf = torch.zeros(0, requires_grad=True)
        none = torch.zeros(0, dtype=torch.int64)
        loss, measured = policy_loss(leaf, none, torch.ones(len(lengths)), w, config)
        loss.backward()
        assert loss.item() == 0
        assert statistics([measured]) == statistics([]) == {}


# What is logged

TWO = torch.tensor([0, 0, 0, 1, 1, 1])  # a good reply, then a bad one
RATIOS = [1.5, 0.5, 1.0, 1.5, 0.5, 1.1]


def logged(variant: Variant = "grpo", **more: Any) -> dict[str, float]:
    config, lp = GrpoConfig(variant=variant), torch.full((6,), -1.0)
    weights = token_weights(torch.tensor([3, 3]), 4, config)
    advantage = torch.tensor([1.0, -1.0])
    return statistics([policy_loss(lp, TWO, advantage, weights, config, **more)[1]])


@pytest.mark.parametrize(
    ("variant", "ratios", "low", "high", "mean"),
    [
        ("grpo", RATIOS, 1 / 6, 1 / 6, sum(RATIOS) / 6),  # 0.5 in the bad reply, 1.5 in the good
        ("cispo", [6.0, 0.5, 1.0, 6.0, 0.5, 1.1], 0, 2 / 6, 15.1 / 6),  # every bounded weight
        ("gspo", RATIOS, 0.5, 0, (0.75 ** (1 / 3) + 0.825 ** (1 / 3)) / 2),  # whole replies
    ],
)
def test_clipped_are_the_tokens_without_a_gradient(variant, ratios, low, high, mean):
    values = logged(variant, old=-1.0 - torch.tensor(ratios).log())
    assert values["clip_low"] == pytest.approx(low)
    assert values["clip_high"] == pytest.approx(high)
    assert values["ratio"] == pytest.approx(mean)


def test_the_gap_is_to_the_weights_that_sampled():
    gap = torch.tensor([0.09, -0.1, 0.0, 0.1, -0.11, 3.0])
    values = logged(sampler=-1.0 - gap, entropy=torch.arange(6.0))
    assert values["entropy"] == pytest.approx(2.5)
    assert values["gap_mean"] == pytest.approx(3.4 / 6)
    assert values["gap_max"] == values["gap_p99"] == pytest.approx(3.0)
    assert values["gap_outside"] == pytest.approx(3 / 6)  # 0.1, -0.11 and 3
    later = logged(old=torch.full((6,), -1.5), sampler=torch.full((6,), -1.4))
    assert later["gap_mean"] == pytest.approx(0.1, rel=1e-5)
