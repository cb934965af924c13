"""GRPO beside its loss: the numbers that are logged, and what is refused."""

import math
from typing import Any

import pytest
import torch

from nanopersrm import InputError
from nanopersrm.train.grpo import CLIPS, GrpoConfig, Variant, policy_loss, statistics, token_weights

A = torch.tensor([1.0, -1.0])
OWNER = torch.tensor([0, 0, 0, 1, 1, 1])
RATIOS = [1.5, 0.5, 1.0, 1.5, 0.5, 1.1]  # of a good reply, then of a bad one


def seen(variant: Variant = "grpo", **more: Any) -> dict[str, float]:
    config = GrpoConfig(variant=variant)
    lp = torch.full((6,), -1.0)
    weights = token_weights(torch.tensor([3, 3]), 4, config)
    return statistics([policy_loss(lp, OWNER, A, weights, config, **more)[1]])


def test_clipped_are_the_tokens_without_a_gradient():
    old = -1.0 - torch.tensor(RATIOS).log()
    found = seen(old=old)
    assert found["clip_high"] == pytest.approx(1 / 6)  # 1.5 in the good reply
    assert found["clip_low"] == pytest.approx(1 / 6)  # 0.5 in the bad one
    assert found["ratio"] == pytest.approx(sum(RATIOS) / 6)


def test_cispo_counts_every_bounded_weight():
    old = -1.0 - torch.tensor([6.0, 0.5, 1.0, 6.0, 0.5, 1.1]).log()
    found = seen("cispo", old=old)
    assert found["clip_high"] == pytest.approx(2 / 6)
    assert found["clip_low"] == 0  # there is no lower bound


def test_gspo_clips_whole_replies():
    old = -1.0 - torch.tensor(RATIOS).log()
    found = seen("gspo", old=old)
    means = [0.75 ** (1 / 3), 0.825 ** (1 / 3)]  # 1.5 · 0.5 · 1 and 1.5 · 0.5 · 1.1
    assert found["ratio"] == pytest.approx(sum(means) / 2)
    assert found["clip_low"] == pytest.approx(0.5)
    assert found["clip_high"] == 0


def test_kl_and_entropy_are_means_over_tokens():
    d = [0.1, -0.2, 0.0, 0.5, -1.0, 0.0]
    found = seen(reference=-1.0 + torch.tensor(d), entropy=torch.arange(6.0))
    assert found["kl_k1"] == pytest.approx(-sum(d) / 6)
    assert found["kl_k2"] == pytest.approx(sum(x * x / 2 for x in d) / 6)
    assert found["kl_k3"] == pytest.approx(sum(math.exp(x) - 1 - x for x in d) / 6, rel=1e-5)
    assert found["entropy"] == pytest.approx(2.5)


def test_the_gap_is_taken_before_any_clipping():
    gap = torch.tensor([0.09, -0.1, 0.0, 0.1, -0.11, 3.0])
    config = GrpoConfig(importance_cap=1.0)
    lp, weights = torch.full((6,), -1.0), torch.ones(2)
    measured = policy_loss(lp, OWNER, A, weights, config, sampler=lp - gap)[1]
    found = statistics([measured])
    assert found["gap_mean"] == pytest.approx(3.4 / 6)
    assert found["gap_max"] == found["gap_p99"] == pytest.approx(3.0)
    assert found["gap_outside"] == pytest.approx(3 / 6)  # 0.1, -0.11 and 3


def test_the_gap_is_to_the_weights_that_sampled():
    lp, old = torch.full((6,), -1.0), torch.full((6,), -1.5)
    sampler = torch.full((6,), -1.4)
    found = seen(old=old, sampler=sampler)
    assert found["gap_mean"] == pytest.approx(0.1, rel=1e-5)
    assert seen(sampler=lp)["gap_max"] == 0


@pytest.mark.parametrize(("count", "rank"), [(1, 1), (99, 99), (100, 99), (101, 100), (1000, 990)])
def test_the_99th_percentile_over_micro_batches(count, rank):
    gap = torch.arange(1, count + 1)[torch.randperm(count)] / count
    measured = []
    for some in gap.split(300):
        lp = torch.zeros(len(some), dtype=torch.float64)
        owner = torch.zeros(len(some), dtype=torch.int64)
        one = policy_loss(lp, owner, A[:1], torch.ones(1), GrpoConfig(), sampler=lp - some)
        measured.append(one[1])
    assert statistics(measured)["gap_p99"] == pytest.approx(rank / count)


def test_measuring_half_of_a_step_is_refused():
    lp, weights = torch.full((6,), -1.0), torch.ones(2)
    with_gap = policy_loss(lp, OWNER, A, weights, GrpoConfig(), sampler=lp)[1]
    without = policy_loss(lp, OWNER, A, weights, GrpoConfig())[1]
    with pytest.raises(AssertionError, match="measured in 1 of 2 micro-batches"):
        statistics([with_gap, without])


def test_weights_of_tokens():
    lengths = torch.tensor([1, 3, 0])
    thirds = [1 / 3, 1 / 9, 1 / 3]  # the empty reply's weight meets no token
    alike: tuple[Variant, ...] = ("grpo", "gspo", "gdpo")
    for variant in alike:
        found = token_weights(lengths, 4, GrpoConfig(variant=variant))
        assert found.tolist() == pytest.approx(thirds)
    by_token: tuple[Variant, ...] = ("dapo", "cispo")
    for variant in by_token:
        found = token_weights(lengths, 4, GrpoConfig(variant=variant))
        assert found.tolist() == pytest.approx([1 / 4] * 3)
    found = token_weights(lengths, 4, GrpoConfig(variant="dr_grpo"))
    assert found.tolist() == pytest.approx([1 / 12] * 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "ppo"}, "variant: expected one of grpo, dr_grpo, .*, got 'ppo'"),
        ({"scale": "batch"}, "scale: expected one of std, none, got 'batch'"),
        ({"kl": "k4", "beta": 0.1}, "kl: expected one of k1, k2, k3, got 'k4'"),
        ({"clip_low": 0.0}, "clip_low: expected above 0, at most 1, got 0.0"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"clip_low": math.nan}, "clip_low"),
        ({"clip_high": -0.1}, "clip_high: expected a number above 0, got -0.1"),
        ({"clip_high": math.inf}, "clip_high"),
        ({"beta": -1.0}, "beta: expected a number from 0, got -1.0"),
        ({"beta": math.nan}, "beta"),
        ({"importance_cap": 0.5}, "importance_cap: expected from 1, got 0.5"),
        ({"importance_cap": math.inf}, "importance_cap"),
        ({"kl": "k3"}, "kl: k3 has no effect with beta 0"),
        ({"variant": "gdpo", "scale": "none"}, "scale: gdpo compares parts by their deviation"),
        ({"variant": "dr_grpo", "scale": "std"}, "scale: dr_grpo has no deviation, got std"),
    ],
)
def test_senseless_options_are_refused(options, message):
    with pytest.raises(InputError, match=message) as caught:
        GrpoConfig(**options)
    assert "\n" not in str(caught.value)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="epsilon"):
        GrpoConfig(epsilon=0.2)  # type: ignore[call-arg]


@pytest.mark.parametrize("variant", CLIPS)
def test_each_variant_has_its_own_clips(variant):
    papers = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0)}
    low, high = papers.get(variant, (0.2, 0.2))
    assert GrpoConfig(variant=variant).clips == (1 - low, 1 + high)
    assert GrpoConfig(variant=variant, clip_low=0.5, clip_high=0.7).clips == (0.5, 1.7)


@pytest.mark.parametrize(
    ("config", "changed", "message"),
    [
        (GrpoConfig(beta=0.1), {}, "beta 0.1 without a reference"),
        (GrpoConfig(importance_cap=2.0), {}, "importance_cap without sampler"),
        (GrpoConfig(), {"old": torch.zeros(5)}, r"expected old \(6,\)"),
        (GrpoConfig(), {"reference": torch.zeros(6, 1)}, r"expected reference \(6,\)"),
        (GrpoConfig(), {"sampler": torch.zeros(1)}, r"expected sampler \(6,\)"),
        (GrpoConfig(), {"entropy": torch.zeros(7)}, r"expected entropy \(6,\)"),
        (GrpoConfig(), {"owner": OWNER[:4]}, r"expected owner \(6,\)"),
        (GrpoConfig(), {"owner": OWNER.int()}, "expected owners in int64"),
        (GrpoConfig(), {"weights": torch.ones(3)}, "expected 2 weights"),
        (GrpoConfig(), {"advantages": A[:, None]}, r"expected advantages \(S,\)"),
        (GrpoConfig(), {"log_probs": torch.zeros(6, 2)}, r"expected log_probs \(N,\)"),
    ],
)
def test_tensors_that_miss_or_do_not_fit_are_refused(config, changed, message):
    given: dict[str, Any] = {
        "log_probs": torch.zeros(6),
        "owner": OWNER,
        "advantages": A,
        "weights": torch.ones(2),
    }
    with pytest.raises(AssertionError, match=message):
        policy_loss(**(given | changed), config=config)
