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
    """log-probabilities of the same tokens by four models that differ by about `spread`."""
    generator = torch.Generator().manual_seed(seed)
    lp = -torch.rand(N, generator=generator, dtype=torch.float64) * 3
    noise = torch.randn(3, N, generator=generator, dtype=torch.float64) * spread
    return {"lp": lp, "old": lp + noise[0], "reference": lp + noise[1], "sampler": lp + noise[2]}


def ours(config: GrpoConfig, lp: Tensor, **more: Any) -> tuple[Tensor, Tensor, Any]:
    """loss, gradient (N,), measured."""
    leaf = lp.clone().requires_grad_()
    w = token_weights(torch.tensor(LENGTHS), LONGEST, config)
    loss, measured = policy_loss(leaf, OWNER, torch.tensor(A).double(), w, config, **more)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient, measured


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def reference_loss(
    config: GrpoConfig,
    lp: Sequence[float],
    old: Sequence[float] | None = None,
    reference: Sequence[float] | None = None,
    sampler: Sequence[float] | None = None,
) -> tuple[float, list[float]]:
    """Loss and gradient from the papers' formulas, reply by reply, token by token."""
    low, high = CLIPS[config.variant]
    low = 1 - (config.clip_low or low)
    high = 1 + (config.clip_high or high)
    loss, gradient, start = 0.0, [0.0] * len(lp), 0
    for length, a in zip(LENGTHS, A, strict=True):
        tokens = range(start, start + length)
        start += length
        if config.variant in ("dapo", "cispo"):
            w = 1 / sum(LENGTHS)
        elif config.variant == "dr_grpo":
            w = 1 / (len(LENGTHS) * LONGEST)
        else:
            w = 1 / (len(LENGTHS) * max(1, length))
        before = lp if old is None else old
        cap = config.importance_cap
        trust = {
            t: min(math.exp(before[t] - sampler[t]), cap) if cap and sampler else 1 for t in tokens
        }
        if config.variant == "gspo" and length:
            rho = math.exp(sum(lp[t] - before[t] for t in tokens) / length)
            gain = min(rho * a, clip(rho, low, high) * a)
            free = rho * a <= clip(rho, low, high) * a
            c = sum(trust.values()) / length
            loss -= c * gain / len(LENGTHS)
            for t in tokens:
                gradient[t] -= c * rho * a / length / len(LENGTHS) if free else 0
        elif config.variant == "cispo":
            for t in tokens:
                rho = clip(math.exp(lp[t] - before[t]), low, high)
                loss -= w * trust[t] * rho * a * lp[t]
                gradient[t] -= w * trust[t] * rho * a
        else:
            for t in tokens:
                rho = math.exp(lp[t] - before[t])
                gain = min(rho * a, clip(rho, low, high) * a)
                loss -= w * trust[t] * gain
                if rho * a <= clip(rho, low, high) * a:
                    gradient[t] -= w * trust[t] * rho * a
        for t in tokens:
            if config.beta and reference:
                d = reference[t] - lp[t]
                kind = config.kl or "k3"
                value = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - 1 - d}[kind]
                loss += w * config.beta * value
                slope = 1 - math.exp(d) if kind == "k3" else -d
                gradient[t] += w * config.beta * slope
    return loss, gradient


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.1},
        {"beta": 0.3, "kl": "k1"},
        {"beta": 0.3, "kl": "k2"},
        {"clip_low": 0.05, "clip_high": 0.1},
        {"importance_cap": 1.2},
        {"beta": 0.2, "kl": "k3", "importance_cap": 3.0},
    ],
    ids=str,
)
def test_each_variant_equals_the_loop(variant, first, options):
    config = GrpoConfig(variant=variant, **options)
    x = drawn()
    given: dict[str, Tensor] = {} if first else {"old": x["old"]}
    if config.beta:
        given["reference"] = x["reference"]
    if config.importance_cap:
        given["sampler"] = x["sampler"]
    loss, gradient, _ = ours(config, x["lp"], **given)
    lists: dict[str, Any] = {name: tensor.tolist() for name, tensor in given.items()}
    value, slopes = reference_loss(config, x["lp"].tolist(), **lists)
    assert loss.item() == pytest.approx(value, rel=1e-6, abs=1e-7)
    assert gradient.tolist() == pytest.approx(slopes, rel=1e-6, abs=1e-8)
    clips = not first and variant != "cispo"
    assert any(g == 0 and a for g, a in zip(slopes, torch.tensor(A)[OWNER], strict=True)) == (
        clips and not config.beta
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_pass_has_ratio_one_exactly(variant):
    config = GrpoConfig(variant=variant, clip_low=1e-9, clip_high=1e-9)
    lp = drawn()["lp"].float()
    _, gradient, measured = ours(config, lp)
    w = token_weights(torch.tensor(LENGTHS), LONGEST, config)
    exact = -(w.double() * torch.tensor(A).double())[OWNER]
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-6, atol=0)
    assert statistics([measured]) == {"clip_low": 0, "clip_high": 0, "ratio": 1}


@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batches_add_up_to_the_step(variant):
    config = GrpoConfig(variant=variant, beta=0.1, importance_cap=2.0)
    x = drawn()
    given = {name: x[name] for name in ("old", "reference", "sampler")}
    whole, gradient, measured = ours(config, x["lp"], **given, entropy=x["old"].neg())
    w = token_weights(torch.tensor(LENGTHS), LONGEST, config)
    leaf, total, seen = x["lp"].clone().requires_grad_(), 0.0, []
    for replies in ((5, 0), (2,), (1, 3, 4)):  # another order, and one without tokens
        rows = torch.cat([torch.nonzero(OWNER.eq(reply))[:, 0] for reply in replies])
        owner = torch.repeat_interleave(
            torch.arange(len(replies)), torch.tensor([LENGTHS[reply] for reply in replies])
        )
        own = torch.tensor(replies)
        some = {name: tensor[rows] for name, tensor in given.items()} | {"entropy": -x["old"][rows]}
        A_own = torch.tensor(A).double()[own]
        loss, part = policy_loss(leaf[rows], owner, A_own, w[own], config, **some)
        loss.backward()
        total += loss.item()
        seen.append(part)
    assert total == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(leaf.grad, gradient)
    assert statistics(seen) == pytest.approx(statistics([measured]), rel=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_group_without_variance_can_be_left_out(variant):
    config = GrpoConfig(variant=variant)
    parts = torch.tensor([1.0, 0, 0, 0.3, 0.3, 0.3])[:, None]
    found = advantages(parts, torch.ones(1), torch.tensor([0, 0, 0, 1, 1, 1]), 2, config)
    w = token_weights(torch.tensor(LENGTHS), LONGEST, config)
    x = drawn()
    kept = OWNER < 3
    leaf, own = x["lp"].clone().requires_grad_(), x["lp"][kept].clone().requires_grad_()
    whole, _ = policy_loss(leaf, OWNER, found, w, config, old=x["old"])
    part, _ = policy_loss(own, OWNER[kept], found[:3], w[:3], config, old=x["old"][kept])
    whole.backward()
    part.backward()
    assert leaf.grad is not None
    assert own.grad is not None
    assert whole.item() == part.item()
    assert torch.equal(leaf.grad[kept], own.grad)
    assert not leaf.grad[~kept].any()


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


@pytest.mark.parametrize("variant", ["grpo", "gspo", "dr_grpo"])
@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_the_gradient_is_that_of_the_loss(variant, kl):
    config = GrpoConfig(variant=variant, beta=0.2, kl=kl, clip_low=0.3, clip_high=0.31)
    x = drawn(seed=1, spread=0.2)
    w = token_weights(torch.tensor(LENGTHS), LONGEST, config).double()

    def loss(lp: Tensor) -> Tensor:
        given = {"old": x["old"], "reference": x["reference"]}
        return policy_loss(lp, OWNER, torch.tensor(A).double(), w, config, **given)[0]

    assert torch.autograd.gradcheck(loss, x["lp"].clone().requires_grad_())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("far", [1e3, -1e3])
def test_log_probs_far_apart_stay_finite(variant, kl, far):
    config = GrpoConfig(variant=variant, beta=0.1, kl=kl, importance_cap=2.0)
    lp = drawn()["lp"].float() + min(0.0, far)
    given = {"old": lp - far, "reference": lp - far, "sampler": lp + far}
    loss, gradient, measured = ours(config, lp, **given)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert all(math.isfinite(value) for value in statistics([measured]).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sixteen_bits_are_computed_in_thirty_two(variant, dtype):
    config = GrpoConfig(variant=variant, beta=0.1)
    x = {name: tensor.to(dtype) for name, tensor in drawn().items()}
    given = {name: x[name] for name in ("old", "reference", "sampler")}
    loss, gradient, _ = ours(config, x["lp"], **given)
    wide = {name: tensor.float() for name, tensor in given.items()}
    loss32, gradient32, _ = ours(config, x["lp"].float(), **wide)
    assert loss.dtype == loss32.dtype
    assert torch.equal(loss, loss32)
    assert torch.equal(gradient, gradient32.to(dtype))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_reference_is_never_needed_without_beta(variant):
    config = GrpoConfig(variant=variant)
    x = drawn()
    plain, gradient, measured = ours(config, x["lp"], old=x["old"])
    some = {"reference": x["reference"], "sampler": x["sampler"]}
    seen, same, also = ours(config, x["lp"], old=x["old"], **some)
    assert torch.equal(plain, seen)
    assert torch.equal(gradient, same)
    assert set(statistics([also])) - set(statistics([measured])) == {
        *("kl_k1", "kl_k2", "kl_k3"),
        *("gap_mean", "gap_p99", "gap_max", "gap_outside"),
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_new_log_probs_learn(variant):
    config = GrpoConfig(variant=variant, beta=0.1, importance_cap=2.0)
    x = {name: tensor.clone().requires_grad_() for name, tensor in drawn().items()}
    found = torch.tensor(A, dtype=torch.float64, requires_grad=True)
    w = token_weights(torch.tensor(LENGTHS), LONGEST, config).requires_grad_()
    given = {name: x[name] for name in ("old", "reference", "sampler")}
    policy_loss(x["lp"], OWNER, found, w, config, **given, entropy=x["old"])[0].backward()
    assert x["lp"].grad is not None
    assert all(tensor.grad is None for tensor in (found, w, *given.values()))


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_never_waits_for_a_value(variant):
    """Tensors without values stand for a GPU: whatever asks for one fails on them."""
    config = GrpoConfig(variant=variant, beta=0.1, importance_cap=2.0)
    x = {name: tensor.to("meta") for name, tensor in drawn().items()}
    given = {name: x[name] for name in ("old", "reference", "sampler")} | {"entropy": x["old"]}
    w = token_weights(torch.tensor(LENGTHS, device="meta"), LONGEST, config)
    leaf, owner = x["lp"].requires_grad_(), OWNER.to("meta")
    found = torch.tensor(A, device="meta")
    loss, measured = policy_loss(leaf, owner, found, w, config, **given)
    loss.backward()
    with pytest.raises(NotImplementedError, match="meta"):
        statistics([measured])
