"""Trials: who is right, twins together, what is well formed, and nothing of the model changed."""

from dataclasses import replace

import pytest
import torch
from fixtures import make_base

from data.build import demo_pairs
from nanopersrm.judge import verdict
from nanopersrm.judge.answer import Answer, AnswerConfig, answer
from nanopersrm.model.lora import Lora, LoraConfig
from nanopersrm.model.sampler import Reply
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.weights import load
from nanopersrm.train import course
from nanopersrm.train import trial as trials
from nanopersrm.train.lessons import LessonConfig
from nanopersrm.train.objective import ObjectiveConfig, sums
from nanopersrm.train.packing import Bundle, batch, weights_of
from nanopersrm.train.presets import PRESETS
from nanopersrm.train.trial import Trial, both_right, hold, reason

CPU = torch.device("cpu")
HOW = PRESETS["tiny"]
CONFIG = LessonConfig(longest=10_000, rivals=1, evidence=False)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """(model, tokenizer, trees, twins, prompts) of two couples of twins."""
    base = make_base(tmp_path_factory.mktemp("trial") / "smollm", "smollm", 16_384)
    model, tokenizer = load(base, torch.float32, CPU), Tokenizer.load(base)
    pairs = demo_pairs(seed=3, pairs=4)[:4]
    trees = [course.tree(pair, {}, tokenizer, CONFIG, "0/exam", None) for pair in pairs]
    assert all(trees)
    prompts = [course.prompt(pairs[0], "chosen", tokenizer, CONFIG, None)[-60:]] * 2
    return model, tokenizer, trees, {pair.id: pair.twin for pair in pairs}, prompts


def scored(monkeypatch, right: dict[str, bool | None]) -> None:
    """Scores by hand: above the rivals where a pair is right, below if not, equal for None."""

    def by_hand(model, packed, digit_ids, config, how):
        found = sums(model, packed, digit_ids, config, how)
        scores = torch.full_like(found.scores, 5.0)
        for name, (first, _, chosen) in zip(packed.names, packed.lists, strict=True):
            lead = right[name]
            scores[first + chosen] += 0.0 if lead is None else 1.0 if lead else -1.0
        return replace(found, scores=scores)

    monkeypatch.setattr(trials, "sums", by_hand)


@pytest.mark.parametrize(
    ("answers", "accuracy", "twins"),
    [
        ((True, True, True, True), 1.0, 1.0),
        ((True, False, True, False), 0.5, 0.0),  # who does not read the exemplars
        ((True, True, False, False), 0.5, 0.5),
        ((True, None, True, True), 0.75, 0.5),  # equal scores are wrong
        ((False, False, False, False), 0.0, 0.0),
    ],
)
def test_twins_count_together(known, monkeypatch, answers, accuracy, twins):
    model, tokenizer, trees, couples, _ = known
    ordered = sorted(tree.name for tree in trees)  # a twin has the same name up to its last letter
    assert all(couples[a] == b for a, b in (ordered[:2], ordered[2:]))
    scored(monkeypatch, dict(zip(ordered, answers, strict=True)))
    found, replies = hold(model, tokenizer, trees, couples, [], HOW, 0)
    assert (found.accuracy, found.twins, found.pairs) == (accuracy, twins, 4)
    assert (found.replies, found.well_formed, replies) == (0, 0.0, [])


def test_a_pair_without_its_twin_is_no_couple(known):
    model, tokenizer, trees, couples, _ = known
    found, _ = hold(model, tokenizer, trees[:1], couples, [], HOW, 0)
    assert found.twins is None
    assert "twins" not in found.said()
    assert "validation_twins" not in found.numbers()


@pytest.mark.parametrize("budget", [100, 100_000])
def test_scores_and_loss_are_of_the_objective(known, budget):
    """However the trees are packed: the mean loss of a token, and pairs by their soft scores."""
    model, tokenizer, trees, couples, _ = known
    found, _ = hold(model, tokenizer, trees, couples, [], replace(HOW, budget=budget), 0)
    total, right = 0.0, 0
    for tree in trees:
        packed = batch([tree], CPU)
        with torch.no_grad():
            one = sums(model, packed, tokenizer.digit_ids, ObjectiveConfig(), HOW)
        total += float(one.imitation)
        ((_, count, chosen),) = packed.lists
        assert count == 2
        right += float(one.scores[chosen]) > float(one.scores[1 - chosen])
    assert found.loss == pytest.approx(total / weights_of(trees)[0], rel=1e-5)
    assert found.accuracy == right / len(trees)
    assert 2 < found.loss < 60


def test_replies_are_parsed(known, monkeypatch):
    """Well formed is what the judge could read; where a reply ends, its stop token goes."""
    model, tokenizer, trees, couples, _ = known
    stop = next(iter(tokenizer.eos_ids))
    good = tokenizer.encode("It fits.\n</think>\n<scores>A=7</scores>")
    two = tokenizer.encode("It fits.\n</think>\n<scores>A=7 B=3</scores>")
    drawn = [(good, True), (good, False), (two, True), (good[:5], False)]
    asked: list[list[list[int]]] = []

    def sampled(model, prompts, config, stop_ids):
        asked.append([list(prompt) for prompt in prompts])
        assert stop in stop_ids
        assert (config.max_new, config.seed) == (trials.REPLY_TOKENS, 4)
        made = []
        for ids, ended in drawn:
            kept = [*ids, stop] if ended else ids
            made.append([Reply(kept, [0.0] * len(kept), "stop" if ended else "length")])
        return made

    monkeypatch.setattr(trials, "sample", sampled)
    prompts = [[i + 1] for i in range(4)]
    found, replies = hold(model, tokenizer, trees[:1], couples, prompts, HOW, 4)
    assert asked == [prompts]
    assert (found.well_formed, found.replies) == (0.5, 4)
    assert replies[0] == replies[1] == f"{verdict.OPEN}It fits.\n</think>\n<scores>A=7</scores>"
    assert not any("<|im_end|>" in reply for reply in replies)


def test_drawn_replies_are_the_same_again(known):
    model, tokenizer, trees, couples, prompts = known
    trials_of = [hold(model, tokenizer, trees[:1], couples, prompts, HOW, s) for s in (1, 1, 2)]
    assert trials_of[0] == trials_of[1]
    assert trials_of[0][1] != trials_of[2][1]
    assert all(reply.startswith(verdict.OPEN) for reply in trials_of[0][1])


def test_nothing_is_left_behind(known):
    """Dropout is off meanwhile; mode, gradients and random numbers are as they were."""
    model, tokenizer, trees, couples, prompts = known
    lora = Lora(model, LoraConfig(rank=2, dropout=0.5), 0)
    with torch.no_grad():
        for _, B in lora.masters.values():
            B.normal_(0, 0.3)
    lora.refresh()
    lora.on(model)
    model.train()
    before = torch.get_rng_state()
    first, replies = hold(model, tokenizer, trees[:2], couples, prompts, HOW, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    torch.rand(1)
    assert hold(model, tokenizer, trees[:2], couples, prompts, HOW, 0) == (first, replies)
    assert all(part.grad is None for part in lora.parameters())
    model.eval()
    hold(model, tokenizer, trees[:1], couples, [], HOW, 0)
    assert not model.training
    lora.off(model)


def test_nothing_to_validate_on(known):
    model, tokenizer, *_ = known
    found, replies = hold(model, tokenizer, list[Bundle](), {}, [], HOW, 0)
    assert found == Trial(0.0, None, 0.0, 0, 0.0, 0)
    assert replies == []


def test_what_is_said():
    found = Trial(0.625, 0.25, 1.2345, 40, 0.875, 8)
    assert found.said() == (
        "62.5% of 40 validation pairs (25% of the twins), 88% of 8 replies well formed, "
        "1.234 nats a reply token"
    )
    assert found.numbers() == {
        "validation_loss": 1.2345,
        "validation_accuracy": 0.625,
        "validation_well_formed": 0.875,
        "validation_twins": 0.25,
    }


def test_what_is_said_after_reasoning():
    found = Trial(0.5, 0.25, 1.0, 40, 0.875, 8, 0.75, 0.5, 12)
    assert "after reasoning 75.0% of 12 (50% of the twins), 88% of 8 replies" in found.said()
    assert found.numbers()["validation_reasoned"] == 0.75
    assert found.numbers()["validation_reasoned_twins"] == 0.5
    alone = replace(found, reasoned_twins=None)
    assert "after reasoning 75.0% of 12, 88%" in alone.said()
    assert "validation_reasoned_twins" not in alone.numbers()


# After reasoning


def digits(digit: int) -> list[float]:
    return [float(d == digit) for d in range(1, 10)]


def both(a: int, b: int) -> list[list[float]]:
    return [[p * q for q in digits(b)] for p in digits(a)]


@pytest.mark.parametrize("at_once", [16, 3, 1])
def test_right_is_a_higher_score_for_the_chosen_text(known, monkeypatch, at_once):
    """Of one candidate by soft scores, which need not be the digits that were drawn."""
    model, tokenizer, *_ = known
    said = {
        "right": (digits(7), digits(3)),
        "wrong": (digits(3), digits(7)),
        "equal": (digits(5), digits(5)),
        "soft": ([0.0] * 4 + [0.5, 0.5] + [0.0] * 3, [0.0] * 4 + [0.6, 0.4] + [0.0] * 3),
    }
    flat = [one for two in said.values() for one in two]
    asked = {name: ([2 * k], [2 * k + 1]) for k, name in enumerate(said)}
    seen = []

    def answered(model, tokenizer, prompts, labels, config):
        assert not model.training
        assert (labels, config.temperature, config.think_tokens) == (1, 0.0, 9)
        seen.append(len(prompts))
        return [[Answer("", flat[prompt[0]], None, False, 1)] for prompt in prompts]

    monkeypatch.setattr(trials, "answer", answered)
    monkeypatch.setattr(trials, "AT_ONCE", at_once)
    model.train()
    found = reason(model, tokenizer, asked, 1, 9, HOW)
    assert model.training
    model.eval()
    assert found == {"right": True, "wrong": False, "equal": False, "soft": True}
    assert max(seen) <= at_once
    twins = {"right": "soft", "soft": "right", "equal": "wrong", "wrong": "equal"}
    assert both_right(found, twins) == 0.5


def test_right_of_two_candidates_is_by_both_orders(known, monkeypatch):
    """A is the chosen text in the first prompt and the rejected one in the second."""
    model, tokenizer, *_ = known
    said = {
        "right": (both(7, 3), both(3, 7)),
        "always A": (both(7, 3), both(7, 3)),
        "always B": (both(2, 8), both(2, 8)),
        "wrong": (both(3, 7), both(7, 3)),
        "equal once": (both(6, 4), both(5, 5)),
    }
    flat = [one for two in said.values() for one in two]

    def answered(model, tokenizer, prompts, labels, config):
        assert labels == 2
        return [[Answer("", digits(5), flat[prompt[0]], False, 2)] for prompt in prompts]

    monkeypatch.setattr(trials, "answer", answered)
    asked = {name: ([2 * k], [2 * k + 1]) for k, name in enumerate(said)}
    assert reason(model, tokenizer, asked, 2, 9, HOW) == {
        "right": True,
        "always A": False,
        "always B": False,
        "wrong": False,
        "equal once": True,
    }


def test_reasoning_is_the_judges(known):
    """The scores are those of greedy answers to the same prompts; no random numbers are used."""
    model, tokenizer, *_ = known
    prompts = [
        course.prompt(pair, role, tokenizer, CONFIG, None)
        for pair in demo_pairs(seed=3, pairs=4)[:2]
        for role in ("chosen", "rejected")
    ]
    before = torch.get_rng_state()
    found = reason(model, tokenizer, {"a": prompts[:2], "b": prompts[2:]}, 1, 6, HOW)
    assert torch.equal(torch.get_rng_state(), before)
    soft = []
    for prompt in prompts:
        ((one,),) = answer(model, tokenizer, [prompt], 1, AnswerConfig(think_tokens=6))
        soft.append(verdict.soft_score(one.digits))
    assert found == {"a": soft[0] > soft[1], "b": soft[2] > soft[3]}
