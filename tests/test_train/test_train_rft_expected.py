"""train_rft.py --reward.expected: a step of it against replies computed one by one, and a run."""

import math
import random
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from test_train_rft import curve, here, make_quick, write_given
from test_train_rft_math import ALL, G, by_hand, harvest_of, known, same, step_of

from nanopersrm.model.cache import Layout
from nanopersrm.train.grpo import GrpoConfig
from nanopersrm.train.harvest import Harvest
from nanopersrm.train.rewards import RewardConfig

__all__ = ["known"]  # a fixture


def with_digits(drawn: Harvest) -> Harvest:
    """Most replies get a digit somewhere, its nine chances and what each would have earned."""
    randoms = random.Random(8)
    for one in drawn.plans:
        for group, worth in zip(one.groups, one.rewards, strict=True):
            for i, (reply, reward) in enumerate(zip(group, worth, strict=True)):
                if randoms.random() < 0.2:
                    continue
                p = [randoms.random() for _ in range(9)]
                chances = tuple(q / math.fsum(p) for q in p)
                by_digit = tuple(randoms.random() for _ in range(9))
                at = randoms.randrange(len(reply.ids))
                rollout = replace(reply.rollout, chances=chances)
                group[i] = replace(reply, rollout=rollout, digit_at=at)
                total = math.fsum(q * r for q, r in zip(chances, by_digit, strict=True))
                worth[i] = replace(reward, total=total, by_digit=by_digit)
    return drawn


@pytest.mark.parametrize("variant", ["grpo", "dr_grpo"])
@pytest.mark.parametrize("budget", [ALL, 130], ids=["one tree a pair", "halves"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_all_nine_digits_equal_row_by_row(known, variant, budget, temperature):
    """By the formulas of expected.py, each reply behind its own copy of the prompt."""
    model, tokenizer, lora = known
    drawn = with_digits(harvest_of(known, temperature))
    grpo, reward_config = GrpoConfig(variant=variant), RewardConfig(expected=True)
    asked = {"temperature": temperature, "grpo": grpo, "reward": reward_config}
    learner, _ = step_of(known, drawn, budget, 0.0, 0.0, **asked)
    w = by_hand(variant, drawn)[1]
    loss = torch.zeros((), dtype=torch.float64)
    number = digits = 0
    for one in drawn.plans:
        for prompt, group, worth in zip(one.asked.prompts, one.groups, one.rewards, strict=True):
            means = [reward.total for reward in worth]
            table = [reward.by_digit or (reward.total,) * 9 for reward in worth]
            chances = [reply.rollout.chances or (1 / 9,) * 9 for reply in group]
            m = fmean(means)
            square = sum((mean - m) ** 2 for mean in means) + (1 - 1 / G) * sum(
                p * (r - mean) ** 2
                for q, own, mean in zip(chances, table, means, strict=True)
                for p, r in zip(q, own, strict=True)
            )
            scale = 1.0 if variant == "dr_grpo" else math.sqrt(square / (G - 1)) + 1e-4
            for i, reply in enumerate(group):
                ids = torch.tensor([*prompt, *reply.ids])
                hidden = model(ids, Layout.of([len(ids)]))[len(prompt) - 1 : -1]
                logits = model.logits(hidden) / temperature
                log_p = logits.log_softmax(-1).gather(-1, ids[len(prompt) :, None]).double()
                ratio = (log_p - log_p.detach()).exp()
                loss = loss - (w[number] * (means[i] - m) / scale * ratio).sum()
                if worth[i].by_digit is not None:
                    digits += 1
                    nine = logits[reply.digit_at, tokenizer.digit_ids].log_softmax(-1).double()
                    told = torch.tensor([r - m - (r - means[i]) / G for r in table[i]]) / scale
                    p = torch.tensor(chances[i])
                    loss = loss - w[number] * (p * told * (nine - nine.detach()).exp()).sum()
                number += 1
    assert number / 2 < digits < number
    gradients = torch.autograd.grad(loss, lora.parameters())
    assert learner.loss == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-7)
    same(learner.gradients[0], list(gradients))


def test_without_expectation_digits_change_nothing(known):
    plain, _ = step_of(known, harvest_of(known), ALL)
    drawn = harvest_of(known)
    for told, bare in zip(with_digits(harvest_of(known)).plans, drawn.plans, strict=True):
        bare.groups[:] = told.groups  # the chances are known, what the digits would earn is not
    unasked, _ = step_of(known, drawn, ALL)
    assert unasked.loss == plain.loss
    for one, other in zip(unasked.gradients[0], plain.gradients[0], strict=True):
        assert torch.equal(one, other)


def test_a_run_says_what_it_needs(tmp_path, capsys):
    given = write_given(tmp_path)
    capsys.readouterr()
    assert here(*given, "--reward.expected", "--form", "pairwise", "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error == (
        "train_rft.py: error: --reward.expected: expected a pointwise judge, its form is pairwise\n"
    )
    assert not (tmp_path / "run").exists()


def test_where_no_reply_has_a_digit_it_is_grpo(tmp_path, monkeypatch):
    """The rewards of `make_quick` know of none: every number is as without."""
    make_quick(monkeypatch)
    given = [*write_given(tmp_path), "--steps", "2", "--eval-pairs", "0"]
    assert here(*given, "--out", tmp_path / "plain") == 0
    assert here(*given, "--reward.expected", "--out", tmp_path / "run") == 0
    for one, other in zip(curve(tmp_path / "run"), curve(tmp_path / "plain"), strict=True):
        for name in ("reward", "right", "length", "entropy", "gradient_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3), name
