"""train_rft.py --at-once: what a digit without reasoning learns, and runs of both kinds."""

import random

import pytest
import torch
from test_rollouts import script, spelt
from test_train_rft import curve, here, make_quick, start, until, write_given
from test_train_rft_math import ALL, LONGEST, G, known, same, step_of
from test_train_sft import files, short_pairs
from torch import Tensor

from nanopersrm.model.cache import Layout
from nanopersrm.train.curriculum import Curriculum
from nanopersrm.train.grpo import GrpoConfig
from nanopersrm.train.lessons import LessonConfig
from nanopersrm.train.plans import SCORED
from nanopersrm.train.rewards import RewardConfig
from nanopersrm.train.rollouts import RolloutConfig
from nanopersrm.train.source import Source

__all__ = ["known"]  # a fixture

REWARD = RewardConfig(expected=True, twin=0.7, entropy=0.2)


@pytest.mark.parametrize("digits", ["7777", "1928"])
def test_the_gradient_is_that_of_what_a_digit_earns(known, monkeypatch, digits):
    """Σ p(d) r(d) of each prompt, its rivals and its twin as they are; whatever digit was drawn.

    r(d): the chance to be right, ties half, and that of both texts under both writers; how honest
    it is; and the entropy. Over the most tokens that a reply at once can have (dr_grpo)."""
    model, tokenizer, lora = known
    pairs = short_pairs()[:2]
    assert pairs[0].twin == pairs[1].id
    lesson = LessonConfig(longest=10_000, evidence=False)
    rollout = RolloutConfig(group=G, rows=4 * G, reply=LONGEST)
    asking = Curriculum(pairs, 1, 0), lesson, None, rollout, REWARD, 4, 1
    script(monkeypatch, [spelt(tokenizer, f"{d}</scores>") for d in digits for _ in range(G)])
    drawn = Source(model, tokenizer, *asking).harvest(0, 1, 0.0, 0, "prompt")
    learner, numbers = step_of(known, drawn, ALL, reward=REWARD, grpo=GrpoConfig("dr_grpo"))

    (plan,) = drawn.plans
    ids = list(tokenizer.digit_ids)
    p = []  # of each prompt: the nine digits among themselves
    for prompt in plan.asked.prompts:
        hidden = model(torch.tensor(prompt), Layout.of([len(prompt)]))[-1:]
        p.append(model.logits(hidden)[0, ids].double().softmax(-1))
    now = [one.detach() for one in p]
    above = torch.ones(9, 9, dtype=torch.float64).tril(-1)  # above[d, e]: d > e

    def right(k: int) -> Tensor:
        """(9,) the chance of each digit about prompt k to be right against its rival."""
        return (above if k % 2 == 0 else above.T) @ now[k ^ 1]

    worth = torch.zeros((), dtype=torch.float64)
    for k in range(4):
        order = right(k) + now[k ^ 1] / 2
        same_text = 3 - k  # the chosen text of the pair is the rejected one of the twin
        twin = right(k) * (now[same_text] @ right(same_text))
        writers = torch.tensor([1.0 - k % 2] * 9)
        honest = 1 - (torch.arange(9) / 8 - writers).square().double()
        told = REWARD.order * order + REWARD.twin * twin + REWARD.calibration * honest
        worth = worth + p[k] @ told - REWARD.entropy * p[k] @ p[k].log()
    gradients = torch.autograd.grad(-worth * (G - 1) / (4 * G * SCORED), lora.parameters())
    scale = 1e3 / max(float(one.abs().max()) for one in gradients)  # `same` looks at large ones
    same([scale * one for one in learner.gradients[0]], [scale * one for one in gradients], 1e-4)
    assert numbers["gap_max"] < 1e-4


@pytest.mark.parametrize("more", [("--at-once", "1"), ("--at-once", "2")])
def test_killed_and_resumed_is_never_interrupted(more, tmp_path, monkeypatch):
    """As a run that reasons only: the same curve and the same adapter, byte for byte."""
    make_quick(monkeypatch)
    given = [*write_given(tmp_path), "--steps", "4", "--plans", "2", *more]
    assert here(*given, "--out", tmp_path / "whole") == 0
    lines = curve(tmp_path / "whole")
    assert all(("right_at_once" in line) == ("1" in more) for line in lines)
    out = tmp_path / "run"
    process = start(*given, "--out", out)
    until(process, out, random.Random("at once").randint(1, 2))
    process.kill()
    process.communicate()
    assert here(*given, "--out", out, "--resume") == 0
    assert curve(out) == lines
    assert files(out / "adapter") == files(tmp_path / "whole/adapter")


@pytest.mark.parametrize("at_once", ["-1", "3"])
def test_no_more_than_all_plans(at_once, tmp_path, capsys):
    given = [*write_given(tmp_path), "--plans", "2", "--at-once", at_once]
    capsys.readouterr()
    assert here(*given, "--out", tmp_path / "run") == 2
    assert capsys.readouterr().err == (
        f"train_rft.py: error: --at-once: expected 0 to --plans (2), got {at_once}\n"
    )
    assert not (tmp_path / "run").exists()
